"""Targets that draft for themselves: a second model of the same shape works on the slots of the target's own session.

It reads the keys and values that the target has computed, and writes those of the tokens that it drafts behind them,
where verification finds or overwrites them. So such a draft needs no prefill, no catch-up, and no cache.

Shape suffixes: M rows of one step, H hidden size.
"""

from __future__ import annotations

import copy
import importlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from typing_extensions import Self

from specdec.chance import Chance
from specdec.drafter import ModelRunner, Outcome, Request
from specdec.errors import InputError, UnsupportedModelError
from specdec.growth import Grown, grow
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.quant.hf import empty_model
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.copies import StandIn
from specdec.runtime.session import Session, Steps
from specdec.tree import TokenTree

# Where a derived model's configuration says what it was made of.
_ORIGIN = "specdec_origin"


class _AnyConfig:
    """Reads the configuration of any model of `transformers`."""

    @staticmethod
    def from_dict(config: dict[str, Any]) -> PretrainedConfig:
        made: PretrainedConfig = AutoConfig.for_model(config["model_type"]).from_dict(config)
        return made


class DerivedModel(StandIn):
    """A model made of a loaded one, in whose place backends run it: `inner` does the work, on the same parameters.

    `config` stays that of the whole model, so that its caches have every layer. `options`: how `derive` made it, as
    plain data; with the class of the model, that is enough for another process to make one without weights.
    """

    config_class = _AnyConfig
    input_width = 0

    def __init__(self, model: Any, inner: Any, options: dict[str, Any]):
        super().__init__()
        self.inner = inner
        self.config = copy.deepcopy(model.config)
        origin = {"module": type(model).__module__, "name": type(model).__qualname__, "options": options}
        setattr(self.config, _ORIGIN, origin)
        self.train(model.training)

    @classmethod
    @abstractmethod
    def derive(cls, model: Any, **options: Any) -> Self:
        """Of a model whose weights mean nothing: what is made has the right shapes, and no values are looked at."""

    @classmethod
    def _from_config(cls, config: Any, dtype: torch.dtype) -> Self:
        """Without weights, from the configuration of one: what the background compiler asks of a class."""
        origin = getattr(config, _ORIGIN)
        if origin["module"].partition(".")[0] != "transformers":
            raise UnsupportedModelError(f"{origin['name']} is not a model of transformers: compile it with warmup()")
        kind = getattr(importlib.import_module(origin["module"]), origin["name"])
        plain = copy.deepcopy(config)
        delattr(plain, _ORIGIN)
        return cls.derive(empty_model(kind, plain, dtype), **origin["options"])


class SharingBackend(Backend):
    """Runs a target, and has a draft on the same slots."""

    @property
    @abstractmethod
    def draft(self) -> Backend:
        """Steps of the draft, on the slots of this sequence; another family than the target's."""

    #: Hidden states of the draft that `drafted` wants.
    draft_hidden: tuple[int, ...] = ()

    def drafted(self, start: int, grown: Grown, ran: TokenTree, states: Sequence[Tensor]) -> None:
        """A proposal was grown behind the root, which stands in slot `start`; its nodes in `ran` stand in the next.

        `states`: the `draft_hidden` of the root and of the nodes that ran, in their order, `[M, H]` each.
        """
        return None

    def draft_session(self, target: Session) -> Session:
        """The text of the target's session for a round of drafting; nothing of it outlives the round."""
        session = Session(self.draft, self.draft_hidden, keeps=False)  # states go where `drafted` puts them
        session.tokens, session.num_cached = target.tokens, target.num_cached
        return session


class BesideBackend(SharingBackend):
    """A target as it is, and another model of the same shape that drafts on its slots. `label`: which.

    Lossless: as the target's own backend.
    """

    def __init__(self, target: Backend, draft: Backend, label: str):
        self.target, self._draft, self.label = target, draft.on_slots_of(target), label

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        raise InputError("a draft on the target's slots comes with its drafter: drafter='self_quant'")

    @property
    def draft(self) -> Backend:
        return self._draft

    @property
    def capabilities(self) -> Capabilities:
        return self.target.capabilities

    @property
    def kv_cache(self) -> str | None:
        return self.target.kv_cache

    @property
    def numerics(self) -> str:
        return self.target.numerics

    @property
    def describes(self) -> str:
        return self.target.describes

    def warmup(self) -> None:
        self.target.warmup()
        self.draft.warmup()

    def expose(self, hidden: Sequence[int]) -> None:
        self.target.expose(hidden)

    def forward(self, step: Step) -> StepResult:
        return self.target.forward(step)

    @classmethod
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        targets = [backend.target for backend in backends]
        return type(targets[0]).forward_many(targets, steps)

    def gather(self, slots: Sequence[int], start: int) -> None:
        self.target.gather(slots, start)

    def fork(self, length: int) -> Self:
        draft = self.draft if length else self.draft.fork(0)
        return type(self)(self.target.fork(length), draft, self.label).join_family(self)

    @property
    def num_bytes(self) -> int:
        return self.target.num_bytes


@dataclass(eq=False)
class SharingState:
    request: Request
    target: Session


class SharingDrafter(ModelRunner):
    """Drafts with what `target_backend` put on the target's slots; chains and trees, as a draft model does.

    Lossless: yes, with every lossless verifier.
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    shares_target = True

    @abstractmethod
    def target_backend(self, backend: Backend, model: Any) -> Backend: ...

    def start(self, request: Request) -> SharingState:
        target = request.target
        if target is None or not isinstance(target.backend, SharingBackend):
            raise InputError(
                f"the {self.name} drafter works on the target's own slots: give it to SpeculativeDecoder(drafter=...)"
            )
        return SharingState(request, target)

    def proposing(self, state: SharingState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        target = state.target
        backend = target.backend
        assert isinstance(backend, SharingBackend)
        session = backend.draft_session(target)
        states: list[Tensor] = []

        def expand(ran: TokenTree) -> Steps[Tensor]:
            rows = yield from session.forwarding(ran)
            if rows.hidden is not None:
                states.append(rows.hidden)
            return rows.logits

        plan = plan.limited(session.context - len(session.tokens) + 1)
        grown = yield from grow(expand, plan, state.request, session.tokens, chance)
        backend.drafted(len(target.tokens) - 1, grown, session.tree, states)
        return grown.proposal

    def observe(self, state: SharingState, outcome: Outcome) -> SharingState:
        return state
