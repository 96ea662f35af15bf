"""Post-training methods: how the stored values of a recipe's layers are chosen.

    tokens = calibration.tokens("corpus.txt", model, tokenizer)
    model = prepare_model(model, {"default": "int4", "method": "awq"}, tokens)

rtn rounds each weight to the nearest; awq, gptq, smoothquant and wanda look at activations on a calibration text first.
Another package adds a method by `register_method`: a frozen dataclass under `Method`, whose fields are options of a
recipe.
"""

from specdec.quant.methods import awq, calibration, gptq, rtn, smoothquant, wanda  # registers the methods
from specdec.quant.methods.engine import Run, apply, prepare_model
from specdec.quant.methods.method import Linear, Method, Prepared, Stats, create, method_names, register_method

__all__ = [
    "Linear",
    "Method",
    "Prepared",
    "Run",
    "Stats",
    "apply",
    "awq",
    "calibration",
    "create",
    "gptq",
    "method_names",
    "prepare_model",
    "register_method",
    "rtn",
    "smoothquant",
    "wanda",
]
