"""`specdec vocab`: choose the tokens that a draft model predicts, by their frequency in a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from specdec.cli import screen
from specdec.errors import InputError

_EXAMPLES = """\
examples:
  specdec vocab --size 1024 --out python.safetensors             of the embedded target, from its own training text
  specdec vocab --target org/target --data texts.jsonl --size 32000 --out frequent.safetensors
  specdec compare --target org/target --drafter org/draft --drafter-option vocabulary=frequent.safetensors
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "vocab",
        help="choose the tokens that a draft predicts",
        description="Write a draft vocabulary: the most frequent tokens of a text, and all special tokens. A draft "
        "model whose head is cut to them is cheaper; what lies outside is never drafted, and the text stays exact.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--target", metavar="T", help="hub id or folder (default: the embedded target)")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="FILE",
        help="text, or JSONL with `text` or `prompt`; repeatable (default for the embedded target: its own training "
        "text, the Python standard library)",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.03, metavar="SHARE", help="of documents to judge by (default: 0.03)"
    )
    parser.add_argument("--size", type=int, required=True, metavar="N", help="tokens of the draft vocabulary")
    parser.add_argument("--out", required=True, metavar="FILE", help="a safetensors file")
    parser.add_argument("--json", metavar="FILE", help="write the coverage of every size shown")
    parser.set_defaults(run=run)


def _sizes(size: int, least: int, most: int) -> list[int]:
    """Those around it, to choose by."""
    return sorted({size, *(n for n in (size // 4, size // 2, size * 2, size * 4) if least < n < most)})


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    out = Path(arguments.out)
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: give the name of a file in a folder that is there")
    screen.quiet(arguments)
    from rich.table import Table
    from transformers import AutoConfig

    from specdec.loading import EMBEDDED, load_tokenizer
    from specdec.train import data, stdlib
    from specdec.vocabulary import always_included, count_tokens, most_frequent

    source = arguments.target or str(EMBEDDED / "target")
    if not arguments.data and arguments.target is not None:
        raise InputError("no text to count: give --data FILE")
    tokenizer = load_tokenizer(source)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--target {source}: {str(error).splitlines()[0]}") from error
    documents = data.read_documents(arguments.data, arguments.held_out) if arguments.data else stdlib.documents()
    vocab_size = max(config.get_text_config(decoder=True).vocab_size, len(tokenizer) if tokenizer is not None else 0)
    counts, held_out = (
        count_tokens(data.encode([d.text for d in documents if d.held_out == side], tokenizer), vocab_size)
        for side in (False, True)
    )
    always = always_included(tokenizer, argparse.Namespace(config=config))
    console, _ = screen.consoles()
    table = Table("tokens", "share of all", "of the text", "of held-out text", box=None)
    rows = []
    for size in _sizes(arguments.size, len(always), vocab_size):
        made = most_frequent(counts, size, always)
        rows.append(
            {
                "size": size,
                "share": size / vocab_size,
                "text": made.coverage(counts),
                "held_out": made.coverage(held_out),
            }
        )
        marker = " ←" if size == arguments.size else ""
        table.add_row(*(f"{rows[-1][k]:.2%}" if k != "size" else f"{size}{marker}" for k in rows[-1]))
        if size == arguments.size:
            facts = {
                "format": "specdec draft vocabulary",
                "target_vocab_size": str(vocab_size),
                "data": ", ".join(Path(path).name for path in arguments.data) or "the Python standard library",
                "counted_tokens": str(int(counts.sum())),
                "held_out_coverage": f"{rows[-1]['held_out']:.6f}",
            }
            type(made)(made.ids_R, facts).save(out)
    console.print(table)
    console.print(
        f"{screen.count(int(counts.sum()))} tokens counted, {screen.count(int(held_out.sum()))} held out. A token "
        f"outside it ends a draft.\nspecdec compare --drafter model --drafter-option vocabulary={out}",
        markup=False,
        soft_wrap=True,
    )
    screen.write_json(arguments.json, {"vocab_size": vocab_size, "chosen": arguments.size, "sizes": rows})
    return 0
