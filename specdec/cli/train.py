"""`specdec train KIND`: a drafter for a target of one's own, or the target's own weights in fewer bits."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec import registry
from specdec.cli import options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.train.data import TrainingData
    from specdec.train.objective import Objective
    from specdec.train.settings import Report, Settings

_EXAMPLES = """\
examples:
  specdec train draft --minutes 10                         a new draft for the embedded target
  specdec train draft --target org/target --data texts.jsonl --layers 4 --hidden 512 --out runs/draft
  specdec train draft --self-generate 2000 --init embedded --loss lk --on-policy 0.5
  specdec train draft --help                               the options of a kind
  specdec train recover --target org/target --data texts.jsonl --recipe int4-g64 --out runs/int4
  specdec train recover --recipe sparse-80 --prune wanda --prune-steps 8 --minutes 30 --out runs/sparse
  specdec train export runs/eagle --layout speculators --out eagle-speculators

An interrupted run goes on when the same command is given again. On several GPUs, or on the CPU in several processes:
  accelerate launch -m specdec train draft …
  torchrun --nproc-per-node 2 -m specdec train draft …
"""
EXPORT, STDLIB = "export", "stdlib"
_MINUTES = 20.0


def add_parser(subparsers: Any) -> None:
    kinds = ", ".join(registry.available("trainer"))
    parser = subparsers.add_parser(
        "train",
        help="train a drafter for a target, or its weights for fewer bits",
        description="Train a drafter for a target, whose weights stay as they are; or, as `recover`, a copy of the "
        f"target whose weights are stored in fewer bits. Kinds: {kinds}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"{kinds}; or {EXPORT}: write another project's layout")
    # Read by the kind's own parser, for its options are known only once its code is imported.
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="options of the kind")
    parser.set_defaults(run=run, help=parser.format_help)


def kind_parser(kind: str) -> argparse.ArgumentParser:
    """All options of `specdec train KIND`; `UnknownPluginError` for a kind that is not installed."""
    from specdec.cli import Parser

    found: type[Objective] = registry.find("trainer", kind)
    parser = Parser(
        prog=f"specdec train {kind}",
        description=textwrap.fill(" ".join((found.__doc__ or "").split("\n\n")[0].split()), 78),
        epilog=found.examples or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_data_options(parser)
    _add_run_options(parser, found)
    found.options(parser)
    # A budget is a default only where none is given.
    parser.set_defaults(**{name: value for name, value in found.recommended.items() if name != "minutes"})
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,0.8") from None


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("target")
    group.add_argument("--target", metavar="T", help="hub id or folder (default: the embedded target)")
    group.add_argument("--device", help="cpu, cuda, … (default: the process's own)")
    group.add_argument("--dtype", help="of the target (default: float32 on CPU, else the checkpoint's)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="text, or JSONL with `text` or `prompt`; repeatable. 'stdlib': the source of the Python standard library, "
        "which the embedded target was trained on (default for it)",
    )
    group.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a row (default: 256)")
    group.add_argument(
        "--held-out", type=float, default=0.03, metavar="SHARE", help="of documents to judge by (default: 0.03)"
    )
    group.add_argument(
        "--self-generate",
        type=int,
        default=0,
        metavar="N",
        help="let the target write N texts to train on (default: %(default)s)",
    )
    group.add_argument(
        "--prompt-tokens", type=int, default=64, metavar="N", help="of self-generated texts (default: 64)"
    )
    group.add_argument(
        "--self-temperature", type=_numbers, default="0,1", metavar="0,1", help="taken in turns (default: %(default)s)"
    )
    group.add_argument(
        "--text-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of --data's own text beside them (default: %(default)g)",
    )


def _minutes(kind: type[Objective]) -> float:
    return float(kind.recommended.get("minutes", _MINUTES))


def _add_run_options(parser: argparse.ArgumentParser, kind: type[Objective]) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", default=f"runs/{kind.kind}", metavar="DIR", help="(default: %(default)s)")
    group.add_argument(
        "--minutes", type=float, metavar="M", help=f"budget of time (default: {_minutes(kind):g}, without --steps)"
    )
    group.add_argument("--steps", type=int, metavar="N", help="budget of steps")
    group.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a forward (default: 8)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="forwards of a step (default: 1)")
    group.add_argument(
        "--lr", type=float, default=1e-3, metavar="R", help="highest learning rate (default: %(default)g)"
    )
    group.add_argument("--warmup", type=float, default=0.03, metavar="SHARE", help="of the budget (default: 0.03)")
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="W", help="(default: %(default)g)")
    group.add_argument("--clip", type=float, default=1.0, metavar="NORM", help="of gradients (default: 1)")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="(default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="fp32",
        help="of products; auto: bf16 where the processor multiplies it itself (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="S")
    group.add_argument("--evaluations", type=int, default=20, metavar="N", help="on held-out text (default: 20)")
    group.add_argument("--evaluation-rows", type=int, default=48, metavar="N", help="rows of each (default: 48)")
    group.add_argument(
        "--patience", type=int, default=8, metavar="N", help="evaluations without a better one; 0: no end (default: 8)"
    )
    group.add_argument(
        "--judged-at",
        type=int,
        choices=(0, 1),
        default=1,
        help="temperature that picks the best weights (default: %(default)s)",
    )
    group.add_argument("--checkpoint-minutes", type=float, default=3.0, metavar="M", help="(default: 3)")
    group.add_argument("--restart", action="store_true", help="forget the run that the output folder holds")
    group.add_argument("--json", metavar="FILE", help="write the result and the held-out curve")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def _settings(kind: str, arguments: argparse.Namespace) -> Settings:
    from specdec.train.settings import Settings

    names = ("batch", "accumulate", "lr", "warmup", "weight_decay", "clip", "optimizer", "precision", "seed")
    more = ("evaluations", "evaluation_rows", "patience", "judged_at", "checkpoint_minutes", "steps", "minutes")
    given = {name: getattr(arguments, name) for name in (*names, *more)}
    if given["steps"] is None and given["minutes"] is None:
        given["minutes"] = _minutes(registry.find("trainer", kind))
    return Settings(out=Path(arguments.out), resume=not arguments.restart, **given)


def _load_target(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from specdec.loading import EMBEDDED, load_model, load_tokenizer
    from specdec.train.processes import process_group

    source = arguments.target or str(EMBEDDED / "target")
    device = options.checked_device(arguments.device) or process_group().device
    target = load_model(
        source, device=device, dtype=arguments.dtype, trust_remote_code=arguments.trust_remote_code
    ).requires_grad_(False)
    return target, load_tokenizer(source, arguments.trust_remote_code)


def prepare_data(
    kind: type[Objective], arguments: argparse.Namespace, target: Any, tokenizer: Any, err: Console
) -> TrainingData:
    """The rows that the options describe; texts of the target's own are made now, by the first process."""
    from specdec.bench.prompts import read_prompts
    from specdec.train import data, selfgen, stdlib
    from specdec.train.processes import process_group

    source: dict[str, Any] = {"held_out": arguments.held_out, "length": arguments.length}
    only_prompts = False
    files = arguments.data or ([STDLIB] if arguments.target is None else [])
    if files:
        paths = [path for path in files if path != STDLIB]
        documents = data.read_documents(paths, arguments.held_out) if paths else []
        documents += stdlib.documents() if STDLIB in files else []
        source["files"] = [Path(path).name for path in files]
    elif arguments.self_generate:
        prompts = [prompt.text for prompt in read_prompts()]
        documents = [data.Document(text, i % 4 == 0) for i, text in enumerate(prompts)]
        source["files"], only_prompts = ["the built-in prompts"], True
    else:
        raise InputError("no text to train on: give --data FILE, or --self-generate N to let the target write it")
    kind.check_texts(document.text for document in documents if not document.held_out)
    if not arguments.self_generate:
        return data.packed(documents, tokenizer, arguments.length, arguments.seed, source)
    what = selfgen.SelfGeneration(
        arguments.self_generate,
        arguments.length,
        arguments.prompt_tokens,
        arguments.self_temperature,
        arguments.text_share,
        arguments.held_out,
        arguments.seed,
    )
    text = None
    if not only_prompts and what.text_share > 0:
        text = data.packed(documents, tokenizer, arguments.length, arguments.seed, source)

    processes = process_group(target.device)
    told_here = processes.is_main_process and not arguments.quiet

    def told(made: int, wanted: int) -> None:
        if told_here:
            err.print(f"the target wrote {made} of {wanted} texts", markup=False)

    # The others wait, and find the texts on the disk.
    with processes.main_process_first():
        made = selfgen.self_generated(target, tokenizer, documents, text, what, Path(arguments.out), told)
    return replace(made, source={**source, **made.source})


def _show(report: Report, arguments: argparse.Namespace, out: Console) -> None:
    from specdec.train.progress import duration

    best = report.best
    out.print(
        f"{report.kind}: {report.steps} steps, {screen.count(report.tokens)} tokens in {duration(report.seconds)}; "
        f"ended by {report.ended}; best at step {best['step']}",
        markup=False,
    )
    kind: type[Objective] = registry.find("trainer", report.kind)
    for line in kind.summary(report.curve[0], best):
        out.print(line, markup=False)
    target = f" --target {arguments.target}" if arguments.target else ""
    out.print(f"specdec {kind.usage.format(target=target, out=report.out)}", markup=False, soft_wrap=True)


def _export(rest: list[str]) -> int:
    from specdec.cli import Parser
    from specdec.train import provenance

    parser = Parser(prog="specdec train export", description="Write a trained drafter in another project's layout.")
    parser.add_argument("folder", metavar="FOLDER", help="what `specdec train KIND` wrote")
    parser.add_argument("--layout", required=True, help="speculators, …")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    given = parser.parse_args(rest)
    source, target = Path(given.folder), Path(given.out)
    kind: type[Objective] = registry.find("trainer", provenance.read(source)["kind"])
    if given.layout not in kind.layouts:
        known = f"there are: {', '.join(kind.layouts)}" if kind.layouts else "there is none for it"
        raise InputError(f"a {kind.kind} drafter has no layout called {given.layout!r}; {known}")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"--out {target} is not empty")
    target.mkdir(parents=True, exist_ok=True)
    kind.export(source, target, given.layout)
    print(f"{kind.kind} in the {given.layout} layout: {target}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    if arguments.kind is None:
        print(arguments.help(), end="")
        return 0
    if arguments.kind == EXPORT:
        return _export(arguments.rest)
    kind = arguments.kind
    given = kind_parser(kind).parse_args(arguments.rest)
    arguments.debug = given.debug = arguments.debug or getattr(given, "debug", False)
    return train(kind, given)


def train(kind: str, arguments: argparse.Namespace) -> int:
    """`arguments`: those of `kind_parser`."""
    screen.check_writable(arguments.json)
    settings = _settings(kind, arguments)
    screen.quiet(arguments)
    import torch

    from specdec.train.objective import create, defaults
    from specdec.train.processes import process_group
    from specdec.train.progress import Progress
    from specdec.train.trainer import train as run_training

    screen.use_threads(arguments.threads)
    out, err = screen.consoles()
    target, tokenizer = _load_target(arguments)
    is_first = process_group(target.device).is_main_process
    torch.manual_seed(arguments.seed)
    found: type[Objective] = registry.find("trainer", kind)
    objective = create(found, target, tokenizer, **{name: getattr(arguments, name) for name in defaults(found)})
    data = prepare_data(found, arguments, target, tokenizer, err)
    progress = Progress(err if is_first and not arguments.quiet else None)
    count = sum(p.numel() for p in objective.module.parameters() if p.requires_grad)
    progress.say(
        f"{kind}: {screen.count(count)} trained parameters; {len(data.train)} rows of {data.train.length} tokens, "
        f"{len(data.held_out)} held out"
    )
    report = run_training(objective, data, settings, progress)
    if is_first:
        _show(report, arguments, out)
        screen.write_json(
            arguments.json,
            {
                "kind": report.kind,
                "out": str(report.out),
                "steps": report.steps,
                "tokens": report.tokens,
                "seconds": report.seconds,
                "ended": report.ended,
                "best": report.best,
                "curve": report.curve,
                "versions": screen.versions(),
            },
        )
    return 0
