"""Training text: documents, the split that holds some out, rows of equal length, and the order in which they are drawn.

Shape suffixes: R rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.bench.prompts import read_prompts
from specdec.errors import InputError

HELD_OUT_SHARE = 0.03
# Characters of the documents that a plain text file is cut into.
_DOCUMENT = 4096


@dataclass(frozen=True)
class Document:
    text: str
    held_out: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """tokens_RL: int32. The target's predictions at positions first_R <= t < last_R count; padding is behind them."""

    tokens_RL: np.ndarray
    first_R: np.ndarray
    last_R: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_RL)

    @property
    def length(self) -> int:
        return int(self.tokens_RL.shape[1])

    @staticmethod
    def full(tokens_RL: np.ndarray) -> Rows:
        count, length = tokens_RL.shape
        return Rows(tokens_RL, np.zeros(count, dtype=np.int32), np.full(count, length, dtype=np.int32))

    def take(self, index: np.ndarray | slice) -> Rows:
        return Rows(self.tokens_RL[index], self.first_R[index], self.last_R[index])

    def joined(self, other: Rows) -> Rows:
        pairs = ((self.tokens_RL, other.tokens_RL), (self.first_R, other.first_R), (self.last_R, other.last_R))
        return Rows(*(np.concatenate(pair) for pair in pairs))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """tokens int64 and mask bool, both `[R, L]`."""
        at = np.arange(self.length)
        mask_RL = (at >= self.first_R[:, None]) & (at < self.last_R[:, None])
        return torch.from_numpy(self.tokens_RL.astype(np.int64)), torch.from_numpy(mask_RL)

    def digest(self) -> str:
        found = hashlib.sha256(repr(self.tokens_RL.shape).encode())
        for array in (self.tokens_RL, self.first_R, self.last_R):
            found.update(np.ascontiguousarray(array, dtype=np.int32).tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows to train on and rows to judge by; no document is in both. `source`: where they came from, for the record."""

    train: Rows
    held_out: Rows
    source: dict[str, Any]

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.held_out):
            missing = "held-out text" if len(self.train) else "text"
            length = max(self.train.length, self.held_out.length)
            raise InputError(f"too little {missing} for one row of {length} tokens; give more --data or lower --length")

    @property
    def digest(self) -> str:
        """sha256 over all tokens and bounds, in order."""
        return hashlib.sha256((self.train.digest() + self.held_out.digest()).encode()).hexdigest()


def cut(text: str, size: int = _DOCUMENT) -> list[str]:
    """Pieces of at most `size` characters that end at a blank line if they can, else at a line break, else anywhere."""
    pieces, start = [], 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text):
            for mark in ("\n\n", "\n"):
                at = text.rfind(mark, start + size // 2, end)
                if at >= 0:
                    end = at + len(mark)
                    break
        pieces.append(text[start:end])
        start = end
    return [piece for piece in pieces if piece.strip()]


def read_texts(path: Path) -> list[str]:
    """The documents of a text file (cut at blank lines) or a JSONL file; `InputError` where it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"--data {path}: {reason}") from error
    if path.suffix in (".jsonl", ".ndjson"):
        return [row.document for row in read_prompts(path)]
    return cut(content)


def read_documents(paths: Sequence[str | Path], held_out_share: float = HELD_OUT_SHARE) -> list[Document]:
    """Documents of text files (cut at blank lines) and JSONL files (a row each, under `text`, `prompt`, …).

    A document that stands there twice is taken once. Which are held out depends on what they say alone, so that the
    order of files does not matter. Raises `InputError` for files that cannot be read, and for fewer than two documents.
    """
    if not 0 < held_out_share < 1:
        raise InputError(f"the held-out share is between 0 and 1, not {held_out_share}")
    texts = list(dict.fromkeys(text for path in paths for text in read_texts(Path(path))))
    if len(texts) < 2:
        raise InputError(
            f"{', '.join(map(str, paths))}: {len(texts)} document, and one is held out to judge by; give more text"
        )
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = set(ranked[: max(1, round(held_out_share * len(texts)))])
    return [Document(text, text in held_out) for text in texts]


def encode(texts: Iterable[str], tokenizer: Any, closed: bool = True) -> list[list[int]]:
    """Token ids of each text.

    `closed`: where the tokenizer puts nothing in front of a text, its end-of-text token is put behind, so that texts in
    a row are told apart.
    """
    if tokenizer is None:
        raise InputError("training text needs the target's tokenizer, and there is none beside the weights")
    ids: list[list[int]] = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    opens = getattr(tokenizer, "bos_token_id", None)
    if closed and end is not None and any(row and row[0] != opens for row in ids):
        return [[*row, end] for row in ids]
    return ids


def pack(documents: Sequence[Sequence[int]], length: int) -> Rows:
    """The documents one behind the other, cut into rows of `length`; what is left over at the end is dropped."""
    stream = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in documents] or [np.zeros(0, dtype=np.int32)])
    count = len(stream) // length
    return Rows.full(stream[: count * length].reshape(count, length))


def packed(
    documents: Sequence[Document], tokenizer: Any, length: int, seed: int, source: dict[str, Any]
) -> TrainingData:
    """Both splits in a fixed random order of documents, as rows of `length` tokens."""
    sides = []
    for held_out in (False, True):
        ids = encode([d.text for d in documents if d.held_out == held_out], tokenizer)
        order = np.random.default_rng(seed).permutation(len(ids))
        sides.append(pack([ids[i] for i in order], length))
    return TrainingData(sides[0], sides[1], source)


class Sampler:
    """Rows drawn without replacement within a pass. Its whole state is `epoch` and `at`."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self.restore(0, 0)

    def restore(self, epoch: int, at: int) -> None:
        self.epoch, self.at = epoch, at
        self.order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)

    def draw(self, count: int) -> np.ndarray:
        """`[count]` row numbers; a pass that has fewer left is over."""
        if count > self.num_rows:
            raise InputError(
                f"a step takes {count} rows and there are {self.num_rows}; give more --data or --self-generate, or "
                "lower --batch or --length"
            )
        if self.at + count > self.num_rows:
            self.restore(self.epoch + 1, 0)
        found: np.ndarray = self.order[self.at : self.at + count]
        self.at += count
        return found
