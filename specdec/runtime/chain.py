"""A draft that is asked for at once: steps of one row each, which read the token chosen from the logits before them.

Shape suffixes: K tokens of a chain, S sequences, V vocabulary, B slots of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specdec.runtime.backend import Backend, Step, StepResult


class Rule(Protocol):
    """How tokens follow from logits `[S, V]`, and noise `[S, V]` where it is noisy: operators on the device, nothing
    else, so that they can be captured. Equal rules (`==`, `hash`) may stand for each other."""

    @property
    def vocab_size(self) -> int:
        """Of the noise."""

    @property
    def is_noisy(self) -> bool: ...

    def __call__(self, logits_SV: Tensor, noise_SV: Tensor | None, /) -> tuple[Tensor, Tensor | None]:
        """Tokens, int64 `[S]`, and the rows `[S, V]` that they were drawn from, if they are samples."""


@dataclass(frozen=True, eq=False)
class Chain:
    """`count` tokens that follow a step: the first from the step's last logits, each other from a step of its own."""

    count: int
    rule: Rule
    noise_KV: Tensor | None = None  # of each token, float64, on the device


@dataclass(frozen=True)
class Drafted:
    tokens_K: Tensor  # int64, on the device
    q_KV: Tensor | None = None  # what they were drawn from


def follow(step: Step, at: int, token: Tensor) -> Step:
    """The chain's step number `at` (0 is `step` itself), which reads the token `[1]` before it."""
    slot = step.end + at - 1
    one = torch.ones(1, 1, dtype=torch.bool)
    return replace(
        step, tokens=token, prefix=slot, block_MB=one, block_positions_B=torch.tensor([slot]), start=slot, num_logits=1
    )


def step_by_step(
    forward_many: Callable[[list[Any], list[Step]], Sequence[StepResult]],
    backends: Sequence[Backend],
    steps: Sequence[Step],
    chains: Sequence[Chain],
) -> list[Drafted]:
    """Chains, one each of several sequences, in as many calls of the model as the longest has tokens."""
    current = list(steps)
    tokens: list[list[Tensor]] = [[] for _ in chains]
    rows: list[list[Tensor]] = [[] for _ in chains]
    for at in range(max(chain.count for chain in chains)):
        live = [i for i, chain in enumerate(chains) if at < chain.count]
        results = forward_many([backends[i] for i in live], [current[i] for i in live])
        for i, result in zip(live, results, strict=True):
            noise = chains[i].noise_KV
            token, q = chains[i].rule(result.logits, None if noise is None else noise[at : at + 1])
            tokens[i].append(token)
            if q is not None:
                rows[i].append(q)
            current[i] = follow(steps[i], at + 1, token)
    return [Drafted(torch.cat(t), torch.cat(q) if q else None) for t, q in zip(tokens, rows, strict=True)]
