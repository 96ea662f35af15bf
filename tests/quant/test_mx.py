"""The OCP Microscaling formats of weights: what is stored, what it stands for, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide_values import FAMILIES, LARGEST, LEAST, TABLE, block_of, every_magnitude

from specdec.errors import InputError
from specdec.quant import PackedLinear, format_names, parse
from specdec.quant.blocks import BLOCK, ELEMENTS, RULES


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_bytes(family):
    form = parse(family)
    size = TABLE[family][-1]
    assert form.num_bytes(1, BLOCK) == size
    assert form.num_bytes(7, 96) == 21 * size
    assert form.bits() == size / 4
    assert form.group(4096) == BLOCK
    parts = form.pack(torch.randn(7, 96))
    form.check(parts, 7, 96)
    assert sum(part.numel() * part.element_size() for part in parts.values()) == 21 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_finite_code_survives_packing(family):
    """Each value of the element, at each scale that leaves it within float32, is stored as itself."""
    element = ELEMENTS[family]
    values = element.values()
    values = values[torch.isfinite(values) & (values > -2 if element.integer else values == values)]
    top = 2.0**element.emax
    blocks = torch.zeros(len(values), BLOCK)
    blocks[:, 0], blocks[:, 1], blocks[:, 31] = top, values, values
    for shared in (-127, -126, -1, 0, 1, 126 - element.emax, 127 - element.emax):
        scaled = torch.ldexp(blocks.double(), torch.tensor(shared)).float()
        form = parse(family)
        parts = form.pack(scaled)
        assert (parts["scales"] == shared + 127).all()
        assert torch.equal(form.unpack(parts), scaled)
        assert torch.equal(form.unpack(parts).signbit(), scaled.signbit())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_beyond_the_largest_saturates(family):
    """The floor rule leaves magnitudes between the largest of the element and the next power of two."""
    emax, most, *_ = TABLE[family]
    beyond = torch.nextafter(torch.tensor(2.0 ** (emax + 1)), torch.tensor(0.0)).item()
    form = parse(family)
    assert form.unpack(form.pack(block_of(beyond, -beyond)))[0, :2].tolist() == [most, -most]


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_and_subnormals(family):
    form = parse(family)
    zeros = form.pack(torch.zeros(2, BLOCK))
    assert not zeros["scales"].any()
    assert not zeros["codes"].any()
    assert not form.unpack(zeros).any()
    # The least step of the format is its least element times 2^-127; anything finer rounds to it or to zero.
    step = TABLE[family][3] * 2.0**-127
    tiny = block_of(step, -3 * step, LEAST, step / 2, step * 0.75)
    assert form.unpack(form.pack(tiny))[0, :5].tolist() == [step, -3 * step, LEAST if step <= LEAST else 0, 0, step]


def test_rules_are_part_of_the_name():
    weight = torch.randn(8, 256)
    plain = parse("mxfp6_e3m2")
    for rule in RULES:
        form = parse(f"mxfp6_e3m2-{rule}")
        assert parse(form.name) == form
        assert form.name == ("mxfp6_e3m2" if rule == "floor" else f"mxfp6_e3m2-{rule}")
        assert (form == plain) == (rule == "floor")
        if rule != "floor":
            assert not torch.equal(form.pack(weight)["scales"], plain.pack(weight)["scales"])
    assert set(FAMILIES) <= set(format_names())


@pytest.mark.parametrize("name", ["mxfp4-round", "mxint8-ceil-ceil", "mxfp6_e2m3-g32", "mxfp8_e4m3-"])
def test_unknown_options(name):
    with pytest.raises(InputError, match=r"is no weight format: .* takes one scale rule of floor, rceil, ceil, even"):
        parse(name)


def test_a_name_nearly_right():
    with pytest.raises(InputError, match="did you mean 'mxfp6_e2m3'"):
        parse("mxfp6_e2m33")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packing_twice_is_packing_once(data):
    """Any finite float32, any rule: what was on the grid stays where it is."""
    name = data.draw(st.sampled_from(FAMILIES)) + "-" + data.draw(st.sampled_from(sorted(RULES)))
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    # Beyond half of the range the rules that round scales up can give 2^128.
    limit = LARGEST if name.endswith("floor") else LARGEST / 4
    number = st.floats(-limit, limit, width=32) | st.floats(-2, 2, width=32)
    values = data.draw(st.lists(number, min_size=BLOCK, max_size=BLOCK))
    weight = torch.tensor(values).roll(data.draw(st.integers(0, 31))).repeat(rows, blocks)
    form = parse(name)
    once = form.unpack(form.pack(weight))
    assert torch.equal(form.unpack(form.pack(once)), once)
    assert torch.equal(once[0, :BLOCK], form.unpack(form.pack(weight[:1, :BLOCK]))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    weight = torch.randn(4, 64).to(dtype)
    form = parse("mxfp6_e2m3")
    found, expected = form.pack(weight), form.pack(weight.float())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(form.unpack(found, dtype), form.unpack(found).to(dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_strides_and_chunks_do_not_matter(family):
    """As many rows as take several chunks, stored transposed."""
    weight = torch.randn(1024, 400).t()
    form = parse(family)
    whole = form.pack(weight)
    for row in (0, 127, 128, 399):
        one = form.pack(weight[row : row + 1].contiguous())
        assert all(torch.equal(whole[name][row], one[name][0]) for name in one)
        assert torch.equal(form.unpack(whole)[row], form.unpack(one)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_moved_saturate_on_the_fitted_grid(family):
    form = parse(family)
    weight = torch.randn(4, 64)
    fitted = form.fit(weight)
    most = TABLE[family][1] * 2.0 ** (fitted["scales"].float() - 127).repeat_interleave(BLOCK, 1)
    far = form.unpack({"codes": form.encode(weight.sign() * 1e30, fitted), **fitted})
    assert torch.equal(far, weight.sign() * most)
    same = form.unpack(form.pack(weight))
    assert torch.equal(form.unpack({"codes": form.encode(same, fitted), **fitted}), same)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_columns_are_rounded_as_whole_weights_are(family):
    form = parse(family)
    for weight in (torch.randn(60, BLOCK), every_magnitude(60, BLOCK)):
        fitted = form.fit(weight)
        moved = weight.roll(1, 0)  # beyond the ends of its grid in places
        whole = form.unpack({"codes": form.encode(moved, fitted), **fitted})
        for columns in (slice(0, 1), slice(31, 32), slice(3, 8), slice(0, BLOCK)):
            assert torch.equal(form.nearest(moved[:, columns], fitted), whole[:, columns])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(bad):
    weight = torch.randn(8, 64)
    weight[2, 3] = weight[5, 6] = bad
    form = parse("mxfp4")
    for use in (form.pack, lambda w: form.encode(w, form.fit(torch.randn(8, 64)))):
        with pytest.raises(InputError, match="2 of 512 weights are NaN or infinite"):
            use(weight)
    with pytest.raises(InputError, match=r"2 of 16 blocks hold NaN or infinite values; .*nonfinite='nan'"):
        form.fit(weight)


@pytest.mark.parametrize("K", [0, 31, 33, 4095])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_no_whole_blocks(family, K):
    with pytest.raises(InputError, match=rf"{family} stores blocks of 32 inputs, and a weight \[4, {K}\] has {K}"):
        parse(family).pack(torch.zeros(4, K))


def tampered(family: str, case: str) -> tuple[dict[str, torch.Tensor], str]:
    parts = parse(family).pack(torch.randn(4, 64))
    if case == "missing":
        del parts["scales"]
        return parts, "store 'scales', which is missing"
    if case == "cut":
        parts["codes"] = parts["codes"][:, :-1]
        return parts, rf"'codes' of {family} weights \[4, 64\] is torch.uint8 .*; found torch.uint8"
    if case == "rows":
        parts["scales"] = parts["scales"][:3]
        return parts, r"'scales' of .* is torch.uint8 \[4, 2\]; found torch.uint8 \[3, 2\]"
    if case == "dtype":
        parts["scales"] = parts["scales"].float()
        return parts, "found torch.float32"
    parts["scales"][1, 1] = 255
    return parts, "hold 1 NaN blocks in 'scales', which this library never writes"


@pytest.mark.parametrize("case", ["missing", "cut", "rows", "dtype", "nan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tampered_parts(family, case):
    parts, message = tampered(family, case)
    with pytest.raises(InputError, match=message):
        parse(family).check(parts, 4, 64)
    with pytest.raises(InputError, match=message):
        PackedLinear(parse(family), 64, 4, parts=parts)


@pytest.mark.parametrize(("family", "code"), [("mxfp8_e4m3", 0xFF), ("mxfp8_e5m2", 0x7C), ("mxfp8_e5m2", 0xFE)])
def test_tampered_codes(family, code):
    form = parse(family)
    parts = form.pack(torch.randn(4, 64))
    parts["codes"][3, 9] = code
    with pytest.raises(InputError, match="hold 1 NaN or infinite numbers in 'codes'"):
        form.check(parts, 4, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_multiplies_with_what_is_stored(family):
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(3, 64)
    layer = PackedLinear.of(weight, bias, parse(family))
    kept = layer.weight_in(torch.float32)
    assert torch.equal(kept, parse(family).unpack(parse(family).pack(weight)))
    torch.testing.assert_close(layer(x), x @ kept.t() + bias, rtol=1e-5, atol=1e-5)
