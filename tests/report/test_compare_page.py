"""`specdec compare --html`: a comparison is a document of one cell."""

from __future__ import annotations

import json
import re

import pytest

import specdec
from specdec.cli import build_parser, main
from specdec.loading import EMBEDDED
from specdec.policy import Fixed, Throughput
from specdec.report.cells import memory_of, setting_of

needs_pair = pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")


def data(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(found)


@needs_pair
def test_compare_writes_a_page_of_one_cell_with_its_texts(tmp_path, capsys):
    path, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code = main(
        ["compare", "--limit", "2", "--repetitions", "1", "--warmup", "0", "--max-new-tokens", "12", "--k", "3",
         "--backend", "eager", "--html", str(path), "--json", str(numbers)]
    )  # fmt: skip
    assert code == 0
    (cell,) = (document := data(path.read_text(encoding="utf-8")))["cells"]
    written = json.loads(numbers.read_text(encoding="utf-8"))
    assert cell["stats"] == written["stats"]
    assert cell["speedup"] == written["speedup"]
    assert cell["setting"]["k"] == 3
    assert cell["setting"]["policy"] == "fixed"
    assert cell["setting"]["drafter"] == "model"
    assert document["environment"]["parameters"]["target"] == written["parameters"]["target"]
    assert [len(story["tokens"]) for story in cell["story"]] == [12, 12]
    assert [sum(row["rounds"]["emitted"]) >= 12 for row in cell["rows"]] == [True, True]
    assert "|endoftext|" not in cell["story"][0]["prompt"]
    assert "written" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_refused_before_work(tmp_path, capsys):
    assert main(["compare", "--html", str(tmp_path / "nowhere" / "page.html")]) == 2
    assert "--html" in capsys.readouterr().err


@needs_pair
@pytest.mark.parametrize(
    ("given", "policy", "expected"),
    [
        ([], Throughput(), {"k": None, "tree": None, "policy": "throughput"}),
        (["--k", "5"], Fixed(k=5), {"k": 5, "tree": None, "policy": "fixed"}),
        (["--policy", "fixed"], Fixed(k=4), {"k": 4, "tree": None, "policy": "fixed"}),
        (["--tree", "3,1"], Fixed(k=2, branching=(3, 1)),
         {"k": None, "tree": (3, 1), "policy": "fixed"}),
        (["--temperature", "0.7", "--seed", "3", "--drafter-option", "x=1"], Throughput(),
         {"temperature": 0.7, "seed": 3, "drafter_options": {"x": 1}}),
        (["--drafter", "org/model"], Throughput(), {"draft": "org/model", "drafter": "model"}),
    ],
)  # fmt: skip
def test_the_setting_is_what_the_command_line_said(given, policy, expected):
    decoder = specdec.load(drafter="model", policy=policy, backend="eager")
    arguments = build_parser("compare").parse_args(["compare", *given])
    setting = setting_of(arguments, decoder)
    assert {name: getattr(setting, name) for name in expected} == expected


@needs_pair
def test_memory_counts_weights_and_texts():
    decoder = specdec.load(drafter="model", backend="eager")
    short, long = memory_of(decoder, 64), memory_of(decoder, 256)
    assert short["target_weights"] >= 4 * sum(p.numel() for p in decoder.target.parameters())
    assert short["draft_weights"] > 0
    assert long["kv"] > short["kv"] > 0
