"""`specdec replay`: any setting's acceptance from a recorded trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.costs import Costs
    from specdec.replay import Recording, Replayed
    from specdec.sweep.setting import Setting

# Depths whose acceptance the table shows.
_DEPTHS = 3

_EXAMPLES = """\
examples:
  specdec replay trace.safetensors                                         k = 1, 2, 4, 8
  specdec replay trace.safetensors --k 1-8 --tree '4,2,1;2,2' --verifier coupled,recursive
  specdec replay trace.safetensors --policy heuristic,confidence:threshold=0.5;k=8
  specdec replay trace.safetensors --costs costs.json --json replayed.json
  specdec report replayed.json                                             the same page as a sweep's

exact: a run of that setting has these very rounds. estimated: the trace leaves something open; the bound says how far
the tokens per round of a run may lie from these. Exit code 2 when nothing could be replayed.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "replay",
        help="any setting's acceptance from a recorded trace",
        description="Go over recorded texts as a setting would: no model runs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("trace", metavar="TRACE", help="a file of `specdec record`")
    group = parser.add_argument_group("settings (lists; every combination is replayed)")
    group.add_argument(
        "--k", type=options.axis("split_counts"), metavar="1,2,4", help="chains of the fixed policy; 1-8: a range"
    )
    trees, names = options.axis("split_trees"), options.axis("split_names")
    group.add_argument("--tree", type=trees, metavar="'4,2,1;2,2'", help="trees of the fixed policy")
    group.add_argument("--policy", type=names, metavar="P,Q", help="others, as NAME:key=value;key=value")
    group.add_argument("--verifier", type=names, metavar="V,W", help="rules (default: coupled)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="shorter texts (default: as recorded)")
    group = parser.add_argument_group("results")
    group.add_argument(
        "--costs",
        metavar="FILE",
        help='JSON {"verify": {"1": seconds, "5": seconds}, "draft": seconds a level, "other": seconds a round}, for '
        "predicted speed-ups (default: those measured while recording)",
    )
    group.add_argument("--json", metavar="FILE", help="write cells, as `specdec sweep --json` does")
    parser.set_defaults(run=run)


def _settings(arguments: argparse.Namespace, recording: Recording) -> list[Setting]:
    from specdec.replay.cells import base_setting
    from specdec.sweep import axes

    base = base_setting(recording)
    drafter = {"name": base.pop("drafter"), **base.pop("drafter_options", {})}
    if arguments.max_new_tokens is not None:
        base["max_new_tokens"] = arguments.max_new_tokens
    given: dict[str, Any] = {"drafter": [drafter], "verifier": arguments.verifier or ["coupled"]}
    policies = list(arguments.policy or ())
    if arguments.k or arguments.tree or not policies:
        policies = ["fixed", *(name for name in policies if name != "fixed")]
        shapes = {"k": arguments.k, "tree": arguments.tree}
        if not (arguments.k or arguments.tree):
            shapes["k"] = [k for k in axes.DEFAULT_K if k <= recording.depth] or [recording.depth]
        given.update({name: values for name, values in shapes.items() if values})
    return axes.combine({**given, "policy": policies}, base)


def _read_costs(path: str | None) -> Costs | None:
    if path is None:
        return None
    from specdec.replay.prices import read_costs

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--costs {path}: {error}") from error
    return read_costs(content, f"--costs {path}")


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    screen.quiet(arguments)
    from specdec.cli.compare import progress_bar
    from specdec.replay import Recording, replay
    from specdec.replay.cells import cell, document, identity
    from specdec.sweep.pool import build_policy

    recording = Recording.load(arguments.trace)
    costs, settings = _read_costs(arguments.costs), _settings(arguments, recording)
    out, err = screen.consoles()
    made: list[tuple[Setting, Replayed | InputError]] = []
    with progress_bar(err, "replaying") as progress:
        for number, setting in enumerate(settings):
            found: Replayed | InputError
            try:
                policy, limit = build_policy(setting), arguments.max_new_tokens
                found = replay(recording, policy, setting.verifier, max_new_tokens=limit, costs=costs)
            except InputError as error:
                found = error
            made.append((setting, found))
            progress(number + 1, len(settings), setting.label())
    _show(out, recording, made)
    trace = identity(recording)
    cells = [cell(recording, setting, found, trace) for setting, found in made]
    screen.write_json(arguments.json, document(recording, cells))
    return 0 if any(not isinstance(found, InputError) for _, found in made) else 2


def _show(console: Console, recording: Recording, made: Sequence[tuple[Setting, Replayed | InputError]]) -> None:
    from rich import box
    from rich.table import Table

    meta = recording.meta
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("draft", "rule"):
        table.add_column(heading, no_wrap=True)
    table.add_column("tokens\n/ round", justify="right", no_wrap=True)
    table.add_column("accepting\n1, 2, …", no_wrap=True)
    table.add_column("of\nall", justify="right", no_wrap=True)
    with_costs = any(not isinstance(found, InputError) and found.speedup is not None for _, found in made)
    if with_costs:
        table.add_column("pre-\ndicted", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    notes: dict[str, None] = {}
    for setting, found in made:
        shape = f"k={setting.shape}" if setting.policy == "fixed" and setting.tree is None else setting.shape
        if setting.policy != "fixed":
            shape = " ".join([shape, *(f"{name}={value}" for name, value in setting.policy_options.items())])
        if isinstance(found, InputError):
            table.add_row(shape, setting.verifier, "–", "", "–", *["–"] * with_costs, "not told")
            notes[f"{shape}, {setting.verifier}: {found}"] = None
            continue
        stats = found.stats
        by_depth = " ".join(f"{p:.2f}" for p in stats.joint_acceptance[:_DEPTHS])
        by_depth += " …" if len(stats.joint_acceptance) > _DEPTHS else ""
        row = [shape, setting.verifier, f"{stats.mean_acceptance_length:.3f}", by_depth]
        row.append(f"{stats.draft_acceptance_rate:.1%}")
        if with_costs:
            row.append("" if found.speedup is None else f"{found.speedup:.2f}x")
        table.add_row(*row, found.label)
        notes.update({f"{setting.verifier}, {shape}: {reason}": None for reason in found.reasons})
    sampling = meta["sampling"]
    tokens = sum(text.num_tokens for text in recording.texts)
    console.print(f"{meta['drafter']}, {len(recording.texts)} texts, {tokens} tokens, ", end="")
    console.print(f"temperature {sampling['temperature']:g}, seed {sampling['seed']}")
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", style="dim", markup=False)
    if with_costs:
        console.print("predicted: over plain decoding, from costs alone; run it to know")
