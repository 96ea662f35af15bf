"""The report of a quantised model against sums done by hand, and against the model itself."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from tiny_models import tiny

from specdec.cli.quant_report import table
from specdec.quant.methods import prepare_model
from specdec.quant.report import BY_RECIPE, EMBEDDING, OTHER, VECTOR, Kept, Layer, Report, grouped


@pytest.fixture
def report():
    return Report(
        (
            Layer("layers.0.up", (8, 64), "int4", 1024, 288),
            Layer("layers.1.up", (8, 64), "int4", 1024, 288),
            Layer("layers.2.up", (8, 64), "int8", 1024, 544),
            Layer("head", (16, 64), "int8", 0, 1088),
        ),
        (Kept("table.weight", (16, 64), 2048, EMBEDDING), Kept("norm.weight", (64,), 128, VECTOR)),
        weight_bytes=2,
    )


def test_sums(report):
    linear, kept = 288 + 288 + 544 + 1088, 2048 + 128
    assert report.before == 3 * 1024 + kept
    assert report.after == linear + kept
    assert report.ratio == report.before / report.after
    # Products read the head's weights although no file held them apart.
    assert report.linear_ratio == (3 * 1024 + 2048) / linear
    assert report.bits == 8 * linear / (3 * 512 + 1024)
    assert [layer.bits for layer in report.layers] == [4.5, 4.5, 8.5, 8.5]
    assert report.kept_bytes() == {EMBEDDING: 2048, VECTOR: 128}


def test_json_has_every_layer_and_the_totals(report):
    content = json.loads(json.dumps(report.to_dict()))
    assert content["layers"][2] == {
        "module": "layers.2.up",
        "shape": [8, 64],
        "format": "int8",
        "before": 1024,
        "after": 544,
        "bits": 8.5,
    }
    assert content["kept"][0] == {"name": "table.weight", "shape": [16, 64], "num_bytes": 2048, "why": EMBEDDING}
    assert content["bytes_after"] == report.after
    assert content["bits_per_weight"] == report.bits


def test_layers_that_differ_by_number_share_a_line(report):
    names = [(name, len(layers)) for name, layers in grouped(report.layers)]
    assert names == [("layers.*.up", 2), ("layers.2.up", 1), ("head", 1)]


def shown(report, every=False):
    console = Console(file=io.StringIO(), width=100)
    console.print(table(report, every))
    return console.file.getvalue().splitlines()


def test_table(report):
    lines = shown(report)
    wanted = [
        "layers.*.up ×2 8×64 int4 4.5 2 KiB 576 B 3.56",
        "layers.2.up 8×64 int8 8.5 1 KiB 544 B 1.88",
        "head 16×64 int8 8.5 tied 1.06 KiB",
        "all of these ×4 6.9 5 KiB 2.16 KiB 2.32",
        "left out: embeddings 2 KiB 2 KiB",
        "the whole model 5.12 KiB 4.28 KiB 1.20",
    ]
    flat = [" ".join(line.split()) for line in lines]
    assert [line for line in wanted if line not in flat] == []
    assert len({line.rindex(" ") for line in lines if line.endswith(("3.56", "1.88", "2.32", "1.20"))}) == 1
    assert len(shown(report, every=True)) == len(lines) + 1


def test_of_a_model_in_memory():
    import torch

    model = tiny("llama-tied", dtype=torch.bfloat16, hidden_size=32, intermediate_size=64, head_dim=8)
    rules = [["layers.0.*q_proj", None], ["down_proj", "mxfp4"]]
    found = Report.of_model(prepare_model(model, {"default": "int8", "rules": rules, "head": None}))
    by_name = {layer.module: layer for layer in found.layers}
    assert by_name["model.layers.1.mlp.down_proj"] == Layer(
        "model.layers.1.mlp.down_proj", (32, 64), "mxfp4", 4096, 1088
    )
    assert len(by_name) == 13
    q_proj = 32 * 32 * 2
    norms = 5 * 32 * 2
    assert found.kept_bytes() == {EMBEDDING: 64 * 32 * 2, BY_RECIPE: q_proj, VECTOR: norms}
    assert found.weight_bytes == 2


def test_weights_that_belong_to_no_linear_layer_are_named_so():
    model = tiny("mixtral", hidden_size=32, intermediate_size=32)
    found = Report.of_model(prepare_model(model, "mxint8"))
    assert any(one.why == OTHER and "experts" in one.name for one in found.kept)
