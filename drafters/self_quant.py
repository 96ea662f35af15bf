"""The target drafts for itself with its weights quantised, on its own keys and values."""

from __future__ import annotations

from typing import Any

from specdec.errors import IncompatiblePairError
from specdec.runtime.backend import Backend
from specdec.runtime.quantised import quantised
from specdec.runtime.shared import BesideBackend, SharingBackend, SharingDrafter


class SelfQuantDrafter(SharingDrafter):
    """Drafts with a copy of the target whose linear layers and head have quantised weights.

    `scheme`: "int8" (one scale per output; activations rounded to int8, one scale per row), or one that was registered
    with `specdec.runtime.quantised.register_scheme`. Embeddings, norms and biases are the target's own, and so are the
    keys and values: the draft attends to what the target computed, and verification overwrites what it drafted. There
    is no prefill, no catch-up and no cache of the draft's.

    Cost: one byte per weight more in memory (13.6 MB for the embedded target, whose bfloat16 weights are 26.9 MB). A
    draft step reads N K + 4 N bytes of a layer of N outputs and K inputs, where the target reads 4 N K in float32 and
    2 N K in bfloat16, and as many keys and values as the target: at best it takes a quarter or half of the target's
    step. So it pays with the high acceptance that int8 has (embedded target, k = 4: mean acceptance length 4.68 in
    float32 and 4.80 in bfloat16 at temperature 0, 4.38 and 4.81 at 1; four code prompts of 48 tokens, 2026-11-21,
    `specdec compare --drafter self_quant --k 4`), and where reading weights is what a step costs: large models, and
    steps that are compiled (`warmup()`). The int8 product is torch's own, fast for one row and not for many: prefer
    chains. Expert layers that keep their weights in one tensor are not quantised. CPU; where torch lacks the product,
    `UnsupportedModelError` tells so when the decoder is made.

    Lossless: yes, with every lossless verifier; how the draft rounds costs acceptance only. (Self-speculation on
    quantised weights and shared keys and values: QuantSpec, Tiwari et al., arXiv 2502.10424.)
    """

    def __init__(self, scheme: str = "int8"):
        self.scheme = scheme

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
        return BesideBackend(backend, type(backend).open_draft(quantised(model, self.scheme)), self.scheme)
