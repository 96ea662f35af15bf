"""Artefacts for Qualcomm's HTP: compiled for a chip, run in the emulator, and compared with the eager model.

The model is the embedded draft: two layers, and texts whose margins half precision does not touch. The conformance
suite runs random weights beside this.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec.cli import main
from specdec.errors import InputError, UnsupportedModelError
from specdec.export import htp
from specdec.export.artifact import ArtifactModel, export
from specdec.export.exporter import exporter
from specdec.export.manifest import ArtifactError, Manifest
from specdec.export.qnn import PROGRAM, QnnOptions
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.quant.methods import calibration
from specdec.runtime.backend import Step
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.backends.qnn import QnnBackend

OPTIONS = QnnOptions(prefill_len=16, k=(0, 7), max_seq_len=96, max_nodes=8)
ROUNDED = QnnOptions(prefill_len=1, k=(0, 3), max_seq_len=96, max_nodes=0, recipe="w8a16")
TOKENS = 24
TEXT = (
    "class Node:\n    def __init__(self, value, parent=None):\n        self.value = value\n        self.up = parent\n"
    * 2
)
#: Of the largest logit: what half precision makes of float32 on these weights. Of the norm: what 8 bits do.
HALF, EIGHT = 0.008, 0.12


@cache
def model() -> Any:
    return load_model(EMBEDDED / "draft", device="cpu", dtype="float32")


@cache
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED / "draft")


def prompt() -> list[int]:
    ids: list[int] = tokenizer()("from __future__ import")["input_ids"]
    return ids


@cache
def artifact() -> Path:
    return tiny_artifacts.export(model(), OPTIONS, tokenizer=tokenizer())


@cache
def rounded() -> Path:
    text_BT = calibration.tokens("self", model(), tokenizer(), rows=8, length=64)
    return tiny_artifacts.export(model(), ROUNDED, calibration_BT=text_BT)


@cache
def opened(updater: str | None = None) -> QnnBackend:
    return QnnBackend.open(ArtifactModel.open(artifact()), **({"kv_updater": updater} if updater else {}))


def rows_of(backend: Any, text: list[int], width: int) -> torch.Tensor:
    rows = []
    for start in range(0, len(text), width):
        part = torch.tensor(text[start : start + width])
        block = torch.ones(len(part), len(part), dtype=torch.bool).tril()
        positions = torch.arange(start, start + len(part))
        rows.append(backend.forward(Step(part, start, block, positions, start, len(part))).logits)
    return torch.cat(rows)


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def expected() -> list[int]:
    """Eager's tokens; none of them is in doubt by twice what half precision changes."""
    decoder = specdec.SpeculativeDecoder(model(), backend="eager")
    tokens = decoder.generate_plain(prompt(), max_new_tokens=TOKENS).tokens
    text = [*prompt(), *tokens]
    logits = rows_of(EagerBackend.open(model()), text, len(text))[len(prompt()) - 1 : -1]
    best, second = logits.topk(2).values.unbind(-1)
    assert float((best - second).min()) > 2 * HALF * float(logits.abs().max())
    assert len(set(tokens)) > TOKENS // 4
    return tokens


def test_every_graph_is_on_the_npu_as_a_whole_and_weights_are_stored_once() -> None:
    manifest = Manifest.read(artifact())
    assert {"step_1", "step_8", "prefill_16"} == set(manifest.about["coverage"])
    for name, found in manifest.about["coverage"].items():
        assert (found["delegates"], found["outside"]) == (1, 0), name
        assert found["delegated"] > 50
    assert manifest.about["soc"]["htp_arch"] == htp.SOCS["sm8650"].arch
    half = manifest.about["sizes"]["weight_bytes"] / 2
    embedding = model().get_input_embeddings().weight.numel() * 2  # looked up, and multiplied with
    assert half < manifest.files[PROGRAM]["bytes"] < 1.25 * (half + embedding)  # three graphs would be three times that
    assert manifest.files["weights.bin"]["bytes"] < 1.1 * 2 * (half + embedding)
    assert b"/specdec/export" not in (artifact() / "step_1.onnx").read_bytes()  # nor any path of the tracer


def test_logits_are_those_of_the_model_in_half_precision() -> None:
    text = tokenizer()(TEXT)["input_ids"][:40]
    stock = rows_of(EagerBackend.open(model()), text, 40)
    for width in (8, 16, 3):
        mine = rows_of(opened().fork(0), text, width)
        assert error(mine, stock) < HALF
        assert torch.equal(mine.argmax(-1), stock.argmax(-1))
    assert error(rows_of(opened().fork(0), text[:8], 1), stock[:8]) < HALF


@pytest.mark.parametrize("updater", ["smart-mask", "shift-pointer"])
def test_tokens_are_eagers_plain_and_speculative(updater: str) -> None:
    tokens = expected()
    decoder = specdec.SpeculativeDecoder(model(), drafter=ModelDrafter(model(), backend="eager"), policy=Fixed(7))
    decoder.backend = opened(updater).fork(0)
    out = decoder.generate(prompt(), max_new_tokens=TOKENS)
    assert out.tokens == tokens
    assert out.stats.num_rounds < TOKENS / 4  # its own model drafts: nearly all is accepted
    if updater == "smart-mask":
        assert decoder.generate_plain(prompt(), max_new_tokens=TOKENS).tokens == tokens


def test_trees_and_other_drafters_and_rejections() -> None:
    decoder = specdec.SpeculativeDecoder(model(), drafter=NgramDrafter(), policy=Fixed(3), backend="eager")
    decoder.backend = opened().fork(0)
    ngram = decoder.generate(prompt(), max_new_tokens=TOKENS)
    assert ngram.tokens == expected()
    noisy = tiny_models.noisy(model(), 0.3)
    tree = specdec.SpeculativeDecoder(model(), drafter=ModelDrafter(noisy), policy=Fixed(2, (2, 2)), backend="eager")
    tree.backend = opened().fork(0)
    out = tree.generate(prompt(), max_new_tokens=TOKENS)
    assert out.tokens == expected()
    assert out.stats.draft_acceptance_rate < 1


def test_weights_of_8_bits_round_and_no_more() -> None:
    assert Manifest.read(rounded()).model["stored"]["recipe"] == "w8a16"
    text = tokenizer()(TEXT)["input_ids"][:24]
    stock = rows_of(EagerBackend.open(model()), text, 24)
    backend = QnnBackend.open(ArtifactModel.open(rounded()))
    mine = rows_of(backend.fork(0), text, 4)
    assert HALF < float((mine - stock).norm() / stock.norm()) < EIGHT
    assert float((mine.argmax(-1) == stock.argmax(-1)).float().mean()) > 0.8
    alone = rows_of(backend.fork(0), text[:6], 1)
    assert error(alone, mine[:6]) < EIGHT / 4  # graphs of different widths have the same ranges
    with pytest.raises(InputError, match="calibration text"):
        tiny_artifacts.export(model(), ROUNDED)


def test_a_mask_that_shows_too_much_is_seen() -> None:
    """The comparison above can fail: rows that see what they must not have other logits."""
    text = tokenizer()(TEXT)["input_ids"][:8]
    backend = opened().fork(0)
    right = rows_of(backend, text, 8)
    open_mask = torch.ones(8, 8, dtype=torch.bool)
    wrong = opened().fork(0).forward(Step(torch.tensor(text), 0, open_mask, torch.arange(8), 0, 8)).logits
    assert error(wrong[:-1], right[:-1]) > 10 * HALF


def test_what_cannot_be_on_the_npu_is_refused(tmp_path: Path) -> None:
    """Nothing falls back to the CPU: an operator that the HTP does not have fails the compilation."""
    tiny_artifacts.needs("qnn")
    from onnx import TensorProto, checker, helper, save

    value = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Erf", ["x"], ["y"])], "g", value[:1], value[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(made)
    save(made, tmp_path / "erf.onnx")
    with pytest.raises(UnsupportedModelError, match=r"erf\.onnx does not run on the HTP of sm8650 as a whole"):
        htp.session(tmp_path / "erf.onnx", htp.SOCS["sm8650"])


@pytest.mark.parametrize("name", ["step_1.onnx", "weights.bin", PROGRAM, "device/step_8_ctx.onnx"])
def test_a_tampered_artefact_is_refused(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact(), copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        ArtifactModel.open(copy)


def test_a_graph_of_another_export_is_refused(tmp_path: Path) -> None:
    """Also where the manifest was made to fit it."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact(), copy)
    document = json.loads((copy / "manifest.json").read_text())
    document["options"]["soc"] = "sm8750"
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"options\.soc is 'sm8750' in the manifest and 'sm8650'"):
        QnnBackend.open(ArtifactModel.open(copy))


def test_chips_are_found_by_name() -> None:
    assert QnnOptions(soc="SM8750").soc == "sm8750"
    with pytest.raises(InputError, match=r"no SoC is called 'sm9999' here; there are sm8550 \(Snapdragon 8 Gen 2\)"):
        QnnOptions(soc="sm9999")
    with pytest.raises(InputError, match="the qnn backend knows fp16, w8a16, w4a16"):
        QnnOptions(recipe="int3")
    assert exporter("qnn").needs_text(ROUNDED)
    assert not exporter("qnn").needs_text(OPTIONS)


def test_options_and_updaters_that_there_are_not() -> None:
    opened_model = ArtifactModel.open(artifact())
    with pytest.raises(InputError, match="one of smart-mask, shift-pointer"):
        QnnBackend.open(opened_model, kv_updater="scatter")
    with pytest.raises(InputError, match="takes kv_updater only"):
        QnnBackend.open(opened_model, threads=2)


def test_the_command_line_refuses_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--backend", "qnn", "--soc", "sm1"]) != 0
    assert "sm8650" in capsys.readouterr().err
    assert main(["export", "--backend", "executorch", "--soc", "sm8650"]) != 0
    assert "'soc'" in capsys.readouterr().err
    assert (
        main(["generate", "import os", "--artifact", str(artifact()), "--max-new-tokens", "4", "--drafter", "ngram"])
        == 0
    )


def test_without_the_extra_the_message_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'specdec\[qnn\]'"):
        export(model(), OPTIONS)
