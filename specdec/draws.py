"""How tokens are drawn from a drafter's logits.

Shape suffixes: F nodes of one level, C children of each, S sequences, V vocabulary, R draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.chance import Chance, first
from specdec.proposal import Draw
from specdec.sampling import Sampling
from specdec.tree import TokenTree

# Logit of a token outside a draft vocabulary.
_OUTSIDE = -1e4


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Crop or pad the last axis: paddings of one tokenizer's vocabulary differ between models."""
    missing = vocab_size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def spread(logits_FR: Tensor, ids_R: Tensor, vocab_size: int) -> Tensor:
    """Logits of a draft vocabulary in the target's ids, `[F, V]`; of other tokens so low that their probability is 0.

    Not -inf: where processors ban all that the drafter knows, what they allow remains a distribution.
    """
    full_FV = logits_FR.new_full((logits_FR.shape[0], vocab_size), _OUTSIDE)
    return full_FV.index_copy_(1, ids_R, logits_FR)


def without_replacement(q_FV: Tensor, count: int, chance: Chance) -> Tensor:
    """`[F, count]` tokens in drawing order; -1 where the support is used up, never in the first column."""
    left = q_FV.clone()
    drawn: list[Tensor] = []
    for _ in range(count):
        token = chance.draw(left)[:, None]
        drawn.append(torch.where(left.sum(-1, keepdim=True) > 0, token, -1) if drawn else token)
        left.scatter_(1, token, 0.0)
    return torch.cat(drawn, 1)


def mixed(q_FV: Tensor, counts: Sequence[int], chance: Chance) -> tuple[Tensor, Tensor]:
    """Children of which the first is drawn from what the others, the top tokens, leave: `[F, C]`, -1 where there are
    fewer; and the rows `[F, V]` that the first ones were drawn from. (Greedy drafts: Hu et al., arXiv 2502.18779.)"""
    rest_FV = q_FV.clone()
    top_FC = q_FV.topk(max(1, min(max(counts) - 1, q_FV.shape[-1]))).indices
    rank = torch.arange(top_FC.shape[1], device=q_FV.device)
    is_top = rank < torch.tensor(counts, device=q_FV.device)[:, None] - 1
    rest_FV.scatter_reduce_(1, top_FC, torch.where(is_top, 0.0, 1.0).to(q_FV), "prod")
    left = rest_FV.sum(-1, keepdim=True)
    first_F1 = torch.where(left > 0, chance.draw(rest_FV)[:, None], -1)
    top_FC = torch.where(is_top & (q_FV.gather(1, top_FC) > 0), top_FC, -1)
    return torch.cat((first_F1, top_FC), 1)[:, : max(counts)], rest_FV / left.clamp_min(torch.finfo(q_FV.dtype).tiny)


def draw_children(scores_FV: Tensor, q_FV: Tensor, draw: Draw, count: int, position: int, chance: Chance) -> Tensor:
    """`[F, C]` children in drawing order, drawn alike; -1 where there are fewer, never in the first column."""
    if draw is Draw.SHARED:
        return chance.race(q_FV, [position] * len(q_FV), count)
    if draw is Draw.SAMPLED:
        return without_replacement(q_FV, count, chance)
    best, index = scores_FV.topk(min(count, scores_FV.shape[-1]))
    return torch.where(best.isinf(), -1, index) if count > 1 else index


@dataclass(frozen=True)
class Columns:
    """Which tokens the columns of a drafter's logits are.

    `ids_R`: for a drafter whose logits are those of a draft vocabulary, the target's id of each column.
    """

    sampling: Sampling
    draw: Draw
    vocab_size: int
    ids_R: Tensor | None = field(default=None, compare=False)

    @property
    def narrow(self) -> bool:
        """Whether the columns of the draft vocabulary will do: noise, rows of q and processors know tokens by the
        target's ids; a top token is found without them."""
        return self.ids_R is not None and self.draw is Draw.POINT and not self.sampling.reads_prefix

    def fit(self, logits: Tensor) -> Tensor:
        """`[F, V]`, or `[F, R]` where they are narrow."""
        if self.ids_R is None:
            return fit_vocabulary(logits, self.vocab_size)
        return logits if self.narrow else spread(logits, self.ids_R, self.vocab_size)

    def named(self, columns: Tensor) -> Tensor:
        """The target's ids of columns of what `fit` gives; -1 stays."""
        if not self.narrow:
            return columns
        assert self.ids_R is not None
        return torch.where(columns < 0, columns, self.ids_R[columns])


@dataclass(frozen=True)
class NextToken(Columns):
    """The next token of a chain, as a function of nothing but logits and noise: a device can go on by itself.

    Equal ones draw alike for one drafter. `sampling` has no processors, and its seed is not read: chance is in the
    noise. Lossless: as `draw_children`, whose tokens these are.
    """

    def __post_init__(self) -> None:
        assert not self.sampling.reads_prefix
        assert self.draw is not Draw.MIXED

    @property
    def is_noisy(self) -> bool:
        return self.draw is not Draw.POINT

    def noise(self, chance: Chance, position: int, count: int, device: torch.device) -> Tensor | None:
        """Noise `[count, V]` of as many tokens, the first of which stands at `position`; None where this chance cannot
        say beforehand what it will draw."""
        if self.draw is Draw.SHARED:
            return chance.race_noise(range(position, position + count), self.vocab_size, device)
        return chance.draw_noise(count, self.vocab_size, device)

    def __call__(self, logits_SV: Tensor, noise_SV: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens `[S]`, and the rows of q `[S, V]` that they were drawn from where they are samples."""
        scores_SV = self.sampling.scores(self.fit(logits_SV), (), TokenTree.empty(), ())
        if noise_SV is None:
            return self.named(scores_SV.topk(1).indices[:, 0]), None
        q_SV = scores_SV.softmax(-1)
        return first(noise_SV, q_SV, 1)[:, 0], q_SV if self.draw is Draw.SAMPLED else None
