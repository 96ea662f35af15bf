"""The evaluation of artefacts finds what differs, and where: judged on stand-ins that run in torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from tiny_text import byte_tokenizer

from specdec.errors import InputError
from specdec.export.artifact import CALIBRATION, model_hash
from specdec.export.distance import LOGITS, Distance
from specdec.export.evaluate import ARTIFACT, FULL, ROUNDED, apart, evaluate, held_out_rows, outputs
from specdec.export.exporter import Exporter, Stored
from specdec.export.options import Options
from specdec.runtime.backend import StepResult
from specdec.runtime.backends.eager import EagerBackend

OPTIONS = Options(prefill_len=8, k=(0, 1, 3), max_seq_len=64, hidden=(1, 2))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def rows_RT() -> torch.Tensor:
    return torch.randint(0, 64, (3, 30), generator=torch.Generator().manual_seed(3))


def stand_in(original: Any, noise: float, **changes: Any) -> Any:
    """A model in torch that says of itself what an artefact does, exported from `original`."""
    made = tiny_models.noisy(original, noise) if noise else copy.deepcopy(original)
    made.specdec_backend, made.folder = "eager", Path("nowhere")
    facts = {"sha256": model_hash(original)}
    manifest = {"options": OPTIONS, "model": facts, "files": {}, "backend": "eager", **changes}
    made.manifest = SimpleNamespace(**manifest)
    return made


def test_an_artefact_that_is_its_model(model: Any, rows_RT: torch.Tensor) -> None:
    prompts = rows_RT[:2, :8].tolist()
    steps: list[tuple[int, int]] = []
    told = lambda done, of, what: steps.append((done, of))  # noqa: E731
    found = evaluate(stand_in(model, 0), model, rows_RT, prompts, new_tokens=20, told=told)
    assert found.phases == (FULL, ARTIFACT)
    assert found.reference == FULL
    logits = model(input_ids=rows_RT).logits.detach()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows_RT[:, 1:].flatten())
    assert found.loss == pytest.approx({FULL: float(expected), ARTIFACT: float(expected)}, rel=1e-5)
    assert found.to_reference.agreement == 1
    assert found.to_reference.sqnr.keys() == {LOGITS, "hidden state 1", "hidden state 2"}
    assert min(found.to_reference.sqnr.values()) > 100
    assert [graph.name for graph in found.graphs] == ["step_2", "step_4", "prefill_8"]
    assert all(graph.distance.agreement == 1 for graph in found.graphs)
    assert [text.index for text in found.texts[ARTIFACT]] == [None, None]
    assert (found.identity.texts, found.identity.identical, found.identity.acceptance) == (4, 4, 1.0)
    assert steps[-1][0] + 1 == steps[-1][1]
    assert found.as_dict()["to_full"][ARTIFACT]["kl"] < 1e-9


def test_another_models_loss_and_texts_show(model: Any, rows_RT: torch.Tensor) -> None:
    prompts = rows_RT[:, :8].tolist()
    noises = (0.003, 0.03)
    near, far = (evaluate(stand_in(model, noise), model, rows_RT, prompts, new_tokens=20) for noise in noises)
    assert near.to_full[ARTIFACT].kl < 0.1 * far.to_full[ARTIFACT].kl
    assert near.to_reference.sqnr[LOGITS] - far.to_reference.sqnr[LOGITS] == pytest.approx(20, abs=4)  # ten times
    assert near.to_reference.agreement > far.to_reference.agreement
    assert near.to_reference.worst < near.to_reference.sqnr[LOGITS]
    parted = [text for text in far.texts[ARTIFACT] if text.index is not None]
    assert parted
    assert all(text.margin is not None and text.margin > 0 for text in parted)
    assert far.identity.identical == far.identity.texts == 6  # which is no matter of the weights
    assert far.identity.acceptance is not None
    assert far.identity.acceptance < 1


def test_where_texts_part_full_precision_prefers_its_own_token(model: Any, rows_RT: torch.Tensor) -> None:
    artifact, prompt = stand_in(model, 0.03), rows_RT[0, :8].tolist()
    [text] = evaluate(artifact, model, rows_RT, [prompt], new_tokens=20).texts[ARTIFACT]
    ours, theirs = (tiny_models.reference(each, prompt, 20) for each in (model, artifact))
    at = next(i for i in range(20) if ours[i] != theirs[i])
    row = tiny_models.cache_free(model, [*prompt, *ours[:at]])
    assert text.index == at
    assert text.margin == pytest.approx(float(row[ours[at]] - row[theirs[at]]), abs=1e-4)


class Skewed(EagerBackend):
    """Says something else where a step is wide, as a graph with a fault would."""

    def forward(self, step: Any) -> Any:
        result = super().forward(step)
        if len(step.tokens) != 4:
            return result
        return StepResult(torch.cat((result.logits[:-1], result.logits[-1:].flip(1))), result.hidden_MW)


def test_a_graph_with_a_fault_is_found(model: Any, rows_RT: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = stand_in(model, 0)
    artifact.specdec_backend = "skewed"
    from specdec import registry

    find = registry.find
    monkeypatch.setattr(registry, "find", lambda kind, name: Skewed if name == "skewed" else find(kind, name))
    found = evaluate(artifact, model, rows_RT, rows_RT[:2, :8].tolist(), new_tokens=20)
    graphs = {graph.name: graph.distance for graph in found.graphs}
    assert graphs["step_2"].agreement == graphs["prefill_8"].agreement == 1
    assert graphs["step_4"].agreement == pytest.approx(0.75, abs=0.05)  # one row of four
    assert found.to_reference.agreement < 0.8
    assert found.identity.identical < found.identity.texts
    assert len(found.identity.bugs) == found.identity.texts - found.identity.identical  # no rounding does that


class Rounds(Exporter):
    """Stores a model with noise in place of rounding."""

    def __init__(self, name: str = "", digest: str = "ab"):
        self.digest, self.seen = digest, []

    def versions(self) -> dict[str, str]:
        return {}

    def store(self, model: Any, options: Any, calibration_BT: Any = None) -> Stored:
        self.seen.append(calibration_BT)
        return Stored(tiny_models.noisy(model, 0.02), {"sha256": self.digest}, 1)

    def step(self, model: Any, options: Any) -> Any:
        raise AssertionError

    def lower(self, *given: Any) -> dict[str, Any]:
        raise AssertionError


def test_the_rounded_model_is_the_reference_and_its_text_is_kept_apart(
    model: Any, rows_RT: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_BT = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(9))
    save_file({"tokens": text_BT.int()}, tmp_path / CALIBRATION)
    facts = {"sha256": model_hash(model), "stored": {"sha256": "ab"}}
    options = Options(k=(0, 3), max_seq_len=64, recipe="coarse")
    artifact = stand_in(model, 0.02, options=options, model=facts, files={CALIBRATION: {}})
    artifact.folder = tmp_path
    made = Rounds()
    monkeypatch.setattr("specdec.export.evaluate.exporter", lambda name: made)
    given = torch.cat((torch.nn.functional.pad(rows_RT, (0, 10)), text_BT[:1]))
    found = evaluate(artifact, model, given, rows_RT[:1, :8].tolist(), new_tokens=12)
    assert found.phases == (FULL, ROUNDED, ARTIFACT)
    assert found.reference == ROUNDED
    assert found.to_reference.agreement == 1  # the same noise
    assert found.to_full[ROUNDED].agreement == found.to_full[ARTIFACT].agreement < 1
    assert found.tokens == 3 * 39
    assert "1 rows left out" in " ".join(found.notes)
    assert torch.equal(made.seen[0], text_BT)
    made.digest = "cd"
    assert "gives other weights here" in " ".join(evaluate(artifact, model, given).notes)
    with pytest.raises(InputError, match="also stands in the text that the recipe was calibrated on"):
        apart(text_BT, text_BT)


def test_another_original_is_refused(model: Any, rows_RT: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"was exported from another model .*--target ORIGINAL"):
        evaluate(stand_in(model, 0), tiny_models.noisy(model, 0.01), rows_RT)


def test_outputs_do_not_depend_on_the_width(model: Any, rows_RT: torch.Tensor) -> None:
    backend, tokens = EagerBackend.open(model), rows_RT[0].tolist()
    whole = model(input_ids=rows_RT[:1], output_hidden_states=True)
    for width in (1, 4, 7, 30):
        found = outputs(backend, tokens, width, hidden=(0, 2))
        torch.testing.assert_close(found[LOGITS], whole.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["hidden state 2"], whole.hidden_states[2][0], rtol=1e-4, atol=1e-4)


def test_distances_are_the_formulas() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.5], [0.0, 1.0]])
    found = Distance()
    found.add({LOGITS: a[:1], "x": a[:1]}, {LOGITS: b[:1], "x": a[:1]})
    found.add({LOGITS: a[1:], "x": a[1:]}, {LOGITS: b[1:], "x": a[1:]})
    found.done()
    assert found.agreement == 0.5
    assert found.sqnr[LOGITS] == pytest.approx(10 * math.log10(26 / 2.25))
    assert found.worst == pytest.approx(10 * math.log10(1 / 2))
    assert found.sqnr["x"] == math.inf
    assert found.as_dict()["sqnr"]["x"] is None  # JSON
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum() / 2))
    assert found.largest == 1.0


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}\n\n" for i in range(100)))
    one, again, other = (held_out_rows(path, byte_tokenizer(), 5, 16, seed) for seed in (0, 0, 1))
    assert one.shape == (5, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    path.write_text("short")
    with pytest.raises(InputError, match="too short for one row of 16 tokens"):
        held_out_rows(path, byte_tokenizer(), 5, 16)
