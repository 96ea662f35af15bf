"""The loop: it learns, keeps the best, goes on bit for bit where it was stopped, and refuses what does not fit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import noisy, tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec.errors import IncompatiblePairError, InputError, UnknownPluginError
from specdec.train import checkpoint, data, losses
from specdec.train.draft import DraftObjective, new_model
from specdec.train.objective import Acceptance, Batch, create, defaults
from specdec.train.settings import Settings, build_optimizers, rate
from specdec.train.trainer import look, train

LENGTH, K = 16, 3


def rows(count: int, seed: int, vocab_size: int = 64) -> data.Rows:
    return data.Rows.full(np.random.default_rng(seed).integers(0, vocab_size, (count, LENGTH)).astype(np.int32))


@pytest.fixture(scope="module")
def target():
    return tiny("llama", dtype=torch.float32, initializer_range=0.2)


@pytest.fixture
def texts():
    return data.TrainingData(rows(200, 1), rows(24, 2), {"from": "chance"})


def objective(target, kind: type[DraftObjective] = DraftObjective, **options) -> DraftObjective:
    made = kind(target, None, noisy(target, 0.1), k=K, **options)
    made.values = {"k": K, **options}
    return made


def settings(out: Path, **changes) -> Settings:
    return Settings(**{"out": out, "steps": 40, "batch": 8, "lr": 3e-3, "evaluations": 4, "patience": 0, **changes})


def weights(out: Path, name: str = "module") -> dict[str, torch.Tensor]:
    folder = checkpoint.latest(out)
    assert folder is not None
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def untimed(curve: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


# ------------------------------------------------------------------ what is measured


def test_acceptance_weighs_a_position_by_the_chance_to_reach_it():
    overlap = torch.tensor([[0.5, 1.0, 0.2], [0.1, 0.0, 0.9]], dtype=torch.float64)
    agree = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    found = Acceptance()
    found.add(overlap[:1], agree[:1])
    found.add(overlap[1:], agree[1:])
    expected = 1 + np.mean([0.5 + 0.5 + 0.1, 0.1 + 0.0 + 0.0])
    assert found.expected_length(1) == pytest.approx(expected)
    assert found.by_position(1) == pytest.approx([0.3, 0.5 / 0.6, 0.1 / 0.5])
    assert found.expected_length(1) == pytest.approx(1 + np.cumprod(found.by_position(1)).sum())
    assert found.expected_length(0) == pytest.approx(2.0)
    assert found.by_position(0) == pytest.approx([0.5, 1.0, 0.0])
    with pytest.raises(InputError, match="not finite"):
        found.add(torch.tensor([[float("nan")] * 3]), agree[:1])
    with pytest.raises(InputError, match="longer rows"):
        Acceptance().expected_length(1)


def test_starts_are_those_with_all_positions():
    mask = torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), mask, torch.zeros(2, 5, 4))
    assert batch.starts(2).tolist() == [[True, True, False], [False, True, True]]
    assert batch.starts(2, first=1).tolist() == [[True, True, False], [True, True, True]]
    with pytest.raises(InputError, match="too short for 5 positions"):
        batch.starts(5)


def test_a_drafts_acceptance_is_its_overlap_in_windows(target):
    made = objective(target)
    tokens, mask = rows(3, 7).tensors()
    mask[1, 9:] = False
    batch = look(target, tokens, mask)
    with torch.no_grad():
        overlap_NK, agree_NK = made.acceptance(batch)
        p, q = target(tokens).logits.softmax(-1), made.module(tokens).logits.softmax(-1)
    a, same_best = torch.minimum(p, q).sum(-1), p.argmax(-1) == q.argmax(-1)
    starts = [(b, t) for b, end in ((0, 16), (1, 9), (2, 16)) for t in range(end - K + 1)]
    torch.testing.assert_close(overlap_NK, torch.stack([a[b, t : t + K] for b, t in starts]))
    torch.testing.assert_close(agree_NK, torch.stack([same_best[b, t : t + K].float() for b, t in starts]))


def test_only_what_counts_is_learnt_from(target):
    made = objective(target)
    tokens, mask = rows(2, 7).tensors()
    mask[1, 5:] = False
    p_logits, q_logits = look(target, tokens, mask).logits_BLV, made.module(tokens).logits
    each = losses.divergence("fkl", p_logits.flatten(0, 1).softmax(-1), q_logits.flatten(0, 1)).view(2, LENGTH)
    expected = (each[0].sum() + each[1, :5].sum()) / (LENGTH + 5)
    torch.testing.assert_close(made.loss(look(target, tokens, mask)).loss, expected)


def test_the_target_is_asked_for_no_more_than_is_wanted(target):
    tokens, mask = rows(2, 3).tensors()
    batch = look(target, tokens, mask, (0, 2))
    states = target(tokens, output_hidden_states=True).hidden_states
    assert set(batch.hidden) == {0, 2}
    torch.testing.assert_close(batch.hidden[2], states[-1])
    torch.testing.assert_close(target.lm_head(batch.hidden[2]), batch.logits_BLV)
    assert not batch.logits_BLV.requires_grad
    with pytest.raises(InputError, match="hidden states 0 to 2"):
        look(target, tokens, mask, (3,))


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize(("loss", "optimizer"), [("fkl", "adamw"), ("tv", "adamw"), ("lk", "muon")])
def test_it_learns_and_its_output_is_a_drafter(target, texts, tmp_path, loss, optimizer):
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    made = objective(target, loss=loss)
    batch = look(target, *texts.train.take(slice(0, 32)).tensors())
    first = float(made.loss(batch).loss.detach())
    report = train(made, texts, settings(tmp_path, optimizer=optimizer))
    assert float(made.loss(batch).loss.detach()) < 0.8 * first
    lengths = [row["expected_length_t1"] for row in report.curve]
    assert len(lengths) == 5
    assert lengths[-1] > lengths[0] + 0.2
    assert report.best["expected_length_t1"] == max(lengths)
    assert (report.steps, report.tokens, report.ended) == (40, 40 * 8 * LENGTH, "steps")
    assert same(target.state_dict(), before)
    # What was measured is what the saved drafter does.
    decoder = specdec.SpeculativeDecoder(target, drafter=str(tmp_path), backend="eager")
    assert decoder.drafter.name == "model"
    loaded = DraftObjective(target, None, decoder.drafter.model, k=K)
    found = Acceptance()
    found.add(*loaded.acceptance(look(target, *texts.held_out.tensors())))
    assert found.expected_length(1) == pytest.approx(report.best["expected_length_t1"], abs=1e-5)
    out = decoder.generate([3, 5, 7], max_new_tokens=30, strict=True)
    assert out.tokens == decoder.generate_plain([3, 5, 7], max_new_tokens=30).tokens


def test_provenance_says_where_it_came_from(target, texts, tmp_path):
    train(objective(target, loss="jsd"), texts, settings(tmp_path, steps=4, evaluations=2, seed=9))
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["kind"] == "draft"
    assert record["options"] == {"k": K, "loss": "jsd"}
    assert record["data"] == {"digest": texts.digest, "from": "chance"}
    assert (record["seed"], record["tokens_seen"], record["steps_done"]) == (9, 4 * 8 * LENGTH, 4)
    assert [row["step"] for row in record["held_out_curve"]] == [0, 2, 4]
    assert {"torch", "transformers", "specdec", "python"} <= record["versions"].keys()
    assert json.loads((tmp_path / "config.json").read_text())["specdec_drafter"] == "model"


def test_the_best_weights_are_kept_and_a_stale_run_ends(target, texts, tmp_path):
    made = objective(target)
    start = checkpoint.snapshot(made.module)
    # Too high a rate: it only gets worse.
    report = train(made, texts, settings(tmp_path, lr=1.0, warmup=0.0, evaluations=20, patience=3))
    assert report.ended == "stale"
    assert report.best["step"] == 0
    assert report.steps == 6
    assert same({n: t for n, t in load_file(tmp_path / "model.safetensors").items()}, start)


def test_a_new_draft_begins_on_the_targets_strongest_directions(target):
    model = new_model(target, {**defaults(DraftObjective), "hidden": 16, "heads": 4, "kv_heads": 2})
    own, theirs = (m.get_input_embeddings().weight.detach().double() for m in (model, target))
    assert own.shape == theirs.shape
    # All sixteen directions fit, so all angles and lengths are kept, up to one factor.
    gram = own @ own.T
    torch.testing.assert_close(gram / gram.norm(), theirs @ theirs.T / (theirs @ theirs.T).norm(), rtol=1e-4, atol=1e-6)
    assert own.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)


def test_on_policy_rows_are_the_drafts_own(target):
    made = objective(target, on_policy=1.0)
    tokens, mask = rows(4, 5).tensors()
    mask[3, 2:] = False  # too short to be continued
    torch.manual_seed(0)
    new, new_mask = made.replace(tokens, mask)
    assert torch.equal(new[:, : LENGTH // 4], tokens[:, : LENGTH // 4])
    assert torch.equal(new[3], tokens[3])
    assert not torch.equal(new[:3], tokens[:3])
    assert new_mask[:3].all()
    assert made.module.training
    with torch.no_grad():
        logits = made.module(new).logits
    likelihood = [
        logits.log_softmax(-1)[:3, :-1].gather(2, t[:3, 1:, None])[:, LENGTH // 2 :].mean() for t in (new, tokens)
    ]
    assert likelihood[0] > likelihood[1] + 0.2
    assert torch.equal(objective(target).replace(tokens, mask)[0], tokens)


# ------------------------------------------------------------------ stopping and going on


class Interrupted(DraftObjective):
    """Somebody presses Ctrl-C in the middle of its sixth step."""

    calls = 0

    def loss(self, batch):
        self.calls += 1
        if self.calls == 6:
            signal.raise_signal(signal.SIGINT)
        return super().loss(batch)


@pytest.mark.parametrize("options", [{}, {"optimizer": "muon"}, {"accumulate": 2, "batch": 4}])
def test_an_interrupted_run_ends_with_the_very_same_weights(target, texts, tmp_path, options):
    whole, parted = (settings(tmp_path / name, steps=12, **options) for name in ("whole", "parted"))
    report = train(objective(target, on_policy=0.4), texts, whole)
    with pytest.raises(KeyboardInterrupt):
        train(objective(target, Interrupted, on_policy=0.4), texts, parted)
    folder = checkpoint.latest(parted.out)
    assert folder.name == f"checkpoint-{6 // whole.accumulate:08d}"
    torch.manual_seed(123)  # another process begins with other chance
    (parted.out / "checkpoint-00000099.partial").mkdir()  # somebody pulled the plug while writing
    resumed = train(objective(target, on_policy=0.4), texts, parted)
    assert same(weights(whole.out), weights(parted.out))
    assert same(load_file(whole.out / "model.safetensors"), load_file(parted.out / "model.safetensors"))
    assert untimed(report.curve) == untimed(resumed.curve)
    assert [path.name for path in parted.out.glob("checkpoint-*")] == ["checkpoint-00000012"]


def test_signals_are_left_as_they_were(target, texts, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(objective(target), texts, settings(tmp_path, steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_is_not_run_again(target, texts, tmp_path, monkeypatch):
    report = train(objective(target), texts, settings(tmp_path))
    monkeypatch.setattr(DraftObjective, "loss", None)
    again = train(objective(target), texts, settings(tmp_path))
    assert (again.curve, again.best, again.seconds) == (report.curve, report.best, report.seconds)


@pytest.mark.parametrize(
    ("changes", "options", "name"),
    [
        ({"lr": 1e-4}, {}, "lr"),
        ({"steps": 5}, {}, "steps"),
        ({}, {"loss": "rkl"}, "options"),
        ({"seed": 1}, {}, "seed"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(target, texts, tmp_path, changes, options, name):
    train(objective(target), texts, settings(tmp_path, steps=2))
    with pytest.raises(InputError, match=f"another {name}: "):
        train(objective(target, **options), texts, settings(tmp_path, **{"steps": 2, **changes}))


def test_other_data_or_another_target_is_refused_unless_restarted(target, texts, tmp_path):
    train(objective(target), texts, settings(tmp_path, steps=2))
    other = data.TrainingData(rows(200, 8), texts.held_out, {})
    with pytest.raises(InputError, match="another data"):
        train(objective(target), other, settings(tmp_path, steps=2))
    second = tiny("llama", dtype=torch.float32, seed=4)
    with pytest.raises(InputError, match="another target"):
        train(objective(second), texts, settings(tmp_path, steps=2))
    report = train(objective(second), texts, settings(tmp_path, steps=2, resume=False))
    assert report.steps == 2


def test_damaged_checkpoints_are_named(target, texts, tmp_path):
    train(objective(target), texts, settings(tmp_path, steps=2))
    folder = checkpoint.latest(tmp_path)
    (folder / "module.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be continued"):
        train(objective(target), texts, settings(tmp_path, steps=2))
    (folder / "state.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        train(objective(target), texts, settings(tmp_path, steps=2))


def test_minutes_end_a_run_too(target, texts, tmp_path):
    report = train(objective(target), texts, settings(tmp_path, steps=None, minutes=0.02))
    assert report.ended == "minutes"
    assert 1 <= report.seconds < 30
    assert len(report.curve) >= 2


# ------------------------------------------------------------------ what does not fit


def test_a_gradient_that_is_not_finite_stops_the_run(target, texts, tmp_path):
    made = objective(target)
    with torch.no_grad():
        made.module.model.norm.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="not finite"):
        train(made, texts, settings(tmp_path))


@pytest.mark.parametrize("capable", [True, False])
def test_precision_auto_is_what_the_processor_multiplies(target, texts, tmp_path, monkeypatch, capable):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    train(objective(target), texts, settings(tmp_path, steps=1, evaluations=1, precision="auto"))
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert record["precision"] == ("bf16" if capable else "fp32")


def test_bad_settings_are_refused(tmp_path):
    for changes, message in (
        ({"steps": None}, "how long"),
        ({"steps": 0}, "above 0"),
        ({"batch": -1}, "above 0"),
        ({"warmup": 1.0}, "below 1"),
        ({"optimizer": "sgd"}, "optimizer is one of adamw, muon"),
        ({"precision": "fp8"}, "precision is one of"),
        ({"judged_at": 2}, "judged_at is one of"),
    ):
        with pytest.raises(InputError, match=message):
            settings(tmp_path, **changes)


def test_bad_objectives_are_refused(target, texts, tmp_path):
    with pytest.raises(UnknownPluginError, match="did you mean 'draft'"):
        create("drft", target)
    with pytest.raises(InputError, match="no option 'shape'"):
        create(DraftObjective, target, shape=3)
    with pytest.raises(InputError, match="'fk'; there are"):
        create(DraftObjective, target, loss="fk")
    with pytest.raises(InputError, match="on-policy"):
        objective(target, on_policy=1.5)
    with pytest.raises(InputError, match="does not divide"):
        create(DraftObjective, target, hidden=30, heads=4)
    with pytest.raises(InputError, match="leave out --layers"):
        create(DraftObjective, target, init="somewhere", layers=2)
    with pytest.raises(IncompatiblePairError, match="64 tokens and the draft 65"):
        DraftObjective(target, None, tiny("llama", dtype=torch.float32, vocab_size=65))
    with pytest.raises(InputError, match="training mode"):
        train(objective(tiny("llama", dtype=torch.float32).train()), texts, settings(tmp_path))
    frozen = objective(target)
    frozen.module.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter"):
        train(frozen, texts, settings(tmp_path))


def test_the_learning_rate_rises_then_falls():
    values = [rate(i / 100, 0.1) for i in range(101)]
    assert values[0] == pytest.approx(0.02)
    assert values[10] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.02)
    assert values[:11] == sorted(values[:11])
    assert values[10:] == sorted(values[10:], reverse=True)


def test_muon_takes_inner_matrices_and_each_parameter_has_one_optimizer(target, tmp_path):
    module = objective(target).module
    muon, adamw = build_optimizers(module, settings(tmp_path, optimizer="muon"))
    names = {id(p): name for name, p in module.named_parameters()}
    taken = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (muon, adamw)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert all("proj" in name for name in taken[0])
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(taken[1])


def test_the_tokenizer_is_written_beside_the_weights(tmp_path):
    target = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB)
    made = DraftObjective(target, byte_tokenizer(), noisy(target, 0.1), k=K)
    train(made, data.TrainingData(rows(16, 1), rows(8, 2), {}), settings(tmp_path, steps=1))
    decoder = specdec.SpeculativeDecoder(target, tokenizer=byte_tokenizer(), drafter=str(tmp_path), backend="eager")
    assert decoder.generate("abc", max_new_tokens=4).stats.num_draft_tokens > 0
