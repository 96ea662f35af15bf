"""What quantising a model takes, said before work starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.errors import MemoryBudgetError
from specdec.quant.methods.calibration import LENGTH, ROWS
from specdec.quant.report import Report

# Weights that are rounded at once, and bytes that each of them may take meanwhile: 3 were the most that was measured of
# any built-in format, and others may be less thrifty.
CHUNK, PER_WEIGHT = 1 << 22, 8
_BESIDES = 16 << 20  # what allocators keep, buffers of files
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Estimate:
    """Bytes. `result`: of the files; `peak`: of memory while they are made; `loaded`: of the quantised model at rest.

    `peak` leaves out this process itself, and the pages of the source that the system may drop at any time.
    """

    source: int
    result: int
    peak: int
    loaded: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_memory(self, budget: int | None = None) -> None:
        """`MemoryBudgetError` with the figures when the work cannot fit into memory, or into `budget` bytes."""
        advice = "write smaller shards (--max-shard-size), or work on a machine with more memory"
        if budget is not None and self.peak > budget:
            raise MemoryBudgetError(
                f"quantising takes up to {self.peak:,} bytes of memory; the budget is {budget:,}: raise it, or {advice}"
            )
        available = available_memory()
        if available is not None and self.peak > available:
            raise MemoryBudgetError(
                f"quantising takes up to {self.peak:,} bytes of memory; {available:,} are free here: {advice}"
            )

    def check_disk(self, folder: Path) -> None:
        """`MemoryBudgetError` with the figures when the result cannot fit on the disk of `folder`."""
        free = shutil.disk_usage(folder).free
        if self.result > free:
            raise MemoryBudgetError(
                f"the quantised model takes {self.result:,} bytes; the disk of {folder} has {free:,} free. Choose "
                "another --out"
            )


def of_stream(report: Report, max_shard: int) -> Estimate:
    """When tensors are read from files one at a time: a shard, one layer above it, and the rounding of some rows."""
    largest = max(layer.after for layer in report.layers)
    rounding = PER_WEIGHT * min(CHUNK, max(layer.weights for layer in report.layers))
    peak = min(max_shard, report.after) + largest + rounding + _BESIDES
    return Estimate(report.before, report.after, peak, report.after)


def of_loaded(report: Report, method: int = 0) -> Estimate:
    """When the whole model is in memory until the whole result is there; `method`: what its method takes besides."""
    rounding = PER_WEIGHT * min(CHUNK, max(layer.weights for layer in report.layers))
    peak = report.before + report.after + rounding + method + _BESIDES
    return Estimate(report.before, report.after, peak, report.after)


def of_method(report: Report, width: int, tokens: int = ROWS * LENGTH) -> int:
    """Of a method that looks at activations: the weights of a block in float32, twice; statistics of the widest input,
    its Hessian and two factors of it at the most; hidden states `width` wide of a calibration text, before and after a
    block.
    """
    blocks: dict[str, int] = {}
    for layer in report.layers:
        block = "".join(re.split(r"(\.\d+\.)", layer.module)[:2])
        blocks[block] = blocks.get(block, 0) + layer.weights
    inputs = max(layer.shape[1] for layer in report.layers)
    return 4 * (2 * max(blocks.values()) + 3 * inputs**2 + 2 * tokens * width)


def available_memory() -> int | None:
    """Bytes that a process may still take: what the system has, or its control group leaves; None when neither says."""
    found = [*_system(), *_control_group()]
    return min(found) if found else None


def _system(path: Path = Path("/proc/meminfo")) -> Iterable[int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _control_group(folder: Path = _CGROUP) -> Iterable[int]:
    """Of containers. Pages of files count as used there, but are given back when they are needed."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return
    if limit != "max":
        yield max(0, int(limit) - used + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0)))
