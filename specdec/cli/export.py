"""`specdec export`: a model as graphs of fixed width that run without its weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specdec.cli import options, screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from specdec.export.manifest import Manifest
    from specdec.export.options import Options

AUTO = "auto"
# Flags that only some backends know, as fields of their options.
_OWN = ("attention", "delegate", "device", "kv", "parts", "recipe", "soc")

_EXAMPLES = """\
examples:
  specdec export --out target.artifact                        the embedded target
  specdec export org/model --prefill-len 32 --k 0,3,7 --max-seq-len 512 --out model.artifact
  specdec export org/draft --k 0,1 --out draft.artifact       a draft: one row, and two after full acceptance
  specdec export org/model --k auto                           widths by what graphs cost on this machine
  specdec export --recipe w4a8-head8 --out small.artifact     weights of 4 bits, those of the output layer of 8
  specdec export --backend qnn --soc sm8650 --k 0,7 --out phone.artifact      for the NPU of a Snapdragon 8 Gen 3
  specdec generate "def f(" --artifact model.artifact --drafter ngram
  specdec compare --artifact model.artifact --drafter-artifact draft.artifact

A dozen layers take minutes. The same model with the same options is exported once, and found from then on.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="a model as ahead-of-time graphs",
        description="Write a model as one program of fixed-width graphs (prefill, decode, verification of k tokens) "
        "that share weights, keys and values, with its tokenizer and a manifest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="hub id or folder (default: the embedded pair's target)"
    )
    parser.add_argument(
        "--backend", default="executorch",
        help="what will run the graphs: executorch, openvino, aoti, qnn (default: executorch)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where to write (default: kept by key in the cache folder)")
    group = parser.add_argument_group("graphs")
    group.add_argument(
        "--prefill-len", type=int, metavar="N",
        help="rows of the graph that reads prompts; 1: none, the decode graph reads them (default: 32)",
    )  # fmt: skip
    group.add_argument(
        "--k", type=_widths, metavar="K,K",
        help="drafted tokens per verification, a graph of k + 1 rows for each; auto: as their costs propose, which are "
        "measured here on the model's first layers (default: 0,3,6)",
    )  # fmt: skip
    group.add_argument("--max-seq-len", type=int, metavar="N", help="the context (default: 512)")
    group.add_argument("--max-nodes", type=int, metavar="N", help="the largest tree that is verified (default: 32)")
    group.add_argument(
        "--hidden", type=options.whole_numbers, metavar="I,I",
        help="hidden states that graphs return, for drafters that read them (eagle, medusa, parallel)",
    )  # fmt: skip
    own = parser.add_argument_group("what only some backends know")
    own.add_argument(
        "--parts", type=int, metavar="N",
        help="executorch, qnn: spread the layers over N programs that run in turn, each below what a device takes at "
        "once (default: 1)",
    )  # fmt: skip
    own.add_argument(
        "--recipe", metavar="NAME",
        help="how weights are stored (default: as they are); executorch: int8, w4a8, w4a8-head8, w4a8-head8-gptq, … "
        "or a JSON file; qnn: fp16, w8a16, w4a16",
    )  # fmt: skip
    own.add_argument(
        "--calibration", default="self", metavar="FILE",
        help="text or JSONL that recipes with a method look at activations on; self: the model writes it (default); "
        "stdlib: the source of the Python standard library. Never the text that the artefact is judged by",
    )  # fmt: skip
    own.add_argument(
        "--attention", help="executorch: by its operators for language models, custom, or plain (default: custom)"
    )
    own.add_argument(
        "--delegate",
        help="executorch: who runs the products, xnnpack, portable, vulkan, coreml, openvino or qnn (default: xnnpack)",
    )
    own.add_argument("--device", help="openvino: where the graph will run, CPU, GPU, GPU.1, NPU (default: CPU)")
    own.add_argument(
        "--kv",
        help="executorch: who writes keys and values, graph, host, or both: --kv-updater chooses (default: graph)",
    )
    own.add_argument("--soc", metavar="NAME", help="qnn: the chip, such as sm8650 (Snapdragon 8 Gen 3; the default)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", metavar="FILE", help="write the manifest")
    parser.set_defaults(run=run)


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str], None]]:
    """The stage at work with its seconds, and one line for each that is over."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    )
    task, current, began = bar.add_task("looking at the model", total=None), "", time.monotonic()

    def finish() -> None:
        if current:
            console.print(f"{current}: {time.monotonic() - began:.1f} s", style="dim", markup=False)

    def tell(stage: str) -> None:
        nonlocal current, began
        finish()
        current, began = stage, time.monotonic()
        bar.reset(task, description=stage)

    with bar:
        yield tell
        finish()


def _covered(found: Mapping[str, int] | None) -> str:
    """Of the operators of a graph, those that the delegate took."""
    if found is None:
        return ""
    return f", {found['delegated']} operators in {found['delegates']} delegated parts, {found['outside']} outside"


def _show(console: Console, folder: str, manifest: Manifest) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    sizes, coverage = manifest.about["sizes"], manifest.about.get("coverage", {})
    model, given = manifest.model, manifest.options
    table.add_row("model", f"{model['class']}, {model['parameters'] / 1e6:.1f}M weights in {model['dtype']}")
    for method in given.methods:
        graphs = [name for name in (method.name, f"host_{method.name}") if name in coverage] or [method.name]
        for name in graphs:
            table.add_row(name, f"{method.width} rows{_covered(coverage.get(name))}")
    share = sizes["program_bytes"] / sizes["weight_bytes"]
    table.add_row("program", f"{sizes['program_bytes'] / 1e6:.1f} MB, {share:.2f} times the weights")
    if "layers" in model.get("stored", {}):
        layers = ", ".join(f"{count} layers in {name}" for name, count in model["stored"]["layers"].items())
        table.add_row("weights", f"{layers}; {sizes['stored_bytes'] / 1e6:.1f} MB with embeddings and norms")
    table.add_row("keys, values", f"{sizes['slot_bytes'] / 1e6:.1f} MB for {given.max_seq_len} positions")
    table.add_row("made in", f"{manifest.about['total_seconds']:.0f} s")
    table.add_row("key", manifest.key)
    table.add_row("folder", folder)
    console.print(table)


def _widths(text: str) -> tuple[int, ...] | str:
    return text if text == AUTO else options.whole_numbers(text)


def _proposed(model: Any, given: Options, text: Any, tell: Callable[[str], None], console: Console) -> Options:
    """The options with the k that the costs of graphs propose, and a word on why."""
    from dataclasses import replace

    from specdec.export import widths

    found = widths.propose(widths.measure_curve(model, given, tell, calibration_BT=text))
    costs = ", ".join(f"{width}: {1e3 * seconds:.2f}" for width, seconds in found.curve.items())
    console.print(f"rows: ms of a step   {costs}", markup=False, highlight=False)
    best = ", ".join(f"{found.best(a)} at {a:.0%}" for a in widths.ACCEPTANCE)
    console.print(
        f"--k {','.join(map(str, found.k))}   {found.share:.0%} of the speed of graphs of every width; best k by "
        f"acceptance: {best}",
        markup=False,
        highlight=False,
    )
    return replace(given, k=found.k)


def _given(arguments: argparse.Namespace) -> Options:
    """Options of the chosen backend. Raises `InputError` for a flag that it does not know."""
    from specdec.export.exporter import exporter

    kind = exporter(arguments.backend).options
    names = ("prefill_len", "k", "max_seq_len", "max_nodes", "hidden", *_OWN)
    return kind.of({name: value for name in names if (value := getattr(arguments, name)) not in (None, AUTO)})


def _calibration(
    arguments: argparse.Namespace, given: Options, model: Any, tokenizer: Any, tell: Callable[[str], None]
) -> Any:
    """Tokens for a recipe that looks at activations; None for all others."""
    from specdec.export.exporter import exporter
    from specdec.quant.methods import calibration

    if not exporter(given.backend).needs_text(given):
        return None
    tell("calibration text")
    return calibration.tokens(arguments.calibration, model, tokenizer)


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    screen.quiet(arguments)
    from specdec.export.artifact import export
    from specdec.export.manifest import Manifest, is_artifact
    from specdec.loading import EMBEDDED, load_model, load_tokenizer

    given = _given(arguments)
    source = arguments.target or str(EMBEDDED / "target")
    if is_artifact(source):
        raise InputError(f"{source} is an artefact already; export starts from the model")
    out, err = screen.consoles()
    with _stages(err) as tell:
        model = load_model(source, device="cpu", dtype="float32", trust_remote_code=arguments.trust_remote_code)
        tokenizer = load_tokenizer(source, arguments.trust_remote_code)
        text = _calibration(arguments, given, model, tokenizer, tell)
        if arguments.k == AUTO:
            given = _proposed(model, given, text, tell, out)
        folder = export(model, given, tokenizer=tokenizer, out=arguments.out, calibration_BT=text, tell=tell)
    manifest = Manifest.read(folder)
    _show(out, str(folder), manifest)
    screen.write_json(arguments.json, {**manifest.contract, "files": manifest.files, "about": manifest.about})
    return 0
