"""`specdec train medusa`: heads on a frozen target's last hidden state (Medusa-1, arXiv 2401.10774).

Shape suffixes: B rows, L tokens of a row, N positions or starts, K heads, H hidden width, V vocabulary, R draft
vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.formats import medusa as layouts
from specdec.formats.medusa_heads import PROJECTIONS, HeadShape, MedusaHeads, logit_scale, output_rows
from specdec.loading import EMBEDDED
from specdec.policy import MAX_DEPTH
from specdec.train.losses import LOSSES, check_loss, divergence, in_pieces, overlap, restrict
from specdec.train.objective import Batch, Losses, Objective
from specdec.train.trainer import look
from specdec.vocabulary import always_included, count_tokens, most_frequent

# The text that projections are started from: rows, and how many of them the target reads at once.
_ROWS, _BATCH = 64, 8
# Of the mean square of a state's entries: keeps the least-squares map from following noise.
_RIDGE = 1e-2


class MedusaObjective(Objective):
    """Medusa heads: head k learns the target's distribution of the token k + 2 places behind a hidden state.

    A head's blocks start at the identity, and its projection from the target's rows. Head k weighs `decay^k`.
    """

    kind = "medusa"
    layouts = layouts.LAYOUTS
    # Heads are small and see one state: what the target itself writes teaches them most, step for step.
    recommended: ClassVar[Mapping[str, Any]] = {
        "lr": 3e-3,
        "optimizer": "muon",
        "judged_at": 0,
        "precision": "auto",
        "minutes": 40.0,
        "self_generate": 512,
        "self_temperature": "0",
        "text_share": 0.0,
    }

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        *,
        heads: int = 4,
        layers: int = 1,
        vocab: int | None = None,
        projection: str = "own",
        loss: str = "fkl",
        decay: float = 0.8,
        stored: str = "bfloat16",
        init: str | None = None,
    ):
        super().__init__(target, tokenizer)
        if not 1 <= heads <= MAX_DEPTH or not 1 <= layers <= MAX_DEPTH:
            raise InputError(f"--heads and --layers are numbers from 1 to {MAX_DEPTH}, not {heads} and {layers}")
        if not 0 < decay <= 1:
            raise InputError(f"--decay is above 0 and at most 1, not {decay}")
        config = target.config.get_text_config(decoder=True)
        vocab_size = int(config.vocab_size)
        size = vocab or vocab_size
        if not 1 <= size <= vocab_size:
            raise InputError(f"--vocab is a number of tokens from 1 to the target's {vocab_size}, not {vocab}")
        self.loss_name, self.decay, self.depth = check_loss(loss), decay, heads
        self.stored = getattr(torch, stored)
        self.hidden = (int(config.num_hidden_layers),)
        ids = None if size == vocab_size else torch.arange(size)  # until `begin` has seen the text
        shape = HeadShape(
            heads, layers, int(config.hidden_size), vocab_size, size, projection, logit_scale=logit_scale(config)
        )
        self.module: MedusaHeads = MedusaHeads(shape, ids)
        self.started = init is not None
        if init is not None:
            self.module = layouts.read(EMBEDDED / layouts.NAME if init == "embedded" else init).float()
            self.module.requires_grad_(True)
            self.depth = self.module.shape.num_heads
        self._borrow()

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        shape = parser.add_argument_group("the heads")
        shape.add_argument("--heads", type=int, default=4, metavar="N", help="drafted tokens (default: 4)")
        shape.add_argument("--layers", type=int, default=1, metavar="N", help="residual blocks of a head (default: 1)")
        shape.add_argument(
            "--vocab",
            type=int,
            metavar="N",
            help="draft only the N most frequent tokens of the text: cheaper heads, a little less acceptance (default: "
            "all)",
        )
        shape.add_argument(
            "--projection",
            choices=PROJECTIONS,
            default="own",
            help="to the vocabulary: each head's own, one for all heads, or the target's head, which is neither "
            "trained nor stored (default: own)",
        )
        shape.add_argument(
            "--init",
            metavar="FOLDER",
            help="go on from these heads, whose shape counts; 'embedded' are the ones in the package",
        )
        shape.add_argument(
            "--stored", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(default: bfloat16)"
        )
        how = parser.add_argument_group("what is learnt")
        how.add_argument("--loss", choices=tuple(LOSSES), default="fkl", help="(default: fkl)")
        how.add_argument(
            "--decay", type=float, default=0.8, metavar="D", help="head k weighs D to the k (default: 0.8)"
        )

    @classmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> MedusaObjective:
        return cls(target, tokenizer, **options)

    def begin(self, rows: np.ndarray) -> None:
        heads = self.module
        if self.started:
            return
        if heads.d2t_absolute is not None:
            counts_V = count_tokens([rows.reshape(-1)], heads.shape.vocab_size)  # type: ignore[list-item]
            always = always_included(self.tokenizer, self.target)
            ids = most_frequent(counts_V, heads.shape.draft_size, always).ids_R
            heads.d2t_absolute.copy_(ids)
        self._borrow()
        self._start_projections(rows[:_ROWS])

    def _borrow(self) -> None:
        self.module.borrow(self.target)
        self.module.borrowed = [layer.float() for layer in self.module.borrowed]

    @torch.no_grad()
    def _start_projections(self, rows: np.ndarray) -> None:
        """The target's own rows, behind the linear map that best tells a later state from an earlier one.

        The target's head says what comes next, not what comes after that: the map, found by least squares on a little
        text, is worth some tens of steps of training.
        """
        if self.module.shape.projection == "tied" or rows.shape[1] <= self.depth:
            return
        weight_RH = output_rows(self.target, self.module.d2t_absolute)[0].double()
        maps = self._maps(rows)
        for k, layer in enumerate(self.module.projections):
            layer.weight.copy_(weight_RH @ maps[k])  # type: ignore[operator, union-attr]

    def _maps(self, rows: np.ndarray) -> list[Tensor]:
        """For each head the `[H, H]` that maps a state to about the one k + 1 places later; float64."""
        device = next(self.target.parameters()).device
        states = [
            look(self.target, tokens_BL, tokens_BL >= 0, self.hidden).hidden[self.hidden[0]].double()
            for tokens_BL in torch.from_numpy(rows.astype(np.int64)).to(device).split(_BATCH)
        ]
        maps = []
        for k in range(self.depth):
            early_NH, late_NH = (
                torch.cat([s_BLH[:, part].flatten(0, 1) for s_BLH in states])
                for part in (slice(None, -k - 1), slice(k + 1, None))
            )
            square_HH = early_NH.T @ early_NH
            square_HH.diagonal().add_(_RIDGE * square_HH.diagonal().mean())
            maps.append(torch.linalg.solve(square_HH, early_NH.T @ late_NH).T)
        return maps

    def _target_rows(self, p_logits_NV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The target's probabilities, within the draft vocabulary where there is one, and the mass inside."""
        p_NV = p_logits_NV.softmax(-1)
        ids = self.module.d2t_absolute
        return (p_NV, None) if ids is None else restrict(p_NV, ids)

    def loss(self, batch: Batch) -> Losses:
        states_BLH = batch.hidden[self.hidden[0]].float()
        batch.starts(self.depth)  # raises for rows that are too short
        total = states_BLH.new_zeros(())
        metrics: dict[str, Tensor] = {}
        for k in range(self.depth):
            counts = batch.mask_BL[:, k + 1 :]
            states_NH = states_BLH[:, : -k - 1][counts]
            p_logits_NV = batch.logits_BLV[:, k + 1 :][counts]

            def piece(states_NH: Tensor, p_logits_NV: Tensor, k: int = k) -> Tensor:
                p_NR, mass_N = self._target_rows(p_logits_NV)
                loss_N = divergence(self.loss_name, p_NR.to(states_NH.dtype), self.module(k, states_NH))
                # What the target says within the draft vocabulary matters as far as it says anything there.
                return (loss_N if mass_N is None else loss_N * mass_N).sum()

            pieces = in_pieces(piece, self.module.shape.vocab_size, states_NH, p_logits_NV)
            loss = torch.stack(pieces).sum() / max(1, len(states_NH))
            metrics[f"head {k}"] = loss.detach()
            total = total + self.decay**k * loss
        return Losses(total, metrics)

    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        starts = batch.starts(self.depth, 1)
        length = starts.shape[1]
        states_NH = batch.hidden[self.hidden[0]][:, :length][starts].float()
        columns = []
        for k in range(self.depth):
            p_logits_NV = batch.logits_BLV[:, k + 1 : k + 1 + length][starts]

            def piece(states_NH: Tensor, p_logits_NV: Tensor, k: int = k) -> Tensor:
                return torch.stack(
                    overlap(p_logits_NV.softmax(-1), self.module(k, states_NH), self.module.d2t_absolute)
                )

            columns.append(torch.cat(in_pieces(piece, self.module.shape.vocab_size, states_NH, p_logits_NV), 1))
        overlap_NK, agree_NK = torch.stack(columns, 2)
        return overlap_NK, agree_NK

    def save(self, folder: Path) -> None:
        source = str(getattr(self.target.config, "_name_or_path", "") or "")
        base = layouts.EMBEDDED_TARGET if source == str(EMBEDDED / "target") else source
        layouts.write(self.module, folder, base, self.stored)

    @classmethod
    def export(cls, source: Path, out: Path, layout: str) -> None:
        layouts.export(source, out, layout)
