"""A model in two parts, cut before one of its layers: the lower part drafts, the upper part goes on from its states.

Both parts work on the slots of one sequence, each on its own layers. A token whose lower layers ran while it was
drafted is not put through them again: verification takes its exit state and runs the layers above.

Shape suffixes: M rows of one step, N tree nodes, U of them that the draft did not run, R nodes that it ran, B slots of
a block, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.growth import Grown
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.copies import is_spread
from specdec.runtime.parts import LowerPart, UpperPart
from specdec.runtime.shared import SharingBackend
from specdec.tree import TokenTree, structure

# Tokens of the text on which the two parts are compared with the whole model, and how many of them come first.
_CHECK_TOKENS, _CHECK_FIRST = 6, 4
# Largest difference from the whole model that rounding explains, as a share of the largest logit, in units of the
# square root of the dtype's precision.
_TOLERANCE = 2.0


class _Layout(NamedTuple):
    """How the nodes of a tree lie behind a draft: first those that it ran, in its order, then the others."""

    order: tuple[int, ...]  # of each node of the tree, its place
    missing: tuple[int, ...]  # nodes that the draft did not run
    block_UB: Tensor  # what those see of the R + U places
    offsets_B: Tensor  # depth of the node in each place, less one


@lru_cache(maxsize=2048)
def _layout(parents: tuple[int, ...], ran_parents: tuple[int, ...], ran_as: tuple[int, ...]) -> _Layout:
    num_ran = len(ran_parents)
    missing = tuple(node for node, ran in enumerate(ran_as) if ran < 0)
    place = {node: num_ran + i for i, node in enumerate(missing)}
    order = tuple(ran if ran >= 0 else place[node] for node, ran in enumerate(ran_as))
    tree = structure(parents)
    block = torch.zeros(len(missing), num_ran + len(missing), dtype=torch.bool)
    block[:, list(order)] = tree.ancestors_NN[list(missing)]
    depths = (*structure(ran_parents).depths, *(tree.depths[node] for node in missing))
    return _Layout(order, missing, block, torch.tensor(depths, dtype=torch.int64) - 1)


@dataclass(frozen=True, eq=False)
class _Drafted:
    """What the lower part computed of a proposal: root and nodes lie in the slots from `start` on, in its order."""

    start: int
    tree: TokenTree
    layout: _Layout
    num_ran: int
    states_MH: Tensor  # [1 + R, H], root first

    def fits(self, step: Step) -> bool:
        """Whether the step is the verification of that proposal; drafted tokens are compared where that waits for none.

        A proposal may have been dropped since, and another step is due.
        """
        nodes = step.num_rows - 1
        if (step.start, step.prefix, nodes) != (self.start, self.start, len(self.tree)):
            return False
        same = torch.equal(step.block_MB[1:, 1:], self.tree.ancestors_NN)
        on_host = step.tokens.device.type == self.tree.tokens.device.type == "cpu"
        return same and (not on_host or torch.equal(step.tokens[1:], self.tree.tokens))

    def missing_step(self, exit_layer: int) -> Step | None:
        """The lower part's step over the nodes that the draft did not run."""
        layout, first = self.layout, self.start + 1
        if not layout.missing:
            return None
        tokens = self.tree.tokens[list(layout.missing)]
        offsets = layout.offsets_B + first
        return Step(tokens, first, layout.block_UB, offsets, first + self.num_ran, 1, (exit_layer,))


class SplitBackend(SharingBackend):
    """A target whose first `exit_layer` layers draft. Made by the `early_exit` drafter.

    `lower` and `upper` are backends of one kind on the same slots. Hidden states are not given: they would have to be
    put together from both parts.

    Lossless: yes, as the kind of backend is; the parts' products are those of the whole model.
    """

    def __init__(self, exit_layer: int, lower: Backend, upper: Backend):
        self.exit_layer, self.lower, self.upper = exit_layer, lower, upper
        self.draft_hidden = (exit_layer,)
        self._capabilities = replace(upper.capabilities, hidden=())
        self._drafted: _Drafted | None = None
        self._ready: tuple[Step, Tensor] | None = None  # a step, and the exit states of its rows

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        """`exit_layer`: from 1 to the number of layers less one. `whole`: a backend on the same model, whose kind both
        parts get; they are compared with it on a short text."""
        exit_layer, whole = options.pop("exit_layer"), options.pop("whole")
        name, count = type(model).__name__, model.config.get_text_config(decoder=True).num_hidden_layers
        if options:
            raise InputError(f"a split backend takes exit_layer= and whole=, not {sorted(options)}")
        if not isinstance(exit_layer, int) or not 1 <= exit_layer < count:
            raise InputError(
                f"exit_layer must be a whole number from 1 to {count - 1} for the {count} layers of {name}, "
                f"not {exit_layer!r}"
            )
        if is_spread(model):
            raise UnsupportedModelError(
                f"the layers of {name} are spread out by accelerate hooks, which a part of it would not obey; load it "
                "on one device, or use another drafter"
            )
        try:
            stored = {} if whole.kv_cache is None else {"kv_cache": whole.kv_cache}
            lower = type(whole).open(LowerPart(model, exit_layer), **stored)
            upper = type(whole).open(UpperPart(model, exit_layer), **stored)
            lower.expose((exit_layer,))
            made = cls(exit_layer, lower.on_slots_of(upper), upper)
            apart = made._apart(whole)
        except InputError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{name} does not run in two parts ({type(error).__name__}: {error}); use another drafter"
            ) from error
        if apart > _TOLERANCE * torch.finfo(model.dtype).eps ** 0.5:
            raise UnsupportedModelError(
                f"{name} in two parts differs from the whole model by {apart:.1e} of the largest logit: something "
                "passes from its lower to its upper layers besides the hidden state; use another drafter"
            )
        return made

    def _apart(self, whole: Backend) -> float:
        """The largest difference of logits from the whole model's, over two steps, as a share of the largest logit."""
        mine, its = self.fork(0), whole.fork(0)
        worst = 0.0
        for start, end in ((0, _CHECK_FIRST), (_CHECK_FIRST, min(_CHECK_TOKENS, self.capabilities.context))):
            rows = torch.arange(start, end)
            block = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
            step = Step(rows % self.capabilities.vocab_size, start, block, rows, start, len(rows))
            a, b = mine.forward(step).logits.double(), its.forward(step).logits.double()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)))
        return worst

    @property
    def draft(self) -> Backend:
        return self.lower

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def kv_cache(self) -> str | None:
        return self.upper.kv_cache

    @property
    def numerics(self) -> str:
        return "invariant" if self.lower.numerics == self.upper.numerics == "invariant" else "fast"

    @property
    def describes(self) -> str:
        return f"cut before layer {self.exit_layer}; below: {self.lower.describes}; above: {self.upper.describes}"

    def warmup(self) -> None:
        self.lower.warmup()
        self.upper.warmup()

    def expose(self, hidden: Sequence[int]) -> None:
        if hidden:
            raise InputError(
                "a target that runs in two parts (drafter='early_exit') gives no hidden states; use the drafter that "
                "reads them alone"
            )

    def drafted(self, start: int, grown: Grown, ran: TokenTree, states: Sequence[Tensor]) -> None:
        tree = grown.proposal.tree
        if not states or not len(tree):
            return
        layout = _layout(tree.parents, ran.parents, grown.ran_as)
        self._drafted = _Drafted(start, tree, layout, len(ran), torch.cat(list(states)))

    def _lower_step(self, step: Step) -> Step | None:
        """What the lower part has yet to compute for a step of the whole model."""
        if step.hidden:
            self.expose(step.hidden)
        if self._ready is not None and self._ready[0] is step:  # asked again after a failure above
            return None
        self._ready = None
        if self._drafted is None or not self._drafted.fits(step):
            self._drafted = None
            return replace(step, num_logits=1, hidden=(self.exit_layer,))
        return self._drafted.missing_step(self.exit_layer)

    def _put_in_order(self, step: Step, computed_MH: Tensor | None) -> None:
        """Keys and values of a drafted tree go where the step has its nodes, and all exit states beside each other."""
        if self._ready is not None and self._ready[0] is step:
            return
        drafted, self._drafted = self._drafted, None
        if drafted is None:
            assert computed_MH is not None
            self._ready = step, computed_MH
            return
        order, first = drafted.layout.order, drafted.start + 1
        states_MH = drafted.states_MH if computed_MH is None else torch.cat((drafted.states_MH, computed_MH))
        if order != tuple(range(len(states_MH) - 1)):
            self.lower.gather([first + place for place in order], first)
            states_MH = states_MH[[0, *(1 + place for place in order)]]
        self._ready = step, states_MH

    def forward(self, step: Step) -> StepResult:
        return type(self).forward_many([self], [step])[0]

    @classmethod
    @torch.inference_mode()
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """The lower part over rows that were not drafted, then the upper part over all."""
        below = [backend._lower_step(step) for backend, step in zip(backends, steps, strict=True)]
        asked = [(backend.lower, step) for backend, step in zip(backends, below, strict=True) if step is not None]
        results = iter(_forward_all([lower for lower, _ in asked], [step for _, step in asked]))
        for backend, step, lower_step in zip(backends, steps, below, strict=True):
            backend._put_in_order(step, next(results).hidden_MW if lower_step is not None else None)
        above = []
        for backend, step in zip(backends, steps, strict=True):
            assert backend._ready is not None
            above.append(replace(step, inputs_MW=backend._ready[1]))
        made = _forward_all([backend.upper for backend in backends], above)
        for backend in backends:
            backend._ready = None
        return made

    def gather(self, slots: Sequence[int], start: int) -> None:
        self.upper.gather(slots, start)

    def fork(self, length: int) -> Self:
        upper = self.upper.fork(length)
        lower = (self.lower if length else self.lower.fork(0)).on_slots_of(upper)
        return type(self)(self.exit_layer, lower, upper).join_family(self)

    @property
    def num_bytes(self) -> int:
        return self.upper.num_bytes


def _forward_all(backends: Sequence[Backend], steps: Sequence[Step]) -> list[StepResult]:
    if len(steps) == 1:
        return [backends[0].forward(steps[0])]
    return list(type(backends[0]).forward_many(backends, steps)) if steps else []
