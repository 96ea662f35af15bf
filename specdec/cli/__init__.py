"""The command line: `specdec COMMAND`.

Nothing heavy is imported before the arguments are parsed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from specdec import __version__
from specdec.errors import SpecdecError

COMMANDS = {
    "compare": "plain against speculative, side by side",
    "sweep": "many settings, resumable, one table",
    "record": "keep what target and drafter say, position by position",
    "replay": "any setting's acceptance from a recorded trace",
    "plan": "will it pay here, and with which setting?",
    "report": "a page, plots or tables of a sweep's store",
    "diff": "do two stores differ by more than noise?",
    "bench": "our loop, transformers and other engines, timed in turns",
    "generate": "continue a prompt",
    "train": "train a drafter for a target",
    "export": "a model as ahead-of-time graphs that run without its weights",
    "verify-backend": "does an artefact say what its model says?",
    "quantize": "store a model's weights in fewer bits",
    "tree": "fit a draft tree to a pair and this machine",
    "vocab": "choose the tokens that a draft predicts",
    "certify": "prove by enumeration that verifiers are exact",
    "info": "models, plugins, device, dtype, versions",
}

_DESCRIPTION = "Exact speculative decoding. Commands run on the embedded model pair unless --target names another."
_EXAMPLES = """\
examples:
  specdec compare                                  plain against speculative, side by side
  specdec generate "def quicksort(items):" --show-origin
  specdec compare --target org/target --drafter org/draft --dtype bfloat16
  specdec certify                                  is every verification rule exact?
  specdec info
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    command: str | None = None  # on the line, for the hint

    def error(self, message: str) -> NoReturn:
        prog = f"{self.prog} {self.command}" if self.command in COMMANDS else self.prog
        self.exit(2, f"error: {message} (try: {prog} --help)\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own options are filled in, for a command may import what it likes."""
    parser = Parser(
        prog="specdec",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.command = command
    parser.add_argument("--version", action="version", version=f"specdec {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, text in COMMANDS.items():
        if name != command:
            subparsers.add_parser(name, help=text)
            continue
        importlib.import_module(f"specdec.cli.{name.replace('-', '_')}").add_parser(subparsers)
        if "--debug" not in subparsers.choices[name]._option_string_actions:
            # SUPPRESS: `specdec --debug compare` is not undone by the command's own default.
            subparsers.choices[name].add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
            )
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 fine, 1 a check failed, 2 wrong input, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    # Options that stand before the command take no values, so the first bare word is the command.
    command = next((word for word in given if not word.startswith("-")), None)
    arguments = build_parser(command).parse_args(given)
    try:
        return int(arguments.run(arguments) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`); keep the interpreter's last flush from complaining about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SpecdecError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
