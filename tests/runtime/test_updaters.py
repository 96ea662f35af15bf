"""Keys and values on the host: what stands where under each updater, what is copied; no text depends on it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
import torch_graphs
from tiny_text import byte_tokenizer
from torch import Tensor

import specdec
from specdec import cli
from specdec.errors import InputError
from specdec.export.executorch import ExecutorchOptions
from specdec.policy import Fixed
from specdec.runtime.backends.executorch import ExecutorchBackend
from specdec.runtime.session import Session
from specdec.runtime.updaters import (
    HOST_UPDATERS,
    UPDATERS,
    HostSlots,
    ShiftPointer,
    SmartMask,
    Updater,
    published_cost,
    rooms_of,
)

SLOTS = 12
ROOMS = rooms_of([(2, 3, 4), (1, 2, 2)], SLOTS)
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def rows(count: int) -> list[Tensor]:
    """What a graph of so many rows returns."""
    return [torch.randn([count if i == room.axis else n for i, n in enumerate(room.shape)]) for room in ROOMS]


def shown(slots: HostSlots, start: int) -> list[list[Tensor]]:
    """Of each slot before `start`, what a graph reads."""
    views = slots.show(start)
    assert all(view.is_contiguous() and view.shape == room.shape for view, room in zip(views, ROOMS, strict=True))
    first = slots.updater.columns.start
    assert slots.updater.columns.stop - first == start
    return [[v.select(r.axis, first + slot) for v, r in zip(views, ROOMS, strict=True)] for slot in range(start)]


@pytest.mark.parametrize("name", HOST_UPDATERS)
def test_every_slot_holds_what_was_last_written_to_it(name: str) -> None:
    """Steps, rewinds, gathers and forks in any order, beside a plain table."""
    draw = random.Random(0)
    checked = 0
    for _ in range(60):
        slots, table = HostSlots(HOST_UPDATERS[name](ROOMS, torch.float32)), dict[int, list[Tensor]]()
        for _ in range(25):
            filled = next(slot for slot in range(SLOTS + 1) if slot not in table)
            if draw.random() < 0.7 or not table:
                start = draw.randint(max(0, filled - 4), min(filled, SLOTS - 1))
                for held, expected in zip(shown(slots, start), range(start), strict=True):
                    assert all(torch.equal(a, b) for a, b in zip(held, table[expected], strict=True))
                    checked += 1
                count = draw.randint(1, min(4, SLOTS - start))
                new = rows(4)
                slots.keep(start, count, new)
                table |= {
                    start + i: [t.select(room.axis, i) for t, room in zip(new, ROOMS, strict=True)]
                    for i in range(count)
                }
            elif draw.random() < 0.8:
                named = draw.sample(sorted(table), draw.randint(1, min(3, len(table))))
                start = draw.randint(0, SLOTS - len(named))
                slots.gather(named, start)
                table |= {start + i: row for i, row in enumerate([table[slot] for slot in named])}
            else:
                other = slots.duplicate()
                slots.keep(0, 1, rows(1))  # the one that is left behind
                slots.show(1)
                slots = other
    assert checked > 2000


class _Stuck(ShiftPointer):
    """Its window does not slide."""

    name = "stuck"

    def _offset(self, room: Any) -> int:
        return 0


def test_a_window_that_does_not_slide_is_noticed() -> None:
    """The table above is a real check."""
    slots = HostSlots(_Stuck(ROOMS, torch.float32))
    first = rows(1)
    slots.keep(0, 1, first)
    slots.show(1)
    slots.keep(1, 1, rows(1))
    held = shown(slots, 2)
    assert not torch.equal(held[0][0], first[0].select(ROOMS[0].axis, 0))


def test_what_was_rejected_is_never_copied() -> None:
    slots = HostSlots(SmartMask(ROOMS, torch.float32))
    copied = slots.updater.copied
    slots.show(0)
    slots.keep(0, 4, rows(4))  # a verification, of which two rows are accepted
    assert copied.rows == 0
    slots.show(2)
    per_row = 4 * sum(room.size for room in ROOMS)
    assert (copied.rows, copied.num_bytes) == (2, 2 * per_row)
    slots.keep(2, 4, rows(4))
    slots.gather([4, 5], 2)  # a branch: its rows are where the graph put them
    assert copied.rows == 2
    slots.show(4)
    assert (copied.rows, copied.num_bytes) == (4, 4 * per_row)


def test_copies_and_room_beside_the_published_formulas() -> None:
    """ExecuTorch's runner for Qualcomm states elements copied per token and held, by heads, size and positions."""
    heads, size, context = 4, 8, 32
    (keys, values), itemsize = rooms_of([(heads, size, size)], context), 4
    for name, kind in HOST_UPDATERS.items():
        cost, updater = published_cost(name, heads, size, context), kind((keys, values), torch.float32)
        updater.resize(1)
        updater.write(0, [torch.ones(heads, size, 1), torch.ones(heads, 1, size)], [0])
        assert cost.copied_keys == heads * size
        assert updater.copied.num_bytes == 2 * heads * size * itemsize
        held_keys, held_values = (buffer.numel() for buffer in updater.buffers)
        if name == "smart-mask":
            assert cost.copied_values == heads * size
            assert (held_keys, held_values) == (cost.held_keys, cost.held_values)
        else:
            assert cost.copied_values == 1  # where a runtime's output can be the buffer itself; here it is a row
            assert held_keys == (heads * size + 1) * context <= cost.held_keys  # one more row, not one per head
            assert held_values == (heads + 1) * size * context
            assert held_values - cost.held_values == (heads + 1) * size  # all L positions count, not L - 1
    with pytest.raises(InputError, match="costs are stated for smart-mask, shift-pointer"):
        published_cost("scatter", heads, size, context)


def test_beyond_the_last_slot_there_is_none() -> None:
    updater: Updater = ShiftPointer(ROOMS, torch.float32)
    updater.resize(SLOTS)
    with pytest.raises(InputError, match="12 slots, not 13"):
        updater.resize(SLOTS + 1)
    with pytest.raises(InputError, match="one number of slots"):
        SmartMask((*ROOMS, *rooms_of([(1, 1, 1)], 4)), torch.float32)


def test_a_round_copies_what_was_accepted_and_its_root() -> None:
    model = tiny_artifacts.model()
    for name in HOST_UPDATERS:
        backend = torch_graphs.opened(model, name)
        session = Session(backend)
        session.append(PROMPT)
        session.prefill()
        copied: Any = backend.family.copied  # type: ignore[attr-defined]
        session.forward(specdec.tree.TokenTree.chain([9, 8, 7]))
        before = copied.rows
        session.commit([0], [9, 4])
        session.forward()
        assert copied.rows - before == 2  # the prompt's last token and one accepted; two rejected ones are not


# One artefact of ExecuTorch under every updater.

BOTH = ExecutorchOptions(prefill_len=4, k=(0, 3), max_seq_len=48, max_nodes=4, kv="both")


def _small() -> Any:
    return tiny_models.tiny("llama", dtype=torch.float32, num_hidden_layers=1, vocab_size=300)


def test_one_artefact_gives_the_same_text_under_every_updater() -> None:
    folder = tiny_artifacts.export(_small(), BOTH, tokenizer=byte_tokenizer())
    expected = tiny_models.reference(_small(), PROMPT, 30)
    for name in UPDATERS:
        decoder = specdec.load(folder, "lookahead", kv_updater=name, policy=Fixed(3))
        assert decoder.generate_plain(PROMPT, max_new_tokens=30).tokens == expected
        assert decoder.generate(PROMPT, max_new_tokens=30, strict=True).tokens == expected
        assert decoder.generate(PROMPT, max_new_tokens=30, strict=True, policy=Fixed(2, (2, 1))).tokens == expected
        assert (name in decoder.backend.describes) == (name != "scatter")
    two = [out.tokens for out in decoder.generate([[3, 5, 7], [8, 9]], max_new_tokens=12, strict=True)]
    assert two == [tiny_models.reference(_small(), prompt, 12) for prompt in ([3, 5, 7], [8, 9])]


def test_an_updater_that_the_artefact_has_no_graphs_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    graph, host = (
        torch_graphs.artifact(_small(), ExecutorchOptions(max_seq_len=64, kv=kv)) for kv in ("graph", "host")
    )
    for model, name, hint in (
        (graph, "smart-mask", "--kv both, or --kv host"),
        (host, "scatter", "--kv both, or --kv graph"),
    ):
        with pytest.raises(InputError, match=f"no graphs for the KV updater {name}: export it with {hint}"):
            ExecutorchBackend.open(model, kv_updater=name)
    with pytest.raises(InputError, match="one of scatter, smart-mask, shift-pointer, not 'paged'"):
        ExecutorchBackend.open(graph, kv_updater="paged")
    with pytest.raises(InputError, match="takes kv_updater only"):
        ExecutorchBackend.open(graph, threads=3)
    assert cli.main(["generate", "x", "--kv-updater", "smart-mask"]) == 2
    assert "give --artifact DIR" in capsys.readouterr().err
