"""The native operators in Python: `linear` and `attend`, and the cache they share.

Shape suffixes: M rows of one step, K inputs, N outputs, H query heads, V key/value heads, D key size, E value size,
C slots of a cache.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.kernels.build import BuildFailure, compiled, prebuilt

#: What the kernels compute in.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


#: Whether the operators are there already: what code asks that is being traced, which must not load them.
loaded = False
#: The library that they came from.
library: Path | None = None
_offered: list[Path] = []


@lru_cache(maxsize=1)
def why_not() -> str:
    """Loads the kernels on the first call. Empty when they run here, else one line that names the cause."""
    global loaded
    if os.environ.get("SPECDEC_NATIVE") == "0":
        return "SPECDEC_NATIVE=0"
    try:
        _load()
    except (BuildFailure, OSError, RuntimeError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    wish, found = os.environ.get("SPECDEC_ISA"), list(torch.ops.specdec.isas())
    if wish and wish not in found:
        return f"SPECDEC_ISA={wish} is not one of {', '.join(found)}"
    torch.library.register_fake("specdec::linear", _fake_linear)
    torch.library.register_fake("specdec::attend", _fake_attend)
    torch.library.register_fake("specdec::packed_linear", _fake_packed)
    torch.library.register_fake("specdec::a8_linear", _fake_packed)
    torch.library.register_fake("specdec::int8_linear", _fake_packed)
    loaded = True
    return ""


def offer(path: Path) -> None:
    """A library of these very sources, for this torch (`build.key()`): it is loaded where none came with the package.

    Nothing is compiled then, and no compiler looked for. Of no effect where the kernels are loaded already.
    """
    if not loaded:
        _offered.append(path)
        why_not.cache_clear()


def _load() -> None:
    global library
    for ready in filter(None, (prebuilt(), *_offered)):
        with suppress(OSError):  # made where system libraries are newer: this machine can make its own
            torch.ops.load_library(str(ready))
            library = ready
            return
    made = compiled()
    torch.ops.load_library(str(made))
    library = made


def available() -> bool:
    """Whether the native kernels run here. The first call may compile them (once per machine)."""
    return not why_not()


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_packed(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _fake_attend(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float, softcap: float, window: int
) -> Tensor:
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times `weight [N, K]` transposed, plus `bias [N]`: `[..., N]`.

    float32, bfloat16 (accumulated in float32, rounded once) or float64, all of one type, on the CPU. `weight` is
    contiguous, as `nn.Linear` stores it. Each output is one dot product in a fixed order along K: a row's bits do not
    depend on the number of rows or on the number of threads.

    Lossless: yes.
    """
    out: Tensor = torch.ops.specdec.linear.default(x, weight, bias)
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    layer: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Writes the new rows `k [1, V, M, D]` and `v [1, V, M, E]` to their slots, and attends `q [1, H, M, D]`.

    Returns `[1, M, H, E]`. `handle` comes from the `Steps` object that describes the forward. Query heads share
    key/value heads in groups of H / V. `softcap` 0 is none, else logits become softcap * tanh(logits / softcap);
    `window` 0 is none, else a row at position t sees positions above t - window only. A row's bits depend on its own
    query and on what it sees in the order of positions: not on other rows, the capacity, the slots of its ancestors,
    or threads. The write is hidden from tracers; data flow through the activations keeps layers in order.

    Lossless: yes.
    """
    out: Tensor = torch.ops.specdec.attend.default(q, k, v, handle, layer, scale, softcap, window)
    return out


def slots(num_layers: int, kv_cache: str | None = None) -> Any:
    """A cache of one sequence, `torch.classes.specdec.Slots`: `[V, C, D]` keys and `[V, C, E]` values per layer.

    `reserve(capacity)` sets C, and never shrinks it; `gather(slots, start)` moves slots so that they lie one after
    another; `fork(length)` copies the first slots; `num_bytes()`, `capacity()`, `keys(layer)`, `values(layer)`.

    `kv_cache`: a name of `specdec.quant.kv`. Rows are then rounded when they are written, and `attend` computes on what
    is stored, unpacked, with the bits that it has on a cache that holds just that; `keys` and `values` are the codes,
    `key_scales(layer)` and `value_scales(layer)` stand beside them.
    """
    _need()
    return torch.classes.specdec.Slots(num_layers, kv_cache or "plain")


def steps() -> Any:
    """The description of one forward, `torch.classes.specdec.Steps`: `clear()`, `add(...)` per sequence, `handle()`.

    `add(slots, start, rows, prefix, block, block_positions)`: the next `rows` rows belong to the sequence
    and are written to slots start .. start + rows - 1. Row i sees slots 0 .. prefix - 1, which stand at positions of
    the same number, and slot prefix + j where `block[i, j]` (bool `[rows, start + rows - prefix]`), itself included.
    `block_positions[j]` is the position of slot prefix + j, and so of the row that is written there.
    """
    _need()
    return torch.classes.specdec.Steps()


def isa() -> str:
    """The variant in use: 'portable', 'avx2', 'avx512' or 'avx512bf16'. `SPECDEC_ISA` in the environment forces one."""
    _need()
    return str(torch.ops.specdec.isa())


def isas() -> list[str]:
    """The variants that this machine can run, the best first."""
    _need()
    return list(torch.ops.specdec.isas())


def set_isa(name: str) -> None:
    """Uses another variant from now on. Variants differ from each other in the last bits."""
    if name not in isas():
        raise InputError(f"no kernels named {name!r} here; there are {', '.join(isas())}")
    torch.ops.specdec.set_isa(name)


def _need() -> None:
    if not available():
        raise InputError(f"native kernels are not available: {why_not()}. Use numerics='fast', which needs none")
