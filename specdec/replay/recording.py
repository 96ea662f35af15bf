"""What a recorded run says, position by position, and the file that holds it.

Shape suffixes: T texts, P positions of all texts, K drafted depths, M kept entries of a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from specdec.drafter import Memory
from specdec.errors import InputError

FORMAT = 1
NEVER = 1 << 30  # as a place or a rank: no number of children contains the token
Array = NDArray[Any]

#: Every array: its dtype, and its shape in these letters; F: 4 stages, C: 4 columns, Q: all prompts' tokens.
LAYOUT: dict[str, tuple[str, str]] = {
    "tokens_P": ("int32", "P"),  # what the target says there
    "text_p_P": ("float32", "P"),  # its probability under the target
    "drafted_PK": ("int32", "PK"),  # the chain drafted from there; -1 where it had ended
    "drafted_q_PK": ("float32", "PK"),  # probabilities of its tokens; NaN where the drafter has none
    "drafted_p_PK": ("float32", "PK"),
    "text_q_PK": ("float32", "PK"),  # the draft's probability, in the row of each depth, of the text's token there
    "place_PK": ("int32", "PK"),  # how many children would be drawn before that token; -1: not known, or NEVER
    "rank_PK": ("int32", "PK"),  # how many tokens the draft finds more probable; -1: not known, or NEVER
    "overlap_P": ("float32", "P"),  # sum of min(p, q) over the whole vocabulary
    "target_ids_PM": ("int32", "PM"),  # the most probable tokens, falling, log-probabilities, and what is left
    "target_logp_PM": ("float32", "PM"),
    "target_tail_P": ("float32", "P"),
    "draft_ids_PM": ("int32", "PM"),
    "draft_logp_PM": ("float32", "PM"),
    "draft_tail_P": ("float32", "P"),
    "seconds_PF": ("float32", "PF"),  # draft, verify, commit, other
    "texts_TC": ("int64", "TC"),  # prompt tokens, positions, tokens, room at the beginning
    "prompts_Q": ("int32", "Q"),
}
STAGES = ("draft", "verify", "commit", "other")
_MOST_META = 1 << 24


def bytes_per_position(depth: int, top_m: int) -> int:
    """What one token of text takes in a recording."""
    sizes = {"P": 1, "K": depth, "M": top_m, "F": len(STAGES)}
    total = 0
    for kind, letters in LAYOUT.values():
        if letters.startswith("P"):
            total += np.dtype(kind).itemsize * int(np.prod([sizes[letter] for letter in letters]))
    return total


@dataclass(frozen=True)
class Text:
    """One recorded text: rows `first` to `first + num_positions` of the recording.

    Positions beyond `num_tokens` follow an end-of-text: a round that reaches over the end accepts them too.
    `room`: tokens that could be emitted when it began.
    """

    first: int
    num_positions: int
    num_tokens: int
    room: int
    num_prompt_tokens: int


@dataclass(frozen=True, eq=False)
class Recording:
    """A trace of one target and one drafter: `arrays` as in `LAYOUT`, and `meta`, which JSON can say.

    Rows of p and q are those that rules see, filters and temperature included; at temperature 0, where rules see the
    most probable token only, they are those of temperature 1.
    """

    arrays: Mapping[str, Array]
    meta: Mapping[str, Any]

    def __getattr__(self, name: str) -> Array:
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def depth(self) -> int:
        """Tokens that were drafted at every position."""
        return int(self.arrays["drafted_PK"].shape[1])

    @property
    def top_m(self) -> int:
        return int(self.arrays["target_ids_PM"].shape[1])

    @property
    def memory(self) -> Memory:
        return Memory(self.meta["memory"])

    @property
    def is_greedy(self) -> bool:
        return bool(self.meta["greedy"])

    @property
    def has_rows(self) -> bool:
        """Whether the drafter has probabilities."""
        return bool(self.arrays["draft_ids_PM"].shape[1])

    @property
    def texts(self) -> list[Text]:
        found, first = [], 0
        for prompt, positions, tokens, room in self.arrays["texts_TC"].tolist():
            found.append(Text(first, positions, tokens, room, prompt))
            first += positions
        return found

    def survival(self, depth: int) -> list[float]:
        """P(the first d drafted tokens are the text's), d = 1 … `depth`, over every position of every text.

        By the rule of the recording: the shared race, or the most probable token. Every position counts as the
        beginning of a round, which rounds of one length do not: for those, `replay` is exact. 0 beyond a chain's end.
        Raises `InputError` when the recording is not so deep.
        """
        if not 1 <= depth <= self.depth:
            raise InputError(f"the recording is {self.depth} deep, not {depth}: record with --depth {depth}")
        passed, reached = np.zeros(depth), np.zeros(depth)
        for text in self.texts:
            for at in range(text.num_tokens):
                room = min(depth, text.room - at - 1)
                reached[:room] += 1
                passed[: min(room, self._matches(text, at))] += 1
        return list((passed / np.maximum(reached, 1)).tolist())

    def _matches(self, text: Text, at: int) -> int:
        here = text.first + at
        drafted = self.arrays["drafted_PK"][here]
        said = self.arrays["tokens_P"][here : min(here + self.depth, text.first + text.num_positions)]
        same = drafted[: len(said)] == said
        return int(same.argmin()) if not same.all() else len(said)

    def save(self, path: str | Path) -> None:
        """Whole or not at all. Raises `InputError` where the file cannot be written."""
        aside = Path(f"{path}.partial")
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        try:
            save_file(arrays, aside, metadata={"specdec": json.dumps(dict(self.meta))})
            os.replace(aside, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {path}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> Recording:
        """A recording that `save` wrote. Raises `InputError` for anything else, before tensors are read."""
        if not Path(path).is_file():
            raise InputError(f"{path} is no file: make a recording with specdec record --out {path}")
        try:
            with safe_open(path, "np") as file:
                meta = _meta(file.metadata(), path)
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
                _check_shapes(shapes, kinds, path)
                found = Recording({name: file.get_tensor(name) for name in LAYOUT}, meta)
        except (SafetensorError, OSError, RecursionError) as error:
            raise InputError(f"{path} is not a recording: {error}; make one with specdec record") from error
        _check_content(found, path)
        return found


def _damaged(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} is not a recording, or damaged: {why}; make one with specdec record")


_NEEDED: dict[str, type | tuple[type, ...]] = {
    "target": str, "drafter": str, "memory": str, "draw": str, "draws": list, "trees": bool, "greedy": bool,
    "vocab_size": int, "max_new_tokens": int, "setting": dict, "sampling": dict, "num_inconsistent": int,
    "prompts": list,
}  # fmt: skip


def _meta(stored: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    text = (stored or {}).get("specdec", "")
    if not text or len(text) > _MOST_META:
        raise _damaged(path, "it has no header of ours")
    try:
        meta = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"its header is not JSON ({error.msg})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise _damaged(path, f"it is not of format {FORMAT}")
    for name, kind in _NEEDED.items():
        if not isinstance(meta.get(name), kind):
            raise _damaged(path, f"its header has no {name}")
    if meta["memory"] not in [memory.value for memory in Memory] or meta["vocab_size"] < 1:
        raise _damaged(path, "its header says impossible things")
    return meta


_KINDS = {"int32": "I32", "int64": "I64", "float32": "F32"}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str], path: str | Path) -> None:
    """Names, dtypes and dimensions fit `LAYOUT`; `draft_*` may have no columns."""
    if set(shapes) != set(LAYOUT):
        raise _damaged(path, f"its tensors are {', '.join(sorted(shapes)[:4])} …")
    sizes: dict[str, int] = {"F": len(STAGES), "C": 4}
    for name, (kind, letters) in LAYOUT.items():
        if kinds[name] != _KINDS[kind] or len(shapes[name]) != len(letters):
            raise _damaged(path, f"{name} is {kinds[name]} {list(shapes[name])}")
        for letter, size in zip(letters, shapes[name], strict=True):
            if letter == "M" and name.startswith("draft_") and size == 0:
                continue
            if sizes.setdefault(letter, size) != size:
                raise _damaged(path, f"{name} has {size} where others have {sizes[letter]}")
    if min(sizes.values()) < 1:
        raise _damaged(path, "it holds no text")


def _check_content(found: Recording, path: str | Path) -> None:
    arrays, vocab = found.arrays, found.meta["vocab_size"]
    texts = arrays["texts_TC"]
    if (texts < 1).any() or (texts[:, 2] > texts[:, 1]).any() or (texts[:, 2] > texts[:, 3]).any():
        raise _damaged(path, "a text is shorter than nothing, or longer than its room")
    if int(texts[:, 1].sum()) != len(arrays["tokens_P"]) or int(texts[:, 0].sum()) != len(arrays["prompts_Q"]):
        raise _damaged(path, "texts and positions do not add up")
    if len(found.meta["prompts"]) != len(texts):
        raise _damaged(path, "texts and prompts do not add up")
    for name, least in (("tokens_P", 0), ("prompts_Q", 0), ("drafted_PK", -1), ("target_ids_PM", 0)):
        if (arrays[name] < least).any() or (arrays[name] >= vocab).any():
            raise _damaged(path, f"{name} has tokens outside the vocabulary of {vocab}")
    ended = arrays["drafted_PK"] < 0
    if (ended[:, :-1] & ~ended[:, 1:]).any():
        raise _damaged(path, "a drafted chain has a gap")
    for name in ("text_p_P", "target_tail_P", "seconds_PF"):
        if not np.isfinite(arrays[name]).all() or (arrays[name] < 0).any():
            raise _damaged(path, f"{name} holds impossible numbers")


def positions(recording: Recording) -> Iterator[tuple[Text, int]]:
    """Every position of every text that is text."""
    for text in recording.texts:
        for at in range(text.num_tokens):
            yield text, at
