"""The device kernels: on a GPU where there is one, else by Triton's interpreter; and their twin in plain torch.

Bit for bit means: against the same kernel with other rows beside. Values are compared with float64 torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attention_cases import Shape, chain, expected, rows, tree
from torch import Tensor
from triton_ready import DEVICE, need_triton

from specdec.kernels import twin
from specdec.kernels.plan import Layout, num_parts, size, views
from specdec.runtime.backend import Step
from specdec.runtime.device import DeviceSlots, Sight, sight, write_plan

WIDTHS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of one rounding to the dtype; the interpreter cuts bfloat16 off instead of rounding it.
ULP = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-48}


@pytest.fixture(scope="module", params=["triton", "twin"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "twin":
        return twin
    need_triton()
    from specdec.kernels import triton_ops

    return triton_ops


def made(kernels: ModuleType, layout: Layout) -> object:
    return twin.TwinKernels(layout) if kernels is twin else kernels.TritonKernels(layout)


def device_of(kernels: ModuleType) -> torch.device:
    return torch.device("cpu") if kernels is twin else DEVICE


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 100), (16, 16), (33, 640)])
def test_linear_is_the_product_and_its_rows_are_alone(
    kernels: ModuleType, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    noise = torch.Generator().manual_seed(1)
    x, w, b = (torch.randn(*s, generator=noise).to(dtype) for s in ((64, inputs), (outputs, inputs), (outputs,)))
    want = x.double() @ w.double().T + b.double()
    x, w, b = (t.to(device_of(kernels)) for t in (x, w, b))
    whole = kernels.linear(x, w, b)
    room = ULP[dtype] * want.abs() + 64 * ULP[torch.float64 if dtype == torch.float64 else torch.float32]
    assert ((whole.cpu().double() - want).abs() <= room).all()
    for width in WIDTHS:
        for start in {0, 1, 64 - width} if width < 64 else {0}:
            assert torch.equal(kernels.linear(x[start : start + width], w, b), whole[start : start + width])
    assert torch.equal(kernels.linear(x[None, :3], w), kernels.linear(x[:3], w)[None])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_sums(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = torch.randn(64, 5000, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = kernels.row_sum(x.to(device_of(kernels)))
    want = x.double().sum(-1)
    assert ((whole.cpu().double() - want).abs() <= ULP[dtype] * want.abs() + 4e-4 * (dtype != torch.float64)).all()
    for width in WIDTHS:
        assert torch.equal(kernels.row_sum(x[:width].to(device_of(kernels))), whole[:width])


class Texts:
    """Keys and values of sequences of two layers, of which the second is looked at; and steps over them."""

    def __init__(self, kernels: ModuleType, shape: Shape):
        self.shape, self.device = shape, device_of(kernels)
        heads = (shape.kv_heads, shape.size, shape.value_size)
        self.kernels = made(kernels, Layout(((1, 3, 5), heads)))

    def slots(self, k: Tensor, v: Tensor, capacity: int) -> DeviceSlots:
        slots = DeviceSlots(self.kernels, self.shape.dtype, self.device)
        slots.reserve(capacity)
        slots._memory.fill_(torch.nan)  # what nobody wrote must not be read
        keys, values = self.kernels.layout.planes(slots._memory, 1)
        keys[:, : k.shape[1]], values[:, : v.shape[1]] = k.to(self.device), v.to(self.device)
        return slots

    def step(
        self, texts: list[tuple[DeviceSlots, Step]], q: Tensor, k: Tensor, v: Tensor, width: int, tail: int = 16
    ) -> Tensor:
        """`[M, H, E]` of the steps' rows, padded to `width`."""
        count = q.shape[1]
        seen = [sight(step) for _, step in texts]
        plan = write_plan(texts, width, tail, False, seen).to(self.device)
        q, k, v = (torch.cat((t, t.new_full((t.shape[0], width - count, t.shape[2]), 9.0)), 1) for t in (q, k, v))
        self.kernels.num_parts = num_parts(max(slots.capacity for slots, _ in texts))
        s = self.shape
        given = (t[None].to(self.device) for t in (q, k, v))
        out = self.kernels.attend(*given, plan, 1, s.scale, s.softcap, s.window)
        assert not out[0, count:].any()
        return out[0, :count].cpu()


def step_of(start: int, prefix: int, seen: tuple[Tensor, Tensor]) -> Step:
    block, places = seen
    return Step(torch.zeros(len(block), dtype=torch.int64), prefix, block, places, start, 1)


SHAPES = [
    Shape(),
    Shape(dtype=torch.bfloat16, heads=4, kv_heads=1, size=64, value_size=64),
    Shape(dtype=torch.float64, heads=3, kv_heads=3, size=7, value_size=5),
    Shape(softcap=3.0, window=33),
    Shape(dtype=torch.float16, window=260, size=33, value_size=100, softcap=20.0),
    Shape(heads=20, kv_heads=1, size=16, value_size=16, window=5),
]
CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-13}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 64, 300, 700])
def test_attention_is_softmax_attention_and_its_rows_are_alone(kernels: ModuleType, shape: Shape, length: int) -> None:
    num = 7
    q, k, v = rows(shape, length + num, seed=3)
    texts = Texts(kernels, shape)
    new = [t[:, length:] for t in (q, k, v)]
    slots = texts.slots(k[:, :length], v[:, :length], length + num)
    whole = texts.step([(slots, step_of(length, length, chain(length, num)))], *new, width=num)
    ages = torch.arange(length, length + num)[:, None] - torch.arange(length + num)
    visible = (ages >= 0) & (ages < (shape.window or length + num))
    assert (whole.double() - expected(shape, new[0], k, v, visible)).abs().max() < CLOSE[shape.dtype]
    alone = texts.slots(k[:, :length], v[:, :length], 2048)  # of another capacity
    for m in range(num):
        row = [t[:, m : m + 1] for t in new]
        at = length + m
        assert torch.equal(texts.step([(alone, step_of(at, at, chain(at, 1)))], *row, width=2)[0], whole[m])


PARENTS = [-1, -1, 0, 0, 1, 2, 2, 5, 4, 7, 9, 10, 6]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix", [1, 62, 253])
def test_tree_nodes_have_the_bits_of_their_paths(kernels: ModuleType, shape: Shape, prefix: int) -> None:
    q, k, v = rows(shape, prefix + len(PARENTS), seed=4)
    texts = Texts(kernels, shape)
    nodes = [t[:, prefix:] for t in (q, k, v)]
    slots = texts.slots(k[:, :prefix], v[:, :prefix], 300)
    out = texts.step([(slots, step_of(prefix, prefix, tree(prefix, PARENTS)))], *nodes, width=16)
    for leaf in (3, 8, 11, 12):
        path = [leaf]
        while PARENTS[path[0]] >= 0:
            path.insert(0, PARENTS[path[0]])
        plain = texts.slots(k[:, :prefix], v[:, :prefix], 300)
        for depth, node in enumerate(path):
            at = prefix + depth
            row = [t[:, node : node + 1] for t in nodes]
            assert torch.equal(texts.step([(plain, step_of(at, at, chain(at, 1)))], *row, width=1)[0], out[node])
    # Accepted: the path's slots become the text's.
    slots.gather([prefix + node for node in path], prefix)
    at = prefix + len(path)
    row = [t[:, :1] for t in nodes]
    after = [texts.step([(s, step_of(at, at, chain(at, 1)))], *row, width=1) for s in (slots, plain)]
    assert torch.equal(*after)


def test_a_tree_may_grow_in_two_steps(kernels: ModuleType) -> None:
    shape = Shape(window=40)
    q, k, v = rows(shape, 50 + len(PARENTS), seed=5)
    texts = Texts(kernels, shape)
    nodes = [t[:, 50:] for t in (q, k, v)]
    block, places = tree(50, PARENTS)
    one, two = (texts.slots(k[:, :50], v[:, :50], 80) for _ in range(2))
    whole = texts.step([(one, step_of(50, 50, (block, places)))], *nodes, width=13)
    first = (block[:5, :5], places[:5])
    head = texts.step([(two, step_of(50, 50, first))], *(t[:, :5] for t in nodes), width=8)
    rest = (block[5:], places)
    tail = texts.step([(two, step_of(55, 50, rest))], *(t[:, 5:] for t in nodes), width=8)
    assert torch.equal(torch.cat((head, tail)), whole)


def test_sequences_in_one_step_have_the_bits_that_they_have_alone(kernels: ModuleType) -> None:
    shape = Shape(dtype=torch.bfloat16, heads=4, kv_heads=2, size=16, value_size=16)
    lengths, seen = (3, 600, 64), [chain(3, 5), chain(600, 1), tree(64, PARENTS)]
    drawn = [rows(shape, n + len(s[1]), seed=n) for n, s in zip(lengths, seen, strict=True)]
    texts = Texts(kernels, shape)
    steps = [step_of(n, n, s) for n, s in zip(lengths, seen, strict=True)]
    parts = [[t[:, n:] for t in text] for n, text in zip(lengths, drawn, strict=True)]
    held = [
        [texts.slots(k[:, :n], v[:, :n], n + 20) for n, (_, k, v) in zip(lengths, drawn, strict=True)] for _ in "ab"
    ]
    alone = [
        texts.step([(slots, step)], *part, width=part[0].shape[1])
        for slots, step, part in zip(held[0], steps, parts, strict=True)
    ]
    packed = [torch.cat(kind, 1) for kind in zip(*parts, strict=True)]
    together = texts.step(list(zip(held[1], steps, strict=True)), *packed, width=32)
    assert torch.equal(together, torch.cat(alone))


def test_what_a_row_cannot_see_does_not_touch_it(kernels: ModuleType) -> None:
    shape = Shape(window=6)
    q, k, v = rows(shape, 20, seed=8)
    block, places = tree(12, [-1, 0, 1, 1, 3, 4, 5, 6])  # node 2 is a leaf: others must not see it
    texts = Texts(kernels, shape)
    outs = []
    for _ in range(2):
        slots = texts.slots(k[:, :12], v[:, :12], 64)
        new = [t[:, 12:] for t in (q, k, v)]
        outs.append(texts.step([(slots, step_of(12, 12, (block, places)))], *new, width=8))
        k[:, [0, 3, 14]], v[:, [0, 3, 14]] = torch.nan, torch.inf
    keep = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(outs[0][keep], outs[1][keep])
    assert not torch.isfinite(outs[1][2]).all()


def test_a_prefill_has_the_bits_of_single_rows(kernels: ModuleType) -> None:
    shape = Shape(heads=2, kv_heads=1, size=16, value_size=16)
    q, k, v = rows(shape, 130, seed=9)
    texts = Texts(kernels, shape)
    empty = k[:, :0]
    whole = texts.step([(texts.slots(empty, empty, 130), step_of(0, 0, chain(0, 130)))], q, k, v, width=130, tail=0)
    for at in (0, 1, 63, 64, 65, 129):
        slots = texts.slots(k[:, :at], v[:, :at], 256)
        row = [t[:, at : at + 1] for t in (q, k, v)]
        assert torch.equal(texts.step([(slots, step_of(at, at, chain(at, 1)))], *row, width=1)[0], whole[at])


def test_large_logits_do_not_overflow(kernels: ModuleType) -> None:
    shape = Shape(heads=2, kv_heads=2, softcap=0.0)
    q, k, v = rows(shape, 100, seed=9)
    q *= 1000
    texts = Texts(kernels, shape)
    slots = texts.slots(k[:, :99], v[:, :99], 100)
    row = [t[:, 99:] for t in (q, k, v)]
    out = texts.step([(slots, step_of(99, 99, chain(99, 1)))], *row, width=1)
    assert (out.double() - expected(shape, row[0], k, v, torch.ones(1, 100, dtype=torch.bool))).abs().max() < 2e-3


_COMPILE = """
import triton.language as tl, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdec.kernels import triton_ops as ops


def compiled(kernel, kinds, fixed, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in fixed.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


bn, bk, warps = ops._linear_tile(2048, 2048, 2)
linear = compiled(
    ops._linear, dict.fromkeys(["x", "w", "bias", "y"], "*bf16"),
    dict(BIAS=False, EVEN=True, WIDE=False, ACC=tl.float32, BM=16, BN=bn, BK=bk), num_warps=warps, num_stages=4,
)
plan = dict.fromkeys(["rows", "tail", "positions"], "*i64")
partial = dict.fromkeys(["mixed", "top", "total"], "*fp32")
attend = compiled(
    ops._attend_part, dict(plan, **partial, q="*bf16"),
    dict(SCALE=0.1, SOFTCAP=30.0, WINDOW=512, V=2, G=4, D=64, E=64, BG=16, BD=64, BE=64, BS=64, F=5, PARTS_MAX=32,
         ACC=tl.float32, WIDE=False), num_warps=4, num_stages=2,
)
merge = compiled(
    ops._attend_merge, dict(plan, **partial, out="*bf16"),
    dict(WINDOW=512, H=8, E=64, BE=64, BS=64, F=5, PARTS_MAX=32, ACC=tl.float32), num_warps=1,
)
store = compiled(
    ops._store, dict(plan, k="*bf16", v="*bf16"), dict(V=2, D=64, E=64, BD=64, BE=64, F=5), num_warps=1
)
print(all("cubin" in asm for asm in (linear, attend, merge, store)), *("mma" in asm["ptx"] for asm in (linear, attend)))
"""


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """To machine code of compute capability 9.0, on tensor cores: the interpreter runs what no compiler takes, too."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["True"] * 3, run.stderr[-2000:]


def test_a_plan_names_each_row_once() -> None:
    """The plan of a tree on a prefix of 10: what is seen behind the plain slots stands in tails."""
    block, places = tree(10, [-1, -1, 0, 1])
    seen: Sight = sight(step_of(10, 10, (block, places)))
    assert seen.plain_M.tolist() == [1, 0, 1, 0]
    assert seen.length_M.tolist() == [1, 1, 2, 2]
    assert seen.tail_MT.tolist() == [[0, 0], [1, 0], [2, 0], [1, 3]]
    plan = views(torch.zeros(size(4, 2), dtype=torch.int64), 4)
    assert [tuple(part.shape) for part in plan] == [(4,), (4,), (4, 5), (4, 2)]
