"""Which k a cost curve proposes, a whole model's curve out of its first layers, the hash of what makes programs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
import torch_graphs

import specdec.export
from specdec import cli
from specdec.errors import InputError
from specdec.export import artifact, code, exporter, widths
from specdec.export.executorch import ExecutorchExporter, ExecutorchOptions
from specdec.export.plan import plan


def test_the_end_of_a_tile_is_found() -> None:
    """Measured with XNNPACK in float32 on one thread: its tile is 7 rows."""
    tiles = {1: 6.9, 4: 7.5, 7: 8.4, 8: 14.1, 14: 15.5}
    assert widths.propose(tiles).k == (0, 3, 6)
    assert widths.propose(tiles, 2).k == (0, 3)
    assert [widths.propose(tiles).best(a) for a in (0.3, 0.5, 0.9)] == [3, 3, 6]
    flat = {width: 1.0 for width in range(1, 17)}
    assert max(widths.propose(flat).k) > 6
    dear = {width: float(width) for width in range(1, 17)}
    assert widths.propose(dear).k == (0,)  # a row costs a step: nothing pays
    assert widths.propose(dear).share == 1.0
    assert widths.propose({1: 1.0}).k == (0,)
    for wrong in (({}, 3), ({1: 1.0}, 0)):
        with pytest.raises(InputError, match="needs costs"):
            widths.propose(*wrong)


def test_more_widths_are_taken_only_where_they_bring_something() -> None:
    steps = {1: 1.0, 5: 1.1, 9: 3.0, 13: 5.0}
    found = widths.propose(steps, 4)
    assert found.k == (0, 4)
    assert found.share > 0.98


def test_the_first_layers_are_a_model_on_the_same_tensors() -> None:
    model = tiny_models.tiny("gemma2", dtype=torch.float32, attention="eager")
    cut = widths.first_layers(model, 1)
    assert cut.config.num_hidden_layers == 1
    assert model.config.num_hidden_layers == 3  # the user's is as it was
    ids = torch.tensor([[3, 5, 7]])
    with torch.inference_mode():
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
        mine = cut(ids, output_hidden_states=True).logits
        expected = model.lm_head(model.model.norm(hidden))
        cap = model.config.final_logit_softcapping
    torch.testing.assert_close(mine, torch.tanh(expected / cap) * cap if cap else expected)
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared for p in cut.parameters())


def test_a_whole_models_curve_follows_from_one_and_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs in torch; a clock that charges a row and a layer for every call."""
    model = tiny_models.tiny("llama", dtype=torch.float32, num_hidden_layers=5)
    asked = []

    def seconds(cut: Any, options: Any, read: torch.Tensor, *more: Any) -> dict[int, float]:
        asked.append((cut.config.num_hidden_layers, options.prefill_len, options.recipe, read.nbytes))
        layers = cut.config.num_hidden_layers
        return {k + 1: 1.0 + layers * (2.0 if k < 7 else 5.0) - 0.001 * k for k in options.k}

    monkeypatch.setattr(widths, "_step_seconds", seconds)
    monkeypatch.setattr(ExecutorchExporter, "check", lambda *_: None)
    curve = widths.measure_curve(model, ExecutorchOptions(max_seq_len=64, recipe="int8"))
    assert [(layers, prefill, recipe) for layers, prefill, recipe, _ in asked] == [(1, 1, "int8"), (2, 1, "int8")]
    assert asked[0][3] > asked[1][3] > 0  # what the other layers weigh is read between two steps
    assert list(curve) == list(widths.WIDTHS)
    assert curve[1] == pytest.approx(11.0, abs=0.1)
    assert curve[8] == pytest.approx(26.0, abs=0.1)
    assert sorted(curve.values()) == list(curve.values())  # it never falls, though what was measured did


def test_steps_of_a_probe_are_timed_by_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32, num_hidden_layers=1)
    options = ExecutorchOptions(prefill_len=1, k=(0, 3), max_seq_len=48, max_nodes=0)
    backend = torch_graphs.opened(model, "scatter", options)
    monkeypatch.setattr(artifact, "export", lambda *_, **__: tmp_path)
    monkeypatch.setattr(artifact.ArtifactModel, "open", lambda *_: backend.family.model)  # type: ignore[attr-defined]
    monkeypatch.setattr("specdec.runtime.backends.executorch.ExecutorchBackend.load", lambda *_: backend.family)
    found = widths._step_seconds(model, options, torch.zeros(1), lambda _: None, None)
    assert set(found) == {1, 4}
    assert all(seconds > 0 for seconds in found.values())


def test_an_emulators_graphs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExecutorchExporter, "real_time", False)
    with pytest.raises(InputError, match="only run in an emulator here: name k"):
        widths.measure_curve(tiny_artifacts.model(), ExecutorchOptions(max_seq_len=64))


def test_auto_is_a_word_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = []

    def stop(model: Any, options: Any, **more: Any) -> Any:
        chosen.append(options.k)
        raise InputError("that is far enough")

    monkeypatch.setattr(widths, "measure_curve", lambda *_, **__: {1: 6.9, 4: 7.5, 7: 8.4, 8: 14.1})
    monkeypatch.setattr(artifact, "export", stop)
    assert cli.main(["export", "--k", "auto", "--max-seq-len", "64"]) == 2
    assert chosen == [(0, 3, 6)]
    out = capsys.readouterr().out
    assert "1: 6900.00, 4: 7500.00, 7: 8400.00, 8: 14100.00" in out
    assert re.search(r"--k 0,3,6 +100% of the speed of graphs of every width", out)
    with pytest.raises(SystemExit):
        cli.main(["export", "--k", "often"])


def test_a_list_of_k_is_dispatched_step_by_step() -> None:
    """Each verification takes the narrowest graph that holds what was drafted this time."""
    from specdec.drafters import ModelDrafter

    import specdec as library
    from specdec.policy import Fixed

    model = tiny_artifacts.model()
    options = ExecutorchOptions(prefill_len=8, k=(0, 1, 3, 6), max_seq_len=96, max_nodes=8)
    decoder = library.SpeculativeDecoder(model, drafter=ModelDrafter(tiny_models.noisy(model, 0.02)), backend="eager")
    decoder.backend = torch_graphs.opened(model, "scatter", options)
    calls = decoder.backend.family.calls  # type: ignore[attr-defined]
    prompt = [3, 5, 7, 9, 11]
    for k, names in ((1, {"step_2"}), (2, {"step_4"}), (3, {"step_4"}), (5, {"step_7"}), (6, {"step_7"})):
        calls.clear()
        out = decoder.generate(prompt, max_new_tokens=20, policy=Fixed(k), strict=True, reuse_prefix=False)
        assert out.tokens == tiny_models.reference(model, prompt, 20)
        widths_of = [
            next(iter(plan(options.methods, r.num_nodes + 1, r.num_nodes + 1))).method.name for r in out.trace.rounds
        ]
        assert calls[-len(widths_of) + 1 :] == widths_of[1:]  # the first round's step reads the prompt too
        assert names <= set(calls)


# What the cache key covers.


def test_the_key_changes_with_the_code_that_makes_programs(tmp_path: Path) -> None:
    real = Path(next(iter(specdec.export.__path__)))
    module = exporter.EXPORTERS["executorch"].partition(":")[0]
    made_by = code.sources(module)
    assert {"executorch", "step", "step_io", "options", "delegates", "recipes", "exporter"} <= set(made_by)
    assert not {"widths", "plan", "folder", "manifest", "artifact"} & set(made_by)
    for name, source in made_by.items():
        (tmp_path / f"{name}.py").write_bytes(source)
    first = code.code_hash(module)
    assert code.code_hash(module, tmp_path) == first
    for changed in made_by:
        other = tmp_path / changed
        other.mkdir()
        for name, source in made_by.items():
            (other / f"{name}.py").write_bytes(source + (b"\n# changed\n" if name == changed else b""))
        assert code.code_hash(module, other) != first, changed
    assert (real / "step.py").read_bytes() == made_by["step"]


def test_the_contract_carries_the_hash_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExecutorchExporter, "versions", lambda _: {"executorch": "1.5.1"})
    model, options = tiny_artifacts.model(), ExecutorchOptions(max_seq_len=64)
    step = ExecutorchExporter().step(model, options)
    before = artifact.contract_of(model, step, options)
    assert before["versions"]["export_code"] == code.code_hash("specdec.export.executorch")
    monkeypatch.setattr(artifact, "code_hash", lambda _: "another")
    after = artifact.contract_of(model, step, options)
    assert artifact.key_of(before) != artifact.key_of(after)
