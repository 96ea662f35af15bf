"""Tokens and texts made to order: a byte-level tokenizer, a target that says what it is told, a drafter that errs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from specdec.chance import Chance
from specdec.drafter import Drafter, Outcome, Request
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.tree import TokenTree

BYTES = 256
BOS, EOS = 256, 257
TEXT_VOCAB = 264


def byte_tokenizer(*, bos: bool = True, order: int = 1, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """One token per byte, ids 0 to 255; `order=-1` numbers the bytes backwards, `merges` add longer pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[::order]
    vocab = {piece: i for i, piece in enumerate(alphabet)}
    vocab.update({"<s>": BOS, "</s>": EOS})
    vocab.update({a + b: EOS + 1 + i for i, (a, b) in enumerate(merges)})
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


class Says(tf.LogitsProcessor):
    """Leaves one token: the script's, counted from the end of the prompt; after the script, token 0.

    A function of (prefix, scores), as processors must be.
    """

    def __init__(self, prompt_length: int, script: Sequence[int]):
        self.prompt_length, self.script = prompt_length, list(script)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self.prompt_length
        token = self.script[at] if at < len(self.script) else 0
        out = torch.full_like(scores, -torch.inf)
        out[:, token] = 0.0
        return out


class ScriptedDrafter(Drafter):
    """Proposes a known continuation as a chain; every `wrong_every`-th position of the text is off by one."""

    def __init__(self, script: Sequence[int], wrong_every: int = 0):
        self.script, self.wrong_every = list(script), wrong_every

    @property
    def name(self) -> str:
        return "scripted"

    def start(self, request: Request) -> tuple[int, int]:
        return 0, request.vocab_size

    def propose(self, state: tuple[int, int], plan: Plan, chance: Chance) -> Proposal:
        at, vocab_size = state
        chain = self.script[at : at + plan.depth]
        if self.wrong_every:
            chain = [
                (token + 1) % vocab_size if (at + i) % self.wrong_every == self.wrong_every - 1 else token
                for i, token in enumerate(chain)
            ]
        return Proposal.point(TokenTree.chain(chain))

    def observe(self, state: tuple[int, int], outcome: Outcome) -> tuple[int, int]:
        return state[0] + len(outcome.tokens), state[1]
