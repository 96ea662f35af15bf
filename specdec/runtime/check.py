"""Whether a backend computes what the stock step computes: asked once, when a model is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnsupportedModelError
from specdec.quant.linear import PackedLinear
from specdec.runtime.backend import Capabilities, Step

# Largest difference from the stock step that rounding explains, as a share of the largest logit.
# (Stock eager attention takes its softmax in float32, whatever the dtype.)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
# The same where products round their rows to int8: what lies near an edge may fall on its other side.
ROUNDED_TOLERANCE = 0.03
# Of a model that only drafts: rounded activations may fall on the other side, and it need not matter.
DRAFT_TOLERANCE = 0.5
_TOKENS = 6


def tolerance_of(model: Any, dtype: torch.dtype) -> float:
    """What rounding explains in `model`."""
    rounds = any(layer.format.rounds_rows for layer in model.modules() if isinstance(layer, PackedLinear))
    return max(TOLERANCE[dtype], ROUNDED_TOLERANCE if rounds else 0.0)


def check_step(capabilities: Capabilities, input_width: int) -> Step:
    """A few rows of a short text, for `compare`."""
    rows = torch.arange(min(_TOKENS, capabilities.context))
    block = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    inputs = torch.ones(len(rows), input_width, dtype=capabilities.dtype) if input_width else None
    return Step(rows % capabilities.vocab_size, 0, block, rows, 0, len(rows), inputs_MW=inputs)


def apart(logits: Tensor, reference: Tensor, tolerance: float) -> float | None:
    """The largest difference as a share of the largest logit, where rounding does not explain it; else None."""
    largest = reference.double().abs().max().clamp_min(1e-6)
    share = float((logits.double() - reference.double()).abs().max() / largest)
    return None if share <= tolerance else share


def compare(run: Callable[[], Tensor], stock: Callable[[], Tensor], model: Any, tolerance: float | None = None) -> None:
    """Raise `UnsupportedModelError` unless `run()` gives the logits of `stock()`, but for rounding."""
    name = type(model).__name__
    try:
        mine, reference = run(), stock()
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{name} does not run on our kernels: {error}; use backend='eager'") from error
    share = apart(mine, reference, tolerance_of(model, reference.dtype) if tolerance is None else tolerance)
    if share is not None:
        raise UnsupportedModelError(
            f"{name} on our kernels differs from the stock step by {share:.1e} of the largest logit: its "
            "layers do something that the kernels do not know; use backend='eager'"
        )
