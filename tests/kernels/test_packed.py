"""Products with stored weights have the bits of the product with the unpacked matrix, in every format and variant."""

import math

import pytest
import torch

from specdec.errors import InputError
from specdec.kernels import ops, packed
from specdec.quant import Format, PackedLinear, parse
from specdec.quant.bits import pack_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ROWS = ["int4-a8", "int4-asym-a8", "int4-g64-a8", "int4-g128-asym-a8", "mxfp4-a8", "mxfp4-rceil-a8"]
OPTIONS = [*ROWS, "int4-g64", "int4-g128-asym", "int4-asym", "mxfp4-rceil", "sparse-2x4", "sparse-95"]
NAMES = [*packed._KINDS, "int8", *OPTIONS]  # tests of other things register formats of their own
# (outputs, inputs): fewer than a tile, no multiple of one, and longer than the pieces that are decoded at a time.
SIZES = [(1, 128), (5, 2176), (67, 384), (50, 1152)]


def weights(outputs: int, inputs: int, spread: float = 2.0) -> torch.Tensor:
    noise = torch.Generator().manual_seed(outputs * 31 + inputs)
    sizes = torch.logspace(-spread, spread, outputs)[:, None]
    return torch.randn(outputs, inputs, generator=noise) * sizes


def rows(count: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count)).to(dtype)


def expected(x: torch.Tensor, format: Format, parts: dict[str, torch.Tensor], bias: torch.Tensor) -> torch.Tensor:
    """What the product is defined to be, by other kernels."""
    if format.name == "int8":
        return packed.int8_reference(x, parts["codes"], parts["scales"], bias)
    if format.rounds_rows:
        return packed.reference(x, format, parts, bias)
    return ops.linear(x, format.unpack(parts, x.dtype), bias)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_the_product_with_the_unpacked_matrix(name: str, dtype: torch.dtype, variant: str) -> None:
    format = parse(name)
    for outputs, inputs in SIZES:
        parts = format.pack(weights(outputs, inputs))
        bias, x = rows(1, outputs, dtype)[0], rows(64, inputs, dtype)
        want = expected(x, format, parts, bias)
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64):
            assert torch.equal(packed.linear(x[:count], format, parts, bias), want[:count]), (outputs, inputs, count)
        assert torch.equal(
            packed.linear(x[7], format, parts), expected(x[7:8], format, parts, torch.zeros_like(bias))[0]
        )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(9, 768), (4, 512), (6, 896), (3, 7168)])
def test_ends_of_rows_and_of_outputs(name: str, outputs: int, inputs: int, variant: str) -> None:
    """Halves of what is summed at once, with and without anything before them; more rows than stay in a near cache."""
    format = parse(name)
    parts = format.pack(weights(outputs, inputs))
    x = rows(14, inputs, torch.float32)
    want = packed.reference(x, format, parts)
    for count in (1, 3, 4, 7, 8, 14):
        assert torch.equal(packed.linear(x[:count], format, parts), want[:count]), count


@pytest.mark.parametrize("name", ROWS)
def test_largest_sums_and_every_scale(name: str, variant: str) -> None:
    format = parse(name)
    parts = format.pack(weights(16, 768))
    parts["codes"][:8] = torch.tensor([0x00, 0x77, 0x88, 0xFF, 0x0F, 0xF0, 0x7F, 0xE7], dtype=torch.uint8)[:, None]
    if name.startswith("mxfp4"):
        parts["scales"] = torch.arange(16 * 24, dtype=torch.int32).view(16, 24).remainder(256).to(torch.uint8)
    if "zeros" in parts:
        parts["zeros"][::2], parts["zeros"][1::2] = 0, 15
    x = torch.full((3, 768), 127.0)
    x[1], x[2, ::2] = -127.0, -127.0
    got, want = packed.linear(x, format, parts), packed.reference(x, format, parts)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert want.isnan().any() == name.startswith("mxfp4")  # a scale of 255 is no number


@pytest.mark.parametrize("name", NAMES)
def test_wide_exponents_and_odd_codes(name: str, variant: str) -> None:
    format = parse(name)
    if format.rounds_rows:
        pytest.skip("rows of such exponents have no digits left in int8; the other tests compare with the same rows")
    weight = weights(40, 256, spread=36.0)  # from where products are subnormal to where they nearly overflow
    parts = format.pack(weight)
    for dtype in DTYPES:
        one = torch.eye(256, dtype=dtype)
        got, want = packed.linear(one, format, parts), format.unpack(parts, dtype).t()
        if dtype == torch.bfloat16:  # the instruction for products of pairs takes subnormal numbers as zero
            want = torch.where(want.abs() < 2.0**-126, ops.linear(one, want.t().contiguous()), want)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8"])
def test_every_code_under_every_scale(name: str, variant: str) -> None:
    format = parse(name)
    codes = 1 << (format.parts(1, 32)["codes"].shape[1] // 4)
    every = torch.arange(256, dtype=torch.uint8)
    row = torch.arange(max(codes, 32)) % codes
    inputs = len(row)
    parts = {
        "codes": pack_bits(row.to(torch.uint8)[None], int(math.log2(codes))).expand(256, -1).contiguous(),
        "scales": every[:, None].expand(256, inputs // 32).contiguous(),
    }
    one = torch.eye(inputs)
    got, want = packed.linear(one, format, parts), format.unpack(parts).t()
    finite = torch.isfinite(want).all(0)  # a product of a number that is none with zero is none: whole outputs drop out
    assert torch.equal(got[:, finite], want[:, finite])
    assert not torch.isfinite(got[:, ~finite]).all(0).any()
    assert finite.sum() > (64 if name.startswith("mxfp8") else 200) or not torch.isfinite(want[:, 127]).all()


@pytest.mark.parametrize("name", ["mxfp4", "int8", "int4", "sparse"])
def test_rows_that_are_no_numbers_stay_alone(name: str) -> None:
    format = parse(name)
    parts = format.pack(weights(48, 256))
    x = rows(6, 256, torch.float32)
    want = packed.linear(x, format, parts)
    x[2, 5], x[4, 0] = torch.nan, torch.inf
    got = packed.linear(x, format, parts)
    assert torch.equal(got[[0, 1, 3, 5]], want[[0, 1, 3, 5]])
    assert not torch.isfinite(got[[2, 4]]).any(-1).all() or not torch.isfinite(got[[2, 4]]).all()


@pytest.mark.parametrize("name", ["mxfp6_e2m3", "int8", "int4-g128", "sparse"])
def test_two_threads_equal_one(name: str, two_threads: None) -> None:
    format = parse(name)
    parts = format.pack(weights(700, 512))
    for count in (1, 5, 8, 20):
        x = rows(count, 512, torch.bfloat16)
        two = packed.linear(x, format, parts)
        torch.set_num_threads(1)
        assert torch.equal(packed.linear(x, format, parts), two)
        torch.set_num_threads(2)


@pytest.mark.parametrize("name", NAMES)
def test_rows_in_any_layout(name: str) -> None:
    format = parse(name)
    layer = PackedLinear.of(weights(33, 256), rows(1, 33, torch.float32)[0], format)
    x = rows(12, 256, torch.float32)
    want = layer(x)
    assert torch.equal(layer(x.view(3, 4, 256)).view(12, 33), want)
    assert torch.equal(layer(x.t().contiguous().t()), want)
    assert layer(x[:0]).shape == (0, 33)
    assert layer(x[3]).shape == (33,)


def test_operators_are_known_to_tracers() -> None:
    x = rows(3, 256, torch.float32)
    parts = parse("int8").pack(weights(48, 256))
    torch.library.opcheck(torch.ops.specdec.int8_linear.default, (x, parts["codes"], parts["scales"]))
    parts = parse("mxfp4").pack(weights(48, 256))
    torch.library.opcheck(torch.ops.specdec.packed_linear.default, (x, parts["codes"], parts["scales"], None, 0, 32))
    for name in ("mxfp4", "int8", "int4-asym", "sparse"):
        format = parse(name)
        parts = format.pack(weights(48, 256))
        traced = torch.compile(lambda x, f=format, p=parts: packed.linear(x, f, p), backend="eager", fullgraph=True)
        assert torch.equal(traced(x), packed.linear(x, format, parts))


def test_what_does_not_fit_is_named() -> None:
    parts = parse("mxfp4").pack(weights(8, 64))
    call = torch.ops.specdec.packed_linear
    x = rows(2, 64, torch.float32)
    with pytest.raises(RuntimeError, match="scales must be a contiguous Byte CPU tensor \\[8, 2\\]"):
        call(x, parts["codes"], parts["scales"][:, :1].contiguous(), None, 0, 32)
    with pytest.raises(RuntimeError, match="codes must be"):
        call(x, parts["codes"][:, :-1].contiguous(), parts["scales"], None, 0, 32)
    with pytest.raises(RuntimeError, match="K is 40, no multiple of 32"):
        call(x[:, :40], parts["codes"], parts["scales"], None, 0, 32)
    with pytest.raises(RuntimeError, match="no kind 11"):
        call(x, parts["codes"], parts["scales"], None, 11, 32)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float64"):
        call(x.half(), parts["codes"], parts["scales"], None, 0, 32)
    wide = torch.zeros(1, 65568, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="at most 65536"):
        torch.ops.specdec.int8_linear(torch.zeros(1, 65568), wide, torch.ones(1))
    with pytest.raises(InputError, match="no weight format is called"):
        parse("mxfp5")
