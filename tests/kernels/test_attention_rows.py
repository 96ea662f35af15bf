"""Attention: a row's bits are those of plain decoding, whatever rides along and wherever its ancestors stand."""

import pytest
import torch
from attention_cases import Shape, attend, chain, expected, one_by_one, prefilled, rows, step, tree

from specdec import kernels

SHAPES = [
    Shape(),
    Shape(dtype=torch.bfloat16, heads=4, kv_heads=1, size=64, value_size=64),
    Shape(dtype=torch.float64, heads=3, kv_heads=3, size=7, value_size=5),
    Shape(softcap=3.0, window=33),
    Shape(dtype=torch.bfloat16, window=260, size=33, value_size=100, softcap=20.0),
    Shape(heads=32, kv_heads=1, size=16, value_size=16, window=5),
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float64: 1e-13}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_those_of_softmax_attention(shape: Shape, variant: str) -> None:
    q, k, v = rows(shape, 300, seed=1)
    slots = prefilled(shape, k[:, :270], v[:, :270])
    out = step(shape, slots, 270, 270, q[:, 270:], k[:, 270:], v[:, 270:], *chain(270, 30))
    places = torch.arange(300)
    ages = places[270:, None] - places
    visible = (ages >= 0) & (ages < (shape.window or 300))
    want = expected(shape, q[:, 270:], k, v, visible)
    assert (out.double() - want).abs().max() < TOLERANCE[shape.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_prefix", [0, 3, 250])
def test_steps_of_many_rows_equal_rows_alone(shape: Shape, num_prefix: int, variant: str) -> None:
    q, k, v = rows(shape, num_prefix + 40, seed=2)
    alone, cache = one_by_one(shape, q, k, v)
    for widths in ((40,), (1, 7, 32), (13, 8, 2, 17)):
        slots = prefilled(shape, k[:, :num_prefix], v[:, :num_prefix], capacity=num_prefix + 41) if num_prefix else None
        if slots is None:
            slots = kernels.slots(1)
            slots.reserve(64)
        at = num_prefix
        for width in widths:
            part = (t[:, at : at + width] for t in (q, k, v))
            out = step(shape, slots, at, at, *part, *chain(at, width))
            assert torch.equal(out, alone[at : at + width])
            at += width
        assert torch.equal(slots.keys(0)[:, :at], cache.keys(0)[:, :at])


PARENTS = [-1, -1, 0, 0, 1, 2, 2, 5, 4, 7, 9, 10, 6]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_prefix", [1, 31, 253])
def test_tree_nodes_equal_their_paths_as_plain_text(shape: Shape, num_prefix: int, variant: str) -> None:
    q, k, v = rows(shape, num_prefix + len(PARENTS), seed=3)
    slots = prefilled(shape, k[:, :num_prefix], v[:, :num_prefix])
    nodes = [t[:, num_prefix:] for t in (q, k, v)]
    out = step(shape, slots, num_prefix, num_prefix, *nodes, *tree(num_prefix, PARENTS))
    for leaf in (3, 8, 11, 12):
        path = [leaf]
        while PARENTS[path[0]] >= 0:
            path.insert(0, PARENTS[path[0]])
        text = [torch.cat((t[:, :num_prefix], t[:, [num_prefix + n for n in path]]), 1) for t in (q, k, v)]
        plain = prefilled(shape, text[1][:, :num_prefix], text[2][:, :num_prefix])
        for depth, node in enumerate(path):
            at = num_prefix + depth
            row = [t[:, at : at + 1] for t in text]
            assert torch.equal(step(shape, plain, at, at, *row, *chain(at, 1))[0], out[node])


def test_a_tree_may_grow_in_two_steps() -> None:
    shape = Shape(window=40)
    q, k, v = rows(shape, 50 + len(PARENTS), seed=4)
    nodes = [t[:, 50:] for t in (q, k, v)]
    block, places = tree(50, PARENTS)
    whole = step(shape, prefilled(shape, k[:, :50], v[:, :50]), 50, 50, *nodes, block, places)
    slots = prefilled(shape, k[:, :50], v[:, :50])
    first = step(shape, slots, 50, 50, *(t[:, :5] for t in nodes), block[:5, :5], places[:5])
    rest = step(shape, slots, 55, 50, *(t[:, 5:] for t in nodes), block[5:], places)
    assert torch.equal(torch.cat((first, rest)), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 700])
def test_long_contexts_on_two_threads(dtype: torch.dtype, window: int, two_threads: None) -> None:
    """Chunks are spread over threads and merged in order: the bits of one thread, and of a prefill."""
    shape = Shape(dtype=dtype, size=64, value_size=64, window=window)
    q, k, v = rows(shape, 1600, seed=5)
    slots = prefilled(shape, k[:, :1590], v[:, :1590])
    row = [t[:, 1590:1591] for t in (q, k, v)]
    last = [t[:, 1590:] for t in (q, k, v)]
    two = step(shape, slots, 1590, 1590, *row, *chain(1590, 1)), step(shape, slots, 1590, 1590, *last, *chain(1590, 10))
    torch.set_num_threads(1)
    one = step(shape, slots, 1590, 1590, *row, *chain(1590, 1)), step(shape, slots, 1590, 1590, *last, *chain(1590, 10))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert torch.equal(one[0][0], one[1][0])


def test_a_forward_in_one_piece_equals_rows_over_its_cache(two_threads: None) -> None:
    shape = Shape(size=64, value_size=64)
    q, k, v = rows(shape, 520, seed=6)
    slots = kernels.slots(1)
    slots.reserve(600)
    whole = step(shape, slots, 0, 0, q, k, v, *chain(0, 520))
    for i in (0, 1, 255, 256, 257, 511, 519):
        row = [t[:, i : i + 1] for t in (q, k, v)]
        assert torch.equal(step(shape, slots, i, i, *row, *chain(i, 1))[0], whole[i])


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_sequences_in_one_step_equal_sequences_alone(shape: Shape, threads: int, two_threads: None) -> None:
    torch.set_num_threads(threads)
    lengths, widths = (3, 300, 64), (5, 1, len(PARENTS))
    texts = [rows(shape, n + m, seed=10 + n) for n, m in zip(lengths, widths, strict=True)]
    caches = [prefilled(shape, k[:, :n], v[:, :n]) for n, (_, k, v) in zip(lengths, texts, strict=True)]
    blocks = [chain(3, 5), chain(300, 1), tree(64, PARENTS)]
    parts = [[t[:, n:] for t in text] for n, text in zip(lengths, texts, strict=True)]
    alone = [
        step(shape, cache.fork(n), n, n, *part, *seen)
        for cache, n, part, seen in zip(caches, lengths, parts, blocks, strict=True)
    ]
    steps = kernels.steps()
    for cache, n, width, seen in zip(caches, lengths, widths, blocks, strict=True):
        steps.add(cache, n, width, n, *seen)
    packed = [torch.cat(kind, 1) for kind in zip(*parts, strict=True)]
    out = attend(shape, steps.handle(), *packed)
    assert torch.equal(out, torch.cat(alone))


def test_views_after_a_transpose_give_the_same_bits() -> None:
    shape = Shape()
    q, k, v = rows(shape, 9, seed=7)
    views = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    odd = [torch.stack((t, t), -1)[..., 0] for t in (q, k, v)]  # no dense last dimension
    alone, _ = one_by_one(shape, q, k, v)
    for given in (views, odd):
        slots = kernels.slots(1)
        slots.reserve(16)
        assert torch.equal(step(shape, slots, 0, 0, *given, *chain(0, 9)), alone)


def test_what_a_row_cannot_see_does_not_touch_it() -> None:
    """Infinities and NaN in slots that are hidden by the tree or by the window stay there."""
    shape = Shape(window=6)
    q, k, v = rows(shape, 20, seed=8)
    places = torch.arange(12, 20)
    block = torch.ones(8, 8, dtype=torch.bool).tril()
    block[4:, 2] = False
    places[4:] -= 1
    places[3] -= 1  # slot 14 is a sibling of slot 15
    block[3, 2] = False
    clean = step(shape, prefilled(shape, k[:, :12], v[:, :12]), 12, 12, *(t[:, 12:] for t in (q, k, v)), block, places)
    k[:, [0, 3, 14]] = torch.nan
    v[:, [0, 3, 14]] = torch.inf
    dirty = step(shape, prefilled(shape, k[:, :12], v[:, :12]), 12, 12, *(t[:, 12:] for t in (q, k, v)), block, places)
    keep = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(clean[keep], dirty[keep])
    assert not torch.isfinite(dirty[2]).all()


def test_large_logits_do_not_overflow(variant: str) -> None:
    shape = Shape(heads=2, kv_heads=2)
    q, k, v = rows(shape, 300, seed=9)
    q *= 1000
    slots = prefilled(shape, k[:, :299], v[:, :299])
    out = step(shape, slots, 299, 299, *(t[:, 299:] for t in (q, k, v)), *chain(299, 1))
    want = expected(shape, q[:, 299:], k, v, torch.ones(1, 300, dtype=torch.bool))
    assert (out.double() - want).abs().max() < 1e-3
