"""`specdec bench` from the command line, on the tiny pair."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from specdec.bench.benchmark import make_prompts
from specdec.bench.targets import NOT_MEASURED, TARGETS
from specdec.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--prompts", "2", "--prompt-tokens", "12", "--max-new-tokens", "10", "--repetitions", "1", "--retries", "0"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One run: its screen and its file."""
    from contextlib import redirect_stdout
    from io import StringIO

    path, screen = tmp_path_factory.mktemp("bench") / "bench.json", StringIO()
    words = ["bench", "--preset", "tiny", "--backend", "eager", "--drafters", "model,ngram", "--k", "2,3", "--profile"]
    # transformers' compiled row runs its Python: compiling is what takes time here, and is not what is tested.
    with redirect_stdout(screen), torch.compiler.set_stance("force_eager"):
        code = main([*words, *SMALL, "--threads", "1", "--device", "cpu", "--json", str(path)])
    assert code == 0
    return screen.getvalue(), json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_there_and_measured(outcome):
    _, report = outcome
    names = [row["name"] for row in report["rows"]]
    ours = ["eager plain", *(f"eager {d} {k}" for d in ("model", "ngram") for k in ("policy", "k=2", "k=3"))]
    theirs = ["hf", "hf-static", "hf-assisted", "hf-assisted-k2", "hf-assisted-k3"]
    assert [name for name in names if "batch" not in name] == [*ours, *theirs]
    for row in report["rows"]:
        took = row["ms_per_token"]
        assert 0 < took["low"] <= took["median"] <= took["high"]
        assert [len(group) for group in row["raw_ms_per_token"]] == [1, 1]
        assert row["slices"] == 2


def test_texts_are_those_of_plain_decoding(outcome):
    _, report = outcome
    # In float32, on one thread, on a pair without near ties: everyone's text is the same.
    assert all(row["plain_identical"] == row["same_as_ours"] == 2 for row in report["rows"])


def test_acceptance_is_in_tokens_per_target_step(outcome):
    _, report = outcome
    steps = {row["name"]: row["tokens_per_step"] for row in report["rows"]}
    assert steps["eager plain"] == 1.0
    assert 1 < steps["eager model k=2"] <= 3
    assert 1 < steps["hf-assisted-k2"] <= 3
    assert 0 < report["agreement"] <= 1


def test_limits_are_measured(outcome):
    _, report = outcome
    bare, machine = report["bare"]["eager"], report["machine"]
    assert {"1", "3", "4", "8"} <= set(bare["target_ms"])
    assert bare["verify8_over_decode1"] > 0
    assert bare["draft_ms"] > 0
    reached = machine["bytes_per_token"] / (machine["step_ms"] / 1e3)
    assert machine["share_of_best"] == pytest.approx(reached / machine["read_bytes_per_second"])
    assert machine["share"] > 0
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["eager model k=2"]["ideal"]["efficiency"] > 0
    assert rows["eager model k=2"]["ideal"]["ideal_speedup"] > 0
    assert rows["hf"]["ideal"] is None


def test_the_profile_tells_where_a_round_goes(outcome):
    screen, report = outcome
    plain, drafting = report["profile"]
    assert plain["row"] == "eager plain"
    assert drafting["row"].startswith("eager model")
    verify = next(stage for stage in plain["stages"] if stage["stage"] == "verify")
    assert verify["ms_per_round"] > 0
    assert verify["bare_ms_per_round"] == pytest.approx(report["bare"]["eager"]["target_ms"]["1"])
    assert any("linear" in line["function"] for line in plain["functions"])
    assert "Profile: eager plain" in screen


def test_targets_of_other_runs_are_not_measured(outcome):
    _, report = outcome
    assert [line["target"] for line in report["targets"]] == [target.name for target in TARGETS]
    assert {line["verdict"] for line in report["targets"]} == {NOT_MEASURED}


def test_the_last_line_is_the_report_without_single_measurements(outcome):
    screen, report = outcome
    line = json.loads(screen.strip().splitlines()[-1])
    assert set(line) == set(report)
    assert "raw_ms_per_token" not in line["rows"][0]
    assert [row["name"] for row in line["rows"]] == [row["name"] for row in report["rows"]]


def test_a_backend_that_is_not_installed_is_reported(capsys, tmp_path):
    words = ["bench", "--preset", "tiny", "--backend", "warp", "--no-transformers", *SMALL]
    assert main(words) == 2
    assert "none of the backends warp can be used: no backend is called 'warp' here" in capsys.readouterr().err


def test_a_backend_that_does_not_run_the_model_leaves_the_rest_of_the_table(monkeypatch):
    from specdec.bench.rows import split_backends
    from specdec.bench.synthetic import make_pair
    from specdec.errors import UnsupportedModelError
    from specdec.runtime.backends.eager import EagerBackend

    class Refuses(EagerBackend):
        @classmethod
        def open(cls, model, **options):
            raise UnsupportedModelError("no such kernels")

    kinds = {"eager": EagerBackend, "compiled": Refuses}
    monkeypatch.setattr("specdec.registry.available", lambda kind: kinds)
    target = make_pair("tiny").target
    made, absent = split_backends(("eager", "compiled", "warp"), lambda name: kinds[name].open(target))
    assert list(made) == ["eager"]
    assert isinstance(made["eager"], EagerBackend)
    assert [(row.name, row.reason) for row in absent] == [
        ("specdec compiled", "no such kernels"),
        ("specdec warp", "no backend is called 'warp' here"),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peer", "vllm"], "there are openvino and llama.cpp"),
        (["--preset", "embedded", "--peer", "openvino"], "use --preset 134m"),
        (
            ["--preset", "tiny", "--peer", "openvino", "--quantize", "int4"],
            "round target and draft alike, to int8 or int4",
        ),
        (["--target", "x", "--preset", "tiny"], "one or the other"),
        (["--drafter", "x"], "the draft of --target"),
        (["--preset", "embedded", "--agreement", "0.5"], "what its training gave"),
        (["--preset", "tiny", "--k", "0"], "k is the number of drafted tokens"),
        (["--preset", "tiny", "--repetitions", "0"], "repetitions is a whole number >= 1"),
        (["--preset", "tiny", "--prompts", "0"], "--prompts is a whole number >= 1"),
        (["--preset", "tiny", "--dtype", "int8"], "--dtype int8: weights are floating-point"),
        (["--preset", "tiny", "--dtype", "bfloat"], "no dtype is called 'bfloat'"),
        (["--preset", "tiny", "--agreement", "2"], "between 0 and 1"),
        (["--preset", "tiny", "--drafters", "modle"], "did you mean 'model'"),
    ],
)
def test_wrong_input_is_refused_before_the_work(words, message, capsys):
    assert main(["bench", *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_prompts_of_a_loaded_model_are_cut_to_one_length():
    class Words:
        def __call__(self, text):
            return {"input_ids": [len(word) for word in text.split()]}

    texts = ["a bb ccc dddd", "a bb", "a bb ccc", ""]
    assert make_prompts(texts, Words(), 2, 3) == [[1, 2, 3], [1, 2, 3]]
    assert make_prompts(texts, Words(), 4, 3) == [[1, 2, 3], [1, 2, 3], [1, 2]]


def test_the_experiment_writes_its_table(outcome, tmp_path):
    place = importlib.util.spec_from_file_location("runtime_run", ROOT / "experiments" / "runtime" / "run.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    _, report = outcome
    text = module.write_results(tmp_path, {"tiny": report}, "python run.py").read_text(encoding="utf-8")
    assert f"# The fast runtime, {report['date']}" in text
    for row in report["rows"]:
        assert f"| {row['name']} | {row['ms_per_token']['median']:.2f} (" in text
    assert "| verify 8 ÷ decode 1, bf16 | ≤ 1.25 |  | not measured | 134m, bf16 |" in text


def test_models_stay_as_they_were():
    """Neither transformers' compiled step nor its settings stay behind on the user's model."""
    from specdec.api import SpeculativeDecoder
    from specdec.bench.rows import transformers_rows
    from specdec.bench.synthetic import make_pair

    pair = make_pair("tiny")
    before = set(vars(pair.target)), pair.target.generation_config.to_dict()
    decoder = SpeculativeDecoder(pair.target, drafter="none", backend="eager")
    with torch.compiler.set_stance("force_eager"):
        for method in transformers_rows(decoder, pair.draft, [2], {"max_new_tokens": 3}):
            assert len(method.run([300, 301, 302]).tokens) == 3
    assert (set(vars(pair.target)), pair.target.generation_config.to_dict()) == before
    assert not pair.target._forward_hooks
