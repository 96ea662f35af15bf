"""Policies that draft trees of a fixed shape, or trees that follow the drafter's own probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.errors import InputError
from specdec.estimates import ACCEPTANCE_CARRIED, Average, Meter
from specdec.policy import MEASURED, Constant, Plan, Policy, PolicyRun, RoundFacts, check_k
from specdec.tree import structure


def shape_of_choices(choices: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The parents of a tree that is given as Medusa's `choices`: a list of paths, each a list of ranks.

    `[[0], [1], [0, 0]]` is the most probable token, the second, and the first's most probable continuation. (Cai et
    al., arXiv 2401.10774.) Errors: `InputError` where a path lacks its beginning or a better-ranked sibling.
    """
    paths = sorted({tuple(path) for path in choices}, key=lambda path: (len(path), path))
    if any(not path or any(not isinstance(rank, int) or rank < 0 for rank in path) for path in paths):
        raise InputError("a path of a tree is a list of ranks, each a whole number >= 0")
    number = {(): -1, **{path: i for i, path in enumerate(paths)}}
    for path in paths:
        for needed in (path[:-1], (*path[:-1], path[-1] - 1) if path[-1] else path):
            if needed not in number:
                raise InputError(f"the tree has the path {list(path)}, and needs {list(needed)} for it")
    return tuple(number[path[:-1]] for path in paths)


@dataclass(frozen=True)
class StaticTree(Policy):
    """Always the same tree: `shape` holds the parents of its nodes, -1 for the root, parents first."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape:
            raise InputError("a static tree has at least one node")
        object.__setattr__(self, "shape", tuple(self.shape))
        structure(self.shape)  # raises when a parent does not come before its children

    @classmethod
    def of_choices(cls, choices: Sequence[Sequence[int]]) -> StaticTree:
        return cls(shape_of_choices(choices))

    @property
    def branches(self) -> bool:
        return not structure(self.shape).is_chain

    @property
    def name(self) -> str:
        return f"static tree({len(self.shape)} nodes)"

    def start(self) -> PolicyRun:
        return Constant(Plan(structure(self.shape).max_depth, shape=self.shape))


@dataclass(frozen=True)
class DynamicTree(Policy):
    """The `budget` most probable nodes by the drafter's own estimate, `k` deep, from `width` expanded nodes a level.

    (EAGLE-2: Li et al., arXiv 2406.16858.)
    """

    budget: int = 24
    k: int = 6
    width: int = 8

    def __post_init__(self) -> None:
        for value in (self.budget, self.k, self.width):
            check_k(value)

    @property
    def branches(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"dynamic tree(budget={self.budget}, k={self.k}, width={self.width})"

    def start(self) -> PolicyRun:
        return Constant(Plan(self.k, budget=self.budget, width=self.width))


@dataclass
class AdaptiveTreeRun(PolicyRun):
    """See `AdaptiveTree`."""

    policy: AdaptiveTree
    meter: Meter = field(default_factory=Meter)
    accepted: Average = field(default_factory=lambda: Average(64))
    expected: Average = field(default_factory=lambda: Average(64))
    emitted: Average = field(default_factory=lambda: Average(8))  # of drafted rounds
    seconds: Average = field(default_factory=lambda: Average(8))
    rounds: int = 0
    pause: int = 2  # plain rounds before the next look, while drafting does not pay
    since_drafted: int = 0

    def plan(self) -> Plan:
        policy = self.policy
        if self.rounds < MEASURED:
            # Measure first: one plain round, and two of a tree as small as a chain.
            return Plan(0) if self.rounds == 1 else Plan(policy.k, budget=policy.k, width=policy.width)
        costs = self.meter.costs()
        drafting = self.emitted.total / max(self.seconds.total, 1e-9)  # of drafted rounds; 0 while there are none
        if drafting >= 1 / costs.round(0, 0):
            self.pause = 2
        elif self.since_drafted < self.pause:
            return Plan(0)
        else:
            self.pause = min(2 * self.pause, policy.probe_every)
        trust = self.accepted.mean(0.8, 2.0) / max(self.expected.mean(0.8, 2.0), 1e-3)
        return Plan(policy.k, budget=policy.budget, width=policy.width, costs=costs, trust=trust)

    def observe(self, facts: RoundFacts) -> None:
        self.rounds += 1
        self.since_drafted = 0 if facts.depth_proposed else self.since_drafted + 1
        self.meter.observe(facts)
        if facts.depth_proposed and self.rounds > 1:  # the first one also pays for what is done once
            self.emitted.add(facts.num_accepted + 1)
            self.seconds.add(sum(facts.seconds.values()))
        if facts.expected is not None:
            self.accepted.add(facts.num_accepted)
            self.expected.add(facts.expected)


@dataclass(frozen=True)
class AdaptiveTree(Policy):
    """A tree of as many nodes, and levels, as bring the most expected tokens per second: by this text's own costs.

    At most `budget` nodes, `k` deep, from `width` expanded nodes a level. The drafter's probabilities are believed as
    far as they came true. Where every further node of a level costs more than it brings, this is a chain, and where
    drafting costs more than it brings, nothing is drafted but every `probe_every` rounds.

    Since it follows the clock, rounds differ between runs; texts do not under a verifier that keeps the seed.
    """

    budget: int = 48
    k: int = 8
    width: int = 8
    probe_every: int = 24

    def __post_init__(self) -> None:
        for value in (self.budget, self.k, self.width, self.probe_every):
            check_k(value)

    @property
    def branches(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "adaptive tree"

    @property
    def most_nodes(self) -> int:
        return max(self.budget, self.k)

    def start(self) -> AdaptiveTreeRun:
        return AdaptiveTreeRun(self)

    def resume(self, last: PolicyRun) -> AdaptiveTreeRun:
        if not isinstance(last, AdaptiveTreeRun):
            return self.start()
        run = AdaptiveTreeRun(
            self,
            last.meter.carried(),
            last.accepted.carried(ACCEPTANCE_CARRIED),
            last.expected.carried(ACCEPTANCE_CARRIED),
            last.emitted.carried(ACCEPTANCE_CARRIED),
            last.seconds.carried(ACCEPTANCE_CARRIED),
        )
        run.rounds = MEASURED if run.meter.tells_plain else 0
        return run
