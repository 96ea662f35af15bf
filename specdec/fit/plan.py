"""A fitted tree in a file: the shape, what it was fitted on, and the measurements behind it."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from specdec.drafter import Drafter
from specdec.dtypes import dtype_name
from specdec.errors import InputError, PolicyWarning
from specdec.policy import Constant, Plan, Policy, PolicyRun
from specdec.tree import structure

FORMAT = 1
# More nodes than this are no tree that anybody verifies; a file that says otherwise is damaged.
_MOST_NODES = 4096


def circumstances(target: Any, drafter: Drafter) -> dict[str, Any]:
    """What a fit depends on: the models, the device, the threads."""
    parameters = sum(p.numel() for p in target.parameters())
    device = next(target.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "target": f"{type(target).__name__} {parameters} {dtype_name(target.dtype)}",
        "drafter": drafter.name,
        "device": where,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


@lru_cache(maxsize=1)
def processor() -> str:
    """The CPU's own name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class TreePlan:
    """The best `shape` (parents; () is plain decoding) for `fitted_on`, at a temperature, and how it was found."""

    shape: tuple[int, ...]
    fitted_on: Mapping[str, Any]
    temperature: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> TreePlan:
        """Raises `InputError` for a file that is not a plan."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read a tree plan from {path}: {error}; make one with specdec tree") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path} is not a tree plan of format {FORMAT}; make one with specdec tree")
        shape, fitted_on = found.get("shape"), found.get("fitted_on")
        if not isinstance(shape, list) or not all(isinstance(p, int) for p in shape) or len(shape) > _MOST_NODES:
            raise InputError(f"{path}: shape is a list of at most {_MOST_NODES} parents")
        if not isinstance(fitted_on, dict):
            raise InputError(f"{path} does not say what it was fitted on; make one with specdec tree")
        temperature, evidence = found.get("temperature", 0.0), found.get("evidence", {})
        if not isinstance(temperature, (int, float)) or not isinstance(evidence, dict):
            raise InputError(f"{path}: temperature is a number, and evidence a table; make one with specdec tree")
        structure(tuple(shape))
        return TreePlan(tuple(shape), fitted_on, float(temperature), evidence)


@dataclass(frozen=True)
class FittedTree(Policy):
    """The tree of a plan that `specdec tree` made. Elsewhere than where it was fitted it is used with a warning.

    Lossless: yes, as every policy; a plan that does not fit costs speed.
    """

    plan_file: str

    @cached_property
    def plan(self) -> TreePlan:
        return TreePlan.load(self.plan_file)

    @property
    def branches(self) -> bool:
        return not structure(self.plan.shape).is_chain

    @property
    def name(self) -> str:
        return f"fitted tree({len(self.plan.shape)} nodes)"

    def check(self, target: Any, drafter: Drafter) -> None:
        here = circumstances(target, drafter)
        other = [
            f"{key} {value}, here {here.get(key)}"
            for key, value in self.plan.fitted_on.items()
            if here.get(key) != value
        ]
        if other:
            warnings.warn(
                f"the tree of {self.plan_file} was fitted on other things ({'; '.join(other)}); fit one for these with "
                "specdec tree",
                PolicyWarning,
                stacklevel=4,
            )

    def start(self) -> PolicyRun:
        shape = self.plan.shape
        return Constant(Plan(structure(shape).max_depth, shape=shape))
