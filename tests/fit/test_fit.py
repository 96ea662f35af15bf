"""The fitted tree: acceptance by rank against brute force, the optimum against every tree, plans in files."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec.cli import main
from specdec.costs import cost_at
from specdec.errors import InputError, PolicyWarning
from specdec.fit import FittedTree, RankTable, TreePlan, best_tree, expected_tokens, measure_ranks
from specdec.fit.costs import Sample, TimedText, fit_costs, probes
from specdec.fit.optimum import RoundCost
from specdec.fit.plan import circumstances
from specdec.fit.ranks import comb, falling
from specdec.policy import Fixed
from specdec.sweep.identity import environment
from specdec.tree import structure


def test_sweeps_and_fits_name_the_processor_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.fit.plan.processor", lambda: "a made-up processor")
    assert environment("cpu", 1)["processor"] == "a made-up processor"
    assert circumstances(tiny_models.tiny("llama"), NgramDrafter())["device"] == "a made-up processor"


def every_tree(nodes: int) -> set[tuple[int, ...]]:
    """All rooted ordered trees with so many nodes below the root, as parents in level order."""
    found: set[tuple[int, ...]] = set()
    for parents in itertools.product(*[range(-1, n) for n in range(nodes)]):
        depths = structure(parents).depths
        if list(depths) == sorted(depths) and list(parents) == sorted(parents):
            found.add(parents)
    return found


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 4), ranks=st.integers(1, 3))
def test_the_optimum_is_the_best_of_all_trees(seed: int, depth: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    accept = np.sort(rng.dirichlet(np.ones(ranks + 1), depth)[:, :ranks], axis=1)[:, ::-1]
    cost = RoundCost({1: 1.0, 7: 1.0 + rng.random()}, level=0.3 * rng.random(), other=0.1)
    trees = [(), *(parents for n in range(1, 7) for parents in every_tree(n))]
    best = max(expected_tokens(parents, accept) / cost.seconds(parents) for parents in trees)
    shape, rate = best_tree(accept, cost, max_nodes=6)
    assert rate == pytest.approx(best, abs=1e-12)
    assert expected_tokens(shape, accept) / cost.seconds(shape) == pytest.approx(rate)


def test_the_costs_decide() -> None:
    accept = np.array([[0.7, 0.2, 0.05]] * 5)
    assert best_tree(accept, RoundCost({1: 1.0, 64: 1.0}, level=0.01))[0] != ()
    wide = best_tree(accept, RoundCost({1: 1.0, 64: 1.0}, level=0.01))[0]
    assert not structure(wide).is_chain
    # Every row costs as much as a step: a chain at most, and nothing when drafting is dear too.
    assert best_tree(accept, RoundCost({1: 1.0, 2: 2.0, 64: 64.0}, level=0.5))[0] == ()
    narrow = best_tree(accept, RoundCost({1: 1.0, 2: 1.0, 3: 9.0, 64: 99.0}, level=0.0))[0]
    assert narrow == (-1,)


def test_expected_tokens_by_hand() -> None:
    accept = np.array([[0.5, 0.25], [0.4, 0.1]])
    assert expected_tokens((), accept) == 1.0
    assert expected_tokens((-1, -1, 0, 0, 1), accept) == pytest.approx(1 + 0.5 + 0.25 + 0.2 + 0.05 + 0.1)
    assert expected_tokens((-1, 0, 1), accept) == pytest.approx(1 + 0.5 + 0.2)  # beyond the table: never accepted


def test_falling_pools_what_rises() -> None:
    assert falling(np.array([0.5, 0.0, 0.1, 0.05])).tolist() == pytest.approx([0.5, 0.05, 0.05, 0.05])
    assert falling(np.array([0.1, 0.4])).tolist() == [0.25, 0.25]


def test_the_comb_asks_about_every_rank() -> None:
    assert comb(3, 2) == (-1, -1, 0, 0, 2, 2)
    assert structure(comb(4, 3)).depths == (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ranks_are_those_of_the_target_among_the_drafts_best(temperature: float) -> None:
    target = tiny_models.tiny("gpt-neox")
    draft = tiny_models.noisy(target, 0.05)
    decoder = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(draft), policy=Fixed(2))
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 5}
    table, rounds = measure_ranks(decoder, [[3, 5, 7]], depth=2, ranks=4, **options)
    assert table.reached[0] == sum(r.num_nodes > 0 for r in rounds)
    assert sum(table.accepted[0]) == sum(r.num_accepted > 0 for r in rounds)
    assert table.accepted[0][0] > table.accepted[0][3]
    assert table.reached[1] <= table.accepted[0][0]
    if temperature == 0:
        text = decoder.generate_plain([3, 5, 7], **options).tokens
        starts = list(itertools.accumulate([r.num_emitted for r in rounds], initial=0))[:-1]
        ranks = [0] * 4
        for at, record in zip(starts, rounds, strict=True):
            if record.num_nodes:
                order = tiny_models.cache_free(draft, [3, 5, 7, *text[:at]]).topk(4).indices.tolist()
                if text[at] in order:
                    ranks[order.index(text[at])] += 1
        assert list(table.accepted[0]) == ranks


def test_probabilities_are_pulled_to_the_depth_before() -> None:
    rows = RankTable((100, 0), ((60, 20), (0, 0))).probabilities()
    assert rows[0] == pytest.approx([61 / 102, 20.5 / 102])
    assert rows[1] == pytest.approx(rows[0])


def timed(*rounds: Sample) -> TimedText:
    """The first round of a text does not count."""
    return TimedText("probe", 4, 1.0, (Sample(9, 9, 9, 99.0, 99.0, 99.0), *rounds))


def test_costs_are_told_apart() -> None:
    texts = [timed(*[Sample(0, -1, 0, 0.0, 1.0, 0.02)] * 3), timed(*[Sample(0, 0, 0, 0.004, 1.0, 0.03)] * 3)]
    for nodes, levels, opened in ((3, 3, 3), (8, 2, 3), (16, 4, 9), (6, 6, 6)):
        sample = Sample(nodes, levels, opened, 0.1 + 0.2 * levels + 0.05 * opened, 1 + 0.1 * nodes, 0.03)
        texts += [timed(sample, sample), timed(sample)]
    costs = fit_costs(texts)
    assert (costs.start, costs.level, costs.node) == pytest.approx((0.1, 0.2, 0.05))
    assert (costs.other, costs.plain, costs.empty) == (0.03, 0.02, 0.004)
    assert costs.verify == pytest.approx({1: 1.0, 4: 1.3, 7: 1.6, 9: 1.8, 17: 2.6})
    assert costs.seconds(()) == pytest.approx(1.02)
    assert costs.round(0, 0, 0) == pytest.approx(1.034)
    assert costs.seconds((-1, -1, 0)) == pytest.approx(cost_at(costs.verify, 4) + 0.1 + 2 * 0.2 + 2 * 0.05 + 0.03)
    assert len(probes(6, 64)) > 6


def test_a_width_that_was_seen_once_says_nothing() -> None:
    texts = [timed(*[Sample(2, 2, 2, 0.2, 1.0, 0.0)] * 3, Sample(1, 1, 1, 9.0, 9.0, 0.0))]
    costs = fit_costs(texts)
    assert costs.verify == {3: 1.0}
    assert costs.level == pytest.approx(0.1)
    assert fit_costs([timed(Sample(1, 1, 1, 9.0, 9.0, 0.0))]).verify == {2: 9.0}  # better than nothing


def test_drafting_that_does_not_grow_has_no_levels() -> None:
    texts = [timed(*[Sample(k, k, k, 0.3, 1.0, 0.0)] * 3) for k in (1, 2, 4, 8)]
    costs = fit_costs(texts)
    assert (costs.start, costs.level, costs.node) == pytest.approx((0.3, 0.0, 0.0))


@pytest.fixture
def pair() -> Any:
    target = tiny_models.tiny("llama")
    return target, ModelDrafter(tiny_models.noisy(target, 0.02))


def test_a_plan_is_used_where_it_was_fitted(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    path = tmp_path / "tree.json"
    TreePlan((-1, -1, 0, 0, 1), circumstances(target, drafter)).save(path)
    policy = FittedTree(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=policy)
    out = decoder.generate([3, 5, 7], max_new_tokens=24, strict=True)
    assert out.tokens == tiny_models.reference(target, [3, 5, 7], 24)
    assert {r.num_nodes for r in out.trace.rounds[:3]} == {5}
    other = tiny_models.tiny("llama", num_hidden_layers=1)
    with pytest.warns(PolicyWarning, match="was fitted on other things .target LlamaForCausalLM"):
        specdec.SpeculativeDecoder(other, drafter=ModelDrafter(other), policy=policy)


def test_an_empty_plan_is_plain_decoding(pair: Any, tmp_path: Path) -> None:
    target, drafter = pair
    path = tmp_path / "tree.json"
    TreePlan((), circumstances(target, drafter)).save(path)
    out = specdec.SpeculativeDecoder(target, drafter=drafter, policy=FittedTree(str(path))).generate(
        [3], max_new_tokens=9
    )
    assert out.stats.num_draft_tokens == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read a tree plan"),
        ("[]", "not a tree plan"),
        ('{"format": 1, "shape": [-1, "0"], "fitted_on": {}}', "list of at most"),
        ('{"format": 1, "shape": [-1, 5], "fitted_on": {}}', "parents come before"),
        ('{"format": 1, "shape": [-1]}', "what it was fitted on"),
        ('{"format": 1, "shape": [-1], "fitted_on": {}, "temperature": null}', "temperature is a number"),
        ('{"format": 1, "shape": [-1], "fitted_on": {}, "evidence": 3}', "evidence a table"),
    ],
)
def test_damaged_plans_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        TreePlan.load(path)


def test_a_drafter_of_chains_has_no_tree(pair: Any) -> None:
    decoder = specdec.SpeculativeDecoder(pair[0], drafter=NgramDrafter())
    with pytest.raises(InputError, match="there is no tree to fit"):
        measure_ranks(decoder, [[3, 5, 7]], max_new_tokens=4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tree.json"
    size = ["--limit", "1", "--max-new-tokens", "12", "--nodes", "8", "--depth", "2", "--ranks", "2"]
    assert main(["tree", "--out", str(path), *size]) == 0
    shown = capsys.readouterr().out
    assert "best chain" in shown
    assert str(path) in shown
    plan = json.loads(path.read_text())
    assert plan["evidence"]["candidates"]["plain"]["speedup"] == 1.0
    best = plan["evidence"]["candidates"]["fitted"]["speedup"]
    assert best == max(row["speedup"] for row in plan["evidence"]["candidates"].values())
    assert main(["generate", "import os", "--tree-plan", str(path), "--max-new-tokens", "4"]) == 0
    assert main(["tree", "--out", str(path), "--nodes", "0"]) == 2
    assert "--nodes is a whole number >= 1, not 0" in capsys.readouterr().err


def test_texts_of_one_round_say_nothing_about_costs() -> None:
    with pytest.raises(InputError, match="raise max_new_tokens"):
        fit_costs([timed()])
