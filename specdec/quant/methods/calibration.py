"""Calibration text: what a method looks at a model's activations on. Never the prompts that the model is judged by.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.bench.prompts import read_prompts
from specdec.errors import InputError
from specdec.train import stdlib
from specdec.train.data import encode, pack, read_texts
from specdec.train.selfgen import SelfGeneration, own_texts

ROWS, LENGTH = 64, 256
#: Words that stand where a file's name may: the model writes the text, or the Python standard library's source is it.
OWN, STDLIB = "self", "stdlib"
# Evaluation prompts and texts with fewer characters than this are too common to be recognised.
_TELLING = 24
_SOME = 32  # documents that are encoded at once


def check_tokens(tokens_BT: Tensor | None, model: Any, method: str) -> Tensor:
    """int64 `[B, T]` that the model can read. `InputError` says what is wrong with anything else."""
    if tokens_BT is None or tokens_BT.numel() == 0:
        raise InputError(
            f"the method {method} looks at the model's activations and needs calibration text: give a text file, or "
            f"{OWN!r} to let the model write it; the method rtn needs none"
        )
    if tokens_BT.ndim != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"calibration tokens are integers [rows, tokens], not {tokens_BT.dtype} {list(tokens_BT.shape)}"
        )
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if tokens_BT.shape[1] < 2 or (context and tokens_BT.shape[1] > context):
        raise InputError(
            f"rows of calibration text have 2 to {context or 'any number of'} tokens, not {tokens_BT.shape[1]}"
        )
    low, high = int(tokens_BT.min()), int(tokens_BT.max())
    if low < 0 or high >= config.vocab_size:
        raise InputError(
            f"calibration tokens reach from {low} to {high}, and the model's vocabulary has {config.vocab_size}; "
            "encode the text with the model's own tokenizer"
        )
    return tokens_BT.long()


def _plain(text: str) -> str:
    return " ".join(text.split())


def refuse_prompts(texts: Iterable[str], evaluation: Sequence[str] | None = None) -> None:
    """`InputError` when a text holds an evaluation prompt, or is a part of one; spaces and line breaks do not count.

    `evaluation`: the prompts that the model will be judged by, besides the built-in ones.
    """
    prompts = [_plain(text) for text in (*(p.text for p in read_prompts()), *(evaluation or ()))]
    prompts = [prompt for prompt in prompts if len(prompt) >= _TELLING]
    for text in map(_plain, texts):
        for prompt in prompts:
            if prompt in text or (len(text) >= _TELLING and text in prompt):
                raise InputError(
                    f"the text holds an evaluation prompt ({prompt[:40]!r}…): figures on it would say "
                    "nothing; give other text"
                )


def from_texts(
    texts: Sequence[str],
    tokenizer: Any,
    rows: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
    evaluation: Sequence[str] | None = None,
) -> Tensor:
    """`rows` rows of `length` tokens from documents in random order: int64 `[B, T]`, fewer rows where there is less.

    Raises `InputError` without text for one row, and for evaluation prompts (see `refuse_prompts`).
    """
    _check_size(rows, length)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError("there is no calibration text; give a file that is not empty, or more than blanks")
    order = np.random.default_rng(seed).permutation(len(texts))
    used: list[str] = []
    ids: list[list[int]] = []
    while sum(map(len, ids)) < rows * length and len(used) < len(texts):
        some = [texts[i] for i in order[len(used) : len(used) + _SOME]]
        used += some
        ids += encode(some, tokenizer)
    refuse_prompts(used, evaluation)
    return _rows(ids, rows, length)


def _check_size(rows: int, length: int) -> None:
    if rows < 1 or length < 2:
        raise InputError(f"calibration takes at least 1 row of 2 tokens, not {rows} of {length}")


def _rows(ids: Sequence[Sequence[int]], rows: int, length: int) -> Tensor:
    packed = pack(ids, length)
    if not len(packed):
        raise InputError(
            f"the calibration text has {sum(map(len, ids))} tokens, which is too short for one row of {length}; give "
            "more text, or a smaller length"
        )
    return torch.from_numpy(packed.tokens_RL[:rows].astype(np.int64))


def from_model(
    model: Any,
    tokenizer: Any,
    rows: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
    folder: Path | None = None,
    told: Callable[[int, int], None] = lambda made, wanted: None,
) -> Tensor:
    """Text that the model writes by itself, at temperature 1: int64 `[B, T]`.

    Texts begin with the tokenizer's opening token and a random one (Liu et al., arXiv 2305.17888), or a random one
    alone. Kept in `folder`, where a second call finds them.
    """
    _check_size(rows, length)
    config = model.config.get_text_config(decoder=True)
    vocab_size, opening = int(config.vocab_size), getattr(tokenizer, "bos_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    start = 1 if opening is None else 2
    context = getattr(config, "max_position_embeddings", None) or length
    what = SelfGeneration(
        rows, max(min(length, context), start + 1), prompt_tokens=start, temperatures=(1.0,), seed=seed
    )
    drawn = np.random.default_rng(seed).permutation([i for i in range(vocab_size) if i not in special])
    ids: list[list[int]] = []
    with tempfile.TemporaryDirectory() as aside:
        # Texts may end early: as many again are made until there is enough, and at most four times as many.
        for turn in range(4):
            firsts = [int(token) for token in np.resize(np.roll(drawn, -turn * rows), rows)]
            prompts = [[first] if opening is None else [opening, first] for first in firsts]
            made = own_texts(model, prompts, what, folder or Path(aside), told)
            ids += [row[:last].tolist() for row, last in zip(made.tokens_RL, made.last_R, strict=True)]
            if sum(map(len, ids)) >= rows * length:
                break
    return _rows(ids, rows, length)


def tokens(
    source: str | Path | Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    rows: int = ROWS,
    length: int | None = None,
    seed: int = 0,
    evaluation: Sequence[str] | None = None,
    folder: Path | None = None,
    told: Callable[[int, int], None] = lambda made, wanted: None,
) -> Tensor:
    """Calibration tokens `[B, T]` of a text or JSONL file, of texts, or by the words "self" and "stdlib".

    `length`: by default 256, or the model's context where that is shorter. "stdlib" leaves out the files from which the
    built-in prompts come.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = length or min(LENGTH, context or LENGTH)
    if source == OWN:
        return from_model(model, tokenizer, rows, length, seed, folder, told)
    if source == STDLIB:
        texts = [document.text for document in stdlib.documents() if not document.held_out]
    elif isinstance(source, str | Path):
        texts = read_texts(Path(source))
    else:
        texts = list(source)
    return from_texts(texts, tokenizer, rows, length, seed, evaluation)
