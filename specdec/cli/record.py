"""`specdec record`: keep what target and drafter say, position by position."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.replay import Recording

# Larger recordings need a word.
_LARGE = 1 << 30

_EXAMPLES = """\
examples:
  specdec record --out trace.safetensors                          the embedded pair, at temperature 0
  specdec record --out trace.safetensors --temperature 1 --seed 1 --depth 12
  specdec record --drafter ngram --limit 4 --out ngram.safetensors
  specdec replay trace.safetensors --k 1,2,4,8 --tree '4,2,1'      every setting, without a model
  specdec plan --trace trace.safetensors                           costs measured here, acceptance from the trace

The texts are plain decoding's. At every position the drafter also drafts a chain of --depth tokens, so that recording
takes longer than decoding: about depth + 1 draft steps and a wide target step for every token.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "record",
        help="keep what target and drafter say, position by position",
        description="Decode prompts plainly, and at every position write down what the drafter would propose from "
        "there: for `specdec replay` and `specdec plan --trace`.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("recording")
    group.add_argument("--out", required=True, metavar="FILE", help="the trace, as safetensors")
    group.add_argument("--depth", type=int, default=8, metavar="K", help="tokens drafted everywhere (default: 8)")
    group.add_argument(
        "--top-m", type=int, default=64, metavar="M", help="entries of each row of p and q that are kept (default: 64)"
    )
    group.add_argument("--no-costs", action="store_true", help="do not time bare steps: no predicted speed-ups")
    group.add_argument("--yes", action="store_true", help="write more than a GiB without being asked")
    prompt_options.add_prompt_options(group, limit=8)
    options.add_text_options(parser, max_new_tokens=64)
    options.add_model_options(parser)
    parser.set_defaults(run=run, exact=False, allow_lossy=False, verifier=None, policy="fixed", policy_option=[])
    parser.set_defaults(k=None, tree=None, threshold=None, tree_plan=None)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("depth", "top_m", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is a whole number >= 1, not {getattr(arguments, name)}")
    out = Path(arguments.out)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: give the name of a file in a folder that is there")


def _setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the models and texts are called, in the fields of a sweep's setting."""
    names = [
        "max_new_tokens", "repetition_penalty", "limit", "limit_per_category", "turns", "quantize", "draft_quantize",
        "kv_cache", "dtype", "backend", "numerics", "threads", "device",
    ]  # fmt: skip
    found = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return {
        **found,
        "target": options.describe_target(arguments),
        "drafter": options.chosen_drafter(arguments),
        "drafter_options": dict(arguments.drafter_option),
        "prompt_set": arguments.prompts or "built-in",
        "chat": prompt_options.chat(arguments) is not None,
        "truncate": arguments.truncate_prompts,
    }


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    screen.quiet(arguments)
    from specdec.cli.compare import progress_bar
    from specdec.replay import record
    from specdec.replay.recording import bytes_per_position

    chosen = prompt_options.selection(arguments)
    found = chosen.read()
    decoder = options.build_decoder(arguments, prefix_cache=0)
    out, err = screen.consoles()
    texts = options.generation_options(arguments)
    screen.warm_up(decoder, err)
    encoded = prompt_options.encode(chosen, found, decoder, texts, err)
    top_m = min(arguments.top_m, decoder.backend.capabilities.vocab_size)
    per_position = bytes_per_position(arguments.depth, top_m)
    size = len(encoded) * arguments.max_new_tokens * per_position + 4 * sum(len(one.ids) for one in encoded)
    err.print(
        f"{len(encoded)} prompts of at most {arguments.max_new_tokens} tokens, {per_position:,} bytes each: "
        f"at most {screen.size(size)}"
    )
    if size > _LARGE and not arguments.yes:
        raise InputError(
            f"the recording may take {screen.size(size)}: say --yes, or lower --limit, --max-new-tokens, --depth or "
            "--top-m"
        )
    with progress_bar(err, "recording") as progress:
        made = record(
            decoder,
            [list(one.ids) for one in encoded],
            depth=arguments.depth,
            top_m=top_m,
            costs=not arguments.no_costs,
            setting=_setting(arguments),
            names=[one.id for one in encoded],
            tick=progress,
            **texts,
        )
    made.save(arguments.out)
    _show(out, made, arguments.out)
    return 0


def _show(console: Console, made: Recording, path: str) -> None:
    meta, depth = made.meta, made.depth
    tokens = sum(text.num_tokens for text in made.texts)
    console.print(f"{meta['drafter']} for {meta['setting'].get('target', 'the target')}: {tokens} tokens of", end=" ")
    console.print(f"{len(made.texts)} texts, {depth} drafted everywhere, temperature {meta['sampling']['temperature']}")
    survival = ", ".join(f"{p:.3f}" for p in made.survival(depth))
    console.print(f"the first 1 … {depth} drafted tokens are the text's, at any position: {survival}")
    if meta["memory"] == "rounds":
        console.print(f"what {meta['drafter']} proposes depends on earlier rounds: replays of it are estimates")
    if meta["num_inconsistent"]:
        console.print(
            f"at {meta['num_inconsistent']} positions steps of different widths chose different tokens: replays are "
            "estimates (record in float32, or with --numerics invariant)",
            style="yellow",
        )
    console.print(f"written: {path}, {screen.size(Path(path).stat().st_size)} (specdec replay {path})")
