"""AWQ and SmoothQuant: channels with outliers, and what the search may never do."""

from __future__ import annotations

import pytest
import torch

from specdec.errors import InputError
from specdec.kernels import packed
from specdec.quant import parse
from specdec.quant.methods.awq import Awq, clipped, output_error, search
from specdec.quant.methods.method import Linear, Stats, create
from specdec.quant.methods.smoothquant import SmoothQuant, migration


def outliers(tokens: int = 256, K: int = 128, size: float = 40.0) -> torch.Tensor:
    """A few channels are far larger than the rest, on all tokens."""
    x_TK = torch.randn(tokens, K, generator=torch.Generator().manual_seed(0))
    x_TK[:, [5, 40, 77]] *= size
    return x_TK


def weight(N: int = 48, K: int = 128, seed: int = 1) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def same(s_K):
    return s_K


def relative_error(x_TK, W, format, s_K) -> float:
    return output_error(Linear("layer", W, format), x_TK, s_K, x_TK @ W.t())


@pytest.mark.parametrize("name", ["int4", "int4-g128", "int4-asym"])
def test_awq_saves_the_channels_that_matter(name):
    x, layer = outliers(), Linear("layer", weight(), parse(name))
    s_K = search([layer], x.abs().mean(0), x, 20, same)
    assert s_K[[5, 40, 77]].min() > 2 * s_K.median()
    ones = torch.ones(128)
    assert relative_error(x, layer.weight_NK, layer.format, s_K) < 0.5 * relative_error(
        x, layer.weight_NK, layer.format, ones
    )


def test_the_search_finds_the_best_of_its_grid():
    """By trying all of it, for two layers that share an input."""
    x = outliers(size=6.0)
    layers = [Linear("a", weight(32), parse("int4")), Linear("b", 10 * weight(16, seed=3), parse("mxfp4"))]

    def total(s_K):
        return sum(relative_error(x, layer.weight_NK, layer.format, s_K) for layer in layers)

    found = search(layers, x.abs().mean(0), x, 8, same)
    errors = []
    for step in range(9):
        s_K = x.abs().mean(0) ** (step / 8)
        errors.append(total(s_K / (s_K.max() * s_K.min()).sqrt()))
    assert total(found) == pytest.approx(min(errors), rel=1e-5)
    assert total(found) <= total(torch.ones(128))


def test_scales_that_must_be_shared_are_shared():
    x, layer = outliers(), Linear("layer", weight(), parse("int4"))

    def pairs(s_K):
        return s_K.view(-1, 2).mean(1).repeat_interleave(2)

    s_K = search([layer], x.abs().mean(0), x, 10, pairs)
    assert torch.equal(s_K[::2], s_K[1::2])
    assert len(s_K.unique()) > 2


def test_a_channel_that_is_never_used_has_a_finite_scale():
    x = outliers()
    x[:, 9] = 0
    s_K = search([Linear("layer", weight(), parse("int4"))], x.abs().mean(0), x, 10, same)
    assert torch.isfinite(s_K).all()
    assert (s_K > 0).all()
    nothing = search([Linear("layer", weight(), parse("int4"))], 0 * x.abs().mean(0), 0 * x, 10, same)
    assert torch.equal(nothing, torch.ones(128))


@pytest.mark.parametrize("name", ["int4", "int4-g128-asym", "int8", "mxfp4", "mxfp6_e2m3"])
def test_cut_ranges_are_never_worse_for_any_group(name):
    """Output errors group by group, of all rows: what the cut is chosen by, computed from the outputs themselves."""
    format, W, x = parse(name), weight(), outliers(size=2.0)
    W[:, ::7] *= 4  # ranges that a few weights stretch
    size = min(format.group(128), 128)

    def errors(parts):
        off = (format.unpack(parts) - W).unflatten(1, (-1, size))
        return torch.einsum("tgi,ngi->tng", x.unflatten(1, (-1, size)), off).square().sum(0)

    cut, whole = errors(clipped(W, x, format)), errors(format.pack(W))
    assert (cut <= whole * (1 + 1e-4)).all()
    if name.startswith("int4"):
        assert cut.sum() < 0.97 * whole.sum()


def test_smoothquant_on_outlier_activations():
    """int8 rounds each row of activations by its largest: one outlier takes the resolution of all others."""
    x, W, format = outliers(), weight(), parse("int8")
    s_K = SmoothQuant().scales([Linear("a", W, format)], Stats(amax_K=x.abs().amax(0)), "norm", same)
    exact = x @ W.t()
    plain = (packed.reference(x, format, format.pack(W)) - exact).norm()
    smooth = (packed.reference(x / s_K, format, format.pack(W * s_K)) - exact).norm()
    assert smooth < 0.6 * plain


def test_migration_follows_the_paper():
    amax, W = torch.tensor([8.0, 2.0, 0.0]), [torch.tensor([[1.0, -4.0, 1.0]]), torch.tensor([[-2.0, 1.0, 1.0]])]
    torch.testing.assert_close(migration(amax, W, 0.5), torch.tensor([2.0, 0.5**0.5, 1.0]))
    torch.testing.assert_close(migration(amax, W, 1.0), torch.tensor([8.0, 2.0, 1.0]))
    torch.testing.assert_close(migration(amax, W, 0.0), torch.tensor([0.5, 0.25, 1.0]))
    assert SmoothQuant().scales([Linear("a", W[0], parse("int8"))], Stats(amax_K=amax), "linear", same) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smoothquant", {"alpha": 1.5}, "alpha is a number from 0 to 1"),
        ("awq", {"grid": 0}, "grid is a number from 1"),
        ("awq", {"rounding": "up"}, "'rtn' or 'gptq', not 'up'"),
        ("gptq", {"damping": "much"}, "damping is a number"),
        ("gptq", {"dampening": 0.1}, "no option 'dampening'; did you mean 'damping'"),
        ("rtn", {"grid": 3}, "it has none"),
        ("awk", {}, "no method is called 'awk'; did you mean 'awq'"),
    ],
)
def test_options_that_are_wrong(name, options, message):
    with pytest.raises(InputError, match=message):
        create(name, options)


def test_formats_that_a_method_cannot_work_on():
    formats = {"up_proj": parse("int4"), "lm_head": parse("sparse")}
    with pytest.raises(InputError, match=r"int4, sparse rounds weights alone"):
        SmoothQuant().check(formats)
    with pytest.raises(InputError, match=r"sparse has none \(lm_head\)"):
        Awq(rounding="gptq").check(formats)
    with pytest.raises(InputError, match=r"int4 drops none \(up_proj\)"):
        create("wanda").check(formats)
    mixed = {**formats, "down_proj": parse("int8")}
    SmoothQuant().check(mixed)
    layers = [Linear(name, weight(), format) for name, format in mixed.items()]
    assert SmoothQuant().scales(layers, Stats(amax_K=torch.ones(128)), "norm", same) is None
