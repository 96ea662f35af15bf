"""Texts in the tokens of two tokenizers: which are the same, and what the others are spelled with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specdec.bench.prompts import read_prompts
from specdec.errors import InputError
from specdec.spelling import Spelling, matches
from specdec.train.data import read_texts

_PROSE = (
    "The committee met on Tuesday, 14 March 2023, to decide whether the old bridge could be kept open for traffic. "
    "“It won't last,” said the engineer; nobody asked her why. Prices rose by 3.5% in Zürich, twice that in Kraków."
)


class Translation:
    """Between a target's tokens and a draft's: what each stands for, and which are the same."""

    def __init__(self, target_tokenizer: Any, draft_tokenizer: Any):
        if target_tokenizer is None or draft_tokenizer is None:
            raise InputError(
                "cross_vocab needs both tokenizers: pass tokenizer= of the target, and draft_tokenizer= with a draft "
                "whose folder has none"
            )
        self.target, self.draft = Spelling(target_tokenizer), Spelling(draft_tokenizer)
        self.same = matches(self.target, self.draft)
        self._known: dict[int, tuple[int, ...]] = {token: (theirs,) for token, theirs in self.same.items()}

    def in_draft(self, token: int) -> tuple[int, ...]:
        """The draft's tokens for one of the target's: the same one where there is one, else its text's; may be none."""
        if token not in self._known:
            piece = self.target.piece(token)
            self._known[token] = tuple((self.draft.tokenise(piece) or ()) if piece else ())
        return self._known[token]

    def prompt(self, tokens: Sequence[int]) -> list[int]:
        """A text as the draft's tokenizer has it, special tokens by their counterparts; never empty."""
        tokens, found = list(tokens), list(self.draft.opening)
        run: list[int] = []
        for at, token in enumerate((*tokens, None)):
            if token is not None and self.target.piece(token) is not None:
                run.append(token)
                continue
            nothing_yet = found == self.draft.opening
            found += self._run(run, opens=nothing_yet)
            nothing_yet, run = nothing_yet and not run, []
            if token is None:
                break
            theirs = list(self.in_draft(token))
            # The draft's own opening stands there already: what opens the target's text is not said again.
            if not (nothing_yet and (at < len(self.target.opening) or theirs == self.draft.opening)):
                found += theirs
        return found or [0]

    def _run(self, tokens: Sequence[int], opens: bool) -> list[int]:
        data = self.target.joined(tokens)
        if opens and self.target.leads_with_space and data.startswith(b" "):
            data = data[1:]
        spelled = self.draft.tokenise(data, opens=opens)
        return spelled if spelled is not None else [theirs for token in tokens for theirs in self.in_draft(token)]

    def coverage(self, texts: Iterable[str]) -> float:
        """The share of the target's tokens of these texts that the draft has too."""
        tokens = [t for text in texts for t in self.target.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return sum(token in self.same for token in tokens) / max(len(tokens), 1)

    def ratio(self, texts: Iterable[str]) -> float:
        """Tokens of the draft for one of the target."""
        count = [0, 0]
        for text in texts:
            for i, side in enumerate((self.target, self.draft)):
                count[i] += len(side.tokenizer(text, add_special_tokens=False)["input_ids"])
        return count[1] / max(count[0], 1)


def probe_texts(path: str | Path | None = None) -> list[str]:
    """What coverage is measured on: a file's texts, or the built-in prompts and a little prose."""
    return read_texts(Path(path)) if path is not None else [*(prompt.text for prompt in read_prompts()), _PROSE]
