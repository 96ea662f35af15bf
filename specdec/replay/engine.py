"""Rounds of a setting, from a recording: the policy plans, the rule decides about the recorded text, nothing runs.

Lossless: not applicable; no text is made.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

from specdec import registry
from specdec.costs import Costs
from specdec.drafter import Memory
from specdec.errors import InputError
from specdec.policy import Plan, Policy, PolicyRun
from specdec.replay.clock import Watched, is_known
from specdec.replay.prices import costs_of
from specdec.replay.recording import Recording, Text
from specdec.replay.rules import Rule, chain, tree_of
from specdec.replay.spread import half_interval
from specdec.replay.view import Doubts, View
from specdec.trace import STAGES, Round, Stats, summarize
from specdec.tree import Structure, structure
from specdec.verifier import Verifier

# Walks over the texts where acceptance is random given the text.
REPETITIONS = 32
# A policy that follows the clock is bracketed by machines on which drafting costs nothing, and on which it never pays.
_FREE, _DEAR = Costs(draft_average=0.0), Costs(draft_average=1e3)
# Logarithm of the least probability that every device tells from 0 in float32: what is less may not be drawn.
_LEAST_LOG = -87.0


@dataclass(frozen=True)
class Replayed:
    """A setting's rounds. `texts[i]`: of the recording's text i, and where chance decides of all walks over it.

    `exact`: a run of this setting has these very rounds. Else `bound` says how far tokens per round
    (`stats.mean_acceptance_length`) of a run may lie from these, and `reasons` why; None: the trace does not tell.
    The bound holds what the trace leaves open and a 95 % interval for what chance decides.
    `repetitions`: walks over the texts that are pooled in `stats`. `speedup`: over plain decoding at `costs`.
    """

    texts: list[list[Round]]
    stats: Stats
    exact: bool
    bound: float | None
    reasons: tuple[str, ...]
    repetitions: int
    speedup: float | None
    max_new_tokens: int

    @property
    def rounds(self) -> list[Round]:
        return [round_ for text in self.texts for round_ in text]

    @property
    def label(self) -> str:
        """`exact`, or `estimated` with the bound."""
        if self.exact:
            return "exact"
        return "estimated, no bound" if self.bound is None else f"estimated ± {self.bound:.2f}"


@dataclass(frozen=True)
class _Walk:
    """One way to go over the texts."""

    recording: Recording
    rule: Rule
    policy: Policy
    max_new_tokens: int
    costs: Costs
    doubts: Doubts
    assume: str = "near"

    def view(self, text: Text) -> View:
        return View(self.recording, text, self.doubts, self.assume)

    def rounds(self, view: View, draw: random.Random, run: PolicyRun) -> list[Round]:
        text = view.text
        length = min(text.num_tokens, self.max_new_tokens)
        room, at, made = min(text.room, self.max_new_tokens), 0, []
        while at < length:
            made.append(self._round(view, run, at, room - at, draw))
            at += made[-1].num_emitted
            run.observe(replace(made[-1], seconds=Watched(made[-1].seconds, self.doubts)))
        return made

    def _round(self, view: View, run: PolicyRun, at: int, room: int, draw: random.Random) -> Round:
        plan = run.plan().limited(room - 1)
        tree, num_nodes = self._drafted(view, plan, at)
        accepted, refused = self.rule.accepted(view, at, tree, draw)
        if self.assume == "always" and view.cell(at, accepted) is None:
            refused = bool(tree.children[0]) and accepted < tree.max_depth
        seconds = dict.fromkeys(STAGES, 0.0)
        whole = self.costs.round(num_nodes, tree.max_depth)
        levels = self.costs.drafted(tree.max_depth)
        seconds.update(draft=levels, verify=whole - levels - self.costs.other, other=self.costs.other)
        return Round(
            num_nodes=num_nodes,
            depth_proposed=tree.max_depth,
            num_accepted=accepted,
            num_evaluated=accepted + refused,
            num_emitted=accepted + 1,
            drafter=self.recording.meta["drafter"],
            seconds=seconds,
        )

    def _drafted(self, view: View, plan: Plan, at: int) -> tuple[Structure, int]:
        """The round's tree, and how many nodes it has."""
        if plan.deepest < 1:
            return structure(()), 0
        if plan.budget:
            raise InputError(
                f"which nodes {self.policy.name} keeps depends on branches that no text took: run it, or replay a tree "
                "of a fixed shape (--tree)"
            )
        available = self._available(view, plan.depth, at)
        if plan.is_chain:
            length = self._stop(view, plan, at, available)
            return chain(length), length
        if plan.stop_below > 0:
            raise InputError("a tree that stops at weak tokens depends on branches that no text took: run it")
        parents = tree_of(plan.limited(available))
        tree = structure(parents)
        view.doubts.counts |= self._may_lack(view, at, max(map(len, tree.children)))
        return tree, len(parents)

    def _may_lack(self, view: View, at: int, count: int) -> bool:
        """Whether somewhere in the tree there may be fewer than `count` tokens to draw.

        Rows of siblings that the text did not take are not in the trace, so that what may happen counts.
        """
        meta = self.recording.meta
        sampling = {} if self.recording.is_greedy else meta["sampling"]  # filters are for temperatures above 0
        too_few = (sampling.get("top_k") or count) < count
        if count > 1 and (too_few or sampling.get("top_p") or sampling.get("min_p") or meta.get("processors")):
            return True
        logs = self.recording.arrays["draft_logp_PM"][view.text.first + at]
        return 1 < count <= len(logs) and bool(logs[count - 1] < _LEAST_LOG)

    def _available(self, view: View, depth: int, at: int) -> int:
        """How deep the drafter goes where `depth` is asked for."""
        drafted = view.num_drafted(at)
        asked = min(self.recording.depth, view.text.room - at - 1)  # while recording
        if depth <= drafted or drafted < asked:
            return min(depth, drafted)
        if asked < self.recording.depth or view.memory is Memory.PATH:
            return depth
        raise InputError(
            f"{self.policy.name} asks for {depth} tokens, and the recording is {self.recording.depth} deep: record "
            f"with --depth {depth}"
        )

    def _stop(self, view: View, plan: Plan, at: int, length: int) -> int:
        """The chain's length where drafting stops after a weak token."""
        if plan.stop_below <= 0 or not self.recording.has_rows:
            return length
        if length > self.recording.depth:
            raise InputError(
                f"confidence was recorded {self.recording.depth} deep, not {length}: record with --depth {length}"
            )
        drawn_so = self.rule.draw.value == self.recording.meta["draw"]
        view.doubts.counts |= not drawn_so  # by chance: other tokens would be drafted behind a rejection
        for depth in range(length):
            q = view.drafted_q[at][depth]
            if not drawn_so and view.follows(at, depth) and not math.isnan(view.text_q[at][depth]):
                q = view.text_q[at][depth]
            if q < plan.stop_below:
                return depth + 1
        return length


def replay(
    recording: Recording,
    policy: Policy | str = "fixed",
    verifier: Verifier | str = "coupled",
    *,
    max_new_tokens: int | None = None,
    costs: Costs | None = None,
    repetitions: int = REPETITIONS,
) -> Replayed:
    """The rounds that decoding with this policy and rule would have, on the recorded texts.

    `max_new_tokens`: a shorter limit than the recorded one. `costs`: of rounds; those of the recording by default.
    Raises `InputError` for what the recording cannot tell at all, and says how to record it.

    Lossless: not applicable.
    """
    policy = registry.create("policy", policy) if isinstance(policy, str) else policy
    rule = Rule(recording, verifier)
    if policy.branches:
        rule.check_tree()
    limit = recording.meta["max_new_tokens"]
    if max_new_tokens is not None and not 1 <= max_new_tokens <= limit:
        raise InputError(f"the recording has at most {limit} tokens a text, not {max_new_tokens}: record longer texts")
    measured = costs or costs_of(recording)
    walk = _Walk(recording, rule, policy, max_new_tokens or limit, measured or Costs(), Doubts())
    times = repetitions if rule.is_random else 1
    texts = _go(walk, times)
    reasons = list(_reasons(walk))
    stats = _pooled(recording, walk, texts, times)
    bound = _bound(walk, texts, stats, times) if reasons else 0.0
    return Replayed(
        texts=texts,
        stats=stats,
        exact=not reasons,
        bound=bound,
        reasons=tuple(reasons),
        repetitions=times,
        speedup=_speedup(texts, measured) if measured is not None else None,
        max_new_tokens=walk.max_new_tokens,
    )


def _go(walk: _Walk, times: int) -> list[list[Round]]:
    draw = random.Random(0)
    views = [walk.view(text) for text in walk.recording.texts]
    made: list[list[Round]] = [[] for _ in views]
    for _ in range(times):
        run: PolicyRun | None = None
        for view, rounds in zip(views, made, strict=True):
            run = walk.policy.start() if run is None else walk.policy.resume(run)
            rounds += walk.rounds(view, draw, run)
    return made


def _pooled(recording: Recording, walk: _Walk, texts: list[list[Round]], times: int) -> Stats:
    tokens = times * sum(min(text.num_tokens, walk.max_new_tokens) for text in recording.texts)
    return summarize([r for text in texts for r in text], tokens)


def _reasons(walk: _Walk) -> Iterator[str]:
    """Why a run could have other rounds than these."""
    meta = walk.recording.meta
    if walk.recording.memory is Memory.ROUNDS:
        yield f"what {meta['drafter']} proposes depends on earlier rounds"
    if not walk.rule.keeps_text:
        yield f"with {walk.rule.verifier.name} a run has another text of the same law"
    if walk.doubts.unknown:
        yield f"{walk.doubts.unknown} of {walk.doubts.decisions} decisions were not recorded"
    if walk.doubts.tails > 0:
        yield "rows are known by their largest entries"
    if walk.doubts.counts:
        yield "the number of drafted tokens is not determined"
    if walk.doubts.clock:
        yield f"{walk.policy.name} follows the clock"
    if not is_known(walk.policy):
        yield f"what {walk.policy.name} looks at is not known: it may have a clock of its own"
    if meta["num_inconsistent"]:
        yield f"at {meta['num_inconsistent']} positions steps of different widths chose different tokens"


def _length(texts: list[list[Round]]) -> float:
    rounds = [r for text in texts for r in text]
    return 1 + statistics.fmean(r.num_accepted for r in rounds) if rounds else 1.0


def _bound(walk: _Walk, texts: list[list[Round]], stats: Stats, times: int) -> float | None:
    """How far tokens per round of a run may be from these; None where nothing bounds them."""
    if walk.recording.memory is Memory.ROUNDS or not is_known(walk.policy):
        return None
    here, found = stats.mean_acceptance_length, 0.0
    others: list[_Walk] = []
    if walk.doubts.unknown:
        others += [replace(walk, doubts=Doubts(), assume=assume) for assume in ("never", "always")]
    if walk.doubts.clock:
        others += [replace(walk, doubts=Doubts(), costs=costs) for costs in (_FREE, _DEAR)]
    found = max((abs(_length(_go(other, times)) - here) for other in others), default=0.0)
    if walk.doubts.tails:
        # A row that is off by a mass errs in acceptance by as much at most, on the average over the text's token.
        rounds = sum(len(text) for text in texts)
        found += walk.doubts.tails / max(rounds, 1)
    if not walk.rule.keeps_text or walk.recording.meta["num_inconsistent"]:
        found += half_interval(texts, times)
    return found


def _speedup(texts: list[list[Round]], costs: Costs) -> float:
    """Plain seconds per token over these rounds' seconds per token."""
    rounds = [r for text in texts for r in text]
    seconds = sum(sum(r.seconds.values()) for r in rounds)
    return costs.round(0, 0) * sum(r.num_emitted for r in rounds) / seconds if seconds > 0 else 0.0
