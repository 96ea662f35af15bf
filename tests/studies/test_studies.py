"""Studies: configurations parse, scripts import, and what they count is what they say."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from specdec.generation import Generation
from specdec.quant.methods import prepare_model
from specdec.trace import Round, Trace

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "studies"
CONFIGURATIONS = sorted(FOLDER.glob("*.toml"))
SCRIPTS = ("study", "weights", "length", "int8", "sizes")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules by name; their folder is on the path for as long as the test runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = dict(sys.modules)
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]


def llama(seed):
    return tiny_models.tiny("llama", dtype=torch.float32, seed=seed)


def text_of(tokens, accepted=(), prompt=(1, 2)):
    trace = Trace()
    trace.rounds = [Round(num_nodes=4, num_accepted=n, num_evaluated=n, num_emitted=n + 1) for n in accepted]
    return Generation(list(prompt), list(tokens), "", "length", [], None, trace)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_parse(path):
    config = pytest.importorskip("specdec.sweep.config")
    settings = config.read_configuration(path).settings
    assert len(settings) > 1
    assert len({setting.key for setting in settings}) == len(settings)


def test_a_configuration_says_every_thing_once():
    """The rules of trees and of temperatures are those that the studies are about."""
    config = pytest.importorskip("specdec.sweep.config")
    trees = config.read_configuration(FOLDER / "trees.toml").settings
    assert {s.verifier for s in trees} == {"coupled", "recursive", "traversal", "greedy-multi"}
    assert {s.tree for s in trees if s.tree is not None} >= {(2, 2, 1), (4, 2, 1)}
    by_rule = config.read_configuration(FOLDER / "temperature.toml").settings
    assert {s.verifier for s in by_rule} == {"coupled", "ratio", "block", "match"}
    assert {s.k for s in by_rule} == {4}


def test_every_study_is_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in (*CONFIGURATIONS, *(FOLDER / f"{name}.py" for name in SCRIPTS if name != "study")):
        assert path.name in table, f"{path.name} is missing from the table of studies"


def test_an_interval_is_a_ratio_of_sums(scripts):
    interval = scripts["study"].interval
    found = interval([(10.0, 5.0), (3.0, 1.0)])
    assert found["mean"] == pytest.approx(13 / 6)
    assert 2.0 <= found["low"] <= found["mean"] <= found["high"] <= 3.0
    one = interval([(4.0, 2.0)] * 3)
    assert one["low"] == one["high"] == 2.0


def test_acceptance_pools_texts_and_their_rounds(scripts):
    found = scripts["study"].acceptance([text_of(range(5), [3, 0]), text_of(range(2), [1])])
    assert found["tokens_per_round"]["mean"] == pytest.approx((4 + 1 + 2) / 3)
    assert found["draft_acceptance_rate"] == pytest.approx(4 / 12)


@pytest.mark.parametrize(
    ("a", "b", "at"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0)]
)
def test_first_difference(scripts, a, b, at):
    assert scripts["study"].first_difference(a, b) == at


def test_rounds_count_where_they_begin(scripts):
    length = scripts["length"]
    made = text_of(range(length.BIN + 4), [length.BIN - 2, 3, 0])
    first, second = length.binned([made], 2)
    assert first == [(length.BIN - 1 + 4, 2)]  # the second round begins at the bin's last token
    assert second == [(1, 1)]


def test_repeated_ngrams_are_told_from_new_ones(scripts):
    length = scripts["length"]
    new, old = list(range(100, 100 + length.BIN)), list(range(100, 100 + length.BIN))
    shares = length.repeated([text_of(new + old)], 2)
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx((length.BIN - 3) / length.BIN)


def test_overlap_is_one_with_oneself_and_less_with_another(scripts):
    target, other = llama(0), llama(1)
    texts = [text_of([5, 6, 7, 8]), text_of([9])]
    overlap = scripts["weights"].overlap
    for greedy in (True, False):
        assert overlap(target, target, texts, greedy) == [pytest.approx((4.0, 4)), pytest.approx((1.0, 1))]
    (less, count), _ = overlap(target, other, texts, False)
    assert count == 4
    assert less < 3.99


def test_a_change_is_paired(scripts):
    """Prompts differ much more than the two sides do: the interval is that of the difference."""
    change = scripts["study"].change
    found = change([(1.0, 10), (9.0, 10)], [(2.0, 10), (10.0, 10)])
    assert found == {"mean": pytest.approx(-0.1), "low": pytest.approx(-0.1), "high": pytest.approx(-0.1)}
    with pytest.raises(AssertionError):
        change([(1.0, 10)], [(1.0, 9)])


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp8_e4m3"])
def test_dense_weights_are_the_stored_ones(scripts, format):
    """int8 rounds the inputs of products too, and stays packed for that."""
    model = tiny_models.tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=64)
    packed = prepare_model(model, {"default": format, "fallback": "keep"})
    made = scripts["weights"].dense(packed)
    row = torch.tensor([[1, 2, 3, 4]])
    a, b, full = (one(input_ids=row).logits for one in (packed, made, model))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, b, rtol=1e-4, atol=1e-4)


def test_rows_are_measured_once_and_only_for_their_settings(scripts, tmp_path):
    rows, calls = scripts["study"].Rows, []

    def measure(value):
        calls.append(value)
        return {"value": value}

    args = argparse.Namespace(out=tmp_path, limit=2, max_new_tokens=8)
    assert rows(args, "x").get("a", measure, 1)["value"] == 1
    assert rows(args, "x").get("a", measure, 2)["value"] == 1
    assert rows(args, "x").get("b", measure, 3)["value"] == 3
    other = argparse.Namespace(out=tmp_path, limit=3, max_new_tokens=8)
    assert rows(other, "x").get("a", measure, 4)["value"] == 4
    assert calls == [1, 3, 4]


def test_a_page_keeps_what_was_written_by_hand(scripts, tmp_path):
    args = argparse.Namespace(out=tmp_path)
    publish = scripts["study"].publish
    publish(args, "x", "Title", "| a |\n")
    page = tmp_path / "x.md"
    page.write_text(page.read_text("utf-8").replace("Not written yet.", "It means much."), "utf-8")
    publish(args, "x", "Title", "| b |\n")
    text = page.read_text("utf-8")
    assert text.endswith("It means much.\n")
    assert "| b |" in text
    assert "| a |" not in text


def test_bytes_of_a_recipe_are_those_of_its_layers(scripts):
    int8 = scripts["int8"]
    both = {name: int8.sizes("7B", int8.llama_7b(), recipe) for name, recipe in int8.RECIPES.items()}
    assert both["all linear layers"]["before"] == 2 * 6_738_415_616
    assert 1.9 < both["attention and MLP"]["ratio"] < both["all linear layers"]["ratio"] < 2.0


def test_rounding_changes_logits_and_no_rounding_none(scripts):
    model = llama(0)
    judge = scripts["int8"].judge
    same = judge(model, model, [1, 2, 3], [4, 5, 6])
    assert len(same) == 3
    assert not any(position.differs or position.change for position in same)
    assert all(position.change > 0 for position in judge(model, llama(1), [1, 2, 3], [4, 5, 6]))


def test_margins_fall_into_their_bins(scripts):
    int8 = scripts["int8"]
    positions = [int8.Position(margin, 0.1, differs) for margin, differs in ((0.005, True), (0.2, False), (9.0, False))]
    found = int8.by_margin(positions)
    assert sum(row["positions"] for row in found) == 3
    assert (found[0]["positions"], found[0]["differ"]) == (1, 1)
    assert (found[-1]["positions"], found[-1]["to"]) == (1, None)


def test_a_cut_draft_is_the_targets_beginning(scripts):
    target = llama(0)
    draft = scripts["sizes"].cut(target, 1)
    assert len(draft.model.layers) == 1
    assert draft.lm_head.weight.data_ptr() == target.lm_head.weight.data_ptr()
    row = torch.tensor([[1, 2, 3]])
    assert torch.isfinite(draft(input_ids=row).logits).all()
    assert scripts["sizes"].read_per_token(draft) < scripts["sizes"].read_per_token(target)
