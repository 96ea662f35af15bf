"""Two tiny tokenizers that share most of their tokens under other numbers, and a draft model for the second."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import tiny_models
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Ġ", "Ċ", ".", ",", "Ã", "¤"]
_SHARED = [("a", "b"), ("Ġ", "t")]
_OF_TARGET, _OF_DRAFT = [("c", "d"), ("e", "f")], [("a", "c"), ("Ġt", "h")]


def tokenizer(merges: Sequence[tuple[str, str]], seed: int, end: str) -> Any:
    """Byte-level, 63 pieces and a special token, numbered in a random order."""
    pieces = [*_LETTERS, *(a + b for a, b in merges), end]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    vocab = {piece: order[i] for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)


def tokenizers() -> tuple[Any, Any]:
    """The target's and the draft's: four pieces in all that the other has not, and different end-of-text tokens."""
    return tokenizer([*_SHARED, *_OF_TARGET], 1, "<end>"), tokenizer([*_SHARED, *_OF_DRAFT], 2, "</s>")


def translated(model: torch.nn.Module, same: dict[int, int]) -> torch.nn.Module:
    """The model with the draft's numbering: row `same[i]` of its embeddings and head is what row i was."""
    twin = copy.deepcopy(model)
    mine, theirs = torch.tensor(list(same)), torch.tensor(list(same.values()))
    with torch.no_grad():
        for now, before in (
            (twin.get_input_embeddings().weight, model.get_input_embeddings().weight),
            (twin.get_output_embeddings().weight, model.get_output_embeddings().weight),
        ):
            now[theirs] = before[mine]
    return twin


def draft_of(target: torch.nn.Module, noise: float, same: dict[int, int]) -> torch.nn.Module:
    return translated(tiny_models.noisy(target, noise), same)
