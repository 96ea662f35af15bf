"""Artefacts are whole or not there; what was changed, mixed up or made for another release is refused by field."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import specdec
from specdec.errors import InputError, UnsupportedModelError
from specdec.export import artifact, executorch, folder
from specdec.export.artifact import ArtifactModel, contract_of, export
from specdec.export.executorch import PROGRAM, ExecutorchExporter, ExecutorchOptions
from specdec.export.exporter import exporter
from specdec.export.manifest import FILE, ArtifactError, Manifest, difference, is_artifact, key_of
from specdec.export.step import HIDDEN, StaticStep, Swap, layer_shapes
from specdec.loading import load_model

OPTIONS = ExecutorchOptions(prefill_len=4, k=(0, 2), max_seq_len=24, max_nodes=4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Exports without the minutes and without ExecuTorch: the program is its contract."""
    calls: list[Path] = []

    def write(self: Any, step: Any, options: Any, contract: Any, made: Path, tell: Any) -> dict[str, Any]:
        calls.append(made)
        tell("lowering")
        (made / PROGRAM).write_text(json.dumps(contract))
        return {"seconds": {}, "coverage": {}}

    monkeypatch.setattr(ExecutorchExporter, "lower", write)
    monkeypatch.setattr(executorch, "installed_version", lambda: "1.5.1")
    return calls


def model(**changes: Any) -> Any:
    return tiny_models.tiny("llama", dtype=torch.float32, **changes)


# The step itself, before any graph is made of it.


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_the_static_step_is_the_model(name: str) -> None:
    """Chunks, a padded row, and slots in any order."""
    eager = tiny_models.tiny(name, dtype=torch.float32, attention="eager" if name == "gemma2" else "sdpa")
    if name == "mixtral":
        pytest.skip("experts are chosen by their rows: no graph of fixed shape")
    step = StaticStep(eager, 16, attention="plain", hidden=(1,))
    tokens = [3, 9, 27, 17, 51, 25]
    slots = [4, 0, 7, 2, 15, 1]
    window = getattr(eager.config, "sliding_window", None) or 0
    assert eager.config._attn_implementation != step.model.config._attn_implementation  # the user's is as it was
    with torch.inference_mode():
        expected = eager(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        for start, end in ((0, 4), (4, 6)):
            ids, at, to = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), torch.full((5,), 16)
            count = end - start
            ids[:count], at[:count] = torch.tensor(tokens[start:end]), torch.arange(start, end)
            to[:count] = torch.tensor(slots[start:end])
            masks = []
            for kind in step.kinds:
                mask = torch.full((5, 17), HIDDEN)
                for row in range(count):
                    first = max(0, start + row - window + 1) if kind == "sliding_attention" else 0
                    mask[row, slots[first : start + row + 1]] = 0
                masks.append(mask)
            logits, hidden = step(ids, at, to, *masks)
            torch.testing.assert_close(logits[:count], expected.logits[0, start:end], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(hidden[:count], expected.hidden_states[1][0, start:end], rtol=1e-3, atol=1e-3)
            row = torch.tensor([count - 1])
            (last, _) = step.last_only()(ids, at, to, row, *masks)
            torch.testing.assert_close(last, logits[count - 1 : count], rtol=1e-4, atol=1e-4)


def test_swapping_exchanges_what_the_slots_hold() -> None:
    step = StaticStep(model(), 3, attention="plain")
    swap = Swap(step)
    ones = tuple(torch.ones_like(t) for t in swap.example())
    assert len(ones) == 2 * len(layer_shapes(model()))
    assert all(not old.any() for old in swap(*ones))
    assert all(bool((old == 1).all()) for old in swap(*swap.example()))


def test_models_that_no_static_graph_can_hold_are_refused() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match=r"by the text's length \(dynamic\)"):
        StaticStep(model(rope_parameters=dynamic), 16)
    with pytest.raises(InputError, match=r"start.* from a float32 model"):
        export(tiny_models.tiny(), OPTIONS)
    with pytest.raises(InputError, match="max_seq_len is 512, and the model's context is 256"):
        export(model(), ExecutorchOptions())
    with pytest.raises(InputError, match="hidden state 3: the model has those from 0 to 2"):
        export(model(), ExecutorchOptions(max_seq_len=64, hidden=(3,)))
    for wrong, say in (
        ({"k": (1, 3)}, "k has no 0"),
        ({"k": (0, -1)}, "k is a list"),
        ({"attention": "flash"}, "attention is one of custom, plain"),
        ({"delegate": "gpu"}, "delegate is one of"),
        ({"prefill_len": 600}, "a graph of more rows"),
        ({"max_nodes": -1}, "max_nodes"),
        ({"recipe": "w3a3"}, "no recipe of the executorch backend is called 'w3a3'"),
    ):
        with pytest.raises(InputError, match=say):
            ExecutorchOptions(**wrong)
    with pytest.raises(InputError, match="the executorch backend has no option 'soc'"):
        ExecutorchOptions.of({"soc": "sm8650"})
    with pytest.raises(InputError, match="artefacts are made for aoti, executorch, openvino, qnn, not for 'tpu'"):
        exporter("tpu")
    assert ExecutorchOptions.of(json.loads(json.dumps(ExecutorchOptions(k=(0, 3)).as_dict()))) == ExecutorchOptions(
        k=(0, 3)
    )


# Folders.


def test_an_export_is_kept_and_found_again(lowered: list[Path], tmp_path: Path) -> None:
    first = export(model(), OPTIONS)
    assert first.parent == folder.artifacts_folder()
    assert is_artifact(first)
    assert Manifest.read(first).options == OPTIONS
    assert Manifest.read(first).key == first.name
    out = export(model(), OPTIONS, out=tmp_path / "mine")
    assert out == tmp_path / "mine"
    assert (out / PROGRAM).read_bytes() == (first / PROGRAM).read_bytes()
    assert len(lowered) == 1
    for changed, options in ((model(), ExecutorchOptions(**{**vars(OPTIONS), "k": (0, 1)})), (model(seed=3), OPTIONS)):
        assert export(changed, options) != first
    assert len(lowered) == 3
    with pytest.raises(InputError, match="is there already"):
        export(model(), OPTIONS, out=out)
    (first / PROGRAM).write_text("damaged")  # made anew, not used
    assert export(model(), OPTIONS) == first
    assert len(lowered) == 4
    Manifest.read(first)


def test_a_failed_export_leaves_nothing(monkeypatch: pytest.MonkeyPatch, lowered: list[Path], tmp_path: Path) -> None:
    def fail(*args: Any) -> Any:
        (args[4] / PROGRAM).write_text("half")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ExecutorchExporter, "lower", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        export(model(), OPTIONS, out=tmp_path / "mine")
    assert list(folder.artifacts_folder().iterdir()) == []
    assert not (tmp_path / "mine").exists()


_KILLED = """
import sys, time, torch, tiny_models
from pathlib import Path
from specdec.export import artifact, executorch
def slow(self, step, options, contract, made, tell):
    (made / "model.pte").write_bytes(b"half a program")
    print("writing", flush=True)
    time.sleep(60)
executorch.ExecutorchExporter.lower, executorch.installed_version = slow, lambda: "1.5.1"
options = executorch.ExecutorchOptions(4, (0, 2), 24, 4)
artifact.export(tiny_models.tiny("llama", dtype=torch.float32), options, out=sys.argv[1])
"""


def test_a_killed_export_leaves_nothing_that_is_used(lowered: list[Path], tmp_path: Path) -> None:
    tests = Path(tiny_models.__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path / "mine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tests) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    left = list(folder.artifacts_folder().iterdir())
    assert len(left) == 1  # half a folder, under a name that nobody looks for
    assert left[0].name.startswith(".")
    assert not is_artifact(left[0])
    assert not (tmp_path / "mine").exists()
    made = export(model(), OPTIONS, out=tmp_path / "mine")
    assert len(lowered) == 1  # made anew
    Manifest.read(made)
    assert [path.name[0] for path in folder.artifacts_folder().iterdir()] != ["."]
    assert not left[0].exists()  # and the half is gone


def test_whoever_is_slower_takes_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with folder.aside(target) as slow:
        (slow / "file").write_text("slow")
        with folder.aside(target) as fast:
            (fast / "file").write_text("fast")
    assert (target / "file").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["target"]


# Refusals.


def tampered(source: Path, target: Path, field: str, value: Any) -> Path:
    shutil.copytree(source, target)
    document = json.loads((target / FILE).read_text())
    *path, last = field.split("/")
    inside = document
    for name in path:
        inside = inside[name]
    inside[last] = value
    (target / FILE).write_text(json.dumps(document))
    return target


def test_changed_files_are_refused_by_name(lowered: list[Path], tmp_path: Path) -> None:
    whole = export(model(), OPTIONS)
    program = (whole / PROGRAM).read_bytes()
    for name, change, field in (
        (PROGRAM, program[:-1] + b"!", f"files.{PROGRAM}.sha256"),
        (PROGRAM, program + b"!", f"files.{PROGRAM}.bytes"),
        ("config.json", b"{}", "files.config.json.bytes"),
    ):
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, copy)
        (copy / name).write_bytes(change)
        with pytest.raises(ArtifactError, match=field):
            ArtifactModel.open(copy)
    copy = tmp_path / "less"
    shutil.copytree(whole, copy)
    (copy / PROGRAM).unlink()
    with pytest.raises(ArtifactError, match=f"{PROGRAM} is missing"):
        load_model(copy)
    (copy / FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has no {FILE}"):
        Manifest.read(copy)
    with pytest.raises(ArtifactError, match="version is 7"):
        Manifest.read(tampered(whole, tmp_path / "newer", "version", 7))


@pytest.mark.parametrize(
    ("field", "value"),
    [("options/max_seq_len", 48), ("model/sha256", "0"), ("model/vocab_size", 65), ("versions/executorch", "1.6.0")],
)
def test_a_manifest_that_is_not_the_programs_is_refused(
    lowered: list[Path], tmp_path: Path, field: str, value: Any
) -> None:
    whole = export(model(), OPTIONS)
    inside = (whole / PROGRAM).read_text()  # the stand-in's contract
    Manifest.read(whole).check_contract(whole, inside)
    changed = tampered(whole, tmp_path / "changed", field, value)
    with pytest.raises(ArtifactError, match=f"{field.replace('/', '.')} is {value!r} in the manifest"):
        Manifest.read(changed).check_contract(changed, inside)


def test_what_an_artifact_settles_is_no_option(lowered: list[Path]) -> None:
    whole = export(model(), OPTIONS)
    with pytest.raises(InputError, match="leave quantize out"):
        load_model(whole, quantize="int8")
    with pytest.raises(InputError, match="leave dtype and device out"):
        load_model(whole, dtype="bfloat16")
    stands_for = load_model(whole)
    assert isinstance(stands_for, ArtifactModel)
    assert stands_for.exported_parameters == sum(p.numel() for p in model().parameters())
    assert stands_for.get_output_embeddings().weight.shape[0] == tiny_models.VOCAB


def test_releases_that_were_never_tried_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.4.0")
    with pytest.raises(InputError, match=r"executorch 1\.4\.0 with torch .* was never tried"):
        executorch.installed_version()


def test_differences_are_named() -> None:
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) is None
    assert difference({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ("a.b", 1, 3)
    assert difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    options = ExecutorchOptions(max_seq_len=24, prefill_len=4)
    contract = {"options": options.as_dict()}
    assert key_of(contract) != key_of({"options": ExecutorchOptions(max_seq_len=25, prefill_len=4).as_dict()})


def test_the_key_follows_every_weight(lowered: list[Path]) -> None:
    one, other = model(), model()
    contracts = []
    for each in (one, other):
        contracts.append(contract_of(each, StaticStep(each, 8), OPTIONS))
    assert contracts[0] == contracts[1]
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert contract_of(other, StaticStep(other, 8), OPTIONS)["model"]["sha256"] != contracts[0]["model"]["sha256"]
    assert artifact.model_hash(one) == contracts[0]["model"]["sha256"]
    assert specdec.__version__ == contracts[0]["versions"]["specdec"]
    assert os.environ["SPECDEC_CACHE"] in str(folder.artifacts_folder())
