"""Plans of real pairs: acceptance as runs have it, costs kept by what they depend on, verdicts, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec.bench.synthetic import Shape, make_pair
from specdec.cli import main
from specdec.errors import InputError
from specdec.fit.costs import PLAIN, Sample, TimedText
from specdec.fit.optimum import RoundCost
from specdec.fit.ranks import RankTable
from specdec.planner import memory
from specdec.planner.cache import Store, acceptance_facts, cost_facts, key_of
from specdec.planner.costs import Costs, cost_policies, with_curve
from specdec.planner.evidence import (
    LIMIT,
    Acceptance,
    branching_shape,
    fitted_tree,
    is_exact,
    limits,
    measure_acceptance,
    tree_survival,
)
from specdec.planner.memory import memory_needed, tensor_bytes, there_is
from specdec.planner.planner import Report, make_plan
from specdec.planner.predict import Setting
from specdec.planner.traced import Traced, prompts_of, sampling_options
from specdec.planner.work import recut
from specdec.policy import Fixed
from specdec.replay import record
from specdec.train.provenance import draft_fingerprint

PROMPTS = [[3, 5, 7], [11, 2, 9, 4]]


def nothing() -> None:
    return None


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bare forwards and the memory's speed are measured for moments: nothing here asks how fast they are."""
    monkeypatch.setattr("specdec.bench.bare._SECONDS", 0.0)
    monkeypatch.setattr("specdec.bench.bare._MIN_REPETITIONS", 1)
    monkeypatch.setattr("specdec.bench.machine.BUFFER_BYTES", 1 << 20)


@pytest.fixture
def decoder() -> Any:
    target = tiny_models.tiny("llama")
    drafter = ModelDrafter(tiny_models.noisy(target, 0.02), backend="eager")
    return specdec.SpeculativeDecoder(target, drafter=drafter, backend="eager", prefix_cache=0)


def plan_of(decoder: Any, folder: Path, prompts: Any = PROMPTS, **options: Any) -> Report:
    return make_plan(
        decoder, prompts, {"max_new_tokens": 12}, lengths=(1, 2, 4), with_trees=False, store=Store(folder), **options
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_shorter_chains_are_those_of_runs(decoder: Any, temperature: float) -> None:
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
    assert is_exact(decoder, options)
    found = measure_acceptance(decoder, PROMPTS, options, trees=False, tick=nothing)
    whole = [seen for text in found.texts for seen in text[LIMIT].rounds if seen.accepted == LIMIT]
    assert not whole  # else the token behind a whole chain is a guess
    for k in (1, 2, 3, 7, LIMIT):
        for prompt, text in zip(PROMPTS, found.seen(k), strict=True):
            run = decoder.generate(prompt, policy=Fixed(k), **options).trace.rounds
            assert [(seen.proposed, seen.accepted) for seen in recut(text, k)] == [
                (r.num_nodes, r.num_accepted) for r in run
            ]


def test_rules_that_change_the_text_are_asked_at_several_lengths(decoder: Any) -> None:
    assert limits(decoder, {"temperature": 0.7}) == (LIMIT,)
    block = specdec.SpeculativeDecoder(decoder.target, drafter=decoder.drafter, verifier="block", backend="eager")
    assert len(limits(block, {"temperature": 0.7})) > 1
    assert limits(block, {}) == (LIMIT,)
    lookup = specdec.SpeculativeDecoder(decoder.target, drafter=NgramDrafter(), backend="eager")
    assert (len(limits(lookup, {})) == 1) == is_exact(lookup, {})


def test_nothing_drafted_is_nothing_to_plan(decoder: Any) -> None:
    with pytest.raises(InputError, match="proposed nothing on these prompts"):
        measure_acceptance(decoder, PROMPTS, {"max_new_tokens": 1}, trees=False, tick=nothing)


def test_time_ends_between_prompts(decoder: Any) -> None:
    found = measure_acceptance(decoder, [*PROMPTS, [8, 9]], {"max_new_tokens": 8}, False, nothing, seconds=0.0)
    assert found.num_texts == 2


def test_trees_are_asked_about_where_they_grow(decoder: Any, tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    options = {"max_new_tokens": 12}
    report = make_plan(decoder, PROMPTS, options, lengths=(1, 2), store=Store(tmp_path),
                       progress=lambda done, total, _: ticks.append((done, total)))  # fmt: skip
    assert ticks[-1][0] == ticks[-1][1] == len(ticks)
    trees = [row for row in report.rows if row.setting.shape]
    assert {"tree 2,1", "tree 4,2,1,1"} <= {row.setting.name for row in trees}
    chain = next(row for row in report.rows if row.setting.k == 2)
    assert all(row.tokens_per_round > chain.tokens_per_round - 0.6 for row in trees)
    assert any("comb" in name for name in cost_policies(decoder, True))
    block = specdec.SpeculativeDecoder(decoder.target, drafter=decoder.drafter, verifier="block", backend="eager")
    report = make_plan(block, PROMPTS, options, lengths=(1, 2), store=Store(tmp_path / "block"))
    assert not [row for row in report.rows if row.setting.shape]


def test_a_trees_survival_is_that_of_its_paths() -> None:
    assert branching_shape((2, 2)) == (-1, -1, 0, 0, 1, 1)
    table = RankTable((10_000_000, 10_000_000), ((6_000_000, 2_000_000), (5_000_000, 1_000_000)))
    assert tree_survival((-1, -1, 0, 0, 1), table) == pytest.approx([0.8, 0.6 * 0.6 + 0.2 * 0.5], abs=1e-4)
    cheap, dear = RoundCost({1: 1.0, 64: 1.0}, level=0.01), RoundCost({1: 1.0, 64: 64.0}, level=0.01)
    assert len(fitted_tree(table, cheap)) == 1
    assert fitted_tree(table, dear) == []  # a chain, which has its own row


def test_plans_are_kept_by_what_they_depend_on(decoder: Any, tmp_path: Path) -> None:
    first = plan_of(decoder, tmp_path)
    assert first.from_cache == {"costs": False, "acceptance": False}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]
    again = plan_of(decoder, tmp_path)
    assert again.from_cache == {"costs": True, "acceptance": True}
    assert [row.as_dict() for row in again.rows] == [row.as_dict() for row in first.rows]
    other = plan_of(decoder, tmp_path, prompts=[[1, 2, 3]])
    assert other.from_cache == {"costs": True, "acceptance": False}
    facts = cost_facts(decoder, {"max_new_tokens": 12}, False)
    assert Store(tmp_path).load(facts) is not None
    assert Store(tmp_path, fresh=True).load(facts) is None


def test_damaged_files_are_measured_again(decoder: Any, tmp_path: Path) -> None:
    facts = cost_facts(decoder, {}, False)
    store = Store(tmp_path)
    assert store.save(facts, {"a": 1})
    assert store.load(facts) == {"a": 1}
    (path,) = tmp_path.iterdir()
    for content in ("{", "[]", json.dumps({"key": "other", "what": {}}), json.dumps({"key": key_of(facts)})):
        path.write_text(content)
        assert store.load(facts) is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert not Store(blocked).save(facts, {})  # no folder can be made there
    assert Store(blocked).load(facts) is None


def test_keys_tell_apart_what_costs_or_accepts_otherwise(decoder: Any) -> None:
    target = decoder.target
    base = key_of(cost_facts(decoder, {}, False))
    assert key_of(cost_facts(decoder, {"max_new_tokens": 7}, False)) == base
    assert key_of(cost_facts(decoder, {"temperature": 0.5}, False)) != base
    other_draft = ModelDrafter(tiny_models.noisy(target, 0.03), backend="eager")
    changed = [
        specdec.SpeculativeDecoder(target, drafter=other_draft, backend="eager"),
        specdec.SpeculativeDecoder(target, drafter=decoder.drafter, verifier="match", backend="eager"),
        specdec.SpeculativeDecoder(target, drafter=decoder.drafter, backend="eager", kv_cache="int8"),
        specdec.SpeculativeDecoder(tiny_models.noisy(target, 0.01), drafter=decoder.drafter, backend="eager"),
        specdec.SpeculativeDecoder(target, drafter=NgramDrafter(), backend="eager"),
    ]
    keys = {base, *(key_of(cost_facts(one, {}, False)) for one in changed)}
    assert len(keys) == 1 + len(changed)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert key_of(cost_facts(decoder, {}, False)) != base
    finally:
        torch.set_num_threads(threads)
    here = acceptance_facts(decoder, {"seed": 1}, False, PROMPTS)
    assert key_of(here) != key_of(acceptance_facts(decoder, {"seed": 2}, False, PROMPTS))
    assert key_of(here) != key_of(acceptance_facts(decoder, {"seed": 1}, False, PROMPTS[:1]))


def test_measurements_survive_json(decoder: Any) -> None:
    found = measure_acceptance(decoder, PROMPTS, {"max_new_tokens": 12}, trees=True, tick=nothing)
    assert Acceptance.of(json.loads(json.dumps(found.as_dict()))) == found
    texts = (TimedText(PLAIN, 3, 1.0, (Sample(0, -1, 0, 0.0, 1.0, 0.1),)),)
    costs = Costs(texts, {1: 0.5, 2: 0.6}, 0.1, 12, 1e9, 1000)
    assert Costs.of(json.loads(json.dumps(costs.as_dict()))) == costs


def test_the_curve_of_bare_forwards_fills_the_gaps() -> None:
    cost = RoundCost({1: 1.2, 5: 2.4})
    filled = with_curve(cost, {1: 1.0, 2: 1.0, 4: 1.0, 5: 2.0, 8: 3.0})
    assert filled.verify == pytest.approx({1: 1.2, 2: 1.25, 4: 1.35, 5: 2.4, 8: 3.55})
    assert with_curve(cost, {}) == cost
    noisy = with_curve(RoundCost({1: 1.0}), {1: 1.0, 2: 3.0, 3: 2.0, 4: 4.0})
    assert noisy.verify == pytest.approx({1: 1.0, 2: 2.5, 3: 2.5, 4: 4.0})


def test_what_is_paid_once_follows_the_prompt() -> None:
    def text(probe: str, levels: int, length: int, once: float) -> TimedText:
        rounds = tuple(Sample(max(levels, 0), levels, max(levels, 0), 0.0, 1.0, 0.5) for _ in range(4))
        return TimedText(probe, length, once + sum(sample.seconds for sample in rounds), rounds)

    texts = [text(PLAIN, -1, 10, 0.3), text(PLAIN, -1, 30, 0.5), text("chain 2", 2, 10, 0.6), text("chain 2", 2, 30, 1)]
    cost = Costs(tuple(texts), {}, 0.0, 10, 1.0, 1).text_cost()
    assert (cost.plain_once.fixed, cost.plain_once.per_token) == pytest.approx((0.2, 0.01))
    assert (cost.once.fixed, cost.once.per_token) == pytest.approx((0.4, 0.02))
    assert cost.round.plain_round() == pytest.approx(1.5)
    resampled = Costs(tuple(texts), {}, 0.0, 10, 1.0, 1).resampled(number=5)
    assert len(resampled) == 5


def deep(layers: int) -> Any:
    return tiny_models.tiny("llama", num_hidden_layers=layers)


def test_a_slower_draft_must_lose(tmp_path: Path) -> None:
    """End to end: a random draft of eight times the target's layers."""
    torch.manual_seed(0)
    drafter = ModelDrafter(deep(8), backend="eager")
    decoder = specdec.SpeculativeDecoder(deep(1), drafter=drafter, backend="eager", prefix_cache=0)
    report = plan_of(decoder, tmp_path)
    assert not report.verdict.speculate
    assert report.verdict.sentence.startswith("do not speculate here")
    assert report.best.setting == Setting()  # plain decoding
    assert max(row.speedup for row in report.rows if row.setting.k) < 0.8
    assert report.costs.round.level > report.costs.round.verify[1]


def test_a_small_draft_that_agrees_must_win(tmp_path: Path) -> None:
    """End to end: one layer of 16, and what the others write is nothing."""
    pair = make_pair(Shape(16, 64, 128, 4, 2, 512, 1, 0.0), scale=0.0)
    decoder = specdec.SpeculativeDecoder(
        pair.target, drafter=ModelDrafter(pair.draft, backend="eager"), backend="eager", prefix_cache=0
    )
    report = plan_of(decoder, tmp_path, prompts=[[300, 301, 302], [400, 401, 402, 403]])
    assert report.survival[:4] == [1.0] * 4
    assert report.verdict.speculate
    assert report.verdict.sentence.startswith("speculate with k = ")
    assert max(row.speedup for row in report.rows) > 1.3


def test_memory_counts_weights_once_and_keys_and_values(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory_needed(decoder, 100, 5)
    assert needed.target_weights == sum(t.nbytes for t in (*decoder.target.parameters(), *decoder.target.buffers()))
    assert needed.draft_weights == sum(
        t.nbytes for t in (*decoder.drafter.model.parameters(), *decoder.drafter.model.buffers())
    )
    assert needed.target_kv == decoder.backend.bytes_for(100)
    assert needed.draft_kv == decoder.drafter.bytes_for(100)
    assert needed.needed == needed.target_weights + needed.draft_weights + needed.to_come
    assert memory_needed(decoder, 10_000, 5).length == tiny_models.CONTEXT
    assert memory_needed(decoder, 100, 50).scratch > needed.scratch
    pair = make_pair(Shape(3, 64, 128, 4, 2, 512, 1, 0.0), scale=0.0)
    assert tensor_bytes([pair.draft], without=[pair.target]) < tensor_bytes([pair.draft])  # shared weights
    assert replace(needed, free=needed.to_come).fits
    assert not replace(needed, free=needed.to_come - 1).fits
    assert replace(needed, free=None).fits is None
    monkeypatch.setattr(memory, "_MEMINFO", Path("/nowhere"))
    assert there_is(torch.device("cpu")) == (None, None)


def test_there_is_less_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   600 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "max").write_text("500000\n")
    (tmp_path / "now").write_text("100000\n")
    monkeypatch.setattr(memory, "_CGROUPS", (tuple(str(tmp_path / name) for name in ("max", "now", "stat")),))
    assert there_is(torch.device("cpu")) == (500_000, 400_000)
    # Files that were read are given back: a container that read a checkpoint is not full.
    (tmp_path / "stat").write_text("anon 30000\nfile 70000\ninactive_file 60000\nactive_file 10000\n")
    assert there_is(torch.device("cpu")) == (500_000, 460_000)
    (tmp_path / "stat").write_text("inactive_file 60000\ntotal_inactive_file 65000\n")  # the older interface
    assert there_is(torch.device("cpu")) == (500_000, 465_000)
    (tmp_path / "stat").write_text("inactive_file 900000\n")  # read at another moment
    assert there_is(torch.device("cpu")) == (500_000, 500_000)
    (tmp_path / "stat").write_text("nothing of the kind\n")
    assert there_is(torch.device("cpu")) == (500_000, 400_000)
    (tmp_path / "max").write_text("max\n")
    assert there_is(torch.device("cpu")) == (1_024_000, 614_400)


def test_a_trace_tells_the_same_as_texts_that_are_decoded(decoder: Any, tmp_path: Path) -> None:
    options = {"max_new_tokens": 24, "temperature": 0.7, "seed": 2}
    trace = record(decoder, PROMPTS, depth=6, costs=False, **options)
    assert prompts_of(trace) == PROMPTS
    assert {**options, **sampling_options(trace)} == sampling_options(trace)
    known = Traced(trace, decoder, with_trees=False)
    live = measure_acceptance(decoder, PROMPTS, options, trees=False, tick=nothing)
    cost = RoundCost()
    assert known.works((1, 2, 5), cost) == live.works((1, 2, 5), cost)
    assert known.exact
    assert known.survival(4) == pytest.approx(live.survival(4))
    assert known.num_tokens == live.num_tokens == 48
    report = make_plan(decoder, prompts_of(trace), sampling_options(trace), lengths=(1, 2), known=known,
                       with_trees=False, store=Store(tmp_path))  # fmt: skip
    assert report.source == "a recorded trace"
    trees = Traced(trace, decoder).works((1,), cost)
    assert any(setting.name == "tree 2,2,1" for setting in trees)
    other = specdec.SpeculativeDecoder(decoder.target, drafter=NgramDrafter(), backend="eager")
    with pytest.raises(InputError, match=r"the trace is of another pair.*drafter model, here ngram"):
        Traced(trace, other)


def test_a_trace_of_another_draft_model_is_refused(decoder: Any) -> None:
    trace = record(decoder, PROMPTS, depth=2, costs=False, max_new_tokens=8)
    draft = ModelDrafter(tiny_models.noisy(decoder.target, 0.03), backend="eager")
    other = specdec.SpeculativeDecoder(decoder.target, drafter=draft, backend="eager", prefix_cache=0)
    here = draft_fingerprint(draft)
    with pytest.raises(InputError, match=rf"another pair \(draft {trace.meta['draft']}, here {here}\)"):
        Traced(trace, other)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--temperature", "0"], "--temperature"),  # also where it is the default
        (["--seed", "0", "--limit", "8"], "--limit, --seed"),
        (["--prompts", "built-in", "--max-new-tokens", "64"], "--prompts, --max-new-tokens"),
        (["--stop", "x", "--chat"], "--stop, --chat"),
    ],
)
def test_options_that_a_trace_answers_are_refused(
    given: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--trace", str(tmp_path / "trace.safetensors"), *given]) == 2
    assert f"leave {named} out" in " ".join(capsys.readouterr().err.split())


def test_wrong_input_is_refused_before_work(decoder: Any) -> None:
    for prompts, lengths, message in (([], (1,), "no prompts"), (PROMPTS, (), "no draft length"),
                                      (PROMPTS, (-1,), "whole number >= 1")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make_plan(decoder, prompts, lengths=lengths)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, out = tmp_path / "cache", tmp_path / "plan.json"
    monkeypatch.setattr("specdec.planner.cache.cache_folder", lambda: cache)
    monkeypatch.setattr("specdec.planner.costs._REPETITIONS", 1)
    monkeypatch.setattr("specdec.planner.costs.others_share", lambda *_: 1.5)
    arguments = ["plan", "--limit", "2", "--max-new-tokens", "8", "--k", "1,2,50", "--no-trees", "--json", str(out)]
    assert main([*arguments, "--backend", "eager"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "Verification, ms by rows",
        "k = 50",
        "Memory bandwidth",
        "used 1.5 cores",
        "break-even",
        "speculate",
        "because",
    ):
        assert words in shown
    found = json.loads(out.read_text())
    assert [row["k"] for row in found["rows"]] == [0, 1, 2, 50]
    assert found["verdict"]["speculate"] == (found["verdict"]["sentence"].startswith("speculate with"))
    assert found["memory"]["needed"] > 50_000_000
    assert found["from_cache"] == {"costs": False, "acceptance": False}
    assert len(list((cache / "plans").iterdir())) == 2
    trace = str(tmp_path / "trace.safetensors")
    texts = ["--limit", "1", "--max-new-tokens", "8", "--backend", "eager"]
    assert main(["record", "--out", trace, *texts, "--depth", "2"]) == 0
    assert main(["plan", "--trace", trace, "--k", "1,2", "--no-trees", "--backend", "eager"]) == 0
    assert "8 new tokens" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "--limit", "0"]) == 2
    assert main(["plan", "--trace", str(tmp_path / "none")]) == 2
    assert main(["plan", "--context-length", "0"]) == 2
    assert "--context-length is a whole number >= 1" in capsys.readouterr().err
