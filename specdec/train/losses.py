"""What is minimised: how far the draft's distribution q is from the target's p, position by position.

Shape suffixes: N positions, V vocabulary, R draft vocabulary, H hidden width.

| name | per position | reference |
|---|---|---|
| `fkl` | sum p log(p/q): covers all of p | DistillSpec, arXiv 2310.08461 |
| `rkl` | sum q log(q/p): seeks p's modes | DistillSpec |
| `jsd` | the mean of both KL to (p + q)/2; bounded by log 2 | DistillSpec |
| `tv` | 1 - sum min(p, q): the rejection rate itself; weak gradients while p and q hardly overlap | DistillSpec |
| `nla` | -log sum min(p, q): its gradient is that of `tv` divided by the overlap | arXiv 2602.23881 |
| `lk` | w fkl + (1 - w) tv, w = exp(-3 overlap): from one to the other as the draft gets better | arXiv 2602.23881 |
| `ce` | -log q(argmax p): greedy agreement only | |

Each is one pass with its gradient in closed form: one `[N, V]` tensor is kept for the backward, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specdec.errors import InputError

_ETA = 3.0
# Elements of logits that exist at once while a loss is computed in pieces: 256 MiB in float32.
_PIECE = 1 << 26
_BLOCK = 1 << 17

Formula = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _through_softmax(q_NV: Tensor, slope_NV: Tensor) -> Tensor:
    """The gradient by q's logits, from the one by q's probabilities."""
    return q_NV * (slope_NV - (q_NV * slope_NV).sum(-1, keepdim=True))


def _log(p_NV: Tensor) -> Tensor:
    # A target's filtered token has p = 0; its logarithm stays finite so that the reverse KL does.
    return p_NV.clamp_min(torch.finfo(p_NV.dtype).tiny).log()


def _fkl(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    return (p_NV * (_log(p_NV) - log_q_NV)).sum(-1), log_q_NV.exp() - p_NV


def _rkl(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV, ratio_NV = log_q_NV.exp(), log_q_NV - _log(p_NV)
    return (q_NV * ratio_NV).sum(-1), _through_softmax(q_NV, ratio_NV)


def _jsd(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV = log_q_NV.exp()
    log_m_NV = _log((p_NV + q_NV) / 2)
    to_q_NV = log_q_NV - log_m_NV
    value_N = (p_NV * (_log(p_NV) - log_m_NV) + q_NV * to_q_NV).sum(-1) / 2
    return value_N, _through_softmax(q_NV, to_q_NV / 2)


def _tv(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV = log_q_NV.exp()
    return 1 - torch.minimum(p_NV, q_NV).sum(-1), _through_softmax(q_NV, -(q_NV < p_NV).to(q_NV.dtype))


def _nla(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    miss_N, slope_NV = _tv(p_NV, log_q_NV)
    overlap_N = (1 - miss_N).clamp_min(torch.finfo(p_NV.dtype).eps)
    return -overlap_N.log(), slope_NV / overlap_N[:, None]


def _lk(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    (kl_N, by_kl_NV), (miss_N, by_miss_NV) = _fkl(p_NV, log_q_NV), _tv(p_NV, log_q_NV)
    w_N = torch.exp(-_ETA * (1 - miss_N))  # a constant for the gradient
    return w_N * kl_N + (1 - w_N) * miss_N, torch.lerp(by_miss_NV, by_kl_NV, w_N[:, None])


def _ce(p_NV: Tensor, log_q_NV: Tensor) -> tuple[Tensor, Tensor]:
    best_N1 = p_NV.argmax(-1, keepdim=True)
    slope_NV = log_q_NV.exp()
    slope_NV.scatter_add_(-1, best_N1, slope_NV.new_full(best_N1.shape, -1.0))
    return -log_q_NV.gather(-1, best_N1)[:, 0], slope_NV


LOSSES: dict[str, Formula] = {
    "fkl": _fkl, "rkl": _rkl, "jsd": _jsd, "tv": _tv, "nla": _nla, "lk": _lk, "ce": _ce,
}  # fmt: skip


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p_NV: Tensor, q_logits_NV: Tensor, formula: Formula) -> Tensor:
        # Half-precision logits are compared in float32; the gradient goes back in their own dtype.
        dtype = torch.float64 if q_logits_NV.dtype == torch.float64 else torch.float32
        slope_NV = torch.empty_like(q_logits_NV) if ctx.needs_input_grad[1] else None
        values, at = [], 0
        # Blocks of rows that fit into a core's cache: each formula passes over them some ten times.
        size = max(1, (_BLOCK if q_logits_NV.device.type == "cpu" else _PIECE) // q_logits_NV.shape[1])
        for p_block, q_block in zip(p_NV.split(size), q_logits_NV.split(size), strict=True):
            value, slope = formula(p_block.to(dtype), q_block.to(dtype).log_softmax(-1))
            values.append(value)
            if slope_NV is not None:
                slope_NV[at : at + len(slope)] = slope
            at += len(slope)
        if slope_NV is not None:
            ctx.save_for_backward(slope_NV)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (slope_NV,) = ctx.saved_tensors
        return None, slope_NV * gradients[0][:, None].to(slope_NV.dtype), None


def check_loss(name: str) -> str:
    """`name`, if there is such a loss; else `InputError`."""
    if name not in LOSSES:
        raise InputError(f"no loss is called {name!r}; there are: {', '.join(LOSSES)}")
    return name


def divergence(name: str, p_NV: Tensor, q_logits_NV: Tensor) -> Tensor:
    """`[N]` losses in float32 (float64 from float64), differentiable by `q_logits_NV`.

    `p_NV`: the target's probabilities, rows sum to 1. `q_logits_NV`: the draft's raw logits over the same tokens.
    Raises `InputError` for an unknown name or different shapes.
    """
    if p_NV.shape != q_logits_NV.shape:
        raise InputError(f"target and draft have different shapes: {list(p_NV.shape)} and {list(q_logits_NV.shape)}")
    value: Tensor = _Divergence.apply(p_NV, q_logits_NV, LOSSES[check_loss(name)])  # type: ignore[no-untyped-call]
    return value


def restrict(p_NV: Tensor, ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """The target's distribution within a draft vocabulary, `[N, R]`, and the mass that lay there, `[N]`.

    What is lost, 1 - mass, is lost acceptance: report it. A row without any mass there becomes uniform.
    """
    inside_NR = p_NV[:, ids_R]
    mass_N = inside_NR.sum(-1)
    within = inside_NR / mass_N[:, None]
    return torch.where(mass_N[:, None] > 0, within, torch.full_like(within, 1 / len(ids_R))), mass_N


@torch.no_grad()
def overlap(p_NV: Tensor, q_logits_NR: Tensor, ids_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`[N]` sum min(p, q), and `[N]` 1.0 where both have the same most probable token: what `acceptance` reports.

    `ids_R`: the tokens of the draft's columns where it has a vocabulary of its own; the others have q = 0.
    """
    q_NR = q_logits_NR.to(p_NV.dtype).softmax(-1)
    inside_NR, best_N = (p_NV, q_NR.argmax(-1)) if ids_R is None else (p_NV[:, ids_R], ids_R[q_NR.argmax(-1)])
    return torch.minimum(inside_NR, q_NR).sum(-1), (p_NV.argmax(-1) == best_N).to(p_NV.dtype)


def in_pieces(compute: Callable[..., Any], vocab_size: int, *tensors: Tensor) -> list[Any]:
    """`compute(*pieces)` over pieces of the first axis, so small that their `[n, V]` logits fit in a few hundred MiB.

    With gradients, and only if there is more than one piece, what a piece computed is forgotten and computed again in
    the backward: pass the hidden states `[N, H]` and let `compute` apply the output head.
    """
    count = max(1, _PIECE // vocab_size)
    pieces = list(zip(*(tensor.split(count) for tensor in tensors), strict=True))
    if len(pieces) == 1 or not torch.is_grad_enabled():
        return [compute(*piece) for piece in pieces]
    return [checkpoint(compute, *piece, use_reentrant=False) for piece in pieces]
