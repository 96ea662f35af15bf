"""Sweeps over a tiny pair, in processes that tests start and kill."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import noisy, tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

from specdec.sweep.axes import combine
from specdec.sweep.engine import Engine, Run, sweep
from specdec.sweep.setting import Setting
from specdec.sweep.store import Store

PROMPTS = ("def f(x):", "import os", "x = 1; x = 1; x", "a b c a b c a")
FAST = Run(timed=False)
_HEAVY = (
    "specdec.sweep.engine",
    "specdec.drafters",
    "specdec.verifiers",
    "specdec.planner.memory",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.integrations.accelerate",
)


def save_pair(folder: Path) -> Path:
    """A target, a draft that often agrees with it, and a file of prompts."""
    target = tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB)
    for name, model in (("target", target), ("draft", noisy(target, 0.02))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def grid(folder: Path, axes: Mapping[str, Any] | None = None, **base: Any) -> list[Setting]:
    """Settings on that pair; the stock backend, which needs no compiling."""
    given = {"drafter": [str(folder / "draft")], **(axes or {})}
    usual = {"target": str(folder / "target"), "prompt_set": str(folder / "prompts.txt"), "backend": "eager"}
    return combine(given, {**usual, "max_new_tokens": 12, "limit": 3, "threads": 1, **base})


def cells_of(engine: Engine, settings: list[Setting]) -> dict[str, Setting]:
    return {engine.key(setting): setting for setting in settings}


def work(store: str, contents: list[dict[str, Any]], log: str) -> None:
    """Sweep in this process; a line in `log` for each cell that it ran."""
    torch.set_num_threads(1)
    engine = Engine(FAST)
    with Store(store) as opened, Path(log).open("a", encoding="utf-8") as lines:

        def note(cell: Mapping[str, Any]) -> None:
            lines.write(cell["key"] + "\n")
            lines.flush()

        sweep(opened, cells_of(engine, [Setting.of(content) for content in contents]), engine, finished=note)


def processes() -> Any:
    """Makes processes that have imported everything already, so that they start in no time."""
    context = multiprocessing.get_context("forkserver")
    # By names that are on everybody's path: not every Python tells the server where the tests lie.
    context.set_forkserver_preload(list(_HEAVY))
    return context


def acceptance(document: Mapping[str, Any]) -> dict[str, Any]:
    """All that must not depend on when and by whom a cell was run, by key."""
    names = ("num_tokens", "num_rounds", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length")
    names += ("draft_acceptance_rate", "acceptance_histogram", "joint_acceptance", "conditional_acceptance")
    return {
        cell["key"]: {
            "setting": cell["setting"],
            "identical": cell["identical"],
            "rounds": [row["rounds"] for row in cell["rows"]],
            **{name: cell["stats"][name] for name in names},
        }
        for cell in document["cells"]
    }
