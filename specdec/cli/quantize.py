"""`specdec quantize`: write a model again with its weights in fewer bits."""

from __future__ import annotations

import argparse
import re
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from specdec.quant.methods.engine import Told
    from specdec.quant.plan import Plan

_EXAMPLES = """\
examples:
  specdec quantize --recipe w4a16 --out target-w4                the embedded target, in 4 and 8 bits
  specdec quantize org/model --recipe mxfp6_e2m3 --dry-run       how large it would be, and what that takes
  specdec quantize org/model --recipe recipe.json --out DIR --max-shard-size 4GB
  specdec quantize org/model --recipe int4-g64 --method gptq --calibration texts.jsonl --out DIR
  specdec quantize org/model --recipe sparse-90 --method wanda --storage delta-csc --out DIR
  specdec compare --target DIR                                   a folder that it wrote is a model like any other

A recipe of one's own is JSON: {"default": "int4", "head": "mxint8", "rules": [["down_proj", "int8"], ["o_proj", null]]}
Rules are regular expressions over module names, the first that is found counts, and null leaves a layer as it is.
"""
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_FORMATS = "mxfp8_e4m3, mxfp6_e2m3, mxfp4, mxint8, int8, int4, int4-g64-asym, sparse-60, …"


def num_bytes(text: str) -> int:
    """2GB, 500 MiB, or a plain number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if found is None or (found[2] or "") not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 2GB or 500MiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="store a model's weights in fewer bits",
        description="Write a model again with the weights of its linear layers in fewer bits. Tensors go from file to "
        "file, so that one layer and one shard are in memory. Embeddings and norms stay as they are.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub id or folder (default: the embedded target)")
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="R",
        help=f"a format ({_FORMATS}), a named recipe (w4a16, w8a16, w8a8, mx6, mx4, …), or a JSON file",
    )
    parser.add_argument("--out", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that DIR holds")
    parser.add_argument("--dry-run", action="store_true", help="show sizes and what it takes; write nothing")
    _add_method_options(parser)
    group = parser.add_argument_group("files and memory")
    group.add_argument(
        "--storage",
        choices=("packed", "delta-csc"),
        default="packed",
        help="packed: as the weights run (default); delta-csc: pruned weights by the gaps between them, smaller on the "
        "disk from 78 percent of zeros on, and expanded when they are loaded",
    )
    group.add_argument("--max-shard-size", type=num_bytes, default=1 << 30, metavar="SIZE", help="(default: 1GiB)")
    group.add_argument("--memory-budget", type=num_bytes, metavar="SIZE", help="refuse work that takes more")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("report")
    group.add_argument("--every-layer", action="store_true", help="a line for each, not for each kind")
    group.add_argument("--json", metavar="FILE", help="write the report: bits and bytes of every layer")
    group.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=run)


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        metavar="NAME",
        help="rtn: round to nearest; awq, gptq, smoothquant, wanda (default: the recipe's own)",
    )
    group.add_argument(
        "--method-option",
        metavar="KEY=VALUE",
        type=options.key_value,
        action="append",
        default=[],
        help="an option of the method; repeatable",
    )
    group.add_argument(
        "--calibration",
        default="self",
        metavar="FILE",
        help="text or JSONL that the method looks at activations on; self: the model writes it (default); stdlib: the "
        "source of the Python standard library. Never the prompts that the model is judged by",
    )
    group.add_argument("--calibration-rows", type=int, default=64, metavar="N", help="of text (default: 64)")
    group.add_argument("--calibration-length", type=int, metavar="N", help="tokens of a row (default: 256)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of the text")
    group.add_argument("--device", help="that the model runs on: cpu, cuda, … (default: cuda if there is one)")


def _recipe(arguments: argparse.Namespace) -> Any:
    from specdec.quant.recipe import Recipe

    recipe = Recipe.of(arguments.recipe)
    if arguments.method is not None and arguments.method != recipe.method:
        recipe = replace(recipe, method=arguments.method, options={})
    if arguments.method_option:
        recipe = replace(recipe, options={**recipe.options, **dict(arguments.method_option)})
    return recipe


def _say_plan(plan: Plan, console: Console) -> None:
    estimate = plan.estimate
    console.print(
        f"{plan.name}: {screen.size(estimate.source)} will be {screen.size(estimate.result)}, on the disk and when "
        f"loaded; making it takes up to {screen.size(estimate.peak)} of memory",
        markup=False,
    )
    if plan.obstacle is not None:
        console.print(f"the model is loaded whole: {plan.obstacle}", markup=False)


@contextmanager
def _bar(console: Console, quiet: bool) -> Iterator[Told]:
    """How much is done, and what is at hand; nothing where no one looks."""
    if quiet or not console.is_terminal:
        yield lambda done, of, what: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(24), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, of, what: progress.update(task, completed=done, total=of, description=what)


def _prepared(plan: Plan, arguments: argparse.Namespace, console: Console) -> Any:
    """What a method that looks at activations made of the model; None for the others."""
    if not plan.calibrates:
        return None
    from specdec.quant.calibrate import calibrate

    with _bar(console, arguments.quiet) as told:
        prepared = calibrate(
            plan,
            arguments.calibration,
            rows=arguments.calibration_rows,
            length=arguments.calibration_length,
            seed=arguments.seed,
            device=options.checked_device(arguments.device),
            memory_budget=arguments.memory_budget,
            told=told,
        )
    for note in prepared.notes if not arguments.quiet else ():
        console.print(note, markup=False)
    return prepared


def _write(plan: Plan, arguments: argparse.Namespace, console: Console) -> int:
    """Bytes of the tensors that are written."""
    from specdec.quant.delta_model import compress_folder
    from specdec.quant.stream import quantize

    out, overwrite, shard = Path(arguments.out), arguments.overwrite, arguments.max_shard_size
    given: dict[str, Any] = {
        "prepared": _prepared(plan, arguments, console),
        "memory_budget": arguments.memory_budget,
    }
    if arguments.storage == "packed":
        with _bar(console, arguments.quiet) as told:
            return quantize(plan, out, overwrite=overwrite, told=told, **given).after
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}.", suffix=".packed") as folder:
        with _bar(console, arguments.quiet) as told:
            quantize(plan, folder, told=told, **given)
        with _bar(console, arguments.quiet) as told:
            return compress_folder(folder, out, overwrite=overwrite, max_shard=shard, told=told).after


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    if arguments.out is None and not arguments.dry_run:
        raise InputError("say where to: --out DIR, or --dry-run to see sizes alone")
    screen.quiet(arguments)

    from specdec.cli.quant_report import table
    from specdec.loading import EMBEDDED
    from specdec.quant.plan import prepare
    from specdec.quant.source import check_output

    screen.use_threads(arguments.threads)
    out, err = screen.consoles()
    source = arguments.model or str(EMBEDDED / "target")
    recipe = _recipe(arguments)
    plan = prepare(source, recipe, max_shard=arguments.max_shard_size, trust_remote_code=arguments.trust_remote_code)
    if arguments.out is not None:
        check_output(Path(arguments.out), plan.checkpoint.folder, arguments.overwrite)
    if not arguments.quiet:
        _say_plan(plan, err)
    stored = plan.report.after if arguments.dry_run else _write(plan, arguments, err)
    out.print(table(plan.report, arguments.every_layer))
    if stored != plan.report.after:
        out.print(f"on the disk: {screen.size(stored)} in {arguments.storage}", markup=False)
    if not arguments.dry_run:
        out.print(f"specdec compare --target {arguments.out}", markup=False, soft_wrap=True)
    content = {
        "model": plan.name,
        "recipe": plan.recipe.to_dict(),
        "estimate": plan.estimate.to_dict(),
        **plan.report.to_dict(),
        "bytes_stored": stored,
        "versions": screen.versions(),
    }
    screen.write_json(arguments.json, content)
    return 0
