"""`specdec train recover`: weights learn to live in fewer bits, with the full-precision model as their teacher.

Quantisation-aware fine-tuning by distillation (LLM-QAT, arXiv 2305.17888) with straight-through estimates; for sparse
formats masked fine-tuning, pruned at once or in steps (Zhu & Gupta, arXiv 1710.01878).

Shape suffixes: B rows, L tokens of a row, V vocabulary, N positions, K inputs of a layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.quant.layers import candidates
from specdec.quant.methods.calibration import refuse_prompts
from specdec.quant.recipe import Recipe
from specdec.runtime.copies import with_layers
from specdec.train.losses import LOSSES, check_loss, divergence, overlap
from specdec.train.objective import Batch, Losses, Objective
from specdec.train.pruning import PRUNERS, Pruning
from specdec.train.rounding import packed_model, rounded_layers

MASTERS = "masters.safetensors"


def compare(batch: Batch, q_logits_BLV: Tensor) -> dict[str, Tensor]:
    """How near a model with logits `q_logits_BLV` is to the target, at each position that counts, `[N]` each.

    overlap: sum min(p, q). agree: 1 where both have the same first choice, else 0. kl: from target to model. loss and
    target_loss: of the text itself, model's and target's, in nats; they have no value at the last position of a row,
    which predicts a token that is not there.
    """
    found: dict[str, list[Tensor]] = {}
    rows = zip(batch.tokens_BL, batch.mask_BL, batch.logits_BLV, q_logits_BLV, strict=True)
    for tokens_L, mask_L, p_logits_LV, q_logits_LV in rows:
        q_logits_LV = q_logits_LV.to(p_logits_LV.dtype)
        p_NV, q_logits_NV = p_logits_LV[mask_L].softmax(-1), q_logits_LV[mask_L]
        same_N, agree_N = overlap(p_NV, q_logits_NV)
        here = {"overlap": same_N, "agree": agree_N, "kl": divergence("fkl", p_NV, q_logits_NV)}
        known_L, next_L = mask_L[:-1], tokens_L[1:]
        for name, logits_LV in (("loss", q_logits_LV), ("target_loss", p_logits_LV)):
            here[name] = nn.functional.cross_entropy(logits_LV[:-1][known_L], next_L[known_L], reduction="none")
        for name, value_N in here.items():
            found.setdefault(name, []).append(value_N)
    return {name: torch.cat(values) for name, values in found.items()}


class RecoverObjective(Objective):
    """A copy of the target with rounded weights, fine-tuned until it says again what the target says.

    Trained are the weights of the layers that the recipe names; everything else stays the target's, to the bit. What
    is kept, and when the run ends early, is decided by the overlap with the target on held-out text, or by greedy
    agreement with --judged-at 0.
    """

    kind = "recover"
    recommended: ClassVar[Mapping[str, Any]] = {"lr": 1e-4, "weight_decay": 0.0}
    measures = ("loss", "target_loss", "kl")
    usage = "compare --target {out}"
    examples = """\
examples:
  specdec train recover --recipe mxfp4 --minutes 25 --precision bf16      the embedded target
  specdec train recover --target org/target --data texts.jsonl --recipe int4-g64 --out runs/int4
  specdec train recover --target org/target --self-generate 4000 --data prompts.jsonl --recipe w4a16
  specdec train recover --recipe sparse-80 --prune wanda --prune-steps 6 --lr 1e-3 --out runs/sparse
"""

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        recipe: Recipe,
        *,
        loss: str = "fkl",
        prune: str = "magnitude",
        prune_steps: int = 1,
        prune_share: float = 0.5,
        calibration_rows: int = 64,
        masters: bool = False,
    ):
        super().__init__(target, tokenizer)
        if recipe.method != "rtn":
            raise InputError(
                f"recover trains weights that are rounded to nearest; this recipe has method {recipe.method!r}. "
                'Give it "method": "rtn"'
            )
        if prune not in PRUNERS:
            raise InputError(f"no pruning is called {prune!r}; there are: {', '.join(PRUNERS)}")
        if prune_steps < 1 or calibration_rows < 1 or not 0 < prune_share < 1:
            raise InputError(
                "--prune-steps and --calibration-rows are whole numbers >= 1, and --prune-share is a share of the "
                f"run between 0 and 1; found {prune_steps}, {calibration_rows} and {prune_share}"
            )
        self.recipe, self.formats = recipe, recipe.assign(candidates(target))
        self.layers = rounded_layers(target, self.formats)
        self.student = with_layers(target, lambda name, _: self.layers.get(name), frozen=True)
        self.module = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in self.layers.items()})
        self.depth, self.loss_name, self.with_masters = 1, check_loss(loss), masters
        self.pruning = Pruning(self.layers, prune, prune_steps, prune_share)
        self.calibration_rows = calibration_rows

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        what = parser.add_argument_group("weights")
        what.add_argument(
            "--recipe",
            default="mxfp4",
            metavar="R",
            help="a format (mxfp4, mxfp6_e2m3, int4-g64, int8, sparse-80, …), a named recipe (w4a16, mx4, …) or a JSON "
            "file (default: mxfp4)",
        )
        what.add_argument("--masters", action="store_true", help=f"write the float32 weights too, as {MASTERS}")
        what.add_argument("--loss", choices=tuple(LOSSES), default="fkl", help="(default: fkl)")
        sparse = parser.add_argument_group("sparse formats")
        sparse.add_argument(
            "--prune", choices=PRUNERS, default="magnitude", help="which weights are dropped (default: magnitude)"
        )
        sparse.add_argument(
            "--prune-steps",
            type=int,
            default=1,
            metavar="N",
            help="drop them in N steps with training between (default: 1)",
        )
        sparse.add_argument(
            "--prune-share",
            type=float,
            default=0.5,
            metavar="SHARE",
            help="of the run in which the steps lie (default: 0.5)",
        )
        sparse.add_argument(
            "--calibration-rows",
            type=int,
            default=64,
            metavar="N",
            help="training rows that wanda looks at (default: 64)",
        )

    @classmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> RecoverObjective:
        names = ("loss", "prune", "prune_steps", "prune_share", "calibration_rows", "masters")
        return cls(target, tokenizer, Recipe.of(options["recipe"]), **{name: options[name] for name in names})

    @classmethod
    def check_texts(cls, texts: Iterable[str]) -> None:
        """Refuses the built-in prompts: weights that have seen them cannot be judged by them."""
        refuse_prompts(texts)

    # ------------------------------------------------------------ the course of a run

    def begin(self, rows: np.ndarray) -> None:
        if self.pruning.needs_activations:
            index = np.linspace(0, len(rows) - 1, min(self.calibration_rows, len(rows))).round().astype(int)
            tokens_RL = torch.from_numpy(rows[np.unique(index)].astype(np.int64))
            self.pruning.look(self.target, tokens_RL)

    def advance(self, share: float) -> None:
        self.pruning.advance(share)

    @property
    def settled(self) -> bool:
        return self.pruning.settled

    # ------------------------------------------------------------ losses and measures

    def _q_logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.student(input_ids=batch.tokens_BL, use_cache=False).logits
        return logits

    def loss(self, batch: Batch) -> Losses:
        q_logits_NV, p_logits_NV = batch.counted(self._q_logits(batch)), batch.counted(batch.logits_BLV)
        return Losses(divergence(self.loss_name, p_logits_NV.softmax(-1), q_logits_NV).mean())

    def judge(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        found = compare(batch, self._q_logits(batch))
        return found.pop("overlap")[:, None], found.pop("agree")[:, None], found

    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.judge(batch)[:2]

    @classmethod
    def described(cls, row: Mapping[str, Any]) -> str:
        return (
            f"held-out loss {row['loss']:.4f}, KL {row['kl']:.4f}, greedy agreement {row['alpha_t0'][0]:.3f}; "
            f"overlap {row['alpha_t1'][0]:.3f}; the target's loss {row['target_loss']:.4f}"
        )

    @classmethod
    def summary(cls, first: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
        return [
            f"held-out loss         {first['loss']:.4f} -> {best['loss']:.4f} (in full precision "
            f"{best['target_loss']:.4f})",
            f"KL to full precision  {first['kl']:.4f} -> {best['kl']:.4f}",
            f"greedy agreement      {first['alpha_t0'][0]:.4f} -> {best['alpha_t0'][0]:.4f}",
        ]

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        """An ordinary quantised folder; with `masters`, also the float32 weights that its weights are rounded from."""
        packed_model(self.target, self.layers, self.recipe).save_pretrained(folder)
        if self.with_masters:
            weights = {f"{name}.weight": layer.masters().cpu().contiguous() for name, layer in self.layers.items()}
            save_file(weights, folder / MASTERS)
