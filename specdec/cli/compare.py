"""`specdec compare`: plain against speculative decoding, side by side."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.dtypes import dtype_name

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.api import SpeculativeDecoder
    from specdec.bench.compare import Progress
    from specdec.bench.comparison import Comparison
    from specdec.bench.prompt_sets import Encoded

# A run that is over sooner needs no bar.
_PATIENCE = 2.0

_EXAMPLES = """\
examples:
  specdec compare
  specdec compare --limit 4 --max-new-tokens 32 --drafter ngram
  specdec compare --temperature 0.7 --verifier block --seed 1 --limit 4
  specdec compare --policy fixed --k 4 --baseline hf --baseline hf-assisted --json result.json
  specdec compare --target org/target --drafter org/draft --prompts question.jsonl --chat --dtype bfloat16
  specdec compare --quantize w4a16 --draft-quantize mxfp4 --limit 4        weights in fewer bits, rounded while read
  specdec compare --html report.html                                       a page to look at, and to pass on
  specdec compare --drafter self_quant --drafter-option scheme=mxfp4       the target drafts for itself in 4 bits

Exit code 1 when texts differ and the difference is no tie of the precision (a BUG), 2 for wrong input.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="plain against speculative, side by side",
        description="Decode a prompt set plainly and speculatively, in turns; print what is gained and whether the "
        "texts are the same.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("comparison")
    prompt_options.add_prompt_options(group)
    prompt_options.add_published_option(group)
    group.add_argument("--repetitions", type=int, default=3, metavar="R", help="of every prompt (default: 3)")
    group.add_argument("--warmup", type=int, default=1, metavar="N", help="unmeasured runs first (default: 1)")
    group.add_argument(
        "--baseline",
        action="append",
        default=[],
        choices=["hf", "hf-assisted"],
        help="add transformers' own generation, plain or assisted, to the same run; repeatable",
    )
    group.add_argument("--json", metavar="FILE", help="write all numbers")
    group.add_argument("--html", metavar="FILE", help="write one page with charts, and the first texts token by token")
    options.add_text_options(parser, max_new_tokens=64)
    options.add_method_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


@contextmanager
def progress_bar(console: Console, title: str = "comparing") -> Iterator[Progress]:
    """A bar with the time left, on stderr, once the run has lasted a while."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("·"))
    # Drawn between timed calls only: a thread that redraws would be one of the disturbances.
    bar = Progress(
        *columns, TimeRemainingColumn(), TextColumn("left"), console=console, transient=True, auto_refresh=False
    )
    task = bar.add_task(title, total=None)
    began, shown = time.monotonic(), False

    def update(done: int, total: int, what: str) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if not shown and console.is_terminal and time.monotonic() - began > _PATIENCE:
            bar.start()
            shown = True
        if shown:
            bar.refresh()

    try:
        yield update
    finally:
        if shown:
            bar.stop()


def _describe(arguments: argparse.Namespace, decoder: SpeculativeDecoder) -> dict[str, Any]:
    """The set-up, as JSON and as the head of the report."""
    from specdec.quant.linear import num_parameters, stored_as

    name = options.chosen_drafter(arguments)
    model = getattr(decoder.drafter, "model", None)
    if model is not None and name == decoder.drafter.name:
        name = "embedded"
    capabilities = decoder.backend.capabilities
    return {
        "target": screen.model_name(options.describe_target(arguments)),
        "draft": screen.model_name(name),
        "drafter": decoder.drafter.name,
        "parameters": {
            "target": num_parameters(decoder.target),
            "draft": num_parameters(model) if model is not None else None,
        },
        "stored_as": {
            "target": stored_as(decoder.target),
            "draft": stored_as(model) if model is not None else None,
        },
        "verifier": decoder.verifier.name,
        "policy": decoder.policy.name,
        "device": screen.device_name(capabilities.device),
        "dtype": dtype_name(capabilities.dtype),
        "backend": decoder.backend.describes,
        "numerics": decoder.backend.numerics,
        "dtype_reason": decoder.dtype_reason,
        "versions": screen.versions(),
        "options": options.generation_options(arguments),
    }


def _write_page(
    arguments: argparse.Namespace,
    decoder: SpeculativeDecoder,
    comparison: Comparison,
    prompts: Sequence[Encoded],
    parameters: dict[str, Any],
) -> None:
    from specdec.report import cells, html

    texts = options.generation_options(arguments)
    told = cells.stories_of(decoder, prompts, texts)
    command = ["specdec", *sys.argv[1:]]
    html.write(
        cells.document_of(comparison, arguments, decoder, told, parameters=parameters, command=command), arguments.html
    )


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    screen.check_writable(arguments.html, "--html")
    screen.quiet(arguments)
    from specdec.bench import baselines, specbench, specbench_table
    from specdec.bench.compare import compare
    from specdec.cli.compare_report import show

    chosen = prompt_options.selection(arguments)
    found = chosen.read()
    # Every run computes its prompt, as the baselines do.
    decoder = options.build_decoder(arguments, prefix_cache=0)
    texts = options.generation_options(arguments)
    others = [b for name in dict.fromkeys(arguments.baseline) for b in baselines.build(name, decoder, texts)]
    out, err = screen.consoles()
    chosen.check(decoder, found.prompts, texts)
    screen.warm_up(decoder, err)
    encoded = prompt_options.encode(chosen, found, decoder, texts, err)
    with progress_bar(err) as progress:
        comparison = compare(
            decoder,
            encoded,
            texts,
            repetitions=arguments.repetitions,
            warmup=arguments.warmup,
            baselines=others,
            progress=progress,
        )
    import torch

    report = {**_describe(arguments, decoder), "threads": torch.get_num_threads(), **comparison.as_dict()}
    rows = specbench.comparison_rows(comparison)
    figures = specbench.measure(rows)
    report["spec_bench"] = figures.as_dict() if figures is not None else None
    show(out, report)
    label = f"{decoder.drafter.name}, {decoder.policy.name}"
    specbench_table.show(out, {"cells": [{"label": label, "rows": rows}]}, published=arguments.published)
    screen.write_json(arguments.json, report)
    if arguments.html is not None:
        _write_page(arguments, decoder, comparison, encoded, report["parameters"])
        err.print(f"written: {arguments.html}", markup=False)
    return 1 if comparison.has_bug else 0
