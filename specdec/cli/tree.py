"""`specdec tree`: fit a draft tree to a target, a drafter and this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.fit import TreePlan

_EXAMPLES = """\
examples:
  specdec tree --drafter medusa --out tree.json         the embedded target's heads, on this machine
  specdec compare --drafter medusa --tree-plan tree.json
  specdec tree --target org/target --drafter org/draft --nodes 32 --temperature 1 --out tree.json

The plan may be a chain, or nothing at all: where further nodes cost more than they bring, that is the best tree.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tree",
        help="fit a draft tree to a pair and this machine",
        description="Measure how often the target's token is the drafter's n-th at each depth, and what rounds cost "
        "here; find the tree with the most expected tokens per second; write it to a file.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("fit")
    group.add_argument("--out", required=True, metavar="FILE", help="the plan, as JSON")
    group.add_argument("--nodes", type=int, default=64, metavar="N", help="at most (default: 64)")
    group.add_argument("--depth", type=int, default=6, metavar="D", help="levels that are measured (default: 6)")
    group.add_argument("--ranks", type=int, default=8, metavar="R", help="children that are measured (default: 8)")
    prompt_options.add_prompt_options(group, limit=6)
    options.add_text_options(parser, max_new_tokens=64)
    options.add_method_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("nodes", "depth", "ranks"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is a whole number >= 1, not {getattr(arguments, name)}")
    out = Path(arguments.out)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: give the name of a file in a folder that is there")


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    screen.quiet(arguments)
    from specdec.cli.compare import progress_bar
    from specdec.fit.fitting import fit, num_texts

    chosen = prompt_options.selection(arguments)
    found = chosen.read()
    decoder = options.build_decoder(arguments, prefix_cache=0)
    out, err = screen.consoles()
    texts = options.generation_options(arguments)
    chosen.check(decoder, found.prompts, texts)
    screen.warm_up(decoder, err)
    prompts = [list(one.ids) for one in prompt_options.encode(chosen, found, decoder, texts, err)]
    total, done = num_texts(len(prompts), arguments.depth, arguments.nodes), 0
    with progress_bar(err, "fitting") as progress:

        def tick() -> None:
            nonlocal done
            done += 1
            progress(done, total, "")

        plan = fit(decoder, prompts, arguments.nodes, arguments.depth, arguments.ranks, tick, **texts)
    plan.save(arguments.out)
    _show(out, plan, arguments.out)
    return 0


def _show(console: Console, plan: TreePlan, path: str) -> None:
    from rich import box
    from rich.table import Table

    evidence = plan.evidence
    table = Table(box=box.SIMPLE_HEAD, title="accepted, by depth (rows) and rank", title_justify="left")
    table.add_column("depth", justify="right")
    rows = evidence["acceptance"]
    for rank in range(len(rows[0])):
        table.add_column(str(rank + 1), justify="right")
    table.add_column("of", justify="right")
    for depth, row in enumerate(rows):
        table.add_row(str(depth + 1), *(f"{p:.3f}" for p in row), str(evidence["reached"][depth]))
    console.print(table)
    rates = Table(box=box.SIMPLE_HEAD)
    for heading in ("draft", "nodes", "depth", "tokens per round", "predicted over plain"):
        rates.add_column(heading, justify="left" if heading == "draft" else "right")
    for name, row in evidence["candidates"].items():
        rates.add_row(name, str(row["nodes"]), str(row["depth"]), f"{row['tokens']:.2f}", f"{row['speedup']:.2f}x")
    console.print(rates)
    costs = evidence["costs"]
    verify = ", ".join(f"{width}: {1e3 * seconds:.2f}" for width, seconds in costs["verify"].items())
    console.print(
        f"ms: verification by rows {verify}; a draft level {1e3 * costs['level']:.3f}, "
        f"an expanded node {1e3 * costs['node']:.3f}; the rest of a round {1e3 * costs['other']:.3f}"
    )
    console.print(f"written: {path} (use it with --tree-plan {path})")
