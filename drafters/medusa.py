"""Medusa heads draft: each predicts one of the next tokens from the target's last hidden state.

Shape suffixes: K heads, H hidden width, R draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, Outcome, Request
from specdec.errors import InputError
from specdec.formats import medusa as layouts
from specdec.formats.medusa_heads import MedusaHeads, check_target
from specdec.history import History
from specdec.kernels import ops
from specdec.kernels.ops import DTYPES
from specdec.marginals import grow_marginals
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.native import NativeLinear


@dataclass(eq=False)
class MedusaState:
    request: Request
    tokens: History  # the text so far; the last one is the root, which has no hidden state yet


class MedusaDrafter(Drafter):
    """Head k gives the distribution of the k-th token behind the root; none of them sees what the others drafted.

    The state of the token before the root is the newest there is. The target's own head makes the root of it, so that
    head 0 drafts the first token after the root. All nodes of a level share one row, hence trees gain more than chains.
    The heads run in the target's dtype, on the native kernels where these run.

    Lossless: yes, with every lossless verifier. (Cai et al., arXiv 2401.10774.)
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    memory = Memory.DEPTH

    def __init__(self, target: Any, heads: MedusaHeads, backend: str | None = None):
        check_target(heads.shape, target)
        config = target.config.get_text_config(decoder=True)
        self.hidden = (int(config.num_hidden_layers),)
        self.shape = heads.shape
        parameter = target.get_input_embeddings().weight
        self._dtype = target.dtype if target.dtype.is_floating_point else torch.float32
        heads.borrow(target)
        self.heads = heads.twin(parameter.device, self._dtype)
        if backend != "eager" and parameter.device.type == "cpu" and self._dtype in DTYPES and ops.available():
            _go_native(self.heads)

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        if context.source is None:
            raise InputError(
                "the medusa drafter needs heads trained for this target: pass their folder as the drafter; "
                "`specdec train medusa` makes them"
            )
        return cls(context.target, layouts.read(context.source), **{"backend": context.backend, **options})

    @classmethod
    def recognises(cls, config: Mapping[str, Any], folder: Path) -> bool:
        return layouts.recognises(config, folder)

    @property
    def name(self) -> str:
        return "medusa"

    def start(self, request: Request) -> MedusaState:
        return MedusaState(request, History(request.prompt))

    @torch.no_grad()
    def propose(self, state: MedusaState, plan: Plan, chance: Chance) -> Proposal:
        features = state.request.features
        assert features is not None
        plan = plan.limited(self.shape.num_heads)
        if not len(features) or not plan.depth:
            return Proposal.empty()  # a prompt of one token: nothing has been computed yet
        logits_KR = self._logits(features.read(len(features) - 1), plan.depth)
        return grow_marginals(logits_KR, plan, state.request, state.tokens, chance, self.heads.d2t_absolute)

    def _logits(self, state_1H: Tensor, depth: int) -> Tensor:
        """`[K, R]` of the first `depth` heads; the others do not run.

        A projection that all heads share is read once for all of them, which is what it costs.
        """
        heads, state_1H = self.heads, state_1H.to(self._dtype)
        if heads.joint:
            return heads.project(0, torch.cat([heads.residual(k, state_1H) for k in range(depth)]))
        return torch.cat([heads(k, state_1H) for k in range(depth)])

    def observe(self, state: MedusaState, outcome: Outcome) -> MedusaState:
        state.tokens.extend(outcome.tokens)
        return state


def _go_native(heads: MedusaHeads) -> None:
    """Put the native product in the place of every linear layer; the weights stay the same tensors."""
    for module in (*heads.blocks.children(), heads.projections):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, NativeLinear(child.weight, child.bias, ops))
    heads.borrowed = [NativeLinear(linear.weight, linear.bias, ops) for linear in heads.borrowed]  # type: ignore[arg-type]
