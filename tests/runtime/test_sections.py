"""Parts of a step, run in turn, against the whole; and artefacts of several parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from specdec.drafters import ModelDrafter
from torch import Tensor

import specdec
from specdec import cli
from specdec.errors import InputError
from specdec.export.aoti import AotiOptions
from specdec.export.artifact import ArtifactModel, export
from specdec.export.executorch import PROGRAM, ExecutorchOptions
from specdec.export.manifest import ArtifactError
from specdec.export.openvino import OpenvinoOptions
from specdec.export.qnn import QnnOptions
from specdec.export.sections import in_turn, numbered, spans
from specdec.export.step import StaticStep
from specdec.export.step_io import IoStep
from specdec.policy import Fixed
from specdec.runtime.backend import Step
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.choose import open_backend

SLOTS = 24
MODELS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi", "mixtral", "gpt-neox")
CASES = [(name, 2, None) for name in MODELS] + [("llama", 3, 4), ("llama", 4, 4), ("llama", 3, 5)]


def model(name: str, layers: int | None = None) -> Any:
    eager = "eager" if name == "gemma2" else "sdpa"
    changes = {} if layers is None else {"num_hidden_layers": layers}
    return tiny_models.tiny(name, dtype=torch.float32, attention=eager, **changes)


@given(st.integers(1, 40), st.data())
def test_every_layer_and_every_state_is_in_one_part(num_layers: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, num_layers))
    hidden = data.draw(st.lists(st.integers(0, num_layers), unique=True))
    found = spans(num_layers, parts, hidden)
    assert [i for span in found for i in span.layers] == list(range(num_layers))
    sizes = [len(span.layers) for span in found]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1
    assert [span.ends for span in found] == [False] * (parts - 1) + [True]
    between = [span.layers.stop for span in found[:-1]]
    assert sorted([i for span in found for i in span.hidden] + [i for i in hidden if i in between]) == sorted(hidden)


@pytest.mark.parametrize(("parts", "layers"), [(0, 3), (4, 3), (-1, 2)])
def test_more_parts_than_layers_are_refused(parts: int, layers: int) -> None:
    with pytest.raises(InputError, match=f"parts is a whole number from 1 to the {layers} layers"):
        spans(layers, parts)


def test_files_of_parts() -> None:
    assert [numbered(PROGRAM, i) for i in range(3)] == ["model.pte", "model_1.pte", "model_2.pte"]


def outputs(step: StaticStep, parts: int, held: Sequence[Tensor] = ()) -> list[tuple[Tensor, ...]]:
    """Of a prompt, and of its last row's logits alone; from empty slots on."""
    for name in step.slot_names:
        if hasattr(step, name):
            getattr(step, name).zero_()
    steps = step.in_parts(parts)
    found = spans(len(step.shapes), parts, step.hidden)

    def run(inputs: Sequence[Tensor], last: bool = False) -> tuple[Tensor, ...]:
        made = [part.last_only() if last else part for part in steps]
        return in_turn(found, lambda i, own: made[i](*own), inputs, len(held), len(step.kinds), step.hidden)

    tokens, rows = torch.tensor([(7 * i + 3) % 60 for i in range(5)]), torch.arange(5)
    causal = torch.full((5, 5), -1e9).triu(1)
    if held:
        numbers, mask = [tokens, rows], torch.cat((torch.full((5, SLOTS), -1e9), causal), 1)
    else:
        numbers, mask = [tokens, rows, rows], torch.cat((causal, torch.full((5, SLOTS - 4), -1e9)), 1)
    masks = [mask] * len(step.kinds)
    first = run([*numbers, *masks, *held])
    alone = run([*numbers, torch.tensor([4]), *masks, *held], last=True)
    return [first, alone]


@pytest.mark.parametrize(("name", "parts", "layers"), CASES)
def test_parts_give_what_the_whole_gives(name: str, parts: int, layers: int | None) -> None:
    whole = model(name, layers)
    last = whole.config.get_text_config().num_hidden_layers
    hidden = (last, 0, *range(last - 1, 0, -1))
    before = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    owning = StaticStep(whole, SLOTS, hidden=hidden, attention="plain")
    with torch.inference_mode():
        outside = IoStep(whole, SLOTS, hidden=hidden)
        for step, held in ((owning, ()), (outside, outside.empty())):
            right, parted = (outputs(step, count, held) for count in (1, parts))
            for one, other in zip(right, parted, strict=True):
                assert len(one) == len(other)
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(tensor, before[key]) for key, tensor in whole.state_dict().items())


def test_a_part_has_its_own_layers_and_slots_and_no_others() -> None:
    step = StaticStep(model("llama", 3), SLOTS, attention="plain")
    first, second = step.in_parts(2)
    assert first.slot_names == ["keys_0", "values_0", "keys_1", "values_1"]
    assert second.slot_names == ["keys_2", "values_2"] == sorted(dict(second.named_buffers(recurse=False)))
    assert second.keys_2 is step.keys_2
    table, head = (step.model.get_input_embeddings().weight, step.model.get_output_embeddings().weight)
    held = [{id(p) for p in part.parameters()} for part in (first, second)]
    assert (id(table) in held[0], id(table) in held[1]) == (True, False)
    assert (id(head) in held[0], id(head) in held[1]) == (False, True)
    assert held[0] | held[1] == {id(p) for p in step.parameters()}


def test_what_goes_from_part_to_part_is_read() -> None:
    """The comparison above would find it changed."""
    step = IoStep(model("llama", 4), SLOTS)
    steps, found, held = step.in_parts(2), spans(4, 2), step.empty()
    inputs = (torch.tensor([5, 9, 2]), *step.example(3)[1:])

    def run(factor: float) -> Tensor:
        def call(index: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
            out = steps[index](*own)
            return out if index else (out[0] * factor, *out[1:])

        with torch.inference_mode():
            return in_turn(found, call, inputs, len(held), 1, ())[0]

    with torch.inference_mode():
        right = step(*inputs)[0]
    assert torch.equal(run(1.0), right)
    assert not torch.allclose(run(0.5), right)


@pytest.mark.parametrize("options", [OpenvinoOptions(parts=2, max_seq_len=64), AotiOptions(parts=2, max_seq_len=64)])
def test_backends_of_one_part_say_so(options: Any) -> None:
    with pytest.raises(InputError, match=f"a program for {options.backend} is one part"):
        export(model("llama"), options)


def test_what_cannot_be_parted_is_refused() -> None:
    with pytest.raises(InputError, match="parts is a whole number >= 1, not 0"):
        ExecutorchOptions(parts=0)
    with pytest.raises(InputError, match="the recipe w8a16 takes no parts"):
        QnnOptions(recipe="w8a16", parts=2)
    with pytest.raises(InputError, match="from 1 to the 3 layers of the model, not 7"):
        export(model("llama", 3), ExecutorchOptions(parts=7, max_seq_len=64))


# ---------------------------------------------------------------- on artefacts

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
OPTIONS = {
    "executorch": replace(tiny_artifacts.SMALL, parts=2, kv="both"),
    "qnn": replace(tiny_artifacts.OF_OTHERS["qnn"], prefill_len=1, parts=2),
}


def parted(backend: str, **options: Any) -> Any:
    folder = tiny_artifacts.export(tiny_artifacts.model(), OPTIONS[backend])
    return open_backend(ArtifactModel.open(folder, **options))


def steps() -> list[Step]:
    """A prompt, and behind it the root of a tree with its two children."""
    tree = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    rows = torch.arange(len(PROMPT))
    first = Step(torch.tensor(PROMPT), 0, torch.ones(8, 8, dtype=torch.bool).tril(), rows, 0, 8, (0, 1, 2))
    return [first, Step(torch.tensor([4, 6, 9]), 8, tree, torch.tensor([8, 9, 9]), 8, 3, (0, 1, 2))]


def check_steps(backend: Any, atol: float) -> None:
    right = EagerBackend.open(tiny_artifacts.model())
    right.expose((0, 1, 2))
    for step in steps():
        found, wanted = backend.forward(step), right.forward(step)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=atol * float(wanted.logits.abs().max()))
        torch.testing.assert_close(found.hidden_MW, wanted.hidden_MW, rtol=0, atol=atol * 9)


@pytest.mark.parametrize("updater", ["scatter", "smart-mask", "shift-pointer"])
def test_executorch_runs_parts_in_turn(updater: str) -> None:
    backend = parted("executorch", kv_updater=updater)
    assert "in 2 parts" in backend.describes
    check_steps(backend.fork(0), 1e-4)


def test_texts_on_parts_are_those_of_the_model_and_take_turns() -> None:
    draft = ModelDrafter(tiny_models.noisy(tiny_artifacts.model(), 0.02), backend="eager")
    made = specdec.SpeculativeDecoder(tiny_artifacts.model(), drafter=draft, policy=Fixed(3), backend="eager")
    made.backend = parted("executorch")
    for decode in (made.generate, made.generate_plain):
        for prompt in (PROMPT, PROMPT[2:]):
            found = decode(prompt, max_new_tokens=20)
            assert found.tokens == tiny_models.reference(tiny_artifacts.model(), prompt, 20)
    assert [out.tokens for out in made.generate([PROMPT, PROMPT[2:]], max_new_tokens=12)] == [
        tiny_models.reference(tiny_artifacts.model(), prompt, 12) for prompt in (PROMPT, PROMPT[2:])
    ]


def test_a_part_that_is_missing_or_was_exchanged_is_named(tmp_path: Path) -> None:
    tiny_artifacts.needs_executorch()
    source = tiny_artifacts.export(tiny_artifacts.model(), OPTIONS["executorch"])
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    (folder / "model_1.pte").write_bytes((folder / PROGRAM).read_bytes())
    with pytest.raises(ArtifactError, match=r"files\.model_1\.pte"):
        ArtifactModel.open(folder)
    (folder / "model_1.pte").unlink()
    with pytest.raises(ArtifactError, match=r"model_1\.pte is missing"):
        ArtifactModel.open(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["model_1.pte"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"lists no model_1\.pte"):
        open_backend(ArtifactModel.open(folder))


def test_each_part_holds_its_share_of_the_weights() -> None:
    tiny_artifacts.needs_executorch()
    options = ExecutorchOptions(prefill_len=1, k=(0,), max_seq_len=32, max_nodes=0)
    made = {n: tiny_artifacts.export(model("llama", 4), replace(options, parts=n)) for n in (1, 2, 4)}
    whole = (made[1] / PROGRAM).stat().st_size
    for count in (2, 4):
        sizes = [(made[count] / numbered(PROGRAM, i)).stat().st_size for i in range(count)]
        assert max(sizes) < whole
    weights = sum(p.nbytes for p in model("llama", 4).model.layers.parameters()) / 4
    alone = (made[4] / numbered(PROGRAM, 1)).stat().st_size
    graphs = (whole - sum(p.nbytes for p in model("llama", 4).parameters())) / 4
    assert alone < weights + 2 * graphs + 60_000  # neither embeddings nor head in a part between the others


def test_qnn_runs_parts_in_turn() -> None:
    tiny_artifacts.needs("qnn")
    backend = parted("qnn")
    assert "in 2 parts" in backend.describes
    check_steps(backend, 0.02)


def test_the_command_makes_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_artifacts.needs_executorch()
    tiny_models.tiny("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--k", "0", "--prefill-len", "1", "--max-seq-len", "32", "--parts", "2", "--out", str(out)]
    assert cli.main(["export", str(tmp_path / "model"), *options]) == 0
    assert {path.name for path in out.glob("*.pte")} == {"model.pte", "model_1.pte"}
