"""Attention over stored codes: the bits of attention over a cache that holds what the codes stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Shape, attend, chain, prefilled, rows, step, tree
from torch import Tensor

from specdec import kernels
from specdec.quant.kv import KV_CACHES, kv_format

SHAPES = [
    Shape(size=64, value_size=32),
    Shape(dtype=torch.bfloat16, heads=4, kv_heads=1, size=64, value_size=64),
    Shape(dtype=torch.float64, heads=3, kv_heads=3, size=32, value_size=96),
    Shape(softcap=3.0, window=33, size=32, value_size=32),
    Shape(dtype=torch.bfloat16, window=260, size=96, value_size=32, softcap=20.0),
    Shape(heads=32, kv_heads=1, size=32, value_size=64, window=5),
]
ODD = [Shape(), Shape(dtype=torch.bfloat16, size=33, value_size=100), Shape(dtype=torch.float64, size=7, value_size=5)]
CASES = [(name, shape) for name in KV_CACHES for shape in SHAPES] + [("int8", shape) for shape in ODD]
PARENTS = [-1, -1, 0, 0, 1, 2, 2, 5, 4, 7, 9, 10, 6]


def stored(name: str, t: Tensor) -> Tensor:
    """What a cache of that name makes of rows."""
    return kv_format(name).unpack(*kv_format(name).pack(t), t.dtype)


def wild(t: Tensor) -> Tensor:
    """Rows of very different sizes: large, tiny, zero."""
    t = t.clone()
    t[:, ::5] *= 1e4
    t[:, 1::7] *= 1e-6
    t[:, 3::11] = 0
    t[..., 0] *= 30
    return t


def both(name: str, shape: Shape, num: int, more: int, seed: int) -> tuple[Any, Any, list[Tensor], list[Tensor]]:
    """A quantised cache of `num` slots, an ordinary one of what it stores, and `more` rows for each."""
    q, k, v = rows(shape, num + more, seed)
    k, v = wild(k), wild(v)
    soft = stored(name, k), stored(name, v)
    mine = prefilled(shape, k[:, :num], v[:, :num], num + more, name)
    plain = prefilled(shape, soft[0][:, :num], soft[1][:, :num], num + more)
    return mine, plain, [t[:, num:] for t in (q, k, v)], [t[:, num:] for t in (q, *soft)]


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_codes_are_those_of_torch(name: str, shape: Shape, variant: str) -> None:
    _, k, v = rows(shape, 70, seed=1)
    slots = prefilled(shape, wild(k), wild(v), 80, name)
    for found, scales, given in (
        (slots.keys(0), slots.key_scales(0), wild(k)),
        (slots.values(0), slots.value_scales(0), wild(v)),
    ):
        codes, wanted = kv_format(name).pack(given)
        assert found.dtype == codes.dtype
        assert torch.equal(found[:, :70], codes)
        assert scales.dtype == wanted.dtype
        assert torch.equal(scales[:, :70], wanted)


def test_every_float_rounds_alike(variant: str) -> None:
    """Every sixteenth bfloat16 and its neighbours halfway between codes, in blocks of all sizes of the largest."""
    shape = Shape(heads=1, kv_heads=1, size=32, value_size=32)
    bits = torch.arange(0, 1 << 15, 5, dtype=torch.int32) << 16
    numbers = bits.view(torch.float32)
    numbers = numbers[torch.isfinite(numbers)]
    numbers = torch.cat((numbers, -numbers, numbers * 1.0625, numbers * (1 + 2**-20)))
    numbers = numbers[torch.isfinite(numbers)]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    spread, alike = (t[: len(t) // 32 * 32].view(1, -1, 32) for t in (numbers[order], numbers.sort().values))
    for name in KV_CACHES:
        for given in (spread, alike):
            slots = prefilled(shape, given, given.flip(-1), given.shape[1], name)
            for found, scales, t in (
                (slots.keys(0), slots.key_scales(0), given),
                (slots.values(0), slots.value_scales(0), given.flip(-1)),
            ):
                codes, wanted = kv_format(name).pack(t)
                assert torch.equal(found, codes)
                assert torch.equal(scales, wanted)


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@pytest.mark.parametrize("num", [0, 3, 250, 700])
def test_chains_have_the_bits_of_what_is_stored(name: str, shape: Shape, num: int, variant: str) -> None:
    mine, plain, new, soft = both(name, shape, max(num, 1), 40, seed=2)
    at = max(num, 1)
    if num == 0:
        mine, plain, at = kernels.slots(1, name), kernels.slots(1), 0
        mine.reserve(64)
        plain.reserve(64)
    done = 0
    for width in (1, 7, 32):
        a, b = ([t[:, done : done + width] for t in part] for part in (new, soft))
        out = step(shape, mine, at, at, *a, *chain(at, width))
        assert torch.equal(out, step(shape, plain, at, at, *b, *chain(at, width)))
        assert torch.isfinite(out).all()
        at, done = at + width, done + width


@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
@pytest.mark.parametrize("num", [1, 31, 253, 508])
def test_trees_have_the_bits_of_what_is_stored(name: str, shape: Shape, num: int, variant: str) -> None:
    """Also when a tree lies across the end of a chunk, grows in two steps, and is committed by moving slots."""
    mine, plain, new, soft = both(name, shape, num, len(PARENTS) + 1, seed=3)
    block, places = tree(num, PARENTS)
    outs = []
    for slots, part in ((mine, new), (plain, soft)):
        first = step(shape, slots, num, num, *(t[:, :5] for t in part), block[:5, :5], places[:5])
        rest = step(shape, slots, num + 5, num, *(t[:, 5:13] for t in part), block[5:], places)
        slots.gather([num + node for node in (0, 2, 6, 12)], num)
        last = [t[:, 13:] for t in part]
        outs.append((first, rest, step(shape, slots, num + 4, num + 4, *last, *chain(num + 4, 1))))
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)


def test_wide_trees_reach_far_behind_their_chunk() -> None:
    """Forty branches of ten nodes: a row's chunk lies in slots up to four hundred places on."""
    shape, num, depth, width = SHAPES[0], 250, 10, 40
    parents = [-1] * width + [node for node in range(width * (depth - 1))]
    for name in KV_CACHES:
        mine, plain, new, soft = both(name, shape, num, len(parents), seed=4)
        seen = tree(num, parents)
        assert torch.equal(step(shape, mine, num, num, *new, *seen), step(shape, plain, num, num, *soft, *seen))


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 700])
def test_chunks_on_two_threads(name: str, dtype: torch.dtype, window: int, two_threads: None) -> None:
    shape = Shape(dtype=dtype, size=64, value_size=64, window=window)
    mine, plain, new, soft = both(name, shape, 1590, 10, seed=5)
    for width in (1, 10):
        a, b = ([t[:, :width] for t in part] for part in (new, soft))
        out = step(shape, mine, 1590, 1590, *a, *chain(1590, width))
        assert torch.equal(out, step(shape, plain, 1590, 1590, *b, *chain(1590, width)))


@pytest.mark.parametrize("name", KV_CACHES)
def test_caches_of_all_kinds_share_a_step(name: str) -> None:
    shape = SHAPES[0]
    mine, plain, new, soft = both(name, shape, 20, 2, seed=6)
    steps = kernels.steps()
    for slots in (mine, plain):
        steps.add(slots, 20, 2, 20, *chain(20, 2))
    packed = [torch.cat(pair, 1) for pair in zip(new, soft, strict=True)]
    out = attend(shape, steps.handle(), *packed)
    assert torch.equal(out[:2], out[2:])


@pytest.mark.parametrize("name", KV_CACHES)
def test_growing_and_forking_keep_codes_and_scales(name: str) -> None:
    shape = SHAPES[0]
    mine, plain, new, soft = both(name, shape, 20, 1, seed=7)
    want = step(shape, plain, 20, 20, *soft, *chain(20, 1))
    twin = mine.fork(20)
    twin.gather([19, 18], 0)
    mine.reserve(300)
    assert torch.equal(step(shape, mine, 20, 20, *new, *chain(20, 1)), want)
    fresh = mine.fork(20)
    mine.gather([5], 2)
    assert torch.equal(step(shape, fresh, 20, 20, *new, *chain(20, 1)), want)
    assert not torch.equal(step(shape, twin, 20, 20, *new, *chain(20, 1)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "size"), [("int8", 2 * (64 + 4) + 2 * (32 + 4)), ("mxfp8", 2 * 66 + 2 * 33)])
def test_bytes(name: str, size: int, dtype: torch.dtype) -> None:
    shape = Shape(dtype=dtype, size=64, value_size=32)
    _, k, v = rows(shape, 5, seed=8)
    assert prefilled(shape, k, v, 16, name).num_bytes() == 16 * size


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", KV_CACHES)
def test_what_is_not_finite_stays_so(name: str, bad: float, variant: str) -> None:
    shape = Shape(heads=1, kv_heads=1, size=64, value_size=64)
    _, k, v = rows(shape, 4, seed=9)
    v[0, 2, 40] = bad
    codes, scales = kv_format(name).pack(v)
    broken = torch.zeros(1, 4, 64, dtype=torch.bool)
    broken[0, 2, 32 if name == "mxfp8" else 0 :] = True
    assert torch.equal(kv_format(name).unpack(codes, scales, v.dtype).isnan(), broken)
    slots = prefilled(shape, k, v, 8, name)
    assert torch.equal(slots.values(0)[:, :4], codes)
    assert torch.equal(slots.value_scales(0)[:, :4].nan_to_num(-1), scales.nan_to_num(-1))
    q, k, v = rows(shape, 1, seed=10)
    out = step(shape, slots, 4, 4, q, k, v, *chain(4, 1))
    assert torch.equal(out[0].isnan(), broken[:, 2])


def test_bad_kinds() -> None:
    with pytest.raises(RuntimeError, match="kind must be 'plain', 'int8' or 'mxfp8', got 'int4'"):
        kernels.slots(1, "int4")
    shape = Shape()
    _, k, v = rows(shape, 3, seed=11)
    with pytest.raises(RuntimeError, match=r"layer 0 has heads of size 40, .* blocks of 32; use int8"):
        prefilled(shape, k, v, 8, "mxfp8")
    with pytest.raises(RuntimeError, match="there are no scales"):
        prefilled(shape, k, v, 8).key_scales(0)
    with pytest.raises(RuntimeError, match="holds nothing yet"):
        kernels.slots(1, "int8").key_scales(0)
