"""Options that say which prompts are decoded, and how they are put to the model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.api import SpeculativeDecoder
    from specdec.bench.prompt_sets import Encoded, Selection
    from specdec.bench.prompts import PromptSet
    from specdec.chat import Chat

# A template is a page of text; anything larger is another file.
_MAX_TEMPLATE = 1 << 20


def add_prompt_options(group: Any, *, limit: int | None = None) -> None:
    """`--prompts` and what belongs to it. `limit`: how many prompts are taken unless it is said."""
    group.add_argument(
        "--prompts",
        metavar="NAME|FILE",
        help="built-in: beginnings of Python source, which the embedded pair never saw (default); or a file: JSON "
        "lines or an array with text, prompt (HumanEval), turns (Spec-Bench, MT-Bench), question (GSM8K), messages or "
        "conversations (chats), in gzip or not; or text with one prompt per line",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", default=limit, help=f"only the first N prompts (default: {limit or 'all'})"
    )
    group.add_argument(
        "--limit-per-category",
        type=int,
        metavar="N",
        help="only the first N prompts of each category; MT-Bench counts as one of Spec-Bench's six",
    )
    group.add_argument("--turns", type=int, metavar="N", help="only the first N turns of a conversation (default: all)")
    group.add_argument(
        "--truncate-prompts",
        action="store_true",
        help="cut prompts that are too long for the model's context, in front, instead of refusing them",
    )


def add_published_option(group: Any) -> None:
    """For commands that print Spec-Bench's table."""
    group.add_argument(
        "--published", action="store_true", help="with Spec-Bench: print its published table too (other hardware)"
    )


def _key_value(text: str) -> tuple[str, Any]:
    from specdec.cli.options import key_value  # that page imports this one

    return key_value(text)


def add_chat_options(group: Any) -> None:
    """`--chat` and how the template is filled in."""
    group.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    group.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the model's; means --chat")
    group.add_argument(
        "--chat-option",
        metavar="KEY=VALUE",
        type=_key_value,
        action="append",
        default=[],
        help="a variable that the template reads, such as enable_thinking=false; repeatable; means --chat",
    )


def chat(arguments: argparse.Namespace) -> Chat | None:
    """What the chat options say; None without any. Raises `InputError` for a template that cannot be read."""
    from specdec.chat import Chat

    if not (arguments.chat or arguments.chat_template or arguments.chat_option):
        return None
    template = None
    if arguments.chat_template is not None:
        path = Path(arguments.chat_template)
        try:
            if path.is_file() and path.stat().st_size > _MAX_TEMPLATE:
                raise InputError(f"--chat-template {path}: {path.stat().st_size:,} bytes are no template")
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise InputError(f"--chat-template {path}: {reason}") from error
        if not template.strip():
            raise InputError(f"--chat-template {path}: the file is empty")
    return Chat(template, dict(arguments.chat_option))


def selection(arguments: argparse.Namespace) -> Selection:
    """Everything that the options of this page say."""
    from specdec.bench.prompt_sets import Selection

    return Selection(
        arguments.prompts,
        arguments.limit,
        arguments.limit_per_category,
        arguments.turns,
        arguments.truncate_prompts,
        chat(arguments),
    )


def encode(
    chosen: Selection, found: PromptSet, decoder: SpeculativeDecoder, texts: dict[str, Any], err: Console
) -> list[Encoded]:
    """Ids of all turns, with a bar where first answers have to be decoded; remarks about them go to `err`."""
    from specdec.bench.prompt_sets import describe_cuts
    from specdec.cli.compare import progress_bar

    with progress_bar(err, "answering first turns") as progress:
        encoded = chosen.encode(decoder, found.prompts, texts, progress)
    for note in (*found.notes, describe_cuts(encoded)):
        if note:
            err.print(f"note: {note}", style="yellow", markup=False)
    return encoded
