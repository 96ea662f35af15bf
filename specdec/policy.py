"""How many tokens to draft, and in which shape.

A policy is a frozen description; `start` gives the run that learns during one text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, Protocol

from specdec.costs import Costs
from specdec.errors import InputError
from specdec.estimates import Meter, Track
from specdec.tree import structure

if TYPE_CHECKING:
    from specdec.drafter import Drafter
    from specdec.goodput import Load

MAX_DEPTH = 64
# The first rounds measure, unless an earlier text did.
MEASURED = 3


def check_k(k: int) -> None:
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k is the number of drafted tokens per round and must be a whole number >= 1, not {k!r}")


@dataclass(frozen=True)
class Plan:
    """One round's budget, `depth` tokens deep. Empty `branching` and `shape` and no `budget` mean a chain.

    `branching[d]`: children of every node at depth d. `shape`: the parents of a fixed tree's nodes, -1 for the root,
    parents first; siblings come in drawing order. `budget`: that many nodes at most, the most probable ones among the
    children of the `width` most probable nodes of each level.
    `costs`: with a budget, no more nodes and levels than bring the most expected tokens per second at these costs, when
    the drafter's own probabilities are worth `trust` times what they say. `limit`: a drafter that weighs lengths by
    costs itself may go so deep; the others keep to `depth`.
    `stop_below`: stop *after* a drafted token whose own draft probability is below it. The token is kept and
    verified, which is what makes the rule exact (algorithm notes: dropping it is not).
    """

    depth: int
    branching: tuple[int, ...] = ()
    stop_below: float = 0.0
    shape: tuple[int, ...] = ()
    budget: int = 0
    width: int = 8
    costs: Costs | None = None
    trust: float = 1.0
    limit: int = 0

    @property
    def deepest(self) -> int:
        """How deep a proposal may be."""
        return max(self.depth, self.limit)

    def children(self, depth: int) -> int:
        return self.branching[depth] if depth < len(self.branching) else 1

    @property
    def is_chain(self) -> bool:
        """Whether it asks for a chain by saying nothing else."""
        return not (self.budget or self.shape or any(count > 1 for count in self.branching))

    @property
    def num_nodes(self) -> int:
        """Of the largest tree within this plan, `limit` aside."""
        if self.shape:
            return len(self.shape)
        if self.budget:
            return self.budget
        counts = list(accumulate((self.children(depth) for depth in range(self.depth)), mul))
        return sum(counts)

    def limited(self, depth: int) -> Plan:
        """The part of this plan that is at most `depth` deep."""
        if self.deepest <= depth:
            return self
        least = max(0, min(self.depth, depth))
        shape = cut(self.shape, least)
        return replace(
            self, depth=least, branching=self.branching[:least], shape=shape, limit=max(0, min(self.limit, depth))
        )


def cut(parents: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The parents of the nodes that are at most `depth` deep."""
    depths = structure(parents).depths
    kept = [node for node in range(len(parents)) if depths[node] <= depth]
    number = {-1: -1, **{node: i for i, node in enumerate(kept)}}
    return tuple(number[parents[node]] for node in kept)


class RoundFacts(Protocol):
    """What a policy may learn from: one round of a trace."""

    @property
    def depth_proposed(self) -> int: ...
    @property
    def drafter(self) -> str: ...
    @property
    def expected(self) -> float | None: ...
    @property
    def num_accepted(self) -> int: ...
    @property
    def num_evaluated(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def seconds(self) -> dict[str, float]: ...


class PolicyRun(ABC):
    """A policy at work on one text."""

    @abstractmethod
    def plan(self) -> Plan: ...

    def observe(self, facts: RoundFacts) -> None:
        """Learn from a finished round; most policies have nothing to learn."""
        return None

    def join(self, load: Load) -> None:
        """The text decodes in a batch, whose steps cost what `load` measures; most policies do not look at costs."""
        return None


class Policy(ABC):
    """Lossless: yes. A plan is made before the round's tokens are drawn, or stops after a token that is kept."""

    @property
    def branches(self) -> bool:
        """Whether plans branch, so that drafters and verifiers without trees can be refused beforehand."""
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, target: Any, drafter: Drafter) -> None:
        """Warn when the policy was made for another pair or machine than this one."""
        return None

    @property
    def most_nodes(self) -> int:
        """Nodes that no round has more of: what caches, and steps of fixed width, need room for.

        By default those of the first plan; a policy whose plans grow says so here.
        """
        plan = self.start().plan()
        return max(plan.num_nodes, plan.deepest)

    @abstractmethod
    def start(self) -> PolicyRun: ...

    def resume(self, last: PolicyRun) -> PolicyRun:
        """A run for the next text, which may know what `last`, this policy's run on an earlier text, has learnt."""
        return self.start()


@dataclass
class Constant(PolicyRun):
    value: Plan

    def plan(self) -> Plan:
        return self.value


@dataclass(frozen=True)
class Fixed(Policy):
    """Always `k` tokens deep; with `branching`, a tree: `Fixed(3, (4, 2, 1))` has 4 + 8 + 8 nodes."""

    k: int = 5
    branching: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_k(self.k)
        if any(not isinstance(b, int) or b < 1 for b in self.branching) or len(self.branching) > self.k:
            raise InputError(f"branching has one number >= 1 per depth, at most k = {self.k} of them: {self.branching}")

    @property
    def branches(self) -> bool:
        return any(b > 1 for b in self.branching)

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.branching))
        return f"fixed(k={self.k}{', tree ' + shape if self.branches else ''})"

    def start(self) -> PolicyRun:
        return Constant(Plan(self.k, self.branching))


@dataclass(frozen=True)
class Confidence(Policy):
    """Up to `k` tokens; stop after one whose draft probability is below `threshold` (the exact stop-after form)."""

    threshold: float = 0.4
    k: int = 10

    def __post_init__(self) -> None:
        check_k(self.k)
        if not 0 <= self.threshold <= 1:
            raise InputError(f"threshold must lie in [0, 1], not {self.threshold}")

    @property
    def name(self) -> str:
        return f"confidence(threshold={self.threshold}, k={self.k})"

    def start(self) -> PolicyRun:
        return Constant(Plan(self.k, stop_below=self.threshold))


@dataclass
class _HeuristicRun(PolicyRun):
    k: int
    limit: int

    def plan(self) -> Plan:
        return Plan(self.k)

    def observe(self, facts: RoundFacts) -> None:
        if facts.depth_proposed:
            full = facts.num_accepted == facts.depth_proposed
            self.k = min(self.limit, self.k + 2) if full else max(1, self.k - 1)


@dataclass(frozen=True)
class Heuristic(Policy):
    """Two more after full acceptance, one fewer otherwise (the schedule of `transformers`)."""

    k: int = 5
    limit: int = 20

    def __post_init__(self) -> None:
        check_k(self.k)
        check_k(self.limit)

    @property
    def name(self) -> str:
        return f"heuristic(k={self.k})"

    @property
    def most_nodes(self) -> int:
        return max(self.k, self.limit)

    def start(self) -> PolicyRun:
        return _HeuristicRun(self.k, self.limit)


@dataclass
class ThroughputRun(PolicyRun):
    """See `Throughput`."""

    limit: int
    k: int
    probe_every: int
    track: Track = field(default_factory=lambda: Track(0.7, 64))
    meter: Meter = field(default_factory=Meter)
    rounds: int = 0
    since_probe: int = 0
    load: Load | None = None  # of the batch, where there is one

    def join(self, load: Load) -> None:
        self.load = load
        load.join(self)

    def survival(self) -> list[float]:
        """P(accepted at each depth and all before it), from evaluated positions only."""
        return self.track.survival(self.limit)

    def plan(self) -> Plan:
        if self.load is not None:
            # All texts of a batch look deeper in the same turn: their draft steps are common ones.
            deeper = 2 if self.load.turns % self.probe_every == self.probe_every - 1 else 0
            return Plan(min(self.limit, self.load.depth(self, self.k) + deeper))
        if self.rounds < MEASURED:
            # Measure first: a plain round in between tells what one row costs, without which k = 0 never looks good.
            return Plan(0 if self.rounds == 1 else self.k)
        costs = self.meter.costs()
        best, _ = costs.best_length(self.survival())
        if self.since_probe >= self.probe_every:
            # A deeper look keeps estimates beyond the usual length alive; at k = 0 it may find the way back.
            self.since_probe = 0
            best = min(self.limit, best + 2)
        self.k = best
        return Plan(best, costs=costs, limit=self.limit)

    def observe(self, facts: RoundFacts) -> None:
        self.rounds += 1
        self.since_probe += 1
        self.track.observe(facts.num_accepted, facts.num_evaluated)
        self.meter.observe(facts)


@dataclass(frozen=True)
class Throughput(Policy):
    """Picks the k, 0 included, with the highest expected tokens per second, and probes now and then.

    Acceptance by position comes from evaluated positions only; draft, verify and overhead costs are this session's
    own, measured as it runs; in a batch, the common ones (`specdec.goodput`): verification costs more as it grows,
    until nothing is drafted. The next text of a decoder starts from what the earlier ones showed. (Goodput: Liu et al.,
    arXiv 2406.14066.) Since it follows the clock, rounds differ between runs; texts do not under a verifier that keeps
    the seed.
    """

    k: int = 4  # of the first rounds
    limit: int = 16
    probe_every: int = 24

    def __post_init__(self) -> None:
        for value in (self.k, self.limit, self.probe_every):
            check_k(value)

    @property
    def name(self) -> str:
        return "throughput"

    @property
    def most_nodes(self) -> int:
        return self.limit

    def start(self) -> ThroughputRun:
        return ThroughputRun(self.limit, min(self.k, self.limit), self.probe_every)

    def resume(self, last: PolicyRun) -> ThroughputRun:
        run = self.start()
        if isinstance(last, ThroughputRun):
            run.track, run.meter = last.track.carried(), last.meter.carried()
            run.rounds, run.since_probe = MEASURED if run.meter.tells_plain else 0, last.since_probe
        return run
