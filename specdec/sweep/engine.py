"""Runs the cells of a sweep, one after the other, each against plain decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from specdec.bench.acceptance import accept
from specdec.bench.compare import compare
from specdec.bench.divergence import BUG
from specdec.bench.prompts import Prompt
from specdec.bench.timing import Gate
from specdec.errors import InputError
from specdec.sweep import identity
from specdec.sweep.cell import COMPUTED, FORKED, done_cell, failed_cell
from specdec.sweep.pool import Pool, prompt_contents, text_options
from specdec.sweep.setting import Setting, digest
from specdec.sweep.store import Store

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.bench.comparison import Comparison
    from specdec.bench.prompt_sets import Encoded
    from specdec.chat import Chat

# Warm-up texts; none of them is measured.
_WARM_UP = (
    "Once the table was laid, everyone sat down and began to talk about the weather, the news and the price of bread.",
    "for name in names:\n    print(name)\n    count = count + 1\n",
)
# Seconds between signs of life for processes on other machines, and between two texts only.
_BEAT = 30.0

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Run:
    """How cells are measured. `timed`: with times, else acceptance alone; `fork`: prompts are prefilled once and forked
    for every timed call, else each call computes its own; `story`: one prompt of every cell is told token by token.
    `alone`: no other process of this sweep works meanwhile, so that disturbed timings are worth repeating.
    """

    repetitions: int = 3
    warmup: int = 1
    timed: bool = True
    fork: bool = True
    story: bool = False
    allow_lossy: bool = False
    alone: bool = True
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if self.repetitions < 1 or self.warmup < 0:
            raise InputError(f"repetitions must be >= 1 and warmup >= 0, not {self.repetitions} and {self.warmup}")

    def as_dict(self) -> dict[str, Any]:
        """What a figure depends on."""
        chat = None if self.chat is None else [self.chat.template, dict(self.chat.options)]
        timing = [self.repetitions, self.fork] if self.timed else None
        return {"timing": timing, "story": self.story, "chat": chat}


@dataclass
class Engine:
    """Cells of settings. `warm` is called with every decoder that is new, before it is timed."""

    run: Run = field(default_factory=Run)
    warm: Callable[[SpeculativeDecoder], None] | None = None

    def __post_init__(self) -> None:
        warm = self.warm if self.run.timed else None
        self.pool = Pool(allow_lossy=self.run.allow_lossy, chat=self.run.chat, warm=warm)

    def key(self, setting: Setting) -> str:
        """Of the setting, its models, its prompts, and how it is measured. Raises `InputError` for a missing set."""
        prompts = digest(prompt_contents(setting))
        return setting.keyed([identity.models(setting), prompts, self.run.as_dict()])

    def environment(self, setting: Setting) -> Mapping[str, Any]:
        """Where the setting's cell is run."""
        device = setting.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return identity.environment(device, self.pool.num_threads(setting))

    def cell(self, setting: Setting, key: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
        """Run one cell. What goes wrong is in the cell, which has then failed; only interruptions are raised."""
        key, started = key or self.key(setting), time.perf_counter()
        try:
            return self._measured(setting, key, progress, started)
        except Exception as error:
            failed = failed_cell(setting, key, error, time.perf_counter() - started)
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                error.__traceback__ = None  # frames would keep what did not fit
                self.pool.clear()
            return failed

    def _measured(self, setting: Setting, key: str, progress: Progress | None, started: float) -> dict[str, Any]:
        decoder = self.pool.decoder(setting)
        prompts = self.pool.prompts(setting, decoder)
        comparison = self._compared(setting, decoder, prompts, progress)
        story = self._story(setting, decoder, prompts[0]) if self.run.story else None
        told = done_cell(
            setting,
            key,
            comparison,
            memory=_memory(decoder, setting, prompts),
            timing={
                "measured": self.run.timed,
                "prefill": FORKED if self.run.fork or not self.run.timed else COMPUTED,
                "alone": self.run.alone,
            },
            quality=self.pool.quality(setting, decoder),
            story=story,
            seconds=time.perf_counter() - started,
        )
        return {**told, "details": _details(decoder)}

    def _compared(
        self, setting: Setting, decoder: SpeculativeDecoder, prompts: Sequence[Encoded], progress: Progress | None
    ) -> Comparison:
        options = text_options(setting)
        if not self.run.timed:
            return accept(
                decoder,
                prompts,
                options,
                batch=setting.batch,
                forks=self.pool.forks(setting),
                plain=self.pool.plain(setting),
                progress=progress,
            )
        return compare(
            decoder,
            prompts,
            options,
            repetitions=self.run.repetitions,
            warmup=self.run.warmup,
            warmup_prompts=[Prompt(f"warm-up {i}", _WARM_UP[i % len(_WARM_UP)]) for i in range(setting.batch)],
            batch=setting.batch,
            forks=self.pool.forks(setting) if self.run.fork else None,
            gate=None if self.run.alone else Gate(decoder.backend.capabilities.device, retries=0),
            progress=progress,
        )

    def _story(self, setting: Setting, decoder: SpeculativeDecoder, prompt: Encoded) -> list[dict[str, Any]]:
        from specdec.report.story import tell

        tokens = tell(decoder, list(prompt.ids), **text_options(setting))
        return [{"prompt": decoder.tokenizer.decode(list(prompt.ids), skip_special_tokens=True), "tokens": tokens}]


def _memory(decoder: SpeculativeDecoder, setting: Setting, prompts: Sequence[Encoded]) -> dict[str, int]:
    """Bytes of weights, and of keys and values of the longest texts that decode together."""
    from specdec.planner.memory import memory_needed

    lengths = sorted((len(prompt.ids) + setting.max_new_tokens for prompt in prompts), reverse=True)
    needed = [memory_needed(decoder, length, 1) for length in lengths[: setting.batch]]
    return {
        "target_weights": needed[0].target_weights,
        "draft_weights": needed[0].draft_weights,
        "kv": sum(one.target_kv + one.draft_kv for one in needed),
    }


def _details(decoder: SpeculativeDecoder) -> dict[str, Any]:
    """What ran, for the reader of a report."""
    from specdec.dtypes import dtype_name
    from specdec.quant.linear import num_parameters, stored_as

    draft = getattr(decoder.drafter, "model", None)
    return {
        "parameters": {
            "target": num_parameters(decoder.target),
            "draft": num_parameters(draft) if draft is not None else None,
        },
        "stored_as": {
            "target": stored_as(decoder.target),
            "draft": stored_as(draft) if draft is not None else None,
        },
        "dtype": dtype_name(decoder.backend.capabilities.dtype),
        "backend": decoder.backend.describes,
        "numerics": decoder.backend.numerics,
        "policy": decoder.policy.name,
    }


def has_bug(cell: Mapping[str, Any]) -> bool:
    """Whether a text of the cell differs from plain decoding by more than rounding explains."""
    return any(found["verdict"] == BUG for found in cell.get("divergences", ()))


#: Called with a finished cell, and whether it was this process's that counts.
Finished = Callable[[Mapping[str, Any]], None]


def sweep(
    store: Store,
    cells: Mapping[str, Setting],
    engine: Engine,
    *,
    retry_failed: bool = False,
    began: float | None = None,
    starting: Callable[[Setting], Progress | None] | None = None,
    finished: Finished | None = None,
    going: Callable[[], bool] = lambda: True,
) -> int:
    """Run what is not finished of `cells` (settings by key), one by one; how many this process ran.

    Every cell is claimed before it is run and appended when it is done, so that any number of processes may work on
    one store, and be killed at any time. Returns when nothing is left to claim, or when `going` says no: cells that
    others are running may then still be under way. `retry_failed`: cells that failed before `began` (when this sweep
    did, in seconds since 1970; now) are run again, once.
    """
    began = time.time() if began is None else began
    store.want((key, setting.as_dict()) for key, setting in cells.items())
    num_run = 0
    tried: set[str] = set()  # a failed cell is tried again once
    while going():
        key = store.claim((key for key in cells if key not in tried), retry_failed, began)
        if key is None:
            break
        tried.add(key)
        setting = cells[key]
        try:
            shown = starting(setting) if starting is not None else None
            made = engine.cell(setting, key, _beating(store, shown))
        except BaseException:
            store.release(key)
            raise
        store.add(made, engine.environment(setting))
        num_run += 1
        if finished is not None:
            finished(made)
    return num_run


def _beating(store: Store, progress: Progress | None) -> Progress:
    """`progress`, with a sign of life for other machines now and then, between two texts."""
    last = time.monotonic()

    def tick(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT:
            store.beat()
            last = time.monotonic()
        if progress is not None:
            progress(done, total, what)

    return tick
