"""Formats whose products round activations too: names, storage, sums, and that no row depends on another."""

import pytest
import torch

from specdec.errors import InputError
from specdec.kernels import packed
from specdec.quant import parse
from specdec.quant.rows import RowsRounded

NAMES = ["int4-a8", "int4-g64-a8", "int4-g128-asym-a8", "mxfp4-a8", "mxfp4-rceil-a8"]


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 640, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_stored_like_the_format_without_the_option(name: str) -> None:
    format, inner = parse(name), parse(name.removesuffix("-a8"))
    assert format.name == name
    assert parse(format.name) == format != inner
    parts, plain = format.pack(weights()), inner.pack(weights())
    assert all(torch.equal(parts[part], plain[part]) for part in plain)
    assert torch.equal(format.unpack(parts), inner.unpack(plain))
    assert format.bits() == inner.bits()


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_the_weights(name: str) -> None:
    format = parse(name)
    assert isinstance(format, RowsRounded)
    parts = format.pack(weights())
    numbers, scales, unit = format.whole_numbers(parts)
    assert numbers.dtype == torch.int8
    assert torch.equal(numbers.float() * scales.repeat_interleave(32, 1) * unit, format.unpack(parts))


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_rounded_rows(name: str) -> None:
    format, x = parse(name), torch.randn(9, 640, generator=torch.Generator().manual_seed(3))
    parts = format.pack(weights())
    codes, scales = packed.rounded_rows(x)
    exact = (codes.double() * scales) @ format.unpack(parts).double().t()
    got = packed.linear(x, format, parts)
    assert (got - exact).abs().max() <= 2e-6 * exact.abs().max()
    unrounded = x.double() @ format.unpack(parts).double().t()
    assert (got - unrounded).abs().max() > 1e-4 * exact.abs().max()  # rounding is there to be seen
    for i in range(9):
        assert torch.equal(packed.linear(x[i], format, parts), got[i])


@pytest.mark.parametrize("name", ["int8-a8", "mxfp8_e4m3-a8", "sparse-a8", "mxfp6_e2m3-a8", "int4-a8-g64", "a8"])
def test_other_formats_have_no_such_option(name: str) -> None:
    with pytest.raises(InputError, match="no weight format"):
        parse(name)
