"""Records in vLLM's shape: its names, its definitions, from generations and from documents alike."""

from __future__ import annotations

import json

import pytest
import sweep_documents
from drift_documents import cell, document

import specdec
from specdec.errors import InputError
from specdec.loading import EMBEDDED
from specdec.report import requests
from specdec.sweep.setting import Setting

# docs.vllm.ai, "Per-Request Acceptance Metrics", level `detailed`.
FIELDS = {
    "mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram", "num_spec_steps",
    "num_accepted_draft_tokens", "num_draft_tokens", "num_spec_tokens", "per_step_accepted", "per_step_drafted",
}  # fmt: skip


def test_the_published_example_comes_out():
    """43 steps of three drafted tokens: 39 accepted none, one accepted one, three accepted three."""
    found = requests.metrics([0] * 39 + [1] + [3] * 3, [3] * 43, 3)
    assert set(found) == FIELDS
    assert found["mean_acceptance_length"] == 1.2325581395348837
    assert found["draft_acceptance_rate"] == 0.07751937984496124
    assert found["acceptance_histogram"] == [39, 1, 0, 3]
    counts = [found[name] for name in ("num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens")]
    assert counts == [43, 10, 129]


def test_rounds_without_a_draft_are_no_steps():
    found = requests.metrics([2, 0, 1, 0], [2, 0, 4, 0], 4)
    assert found["per_step_drafted"] == [2, 4]
    assert found["num_spec_steps"] == sum(found["acceptance_histogram"]) == 2
    assert found["mean_acceptance_length"] == 2.5


def test_a_text_without_drafts_has_an_empty_histogram():
    found = requests.metrics([0, 0], [0, 0], 3)
    assert found["acceptance_histogram"] == [0, 0, 0, 0]
    assert found["mean_acceptance_length"] == 1.0
    assert found["draft_acceptance_rate"] == 0.0


def test_every_prompt_of_every_finished_cell_has_a_record(tmp_path):
    made = sweep_documents.document(6, num_failed=1)
    path = tmp_path / "r.jsonl"
    assert requests.write(requests.of_document(made), path) == 15
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, row = records[0], made["cells"][0]["rows"][0]
    assert first["id"] == row["id"]
    assert first["usage"] == {"prompt_tokens": 10, "completion_tokens": 64, "total_tokens": 74}
    found = first["metrics"]["speculative_decoding"]
    assert found["mean_acceptance_length"] == pytest.approx(row["mean_acceptance_length"])
    assert found["num_spec_tokens"] == made["cells"][0]["setting"]["k"]
    assert len(found["acceptance_histogram"]) == found["num_spec_tokens"] + 1
    assert first["specdec"]["setting"] == made["cells"][0]["setting"]


@pytest.mark.parametrize(
    ("fields", "longest"),
    [({"k": 4}, 4), ({"k": None, "tree": (3, 2)}, 2), ({"k": None, "policy": "throughput"}, 4),
     ({"k": None, "policy": "adaptive-tree"}, 3)],
)  # fmt: skip
def test_the_longest_draft_is_the_settings_or_what_the_policy_reached(fields, longest):
    made = cell([0.5], seed=1, k=4)
    made["setting"] = Setting(**fields).as_dict()
    made["rows"][0]["rounds"] = {"nodes": [4, 4], "accepted": [1, 2], "evaluated": [2, 3], "emitted": [2, 3]}
    found = next(requests.of_document(document(made)))["metrics"]["speculative_decoding"]
    assert found["num_spec_tokens"] == longest
    assert len(found["acceptance_histogram"]) == longest + 1


def test_rows_without_rounds_are_refused():
    made = sweep_documents.document(1)
    del made["cells"][0]["rows"][0]["rounds"]
    with pytest.raises(InputError, match="does not list its rounds"):
        list(requests.of_document(made))


@pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")
def test_a_generation_has_the_same_record():
    decoder = specdec.load(drafter="ngram", policy="fixed", backend="eager", dtype="float32")
    out = decoder.generate("x = [0, 0, 0, 0, 0,", max_new_tokens=24)
    record = requests.of_generation(out, "one")
    found, stats = record["metrics"]["speculative_decoding"], out.stats
    assert set(found) == FIELDS
    assert found["num_accepted_draft_tokens"] == stats.num_accepted_draft_tokens > 0
    assert found["num_draft_tokens"] == stats.num_draft_tokens
    assert record["usage"]["completion_tokens"] == 24
    assert record["finish_reason"] == "length"
    plain = requests.of_generation(decoder.generate_plain("x = ", max_new_tokens=4))
    assert plain["metrics"]["speculative_decoding"]["num_spec_steps"] == 0
