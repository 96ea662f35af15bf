"""`specdec sweep`: many settings, each against plain decoding, in a store that survives anything."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.cli.sweep_board import Board
    from specdec.sweep.engine import Engine, Run
    from specdec.sweep.setting import Setting
    from specdec.sweep.store import Store

_EXAMPLES = """\
examples:
  specdec sweep                                            k = 1, 2, 4, 8 on the embedded pair
  specdec sweep --drafter model,ngram --k 1-6 --temperature 0,0.7,1 --store sweep.db
  specdec sweep --k 4 --tree '4,2,1;2,2' --verifier coupled,recursive --temperature 1 --acceptance-only
  specdec sweep --quantize none,int8 --draft-quantize none,int8 --batch 1,4 --limit 4 --csv cells.csv
  specdec sweep --drafter model,hybrid:retrieval=suffix --policy fixed,throughput,heuristic:k=4 --k 4
  specdec sweep --target org/target --drafter org/draft --prompts spec_bench.jsonl --limit-per-category 5 --store s.db
  specdec sweep --config sweep.toml --only "k <= 4 and drafter == 'model'" --dry-run

A sweep that was stopped, in whatever way, goes on where it was when it is started again with the same --store;
--fresh measures its cells again, as a gate on new code has to.
Exit code 1 when texts differ and the difference is no tie of the precision (a BUG), or when no cell could run; 2 for
wrong input.
"""
# Fields of settings that one flag gives for all cells.
_TEXTS = ("top_k", "top_p", "min_p", "repetition_penalty", "limit", "limit_per_category", "turns")
_BASE = (*_TEXTS, "device", "backend", "numerics", "threads")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="many settings, resumable, one table",
        description="Run every combination of the given values against plain decoding of the same prompts; keep every "
        "finished cell; print acceptance, speed-up and whether the texts are the same.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_axes(parser.add_argument_group("axes (lists; every combination is a cell)"))
    _add_texts(parser.add_argument_group("texts"))
    _add_run(parser.add_argument_group("run"))
    group = parser.add_argument_group("results")
    group.add_argument("--store", metavar="FILE", help="keep finished cells there (SQLite), and go on from it")
    for kind, what in (("json", "everything"), ("csv", "a row per cell"), ("parquet", "the same, with types")):
        group.add_argument(f"--{kind}", metavar="FILE", help=f"write this sweep's cells: {what}")
    group.add_argument("--html", metavar="FILE", help="write a report that opens in any browser")
    prompt_options.add_published_option(group)
    group = parser.add_argument_group("models")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    group.add_argument("--backend", help="how a step runs: compiled, eager, … (default: compiled where it runs)")
    group.add_argument("--numerics", choices=("invariant", "fast"), help="as for compare")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as for compare)")
    parser.set_defaults(run=run)


def _add_axes(group: Any) -> None:
    names, nothing = options.axis("split_names"), options.axis("split_optional")
    group.add_argument(
        "--target", action="append", metavar="T", help="hub id or folder; repeatable (default: embedded)"
    )
    group.add_argument(
        "--drafter", type=names, metavar="X,Y", help="plugins, hub ids or folders; options as NAME:key=value;key=value"
    )
    group.add_argument(
        "--k", type=options.axis("split_counts"), metavar="1,2,4", help="chains of the fixed policy; 1-8: a range"
    )
    group.add_argument(
        "--tree", type=options.axis("split_trees"), metavar="'4,2,1;2,2'", help="trees of the fixed policy"
    )
    group.add_argument("--policy", type=names, metavar="P,Q", help="fixed (default) and others, as NAME:key=value")
    group.add_argument("--verifier", type=names, metavar="V,W", help="rules (default: coupled)")
    group.add_argument("--temperature", type=options.axis("split_numbers"), metavar="0,0.7", help="(default: 0)")
    group.add_argument("--quantize", type=nothing, metavar="none,F", help="formats of the target's weights")
    group.add_argument("--draft-quantize", type=nothing, metavar="none,F", help="formats of the draft's weights")
    group.add_argument("--kv-cache", type=nothing, metavar="none,F", help="formats of keys and values")
    group.add_argument("--dtype", type=nothing, metavar="D,E", help="float32, bfloat16, … (default: as for compare)")
    group.add_argument("--batch", type=options.axis("split_counts"), metavar="1,4", help="prompts that decode together")
    group.add_argument("--prompts", action="append", metavar="NAME|FILE", help="as for compare; repeatable")
    group.add_argument("--seed", type=options.axis("split_counts"), metavar="0,1", help="(default: 0)")
    group.add_argument("--max-new-tokens", type=options.axis("split_counts"), metavar="N", help="(default: 64)")
    group.add_argument("--config", metavar="FILE", help="axes and cells from a .toml or .py file")
    group.add_argument("--only", action="append", default=[], metavar="EXPR", help="keep settings of which it is true")
    group.add_argument("--skip", action="append", default=[], metavar="EXPR", help="leave out settings of which it is")


def _add_texts(group: Any) -> None:
    group.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of a set")
    group.add_argument("--limit-per-category", type=int, metavar="N", help="only the first N of each category")
    group.add_argument("--turns", type=int, metavar="N", help="only the first N turns of a conversation (default: all)")
    group.add_argument("--truncate-prompts", action="store_true", help="cut prompts that are too long, in front")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    prompt_options.add_chat_options(group)


def _add_run(group: Any) -> None:
    group.add_argument("--repetitions", type=int, default=3, metavar="R", help="of every prompt (default: 3)")
    group.add_argument("--warmup", type=int, default=1, metavar="N", help="unmeasured runs before a cell (default: 1)")
    group.add_argument(
        "--acceptance-only", action="store_true", help="no times: every text once, plain ones shared; much faster"
    )
    group.add_argument(
        "--with-prefill",
        action="store_true",
        help="timed calls prefill their prompt, as in compare, instead of forking",
    )
    group.add_argument("--story", action="store_true", help="tell one text of every cell token by token, for --html")
    group.add_argument("--exact", action="store_true", help="re-decide doubtful positions at width 1 (half precision)")
    group.add_argument("--allow-lossy", action="store_true", help="admit rules that change the distribution")
    group.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    group.add_argument("--fresh", action="store_true", help="measure all again, in place of what --store has of it")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="processes on the same store (default: 1)")
    group.add_argument("--dry-run", action="store_true", help="list the cells and the time that they may take")


def gather(arguments: argparse.Namespace) -> list[Setting]:
    """The settings that the flags, or the file and the flags, ask for."""
    from specdec.sweep import axes
    from specdec.sweep.config import read_configuration
    from specdec.sweep.pool import quantizes

    base = {name: getattr(arguments, name) for name in _BASE if getattr(arguments, name) is not None}
    if arguments.truncate_prompts:
        base["truncate"] = True
    base.update({name: True for name in ("exact",) if getattr(arguments, name)})
    if arguments.chat or arguments.chat_template or arguments.chat_option:
        base["chat"] = True
    given = {name: getattr(arguments, name) for name in axes.AXES if name not in ("prompt_set", "target")}
    given.update(prompt_set=arguments.prompts, target=[_folder(name) for name in arguments.target or ()] or None)
    given = {name: values for name, values in given.items() if values is not None}
    only, skip = list(arguments.only), list(arguments.skip)
    if arguments.config is None:
        if "drafter" not in given and "target" in given:
            given["drafter"] = [options.DRAFTER_WITHOUT_WEIGHTS]
        found = axes.combine(given, base, quantizes=quantizes)
    else:
        several = [
            name for name, values in given.items() if len(values) > 1 or name in ("drafter", "policy", "k", "tree")
        ]
        if several:
            raise InputError(f"--config gives the axes; leave --{several[0].replace('_', '-')} out, or give one value")
        one = {name: values[0] for name, values in given.items()}
        read = read_configuration(arguments.config, {**base, **one}, quantizes=quantizes)
        found, only, skip = read.settings, only + read.only, skip + read.skip
    return axes.select(found, only, skip)


def _folder(name: str) -> str:
    """A path that is not there is a mistyped folder, not a hub id."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise InputError(f"--target {name}: no such folder")
    return name


def build_run(arguments: argparse.Namespace) -> Run:
    from specdec.sweep.engine import Run

    if arguments.jobs < 1:
        raise InputError(f"--jobs is a number of processes >= 1, not {arguments.jobs}")
    return Run(
        repetitions=arguments.repetitions,
        warmup=arguments.warmup,
        timed=not arguments.acceptance_only,
        fork=not arguments.with_prefill,
        story=arguments.story,
        allow_lossy=arguments.allow_lossy,
        chat=prompt_options.chat(arguments),
    )


def run(arguments: argparse.Namespace) -> int:
    screen.quiet(arguments)
    from specdec.cli import sweep_screen
    from specdec.cli.sweep_board import Board
    from specdec.sweep import export
    from specdec.sweep.engine import Engine, has_bug
    from specdec.sweep.store import Store

    export.check_exports(**{name: getattr(arguments, name) for name in ("json", "csv", "parquet", "html")})
    out, err = screen.consoles()
    engine = Engine(build_run(arguments), warm=lambda decoder: screen.warm_up(decoder, err))
    cells = {engine.key(setting): setting for setting in gather(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        # Processes have no memory in common.
        own = Path(folder) / "sweep.db" if arguments.jobs > 1 else None
        with Store(arguments.store if arguments.store is not None else own) as store:
            if arguments.dry_run:
                with Store() as nothing:
                    sweep_screen.show_plan(out, engine, cells, nothing if arguments.fresh else store)
                return 0
            if arguments.fresh:
                store.forget(cells)
            board = Board(err, store, cells, engine.run.timed)
            board.resumed(arguments.retry_failed, engine.environment)
            _work(arguments, engine, store, cells, board)
            document = store.document(cells)
            left = store.counts(cells).left
    sweep_screen.show(out, document, engine.run, left)
    _write(arguments, document, out)
    done = [cell for cell in document["cells"] if cell["status"] == "done"]
    return 1 if any(has_bug(cell) for cell in done) or not done else 0


def _work(
    arguments: argparse.Namespace, engine: Engine, store: Store, cells: Mapping[str, Setting], board: Board
) -> None:
    from specdec.sweep.engine import sweep
    from specdec.sweep.jobs import run_jobs

    began = time.time()
    with board:
        if arguments.jobs > 1:
            if engine.run.timed:
                board.say(f"{arguments.jobs} processes disturb each other's timings; acceptance is not affected")
            run_jobs(
                store,
                cells,
                engine.run,
                arguments.jobs,
                retry_failed=arguments.retry_failed,
                began=began,
                watching=board.look,
            )
            engine.run = replace(engine.run, alone=False)
        # What dead processes of --jobs left over is done here; without --jobs, that is everything.
        sweep(
            store,
            cells,
            engine,
            retry_failed=arguments.retry_failed,
            began=began,
            starting=board.starting,
            finished=board.finished,
        )


def _write(arguments: argparse.Namespace, document: dict[str, Any], out: Console) -> None:
    from specdec.cli import sweep_screen
    from specdec.sweep import export

    if any(cell["status"] == "done" for cell in document["cells"]):
        from specdec.bench import specbench_table

        specbench_table.show(out, sweep_screen.relabelled(document), published=arguments.published)
    written = []
    for kind, write in (("json", export.write_json), ("csv", export.write_csv), ("parquet", export.write_parquet)):
        path = getattr(arguments, kind)
        if path is not None:
            write(document, path)
            written.append(path)
    if arguments.html is not None:
        from specdec.report import html

        html.write(document, arguments.html)
        written.append(arguments.html)
    kept = f"cells are in {arguments.store}; " if arguments.store else ""
    if kept or written:
        out.print(f"\n[dim]{kept}{'written: ' + ', '.join(written) if written else ''}[/]".replace("; [/]", "[/]"))
