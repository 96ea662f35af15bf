"""Memory that a text takes, and what there is."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from specdec.planner.cache import modules_of
from specdec.runtime.features import capacity
from specdec.runtime.session import PREFILL_CHUNK

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

# Copies of a verification's logits that sampling and verification hold at once, in float32.
_LOGIT_COPIES = 3
_MEMINFO = Path("/proc/meminfo")
# (limit, used, statistics) of the container that this process is in, by the two versions of the kernel's interface.
_CGROUPS = tuple(
    tuple(f"/sys/fs/cgroup/{name}" for name in names)
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
)


@dataclass(frozen=True)
class Memory:
    """Bytes. `length`: tokens of the text, prompt included, that keys and values are counted for.

    `scratch` is an estimate: activations of the widest step, and its logits as often as they are held. `total` and
    `free` are the device's, None where it does not tell; weights were loaded when `free` was read.
    """

    length: int
    target_weights: int
    draft_weights: int
    target_kv: int
    draft_kv: int
    scratch: int
    total: int | None = None
    free: int | None = None

    @property
    def to_come(self) -> int:
        """What a text takes beside the weights, which are there."""
        return self.target_kv + self.draft_kv + self.scratch

    @property
    def needed(self) -> int:
        return self.target_weights + self.draft_weights + self.to_come

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.to_come <= self.free

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "needed": self.needed, "fits": self.fits}


def tensor_bytes(modules: Iterable[nn.Module], without: Iterable[nn.Module] = ()) -> int:
    """Of all parameters and buffers, each storage once, those of `without` left out."""

    def storages(of: Iterable[nn.Module]) -> dict[int, int]:
        tensors = (tensor for module in of for tensor in (*module.parameters(), *module.buffers()))
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

    other = storages(without)
    return sum(size for place, size in storages(modules).items() if place not in other)


def memory_needed(decoder: SpeculativeDecoder, length: int, rows: int) -> Memory:
    """For one text of `length` tokens, and verifications of at most `rows` rows."""
    capabilities = decoder.backend.capabilities
    length = min(length, capabilities.context)
    config = decoder.target.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    wide = 4 * hidden + 2 * int(getattr(config, "intermediate_size", None) or 4 * hidden)
    item = capabilities.dtype.itemsize
    activations = max(min(PREFILL_CHUNK, length), rows) * wide * item
    logits = rows * capabilities.vocab_size * (item + 4 * _LOGIT_COPIES)
    kept = capacity(length) * len(decoder.drafter.hidden) * hidden * item
    total, free = there_is(capabilities.device)
    return Memory(
        length,
        tensor_bytes([decoder.target]),
        tensor_bytes(modules_of(decoder.drafter), without=[decoder.target]),
        decoder.backend.bytes_for(length),
        decoder.drafter.bytes_for(length) + kept,
        activations + logits,
        total,
        free,
    )


def there_is(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes of the device's memory, and of those, free ones; of a container where its limit is nearer."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total), int(free)
    if device.type != "cpu":
        return None, None
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text(encoding="ascii").splitlines() if ":" in line)
        total, free = (1024 * int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None, None
    for limit, used, statistics in _CGROUPS:
        with suppress(OSError, ValueError):
            most, now = (int(Path(path).read_text(encoding="ascii")) for path in (limit, used))
            total, free = min(total, most), min(free, most - max(0, now - _reclaimable(statistics)))
    return total, max(0, free)


def _reclaimable(statistics: str) -> int:
    """Bytes of files that were read and are not in use: counted as used, and given back when memory is asked for.

    The older interface has the sum over a container's own groups, which is what its use counts, under another name.
    """
    try:
        lines = Path(statistics).read_text(encoding="ascii").splitlines()
        fields = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    except (OSError, ValueError):
        return 0
    return fields.get("total_inactive_file", fields.get("inactive_file", 0))
