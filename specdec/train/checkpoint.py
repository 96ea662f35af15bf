"""Checkpoints of a training run: folders of safetensors and JSON that appear whole, by a rename, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.errors import InputError

Weights = dict[str, Tensor]
_PREFIX, _PARTIAL = "checkpoint-", ".partial"


def snapshot(module: nn.Module) -> Weights:
    """A copy of the weights in main memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}


def _random_state() -> Weights:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`."""
    found = [path for path in folder.glob(_PREFIX + "*") if path.is_dir() and path.suffix != _PARTIAL]
    return max(found, default=None, key=lambda path: path.name)


def identity(path: Path) -> dict[str, Any]:
    """What the run was that a checkpoint belongs to."""
    return dict(_state(path)["identity"])


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is damaged; delete it to start again from an older one or from the beginning"
        ) from error
    return dict(state)


def check_identity(path: Path, ours: Mapping[str, Any]) -> None:
    """`InputError` naming the first thing in which a checkpoint's run differs from the one that is asked for."""
    theirs = identity(path)
    plain = json.loads(json.dumps(ours))  # tuples become lists, as in the file
    for name in sorted(plain.keys() | theirs.keys()):
        if plain.get(name) != theirs.get(name):
            raise InputError(
                f"{path.parent} holds a run with another {name}: {theirs.get(name)!r} there, {plain.get(name)!r} now. "
                "Repeat its options to go on with it, choose another --out, or start over with --restart"
            )


class Store:
    """Writes and reads the checkpoints of one run; with several processes, all of them call it."""

    def __init__(self, folder: Path, accelerator: Any):
        self.folder, self.accelerator = folder, accelerator

    def write(
        self, step: int, state: Mapping[str, Any], module: nn.Module, optimizers: list[Any], best: Weights | None
    ) -> None:
        """`state`: JSON. Everything that another process needs to go on bit for bit."""
        rank, is_first = self.accelerator.process_index, self.accelerator.is_main_process
        final = self.folder / f"{_PREFIX}{step:08d}"
        aside = final.with_suffix(_PARTIAL)
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        save_file(_random_state(), aside / f"chance-{rank}.safetensors")
        if is_first:
            save_file(snapshot(module), aside / "module.safetensors")
            if best is not None:
                save_file(best, aside / "best.safetensors")
            for i, optimizer in enumerate(optimizers):
                save_file(_flat(optimizer), aside / f"optimizer-{i}.safetensors")
            (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if is_first:
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in self.folder.glob(_PREFIX + "*"):
                if old != final:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def read(self, path: Path, module: nn.Module, optimizers: list[Any]) -> tuple[dict[str, Any], Weights | None]:
        """Put a checkpoint's values in place; its state, and the best weights so far."""
        state = _state(path)
        try:
            module.load_state_dict(load_file(path / "module.safetensors"))
            for i, optimizer in enumerate(optimizers):
                _unflatten(optimizer, load_file(path / f"optimizer-{i}.safetensors"))
            best = load_file(path / "best.safetensors") if (path / "best.safetensors").exists() else None
            chance = load_file(path / f"chance-{self.accelerator.process_index}.safetensors")
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} cannot be continued: {str(error).splitlines()[0]}; use --restart") from error
        torch.set_rng_state(chance["cpu"])
        if "cuda" in chance and torch.cuda.is_available():
            torch.cuda.set_rng_state(chance["cuda"])
        return state, best

    def clear(self) -> None:
        """Forget all checkpoints."""
        if self.accelerator.is_main_process:
            for old in self.folder.glob(_PREFIX + "*"):
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _flat(optimizer: Any) -> Weights:
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, values in state.items()
        for name, value in values.items()
    }


def _unflatten(optimizer: Any, flat: Weights) -> None:
    state: dict[int, Weights] = {}
    for key, value in flat.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
