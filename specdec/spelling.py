"""What the tokens of a tokenizer stand for, as bytes, so that two tokenizers can be compared and translated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from specdec.errors import InputError

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BYTE_LEVEL, _SPACE_MARKS = "byte-level", "space marks"
_LONGEST_CHARACTER = 4


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Byte-level tokenizers' alphabet (GPT-2): printable Latin-1 stands for itself, the rest for 256, 257, …."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def _types(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if part.get("type") == "Replace":
            yield f"Replace {part.get('pattern', {}).get('String')}"
        elif "type" in part:
            yield str(part["type"])
        for inner in part.values():
            yield from _types(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from _types(inner)


def _alphabet(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # SentencePiece's own
        return _SPACE_MARKS
    types = set(_types(json.loads(backend.to_str())["decoder"]))
    if "ByteLevel" in types:
        return _BYTE_LEVEL
    if types & {"Metaspace", f"Replace {_SPACE}", "ByteFallback"}:
        return _SPACE_MARKS
    raise InputError(
        f"the pieces of a {type(tokenizer).__name__} with the decoder {' and '.join(sorted(types)) or 'none'} cannot "
        "be spelled: byte-level and SentencePiece tokenizers can; use a drafter without weights, such as 'suffix'"
    )


def complete(data: bytes) -> int:
    """How many bytes of it are whole characters: all but the beginning of one at the end."""
    for back in range(1, min(_LONGEST_CHARACTER, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= needed else len(data) - back
    return len(data)


class Spelling:
    """The bytes of every token. `pieces[id]` is None for special tokens, which stand for no text.

    Space markers are spaces here, and byte tokens their byte; so tokens of any two tokenizers are alike exactly when
    they stand for the same bytes. Errors: `InputError` for tokenizers whose pieces do not say what they stand for.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        alphabet = _alphabet(tokenizer)
        vocab: dict[str, int] = tokenizer.get_vocab()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.specials = {i: str(t) for i, t in added.items() if t.special}
        self.specials.update({i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids})
        self.pieces: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
        self.by_bytes: dict[bytes, int] = {}
        byte_tokens: list[int] = []
        for piece, i in sorted(vocab.items(), key=lambda item: item[1]):
            if i in self.specials:
                continue
            if alphabet == _SPACE_MARKS and (found := _BYTE.fullmatch(piece)):
                self.pieces[i] = bytes([int(found[1], 16)])
                byte_tokens.append(i)
                continue
            if i in added:
                spelled = piece.encode()
            elif alphabet == _BYTE_LEVEL:
                if not all(c in _byte_of() for c in piece):
                    continue
                spelled = bytes(_byte_of()[c] for c in piece)
            else:
                spelled = piece.replace(_SPACE, " ").encode()
            self.pieces[i] = spelled
            if spelled:
                self.by_bytes.setdefault(spelled, i)
        for i in byte_tokens:  # these are written where no other token has that byte
            self.by_bytes.setdefault(self.pieces[i] or b"", i)
        self._longest = max(map(len, self.by_bytes), default=0)

    @cached_property
    def opening(self) -> list[int]:
        """What the tokenizer puts in front of every text."""
        with_them = self.tokenizer("x")["input_ids"]
        without = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        return list(with_them[: len(with_them) - len(without)]) if with_them[-1:] == without[-1:] else []

    @cached_property
    def leads_with_space(self) -> bool:
        """Whether it puts a space before the first word of a text."""
        return self.joined(self.tokenizer("x", add_special_tokens=False)["input_ids"]).startswith(b" ")

    @cached_property
    def _beginnings(self) -> frozenset[bytes]:
        return frozenset(piece[:n] for piece in self.by_bytes for n in range(1, len(piece)))

    def piece(self, token: int) -> bytes | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def may_grow(self, token: int) -> bool:
        """Whether a longer token begins with this one, so that more text could make it another."""
        return self.piece(token) in self._beginnings

    def joined(self, tokens: Iterable[int]) -> bytes:
        return b"".join(self.piece(token) or b"" for token in tokens)

    def spell(self, data: bytes) -> list[int] | None:
        """The longest tokens, from the left; None where a byte has no token."""
        found: list[int] = []
        while data:
            length = next((n for n in range(min(self._longest, len(data)), 0, -1) if data[:n] in self.by_bytes), 0)
            if not length:
                return None
            found.append(self.by_bytes[data[:length]])
            data = data[length:]
        return found

    def tokenise(self, data: bytes, *, opens: bool = False) -> list[int] | None:
        """Tokens that stand for exactly these bytes, the tokenizer's own choice where it has one.

        Its space before the first word stays only where the text `opens`. The beginning of a character at the end is
        spelled in bytes. None where that cannot be done.
        """
        end = complete(data)
        rest = self.spell(data[end:])
        if rest is None:
            return None
        try:
            text = data[:end].decode()
        except UnicodeDecodeError:
            return self.spell(data)
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        joined = self.joined(tokens)
        if joined == data[:end] or (opens and joined == b" " + data[:end]):
            return tokens + rest
        if joined == b" " + data[:end]:
            first = self.spell((self.piece(tokens[0]) or b"")[1:])
            return None if first is None else first + tokens[1:] + rest
        return self.spell(data)  # the tokenizer changes the text, or takes part of it for a special token


def matches(target: Spelling, draft: Spelling) -> dict[int, int]:
    """The draft's token of each target token that stands for the same bytes; special tokens by role, else by name."""
    found = {i: draft.by_bytes[piece] for piece, i in target.by_bytes.items() if piece in draft.by_bytes}
    by_name = {name: i for i, name in draft.specials.items()}
    found.update({i: by_name[name] for i, name in target.specials.items() if name in by_name})
    for role in ("bos_token_id", "eos_token_id"):
        mine, theirs = getattr(target.tokenizer, role, None), getattr(draft.tokenizer, role, None)
        if mine is not None and theirs is not None:
            found[mine] = theirs
    return found
