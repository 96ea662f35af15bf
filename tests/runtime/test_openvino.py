"""Artefacts of OpenVINO: at any width and at fixed ones, with rounded weights, and refused where they do not fit."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
from specdec.drafters import MedusaDrafter, ModelDrafter
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec import cli
from specdec.errors import InputError, UnsupportedModelError
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError, sha256_of
from specdec.export.openvino import OpenvinoOptions
from specdec.formats.medusa_heads import HeadShape, MedusaHeads
from specdec.policy import Fixed
from specdec.runtime.artifacts import check_artifact
from specdec.runtime.backends.openvino import OpenvinoBackend, choose_device
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
SMALL = tiny_artifacts.OF_OTHERS["openvino"]


@pytest.fixture(scope="module")
def artifact() -> ArtifactModel:
    return ArtifactModel.open(tiny_artifacts.exported("openvino"))


@pytest.fixture(scope="module", params=[False, True], ids=["any-width", "fixed-widths"])
def backend(request: pytest.FixtureRequest, artifact: ArtifactModel) -> OpenvinoBackend:
    """On one graph for all widths, and on one each, as an NPU has them."""
    return OpenvinoBackend.open(artifact, fixed_shapes=request.param)


def decoder(backend: Any, **options: Any) -> specdec.SpeculativeDecoder:
    draft = ModelDrafter(tiny_models.noisy(tiny_artifacts.model(), 0.02), backend="eager")
    made = specdec.SpeculativeDecoder(tiny_artifacts.model(), drafter=draft, backend="eager", **options)
    made.backend = backend
    return made


def expected(prompt: list[int], count: int, **options: Any) -> list[int]:
    return tiny_models.reference(tiny_artifacts.model(), prompt, count, **options)


def test_plain_and_speculative_texts_are_those_of_the_model(backend: OpenvinoBackend) -> None:
    for policy in (Fixed(3), Fixed(3, (3, 2))):
        made = decoder(backend, policy=policy)
        for options in ({}, {"temperature": 0.7, "top_k": 8, "repetition_penalty": 1.2, "seed": 5}):
            text = expected(PROMPT, 40, **options)
            assert made.generate_plain(PROMPT, max_new_tokens=40, **options).tokens == text
            out = made.generate(PROMPT, max_new_tokens=40, strict=True, **options)
            assert out.tokens == text
            assert 0.05 < out.stats.draft_acceptance_rate < 1


def test_exact_decoding_and_batches(backend: OpenvinoBackend) -> None:
    prompts = [[3, 5, 7], [8, 9], [1, 2, 3, 4, 5]]
    made = decoder(backend, policy=Fixed(3))
    texts = [out.tokens for out in made.generate(prompts, max_new_tokens=10, strict=True)]
    assert texts == [expected(prompt, 10) for prompt in prompts]
    assert made.generate(PROMPT, max_new_tokens=24, exact=True).tokens == expected(PROMPT, 24)


def test_a_text_moves_between_graphs_of_fixed_width_with_what_it_has_written(artifact: ArtifactModel) -> None:
    opened = OpenvinoBackend.open(artifact, fixed_shapes=True)
    session = Session(opened.fork(0))
    session.append(PROMPT)
    session.forward(TokenTree.chain([9, 8, 7]))
    session.commit([0, 1], [9, 8, 6])
    twin = session.fork()
    for each, token in ((session, 11), (twin, 12), (session, 13)):
        each.append([token])
        right = tiny_models.cache_free(tiny_artifacts.model(), list(each.tokens))
        torch.testing.assert_close(each.forward().logits[-1], right, rtol=1e-4, atol=1e-4)
    state = session.backend.state
    assert set(state.requests) == {1, 4, 8}
    assert state.latest is state.requests[1]
    assert set(twin.backend.state.requests) == {4}  # began where the other was


def test_an_artifact_drafts_for_a_model_in_torch_and_torch_for_it(artifact: ArtifactModel) -> None:
    target = tiny_models.noisy(tiny_artifacts.model(), 0.02)
    out = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(artifact), policy=Fixed(3)).generate(
        PROMPT, max_new_tokens=30
    )
    assert out.tokens == tiny_models.reference(target, PROMPT, 30)
    assert out.stats.num_accepted_draft_tokens > 0


def test_hidden_states_feed_a_drafter(artifact: ArtifactModel) -> None:
    heads = tiny_models.randomize(MedusaHeads(HeadShape(3, 1, 16, TEXT_VOCAB, TEXT_VOCAB, "tied")), 0.03, 0)
    made = specdec.SpeculativeDecoder(artifact, drafter=MedusaDrafter(artifact, heads), policy=Fixed(3, (3, 2)))
    out = made.generate(PROMPT, max_new_tokens=20, strict=True)
    assert out.tokens == expected(PROMPT, 20)
    assert out.stats.num_draft_tokens > 20


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
def test_rounded_weights_keep_plain_and_speculative_alike(recipe: str) -> None:
    options = OpenvinoOptions(**{**vars(SMALL), "hidden": (), "recipe": recipe})
    rounded = ArtifactModel.open(tiny_artifacts.export(tiny_artifacts.model(), options))
    made = specdec.SpeculativeDecoder(
        rounded,
        drafter=ModelDrafter(tiny_models.noisy(tiny_artifacts.model(), 0.02), backend="eager"),
        policy=Fixed(3, (3, 2)),
    )
    assert f"{recipe} weights" in made.backend.describes
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        text = made.generate_plain(PROMPT, max_new_tokens=40, **settings).tokens
        assert made.generate(PROMPT, max_new_tokens=40, strict=True, **settings).tokens == text
    exact = tiny_models.cache_free(tiny_artifacts.model(), PROMPT)
    session = Session(made.backend.fork(0))
    session.append(PROMPT)
    apart = float((session.forward().logits[-1] - exact).abs().max() / exact.abs().max())
    assert 1e-6 < apart < {"fp16": 1e-2, "int8": 0.1, "int4": 1.0}[recipe]  # rounded, and no more than that
    program = rounded.manifest.files["model.bin"]["bytes"]
    whole = ArtifactModel.open(tiny_artifacts.exported("openvino")).manifest.files["model.bin"]["bytes"]
    assert program < 0.8 * whole


def test_devices_that_are_not_there_are_refused_with_those_that_are(artifact: ArtifactModel) -> None:
    with pytest.raises(InputError, match=r"finds no device NPU here, only .*CPU"):
        OpenvinoBackend.open(artifact, device="NPU")
    with pytest.raises(InputError, match=r"no device GPU\.1 here, only CPU, GPU\.0: use one of those"):
        choose_device("GPU.1", ["CPU", "GPU.0"])
    assert choose_device("GPU", ["CPU", "GPU.0", "GPU.1"]) == "GPU"
    with pytest.raises(InputError, match=r"device is CPU, GPU, NPU, or one of several.*not 'TPU'"):
        OpenvinoOptions(device="TPU")
    with pytest.raises(InputError, match="takes device= and fixed_shapes=, not 'stream'"):
        OpenvinoBackend.open(artifact, stream=2)
    with pytest.raises(InputError, match=r"recipe is 'w3a3'; the openvino backend knows fp16, int8, int4"):
        OpenvinoOptions(recipe="w3a3")


def test_options_travel_with_the_folder(artifact: ArtifactModel) -> None:
    opened = ArtifactModel.open(artifact.folder, fixed_shapes=True)
    assert open_backend(opened).fork(0)._program._graphs.keys() == {1, 4, 8}
    with pytest.raises(InputError, match="no device GPU"):
        open_backend(ArtifactModel.open(artifact.folder, device="GPU"))


def test_what_was_changed_or_is_for_another_backend_is_refused(artifact: ArtifactModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    graph, manifest = copy / "model.xml", copy / "manifest.json"
    inside = graph.read_text()
    graph.write_text(inside.replace("96", "97", 1))
    with pytest.raises(ArtifactError, match=r"files.model.xml.sha256 is"):
        ArtifactModel.open(copy)
    graph.write_text(inside)
    document = json.loads(manifest.read_text())
    document["options"]["max_seq_len"] = 90
    manifest.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"options.max_seq_len is 90 in the manifest and 96 in what lies there"):
        OpenvinoBackend.open(ArtifactModel.open(copy))
    graph.write_text("<net/>")
    document["files"]["model.xml"] = {"bytes": graph.stat().st_size, "sha256": sha256_of(graph)}
    manifest.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"model.xml cannot be read"):
        OpenvinoBackend.open(ArtifactModel.open(copy))
    (copy / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin is missing"):
        ArtifactModel.open(copy)
    with pytest.raises(UnsupportedModelError, match=r"runs exported artefacts.*--backend openvino"):
        OpenvinoBackend.open(tiny_artifacts.model())
    with pytest.raises(UnsupportedModelError, match="is an artefact for the openvino backend, not for executorch"):
        check_artifact(artifact, "executorch")


def test_commands(
    artifact: ArtifactModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--artifact", str(artifact.folder), "--threads", "1", "--max-new-tokens", "12")
    assert cli.main(["generate", "import os", *common, "--k", "3", "--json", str(tmp_path / "text.json")]) == 0
    made = json.loads((tmp_path / "text.json").read_text())
    assert made["tokens"] == expected(byte_tokenizer()("import os")["input_ids"], 12)
    (tmp_path / "prompts.txt").write_text("import os\ndef f(x):\n")
    report = tmp_path / "report.json"
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--repetitions", "1", "--warmup", "0"]
    arguments += ["--drafter-artifact", str(artifact.folder), "--k", "2", "--json", str(report)]
    assert cli.main(["compare", *common, *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["identical"] == found["prompts"] == 2
    assert "openvino on CPU, graphs of 1, 4, 8 rows" in found["backend"]
    tiny_artifacts.model().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    out = ["--k", "0,2", "--max-seq-len", "40", "--recipe", "int8", "--device", "NPU", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(tmp_path / "model"), "--backend", "openvino", *out]) == 0  # compiled where it runs
    assert "step_3 3 rows" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["generate", "x", "--artifact", str(tmp_path / "out")]) == 2
    assert "no device NPU here" in capsys.readouterr().err
    assert cli.main(["export", "--backend", "openvino", "--delegate", "xnnpack"]) == 2
    assert "the openvino backend has no option 'delegate'" in capsys.readouterr().err


def signal_stack() -> int | None:
    """Where handlers of signals run in this thread."""

    class Stack(ctypes.Structure):
        _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.start


@pytest.mark.skipif(sys.platform != "linux", reason="the stack for signal handlers is asked for as Linux has it")
def test_a_signal_still_finds_its_stack_when_models_have_come_and_gone(artifact: ArtifactModel) -> None:
    OpenvinoBackend.open(artifact)
    before = signal_stack()
    first, second = OpenvinoBackend.open(artifact), OpenvinoBackend.open(artifact)
    del first
    gc.collect()
    del second
    gc.collect()
    assert signal_stack() == before


def test_every_kind_of_attention_is_converted() -> None:
    """Soft caps and two kinds of layers; learned positions and weights that lie transposed."""
    for name in ("gemma2", "gpt2"):
        model = tiny_models.tiny(name, dtype=torch.float32, attention="eager" if name == "gemma2" else "sdpa")
        options = OpenvinoOptions(prefill_len=1, k=(0, 5), max_seq_len=32, max_nodes=4)
        session = Session(OpenvinoBackend.open(ArtifactModel.open(tiny_artifacts.export(model, options))))
        text = [(5 * i + 1) % 60 for i in range(14)]
        session.append(text)
        right = tiny_models.cache_free(model, text)
        torch.testing.assert_close(session.forward().logits[-1], right, rtol=1e-3, atol=1e-3)


def test_without_the_package_the_line_to_type_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from specdec.export.openvino import installed_version

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(InputError, match=r"pip install 'specdec\[openvino\]'"):
        installed_version()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2024.1.0")
    with pytest.raises(InputError, match=r"openvino 2024\.1\.0 with torch .* was never tried"):
        installed_version()
