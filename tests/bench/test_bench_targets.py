"""The table of targets: met, not met, not measured."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.bench import targets
from specdec.bench.targets import MET, NOT_MEASURED, NOT_MET


def row(name: str, engine: str, mode: str, speed: float, **fields: Any) -> dict[str, Any]:
    """A row that is `speed` times as fast as our plain loop at 10 ms/token."""
    return {
        "name": name,
        "engine": engine,
        "mode": mode,
        "backend": None,
        "drafter": "model" if mode == "speculative" else None,
        "ms_per_token": {"median": 10 / speed},
        "over_our_plain": {"median": speed},
        "over_own_plain": {"median": speed},
        "ideal": None,
        **fields,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    ideal = {"efficiency": 0.95, "of_ideal": 0.9, "overhead_us": 50.0}
    return {
        "preset": "134m",
        "dtype": "bfloat16",
        "device_type": "cpu",
        "rows": [
            row("compiled plain", "specdec", "plain", 1.0, backend="compiled"),
            row("compiled model k=3", "specdec", "speculative", 1.4, backend="compiled", ideal=ideal),
            row("compiled ngram k=3", "specdec", "speculative", 9.0, backend="compiled", drafter="ngram"),
            row("compiled plain batch 8", "specdec", "batch", 3.0, backend="compiled"),
            row("hf", "transformers", "plain", 0.6),
            row("hf-assisted", "transformers", "speculative", 0.7),
            row("hf-assisted-k3", "transformers", "speculative", 0.9),
            row("llama.cpp", "llama.cpp", "plain", 1.5),
            row("llama.cpp-draft-k3", "llama.cpp", "speculative", 1.2),
        ],
        "bare": {"compiled": {"verify8_over_decode1": 1.25, "target_ms": {"1": 8.0, "8": 10.0}}},
        "machine": {"share": 0.41, "backend": "compiled"},
    }


def verdicts(*reports: dict[str, Any]) -> dict[str, targets.Judged]:
    return {line.target: line for line in targets.judge(reports)}


def test_met_and_not_met(report):
    found = verdicts(report)
    generate = found["over transformers generate"]
    assert (generate.verdict, generate.needs) == (MET, "≥ 2")
    assert generate.value == pytest.approx(1.4 / 0.6)
    assisted = found["over transformers assisted at its best"]
    assert assisted.verdict == NOT_MET
    assert assisted.value == pytest.approx(1.4 / 0.9)  # the best of its rows, not the default one
    assert "hf-assisted-k3" in assisted.of
    assert found["over our plain compiled loop"].verdict == MET
    assert found["… share of that pair's ideal"].verdict == NOT_MET
    assert found["efficiency, 134m"].verdict == MET
    assert found["share of read bandwidth, plain step"].verdict == NOT_MET
    assert found["batch 8 over batch 1, tokens/s, plain"].verdict == NOT_MET


def test_llama_cpp_is_taken_at_its_best_and_so_are_we(report):
    line = verdicts(report)["over llama.cpp at its best, bf16"]
    assert line.of == "compiled ngram k=3 against llama.cpp"
    assert line.value == pytest.approx(9.0 / 1.5)


def test_a_bound_from_above_is_met_at_the_bound(report):
    assert verdicts(report)["verify 8 ÷ decode 1, bf16"].verdict == MET
    report["bare"]["compiled"]["verify8_over_decode1"] = 1.26
    assert verdicts(report)["verify 8 ÷ decode 1, bf16"].verdict == NOT_MET


def test_what_this_run_cannot_tell_is_not_measured(report):
    found = verdicts(report)
    for name in ("over OpenVINO with draft model, bf16", "verify 8 ÷ decode 1, fp32", "efficiency, embedded pair"):
        assert (found[name].verdict, found[name].value) == (NOT_MEASURED, None)
    assert found["over OpenVINO with draft model, bf16"].of == "134m, bf16, openvino"
    report["preset"] = "tiny"
    assert {line.verdict for line in verdicts(report).values()} == {NOT_MEASURED}


def test_several_runs_fill_the_table_together(report):
    exact = {**report, "dtype": "float32"}
    found = verdicts(report, exact)
    assert found["verify 8 ÷ decode 1, bf16"].verdict == found["verify 8 ÷ decode 1, fp32"].verdict == MET
    assert found["over transformers generate"].verdict == MET


def test_a_draft_in_fewer_bits_is_judged_by_itself(report):
    """Its pair is another one: it does not stand for the pair that other engines run."""
    own, int8 = "over our plain compiled loop", "over our plain loop, draft in int8"
    assert verdicts(report)[int8].verdict == NOT_MEASURED
    stored = {**report, "stored_as": {"target": None, "draft": "int8"}}
    assert verdicts(stored)[int8].verdict == MET
    assert verdicts(stored)[own].verdict == NOT_MEASURED
    assert verdicts(stored)["over transformers generate"].verdict == NOT_MEASURED
    both = verdicts(stored, report)
    assert (both[own].verdict, both[int8].verdict) == (MET, MET)
    assert verdicts({**report, "stored_as": {"target": "int8", "draft": "int8"}})[int8].verdict == NOT_MEASURED
