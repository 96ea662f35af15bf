"""Bit for bit against three independent implementations, over every magnitude of float32.

ml_dtypes rounds the elements, and everything else is numpy in float64: always there. torchao and gfloat are compared
with where they are installed. Where an implementation is known to differ, the difference is a test of its own.
"""

from __future__ import annotations

from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import torch
from wide_values import LARGEST, LEAST, every_magnitude, ties

from specdec.quant import parse
from specdec.quant.bits import unpack_bits
from specdec.quant.blocks import BLOCK, ELEMENTS, block_codes, block_scales, block_values

DTYPES = {
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}
FAMILIES = sorted(ELEMENTS)
FLOATS = sorted(DTYPES)
MXINT8_MOST = 127 / 64


def numpy_blocks(weight: torch.Tensor, family: str, rule: str = "floor") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale bytes, element codes and values by the specification's words, in float64 with numpy and ml_dtypes."""
    values = weight.double().numpy().reshape(len(weight), -1, BLOCK)
    most = MXINT8_MOST if family == "mxint8" else float(ml_dtypes.finfo(DTYPES[family]).max)
    emax = np.frexp(most)[1] - 1
    fraction, exponent = np.frexp(np.abs(values).max(-1))  # fraction in [1/2, 1)
    width = 6 if family == "mxint8" else ml_dtypes.finfo(DTYPES[family]).nmant
    if rule == "ceil":
        shared = exponent - (fraction == 0.5) - emax
    elif rule == "rceil":
        shared = exponent - 1 - emax + (2 * fraction > most / 2.0**emax)
    elif rule == "even":
        shared = exponent - 1 - emax + (np.rint(2 * fraction * 2**width) == 2 ** (width + 1))
    else:
        shared = exponent - 1 - emax
    shared = np.where(fraction == 0, -127, np.clip(shared, -127, 127))[..., None]
    scaled = np.clip(np.ldexp(values, -shared), -most, most)
    if family == "mxint8":
        codes = np.rint(scaled * 64).astype(np.int8)
        decoded = codes / 64.0
    else:
        codes = scaled.astype(DTYPES[family])
        decoded = codes.astype(np.float64)
    back = np.ldexp(decoded, shared).reshape(weight.shape)
    return (shared[..., 0] + 127).astype(np.uint8), codes.view(np.uint8).reshape(weight.shape), back


def with_edges(family: str) -> torch.Tensor:
    """Rows of every magnitude, and one block for each tie of the element, both signs, at three scales."""
    element = ELEMENTS[family]
    if element.integer:
        middles = (torch.arange(-127, 127) + 0.5) / 64
    else:
        middles = ties(element)[0]
        middles = torch.cat([middles, -middles])
    edges = torch.zeros(3, len(middles), BLOCK)
    edges[..., 0] = 2.0**element.emax  # fixes the scale at one
    edges[..., 1] = middles
    edges[..., 2], edges[..., 3] = torch.nextafter(middles, torch.tensor(9e9)), torch.nextafter(middles, -edges[..., 0])
    edges *= torch.tensor([1.0, 2.0**-100, 2.0**90]).view(3, 1, 1)
    K = 512
    edges = torch.nn.functional.pad(edges.flatten(), (0, -edges.numel() % K)).view(-1, K)
    limits = torch.zeros(6, K)
    limits[:5, 5] = torch.tensor([LARGEST, -LARGEST, LEAST, 2.0**-126, 2.0**-127])
    limits[:5, 40] = torch.tensor([7.9999995, 8.0, 8.000001, -7.5, 1.875])
    return torch.cat([every_magnitude(384, K), edges, limits])


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ml_dtypes_bit_for_bit(family, rule):
    weight = with_edges(family)
    scales, codes, values = numpy_blocks(weight, family, rule)
    form = parse(f"{family}-{rule}")
    parts = form.pack(weight)
    np.testing.assert_array_equal(parts["scales"].numpy(), scales)
    found = unpack_bits(parts["codes"], ELEMENTS[family].bits, weight.shape[1])
    np.testing.assert_array_equal(found.numpy(), codes)
    unpacked = form.unpack(parts)
    with np.errstate(over="ignore"):  # 2^128, which rules that round scales up make of the largest float32
        np.testing.assert_array_equal(unpacked.numpy(), values.astype(np.float32))
    assert rule != "floor" or bool(torch.isfinite(unpacked).all())
    assert torch.equal(form.unpack(parts, torch.bfloat16), unpacked.bfloat16())


@pytest.mark.parametrize("family", FLOATS)
def test_each_code_decodes_as_in_ml_dtypes(family):
    element = ELEMENTS[family]
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    expected = codes.view(DTYPES[family]).astype(np.float32)
    np.testing.assert_array_equal(element.values().numpy(), expected)
    np.testing.assert_array_equal(np.signbit(element.values().numpy()), np.signbit(expected))


def test_scale_bytes_are_those_of_ml_dtypes():
    scales = torch.arange(256, dtype=torch.uint8)
    one = torch.full((256, BLOCK), 0x38, dtype=torch.uint8)  # 1.0 in E4M3
    found = block_values(one, scales.unsqueeze(1), ELEMENTS["mxfp8_e4m3"])[:, 0]
    expected = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_where_ml_dtypes_has_no_answer():
    """It has no NaN in six bits (ours travels in the scale), and its E8M0 makes zero NaN (ours takes the least)."""
    assert np.float32(np.nan).astype(ml_dtypes.float6_e2m3fn).astype(np.float32) == 0
    assert np.float32(0).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8) == 255
    assert int(block_scales(torch.zeros(1, BLOCK), ELEMENTS["mxfp6_e2m3"])) == 0


@pytest.fixture(scope="module")
def torchao() -> ModuleType:
    return pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


def torchao_blocks(torchao: ModuleType, weight: torch.Tensor, family: str, rule: str) -> tuple[torch.Tensor, ...]:
    dtypes = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e2m3": torchao.DTYPE_FP6_E2M3,
        "mxfp6_e3m2": torchao.DTYPE_FP6_E3M2,
        "mxfp4": torch.float4_e2m1fn_x2,
    }
    mode = getattr(torchao.ScaleCalculationMode, rule.upper())
    scales, codes = torchao.to_mx(weight.contiguous(), dtypes[family], BLOCK, mode)
    return scales.view(torch.uint8), codes.view(torch.uint8)


@pytest.mark.parametrize("rule", ["floor", "rceil", "ceil", "even"])
@pytest.mark.parametrize("family", FLOATS)
def test_torchao_bit_for_bit(torchao, family, rule):
    """But for blocks with the least scale byte, where it divides by twice what it stores."""
    weight = with_edges(family)
    form = parse(f"{family}-{rule}")
    parts = form.pack(weight)
    scales, codes = torchao_blocks(torchao, weight, family, rule)
    usual = (parts["scales"] > 1) | (scales > 1)
    assert usual.float().mean() > 0.5
    assert torch.equal(parts["scales"][usual], scales[usual])
    bits = ELEMENTS[family].bits
    # Its four-bit codes are packed, low nibble first as ours; it packs no others any more.
    ours = parts["codes"] if bits == 4 else unpack_bits(parts["codes"], bits, weight.shape[1])
    per_block = ours.shape[1] // usual.shape[1]
    kept = usual.repeat_interleave(per_block, 1)
    assert torch.equal(ours[kept], codes[kept])


def test_torchao_decodes_the_least_scale_twice_too_small(torchao):
    weight = torch.zeros(1, BLOCK)
    weight[0, 0] = 2.0**-125  # E2M3 wants the scale 2^-127
    scales, codes = torchao_blocks(torchao, weight, "mxfp6_e2m3", "floor")
    assert int(scales) == 0
    element = ELEMENTS["mxfp6_e2m3"]
    assert block_values(codes, scales, element)[0, 0] == 2.0**-126
    ours = parse("mxfp6_e2m3")
    assert torch.equal(ours.unpack(ours.pack(weight)), weight)


def test_torchao_stores_infinities_as_numbers(torchao):
    weight = torch.zeros(1, BLOCK)
    weight[0, 3] = torch.inf
    scales, _ = torchao_blocks(torchao, weight, "mxfp6_e2m3", "floor")
    assert int(scales) != 255
    assert int(block_scales(weight, ELEMENTS["mxfp6_e2m3"], nonfinite="nan")) == 255


@pytest.fixture(scope="module")
def gfloat() -> ModuleType:
    pytest.importorskip("gfloat")
    return pytest.importorskip("gfloat.formats")


GFLOAT = {
    "mxfp8_e4m3": "format_info_mxfp8_e4m3",
    "mxfp8_e5m2": "format_info_mxfp8_e5m2",
    "mxfp6_e2m3": "format_info_mxfp6_e2m3",
    "mxfp6_e3m2": "format_info_mxfp6_e3m2",
    "mxfp4": "format_info_mxfp4_e2m1",
    "mxint8": "format_info_mxint8",
}


def gfloat_block(gfloat: ModuleType, family: str, values: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Scale byte and codes, and the values that they stand for."""
    import gfloat as library

    form = getattr(gfloat, GFLOAT[family])
    scale = library.compute_scale_amax(form.etype.emax, values)
    encoded = list(library.encode_block(form, scale, values / scale))
    return encoded, np.array(list(library.decode_block(form, encoded)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gfloat_bit_for_bit(gfloat, family):
    """But for -2 in MXINT8, which ours stores as -127 / 64 (below)."""
    weight = torch.cat([every_magnitude(6, 256, seed=1), with_edges(family)[-10:, :256]])
    element = ELEMENTS[family]
    scales = block_scales(weight, element)
    codes = block_codes(weight, scales, element)
    values = block_values(codes, scales, element).view(-1, BLOCK).double().numpy()
    blocks = weight.double().view(-1, BLOCK).numpy()
    for i, block in enumerate(blocks):
        (scale, *numbers), decoded = gfloat_block(gfloat, family, block)
        assert scale == int(scales.flatten()[i])
        ours = codes.view(-1, BLOCK)[i].tolist()
        if family == "mxint8":
            decoded = np.where(decoded / 2.0 ** (scale - 127) == -2, -127 / 64 * 2.0 ** (scale - 127), decoded)
            ours, numbers = [c for c in ours if c != 129], [c for c in numbers if c not in (128, 129)]
        assert ours == numbers
        np.testing.assert_array_equal(values[i], decoded)


def test_gfloat_uses_the_code_of_minus_two(gfloat):
    """The specification lets it stand unused. Were it used, packing again would give another scale, and lose bits."""
    block = torch.zeros(1, BLOCK)
    block[0, 0], block[0, 1] = -1.999, 1 / 64
    (_, first, *_), _ = gfloat_block(gfloat, "mxint8", block[0].double().numpy())
    assert first == 0x80
    ours = parse("mxint8")
    once = ours.unpack(ours.pack(block))
    assert once[0, 0] == -127 / 64
    assert torch.equal(ours.unpack(ours.pack(once)), once)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FAMILIES, "mxfp4-rceil", "int8", "int4", "int4-g64-asym"])
def test_a_gpu_packs_the_same_bits(name):
    weight = every_magnitude(384, 512)
    form = parse(name)
    here, there = form.pack(weight), form.pack(weight.cuda())
    assert all(part.is_cuda for part in there.values())
    assert all(torch.equal(here[part], there[part].cpu()) for part in here)
    assert torch.equal(form.unpack(here), form.unpack(there).cpu())
