"""`specdec certify`: is a verifier exact? Every random choice on toy models, enumerated."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specdec import registry
from specdec.errors import InputError
from specdec.oracle import Cell, Result, applicable, certify, compare_trees
from specdec.verifier import Verifier

DEFAULT_PAIRS = 4
# A progress bar for less than this is only flicker.
QUIET_SECONDS = 2.0

EXAMPLES = """\
examples:
  specdec certify                              every installed verifier, in less than a minute
  specdec certify --verifier block             one of them
  specdec certify --verifier my_rule --pairs 20
                                               a plugin's, registered under the entry-point group
                                               specdec.verifiers, on twenty pairs of toy models
  specdec certify --json certificate.json      the same as data; the exit status is 1 if anything failed

A verifier passes when the text it emits has exactly the target's distribution (total variation at most 1e-12, in
float64) for every way of drafting that it says it takes. Lossy ones are measured. Nothing is sampled: a result is the
same on every machine.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add `certify` to the command line's subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "certify",
        help="prove by enumeration that verifiers are exact",
        description="Enumerate every random choice of verifier and drafting law on toy models, and compare the law of "
        "the emitted text with the target's own.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--verifier", action="append", metavar="NAME", help="certify this one; may be repeated (default: all)"
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=DEFAULT_PAIRS,
        metavar="N",
        help=f"random pairs of toy models for each line (default: {DEFAULT_PAIRS})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file too")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """0 when every line passed, 1 otherwise. Raises `InputError` for unknown names and for `--pairs` below 1."""
    if args.pairs < 1:
        raise InputError(f"--pairs must be at least 1, not {args.pairs}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}")
    names = args.verifier or list(registry.available("verifier"))
    verifiers = {name: registry.create("verifier", name) for name in dict.fromkeys(names)}
    console = Console()
    results = _certify_all(verifiers, args.pairs, console)
    passed = all(result.passed for result in results)
    console.print(_table(results))
    console.print(_summary(results, args.pairs))
    trees = compare_trees(verifiers, args.pairs) if args.verifier is None else {}
    if trees:
        console.print(_tree_table(trees))
    if args.json is not None:
        content: dict[str, Any] = {"results": [result.to_json() for result in results], "passed": passed}
        content["trees"] = {shape: {name: asdict(cell) for name, cell in row.items()} for shape, row in trees.items()}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else 1


def _certify_all(verifiers: dict[str, Verifier], pairs: int, console: Console) -> list[Result]:
    work = [(name, verifier, law) for name, verifier in verifiers.items() for law in applicable(verifier)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    results, start = [], time.monotonic()
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = progress.add_task("", total=len(work))
    try:
        for name, verifier, law in work:
            if not progress.live.is_started and time.monotonic() - start > QUIET_SECONDS:
                progress.start()
            progress.update(task, description=f"{name}: {law.name}")
            results.append(certify(verifier, law, pairs))
            progress.advance(task)
    finally:
        progress.stop()
    return results


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("verifier", "drafting law"):
        table.add_column(heading, no_wrap=True)
    for heading in ("TV, max", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    previous = None
    for result in results:
        if previous not in (None, result.verifier):
            table.add_section()
        table.add_row(
            result.verifier if result.verifier != previous else "",
            result.law,
            "-" if result.tv_max is None else f"{result.tv_max:.1e}",
            "-" if result.expected_tokens is None else f"{result.expected_tokens:.3f}{'†' * result.shares_noise}",
            _verdict(result),
        )
        previous = result.verifier
    return table


def _tree_table(trees: dict[str, dict[str, Cell]]) -> Table:
    """Rules side by side on the same shapes and pairs."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="the same drafts' shapes under each rule: tokens per round (coupled: sampled, ± standard error)",
        title_justify="left",
    )
    table.add_column("shape", no_wrap=True)
    for name in next(iter(trees.values())):
        table.add_column(name, justify="right", no_wrap=True)
    for shape, row in trees.items():
        cells = (f"{c.tokens:.3f}" + (f" ±{c.error:.3f}" if c.error else "") for c in row.values())
        table.add_row(shape, *cells)
    return table


def _verdict(result: Result) -> Text:
    if not result.passed:
        return Text(f"FAILED: {result.error}", style="bold red")
    if not result.lossless:
        return Text("lossy", style="yellow")
    return Text("exact + seed" if result.keeps_seed else "exact", style="green")


def _summary(results: list[Result], pairs: int) -> str:
    failed = sum(not result.passed for result in results)
    lossy = sum(result.passed and not result.lossless for result in results)
    lines = [
        f"{len(results)} lines on {pairs} or more pairs each: {len(results) - failed - lossy} exact, {failed} failed"
    ]
    if lossy:
        lines[0] += f", {lossy} lossy"
    lines.append("TV: total variation from plain sampling. tokens: emitted per round, on average")
    if any(result.shares_noise for result in results):
        lines.append("† under the enumeration's own shared noise; with the real noise it is another number")
    return "\n".join(lines)
