"""Methods that look at activations, for a checkpoint: the model is loaded, and the text read or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.loading import load_model, load_tokenizer
from specdec.quant.methods import apply, calibration, create
from specdec.quant.methods.engine import Told
from specdec.quant.methods.method import Prepared
from specdec.quant.plan import Plan


def calibrate(
    plan: Plan,
    source: str | Path = calibration.OWN,
    *,
    rows: int = calibration.ROWS,
    length: int | None = None,
    seed: int = 0,
    device: Any = None,
    memory_budget: int | None = None,
    told: Told | None = None,
) -> Prepared:
    """What the recipe's method makes of the whole model, for `quantize(plan, out, prepared=...)`.

    `source`: a text or JSONL file; "self", for which the model writes its own text; "stdlib". `rows` of `length` tokens
    (default: 256). The model is loaded in the dtype of its files, on `device`.
    Raises `MemoryBudgetError` when it cannot fit, and `InputError` for text that cannot be used, evaluation prompts
    among it. Lossless: no, weights are rounded.
    """
    folder = plan.checkpoint.folder
    plan.estimate.check_memory(memory_budget)
    method = create(plan.recipe.method, plan.recipe.options)
    model = load_model(folder, device=device, dtype=plan.dtype, trust_remote_code=plan.trust_remote_code)
    tokens = None
    if method.needs:
        tokenizer = load_tokenizer(folder, plan.trust_remote_code)
        tokens = calibration.tokens(source, model, tokenizer, rows=rows, length=length, seed=seed)
        tokens = tokens.to(model.device)
    return apply(model, plan.recipe, tokens, progress=told)
