"""Losses beside their textbook formulas in float64, and their gradients beside autograd's of those formulas."""

from __future__ import annotations

import pytest
import torch

from specdec.errors import InputError
from specdec.train import losses

N, V = 7, 12


def plain(name, p, z):
    """The formulas of the docstring as they stand there; `z` are the draft's logits."""
    q = z.softmax(-1)
    overlap = torch.minimum(p, q).sum(-1)
    m = (p + q) / 2
    kl = {"fkl": (p * (p / q).log()).sum(-1), "rkl": (q * (q / p).log()).sum(-1)}
    w = torch.exp(-3 * overlap.detach())
    return {
        **kl,
        "jsd": 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "nla": -overlap.log(),
        "lk": w * kl["fkl"] + (1 - w) * (1 - overlap),
        "ce": -q.gather(-1, p.argmax(-1, keepdim=True))[:, 0].log(),
    }[name]


@pytest.fixture
def pq():
    torch.manual_seed(3)
    p = (2 * torch.randn(N, V, dtype=torch.float64)).softmax(-1)
    return p, 2 * torch.randn(N, V, dtype=torch.float64)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_values_and_gradients_are_those_of_the_formula(name, pq):
    p, z = pq
    weights = torch.rand(N, dtype=torch.float64)
    results = []
    for function in (plain, losses.divergence):
        logits = z.clone().requires_grad_()
        value = function(name, p, logits)
        (value * weights).sum().backward()
        results.append((value.detach(), logits.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_small_steps_reach_the_target(name, pq):
    p, z = pq
    logits = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    before = losses.overlap(p, logits)[0].mean()
    for _ in range(400):
        optimizer.zero_grad()
        losses.divergence(name, p, logits).sum().backward()
        optimizer.step()
    after, agree = losses.overlap(p, logits.detach())
    assert agree.mean() == 1
    assert after.mean() > (before if name == "ce" else 0.97)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_half_precision_logits_and_filtered_targets_stay_finite(name, pq):
    p, z = pq
    p = torch.where(p < 0.02, 0.0, p)
    p = (p / p.sum(-1, keepdim=True)).float()
    logits = (20 * z).bfloat16().requires_grad_()
    value = losses.divergence(name, p, logits)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


def test_a_draft_vocabulary_reports_what_it_loses(pq):
    p, z = pq
    ids = torch.tensor([1, 4, 5, 9])
    within, mass = losses.restrict(p, ids)
    torch.testing.assert_close(within.sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(within * mass[:, None], p[:, ids])
    whole = torch.full_like(z, -torch.inf)
    whole[:, ids] = z[:, ids]
    torch.testing.assert_close(losses.overlap(p, z[:, ids], ids), losses.overlap(p, whole))
    assert (losses.overlap(p, z[:, ids], ids)[0] <= mass + 1e-12).all()
    nothing = torch.zeros(2, V, dtype=torch.float64)
    assert losses.restrict(nothing, ids)[0].eq(0.25).all()


def test_pieces_give_the_same_value_and_gradient(pq, monkeypatch):
    p, _ = pq
    states = torch.randn(N, 5, dtype=torch.float64)
    head = torch.randn(V, 5, dtype=torch.float64)
    calls, results = [], []

    for size in (1 << 26, 2 * V):
        monkeypatch.setattr(losses, "_PIECE", size)
        weight = head.clone().requires_grad_()

        def compute(piece, p_piece, weight=weight):
            calls.append(len(piece))
            return losses.divergence("lk", p_piece, piece @ weight.T)

        value = torch.cat(losses.in_pieces(compute, V, states, p))
        value.sum().backward()
        results.append((value.detach(), weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert calls[:5] == [7, 2, 2, 2, 1]
    assert len(calls) == 9  # each of the four pieces again in the backward


def test_what_cannot_be_is_refused(pq):
    p, z = pq
    with pytest.raises(InputError, match=r"'fk'; there are: fkl"):
        losses.divergence("fk", p, z)
    with pytest.raises(InputError, match="different shapes"):
        losses.divergence("fkl", p, z[:, :3])
