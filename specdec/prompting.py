"""Prompts in all forms that they come in, as token ids that fit the model; and the ids that end a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from specdec.chat import Chat
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.runtime.backend import Capabilities

Prompt = str | Sequence[int] | torch.Tensor | Sequence[Mapping[str, str]]
Prompts = (
    list[str]
    | list[list[int]]
    | list[torch.Tensor]
    | list[list[Mapping[str, str]]]
    | tuple[str, ...]
    | tuple[list[int], ...]
    | tuple[torch.Tensor, ...]
)


def encode(prompt: Prompt, tokenizer: Any) -> list[int]:
    """A string, token ids, a 1-D tensor, or chat messages, as token ids. `tokenizer` may be None where none is needed.

    Raises `InputError` for anything else.
    """
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1:
            raise InputError(f"a prompt tensor has one dimension; this one has shape {list(prompt.shape)}")
        return [int(token) for token in prompt.tolist()]
    if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
        if tokenizer is None:
            raise InputError("a text prompt needs a tokenizer; pass tokenizer=, or give token ids")
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        return Chat().encode(tokenizer, prompt)  # type: ignore[arg-type]
    if not all(isinstance(token, int) for token in prompt):
        raise InputError(
            "a prompt is one string, one list of token ids, a 1-D tensor, or chat messages; "
            "several prompts are a list of those, for generate, generate_plain and batch()"
        )
    return list(prompt)  # type: ignore[arg-type]


def fitting_ids(prompt: Prompt, tokenizer: Any, capabilities: Capabilities) -> list[int]:
    """The prompt's ids, at least one (BOS for an empty prompt). Raises `InputError` when the model cannot go on."""
    ids = encode(prompt, tokenizer)
    if not ids:
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise InputError("the prompt is empty and the tokenizer has no BOS token to start from")
        ids = [bos]
    if len(ids) >= capabilities.context:
        raise InputError(
            f"the prompt has {len(ids)} tokens and the model's context is {capabilities.context}: nothing is left "
            "to generate; shorten the prompt"
        )
    if not all(0 <= token < capabilities.vocab_size for token in ids):
        raise InputError(f"the prompt has a token outside the vocabulary of {capabilities.vocab_size}")
    return ids


def is_several(prompt: Any) -> bool:
    """Whether this is a list of prompts: strings, tensors, or lists. Chat messages are mappings, token ids numbers."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return isinstance(prompt[0], (str, list, tuple)) or (isinstance(prompt[0], torch.Tensor) and prompt[0].ndim > 0)


def eos_ids(model: Any, given: int | Sequence[int] | None = None) -> frozenset[int]:
    """`given`, or the ids that the model's generation config, else its config, names as ends."""
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        given = getattr(model.config, "eos_token_id", None)
    if given is None:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given)
