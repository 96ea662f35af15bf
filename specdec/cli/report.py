"""`specdec report`: tables, plots, a page or files for other programs, from a sweep's store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from specdec.cli import screen
from specdec.cli.diff import add_filters
from specdec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

# What a terminal shows unless told otherwise; the rest fills screens.
_USUAL = ("speed", "tokens", "acceptance")
_KINDS = ("speed", "tokens", "acceptance", "text", "pareto", "heatmap", "all")
_EXAMPLES = """\
examples:
  specdec report sweep.db                                     the table, speed against k, acceptance by position
  specdec report sweep.db --kind all --only "temperature == 0"
  specdec report sweep.db --html report.html                  one page that works offline
  specdec report sweep.db --plot sweep.svg                    an overview; --kind chooses other plots
  specdec report sweep.db --kind heatmap,text --plot heat.png --theme dark
  specdec report sweep.db --json reference.json               a document: for specdec diff, or another report
  specdec report sweep.db --requests requests.jsonl           a record per text, in vLLM's field names

Stores of `specdec sweep` and their JSON exports are read alike. Files are written instead of the screen being filled;
--show does both.
"""


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in _KINDS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(_KINDS)}")
    return names


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="a page, plots or tables of a sweep's store",
        description="Rebuild any report of a sweep from its store, without running a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("store", metavar="STORE", help="a store of specdec sweep, or its JSON export")
    parser.add_argument(
        "--kind",
        type=_kinds,
        metavar="KINDS",
        help=f"plots: {', '.join(_KINDS)} (default: speed or tokens, acceptance)",
    )
    add_filters(parser)
    group = parser.add_argument_group("files")
    group.add_argument("--html", metavar="FILE", help="a page that opens in any browser")
    group.add_argument("--plot", metavar="FILE", help="a picture, .svg or .png (pip install 'specdec[plots]')")
    group.add_argument("--theme", choices=("auto", "light", "dark"), default="auto", help="of --plot (default: auto)")
    group.add_argument("--json", metavar="FILE", help="the document of these cells")
    group.add_argument("--csv", metavar="FILE", help="a row per cell")
    group.add_argument("--parquet", metavar="FILE", help="the same, with types")
    group.add_argument("--requests", metavar="FILE", help="JSONL: a record per text, in vLLM's field names")
    group.add_argument("--show", action="store_true", help="fill the screen although files are written")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from specdec.report.documents import load
    from specdec.sweep import export

    paths = {name: getattr(arguments, name) for name in ("html", "plot", "json", "csv", "parquet", "requests")}
    export.check_exports(**paths)
    if arguments.plot is not None:
        from specdec.report import plots

        plots.check(arguments.plot)
    document = load(arguments.store, arguments.only, arguments.skip)
    written = _write(arguments, document)
    out, _ = screen.consoles()
    if not written or arguments.show:
        _show(out, document, arguments.kind)
    for path, what in written:
        out.print(f"written: {path} [dim]({what})[/]", soft_wrap=True)
    return 0


def _chosen(kinds: Sequence[str] | None) -> Sequence[str]:
    """None of them by name: everything that the cells allow."""
    return () if not kinds or "all" in kinds else kinds


def _write(arguments: argparse.Namespace, document: dict[str, Any]) -> list[tuple[str, str]]:
    from specdec.sweep import export

    cells = len(document["cells"])
    what = f"{cells} cell{'s' if cells > 1 else ''}"
    written = []
    for kind, write in (("json", export.write_json), ("csv", export.write_csv), ("parquet", export.write_parquet)):
        if (path := getattr(arguments, kind)) is not None:
            write(document, path)
            written.append((path, what))
    if arguments.requests is not None:
        from specdec.report import requests

        number = requests.write(requests.of_document(document), arguments.requests)
        written.append((arguments.requests, f"{number} records"))
    if arguments.html is not None:
        from specdec.report import html

        html.write(document, arguments.html)
        written.append((arguments.html, what))
    if arguments.plot is not None:
        from specdec.report import plots
        from specdec.report.series import KINDS

        kinds = tuple(k for k in KINDS if plots.allows(document, k)) if "all" in (arguments.kind or ()) else ()
        plots.save(document, arguments.plot, kinds or _chosen(arguments.kind), arguments.theme)
        written.append((arguments.plot, what))
    return written


def _show(console: Console, document: Mapping[str, Any], kinds: Sequence[str] | None) -> None:
    from specdec.bench import specbench_table
    from specdec.cli import sweep_screen
    from specdec.report import terminal
    from specdec.report.series import plots
    from specdec.report.view import View
    from specdec.sweep.engine import Run

    timed = [cell for cell in document["cells"] if cell["status"] == "done" and cell.get("speedup")]
    untimed = [cell for cell in document["cells"] if cell["status"] == "done" and not cell.get("speedup")]
    failed = [cell for cell in document["cells"] if cell["status"] != "done"]
    for cells, is_timed in ((timed, True), (untimed, False)):
        if cells:
            sweep_screen.show(console, {**document, "cells": cells}, Run(timed=is_timed), 0)
    if failed:
        sweep_screen.show(console, {**document, "cells": failed}, Run(timed=False), 0)
    if not timed and not untimed:
        raise InputError("no cell was finished, so there is nothing to report; --json and --csv have the errors")
    specbench_table.show(console, sweep_screen.relabelled({**document, "cells": timed + untimed}))
    view = View(document)
    if kinds is None:
        found = [plot for plot in plots(view) if getattr(plot, "kind", "heatmap") in _USUAL]
        # Tokens per round tell what was gained where no time was measured.
        if any(getattr(plot, "kind", "") == "speed" for plot in found):
            found = [plot for plot in found if getattr(plot, "kind", "") != "tokens"]
    else:
        found = plots(view, _chosen(kinds))
    terminal.show(console, found)
