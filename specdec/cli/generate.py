"""`specdec generate`: a text as it comes, and who produced which token."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import options, prompt_options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.decoder import Task
    from specdec.generation import Stream
    from specdec.text import Chunk

_EXAMPLES = """\
examples:
  specdec generate "def quicksort(items):"
  specdec generate "class Stack:" --show-origin --max-new-tokens 64
  specdec generate "import os" --temperature 0.8 --top-p 0.95 --seed 3 --quiet
  echo "def main():" | specdec generate --drafter ngram --json out.json
  specdec generate "import os" --quantize mxfp6_e2m3 --draft-quantize mxfp4
"""
_TARGET_STYLE, _DRAFTER_STYLE = "bold yellow", "green"


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt. Prompt and text are streamed to stdout, everything else goes to stderr.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue (default: stdin)")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--show-origin", action="store_true", help="colour tokens by who produced them")
    parser.add_argument("--json", metavar="FILE", help="write text, tokens, origins and statistics")
    parser.add_argument("--quiet", action="store_true", help="no statistics at the end")
    options.add_text_options(parser, max_new_tokens=128)
    options.add_method_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise InputError("give the prompt as an argument or with --prompt-file, not both")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"cannot read {arguments.prompt_file}: {reason}") from error
    if sys.stdin.isatty():
        raise InputError("no prompt: give one as an argument, with --prompt-file FILE, or through a pipe")
    return sys.stdin.read()


class Colours:
    """Prints a stream's text in the colour of its origin.

    Pieces are cut by token here and by certainty in the stream, so pieces wait in a queue until the stream shows
    their characters. Without colours, drafted text stands in ⟨brackets⟩.
    """

    def __init__(self, console: Console, tokenizer: Any, prompt: list[int]):
        from specdec.text import Detokenizer

        self.console = console
        self.plain = console.color_system is None
        self.detokenizer = Detokenizer(tokenizer, prompt)
        self.waiting: list[tuple[str, str]] = []  # (text, origin)
        self.open = False  # a bracket

    def _print(self, text: str, origin: str) -> None:
        drafted = origin != "target"
        if self.plain:
            if drafted != self.open:
                self.console.out("⟨" if drafted else "⟩", end="")
                self.open = drafted
            self.console.out(text, end="")
        else:
            self.console.out(text, end="", style=_DRAFTER_STYLE if drafted else _TARGET_STYLE)

    def show(self, chunk: Chunk) -> None:
        for token, origin in zip(chunk.tokens, chunk.origins, strict=True):
            self.waiting.append((self.detokenizer.push([token]), origin))
        left = chunk.text
        while left and self.waiting:
            text, origin = self.waiting.pop(0)
            if len(text) > len(left):
                self.waiting.insert(0, (text[len(left) :], origin))
                text = left
            self._print(text, origin)
            left = left[len(text) :]
        if left:  # bytes that became certain only because the text ended
            self._print(left, chunk.origins[-1])

    def close(self) -> None:
        if self.open:
            self.console.out("⟩", end="")

    def legend(self, drafter: str) -> str:
        if self.plain:
            return f"⟨drafted by {drafter}⟩ · by the target"
        return f"[{_DRAFTER_STYLE}]■ drafted by {drafter}[/] · [{_TARGET_STYLE}]■ by the target[/]"


def _show(stream: Stream, colours: Colours | None) -> None:
    for chunk in stream:
        if colours is not None:
            colours.show(chunk)
        else:
            sys.stdout.write(chunk.text)
        sys.stdout.flush()


def _summary(task: Task, wall: float) -> str:
    stats, ending = task.trace.stats, task.ending
    seconds = "  ".join(f"{name} {value:.2f}" for name, value in stats.seconds.items())
    why = {"eos": "end of text", "stop": "stop string", "length": "length", "context": "the model's context is full"}
    lines = [
        f"{stats.num_tokens} tokens in {wall:.2f} s, {stats.num_tokens / wall:.0f} tokens/s, "
        f"ended by: {why.get(str(ending.reason), ending.reason)}",
        f"{stats.num_rounds} rounds of {stats.mean_acceptance_length:.2f} tokens; "
        f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens} drafted tokens accepted "
        f"({stats.draft_acceptance_rate:.0%})",
        f"seconds: {seconds}",
    ]
    if stats.num_redecided:
        lines.append(f"{stats.num_redecided} doubtful positions decided again at width 1")
    if not stats.lossless:
        lines.append("LOSSY: this verifier does not keep the target's distribution")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    prompt = read_prompt(arguments)
    screen.quiet(arguments)
    decoder = options.build_decoder(arguments)
    chat = prompt_options.chat(arguments)
    text = chat.encode(decoder.tokenizer, [{"role": "user", "content": prompt}]) if chat is not None else prompt
    stream = decoder.stream(text, **options.generation_options(arguments))
    task = stream.task
    out, err = screen.consoles()
    colours = Colours(out, decoder.tokenizer, list(task.request.prompt)) if arguments.show_origin else None
    if chat is None:
        sys.stdout.write(prompt)
    started = time.perf_counter()
    try:
        _show(stream, colours)
    finally:
        if colours is not None:
            colours.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
    wall = time.perf_counter() - started
    if colours is not None:
        err.print(colours.legend(decoder.drafter.name))
    if not arguments.quiet:
        err.print(_summary(task, wall), style="dim", markup=False)
    screen.write_json(
        arguments.json,
        {
            "target": options.describe_target(arguments),
            "drafter": options.chosen_drafter(arguments),
            "verifier": decoder.verifier.name,
            "policy": decoder.policy.name,
            "versions": screen.versions(),
            "options": {**options.generation_options(arguments)},
            "prompt": prompt,
            "text": task.ending.text,
            "tokens": task.ending.tokens,
            "origins": task.ending.origins,
            "finish_reason": task.ending.reason,
            "wall_seconds": wall,
            "stats": task.trace.stats.as_dict(),
        },
    )
    return 0
