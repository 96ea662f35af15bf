"""Acceptance from a recorded trace: no text is decoded for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost, num_expanded
from specdec.planner.costs import grows_trees
from specdec.planner.evidence import Evidence, usual_trees
from specdec.planner.predict import Setting
from specdec.planner.work import Seen, Size, Work, survival
from specdec.policy import Fixed, Policy
from specdec.replay import Recording, Replayed, replay
from specdec.trace import Round
from specdec.train.provenance import draft_fingerprint, fingerprint
from specdec.tree_policy import StaticTree

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder


def sampling_options(recording: Recording) -> dict[str, Any]:
    """The options of `generate` that a recording was made with."""
    sampling = recording.meta["sampling"]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    found = {name: sampling[name] for name in names if name in sampling}
    return {**found, "max_new_tokens": int(recording.meta["max_new_tokens"])}


def prompts_of(recording: Recording) -> list[list[int]]:
    """The recorded prompts' tokens."""
    found, at = [], 0
    for text in recording.texts:
        found.append(recording.arrays["prompts_Q"][at : at + text.num_prompt_tokens].tolist())
        at += text.num_prompt_tokens
    return found


class Traced(Evidence):
    """Rounds of every setting that `specdec.replay` can tell from the recording; others are left out.

    Raises `InputError` for a recording of another target, drafter or draft model.
    """

    def __init__(self, recording: Recording, decoder: SpeculativeDecoder, with_trees: bool = True):
        meta, drafter = recording.meta, decoder.drafter
        here = {
            "drafter": drafter.name,
            "target": fingerprint(decoder.target),
            "draft": draft_fingerprint(drafter),
        }
        other = [f"{name} {meta[name]}, here {value}" for name, value in here.items() if meta[name] != value]
        if other:
            raise InputError(
                f"the trace is of another pair ({'; '.join(other)}); plan with what it was recorded with, or record "
                "this pair with specdec record"
            )
        self.recording, self.verifier = recording, decoder.verifier
        self.trees = with_trees and grows_trees(decoder)
        self._exact = True

    @property
    def source(self) -> str:
        return "a recorded trace"

    @property
    def exact(self) -> bool:
        return self._exact

    @property
    def num_texts(self) -> int:
        return len(self.recording.texts)

    @property
    def num_tokens(self) -> int:
        return sum(text.num_tokens for text in self.recording.texts)

    def survival(self, k: int) -> list[float]:
        k = min(k, self.recording.depth)
        found = []
        for text, rounds in zip(self.recording.texts, self._replayed(Fixed(k)).texts, strict=True):
            at = 0
            for round_ in rounds:
                at = 0 if at >= text.num_tokens else at  # another walk over the text
                found.append((min(k, text.room - at - 1), Seen(round_.num_nodes, round_.num_accepted)))
                at += round_.num_emitted
        return survival(found, k)

    def _replayed(self, policy: Policy) -> Replayed:
        found = replay(self.recording, policy, self.verifier)
        self._exact = self._exact and found.exact
        return found

    def works(self, lengths: Sequence[int], cost: RoundCost) -> dict[Setting, list[Work]]:
        found = {Setting(): [Work(text.num_prompt_tokens, text.num_tokens) for text in self.recording.texts]}
        settings: dict[Setting, Policy] = {Setting(k): Fixed(k) for k in lengths}
        if self.trees:
            settings.update({setting: StaticTree(setting.shape) for setting in usual_trees()})
        refusal: InputError | None = None
        for setting, policy in settings.items():
            try:
                found[setting] = self._works(self._replayed(policy), setting.shape)
            except InputError as error:  # deeper than the recording, or nothing that it tells
                refusal = error
        if len(found) == 1 and refusal is not None:
            raise refusal
        return found

    def _works(self, replayed: Replayed, shape: tuple[int, ...]) -> list[Work]:
        works = []
        for text, rounds in zip(self.recording.texts, replayed.texts, strict=True):
            sizes = Counter(_size(round_, shape) for round_ in rounds)
            shares = {size: count / replayed.repetitions for size, count in sizes.items()}
            works.append(Work(text.num_prompt_tokens, text.num_tokens, shares))
        return works


def _size(seen: Round, shape: tuple[int, ...]) -> Size:
    """Of a round under a tree, or a chain (no shape); what is cut at a text's end is priced as a chain."""
    whole = bool(shape) and seen.num_nodes == len(shape)
    return seen.num_nodes, seen.depth_proposed, num_expanded(shape) if whole else seen.depth_proposed
