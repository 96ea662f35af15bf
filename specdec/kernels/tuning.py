"""Schedules of the packed products on GPUs: tile sizes, warps and stages that change the time and not one bit.

What does change bits, the order of sums, is no part of a schedule: it follows from the weight's shape in
`specdec.kernels.triton_packed`. Schedules come from a table until `triton_packed.tune` has measured better ones on the
device; those are kept in the user's cache, by device, Triton version, format, dtype and shape.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.build import cache_folder

#: Up to so many rows a step has one tile of rows; more rows share decoded weights in wider ones.
NARROW = 16


class Schedule(NamedTuple):
    """How a product is laid out on the device; every field may change without changing a bit of the result."""

    rows: int  # of a tile: never 64, from where on Hopper's tensor cores are driven in another way, with other sums
    outputs: int  # of a tile
    warps: int
    stages: int  # of loads in flight


def default(N: int, wide: bool, strips: int, itemsize: int) -> Schedule:
    """Of a product with N outputs and few or (`wide`) many rows, whose tiles are cut into `strips` of K."""
    if itemsize > 2:  # no tensor cores: small tiles, or registers run out
        return Schedule(16, 16, 4, 2)
    if wide:
        return Schedule(32, 32, 4, 3)
    if strips > 1:
        return Schedule(16, 16, 4, 4)
    return Schedule(16, 32 if N < 16384 else 64, 4, 4)


def candidates(N: int, wide: bool, strips: int, itemsize: int) -> list[Schedule]:
    """What is measured, the default first."""
    first = default(N, wide, strips, itemsize)
    if itemsize > 2:
        return [first]
    rows = (16, 32) if wide else (16,)
    found = [
        Schedule(r, outputs, warps, stages)
        for r in rows
        for outputs in (16, 32, 64)
        for warps in ((4, 8) if strips > 1 else (2, 4))
        for stages in (3, 5)
        if outputs * strips >= 8 * warps
    ]
    return [first, *(schedule for schedule in found if schedule != first)]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def triton_version() -> str:
    """As installed; "unknown" where it has no metadata."""
    try:
        return version("triton")
    except PackageNotFoundError:  # built from source, or put on the path by hand
        return "unknown"


def path_for(device: torch.device) -> Path:
    """The file of the schedules measured on this kind of device."""
    safe = "".join(c if c.isalnum() else "-" for c in f"{device_name(device)}-triton-{triton_version()}")
    return cache_folder() / "schedules" / f"{safe}.json"


def key(what: str, N: int, K: int, wide: bool) -> str:
    """`what`: format and dtype."""
    return f"{what} {N}x{K} {'wide' if wide else 'narrow'}"


def _read(path: Path) -> dict[str, Schedule]:
    """What the file holds; nothing when there is none or it cannot be read, since it can be measured again."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {
        name: Schedule(*fields)
        for name, fields in stored.items()
        if isinstance(fields, list) and len(fields) == 4 and all(type(field) is int for field in fields)
    }


@lru_cache(maxsize=4096)
def schedule(what: str, N: int, K: int, wide: bool, strips: int, itemsize: int, device: torch.device) -> Schedule:
    """The measured schedule of a product, else the table's. One from a file is taken only if it is a candidate."""
    found = _read(path_for(device)).get(key(what, N, K, wide))
    options = candidates(N, wide, strips, itemsize)
    return found if found in options else options[0]


def _write(path: Path, name: str, best: Schedule) -> None:
    """Beside what other processes have written meanwhile; the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {**_read(path), name: best}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({name: list(stored[name]) for name in sorted(stored)}, file, indent=1)
    os.replace(temporary, path)
    schedule.cache_clear()


def fastest(
    name: str,
    options: Sequence[Schedule],
    run: Callable[[Schedule], Tensor],
    seconds: Callable[[Schedule], float],
    device: torch.device,
) -> Schedule:
    """The fastest of `options` that has the bits of the first, kept in the cache under `name`.

    `run` gives a product; options that need more registers or shared memory than there is are passed over.
    """
    from triton.runtime.errors import OutOfResources

    expected = run(options[0])
    times = {options[0]: seconds(options[0])}
    for option in options[1:]:
        try:
            same = torch.equal(run(option), expected)
        except OutOfResources:
            continue
        if same:
            times[option] = seconds(option)
    best = min(times, key=lambda option: times[option])
    _write(path_for(device), name, best)
    return best


class Replay:
    """Calls captured in one CUDA graph. They should read different memory, in all more than the device's cache holds,
    or they measure the cache."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        self._count = len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiled and allocated before the capture
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self.seconds()  # the first replay uploads the graph

    def seconds(self) -> float:
        """Of one call, in one replay."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / self._count


def graph_seconds(calls: Sequence[Callable[[], object]], rounds: int = 9) -> float:
    """Median seconds of one call over some replays."""
    replay = Replay(calls)
    return statistics.median(replay.seconds() for _ in range(rounds))
