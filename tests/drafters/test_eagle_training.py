"""Training of EAGLE heads: the same computation as drafting, the losses written out, and files that can be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_eagle
import tiny_models
import torch
from specdec.drafters import EagleDrafter

import specdec
from specdec.errors import InputError
from specdec.formats import eagle as files
from specdec.models.eagle import OWN
from specdec.policy import Fixed
from specdec.runtime.session import Session
from specdec.train import provenance
from specdec.train.data import Rows, TrainingData
from specdec.train.eagle import EagleObjective, frequent_ids
from specdec.train.objective import create
from specdec.train.settings import Settings
from specdec.train.trainer import look, train
from specdec.train.unroll import unroll
from specdec.tree import TokenTree

K = 4
SHAPES = {
    "eagle-3": {"draft_vocab_size": 48, "norm_output": True, "fc_norm": True},
    "eagle-3-original": {"draft_vocab_size": 48},
    "eagle-3-grouped": {"num_attention_heads": 4, "num_key_value_heads": 1, "layer_kind": "qwen3"},
    "eagle-1": {"eagle_version": 1, "target_layer_ids": [2], "own_head": False},
}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("llama")


def rows(count: int, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def batch_of(target: Any, tokens: torch.Tensor, hidden: tuple[int, ...], mask: torch.Tensor | None = None) -> Any:
    return look(target, tokens, torch.ones_like(tokens).bool() if mask is None else mask, hidden)


@pytest.mark.parametrize("shape", SHAPES)
def test_unrolled_steps_are_what_the_drafter_computes(shape: str, target: Any) -> None:
    head = tiny_eagle.head(target, **SHAPES[shape])
    tokens = rows(2)
    batch = batch_of(target, tokens, tuple(set(head.config.hidden)))
    features = head.fuse(torch.cat([batch.hidden[i] for i in head.config.hidden], -1))
    steps = unroll(head, tokens, features, K)
    backend = EagleDrafter(head, "eager")._backend
    for row in range(2):
        for start in (0, 3, tokens.shape[1] - K - 1):
            session = Session(backend.fork(0), hidden=(OWN,))
            session.append(tokens[row, 1 : start + 2].tolist(), features[row, : start + 1])
            said = session.forward()
            chain = TokenTree.empty()
            for j in range(K):
                torch.testing.assert_close(steps[j][0][row, start], said.logits[-1], rtol=0, atol=1e-9)
                torch.testing.assert_close(steps[j][1][row, start], said.hidden[-1], rtol=0, atol=1e-9)
                if j + 1 < K:
                    chain = chain.extend(tokens[row, start + 2 + j : start + 3 + j], [j - 1])
                    said = session.forward(chain, said.hidden[-1:])


def objective(target: Any, **options: Any) -> EagleObjective:
    torch.manual_seed(0)
    made = create(EagleObjective, target, None, **{"unroll": 3, "k": 3, **options})
    assert isinstance(made, EagleObjective)
    return made


def test_the_loss_is_the_weighted_cross_entropy_within_the_draft_vocabulary(target: Any) -> None:
    made = objective(target, draft_vocab=40)
    tokens = rows(3)
    made.begin(tokens.numpy())
    mask = torch.ones_like(tokens).bool()
    mask[0, 20:] = False
    batch = batch_of(target, tokens, made.hidden, mask)
    ids = made.head.draft_ids.tolist()
    made.module.eval()
    total = weights = 0.0
    states = torch.cat([batch.hidden[i] for i in made.head.config.hidden], -1)
    for j, (logits, _) in enumerate(unroll(made.head, tokens, made.head.fuse(states), 3)):
        values = []
        for row in range(3):
            for start in range(tokens.shape[1] - 3):
                truth = batch.logits_BLV[row, start + 1 + j].double()
                if not mask[row, start + 1 : start + 4].all() or int(truth.argmax()) not in ids:
                    continue
                p, log_q = truth[ids].softmax(-1), logits[row, start].double().log_softmax(-1)
                values.append((p * (p.log() - log_q)).sum())
        total, weights = total + 0.8**j * torch.stack(values).mean(), weights + 0.8**j
    torch.testing.assert_close(made.loss(batch).loss.double(), total / weights, rtol=1e-5, atol=1e-6)


def test_eagle_1_regresses_to_the_targets_next_state(target: Any) -> None:
    made = objective(target, eagle=1, unroll=1)
    made.module.eval()
    tokens = rows(3)
    batch = batch_of(target, tokens, made.hidden)
    (logits, own), *_ = unroll(made.head, tokens, batch.hidden[2].float(), 1)
    near = torch.nn.functional.smooth_l1_loss(own, batch.hidden[2][:, 1:].float())
    p = batch.logits_BLV[:, 1:].softmax(-1)
    kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(made.loss(batch).loss, (near + 0.1 * kl).to(torch.float32), rtol=1e-4, atol=1e-5)
    made.module.train()
    assert made.loss(batch).loss != made.loss(batch).loss  # noise on the features


def test_gradients_reach_all_that_is_the_heads_own_and_nothing_else(target: Any) -> None:
    for options in ({}, {"head": "target"}, {"eagle": 1}):
        made = objective(target, **options)
        made.loss(batch_of(target, rows(3), made.hidden)).loss.backward()
        missing = [name for name, p in made.module.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert all(p.grad is None for p in target.parameters())
        trained = {name.removeprefix("head.") for name, p in made.module.named_parameters() if p.requires_grad}
        assert "embed_tokens.weight" not in trained
        assert ("lm_head.weight" in trained) == (options == {})
        assert not any(name.startswith("embed") for name in made.module.state_dict())


def test_acceptance_is_what_drafting_from_every_start_gives(target: Any) -> None:
    made = objective(target, draft_vocab=40)
    tokens = rows(2, 12)
    made.begin(tokens.numpy())
    made.module.eval()
    mask = torch.ones_like(tokens).bool()
    mask[1, 9:] = False
    batch = batch_of(target, tokens, made.hidden, mask)
    overlap, agree = made.acceptance(batch)
    states = torch.cat([batch.hidden[i] for i in made.head.config.hidden], -1)
    expected = []
    for row in range(2):
        features = made.head.fuse(states[row : row + 1])
        for start in range(12 - 3):
            if not mask[row, start + 1 : start + 4].all():
                continue
            line = []
            for j, (logits, _) in enumerate(unroll(made.head, tokens[row : row + 1], features, 3)):
                q = torch.zeros(tiny_models.VOCAB).index_copy_(0, made.head.draft_ids, logits[0, start].softmax(-1))
                p = batch.logits_BLV[row, start + 1 + j].softmax(-1)
                line.append((torch.minimum(p, q).sum().item(), float(p.argmax() == q.argmax())))
            expected.append(line)
    both = torch.tensor(expected)
    torch.testing.assert_close(overlap.float(), both[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agree.float(), both[..., 1])


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    found = frequent_ids(np.array([[5, 5, 5, 2], [2, 9, 1, 5]]), 12, 4, {11})
    assert found.tolist() == [1, 2, 5, 11]


def data(target: Any) -> TrainingData:
    made = [PROMPT + tiny_models.reference(target, PROMPT, 24, seed=i, temperature=0.5) for i in range(10)]
    tokens = np.array(made, dtype=np.int32)
    return TrainingData(Rows.full(tokens[:8]), Rows.full(tokens[8:]), {})


PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


@pytest.mark.parametrize("options", [{"draft_vocab": 48}, {"head": "target", "draft_vocab": 48}, {"eagle": 1}])
def test_what_was_trained_drafts_from_its_folder(options: dict[str, Any], target: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = create(EagleObjective, target, None, **{"unroll": 3, "k": 3, **options})
    settings = Settings(out=tmp_path, steps=150, batch=4, lr=0.02, evaluations=3, patience=0, judged_at=0)
    report = train(made, data(target), settings)
    assert report.best["expected_length_t0"] > report.curve[0]["expected_length_t0"] + 0.15
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["specdec_drafter"] == "eagle"
    assert provenance.read(tmp_path)["kind"] == "eagle"
    decoder = specdec.SpeculativeDecoder(target, drafter=str(tmp_path), policy=Fixed(3))
    assert isinstance(decoder.drafter, EagleDrafter)
    out = decoder.generate(PROMPT, max_new_tokens=24, strict=True)
    assert out.tokens == tiny_models.reference(target, PROMPT, 24)
    assert out.stats.mean_acceptance_length > 1.1
    sizes = files.read(tmp_path)
    assert ("lm_head.weight" in sizes.tensors) == (options.get("head") != "target" and "eagle" not in options)
    if options == {"draft_vocab": 48}:
        (tmp_path / "again").mkdir()
        EagleObjective.export(tmp_path, tmp_path / "again", "speculators")
        again = specdec.SpeculativeDecoder(target, drafter=str(tmp_path / "again"), policy=Fixed(3))
        rounds = again.generate(PROMPT, max_new_tokens=24, strict=True).trace.rounds
        assert [r.num_accepted for r in rounds] == [r.num_accepted for r in out.trace.rounds]
    else:
        with pytest.raises(InputError, match=r"EAGLE-1 head|predicts with its target's own head"):
            EagleObjective.export(tmp_path, tmp_path, "speculators")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "--heads 3 does not divide"),
        ({"draft_vocab": 65}, "--draft-vocab is between 2 and the target's 64"),
        ({"read": (1, 9)}, "--read names hidden states 0 to 2"),
        ({"unroll": 0}, "numbers of steps >= 1"),
        ({"loss": "mse"}, "no loss is called 'mse'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, target: Any) -> None:
    with pytest.raises(InputError, match=message):
        objective(target, **options)


def test_rows_that_are_too_short_say_so(target: Any) -> None:
    made = objective(target, unroll=6)
    with pytest.raises(InputError, match=r"raise --length"):
        made.loss(batch_of(target, rows(1, 5), made.hidden))
