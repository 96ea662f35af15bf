"""What `specdec sweep` shows in the end, and beforehand with --dry-run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from specdec.bench.divergence import BUG
from specdec.sweep.cell import FORKED
from specdec.sweep.setting import BUILT_IN, DEFAULT_VERIFIER, EMBEDDED, Setting, labels

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.sweep.engine import Engine, Run
    from specdec.sweep.store import Store

# Below this share of undisturbed slices, the table says so.
_CLEAN = 0.9
_CELL_OVERHEAD = 3.0


def for_people(value: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def merit(cell: Mapping[str, Any]) -> float:
    """What the best cell has the most of: speed-up, or tokens per round where no time was measured."""
    if cell.get("speedup"):
        return float(cell["speedup"]["median"])
    return float(cell["stats"]["mean_acceptance_length"])


# ------------------------------------------------------------------ tables

_Column = tuple[str, bool, Any]  # heading, whether it is shown even when all cells are alike, value


def _identity(cell: Mapping[str, Any]) -> str:
    same = f"{cell['identical']}/{cell['prompts']}"
    if not cell["expects_identity"]:
        return f"[dim]{same}[/]"
    if any(found["verdict"] == BUG for found in cell["divergences"]):
        return f"[bold red]✗ {same}[/]"
    return f"[green]✓[/] {same}" if cell["identical"] == cell["prompts"] else f"[yellow]{same}[/]"


def _speed(cell: Mapping[str, Any]) -> tuple[str, str]:
    speedup = cell["speedup"]
    value = speedup["median"]
    text = f"{value:.2f}×"
    style = "green" if value >= 1.005 else "red" if value < 0.995 else ""
    return f"[{style}]{text}[/]" if style else text, f"[dim]{speedup['low']:.2f} – {speedup['high']:.2f}[/]"


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


_SETTING: tuple[_Column, ...] = (
    ("target", False, lambda s: _short(s.target)),
    ("drafter", True, lambda s: s.source),
    ("k, tree", True, lambda s: s.shape),
    ("verifier", False, lambda s: s.verifier),
    ("T", False, lambda s: f"{s.temperature:g}"),
    ("weights", False, lambda s: s.weights or "as stored"),
    ("kv", False, lambda s: s.kv_cache or "–"),
    ("dtype", False, lambda s: s.dtype or "–"),
    ("batch", False, lambda s: str(s.batch)),
    ("prompts", False, lambda s: _short(s.prompt_set)),
    ("tokens", False, lambda s: str(s.max_new_tokens)),
    ("seed", False, lambda s: str(s.seed)),
)
_LEFT = ("target", "drafter", "k, tree", "verifier", "weights", "kv", "dtype", "prompts")


def columns_of(settings: Sequence[Setting]) -> list[_Column]:
    """What is worth a column: the method, and whatever varies."""
    return [c for c in _SETTING if c[1] or len({c[2](setting) for setting in settings}) > 1]


def _table(columns: Sequence[_Column], heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, _, _ in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True, max_width=30)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def cell_table(cells: Sequence[Mapping[str, Any]], timed: bool, columns: Sequence[_Column] | None = None) -> Table:
    """Finished cells, a row each; the best one in bold."""
    settings = [Setting.of(cell["setting"]) for cell in cells]
    columns = columns_of(settings) if columns is None else columns
    speeds = ["speed-up", "95 %"] if timed else []
    table = _table(columns, ["per round", "accepted", *speeds, "same"])
    best = max(cells, key=merit, default=None)
    for cell, setting in zip(cells, settings, strict=True):
        stats = cell["stats"]
        accepted = f"{stats['draft_acceptance_rate']:.1%}" if stats["num_draft_tokens"] else "–"
        figures = [f"{stats['mean_acceptance_length']:.2f}", accepted, *(_speed(cell) if timed else ())]
        mark = "[yellow]![/]" if stats.get("drafter_error") else ""
        table.add_row(
            *(escape(value(setting)) for _, _, value in columns),
            *figures,
            _identity(cell) + mark,
            style="bold" if cell is best and len(cells) > 1 else "",
        )
    return table


def _fixed(settings: Sequence[Setting], columns: Sequence[_Column]) -> str:
    """What all cells have in common, where it is not the default."""
    shown = {name for name, _, _ in columns}
    one = settings[0]
    parts = [f"target {_short(one.target)}"] if "target" not in shown and one.target != EMBEDDED else []
    if "verifier" not in shown and one.verifier != DEFAULT_VERIFIER:
        parts.append(f"verifier {one.verifier}")
    if "T" not in shown:
        parts.append(f"temperature {one.temperature:g}" if one.temperature else "greedy")
    parts += [f"weights {one.weights}"] if "weights" not in shown and one.weights else []
    parts += [f"keys and values in {one.kv_cache}"] if "kv" not in shown and one.kv_cache else []
    parts += [f"batches of {one.batch}"] if "batch" not in shown and one.batch > 1 else []
    parts += [f"prompts {_short(one.prompt_set)}"] if "prompts" not in shown and one.prompt_set != BUILT_IN else []
    parts += [f"up to {one.max_new_tokens} new tokens"] if "tokens" not in shown else []
    return ", ".join(parts)


def show(console: Console, document: Mapping[str, Any], run: Run, left: int) -> None:
    """The table at the end, failures, and what the figures mean."""
    cells = relabelled(document)["cells"]
    done = [cell for cell in cells if cell["status"] == "done"]
    failed = [cell for cell in cells if cell["status"] == "failed"]
    if done:
        settings = [Setting.of(cell["setting"]) for cell in done]
        columns = columns_of(settings)
        where = document["environment"]
        threads = where.get("threads", 1)
        console.print(f"\n[bold]{len(done)} cells[/] [dim]{escape(_fixed(settings, columns))}[/]")
        console.print(
            f"[dim]{escape(str(where.get('device', '')))}, {threads} thread{'s' if threads > 1 else ''}, "
            f"specdec {where.get('versions', {}).get('specdec', '?')}, "
            f"torch {where.get('versions', {}).get('torch', '?')}[/]\n"
        )
        console.print(cell_table(done, run.timed, columns))
        for line in _remarks(done, run):
            console.print(line)
    if failed:
        console.print(f"\n[bold red]{len(failed)} failed[/]")
        for message, names in _by_message(failed).items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            console.print(f"  {escape(', '.join(names[:3]))}{more}: [dim]{escape(message)}[/]", soft_wrap=True)
    if left:
        console.print(f"\n{left} cells are not finished: other processes are at work on them, or were stopped")


def relabelled(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with labels that leave out what all of its cells have in common."""
    cells = document["cells"]
    found = labels([Setting.of(cell["setting"]) for cell in cells])
    return {**document, "cells": [{**cell, "label": name} for cell, name in zip(cells, found, strict=True)]}


def _by_message(failed: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for cell in failed:
        found.setdefault(f"{cell['error']['type']}: {cell['error']['message']}", []).append(cell["label"])
    return found


def _remarks(done: Sequence[Mapping[str, Any]], run: Run) -> Iterator[str]:
    yield ""
    for cell in done:
        for found in cell["divergences"]:
            style = "bold red" if found["verdict"] == BUG else "yellow"
            yield (
                f"[{style}]{found['verdict']}[/] {escape(cell['label'])}, {escape(str(found['id']))}: new token "
                f"{found['index']}; [dim]{escape(found['reason'])}[/]"
            )
        if cell["stats"].get("drafter_error"):
            yield f"[yellow]![/] {escape(cell['label'])}: [dim]{escape(cell['stats']['drafter_error'])}[/]"
    if not all(cell["expects_identity"] for cell in done):
        yield "[dim]same, in grey: the rule keeps the law, not the seed; other tokens are expected[/]"
    if not run.timed:
        yield "[dim]acceptance alone: every text once, no times[/]"
        return
    forked = all(cell.get("timing", {}).get("prefill") == FORKED for cell in done)
    what = "decoding behind prompts that were prefilled once and forked" if forked else "whole calls, prefill included"
    yield (
        f"[dim]timed: {what}, plain and speculative alike and in turns; warm-up on other texts;\n"
        "medians with bootstrap 95 % intervals over prompts[/]"
    )
    slices, clean = (sum(cell[name] for cell in done) for name in ("slices", "clean_slices"))
    if clean < _CLEAN * slices:
        yield f"[yellow]{slices - clean} of {slices} timings were disturbed by other processes[/]"


def show_plan(console: Console, engine: Engine, cells: Mapping[str, Setting], store: Store) -> None:
    """What would be run, and about how long it would take."""
    settings = list(cells.values())
    columns = columns_of(settings)
    table = _table(columns, ["state"])
    state = {key: store.cell(key) for key in cells}
    for key, setting in cells.items():
        found = state[key]
        table.add_row(*(escape(value(setting)) for _, _, value in columns), found["status"] if found else "to run")
    console.print(table)
    todo = [setting for key, setting in cells.items() if state[key] is None]
    counts = store.counts(cells)
    console.print(f"\n{counts.total} cells: {counts.done} done, {counts.failed} failed, {len(todo)} to run")
    if todo:
        known = [found["cell_seconds"] for found in state.values() if found and found["status"] == "done"]
        total = len(todo) * sum(known) / len(known) if known else estimate(engine, todo)
        how = "by the cells that are done" if known else "at the speed of plain decoding, measured on one short text"
        console.print(f"about {for_people(total)} ({how})")


def estimate(engine: Engine, settings: Sequence[Setting]) -> float:
    """Seconds, if drafting gained nothing: tokens at the plain step of the first setting's target, and overhead."""
    from specdec.sweep.pool import prompt_set

    first = engine.pool.decoder(settings[0])
    ids = list(engine.pool.prompts(settings[0], first)[0].ids)
    first.generate_plain(ids, max_new_tokens=2)
    made = first.generate_plain(ids, max_new_tokens=16)
    step = 1 / made.stats.tokens_per_second
    times = 2 * engine.run.repetitions if engine.run.timed else 1
    tokens = sum(len(prompt_set(s).prompts) * s.max_new_tokens * times for s in settings)
    return tokens * step + (_CELL_OVERHEAD * len(settings) if engine.run.timed else 0)
