"""A small network fills a block of masked slots in one pass: all tokens of a proposal at once.

Shape suffixes: K drafted positions, R draft vocabulary, W width of the target's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, Outcome, Request
from specdec.errors import InputError
from specdec.formats import dflash as files
from specdec.formats.dflash_check import check_convention
from specdec.history import History
from specdec.marginals import grow_marginals
from specdec.models.dflash_text import DFlashNetwork
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal


class ParallelText(Protocol):
    """A network's view of one text. Asking it for logits leaves no trace."""

    @property
    def length(self) -> int:
        """Tokens appended so far."""

    def append(self, features_LW: Tensor) -> None:
        """The target's hidden states of the next verified tokens."""

    def logits(self, root: int, depth: int) -> Tensor:
        """`[depth, R]`: of the tokens behind `root`, which follows the verified ones."""


class ParallelNetwork(Protocol):
    """What drafts K tokens in one pass, from hidden states of the target and the last committed token."""

    hidden: tuple[int, ...]
    num_positions: int
    ids_R: Tensor | None

    def open(self) -> ParallelText: ...

    def bytes_for(self, length: int) -> int: ...


@dataclass(eq=False)
class ParallelState:
    request: Request
    tokens: History  # the last one is the root, which the target has not computed yet
    text: ParallelText


class ParallelDrafter(Drafter):
    """One pass over a block gives a distribution for each of the next positions, whatever the others hold.

    A chain is the most probable token of each, or an independent draw; then each slot's own row is the law that its
    token was drawn by. With a node budget the proposal is the most probable tree under the product of the rows.
    (DFlash: Chen et al., arXiv 2602.06036; DDTree: arXiv 2604.12989.)

    What the network keeps of a text follows the target's hidden states: O(new tokens) a round.

    Lossless: yes, with every lossless verifier.
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    memory = Memory.DEPTH

    def __init__(self, network: ParallelNetwork):
        self.network = network
        self.hidden = network.hidden

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        """From a folder with DFlash weights. `layer_ids`: "hidden_states" or "outputs", what its layer numbers mean;
        by default what its layout means by them. `check`: whether that is tried on a short text first."""
        return cls(_dflash(context, **options))

    @classmethod
    def recognises(cls, config: Mapping[str, Any], folder: Path) -> bool:
        return files.is_dflash(config)

    @property
    def name(self) -> str:
        return "parallel"

    def start(self, request: Request) -> ParallelState:
        state = ParallelState(request, History(request.prompt), self.network.open())
        self._follow(state)
        return state

    def _follow(self, state: ParallelState) -> None:
        features = state.request.features
        assert features is not None
        if len(features) > state.text.length:
            state.text.append(features.read(state.text.length))

    @torch.inference_mode()
    def propose(self, state: ParallelState, plan: Plan, chance: Chance) -> Proposal:
        plan = plan.limited(self.network.num_positions)
        if not plan.depth:
            return Proposal.empty()
        logits_KR = state.text.logits(state.tokens[-1], plan.depth)
        return grow_marginals(logits_KR, plan, state.request, state.tokens, chance, self.network.ids_R)

    def observe(self, state: ParallelState, outcome: Outcome) -> ParallelState:
        state.tokens.extend(outcome.tokens)
        self._follow(state)
        return state

    def bytes_for(self, length: int) -> int:
        return self.network.bytes_for(length)


def _dflash(context: BuildContext, layer_ids: str | None = None, check: bool = True, **options: Any) -> DFlashNetwork:
    if options:
        raise InputError(f"the parallel drafter has no option {min(options)!r}; it has layer_ids and check")
    if context.source is None or not Path(context.source).is_dir():
        raise InputError(
            "the parallel drafter needs a folder of DFlash weights trained for this target, as in drafter='FOLDER'; "
            "`specdec train dflash` makes them, and those of a hub id are downloaded first"
        )
    folder = Path(context.source)
    model, convention = files.read(folder, layer_ids)
    network = DFlashNetwork(context.target, model, context.backend)
    if check and not files.is_own(folder):
        check_convention(context.target, context.tokenizer, model, convention)
    return network
