"""The verifier's contract, and the walk that several rules share.

Shape suffixes: N tree nodes, V vocabulary. `p` has N + 1 rows: the root's first, then each node's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.errors import IncompatiblePairError
from specdec.proposal import Draw, Proposal
from specdec.sampling import Sampling
from specdec.transfer import to_device
from specdec.tree import TokenTree, structure


@dataclass(frozen=True, eq=False)
class Verdict:
    """`node`: the deepest accepted node (-1: none). `token`: what follows it. 0-d int64, on the device of `p`."""

    node: Tensor
    token: Tensor

    @staticmethod
    def of(node: int, token: Tensor) -> Verdict:
        return Verdict(torch.tensor(node), token)


class Verifier(ABC):
    """Decides how much of a proposal becomes text. Knows nothing of models or caches.

    `draws`: how a proposal's nodes may have been drawn, the best first. `lossless`: whether the emitted text follows
    the processed target distribution exactly. `specdec certify` checks that claim by enumeration.
    """

    lossless: ClassVar[bool] = True
    trees: ClassVar[bool] = False
    draws: ClassVar[tuple[Draw, ...]]
    #: Whether the same seed gives the tokens of plain decoding at every temperature.
    keeps_seed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        """`p` `[N + 1, V]`: target probabilities. `position`: absolute position of the token that the root predicts."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise `IncompatiblePairError` when the rule does not cover this sampling."""
        return None

    def choose_draw(self, offered: frozenset[Draw]) -> Draw | None:
        """The best way to draw that both sides know; None when there is none."""
        return next((draw for draw in self.draws if draw in offered), None)

    def check_proposal(self, proposal: Proposal) -> None:
        """Raise when the proposal is not of a kind that this rule verifies."""
        unknown = set(proposal.draws) - set(self.draws)
        if unknown:
            raise IncompatiblePairError(
                f"the {self.name} verifier cannot take nodes drawn as {sorted(d.value for d in unknown)}"
            )
        if not self.trees and not proposal.tree.is_chain:
            raise IncompatiblePairError(f"the {self.name} verifier takes chains, and the drafter proposed a tree")


def walk(tree: TokenTree, y: Tensor) -> Verdict:
    """Follow, from the root, the child that equals the target's own choice `y` `[N + 1]`; stop where there is none.

    No data-dependent branch: the verdict stays on the device.
    """
    device = y.device
    if not len(tree):
        return Verdict(torch.tensor(-1, device=device), y[0])
    tokens = to_device(tree.tokens, device)
    if tree.is_chain:
        node = (tokens == y[:-1]).long().cumprod(0).sum() - 1
    else:
        parents_N, depths_N, ancestors_NN = _on_device(tree.parents, device)
        match = tokens == y[parents_N + 1]
        reached = (match | ~ancestors_NN).all(-1)
        depth = depths_N * reached
        node = torch.where(depth.max() > 0, depth.argmax(), -1)
    return Verdict(node, y.index_select(0, (node + 1)[None])[0])  # y[node + 1] would read `node` on the host


@lru_cache(maxsize=256)
def _on_device(parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Parents and depths `[N]`, ancestors `[N, N]`; once per shape."""
    shape = structure(parents)
    return to_device(parents, device), to_device(shape.depths, device), to_device(shape.ancestors_NN, device)


def positive_part(residual: Tensor, otherwise: Tensor) -> Tensor:
    """`max(residual, 0)` by rows; a row without mass (rejection had probability 0; rounding got there) becomes p."""
    residual = residual.clamp_min(0)
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, otherwise)
