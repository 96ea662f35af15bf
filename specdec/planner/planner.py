"""The whole plan: costs measured here or kept from before, acceptance, and what follows from both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.errors import InputError
from specdec.planner import cache, costs, evidence
from specdec.planner.evidence import Acceptance, Evidence
from specdec.planner.memory import Memory, memory_needed
from specdec.planner.predict import Prediction, TextCost, best, plan
from specdec.planner.verdict import Roofline, Verdict, best_drafting, verdict
from specdec.policy import check_k

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

LENGTHS = (*range(1, 17), 50)

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
    others: float = 0.0  # cores that other processes used while costs were measured

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
            "others_cores": self.others,
        }  # fmt: skip


def make_plan(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    lengths: Sequence[int] = LENGTHS,
    with_trees: bool = True,
    known: Evidence | None = None,
    context_length: int | None = None,
    seconds: float = 60.0,
    store: cache.Store | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure what is not kept from before, and predict.

    `options` go to `generate`. `lengths`: the k to predict; trees come on top where drafter and rule grow them.
    `known`: acceptance that is known already (from a recorded trace); then only costs are measured. `context_length`:
    tokens to count keys and values for (None: the longest of these texts). `seconds`: no further prompt is decoded for
    acceptance after that. Raises `InputError` before any work.
    """
    options = {"max_new_tokens": 64, **(options or {})}
    if not prompts or not any(lengths):
        raise InputError("no prompts to plan on" if not prompts else "no draft length above 0 to plan")
    lengths = sorted({k for k in lengths if k != 0})  # plain decoding has its row in any case
    for k in lengths:
        check_k(k)
    prompts = [list(decoder.prepare(prompt, **options).request.prompt) for prompt in prompts]
    work = _Measuring(decoder, prompts, options, with_trees and costs.grows_trees(decoder), store or cache.Store())
    work.watch(progress, known is None)
    measured, old_costs = work.find_costs()
    found, old_acceptance = (known, False) if known is not None else work.find_acceptance(seconds)
    cost = measured.text_cost()
    rows = plan(cost, found.works(lengths, cost.round), measured.resampled())
    survival = found.survival(min(max(row.setting.k for row in rows), costs.LIMIT))
    first = found.survival(max(1, best_drafting(rows).setting.k))[0]
    width = max(1 + max(row.setting.k, len(row.setting.shape)) for row in rows)
    length = context_length or max(map(len, prompts)) + int(options["max_new_tokens"])
    return Report(
        rows=rows,
        verdict=verdict(rows, cost, decoder.drafter.name, first),
        costs=cost,
        memory=memory_needed(decoder, length, width),
        roofline=Roofline(measured.bare[1], cost.round.plain_round(), measured.step_bytes, measured.bandwidth),
        survival=survival,
        num_texts=found.num_texts,
        num_tokens=found.num_tokens,
        from_cache={"costs": old_costs, "acceptance": old_acceptance},
        bare_draft=measured.bare_draft,
        exact=found.exact,
        source=found.source,
        others=measured.others,
    )


@dataclass
class _Measuring:
    """What a plan needs to be measured, or finds in the store."""

    decoder: SpeculativeDecoder
    prompts: Sequence[Any]
    options: Mapping[str, Any]
    trees: bool
    store: cache.Store
    tick: Callable[[], None] = lambda: None

    def watch(self, progress: Progress | None, live: bool) -> None:
        """Tell `progress` about every text that is decoded, with those of the acceptance if that is measured."""
        if progress is None:
            return
        show: Progress = progress
        per_prompt = len(evidence.limits(self.decoder, self.options)) + self.trees
        total = costs.num_cost_texts(self.decoder, len(self.prompts), self.trees) + live * per_prompt * len(
            self.prompts
        )
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            show(min(done, total), total, "")

        self.tick = tick

    def find_costs(self) -> tuple[costs.Costs, bool]:
        """And whether they were kept."""
        facts = cache.cost_facts(self.decoder, self.options, self.trees)
        kept = self.store.load(facts)
        if kept is not None:
            return costs.Costs.of(kept), True
        found = costs.measure_costs(self.decoder, self.prompts, self.options, self.trees, self.tick)
        self.store.save(facts, found.as_dict())
        return found, False

    def find_acceptance(self, seconds: float) -> tuple[Acceptance, bool]:
        """And whether it was kept."""
        facts = cache.acceptance_facts(self.decoder, self.options, self.trees, self.prompts)
        kept = self.store.load(facts)
        if kept is not None:
            return Acceptance.of(kept), True
        found = evidence.measure_acceptance(self.decoder, self.prompts, self.options, self.trees, self.tick, seconds)
        if len(found.texts) == len(self.prompts):
            self.store.save(facts, found.as_dict())
        return found, False
