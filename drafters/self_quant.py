"""The target drafts for itself with its weights in fewer bits, on its own keys and values."""

from __future__ import annotations

import json
from typing import Any

from specdec.drafter import Memory
from specdec.errors import IncompatiblePairError
from specdec.quant.recipe import Recipe
from specdec.runtime.backend import Backend
from specdec.runtime.quantised import quantised
from specdec.runtime.shared import BesideBackend, SharingBackend, SharingDrafter


class SelfQuantDrafter(SharingDrafter):
    """Drafts with a copy of the target whose linear layers and head are stored in fewer bits.

    `scheme`: a format ("int8", "mxfp4", "int4-g64", "sparse-60", …), or whatever `specdec.quant.recipe.Recipe.of`
    takes; weights are rounded to nearest. Embeddings, norms and biases are the target's own, and so are the keys and
    values: the draft attends to what the target computed, and verification overwrites what it drafted. There is no
    prefill, no catch-up and no cache of the draft's. A target whose weights are stored in fewer bits already drafts for
    itself with fewer still.

    Cost: the stored weights, beside the target's (for int8 one byte per weight: 13.6 MB for the embedded target, whose
    bfloat16 weights are 26.9 MB). A draft step reads those bytes where the target reads 4 N K in float32 and 2 N K in
    bfloat16 of a layer of N outputs and K inputs, and as many keys and values as the target: with int8 it takes at best
    a quarter or half of the target's step, with mxfp4 half of that. So it pays with the high acceptance that int8 has
    (embedded target, k = 4: mean acceptance length 4.68 in float32 and 4.80 in bfloat16 at temperature 0, 4.38 and
    4.81 at 1; four code prompts of 48 tokens, 2026-11-21, `specdec compare --drafter self_quant --k 4`), and where
    reading weights is what a step costs: large models, and steps that are compiled (`warmup()`). Expert layers that
    keep their weights in one tensor stay as they are. On a CPU without our kernels all formats but int8 unpack their
    weights at every step, and are slower than the target.

    Lossless: yes, with every lossless verifier; how the draft rounds costs acceptance only. (Self-speculation on
    quantised weights and shared keys and values: QuantSpec, Tiwari et al., arXiv 2502.10424.)
    """

    memory = Memory.TEXT

    def __init__(self, scheme: Any = "int8"):
        self.recipe = Recipe.of(scheme)
        self.scheme = self.recipe.name or json.dumps(self.recipe.to_dict(), sort_keys=True)

    @property
    def name(self) -> str:
        return "self_quant"

    def target_backend(self, backend: Backend, model: Any) -> Backend:
        if isinstance(backend, BesideBackend) and backend.label == self.scheme:
            return backend
        if isinstance(backend, SharingBackend):
            raise IncompatiblePairError(
                "the target already runs in a way that another drafter asked for; make a decoder of its own for "
                f"self_quant with scheme={self.scheme!r}"
            )
        return BesideBackend(backend, type(backend).open_draft(quantised(model, self.recipe)), self.scheme)
