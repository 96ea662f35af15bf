"""`specdec plan`: will speculation pay here, and with which setting?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from specdec.planner.evidence import Evidence
    from specdec.planner.planner import Report
    from specdec.planner.predict import Prediction

_EXAMPLES = """\
examples:
  specdec plan                                          the embedded pair, on this machine
  specdec plan --drafter ngram --limit 4 --k 1,2,4,8
  specdec plan --target org/target --drafter org/draft --dtype bfloat16 --prompts mine.jsonl --temperature 0.7
  specdec plan --target org/target --drafter org/draft --quantize w4a16 --context-length 8192 --json plan.json
  specdec plan --trace trace.safetensors                acceptance from `specdec record`, costs measured here

Costs are kept for the next plan of the same models on the same device (`--fresh` measures again). A busy machine
measures busy costs.
"""

# What a trace has of its own: options that say it otherwise would be ignored.
_TEXTS = (
    "prompts", "limit", "limit_per_category", "turns", "truncate_prompts", "max_new_tokens", "temperature", "top_k",
    "top_p", "min_p", "repetition_penalty", "seed", "stop", "chat", "chat_template", "chat_option",
)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="will it pay here, and with which setting?",
        description="Measure what a plain step, a verification of every width and a draft cost on this device, and how "
        "often drafts are accepted; predict the speed-up of every draft length and of trees.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("plan")
    prompt_options.add_prompt_options(group, limit=8)
    group.add_argument(
        "--k",
        dest="lengths",
        type=options.whole_numbers,
        metavar="1,2,4",
        help="draft lengths to predict (default: 1 to 16, and 50)",
    )
    group.add_argument("--no-trees", action="store_true", help="chains only; saves a third of the measuring")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="acceptance, prompts and sampling from `specdec record`; nothing is decoded for it",
    )
    group.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="tokens that keys and values are counted for (default: the longest prompt and its text)",
    )
    group.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="for measuring acceptance, at most about (default: 60)"
    )
    group.add_argument("--fresh", action="store_true", help="measure again, whatever was kept")
    group.add_argument("--json", metavar="FILE", help="write all numbers")
    method = parser.add_argument_group("method")
    method.add_argument("--verifier", metavar="NAME", help="verification rule (default: coupled)")
    method.add_argument("--allow-lossy", action="store_true", help="admit rules that change the distribution")
    options.add_text_options(parser, max_new_tokens=64)
    options.add_model_options(parser)
    # What a plan is to find out is not given: the policy.
    parser.set_defaults(
        run=run, exact=False, policy=None, k=None, tree=None, threshold=None, tree_plan=None, policy_option=[]
    )
    # None until `_take_defaults`: what was given is told from what was not, also where both are the same.
    parser.set_defaults(defaults={name: parser.get_default(name) for name in _TEXTS})
    parser.set_defaults(**dict.fromkeys(_TEXTS))


def _check(arguments: argparse.Namespace) -> None:
    screen.check_writable(arguments.json)
    if arguments.context_length is not None and arguments.context_length < 1:
        raise InputError(f"--context-length is a whole number >= 1, not {arguments.context_length}")
    if arguments.seconds <= 0:
        raise InputError(f"--seconds is a number above 0, not {arguments.seconds}")


def _take_defaults(arguments: argparse.Namespace) -> None:
    """Raises `InputError` for options beside `--trace` that the trace answers."""
    given = [name for name in _TEXTS if getattr(arguments, name) is not None]
    if arguments.trace is not None and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--trace brings its own prompts and sampling: leave {flags} out, or record a trace with them")
    for name in set(_TEXTS).difference(given):
        setattr(arguments, name, arguments.defaults[name])


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    _take_defaults(arguments)
    screen.quiet(arguments)
    from specdec.cli.compare import progress_bar
    from specdec.planner.cache import Store
    from specdec.planner.planner import LENGTHS, make_plan

    decoder = options.build_decoder(arguments, prefix_cache=0)
    out, err = screen.consoles()
    texts, settings, known = _sources(arguments, decoder, err)
    screen.warm_up(decoder, err)
    with progress_bar(err, "measuring") as progress:
        report = make_plan(
            decoder,
            texts,
            settings,
            lengths=arguments.lengths or LENGTHS,
            with_trees=not arguments.no_trees,
            known=known,
            context_length=arguments.context_length,
            seconds=arguments.seconds,
            store=Store(fresh=arguments.fresh),
            progress=progress,
        )
    head = _describe(arguments, decoder, settings)
    show(out, report, head)
    screen.write_json(arguments.json, {**head, **report.as_dict()})
    return 0


def _sources(
    arguments: argparse.Namespace, decoder: Any, err: Console
) -> tuple[list[Any], dict[str, Any], Evidence | None]:
    """Prompts, options of `generate`, and acceptance where a trace has it: then the first two are the trace's."""
    if arguments.trace is None:
        chosen, texts = prompt_options.selection(arguments), options.generation_options(arguments)
        encoded = prompt_options.encode(chosen, chosen.read(), decoder, texts, err)
        return [list(one.ids) for one in encoded], texts, None
    from specdec.planner.traced import Traced, prompts_of, sampling_options
    from specdec.replay import Recording

    recording = Recording.load(arguments.trace)
    known = Traced(recording, decoder, not arguments.no_trees)
    return list(prompts_of(recording)), sampling_options(recording), known


def _describe(arguments: argparse.Namespace, decoder: Any, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from specdec.dtypes import dtype_name
    from specdec.fit.plan import circumstances

    capabilities = decoder.backend.capabilities
    here = circumstances(decoder.target, decoder.drafter)
    return {
        "target": screen.model_name(options.describe_target(arguments)),
        "drafter": decoder.drafter.name,
        "draft": screen.model_name(options.chosen_drafter(arguments)),
        "verifier": decoder.verifier.name,
        "temperature": settings["temperature"],
        "max_new_tokens": settings["max_new_tokens"],
        "device": screen.device_name(capabilities.device),
        "processor": here["device"],
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(capabilities.dtype),
        "backend": decoder.backend.describes,
        "versions": screen.versions(),
    }


def show(out: Console, report: Report, head: dict[str, Any]) -> None:
    out.print(
        f"\n[bold]{head['target']}[/], drafts by [bold]{head['drafter']}[/], rule {head['verifier']}, temperature "
        f"{head['temperature']:g}, {head['max_new_tokens']} new tokens; {head['device']}, {head['dtype']}, "
        f"{head['threads']} threads ({head['backend']})"
    )
    _show_costs(out, report)
    _show_rows(out, report)
    _show_memory(out, report)
    line = report.roofline
    out.print(
        f"\n[bold]Memory bandwidth[/]: a plain step reads {screen.size(line.step_bytes)} in {1e3 * line.step:.2f} ms, "
        f"{line.share:.0%} of the {line.bandwidth / 1e9:.0f} GB/s that this device reaches; {line.advice()}."
    )
    colour = "green" if report.verdict.speculate else "yellow"
    out.print(f"\n[bold {colour}]{report.verdict.sentence}[/]")
    out.print(f"because {report.verdict.reason}\n")


def _table(title: str) -> Table:
    """Narrow enough, with all columns, for a window of 80."""
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")


def _show_costs(out: Console, report: Report) -> None:
    from specdec.bench.timing import MAX_OTHERS
    from specdec.costs import cost_at

    cost = report.costs.round
    widths = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64]
    known = [width for width in widths if width <= max(cost.verify)]
    table = _table("Verification, ms by rows")
    for width in known:
        table.add_column(str(width), justify="right", no_wrap=True)
    table.add_row(*(f"{1e3 * cost_at(cost.verify, width):.3g}" for width in known))
    out.print(table, "")
    kept = "kept from an earlier plan" if report.from_cache.get("costs") else "measured now"
    out.print(
        f"A draft: {1e3 * cost.start:.2f} ms and {1e3 * cost.level:.2f} ms a level; the rest of a round: "
        f"{1e3 * cost.other:.2f} ms; a plain round: {1e3 * cost.plain_round():.2f} ms ({kept})."
    )
    if report.others > MAX_OTHERS:
        out.print(
            f"[yellow]Other processes used {report.others:.1f} cores meanwhile: these are a busy machine's costs; "
            "--fresh measures again.[/]"
        )
    curve = " ".join(f"{p:.2f}" for p in report.survival[:8])
    out.print(
        f"Accepted to depth 1, 2, …: {curve} (rounds of {len(report.survival)}; {report.num_texts} texts, "
        f"{report.num_tokens} tokens, from {report.source}).\n"
    )


def _show_rows(out: Console, report: Report) -> None:
    table = _table("Predicted")
    table.add_column("draft", no_wrap=True)
    for name in ("speed-up", "95 %", "ms/token", "tokens", "accepted", "cost", "break-even"):
        table.add_column(name, justify="right", no_wrap=True)
    top = report.best
    for row in report.rows:
        style = "bold green" if row is top and row.speedup > 1 else "bold" if row is top else ""
        table.add_row(*_cells(row), style=style)
    out.print(table, "")
    out.print(
        "[dim]speed-up: of whole calls over plain ones, all texts together. tokens: per round. cost: of a round, in "
        "plain ones. break-even: the acceptance that gives 1.0x if it is the same for every drafted token.[/]"
    )


def _cells(row: Prediction) -> list[str]:
    drafting = bool(row.setting.k or row.setting.shape)
    if not drafting:
        return [row.setting.label, "1.00x", "", f"{row.milliseconds_per_token:.2f}", "1.00", "", "1.00", ""]
    never = "never" if row.setting.k and row.cost > 1 else ""
    return [
        row.setting.label,
        f"{row.speedup:.2f}x",
        f"{row.low:.2f} to {row.high:.2f}",
        f"{row.milliseconds_per_token:.2f}",
        f"{row.tokens_per_round:.2f}",
        f"{row.accepted:.0%}",
        f"{row.cost:.2f}",
        f"{row.break_even:.2f}" if row.break_even is not None else never,
    ]


def _show_memory(out: Console, report: Report) -> None:
    from rich.table import Table

    memory = report.memory
    table = Table(title="\nMemory", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    there = [screen.size(size) if size is not None else "unknown" for size in (memory.total, memory.free)]
    rows = [
        ("weights", memory.target_weights + memory.draft_weights, f"draft: {screen.size(memory.draft_weights)}"),
        ("keys and values", memory.target_kv + memory.draft_kv,
         f"of {memory.length} tokens; draft: {screen.size(memory.draft_kv)}"),
        ("scratch", memory.scratch, "of the widest step, an estimate"),
        ("needed", memory.needed, f"of {there[0]}; {there[1]} are free beside the weights"),
    ]  # fmt: skip
    for name, size, note in rows:
        table.add_row(name, screen.size(size), note)
    out.print(table)
    if memory.fits is False:
        out.print(
            f"[bold red]{screen.size(memory.to_come)} of keys, values and scratch do not fit beside the weights[/]: "
            "shorten the text (--context-length), store it smaller (--kv-cache int8), or quantise the weights"
        )
