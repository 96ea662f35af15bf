"""`specdec bench`: our loop, transformers and other engines on one pair, timed in turns."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from specdec.cli import options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from specdec.bench.benchmark import Subject

EMBEDDED, DEFAULT_PRESET = "embedded", "134m"
_LARGE = ("134m", "350m", "1b", "3b")
PRESETS = ("tiny", *_LARGE, EMBEDDED)
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64"}
# Fields of single measurements: in --json, not in the line on the screen.
_RAW = ("raw_ms_per_token", "raw_clean")

_EXAMPLES = """\
examples:
  specdec bench --preset tiny --max-new-tokens 32 --repetitions 1        in seconds
  specdec bench                                                          the 134m pair in bfloat16
  specdec bench --dtype fp32 --drafters model,ngram --k 4 --profile
  specdec bench --peer openvino --peer llama.cpp=build/bin --json bench.json
  specdec bench --target org/target --drafter org/draft --backend compiled
  specdec bench --preset tiny --quantize mxfp4 --draft-quantize mxfp4       weights in fewer bits

Presets are random weights of real sizes whose draft agrees with the target 77 % of the time: nothing is downloaded.
The last line of output is the report as JSON.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="our loop, transformers and other engines, timed in turns",
        description="Time plain and speculative decoding, transformers' own generation and other engines on the same "
        "weights, in turns; compare with what the bare forwards allow, and with the project's targets.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--preset", choices=PRESETS, help=f"(default: {DEFAULT_PRESET}, unless --target is given)")
    what.add_argument("--agreement", type=float, metavar="P", help="calibrate the preset to it (default: 0.77)")
    what.add_argument(
        "--draft-vocabulary",
        type=int,
        metavar="N",
        help="let the preset's draft predict only the N most frequent tokens of the target's texts on other prompts",
    )
    what.add_argument("--target", metavar="T", help="hub id or folder, in place of a preset")
    what.add_argument("--drafter", metavar="X", help="the draft model of --target: hub id or folder")
    options.add_quantize_options(what)
    what.add_argument("--drafters", default="model", metavar="A,B", help="model, ngram, … (default: model)")
    what.add_argument(
        "--k", type=options.whole_numbers, default=(3, 4, 5, 6), metavar="3,4", help="constant k's to try"
    )
    what.add_argument(
        "--backend",
        default="both",
        metavar="B",
        help="eager, compiled (cuda on a GPU), both, or another plugin's name (default: both)",
    )
    what.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="openvino, or llama.cpp=FOLDER; repeatable"
    )
    what.add_argument("--no-transformers", action="store_true", help="leave transformers' own generation out")
    what.add_argument("--profile", action="store_true", help="show where a round's time goes")
    where = parser.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    where.add_argument("--dtype", help="bf16, fp32, … (default: bf16 for presets from 134m on, else fp32)")
    where.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: torch's; 1 for the embedded pair)"
    )
    where.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    size = parser.add_argument_group("size of the run")
    size.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    size.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    size.add_argument("--prompts", type=int, default=2, metavar="N", help="(default: 2)")
    size.add_argument("--repetitions", type=int, default=3, metavar="R", help="of every prompt (default: 3)")
    size.add_argument(
        "--retries", type=int, default=3, metavar="N", help="of a timing that other processes disturbed (default: 3)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers, single measurements too")
    parser.set_defaults(run=run)


def chosen_preset(arguments: argparse.Namespace) -> str | None:
    """The preset, or None for `--target`. Raises `InputError` for options that contradict each other."""
    if arguments.target is None:
        if arguments.drafter is not None:
            raise InputError("--drafter names the draft of --target; presets bring their own (see --drafters)")
        preset = str(arguments.preset or DEFAULT_PRESET)
        if preset == EMBEDDED and arguments.agreement is not None:
            raise InputError("--agreement sets a made pair's; the embedded pair's is what its training gave")
        return preset
    if arguments.preset is not None or arguments.agreement is not None:
        raise InputError("--preset and --agreement make a pair, --target loads one: give one or the other")
    return None


def chosen_dtype(arguments: argparse.Namespace, preset: str | None) -> torch.dtype | None:
    from specdec.loading import choose_dtype

    if arguments.dtype is None and preset not in _LARGE:
        return None
    import torch

    name = arguments.dtype or "bf16"
    dtype = choose_dtype(_DTYPES.get(name, name), torch.device("cpu"))
    if not isinstance(dtype, torch.dtype):
        return None  # "auto": the checkpoint's own
    if not dtype.is_floating_point:
        raise InputError(f"--dtype {name}: weights are floating-point here; use bf16, fp32, fp16 or fp64")
    return dtype


def _positive(arguments: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "prompts", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is a whole number >= 1, not {value}")


def build_subject(arguments: argparse.Namespace, say: Callable[[str], None]) -> Subject:
    """Makes or loads the models, and encodes the prompts."""
    import torch

    from specdec.bench import synthetic
    from specdec.bench.benchmark import Subject
    from specdec.bench.rows import BATCH_SIZE
    from specdec.loading import default_device
    from specdec.quant.methods import prepare_model

    preset = chosen_preset(arguments)
    dtype = chosen_dtype(arguments, preset)
    device = options.checked_device(arguments.device) or default_device()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    elif preset == EMBEDDED:
        torch.set_num_threads(1)  # as everywhere with this pair: a second thread slows its small products
    if preset is None or preset == EMBEDDED:
        if arguments.draft_vocabulary is not None:
            raise InputError(
                "--draft-vocabulary counts a preset's own texts; for models on disk make a vocabulary with specdec "
                "vocab, and give it to specdec compare: --drafter-option vocabulary=FILE"
            )
        return _loaded(arguments, device, dtype)
    say(f"making the {preset} pair")
    pair = synthetic.make_pair(
        preset,
        agreement=arguments.agreement,
        dtype=dtype or torch.float32,
        device=device,
        share=False,  # a real draft has bytes of its own to read
        progress=say,
    )
    vocabulary = None
    if arguments.draft_vocabulary is not None:
        from specdec.bench import draft_vocabulary

        say("counting the target's own texts")
        vocabulary = draft_vocabulary.choose(pair, arguments.draft_vocabulary)
    target, draft = pair.target, pair.draft
    if arguments.quantize is not None:
        say(f"rounding the target: {arguments.quantize}")
        target = prepare_model(target, arguments.quantize)
    if arguments.draft_quantize is not None:
        say(f"rounding the draft: {arguments.draft_quantize}")
        draft = prepare_model(draft, arguments.draft_quantize)
    prompts = synthetic.make_prompts(pair.shape, arguments.prompts, arguments.prompt_tokens)
    more = synthetic.make_prompts(pair.shape, BATCH_SIZE, arguments.prompt_tokens, seed=1)
    batch = [*prompts, *more][: max(BATCH_SIZE, len(prompts))]
    return Subject(preset, target, draft, pair.tokenizer, prompts, batch, pair, vocabulary, arguments.quantize)


def _loaded(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> Subject:
    import specdec
    from specdec.bench.benchmark import Subject, make_prompts
    from specdec.bench.prompts import read_prompts
    from specdec.bench.rows import BATCH_SIZE

    drafter = "model" if arguments.target is None else arguments.drafter
    decoder = specdec.load(
        arguments.target,
        drafter,
        device=device,
        dtype=dtype,
        backend="eager",  # the rows open their own
        quantize=arguments.quantize,
        draft_quantize=arguments.draft_quantize,
        trust_remote_code=arguments.trust_remote_code,
    )
    if decoder.tokenizer is None:
        raise InputError(f"--target {arguments.target}: has no tokenizer to encode the prompts with")
    texts = [prompt.text for prompt in read_prompts()]
    prompts = make_prompts(texts, decoder.tokenizer, max(arguments.prompts, BATCH_SIZE), arguments.prompt_tokens)
    draft = getattr(decoder.drafter, "model", None)
    name = EMBEDDED if arguments.target is None else screen.model_name(arguments.target)
    return Subject(name, decoder.target, draft, decoder.tokenizer, prompts[: arguments.prompts], prompts)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0, also when targets are not met: a benchmark reports. 2 for wrong input."""
    screen.check_writable(arguments.json)
    _positive(arguments)
    chosen_preset(arguments)
    screen.quiet(arguments)
    from specdec.bench import peers
    from specdec.bench.benchmark import Settings, benchmark
    from specdec.cli.bench_report import show
    from specdec.cli.compare import progress_bar
    from specdec.loading import default_device

    fast = "cuda" if (options.checked_device(arguments.device) or default_device()).type == "cuda" else "compiled"
    backends = ("eager", fast) if arguments.backend == "both" else (arguments.backend,)
    settings = Settings(
        backends=backends,
        drafters=tuple(dict.fromkeys(arguments.drafters.split(","))),
        ks=tuple(dict.fromkeys(arguments.k)),
        peers=tuple(arguments.peer),
        max_new_tokens=arguments.max_new_tokens,
        repetitions=arguments.repetitions,
        retries=arguments.retries,
        transformers=not arguments.no_transformers,
        profile=arguments.profile,
    )
    out, err = screen.consoles()
    _check_peers(arguments, peers)

    def say(what: str) -> None:
        if err.is_terminal:
            err.print(f"[dim]{what}[/]")

    subject = build_subject(arguments, say)
    with progress_bar(err, "timing") as progress:
        report = benchmark(subject, settings, say=say, progress=progress)
    report = {**report, **_surroundings(subject, out)}
    show(out, report)
    screen.write_json(arguments.json, report)
    short = {**report, "rows": [{k: v for k, v in row.items() if k not in _RAW} for row in report["rows"]]}
    print(json.dumps(short, ensure_ascii=False))
    return 0


def _check_peers(arguments: argparse.Namespace, peers: Any) -> None:
    """Before the models are made: what is missing is known by then."""
    import torch

    if not arguments.peer:
        return
    preset = chosen_preset(arguments)
    if preset in (None, EMBEDDED):
        raise InputError("peers run on a synthetic pair's weights; use --preset 134m, or leave --peer out")
    given = {arguments.quantize, arguments.draft_quantize}
    if given != {None} and (len(given) > 1 or not given <= set(peers.WEIGHTS)):
        raise InputError(
            f"peers round target and draft alike, to {' or '.join(peers.WEIGHTS)}: give --quantize and "
            "--draft-quantize the same one of these, or leave --peer out"
        )
    device = options.checked_device(arguments.device)
    kind = device.type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    peers.check(arguments.peer, kind, chosen_dtype(arguments, preset) or torch.float32)


def _surroundings(subject: Subject, out: Console) -> dict[str, Any]:
    import datetime

    return {
        "date": datetime.date.today().isoformat(),
        "device": screen.device_name(subject.target.device),
        "versions": screen.versions(),
    }
