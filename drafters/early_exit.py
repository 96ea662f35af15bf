"""The target's first layers draft; verification goes on from where they stopped."""

from __future__ import annotations

from typing import Any

from specdec.drafter import Memory
from specdec.errors import IncompatiblePairError, UnsupportedModelError
from specdec.runtime.backend import Backend
from specdec.runtime.shared import SharingBackend, SharingDrafter
from specdec.runtime.split import SplitBackend

# Of the layers: where published early-exit drafts leave (8 of 32 in LayerSkip's Llama 2 7B).
_SHARE = 4


class EarlyExitDrafter(SharingDrafter):
    """Drafts with the target's first `exit_layer` layers and its own final norm and head; no weights of its own.

    `exit_layer`: from 1 to the number of layers less one; by default a quarter of them. A drafted token goes through
    the lower layers once: its keys, values and exit state are still there when the layers above verify it. So a draft
    step costs `exit_layer` layers and the head, and a round of k drafted tokens saves k + 1 rows of those layers in
    verification. Plain decoding of the same decoder runs the same two parts.

    Needs a model whose layers stand in one list, with nothing but the hidden state passing from one to the next (llama,
    qwen, mistral, gemma 2 and 3, gpt2, gpt-neox, phi, mixtral, ...); others raise `UnsupportedModelError`.

    Acceptance depends on how the target was trained. One that was not trained to exit early drafts poorly: of the
    embedded target's 18 layers the first 2, 3, 4, 5, 6 reach mean acceptance lengths of 1.08, 1.09, 1.10, 1.10, 1.14 at
    temperature 0, and 1.15, 1.17, 1.20, 1.21, 1.22 at 1 (k = 4, four code prompts of 48 tokens, float32, 2026-11-21;
    `specdec compare --drafter early_exit --drafter-option exit_layer=E --k 4`): it does not pay there. LayerSkip's
    recipe makes it pay: layer dropout that grows with depth, and the cross-entropy of every exit, weighted towards the
    later ones and switched on in turn. No training is offered here.

    Lossless: yes, with every lossless verifier. (LayerSkip: Elhoushi et al., arXiv 2404.16710.)
    """

    memory = Memory.PATH

    def __init__(self, exit_layer: int | None = None):
        self.exit_layer = exit_layer

    @property
    def name(self) -> str:
        return "early_exit"

    def target_backend(self, backend: Backend, model: Any) -> Backend:
        if isinstance(backend, SplitBackend) and self.exit_layer in (None, backend.exit_layer):
            return backend
        if isinstance(backend, SharingBackend):
            raise IncompatiblePairError(
                "the target already runs in a way that another drafter asked for; make a decoder of its own for "
                f"early_exit{'' if self.exit_layer is None else f' with exit_layer={self.exit_layer}'}"
            )
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        if count < 2:
            raise UnsupportedModelError(f"{type(model).__name__} has one layer: there is no earlier one to exit from")
        chosen = max(1, count // _SHARE) if self.exit_layer is None else self.exit_layer
        return SplitBackend.open(model, exit_layer=chosen, whole=backend)
