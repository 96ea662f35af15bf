"""GPTQ against brute force, against rounding to nearest, and against its own recurrence written out slowly."""

from __future__ import annotations

import itertools

import pytest
import torch

from specdec.errors import InputError
from specdec.quant import parse
from specdec.quant.methods.gptq import inverse_factor, quantise

GRIDS = ["int8", "int4", "int4-asym", "int4-g64", "mxfp8_e4m3", "mxint8", "mxfp6_e2m3", "mxfp4"]


def correlated(K: int, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Rows whose channels follow a few hidden ones."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(max(2, K // 8), K, generator=generator, dtype=torch.float64)
    hidden = torch.randn(tokens, max(2, K // 8), generator=generator, dtype=torch.float64)
    return hidden @ mix + 0.1 * torch.randn(tokens, K, generator=generator, dtype=torch.float64)


def hessian(x_TK: torch.Tensor) -> torch.Tensor:
    return 2 * x_TK.t() @ x_TK / len(x_TK)


def weight(N: int, K: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(format, parts, weight_NK, H) -> float:
    off = format.unpack(parts).double() - weight_NK
    return float(((off @ H) * off).sum())


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
def test_less_error_than_rounding_to_nearest(name, act_order):
    format, W, H = parse(name), weight(24, 192), hessian(correlated(192))
    found = error(format, quantise(W, H, format, act_order=act_order), W, H)
    nearest = error(format, format.pack(W), W, H)
    assert found < 0.8 * nearest


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
def test_without_correlations_it_rounds_to_nearest(name, act_order):
    """A diagonal Hessian passes nothing on, so the parts are those of `pack`, bit for bit."""
    format, W = parse(name), weight(8, 192).float()
    H = torch.diag(torch.rand(192, generator=torch.Generator().manual_seed(2)) + 0.1)
    for mine, wanted in ((quantise(W, H, format, act_order=act_order), format.pack(W)),):
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[part], wanted[part]) for part in wanted)


def slow(W, H, format, damping=0.01):
    """One column at a time, the inverse Hessian of what is left formed anew for each; no blocks, no factor."""
    W, H = W.clone(), H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    K, group = W.shape[1], format.group(W.shape[1])
    points = torch.empty_like(W)
    fitted = []
    for j in range(K):
        if j % group == 0:
            fitted.append(format.fit(W[:, j : j + group].contiguous()))
        points[:, j] = format.nearest(W[:, j : j + 1], fitted[-1])[:, 0]
        inverse = torch.linalg.inv(H[j:, j:])
        W[:, j:] -= ((W[:, j] - points[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return points


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64-asym", "int4-g128", "mxfp4", "mxfp6_e2m3"])
def test_the_recurrence_written_out(name):
    """K passes the width of a block of columns, so that errors go on between blocks too."""
    format, W, H = parse(name), weight(5, 256), hessian(correlated(256, 1024))
    assert torch.equal(format.unpack(quantise(W, H, format)).double(), slow(W, H, format))


def test_brute_force_on_tiny_problems():
    """Two columns matter: of all pairs of grid points the best is found, or nearly: and never is nearest better."""
    format = parse("int8")
    wins = 0
    for seed in range(20):
        W, H = weight(1, 2, seed), hessian(correlated(2, 64, seed))
        W[0, 0] = 1.0  # the scale
        grid = {"scales": torch.tensor([0.25])}  # coarse: five points a side matter
        format_fit, format.fit = format.fit, lambda weight_NK, grid=grid: grid
        try:
            parts = quantise(W, H, format, damping=0.0)
        finally:
            format.fit = format_fit
        mine = error(format, parts, W, H)
        nearest = error(format, {"codes": format.encode(W, grid), **grid}, W, H)
        off = torch.tensor(list(itertools.product(range(-20, 21), repeat=2))) * 0.25 - W
        best = float(((off @ H) * off).sum(1).min())
        assert best - 1e-12 <= mine <= nearest + 1e-12
        wins += mine <= best + 1e-12
    assert wins >= 12


def test_the_factor_of_the_inverse():
    H = hessian(correlated(40))
    upper = inverse_factor(H, 0.05)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(40, dtype=H.dtype)
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(damped))
    assert torch.equal(upper, upper.triu())


def test_inputs_that_were_never_used_are_rounded_to_nearest():
    format, W, x = parse("int4"), weight(6, 64), correlated(64)
    x[:, [3, 40]] = 0
    found = format.unpack(quantise(W, hessian(x), format, act_order=True))
    assert torch.equal(found[:, [3, 40]], format.unpack(format.pack(W))[:, [3, 40]])


def test_a_singular_hessian_is_damped_until_it_is_not():
    x = correlated(64, 3)
    parts = quantise(weight(4, 64), hessian(x), parse("int4"), damping=0.0)
    assert torch.isfinite(parse("int4").unpack(parts)).all()


def test_bad_input():
    format, W = parse("int4"), weight(4, 64)
    H = hessian(correlated(64))
    with pytest.raises(InputError, match="NaN or infinite"):
        quantise(W.index_fill(1, torch.tensor([2]), torch.nan), H, format)
    with pytest.raises(InputError, match="Hessian of the calibration text is not finite"):
        quantise(W, H * torch.nan, format)
    with pytest.raises(InputError, match="stays singular"):
        quantise(W, torch.eye(64) + 1e9 * (1 - torch.eye(64)), format)
    with pytest.raises(InputError, match="groups of 32"):
        quantise(W[:, :40], H[:40, :40], format)
