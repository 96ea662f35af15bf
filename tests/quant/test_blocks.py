"""The codec of OCP Microscaling blocks, against its definition in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wide_values import FAMILIES, LARGEST, LEAST, TABLE, block_of, every_magnitude, ties

from specdec.quant import parse
from specdec.quant.blocks import BLOCK, ELEMENTS, RULES, block_codes, block_scales, block_values

# Exponent bits, mantissa bits, bias.
FIELDS = {
    "mxfp8_e4m3": (4, 3, 7),
    "mxfp8_e5m2": (5, 2, 15),
    "mxfp6_e2m3": (2, 3, 1),
    "mxfp6_e3m2": (3, 2, 3),
    "mxfp4": (2, 1, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_limits_of_the_element(family):
    emax, most, least_normal, least, _ = TABLE[family]
    element = ELEMENTS[family]
    values = element.values()
    assert element.emax == emax
    finite = values[torch.isfinite(values)]
    if family == "mxint8":
        assert finite.min() == -2  # can be stored, never is
        assert values[element.largest] == most
    else:
        assert finite.max() == most
        assert -finite.min() == most
        assert values[1 << element.mantissa] == least_normal
    assert values[1] == least


@pytest.mark.parametrize("family", sorted(FIELDS))
def test_every_code_by_the_definition(family):
    exponent, mantissa, bias = FIELDS[family]
    codes = torch.arange(1 << (1 + exponent + mantissa), dtype=torch.uint8)
    values = ELEMENTS[family].values().tolist()
    for code in codes.tolist():
        field, low = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
        if family == "mxfp8_e4m3" and (field, low) == (15, 7):
            assert values[code] != values[code]
            continue
        if family == "mxfp8_e5m2" and field == 31:
            assert values[code] != values[code] if low else abs(values[code]) == float("inf")
            continue
        fraction = Fraction(low, 1 << mantissa) + (field > 0)
        exact = fraction * Fraction(2) ** (max(field, 1) - bias)
        assert Fraction(values[code]) == (-exact if code >> (exponent + mantissa) else exact)


def test_codes_of_mxint8_are_twos_complement():
    values = ELEMENTS["mxint8"].values()
    assert [values[code].item() * 64 for code in (0, 1, 127, 128, 255)] == [0, 1, 127, -128, -1]


@pytest.mark.parametrize("family", sorted(FIELDS))
def test_ties_go_to_the_even_code(family):
    element = ELEMENTS[family]
    middles, even = ties(element)
    top = torch.full_like(middles, 2.0**element.emax)
    sides = (middles, -middles, torch.nextafter(middles, 0 * top), torch.nextafter(middles, 2 * top))
    values = torch.stack([top, *sides, *([0 * top] * 27)], 1)
    codes = block_codes(values, block_scales(values, element), element).long()
    assert torch.equal(codes[:, 1], even)
    assert torch.equal(codes[:, 2], even + element.sign)
    below = torch.arange(element.largest)
    assert torch.equal(codes[:, 3], below)
    assert torch.equal(codes[:, 4], below + 1)


def test_ties_of_mxint8():
    values = block_of(1.0, 0.5 / 64, 1.5 / 64, 2.5 / 64, -0.5 / 64, -1.5 / 64, 126.5 / 64, 127.5 / 64, -127.5 / 64)
    element = ELEMENTS["mxint8"]
    codes = block_codes(values, block_scales(values, element), element)[0, 1:9]
    assert codes.view(torch.int8).tolist() == [0, 2, 2, 0, -2, 126, 127, -127]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nearest_point_is_chosen(family):
    weight = every_magnitude(30, 64, seed=3)
    element = ELEMENTS[family]
    scales = block_scales(weight, element)
    scale = 2.0 ** (scales.double() - 127)
    grid = element.values().double()
    grid = grid[torch.isfinite(grid) & (grid > -2 if element.integer else grid == grid)]
    wanted = (weight.double().view(30, 2, BLOCK, 1) - grid * scale.view(30, 2, 1, 1)).abs().amin(-1).flatten(1)
    found = block_values(block_codes(weight, scales, element), scales, element)
    assert torch.equal((found.double() - weight.double()).abs(), wanted)


@pytest.mark.parametrize(
    ("largest", "byte"),
    [
        (7.9999995, 127),  # its float32 logarithm is 3
        (8.0, 128),
        (LARGEST, 127 + 125),
        (2.0**-125, 0),
        (2.0**-126, 0),
        (LEAST, 0),
        (0.0, 0),
    ],
)
def test_scale_is_the_floor_of_the_exponent(largest, byte):
    for values in (block_of(largest), block_of(0.0, -largest)):
        assert block_scales(values, ELEMENTS["mxfp6_e2m3"]).tolist() == [[byte]]


@given(st.floats(LEAST, LARGEST, width=32), st.sampled_from(FAMILIES))
@example(7.5, "mxfp6_e2m3")
@example(7.5000005, "mxfp6_e2m3")
@example(7.75, "mxfp6_e2m3")
@example(1.984375, "mxint8")
@example(1.9921875, "mxint8")
@example(LEAST, "mxint8")
@example(2.0**-127 * 1.5, "mxint8")
@settings(max_examples=150, deadline=None)
def test_each_rule_by_its_definition(largest, family):
    """In exact arithmetic: the power of two below, or above; the least that saturates nothing; that after rounding."""
    element = ELEMENTS[family]
    exact, most = Fraction(largest), Fraction(TABLE[family][1])
    below = exact.numerator.bit_length() - exact.denominator.bit_length()
    below -= Fraction(2) ** below > exact
    above = below + (Fraction(2) ** below < exact)
    rounded = round(exact / Fraction(2) ** (below - element.fraction)) * Fraction(2) ** (below - element.fraction)
    fits = next(e for e in (below - element.emax, below - element.emax + 1) if exact <= most * Fraction(2) ** e)
    wanted = {
        "floor": below - element.emax,
        "ceil": above - element.emax,
        "rceil": fits,
        "even": below + (rounded >= Fraction(2) ** (below + 1)) - element.emax,
    }
    assert set(wanted) == set(RULES)
    for rule, shared in wanted.items():
        found = int(block_scales(block_of(largest), element, rule)) - 127
        assert found == min(127, max(-127, shared)), rule


@pytest.mark.parametrize("family", FAMILIES)
def test_the_codec_takes_any_leading_shape(family):
    values, element = torch.randn(2, 3, 4, 64), ELEMENTS[family]
    scales = block_scales(values, element)
    codes = block_codes(values, scales, element)
    assert (scales.shape, codes.shape) == ((2, 3, 4, 2), (2, 3, 4, 64))
    found = block_values(codes, scales, element)
    flat = parse(family)
    assert torch.equal(found.view(24, 64), flat.unpack(flat.pack(values.view(24, 64))))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_as_nan_where_that_is_asked_for(family, bad):
    values, element = torch.randn(2, 64), ELEMENTS[family]
    clean = block_scales(values, element)
    values[1, 40] = bad
    scales = block_scales(values, element, nonfinite="nan")
    assert int(scales[1, 1]) == 255
    assert torch.equal(scales.flatten()[:3], clean.flatten()[:3])
    codes = block_codes(values, scales, element)
    assert not codes[1, 32:].any()
    found = block_values(codes, scales, element)
    assert torch.isnan(found[1, 32:]).all()
    assert torch.isfinite(found.flatten()[:96]).all()


def test_codes_that_are_not_finite():
    """Files of other libraries can hold them: E5M2 has infinities and NaN, E4M3 has NaN."""
    one = torch.full((1, 1), 130, dtype=torch.uint8)
    codes = torch.tensor([[0x7B, 0x7C, 0xFC, 0x7D, 0x7E, 0xFF] + [0] * 26], dtype=torch.uint8)
    found = block_values(codes, one, ELEMENTS["mxfp8_e5m2"])[0, :6].tolist()
    assert found[:3] == [57344.0 * 8, torch.inf, -torch.inf]
    assert all(value != value for value in found[3:])
    codes = torch.tensor([[0x7E, 0xFE, 0x7F, 0xFF] + [0] * 28], dtype=torch.uint8)
    found = block_values(codes, one, ELEMENTS["mxfp8_e4m3"])[0, :4].tolist()
    assert found[:2] == [448.0 * 8, -448.0 * 8]
    assert all(value != value for value in found[2:])
