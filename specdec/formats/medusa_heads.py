"""Medusa heads as a module: residual blocks over the target's last hidden state, and projections to the vocabulary.

(Cai et al., arXiv 2401.10774.) Shape suffixes: M states, H hidden width, R draft vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.quant.linear import PackedLinear
from specdec.vocabulary import output_weight

#: Where the projections come from: each head's own, one that all share, or the target's own output head.
PROJECTIONS = ("own", "shared", "tied")


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a set of heads. `draft_size`: rows R of a projection; `vocab_size`: V of the target."""

    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    draft_size: int
    projection: str = "own"
    bias: bool = True  # of the residual blocks
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise InputError(f"projection is one of {', '.join(PROJECTIONS)}, not {self.projection!r}")
        if min(self.num_heads, self.hidden_size, self.vocab_size, self.draft_size) < 1 or self.num_layers < 0:
            raise InputError(f"heads, widths and vocabularies are at least 1, and layers at least 0: {self}")
        if self.draft_size > self.vocab_size:
            raise InputError(f"a draft vocabulary of {self.draft_size} is larger than the target's {self.vocab_size}")


class MedusaHeads(nn.Module):
    """Head k, from the target's state at position t after its final norm: logits of the token at t + k + 2.

    Block: h + SiLU(W h + b), started at the identity. `d2t_absolute` int64 `[R]`: the target id of each row of the
    projections; None where they have a row for every token. Tied projections are the target's head: `borrow` it.

    Lossless: yes, whatever the heads say.
    """

    d2t_absolute: Tensor | None

    def __init__(self, shape: HeadShape, d2t_absolute: Tensor | None = None):
        super().__init__()
        self.shape = shape
        width = shape.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=shape.bias) for _ in range(shape.num_layers))
            for _ in range(shape.num_heads)
        )
        count = {"own": shape.num_heads, "shared": 1, "tied": 0}[shape.projection]
        self.projections = nn.ModuleList(nn.Linear(width, shape.draft_size, bias=False) for _ in range(count))
        self.register_buffer("d2t_absolute", None if d2t_absolute is None else d2t_absolute.clone())
        if (d2t_absolute is None) != (shape.draft_size == shape.vocab_size):
            raise InputError("a draft vocabulary smaller than the target's needs a map of its tokens, and only then")
        if d2t_absolute is not None:
            self.check_map(d2t_absolute)
        #: The target's head for tied projections; in a list, so that it is no part of the module's state.
        self.borrowed: list[nn.Module] = []
        for block in self.blocks.modules():
            if isinstance(block, nn.Linear):
                nn.init.zeros_(block.weight)
                if block.bias is not None:
                    nn.init.zeros_(block.bias)

    def check_map(self, d2t_absolute: Tensor) -> None:
        """`InputError` unless it names a different token of the target for each row."""
        size, vocab_size = self.shape.draft_size, self.shape.vocab_size
        if d2t_absolute.dtype != torch.int64 or d2t_absolute.shape != (size,):
            raise InputError(
                f"the token map must be int64 [{size}], not {d2t_absolute.dtype} {list(d2t_absolute.shape)}"
            )
        if (
            len(d2t_absolute.unique()) < size
            or not 0 <= int(d2t_absolute.min()) <= int(d2t_absolute.max()) < vocab_size
        ):
            raise InputError(f"the token map must name {size} different tokens, each below {vocab_size}")

    @property
    def joint(self) -> bool:
        """Whether all heads read one projection, so that one product over it serves them all."""
        return self.shape.projection != "own"

    def borrow(self, target: Any) -> None:
        """Take the rows of the target's head that tied projections are: shared, or copied for a draft vocabulary."""
        check_target(self.shape, target)
        if self.shape.projection == "tied":
            weight, bias = output_rows(target, self.d2t_absolute)
            linear = nn.Linear(self.shape.hidden_size, len(weight), bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=False)
            self.borrowed = [linear]

    def project(self, k: int, states_MH: Tensor) -> Tensor:
        """Logits `[M, R]` of head k's blocks' outputs."""
        if self.shape.projection == "tied":
            if not self.borrowed:
                raise InputError("tied heads project by the target's own head: call borrow(target) first")
            layer = self.borrowed[0]
        else:
            layer = self.projections[0 if self.joint else k]
        logits: Tensor = layer(states_MH)
        return logits if self.shape.logit_scale == 1.0 else logits * self.shape.logit_scale

    def residual(self, k: int, states_MH: Tensor) -> Tensor:
        """`[M, H]`: the target's states through head k's blocks."""
        blocks: Any = self.blocks[k]
        for layer in blocks:
            states_MH = states_MH + nn.functional.silu(layer(states_MH))
        return states_MH

    def forward(self, k: int, states_MH: Tensor) -> Tensor:
        """Logits `[M, R]` of head k over the draft vocabulary, from the target's states `[M, H]`."""
        return self.project(k, self.residual(k, states_MH))

    def twin(self, device: Any, dtype: torch.dtype) -> MedusaHeads:
        """A copy for inference there, which shares every tensor that need not change."""
        moved: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
            for p in (*self.parameters(), *(p for linear in self.borrowed for p in linear.parameters()))
        }
        moved.update({id(buffer): buffer.to(device) for buffer in self.buffers()})
        return copy.deepcopy(self, moved).eval()


def output_rows(target: Any, ids_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight `[R, H]` and bias `[R]` of the target's output head, all rows or those of `ids_R`; detached."""
    head = target.get_output_embeddings()
    weight = output_weight(target) if isinstance(head, PackedLinear) else getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"the target's output head ({type(head).__name__}) has no plain weights to start or tie heads from; "
            "use heads with projections of their own, or the target without quantisation"
        )
    bias = getattr(head, "bias", None)
    tensors = [None if t is None else t.detach() for t in (weight, bias)]
    rows = tensors if ids_R is None else [None if t is None else t[ids_R.to(t.device)].contiguous() for t in tensors]
    assert rows[0] is not None
    return rows[0], rows[1]


def logit_scale(config: Any) -> float:
    """What a target multiplies its head's logits by: some families do."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    return scale / float(getattr(config, "logits_scaling", None) or 1.0)


def check_target(shape: HeadShape, target: Any) -> None:
    """`IncompatiblePairError` unless heads of this shape can read the target. Paddings of a vocabulary may differ."""
    config = target.config.get_text_config(decoder=True)
    if shape.hidden_size != config.hidden_size:
        raise IncompatiblePairError(
            f"the heads read hidden states of width {shape.hidden_size}, and the target's have {config.hidden_size}: "
            "they were trained for another target; use its own, or `specdec train medusa`"
        )
    if abs(shape.vocab_size - config.vocab_size) > (0 if shape.projection == "tied" else 64):
        raise IncompatiblePairError(
            f"the heads draft from {shape.vocab_size} tokens, and the target has {config.vocab_size}: they were "
            "trained for another target; use its own, or `specdec train medusa`"
        )
