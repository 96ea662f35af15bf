"""The cache and the step description: growing, moving, copying, and refusing what does not fit."""

from typing import Any

import pytest
import torch
from attention_cases import Shape, attend, chain, prefilled, rows, step

from specdec import kernels
from specdec.errors import InputError

SHAPE = Shape()


def filled(num: int = 10, capacity: int = 16) -> tuple[Any, torch.Tensor, torch.Tensor]:
    _, k, v = rows(SHAPE, num, seed=1)
    return prefilled(SHAPE, k, v, capacity), k, v


def test_keys_and_values_stand_in_their_slots() -> None:
    slots, k, v = filled()
    assert torch.equal(slots.keys(0)[:, :10], k)
    assert torch.equal(slots.values(0)[:, :10], v)
    assert slots.keys(0).shape == (2, 16, 40)
    assert slots.num_bytes() == 4 * 2 * 16 * (40 + 24)


def test_reserve_grows_and_keeps_and_never_shrinks() -> None:
    slots, k, v = filled()
    slots.reserve(100)
    assert slots.capacity() == 100
    assert slots.keys(0).shape == (2, 100, 40)
    assert torch.equal(slots.keys(0)[:, :10], k)
    assert torch.equal(slots.values(0)[:, :10], v)
    slots.reserve(5)
    assert slots.capacity() == 100


def test_growth_does_not_change_results() -> None:
    q, k, v = rows(SHAPE, 21, seed=2)
    small, large = (prefilled(SHAPE, k[:, :20], v[:, :20], capacity) for capacity in (21, 2000))
    last = [t[:, 20:] for t in (q, k, v)]
    want = step(SHAPE, small, 20, 20, *last, *chain(20, 1))
    small.reserve(300)
    assert torch.equal(step(SHAPE, small, 20, 20, *last, *chain(20, 1)), want)
    assert torch.equal(step(SHAPE, large, 20, 20, *last, *chain(20, 1)), want)


@pytest.mark.parametrize(("moved", "start"), [([7, 9], 5), ([4, 5], 4), ([9, 3, 4], 3), ([0, 1, 2], 1), ([], 3)])
def test_gather_reads_before_it_writes(moved: list[int], start: int) -> None:
    slots, k, v = filled()
    slots.gather(moved, start)
    for buffer, old in ((slots.keys(0), k), (slots.values(0), v)):
        want = old.clone()
        want[:, start : start + len(moved)] = old[:, moved]
        assert torch.equal(buffer[:, :10], want)


def test_gather_in_place_touches_nothing() -> None:
    slots, _, _ = filled()
    before = slots.keys(0)._version, slots.keys(0).data_ptr()
    slots.gather([3, 4, 5], 3)
    assert (slots.keys(0)._version, slots.keys(0).data_ptr()) == before


def test_fork_is_independent() -> None:
    slots, k, _ = filled()
    twin = slots.fork(6)
    assert twin.capacity() == 16
    assert torch.equal(twin.keys(0)[:, :6], k[:, :6])
    twin.gather([5, 4], 0)
    assert torch.equal(slots.keys(0)[:, :10], k)
    slots.gather([9, 8], 0)
    assert torch.equal(twin.keys(0)[:, :2], k[:, [5, 4]])


def test_layers_may_differ() -> None:
    slots = kernels.slots(2)
    slots.reserve(8)
    other = Shape(heads=4, kv_heads=4, size=8, value_size=8)
    steps = kernels.steps()
    steps.add(slots, 0, 3, 0, *chain(0, 3))
    for layer, shape in enumerate((SHAPE, other)):
        attend(shape, steps.handle(), *rows(shape, 3, seed=layer), layer=layer)
    assert slots.keys(0).shape == (2, 8, 40)
    assert slots.keys(1).shape == (4, 8, 8)


def test_bad_slots() -> None:
    slots, _, _ = filled()
    with pytest.raises(RuntimeError, match="holds nothing yet"):
        kernels.slots(1).keys(0)
    with pytest.raises(RuntimeError, match="num_layers must be positive"):
        kernels.slots(0)
    with pytest.raises(RuntimeError, match="layer 1 of 1"):
        slots.keys(1)
    with pytest.raises(RuntimeError, match="slot 16 is not below the capacity 16"):
        slots.gather([16], 0)
    with pytest.raises(RuntimeError, match="pass the capacity"):
        slots.gather([1, 2], 15)
    with pytest.raises(RuntimeError, match="passes the capacity"):
        slots.fork(17)


def test_bad_steps() -> None:
    slots, _, _ = filled()
    block, places = chain(10, 3)
    good = (slots, 10, 3, 10, block, places)
    blind = block.clone()
    blind[1, 1] = False
    for index, value, message in (
        (1, 14, "pass the capacity 16"),
        (2, 0, "rows > 0"),
        (3, 11, "prefix <= start"),
        (4, block[:, :2], r"bool CPU tensor \[3, 3\]"),
        (4, block.float(), "bool CPU tensor"),
        (4, blind, "does not see itself"),
        (5, places[:2], r"int64 CPU tensor \[3\]"),
        (5, places.int(), "int64 CPU tensor"),
    ):
        arguments = list(good)
        arguments[index] = value
        with pytest.raises(RuntimeError, match=message):
            kernels.steps().add(*arguments)
    falling = torch.tensor([11, 10, 12])
    with pytest.raises(RuntimeError, match="positions must grow"):
        kernels.steps().add(slots, 10, 3, 10, block, falling)
    twice = kernels.steps()
    twice.add(*good)
    with pytest.raises(RuntimeError, match="stands twice"):
        twice.add(*good)


def test_an_error_leaves_the_step_as_it_was() -> None:
    slots, _, _ = filled()
    steps = kernels.steps()
    block, places = chain(10, 3)
    block[2, 2] = False
    with pytest.raises(RuntimeError, match="does not see itself"):
        steps.add(slots, 10, 3, 10, block, places)
    assert steps.num_rows() == 0


def test_bad_attention_calls() -> None:
    slots, _, _ = filled()
    steps = kernels.steps()
    steps.add(slots, 10, 3, 10, *chain(10, 3))
    handle = steps.handle()
    q, k, v = rows(SHAPE, 3, seed=5)
    with pytest.raises(RuntimeError, match="describes 3 rows, q has 2"):
        attend(SHAPE, handle, q[:, :2], k[:, :2], v[:, :2])
    with pytest.raises(RuntimeError, match="no multiple"):
        attend(SHAPE, handle, q[:5], k, v)
    with pytest.raises(RuntimeError, match="do not fit"):
        attend(SHAPE, handle, q, k[..., :39], v)
    with pytest.raises(RuntimeError, match="differ in type"):
        attend(SHAPE, handle, q, k.double(), v.double())
    with pytest.raises(RuntimeError, match="layer 0 holds 2 heads of size 40"):
        attend(SHAPE, handle, q[..., :8], k[..., :8], v)
    with pytest.raises(RuntimeError, match="layer 1 of 1"):
        attend(SHAPE, handle, q, k, v, layer=1)
    with pytest.raises(RuntimeError, match="no Steps object has the handle"):
        attend(SHAPE, torch.tensor([123456789]), q, k, v)
    del steps
    with pytest.raises(RuntimeError, match="keep the object alive"):
        attend(SHAPE, handle, q, k, v)


def test_a_cleared_step_is_used_again() -> None:
    q, k, v = rows(SHAPE, 12, seed=6)
    slots = prefilled(SHAPE, k[:, :10], v[:, :10])
    want = [step(SHAPE, slots, i, i, *(t[:, i : i + 1] for t in (q, k, v)), *chain(i, 1)) for i in (10, 11)]
    steps = kernels.steps()
    handle = steps.handle()
    for i, expected in zip((10, 11), want, strict=True):
        steps.clear()
        steps.add(slots, i, 1, i, *chain(i, 1))
        assert torch.equal(attend(SHAPE, handle, *(t[:, i : i + 1] for t in (q, k, v))), expected)


def test_unknown_variant() -> None:
    with pytest.raises(InputError, match="no kernels named 'sse9'"):
        kernels.set_isa("sse9")
