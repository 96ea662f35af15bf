"""`specdec diff`: do two sweeps differ by more than noise? And a gate against a stored reference."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from specdec.cli import screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.report.pairs import Document

_EXAMPLES = """\
examples:
  specdec diff before.db after.db
  specdec diff before.db after.db --only "drafter == 'model' and k <= 4" --all
  specdec diff eager.db compiled.db --ignore backend      cells are paired by all other fields
  specdec diff now.db --gate reference.json               exit code 1 when acceptance or identity fell

Stores of `specdec sweep` and their JSON exports are read alike. Without --gate, exit code 1 when an identity is lost,
a BUG is new, or a cell that worked fails; differences of acceptance and speed are only told. With --gate: 0 every cell
passed, 1 something fell, 2 not enough data to tell (or wrong input).
"""


def add_filters(parser: Any) -> None:
    """`--only` and `--skip`, as of `specdec sweep`."""
    what = "cells of which this is true, like \"k <= 4 and drafter == 'model'\"; repeatable"
    parser.add_argument("--only", action="append", default=[], metavar="EXPRESSION", help=f"keep {what}")
    parser.add_argument("--skip", action="append", default=[], metavar="EXPRESSION", help=f"leave out {what}")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "diff",
        help="do two stores differ by more than noise?",
        description="Pair the cells of two sweeps by setting and their texts by prompt; tell what differs, and which "
        "differences noise does not explain.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", help="a store or JSON document: before (with --gate: what is judged)")
    parser.add_argument("b", metavar="B", nargs="?", help="another: after")
    parser.add_argument("--gate", metavar="FILE", help="the reference that A must not fall below")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=None,
        metavar="SHARE",
        help="with --gate: of the reference's accepted tokens per round, what may be lost (default: 0.05)",
    )
    parser.add_argument(
        "--level", type=float, default=0.05, metavar="P", help="chance of a false alarm, all cells (default: 0.05)"
    )
    add_filters(parser)
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELDS",
        help="fields of settings that may differ within a pair, like target,draft; repeatable",
    )
    parser.add_argument("--all", action="store_true", help="also list cells that do not differ")
    parser.add_argument("--json", metavar="FILE", help="write all findings")
    parser.set_defaults(run=run)


def _ignored(given: list[str]) -> list[str]:
    return [name.strip() for part in given for name in part.split(",") if name.strip()]


def run(arguments: argparse.Namespace) -> int:
    if (arguments.b is None) == (arguments.gate is None):
        raise InputError("give two documents, or one and --gate FILE: specdec diff A B, or specdec diff A --gate FILE")
    if arguments.tolerance is not None and arguments.gate is None:
        raise InputError("--tolerance is of --gate FILE; differences as such are judged against noise alone")
    screen.check_writable(arguments.json)
    from specdec.cli import diff_report
    from specdec.report.documents import load

    def read(path: str) -> Document:
        return load(path, arguments.only, arguments.skip)

    ignored = _ignored(arguments.ignore)
    out, _ = screen.consoles()
    if arguments.gate is not None:
        from specdec.report.gate import TOLERANCE, gate

        tolerance = TOLERANCE if arguments.tolerance is None else arguments.tolerance
        reference, now = read(arguments.gate), read(arguments.a)
        judged = gate(reference, now, tolerance=tolerance, level=arguments.level, ignored=ignored)
        diff_report.show_gate(out, judged, arguments.gate, arguments.a)
        screen.write_json(arguments.json, judged.as_dict())
        return judged.exit_code
    from specdec.report.diff import diff

    before, after = read(arguments.a), read(arguments.b)
    found = diff(before, after, level=arguments.level, ignored=ignored)
    diff_report.show(out, found, arguments.a, arguments.b, everything=arguments.all)
    screen.write_json(arguments.json, found.as_dict())
    return 1 if found.alarms else 0
