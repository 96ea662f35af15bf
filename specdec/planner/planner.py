"""The whole plan: costs measured here or kept from before, acceptance, and what follows from both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from operator import add
from typing import TYPE_CHECKING, Any

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost, best_tree, expected_tokens
from specdec.fit.ranks import RankTable
from specdec.planner import cache, measure
from specdec.planner.measure import Acceptance, Costs
from specdec.planner.memory import Memory, memory_needed
from specdec.planner.predict import Prediction, Setting, TextCost, best, plan
from specdec.planner.verdict import Roofline, Verdict, verdict
from specdec.planner.work import Work, expected_work, plain, survival_of, work_of
from specdec.policy import check_k
from specdec.tree import structure

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

LENGTHS = (*range(1, 17), 50)
BRANCHINGS = ((2, 1), (2, 1, 1), (2, 2, 1), (3, 2, 1), (4, 2, 1, 1))
# A fitted tree of more nodes than this gains nothing that the intervals would show.
_TREE_NODES = 32

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Report:
    """A plan, and what it rests on."""

    rows: list[Prediction]
    verdict: Verdict
    costs: TextCost
    memory: Memory
    roofline: Roofline
    survival: list[float]  # of the longest chains
    num_texts: int
    num_tokens: int
    from_cache: dict[str, bool] = field(default_factory=dict)
    bare_draft: float = 0.0
    exact: bool = False
    source: str = "measured"

    @property
    def best(self) -> Prediction:
        return best(self.rows)

    def as_dict(self) -> dict[str, Any]:
        cost = self.costs.round
        return {
            "verdict": self.verdict.as_dict(),
            "best": self.best.as_dict(),
            "rows": [row.as_dict() for row in self.rows],
            "acceptance": {
                "source": self.source, "texts": self.num_texts, "tokens": self.num_tokens, "survival": self.survival,
                "shorter_chains": "exact" if self.exact else "measured at several lengths",
            },
            "seconds": {
                "verify": {str(width): seconds for width, seconds in cost.verify.items()},
                "draft_start": cost.start, "draft_level": cost.level, "draft_node": cost.node,
                "draft_nothing": cost.empty, "other": cost.other,
                "plain_other": cost.other if cost.plain is None else cost.plain,
                "plain_step": cost.plain_round(), "bare_draft_step": self.bare_draft,
                "once": {"plain": vars(self.costs.plain_once), "speculative": vars(self.costs.once)},
            },
            "memory": self.memory.as_dict(),
            "roofline": self.roofline.as_dict(),
            "from_cache": self.from_cache,
        }  # fmt: skip


def branching_shape(branching: Sequence[int]) -> tuple[int, ...]:
    """The parents of the tree whose nodes at depth d all have `branching[d]` children, level by level."""
    parents: list[int] = []
    level = [-1]
    for count in branching:
        following = []
        for node in level:
            for _ in range(count):
                following.append(len(parents))
                parents.append(node)
        level = following
    return tuple(parents)


def tree_survival(shape: Sequence[int], table: RankTable) -> list[float]:
    """P(a path at least so deep is accepted), by depth, for a tree and acceptance by rank and depth."""
    accept = table.probabilities()
    depths = structure(tuple(shape)).depths
    tokens = [
        expected_tokens([p for p, at in zip(shape, depths, strict=True) if at <= depth], accept)
        for depth in range(max(depths) + 1)
    ]
    return [max(0.0, min(1.0, after - before)) for before, after in pairwise(tokens)]


def trees(tables: Sequence[RankTable], cost: RoundCost) -> list[Setting]:
    """The usual trees, and the one that suits these ranks and costs best, when it is none of those and no chain."""
    found = [Setting(shape=branching_shape(b), name="tree " + ",".join(map(str, b))) for b in BRANCHINGS]
    shape, _ = best_tree(reduce(add, tables).probabilities(), cost, _TREE_NODES)
    if shape and not structure(shape).is_chain and all(shape != one.shape for one in found):
        found.append(Setting(shape=shape, name=f"fitted tree, {len(shape)} nodes"))
    return found


def works(acceptance: Acceptance, lengths: Sequence[int], cost: RoundCost) -> dict[Setting, list[Work]]:
    """Every setting's rounds, text by text; plain decoding is the first."""
    base = acceptance.seen(max(lengths, default=1))
    found = {Setting(): [plain(text) for text in base]}
    for k in lengths:
        found[Setting(k)] = [work_of(text, k) for text in acceptance.seen(k)]
    if not acceptance.tables:
        return found
    for setting in trees(acceptance.tables, cost):
        pairs = zip(base, acceptance.tables, strict=True)
        found[setting] = [
            expected_work(tree_survival(setting.shape, table), text.num_tokens, text.num_prompt_tokens, setting.shape)
            for text, table in pairs
        ]
    return found


def _reached(tables: Sequence[RankTable], num_texts: int) -> bool:
    """Whether trees were asked about on every text."""
    return len(tables) == num_texts and any(sum(table.reached) for table in tables)


def make_plan(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    with_trees: bool = True,
    acceptance: Acceptance | None = None,
    source: str = "measured",
    context_length: int | None = None,
    seconds: float = 60.0,
    store: cache.Store | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure what is not kept from before, and predict.

    `options` go to `generate`. `lengths`: the k to predict; trees come on top where drafter and rule grow them.
    `acceptance`: known already (from a recorded trace), then only costs are measured. `context_length`: tokens to count
    keys and values for (None: the longest of these texts). `seconds`: no further prompt is decoded for acceptance after
    that. Raises `InputError` before any work.
    """
    options = {"max_new_tokens": 64, **(options or {})}
    if not prompts:
        raise InputError("no prompts to plan on")
    for k in lengths:
        check_k(k)
    ids = [decoder.prepare(prompt, **options).request.prompt for prompt in prompts]
    prompts = [list(one) for one in ids]
    tree_wise = with_trees and measure.grows_trees(decoder)
    store = cache.Store() if store is None else store
    tick = _ticker(decoder, prompts, options, tree_wise, acceptance is None, progress)
    costs, old_costs = _costs(decoder, prompts, options, tree_wise, store, tick)
    old_acceptance = False
    if acceptance is None:
        acceptance, old_acceptance = _acceptance(decoder, prompts, options, tree_wise, store, tick, seconds)
    if not _reached(acceptance.tables, len(acceptance.texts)):
        acceptance = Acceptance(acceptance.texts, (), acceptance.exact)
    cost = costs.text_cost()
    rows = plan(cost, works(acceptance, lengths, cost.round), costs.resampled())
    longest = acceptance.seen(max(lengths))
    survival = survival_of(longest, min(max(lengths), measure.LIMIT))
    width = max(1 + max(row.setting.k, len(row.setting.shape)) for row in rows)
    length = context_length or max(len(one) for one in ids) + int(options["max_new_tokens"])
    return Report(
        rows,
        verdict(rows, cost, decoder.drafter.name, survival[0]),
        cost,
        memory_needed(decoder, length, width),
        Roofline(costs.bare[1], cost.round.plain_round(), costs.step_bytes, costs.bandwidth),
        survival,
        len(acceptance.texts),
        sum(text.num_tokens for text in longest),
        {"costs": old_costs, "acceptance": old_acceptance},
        costs.bare_draft,
        acceptance.exact,
        source,
    )


def _ticker(
    decoder: Any, prompts: Sequence[Any], options: Mapping[str, Any], trees: bool, live: bool, progress: Progress | None
) -> Callable[[], None]:
    per_prompt = len(measure.limits(decoder, options)) + trees
    total = measure.num_cost_texts(decoder, len(prompts), trees) + live * per_prompt * len(prompts)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total, "")

    return tick


def _costs(
    decoder: Any, prompts: Sequence[Any], options: Mapping[str, Any], trees: bool, store: cache.Store, tick: Any
) -> tuple[Costs, bool]:
    facts = cache.cost_facts(decoder, options, trees)
    kept = store.load(facts)
    if kept is not None:
        return Costs.of(kept), True
    found = measure.measure_costs(decoder, prompts, options, trees, tick)
    store.save(facts, found.as_dict())
    return found, False


def _acceptance(
    decoder: Any,
    prompts: Sequence[Any],
    options: Mapping[str, Any],
    trees: bool,
    store: cache.Store,
    tick: Any,
    seconds: float,
) -> tuple[Acceptance, bool]:
    facts = cache.acceptance_facts(decoder, options, trees, prompts)
    kept = store.load(facts)
    if kept is not None:
        return Acceptance.of(kept), True
    found = measure.measure_acceptance(decoder, prompts, options, trees, tick, seconds)
    if len(found.texts) == len(prompts):
        store.save(facts, found.as_dict())
    return found, False
