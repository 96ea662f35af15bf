"""How long and how fast a run trains, where it stands, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec.errors import InputError

OPTIMIZERS, PRECISIONS = ("adamw", "muon"), ("auto", "fp32", "bf16")
_FINAL_RATE = 0.02  # of --lr


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; what to train is the objective's. `out` gets the best weights, checkpoints and provenance."""

    out: Path
    steps: int | None = None
    minutes: float | None = None
    batch: int = 8  # rows of a forward, in each process
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.03  # share of the budget
    weight_decay: float = 0.01
    clip: float = 1.0
    optimizer: str = "adamw"
    precision: str = "fp32"  # "auto": `fast_precision` of the target's device
    seed: int = 0
    evaluations: int = 20
    evaluation_rows: int = 48
    patience: int = 8  # evaluations without a better one before the run ends; 0: never
    judged_at: int = 1  # temperature, 0 or 1, of the expected length that decides which weights are best
    checkpoint_minutes: float = 3.0
    resume: bool = True

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise InputError("say how long to train: --steps or --minutes")
        for name in ("steps", "minutes", "batch", "accumulate", "lr", "clip", "evaluations", "evaluation_rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name.replace('_', ' ')} is a number above 0, not {value}")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0 or self.patience < 0:
            raise InputError("warmup is a share below 1; weight decay and patience are at least 0")
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("judged_at", (0, 1))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is one of {', '.join(map(str, known))}, not {getattr(self, name)!r}")

    def identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to go on from it."""
        without = {"out", "checkpoint_minutes", "resume"}
        return {name: value for name, value in asdict(self).items() if name not in without}


def fast_precision(device: torch.device) -> str:
    """What products are fastest in: "bf16" where the device has them (CUDA 8.0 and up, x86 with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "cpu":
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that is supported
        return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "fp32"
    return "fp32"


@dataclass
class State:
    """Where a run is: all that is neither weights nor chance."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    epoch: int = 0
    at: int = 0
    evaluated: int = 0  # evaluations done after the first
    stale: int = 0
    best: int = 0  # index into the curve
    ended: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """`curve`: held-out numbers by step; `best`: those of the weights kept. `ended`: "steps", "minutes" or "stale"."""

    out: Path
    kind: str
    steps: int
    tokens: int
    seconds: float
    ended: str
    curve: list[dict[str, Any]]
    best: dict[str, Any]


def build_optimizers(module: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices between embedding and head and AdamW for the rest."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("the drafter has no parameter to train")
    tables = {id(p) for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    inner = [p for n, p in named if p.ndim == 2 and id(p) not in tables and "lm_head" not in n]
    found: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon" and inner:
        muon = torch.optim.Muon(
            inner, lr=settings.lr, momentum=0.95, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        found.append(muon)
        named = [(n, p) for n, p in named if all(p is not matrix for matrix in inner)]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        found.append(torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95)))
    return found


def rate(share: float, warmup: float) -> float:
    """The learning rate's factor when `share` of the budget is spent: linear up, then a cosine down to 2 %."""
    if share < warmup:
        return _FINAL_RATE + (1 - _FINAL_RATE) * share / warmup
    turn = (min(share, 1.0) - warmup) / (1 - warmup)
    return _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * turn))
