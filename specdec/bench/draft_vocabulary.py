"""The most frequent tokens of a made pair's own texts, as its draft's vocabulary, and what that loses.

Shape suffixes: B texts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specdec.bench.synthetic import Pair, greedy_texts, make_prompts
from specdec.vocabulary import DraftVocabulary, always_included, count_tokens, cut_head, most_frequent

# Prompts of this seed are never measured.
_SEED = 2
_PROMPT_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Chosen:
    """`coverage`: of the target's tokens in texts that were not counted. `agreement`, `agreement_cut`: how often the
    draft's first choice there is the target's token, with all tokens and with the vocabulary's."""

    vocabulary: DraftVocabulary
    counted_tokens: int
    coverage: float
    agreement: float
    agreement_cut: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "size": len(self.vocabulary),
            "counted_tokens": self.counted_tokens,
            "coverage": self.coverage,
            "agreement": self.agreement,
            "agreement_cut": self.agreement_cut,
        }


@torch.inference_mode()
def choose(pair: Pair, size: int, *, num_texts: int = 64, num_tokens: int = 128) -> Chosen:
    """Count the target's greedy texts behind prompts of their own, and judge on a quarter that is not counted.

    Raises `InputError` for a size that the vocabulary does not have.
    """
    target, draft = pair.target, pair.draft
    counts = torch.zeros(pair.shape.vocab_size, dtype=torch.int64)
    most_frequent(counts, size, always_included(pair.tokenizer, draft))  # a wrong size is known before the work
    texts_BT = greedy_texts(target, make_prompts(pair.shape, num_texts, _PROMPT_TOKENS, _SEED), num_tokens)
    held_out_BT = texts_BT[: max(1, num_texts // 4)]
    counted = texts_BT[len(held_out_BT) :, _PROMPT_TOKENS:].tolist()
    vocabulary = most_frequent(
        count_tokens(counted, pair.shape.vocab_size), size, always_included(pair.tokenizer, draft)
    )
    new = held_out_BT[:, _PROMPT_TOKENS:]

    def chosen(model: Any) -> torch.Tensor:
        out: torch.Tensor = model(held_out_BT[:, :-1], use_cache=False, logits_to_keep=num_tokens).logits.argmax(-1)
        return out

    ids_R = vocabulary.ids_R.to(new.device)
    return Chosen(
        vocabulary,
        sum(map(len, counted)),
        float(torch.isin(new, ids_R).float().mean()),
        float((chosen(draft) == new).float().mean()),
        float((ids_R[chosen(cut_head(draft, ids_R))] == new).float().mean()),
    )
