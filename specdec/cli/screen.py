"""What all commands need to talk to people: consoles, quiet libraries, JSON files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import BackendWarning, DrafterWarning, InputError, PolicyWarning

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def consoles() -> tuple[Console, Console]:
    """For results (stdout) and for everything else (stderr)."""
    from rich.console import Console

    # Where output is piped there is no window: a fixed width keeps logs alike.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(highlight=False, width=width), Console(stderr=True, highlight=False, soft_wrap=True)


def quiet(arguments: argparse.Namespace) -> None:
    """Silence the libraries' bars and chatter; our own warnings become one line. `--debug` leaves all as it is."""
    if arguments.debug:
        return
    for chatty in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, and of each other's types
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for ours in (BackendWarning, DrafterWarning, PolicyWarning):
        warnings.simplefilter("always", ours)

    def show(message: Warning | str, *_: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]


def warm_up(decoder: Any, console: Console) -> None:
    """Compile the steps, with a moving line that says so: a minute or so, the first time on a machine."""
    with console.status("preparing the steps (compiled once per model and machine, then kept)"):
        decoder.warmup()


def use_threads(number: int | None) -> None:
    """What `--threads` says; None leaves torch's choice. `InputError` for fewer than one."""
    if number is None:
        return
    if number < 1:
        raise InputError(f"--threads is a whole number >= 1, not {number}")
    import torch

    torch.set_num_threads(number)


def check_writable(path: str | None, option: str = "--json") -> None:
    """Fail before the work, not after it."""
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise InputError(f"{option} {path}: is a folder")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path}: cannot write into {folder}")


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("specdec", "torch", "transformers")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """`cpu`, or the accelerator with its product name."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def count(number: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes for people."""
    for unit, step in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= step:
            return f"{number / step:.3g} {unit}"
    return f"{number:.0f} B"


def model_name(path: str) -> str:
    """The last part of a folder, or a hub id as it stands."""
    return Path(path).resolve().name if Path(path).is_dir() else path
