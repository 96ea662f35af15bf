"""Several processes at work on one store."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from typing import Any

from specdec.errors import InputError
from specdec.sweep.engine import Engine, Run, sweep
from specdec.sweep.setting import Setting
from specdec.sweep.store import Store

_POLL = 0.5


def work(
    path: str, cells: Mapping[str, Mapping[str, Any]], run: Run, retry_failed: bool, began: float | None = None
) -> None:
    """One process: cells of the store until none is left, or until the process that started this one is gone."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {key: Setting.of(content) for key, content in cells.items()}
    with Store(path) as store:
        sweep(store, settings, Engine(run), retry_failed=retry_failed, began=began, going=_is_wanted)


def _is_wanted() -> bool:
    """Whether the process that started this one is still there."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def run_jobs(
    store: Store,
    cells: Mapping[str, Setting],
    run: Run,
    num_jobs: int,
    *,
    retry_failed: bool = False,
    began: float | None = None,
    watching: Callable[[], None] = lambda: None,
) -> None:
    """Work on `cells` in `num_jobs` processes until they find none to claim; `watching` is called now and then.

    `began`: as for `sweep`; a cell that one of them tried again and that failed again is not tried by the others.
    What a process leaves unfinished because it dies is taken over by those that are still at work, or by the next one.
    Raises `InputError` for a store in memory, which processes cannot share.
    """
    if store.path is None:
        raise InputError("several processes need a store in a file")
    store.want((key, setting.as_dict()) for key, setting in cells.items())
    contents = {key: setting.as_dict() for key, setting in cells.items()}
    run = replace(run, alone=num_jobs == 1)
    # Not forked from this one: threads of torch do not survive that.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if isinstance(context, ForkServerContext):
        context.set_forkserver_preload(["specdec.sweep.engine"])  # imported once for all
    arguments = (str(store.path), contents, run, retry_failed, time.time() if began is None else began)
    processes = [context.Process(target=work, args=arguments, daemon=True) for _ in range(num_jobs)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL)
            watching()
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()
