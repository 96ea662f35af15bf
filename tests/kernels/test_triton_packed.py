"""Products with stored weights on the device kernels: on a GPU where there is one, else by Triton's interpreter.

Bit for bit means: against the same kernel with other rows beside. Values are compared with float64 products of what the
format itself unpacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.kernels import packed, tuning
from specdec.kernels.tuning import Schedule
from specdec.quant import Format, PackedLinear, parse
from specdec.quant.bits import pack_bits
from specdec.quant.format import Part, Parts
from specdec.quant.sparse import pack_mask
from specdec.runtime.backends.cuda import CudaBackend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
CODED = (*FLOATS, "mxint8", "int4", "int4-g64-asym", "int4-g128")
NAMES = (*CODED, "int8", "sparse", "sparse-50", "sparse-2x4")
# Of one rounding to the dtype.
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    if DEVICE.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
    from specdec.kernels import triton_ops, triton_packed

    if DEVICE.type == "cpu" and not triton_ops.INTERPRETED:
        pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1")
    return triton_packed


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(parts: Parts) -> dict[str, Tensor]:
    return {name: part.to(DEVICE) for name, part in parts.items()}


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
    unmasked = pack_mask(torch.arange(K) < format.stored(K))  # which is all that the row has values for
    assert torch.equal(found[:, 1], rows @ format.unpack({**parts, "mask": unmasked.expand(3, -1)})[1]) or close(
        found[:, 1:2], rows, format.unpack({**parts, "mask": unmasked.expand(3, -1).contiguous()})[1:2], 0.0
    )


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


def test_the_order_of_sums_follows_from_shape_and_dtype(kernels: ModuleType) -> None:
    assert [kernels.strips(N, 4096, torch.bfloat16) for N in (256, 8191, 8192)] == [4, 4, 1]
    assert [kernels.strips(256, K, torch.bfloat16) for K in (992, 1024)] == [1, 4]
    assert kernels.strips(256, 4096, torch.float32) == 1
    for code in kernels.CODES.values():
        assert {kernels.depth(code, 4, dtype) for dtype in kernels.DTYPES} == {128}  # covers the largest group
    for N in (64, 4096, 30000):
        for wide in (False, True):
            for strips in (1, 4):
                options = tuning.candidates(N, wide, strips, 2)
                assert len(set(options)) == len(options) > 4
                assert all(option.rows in ((16, 32) if wide else (16,)) for option in options)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    tuning.schedule.cache_clear()
    yield tuning.path_for(DEVICE)
    tuning.schedule.cache_clear()


def test_the_fastest_schedule_is_kept(kernels: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format, told, every = parse("mxfp4"), [], tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *given: every(*given)[:4])

    def seconds(calls: list[Any]) -> float:
        assert calls[0]().shape in ((1, 20), (17, 20))
        told.append(len(told))
        return 1.0 if len(told) in (3, 6) else 2.0

    before = {wide: tuning.schedule("mxfp4 bfloat16", 20, 64, wide, 1, 2, DEVICE) for wide in (False, True)}
    found = kernels.tune(format, 20, 64, device=DEVICE, num_rows=(1, 17), seconds=seconds)
    assert len(told) == 8
    for M, plan in found.items():
        wide = M > 16
        assert plan != before[wide]
        assert tuning.schedule("mxfp4 bfloat16", 20, 64, wide, 1, 2, DEVICE) == plan
        assert tuning.schedule("mxfp4 bfloat16", 20, 96, wide, 1, 2, DEVICE) == before[wide]
    assert json.loads(cache.read_text())["mxfp4 bfloat16 20x64 narrow"] == list(found[1])


def test_a_schedule_that_changes_bits_is_not_taken(kernels: ModuleType, cache: Path) -> None:
    options = tuning.candidates(20, False, 1, 2)
    cost = {option: float(-i) for i, option in enumerate(options)}

    def run(option: Schedule) -> Tensor:
        return torch.tensor([1.0 if option in options[:3] else 1.0 + 2**-23])

    assert tuning.fastest("x", options, run, cost.__getitem__, DEVICE) == options[2]


@pytest.mark.parametrize(
    "stored",
    ["{", "[]", '{"mxfp4 bfloat16 20x64 narrow": [64, 16, 4, 4]}', '{"mxfp4 bfloat16 20x64 narrow": ["16", 16]}'],
)
def test_a_cache_that_was_written_by_others_is_not_trusted(kernels: ModuleType, cache: Path, stored: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(stored)
    assert tuning.schedule("mxfp4 bfloat16", 20, 64, False, 1, 2, DEVICE) == tuning.default(20, False, 1, 2)


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


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments/quantised/gpu.py"
    spec = importlib.util.spec_from_file_location("experiments_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="torch finds none here"):
        script().main()


def test_the_benchmark_judges_by_bytes() -> None:
    gpu = script()
    where = {"inputs": 64, "outputs": 32, "rows": 1}
    times = {gpu.TORCH: (4096, 8e-6), gpu.OURS: (4096, 16e-6), "mxfp4": (1024, 2.5e-6)}
    rows = [
        {"name": name, **where, "bytes": size, "fewer_bytes": 4096 / size, "seconds": s, "low": s, "high": s}
        for name, (size, s) in times.items()
    ]
    *_, found = products = gpu.judged(rows, 1e9)
    assert found["over_torch"] == pytest.approx(3.2)
    assert found["over_own"] == pytest.approx(6.4)
    assert found["reach"] == pytest.approx(0.8)
    assert found["of_bandwidth"] == pytest.approx(0.4096)
    found["seconds"] *= 1.1
    about = {"date": "d", "torch": "t", "triton": "3", "bandwidth": 1e9, "rounds": 3, "arguments": "", "device": "X"}
    text = gpu.markdown({**about, "products": gpu.judged(products, 1e9)})
    assert "Below 0.8 of the bytes' ratio for one row: mxfp4 64×32 (0.73)." in text
    heads, rule, *cells = (line for line in text.splitlines() if line.startswith("|"))
    assert {line.count("|") for line in (heads, rule, *cells)} == {len(gpu.HEADS) + 1}
    assert len(cells) == 3


_COMPILE = """
import json, re, sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdec.kernels import triton_packed as host, triton_products as ops, tuning
from specdec.quant import parse


def compiled(capability, kernel, kinds, fixed, plan, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in kinds or n in ("N", "K")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, aligned)
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False, **options)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def one(capability, name, N, K, wide):
    format = parse(name)
    family = host.family(format)
    parts = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in format.parts(N, K).items()}
    common = dict(x="*bf16", bias="*bf16", y="*bf16")
    if family in host.CODES:
        fixed = host.fixed(host.CODES[family], parts, N, K, torch.bfloat16)
        plan = tuning.default(N, wide, fixed["S"], 2)
        kinds = dict(common, codes="*i32", scales="*bf16" if family == "int4" else "*u8", zeros="*u8")
        made = compiled(capability, ops.product, kinds, dict(fixed, BIAS=True, BM=plan.rows, BN=plan.outputs), plan)
    elif family == "int8":
        plan = tuning.default(N, wide, 1, 1)
        kinds = dict(common, x="*i8", codes="*i8", scales="*fp32", x_scales="*fp32")
        fixed = dict(BIAS=True, WIDE=False, BM=plan.rows, BN=plan.outputs, BK=256)
        made = compiled(capability, ops.int8, kinds, fixed, plan)
    else:
        plan = tuning.default(N, wide, 1, 2)
        kinds = dict(common, mask="*i32", values="*bf16")
        fixed = dict(BIAS=True, WIDE=False, ACC=tl.float32, BM=plan.rows, BN=plan.outputs, BK=512)
        made = compiled(capability, ops.sparse, kinds, fixed, plan)
    text = made.asm["ttgir"]
    # What decides the order within a tile: the instruction, and which inputs one of them takes.
    order = sorted(set(re.findall(r"kWidth = \\d+|versionMajor = \\d+", text)))
    return dict(order=order, cubin="cubin" in made.asm, shared=made.metadata.shared, mma="mma" in made.asm["ptx"])


print(json.dumps([one(*given) for given in json.loads(sys.argv[1])]))
"""
# Shared memory of one block, in bytes: compute capability 8.0 and 9.0.
ROOM = {80: 163 << 10, 90: 227 << 10}


def compile_all(jobs: list[tuple[int, str, int, int, bool]], folder: Path) -> list[dict[str, Any]]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(jobs)],
        env={**environment, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(run.stdout)
    for job, made in zip(jobs, found, strict=True):
        assert made["cubin"], job
        assert made["mma"], job
        assert made["shared"] <= ROOM[job[0]], job
        assert "versionMajor = 2" in made["order"], job
    return found


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """To machine code, on tensor cores; and tiles of few and of many rows take their inputs in the same order."""
    jobs = [(90, "mxfp4", 2048, 2048, False), (90, "mxfp4", 2048, 2048, True), (80, "int8", 2048, 2048, False)]
    narrow, wide, _ = compile_all(jobs, tmp_path)
    assert narrow["order"] == wide["order"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    shapes = [(2048, 2048), (28672, 8192)]
    jobs = [(capability, name, *shape, wide) for name in NAMES for shape in shapes for wide in (False, True)]
    found = compile_all(jobs, tmp_path)
    for (job, one), (other, two) in pairwise(zip(jobs, found, strict=True)):
        if job[:4] == other[:4]:
            assert one["order"] == two["order"], job
