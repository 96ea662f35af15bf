"""int8 and int4 weights: the grid, the codes chosen for the scale as it is stored, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_values import LARGEST, LEAST, every_magnitude

from specdec.errors import InputError
from specdec.kernels.packed import SMALLEST
from specdec.quant import PackedLinear, parse
from specdec.quant.bits import unpack_bits

INT4 = [f"int4{group}{asym}" for group in ("", "-g64", "-g128") for asym in ("", "-asym", "-pos")]
NAMES = ["int8", *INT4]


def size(name: str) -> int:
    return next((int(g) for g in ("64", "128") if f"g{g}" in name), 32)


def grids(name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """All points that the weights of each group can take: float64 `[N, G, points]`."""
    scales = parts["scales"].double()
    if name == "int8":
        return torch.arange(-127, 128).double() * scales.view(-1, 1, 1)
    zeros = parts["zeros"].double() if "zeros" in parts else torch.full_like(scales, 8)
    return (torch.arange(16).double() - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)


@pytest.mark.parametrize("name", NAMES)
def test_exact_bytes(name):
    form = parse(name)
    N, K = 6, 256
    groups = 1 if name == "int8" else K // size(name)
    scales = 4 if name == "int8" else 2 + ("asym" in name)
    assert form.num_bytes(N, K) == N * (K // (1 if name == "int8" else 2) + groups * scales)
    parts = form.pack(torch.randn(N, K))
    form.check(parts, N, K)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == form.num_bytes(N, K)
    assert form.group(K) == K // groups


def test_bits_per_weight():
    bits = {name: parse(name).bits(4096, 4096) for name in INT4}
    assert bits == {
        "int4": 4.5,
        "int4-asym": 4.75,
        "int4-g64": 4.25,
        "int4-g64-asym": 4.375,
        "int4-g128": 4.125,
        "int4-g128-asym": 4.1875,
        "int4-pos": 4.5,
        "int4-g64-pos": 4.25,
        "int4-g128-pos": 4.125,
    }
    assert parse("int8").bits(4096, 4096) == 8 + 32 / 4096


def test_int8_is_the_formula():
    weight = every_magnitude(60, 64)
    parts = parse("int8").pack(weight)
    largest = np.maximum(np.abs(weight.numpy()).max(1), np.float32(SMALLEST))
    scales = (largest / np.float32(127)).astype(np.float32)
    np.testing.assert_array_equal(parts["scales"].numpy(), scales)
    codes = np.rint(weight.numpy() / scales[:, None]).astype(np.int8)
    np.testing.assert_array_equal(parts["codes"].numpy(), codes)
    exact = parts["codes"].double() * parts["scales"].double().unsqueeze(1)
    assert torch.equal(parse("int8").unpack(parts), exact.float())


@pytest.mark.parametrize("name", INT4)
def test_nibbles_are_the_layout(name):
    """Low nibble first; the product of code and scale in float32, rounded once to the dtype."""
    form = parse(name)
    parts = form.pack(torch.randn(5, 256))
    scales = parts["scales"].float().repeat_interleave(size(name), 1)
    zeros = parts["zeros"].int().repeat_interleave(size(name), 1) if "zeros" in parts else 8
    nibbles = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], -1).flatten(1).int()
    expected = (nibbles - zeros).float() * scales
    assert torch.equal(form.unpack(parts), expected)
    assert torch.equal(form.unpack(parts, torch.bfloat16), expected.bfloat16())
    assert parts["scales"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_nearest_for_the_stored_scale(name):
    """But for float32 quotients; a choice for the scale before its rounding to bfloat16 would be off by hundredths."""
    weight = torch.randn(40, 128) * torch.logspace(-6, 6, 40).unsqueeze(1)
    form = parse(name)
    parts = form.pack(weight)
    grid = grids(name, parts)
    groups = weight.double().view(40, grid.shape[1], -1)
    wanted = (groups.unsqueeze(-1) - grid.unsqueeze(2)).abs().amin(-1)
    found = (form.unpack(parts).double().view_as(groups) - groups).abs()
    steps = (grid[..., 1:2] - grid[..., :1]).abs()
    assert ((found - wanted) / steps).max() < 1e-5


def test_the_larger_end_of_a_symmetric_group_is_kept():
    """Whichever its sign: steps are an eighth of it, up to the scale's rounding."""
    weight = torch.zeros(3, 32)
    weight[0, 3], weight[0, 4] = 8.0, -7.0
    weight[1, 3], weight[1, 4] = -8.0, 7.0
    weight[2, 3] = 8.0 * (1 + 2.0**-9)  # an even bfloat16 scale and half a step
    form = parse("int4")
    parts = form.pack(weight)
    assert parts["scales"].flatten().tolist() == [-1.0, 1.0, -1.0]
    assert torch.equal(form.unpack(parts)[:2], weight[:2])
    assert unpack_bits(parts["codes"], 4, 32)[:2, 3:5].tolist() == [[0, 15], [0, 15]]


@pytest.mark.parametrize("name", [name for name in INT4 if name.endswith("-pos")])
def test_positive_scales_leave_less_error_than_those_that_reach_both_ends(name):
    weight = torch.randn(40, 256)
    weight[0] = weight[0].abs()
    parts = parse(name).pack(weight)
    assert (parts["scales"] > 0).all()
    groups = weight.view(40, -1, size(name))
    scales = torch.maximum(groups.amax(-1) / 7, groups.amin(-1) / -8).bfloat16().float().unsqueeze(-1)
    reaching = (groups / scales).round().clamp(-8, 7) * scales
    error = (parse(name).unpack(parts).view_as(groups) - groups).square().sum(-1)
    assert (error <= (reaching - groups).square().sum(-1) * (1 + 1e-6)).all()
    assert error.sum() < 0.97 * (reaching - groups).square().sum()


def test_an_asymmetric_group_reaches_both_ends_and_zero():
    weight = torch.zeros(2, 32)
    weight[0, 3], weight[0, 4] = 12.0, -3.0
    weight[1] = 15 + torch.rand(32)  # far from zero, which stays on the grid
    form = parse("int4-asym")
    parts = form.pack(weight)
    assert (parts["scales"][0, 0], parts["zeros"][0, 0]) == (1.0, 3)
    assert torch.equal(form.unpack(parts)[0], weight[0])
    assert parts["zeros"][1, 0] == 0


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name):
    form = parse(name)
    parts = form.pack(torch.zeros(3, 128))
    assert torch.isfinite(parts["scales"]).all()
    assert (parts["scales"] != 0).all()
    assert not form.unpack(parts).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_range_stays_finite(name):
    form = parse(name)
    weight = every_magnitude(120, 128)
    weight[0, :3] = torch.tensor([LARGEST, -LARGEST, LEAST])
    weight[1], weight[2], weight[3] = LARGEST, -LARGEST, LEAST
    parts = form.pack(weight)
    form.check(parts, 120, 128)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.isfinite(form.unpack(parts, dtype)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packing_twice_is_packing_once(data):
    """Of symmetric groups: exactly. int8 keeps its codes; its float32 scale may move by its last bit."""
    name = data.draw(st.sampled_from([name for name in NAMES if "asym" not in name]))
    rows = data.draw(st.integers(1, 3))
    number = st.floats(-(2.0**120), 2.0**120, width=32) | st.floats(-2, 2, width=32)
    values = data.draw(st.lists(number, min_size=64, max_size=64))
    weight = torch.tensor(values).roll(data.draw(st.integers(0, 63))).repeat(rows, 4)
    form = parse(name)
    first = form.pack(weight)
    second = form.pack(form.unpack(first))
    once, twice = form.unpack(first), form.unpack(second)
    if name == "int8":
        assert torch.equal(first["codes"], second["codes"])
        torch.testing.assert_close(twice, once, rtol=2**-22, atol=0)
    else:
        assert torch.equal(twice, once)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_moved_saturate_on_the_fitted_grid(name):
    form = parse(name)
    weight = torch.randn(4, 128)
    fitted = form.fit(weight)
    far = form.unpack({"codes": form.encode(weight.sign() * 1e30, fitted), **fitted})
    grid = grids(name, fitted)
    per_group = weight.view(4, grid.shape[1], -1)
    ends = torch.where(per_group > 0, grid.amax(-1, keepdim=True), grid.amin(-1, keepdim=True))
    assert torch.equal(far.double(), ends.view(4, 128).float().double())
    same = form.unpack(form.pack(weight))
    assert torch.equal(form.unpack({"codes": form.encode(same, fitted), **fitted}), same)


@pytest.mark.parametrize("name", NAMES)
def test_single_columns_are_rounded_as_whole_weights_are(name):
    form, group = parse(name), 128 if name == "int8" else size(name)
    for weight in (torch.randn(60, group), every_magnitude(60, 128)[:, :group]):
        fitted = form.fit(weight)
        moved = weight.roll(1, 0)  # beyond the ends of its grid in places
        whole = form.unpack({"codes": form.encode(moved, fitted), **fitted})
        for columns in (slice(0, 1), slice(3, 8), slice(0, group)):
            assert torch.equal(form.nearest(moved[:, columns], fitted), whole[:, columns])


@pytest.mark.parametrize("name", NAMES)
def test_strides_dtypes_and_chunks_do_not_matter(name):
    weight = torch.randn(1024, 400).bfloat16().t()
    form = parse(name)
    whole = form.pack(weight)
    for row in (0, 127, 128, 399):
        one = form.pack(weight[row : row + 1].contiguous().float())
        assert all(torch.equal(whole[part][row], one[part][0]) for part in one)
        assert torch.equal(form.unpack(whole)[row], form.unpack(one)[0])


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert parse(name).name == name
    assert parse(name.upper()) == parse(name)


def test_options_in_any_order():
    assert parse("int4-asym-g64").name == "int4-g64-asym"
    assert parse("int4-g32").name == "int4"


@pytest.mark.parametrize("name", ["int4-g16", "int4-g64-g128", "int4-asym-asym", "int4-asym-pos", "int4-sym", "int4-"])
def test_unknown_options_of_int4(name):
    with pytest.raises(InputError, match="int4 takes one group size of g32, g64, g128, and asym or pos"):
        parse(name)


def test_int8_takes_no_options():
    with pytest.raises(InputError, match="'int8-g64' is no weight format: int8 takes no options"):
        parse("int8-g64")


def test_rows_that_are_no_whole_groups():
    with pytest.raises(InputError, match=r"int4-g128 stores groups of 128 inputs.* \[4, 192\].*int4-g32 or int4-g64"):
        parse("int4-g128").pack(torch.zeros(4, 192))
    with pytest.raises(InputError, match=r"int4 stores groups of 32 inputs.*has 33: keep this module .* as int8"):
        parse("int4").pack(torch.zeros(4, 33))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
def test_weights_that_are_not_finite(name, bad):
    weight = torch.randn(8, 64)
    weight[2, 3] = bad
    form = parse(name)
    for use in (form.pack, lambda w: form.encode(w, form.fit(torch.randn(8, 64)))):
        with pytest.raises(InputError, match="1 of 512 weights are NaN or infinite"):
            use(weight)


@pytest.mark.parametrize(
    ("name", "case", "message"),
    [
        ("int8", "missing", "store 'scales', which is missing"),
        ("int4-asym", "zeros", "store 'zeros', which is missing"),
        ("int8", "dtype", r"'codes' of int8 weights \[4, 128\] is torch.int8 \[4, 128\]; found torch.uint8"),
        ("int4", "cut", r"'codes' of int4 weights \[4, 128\] is torch.uint8 \[4, 64\]; found torch.uint8 \[4, 63\]"),
        ("int4-g64", "nan", "int4-g64 weights .* hold 1 NaN or infinite 'scales', which this library never writes"),
        ("int8", "nan", "int8 weights .* hold 1 NaN or infinite 'scales'"),
        ("int4-asym", "beyond", "int4-asym weights .* hold 1 'zeros' beyond 15"),
    ],
)
def test_tampered_parts(name, case, message):
    form = parse(name)
    parts = form.pack(torch.randn(4, 128))
    if case == "missing":
        del parts["scales"]
    elif case == "zeros":
        del parts["zeros"]
    elif case == "dtype":
        parts["codes"] = parts["codes"].view(torch.uint8)
    elif case == "cut":
        parts["codes"] = parts["codes"][:, 1:]
    elif case == "nan":
        parts["scales"].view(-1)[1] = torch.nan
    else:
        parts["zeros"][1, 1] = 16
    with pytest.raises(InputError, match=message):
        PackedLinear(form, 128, 4, parts=parts)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_weights_waits_for_them(name):
    layer = PackedLinear(parse(name), 128, 4)
    assert all(part.is_meta for part in layer.parts.values())
    parse(name).check(layer.parts, 4, 128)
