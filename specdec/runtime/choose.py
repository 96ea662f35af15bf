"""Which backend and which dtype: chosen by what runs and what a short measurement says, and told to the user."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specdec import registry
from specdec.dtypes import dtype_name
from specdec.errors import BackendWarning, InputError, UnsupportedModelError
from specdec.kernels import ops
from specdec.kernels.ops import DTYPES
from specdec.quant.kv import kv_format
from specdec.runtime.backend import Backend

NUMERICS = ("invariant", "fast")
# A matrix of this many bytes lies beyond most caches, as a large model's weights do.
_PROBE_BYTES = 48 << 20
_PROBE_WIDTH = 1024
# A verification of a few tokens: what a speculative step computes.
_PROBE_ROWS = 5


def open_backend(
    model: Any, name: str | None = None, numerics: str | None = None, kv_cache: str | None = None, **options: Any
) -> Backend:
    """The backend of that name on a loaded model.

    None takes the one that the model says runs it (`specdec_backend`), else `compiled` (on a GPU `cuda`) where it runs,
    else `eager`.

    numerics="invariant" wants a row's bits to be independent of the rows beside it, and refuses where that cannot be
    had; "fast" allows stock products; None is invariant where our own kernels run. kv_cache: how keys and values are
    stored, a name of `specdec.quant.kv`; None as they are computed.
    """
    if kv_cache is not None:
        kv_format(kv_cache)  # an unknown name is refused before anything is opened
        options["kv_cache"] = kv_cache
    if numerics not in (None, *NUMERICS):
        raise InputError(f"numerics must be one of {NUMERICS} or None, not {numerics!r}")
    own = getattr(model, "specdec_backend", None)
    if own is not None and name not in (None, own):
        raise UnsupportedModelError(f"{type(model).__name__} runs on the {own} backend; leave backend={name!r} out")
    name = name or own
    if name is None:
        on_gpu = next(model.parameters()).device.type == "cuda"
        name = "cuda" if on_gpu else "eager" if numerics == "fast" else "compiled"
        try:
            backend: Backend = registry.find("backend", name).open(model, **options)
        except UnsupportedModelError as error:
            # What neither backend can run is refused by the stock one in its own words.
            stored = {} if kv_cache is None else {"kv_cache": kv_cache}
            backend = registry.find("backend", "eager").open(model, **stored)
            if numerics == "invariant":
                raise InputError(f"numerics='invariant' cannot be had here: {error}") from error
            if on_gpu or (ops.available() and next(model.parameters()).device.type == "cpu"):
                warnings.warn(f"the eager backend is used: {error}", BackendWarning, stacklevel=3)
        return backend
    backend = registry.find("backend", name).open(model, **options)
    if backend.kv_cache != kv_cache:  # a third party's, which passed over an option that it does not know
        raise UnsupportedModelError(
            f"the {name} backend does not store keys and values in {kv_cache}; use backend='eager', or no kv_cache"
        )
    if numerics == "invariant" and backend.numerics != "invariant":
        raise InputError(
            f"numerics='invariant' cannot be had from the {name} backend here ({backend.describes}); "
            "use numerics=None, and exact=True in half precision"
        )
    return backend


def open_draft_backend(model: Any, name: str | None = None, kv_cache: str | None = None) -> Backend:
    """Of a draft model, which stores its keys and values as the target does where it can, and else says so once."""
    if kv_cache is not None:
        try:
            return open_backend(model, name, kv_cache=kv_cache)
        except UnsupportedModelError as error:
            backend = open_backend(model, name)  # what cannot run at all is refused here
            warnings.warn(
                f"the draft stores keys and values as it computes them: {error}", BackendWarning, stacklevel=3
            )
            return backend
    return open_backend(model, name)


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def fastest_dtype(checkpoint: torch.dtype, device: torch.device | str | None) -> tuple[torch.dtype, str]:
    """The faster of the checkpoint's own dtype and float32 on this device, and why, in one line.

    Measured on one matrix product of a few rows with the products that the default backend uses.
    """
    device = torch.device(device or "cpu")
    name = dtype_name(checkpoint)
    if device.type != "cpu" or checkpoint == torch.float32:
        return checkpoint, f"{name}: the checkpoint's own"
    seconds: dict[torch.dtype, float] = {}
    for dtype in (checkpoint, torch.float32):
        linear = ops.linear if ops.available() and dtype in DTYPES else torch.nn.functional.linear
        weight = torch.zeros(_PROBE_BYTES // dtype.itemsize // _PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
        rows = torch.zeros(_PROBE_ROWS, _PROBE_WIDTH, dtype=dtype)
        seconds[dtype] = _seconds(partial(linear, rows, weight)) / weight.numel()
    ratio = seconds[torch.float32] / seconds[checkpoint]
    if ratio > 1:
        return checkpoint, f"{name}: the checkpoint's own, and {ratio:.1f}x as fast as float32 here"
    return torch.float32, f"float32: {1 / ratio:.1f}x as fast as {name} here"
