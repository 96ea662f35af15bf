"""How often drafts are accepted: in real rounds of texts that are decoded for it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from typing import TYPE_CHECKING, Any

from specdec.drafter import Memory
from specdec.errors import InputError
from specdec.fit.optimum import RoundCost, best_tree, expected_tokens
from specdec.fit.ranks import RankTable, rank_tables
from specdec.planner.costs import LIMIT
from specdec.planner.predict import Setting
from specdec.planner.work import Seen, SeenText, Work, expected_work, plain, survival_of, work_of
from specdec.policy import Fixed
from specdec.tree import branching_shape, structure

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

#: Chains that are decoded where the longest does not tell what shorter ones would have done.
_LIMITS = (1, 2, 4, 8, LIMIT)
BRANCHINGS = ((2, 1), (2, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 1, 1))
# A fitted tree of more nodes than this gains nothing that the intervals would show.
_TREE_NODES = 32
# Levels and children of the comb that asks for ranks.
_DEPTH, _RANKS = 5, 4

Tick = Callable[[], None]


class Evidence(ABC):
    """Where acceptance comes from: the rounds that texts take under any setting."""

    @property
    @abstractmethod
    def source(self) -> str:
        """In words."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether every length of chains has the rounds that it would really have on these texts."""

    @property
    @abstractmethod
    def num_texts(self) -> int: ...

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Of all texts."""

    @abstractmethod
    def works(self, lengths: Sequence[int], cost: RoundCost) -> dict[Setting, list[Work]]:
        """Every setting's rounds, text by text; plain decoding is the first, trees come last."""

    @abstractmethod
    def survival(self, k: int) -> list[float]:
        """P(accepted at each depth and all before it) in rounds of k tokens."""


def tree_survival(shape: Sequence[int], table: RankTable) -> list[float]:
    """P(a path at least so deep is accepted), by depth, for a tree and acceptance by rank and depth."""
    accept = table.probabilities()
    depths = structure(tuple(shape)).depths
    tokens = [
        expected_tokens([p for p, at in zip(shape, depths, strict=True) if at <= depth], accept)
        for depth in range(max(depths) + 1)
    ]
    return [max(0.0, min(1.0, after - before)) for before, after in pairwise(tokens)]


def usual_trees() -> list[Setting]:
    return [Setting(shape=branching_shape(b), name="tree " + ",".join(map(str, b))) for b in BRANCHINGS]


def fitted_tree(table: RankTable, cost: RoundCost) -> list[Setting]:
    """The tree that suits these ranks and costs best, unless it is a chain or one of the usual ones."""
    shape, _ = best_tree(table.probabilities(), cost, _TREE_NODES)
    if not shape or structure(shape).is_chain or any(shape == one.shape for one in usual_trees()):
        return []
    return [Setting(shape=shape, name=f"fitted, {len(shape)} nodes")]


@dataclass(frozen=True)
class Acceptance(Evidence):
    """What was accepted, prompt by prompt: `texts[i][limit]`, and ranks by depth where trees were asked about.

    `counted`: shorter chains follow from the longest by counting, see `specdec.planner.work.recut`.
    """

    texts: tuple[Mapping[int, SeenText], ...]
    tables: tuple[RankTable, ...] = ()
    counted: bool = False

    @property
    def source(self) -> str:
        return "texts decoded for it"

    @property
    def exact(self) -> bool:
        return self.counted

    @property
    def num_texts(self) -> int:
        return len(self.texts)

    @property
    def num_tokens(self) -> int:
        return sum(by_limit[max(by_limit)].num_tokens for by_limit in self.texts)

    def survival(self, k: int) -> list[float]:
        return survival_of(self.seen(k), k)

    def works(self, lengths: Sequence[int], cost: RoundCost) -> dict[Setting, list[Work]]:
        base = self.seen(LIMIT)
        found = {Setting(): [plain(text) for text in base]}
        for k in lengths:
            found[Setting(k)] = [work_of(text, k) for text in self.seen(k)]
        if len(self.tables) != len(base) or not any(sum(table.reached) for table in self.tables):
            return found
        for setting in (*usual_trees(), *fitted_tree(reduce(add, self.tables), cost)):
            pairs = zip(base, self.tables, strict=True)
            found[setting] = [
                expected_work(
                    tree_survival(setting.shape, table), text.num_tokens, text.num_prompt_tokens, setting.shape
                )
                for text, table in pairs
            ]
        return found

    def seen(self, k: int) -> list[SeenText]:
        """Of each prompt, the text whose chains were at least k long, the shortest of them; else the longest."""
        found = []
        for by_limit in self.texts:
            limits = [limit for limit in by_limit if limit >= k]
            found.append(by_limit[min(limits) if limits else max(by_limit)])
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(found: Mapping[str, Any]) -> Acceptance:
        """Back from JSON."""

        def text(one: Mapping[str, Any]) -> SeenText:
            return SeenText(**{**one, "rounds": tuple(Seen(**seen) for seen in one["rounds"])})

        return Acceptance(
            tuple({int(limit): text(one) for limit, one in by_limit.items()} for by_limit in found["texts"]),
            tuple(RankTable(tuple(t["reached"]), tuple(map(tuple, t["accepted"]))) for t in found["tables"]),
            bool(found["counted"]),
        )


def is_exact(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> bool:
    """Whether the longest chain tells what shorter ones would have done: the same text, and drafts that depend on the
    tokens before them alone."""
    same_text = options.get("temperature", 0.0) == 0 or decoder.verifier.keeps_seed
    return same_text and decoder.verifier.lossless and decoder.drafter.memory is Memory.PATH


def limits(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Lengths of the chains that are decoded for acceptance."""
    return (LIMIT,) if is_exact(decoder, options) else _LIMITS


def measure_acceptance(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    options: Mapping[str, Any],
    trees: bool,
    tick: Tick,
    seconds: float = float("inf"),
) -> Acceptance:
    """Decode the prompts with long chains, and with shorter ones where those do something else; with combs for trees.

    Between prompts it is looked whether `seconds` have passed; the first two are taken in any case. Raises
    `InputError` where nothing was drafted at all.
    """
    began = time.monotonic()
    texts, tables = [], []
    lengths = limits(decoder, options)
    for number, prompt in enumerate(prompts):
        if number >= 2 and time.monotonic() - began > seconds:
            break
        by_limit = {}
        for limit in lengths:
            made = decoder.generate(prompt, policy=Fixed(limit), **options)
            rounds = tuple(Seen(record.num_nodes, record.num_accepted) for record in made.trace.rounds)
            by_limit[limit] = SeenText(
                limit, len(made.prompt), len(made.tokens), int(options["max_new_tokens"]), rounds
            )
            tick()
        texts.append(by_limit)
        if trees:
            tables += rank_tables(decoder, [prompt], _DEPTH, _RANKS, tick, **options)[0]
    if not any(seen.proposed for by_limit in texts for text in by_limit.values() for seen in text.rounds):
        raise InputError(
            f"the {decoder.drafter.name} drafter proposed nothing on these prompts, so there is nothing to plan; use "
            "other prompts, more new tokens, or another drafter"
        )
    return Acceptance(tuple(texts), tuple(tables), is_exact(decoder, options))
