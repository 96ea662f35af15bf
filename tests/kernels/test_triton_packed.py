"""Products with stored weights on the device kernels: on a GPU where there is one, else by Triton's interpreter.

Bit for bit means: against the same kernel with other rows beside. Values are compared with float64 products of what the
format itself unpacks.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from packed_cases import DEVICE, FLOATS, NAMES, drawn, moved, packed_kernels
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.kernels import packed
from specdec.quant import Format, PackedLinear, parse
from specdec.quant.bits import pack_bits
from specdec.quant.format import Part, Parts
from specdec.quant.sparse import pack_mask
from specdec.runtime.backends.cuda import CudaBackend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

# Of one rounding to the dtype.
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return packed_kernels()


def inputs_of(name: str, about: int) -> int:
    """A multiple of what the format's groups need, and of no tile."""
    group = 128 if "g128" in name else 64 if "g64" in name else 32
    return about // group * group + group


def close(found: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | float) -> bool:
    """Whether a product is right up to one rounding to its dtype and the roundings of its sum."""
    want = rows.double() @ weight.double().T + bias
    size = rows.double().abs() @ weight.double().abs().T
    exact = torch.float64 if found.dtype == torch.float64 else torch.float32
    room = HALF_ULP[found.dtype] * want.abs() * (1 + 1e-3) + 32 * HALF_ULP[exact] * size
    return bool(((found.cpu().double() - want).abs() <= room).all())


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # the interpreter's arrays tell of infinities
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*FLOATS, "mxint8"])
def test_every_code_under_every_kind_of_scale(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    """One code an output, at every place of a word; scales from the least, a subnormal, to the largest, and NaN."""
    format, K = parse(name), 32
    bits = format.element.bits
    codes = torch.zeros(256, K, dtype=torch.uint8)
    codes[torch.arange(256), torch.arange(256) % K] = torch.arange(256).remainder(1 << bits).to(torch.uint8)
    cycle = torch.tensor([0, 1, 7, 100, 127, 128, 140, 253, 254, 255], dtype=torch.uint8)
    parts = {"codes": pack_bits(codes, bits), "scales": cycle[torch.arange(256) % 10, None]}
    rows = torch.eye(K).to(dtype)
    want = (rows.double() @ format.unpack(parts, dtype).double().T).to(dtype)
    found = kernels.linear(rows.to(DEVICE), format, moved(parts)).cpu()
    assert torch.equal(found.nan_to_num(9e9), want.nan_to_num(9e9))
    assert torch.isfinite(want).any(0).sum() > 150  # most outputs are numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["int4", "int4-asym"])
def test_every_nibble_rounds_once(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    format, K = parse(name), 64
    codes = torch.arange(16).repeat(16, 4).to(torch.uint8)
    parts = {"codes": pack_bits(codes, 4), "scales": (drawn(16, 2).abs() + 0.01).bfloat16()}
    if "asym" in name:
        parts["zeros"] = torch.arange(32).remainder(16).to(torch.uint8).view(16, 2)
    rows = torch.eye(K).to(dtype)
    found = kernels.linear(rows.to(DEVICE), format, moved(parts)).cpu()
    assert torch.equal(found, format.unpack(parts, dtype).T)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "about"), [(torch.bfloat16, 1040), (torch.float32, 130)], ids=str)
def test_products_and_their_rows_alone(kernels: ModuleType, name: str, dtype: torch.dtype, about: int) -> None:
    """In strips of K and without; M from 1 to 64; sizes that fill no tile."""
    format, N, K = parse(name), 19, inputs_of(name, about)
    parts = format.pack(drawn(N, K, seed=2))
    rows, bias = drawn(64, K).to(dtype), drawn(N, seed=3).to(dtype)
    if name == "int8":
        want = packed.reference(rows, format, parts, bias)
    rows, bias, parts = rows.to(DEVICE), bias.to(DEVICE), moved(parts)
    whole = kernels.linear(rows, format, parts, bias)
    assert whole.shape == (64, N)
    assert whole.dtype == dtype
    if name == "int8":
        assert torch.equal(whole.cpu(), want)
    else:
        assert close(whole, rows.cpu(), format.unpack(parts, dtype).cpu(), bias.cpu().double())
    for begin, end in ((0, 1), (63, 64), (1, 4), (3, 20), (47, 64)):
        assert torch.equal(kernels.linear(rows[begin:end], format, parts, bias), whole[begin:end])


@pytest.mark.parametrize("name", ["mxfp6_e3m2", "int4-g64-asym", "int8", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(kernels: ModuleType, name: str, dtype: torch.dtype) -> None:
    format, N, K = parse(name), 17, 192
    parts = format.pack(drawn(N, K, seed=2))
    rows = drawn(3, K).to(dtype)
    found = kernels.linear(rows.to(DEVICE), format, moved(parts)).cpu()
    if name == "int8":
        assert torch.equal(found, packed.reference(rows, format, parts))
    else:
        assert close(found, rows, format.unpack(parts, dtype), 0.0)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "int8", "sparse"])
def test_rows_and_weights_that_are_views(kernels: ModuleType, name: str) -> None:
    """Rows that are not contiguous, of more dimensions, none at all; weights cut out of a larger tensor."""
    format, N, K = parse(name), 18, 96
    parts = moved(format.pack(drawn(N, K, seed=2)))
    rows = drawn(6, K).to(DEVICE)
    whole = kernels.linear(rows, format, parts)
    assert torch.equal(kernels.linear(rows.t().contiguous().t(), format, parts), whole)
    assert torch.equal(kernels.linear(rows.view(2, 3, K)[:, 1:], format, parts), whole.view(2, 3, N)[:, 1:])
    assert kernels.linear(rows[:0], format, parts).shape == (0, N)
    cut = {part: torch.cat([tensor, tensor], 0)[N - 5 : 2 * N - 5] for part, tensor in parts.items()}
    assert torch.equal(kernels.linear(rows, format, cut), whole[:, torch.arange(N - 5, 2 * N - 5) % N])
    codes = "mask" if name == "sparse" else "codes"
    odd = torch.cat([torch.zeros(1, dtype=parts[codes].dtype, device=DEVICE), parts[codes].flatten()])[1:]
    assert torch.equal(kernels.linear(rows, format, {**parts, codes: odd.view_as(parts[codes])}), whole)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_are_rounded_to_int8_as_in_torch(kernels: ModuleType) -> None:
    rows = drawn(6, 300) * torch.tensor([1e-35, 1.0, 1e30, 0.0, 1.0, 1.0])[:, None]
    rows[4] = torch.arange(300) - 150.5  # ties
    rows[4, 0] = 254
    codes, scales = kernels._rounded(rows.to(DEVICE))
    want, want_scales = packed.rounded_rows(rows)
    assert torch.equal(codes.cpu(), want)
    assert torch.equal(scales.cpu(), want_scales[:, 0])
    rows[5, 7] = torch.nan
    format = parse("int8")
    out = kernels.linear(rows.to(DEVICE), format, moved(format.pack(drawn(4, 300))))
    assert out[5].isnan().all()
    assert out[:5].isfinite().all()


def test_a_damaged_mask_reads_no_other_rows(kernels: ModuleType) -> None:
    format, N, K = parse("sparse-50"), 3, 64
    parts = format.pack(drawn(N, K, seed=2))
    rows = drawn(2, K)
    whole = kernels.linear(rows.to(DEVICE), format, moved(parts)).cpu()
    parts["mask"][1] = 255
    parts["values"][2] = torch.nan
    found = kernels.linear(rows.to(DEVICE), format, moved(parts)).cpu()
    assert torch.equal(found[:, 0], whole[:, 0])
    assert found[:, 1].isfinite().all()
    unmasked = pack_mask(torch.arange(K) < format.stored(K)).expand(N, -1)  # all that the row has values for
    weight = format.unpack({**parts, "mask": unmasked.contiguous()})
    assert close(found[:, 1:2], rows, weight[1:2], 0.0)


def test_what_does_not_fit_is_refused(kernels: ModuleType) -> None:
    format = parse("mxfp4")
    parts = moved(format.pack(drawn(4, 64)))
    rows = drawn(2, 64).to(DEVICE)
    with pytest.raises(InputError, match=r"mxfp4 weights with 64 inputs .* found float32 \[2, 63\]"):
        kernels.linear(rows[:, 1:], format, parts)
    with pytest.raises(InputError, match="found int64"):
        kernels.linear(rows.long(), format, parts)
    with pytest.raises(InputError, match="'scales' of mxfp4 weights is on meta"):
        kernels.linear(rows, format, {**parts, "scales": parts["scales"].to("meta")})
    with pytest.raises(InputError, match="'bias' of mxfp4 weights is on meta"):
        kernels.linear(rows, format, parts, torch.empty(4, device="meta"))


class Plain(Format):
    """A format of somebody else's."""

    name = "plain"

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return {"all": Part((N, K), torch.float32)}

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        return {"all": weight_NK}

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["all"].to(dtype)


def test_a_format_without_a_kernel_is_unpacked(kernels: ModuleType) -> None:
    weight, rows = drawn(4, 32).to(DEVICE), drawn(2, 32).to(DEVICE)
    assert kernels.family(Plain()) is None
    assert torch.equal(kernels.linear(rows, Plain(), {"all": weight}), nn.functional.linear(rows, weight))
    with pytest.raises(InputError, match="plain has no kernel to tune"):
        kernels.tune(Plain(), 4, 32)


def test_scale_rules_share_a_kernel(kernels: ModuleType) -> None:
    format = parse("mxfp4-rceil")
    assert kernels.family(format) == "mxfp4"
    parts, rows = format.pack(drawn(5, 64)), drawn(2, 64)
    assert close(kernels.linear(rows.to(DEVICE), format, moved(parts)), rows, format.unpack(parts), 0.0)


def test_a_model_on_stored_weights_runs_on_the_device_backend(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    model = tiny_models.tiny("llama", attention="eager", **sizes).to(DEVICE)
    format, calls = parse("mxfp6_e2m3"), []
    for path in ("model.layers.0.mlp.down_proj", "lm_head"):  # one layer inside, and the last
        layer = model.get_submodule(path)
        model.set_submodule(path, PackedLinear.of(layer.weight, layer.bias, format))

    def linear(x: Tensor, *given: Any) -> Tensor:
        calls.append(x.shape)
        return kernels.linear(x, *given)

    prompt = [3, 5, 7]
    stock = tiny_models.session(model, prompt)
    expected = stock.forward(TokenTree.chain([9, 8])).logits
    monkeypatch.setattr(packed, "linear", linear)
    backend = CudaBackend.open(model, kernels="triton")
    wide, narrow = (Session(backend.fork(0)) for _ in range(2))
    wide.append(prompt)
    rows = wide.forward(TokenTree.chain([9, 8])).logits[-2:]
    assert torch.allclose(rows, expected[-2:], atol=2e-5)
    assert len(calls) >= 4
    narrow.append([*prompt, 9])
    narrow.prefill()
    assert torch.equal(narrow.forward().logits[-1], rows[0])
