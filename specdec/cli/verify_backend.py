"""`specdec verify-backend`: does an artefact say what its model says?"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.cli import screen
from specdec.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from torch import Tensor

    from specdec.export.artifact import ArtifactModel
    from specdec.export.artifact_texts import Identity, Text
    from specdec.export.evaluate import Evaluation

_EXAMPLES = """\
examples:
  specdec export --recipe w4a8-head8 --out target.artifact
  specdec verify-backend target.artifact                         of the embedded target
  specdec verify-backend model.artifact --target org/model --text held_out.txt --json found.json
  specdec verify-backend model.artifact --target org/model --min-agreement 0.99 --min-sqnr 40

Three phases, where the recipe rounds: full precision, the rounded model in torch, the artefact. Exit code 1: the
artefact is further from the rounded model than the limits allow, or speculative texts are not its plain ones.
"""
# By the phase that the artefact is compared with. Steps of another shape sum in another order: where that moves an
# activation over the edge of a rounding step, a whole step shows, and in float32 nothing but the last digits. What is
# rounded in the graphs alone is as far from full precision as the recipe takes it.
_PLAIN, _ROUNDED, _ALONE = (0.999, 60.0), (0.97, 25.0), (0.0, -math.inf)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify-backend",
        help="does an artefact say what its model says?",
        description="Judge an artefact of any backend by the model that it was exported from: loss, signal-to-noise "
        "ratio of every output, first choices, divergence, where greedy texts part; and the artefact by itself: its "
        "graphs against each other, its speculative texts against its plain ones.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("artifact", metavar="ARTIFACT", help="a folder that specdec export wrote")
    parser.add_argument("--target", metavar="ORIGINAL", help="what was exported (default: the embedded target)")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", metavar="FILE", help="text or JSONL (default: files of the standard library that are held out)"
    )
    group.add_argument("--rows", type=int, default=16, metavar="N", help="of text (default: 16)")
    group.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a row (default: 128)")
    group.add_argument("--texts", type=int, default=4, metavar="N", help="that are decoded, from rows on (default: 4)")
    group.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="of each of them (default: 48)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="which rows of the text")
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--min-agreement", type=float, metavar="SHARE",
        help=f"of tokens with the reference's first choice (default: {_PLAIN[0]}; rounded: {_ROUNDED[0]})",
    )  # fmt: skip
    group.add_argument(
        "--min-sqnr", type=float, metavar="DB",
        help=f"of the logits to the reference's (default: {_PLAIN[1]:g}; rounded: {_ROUNDED[1]:g})",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.set_defaults(run=run)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("rows", 1), ("length", 2), ("texts", 0), ("max_new_tokens", 1)):
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is a whole number >= {least}, not {getattr(arguments, name)}")
    if arguments.texts > arguments.rows:
        raise InputError(f"--texts {arguments.texts}: texts begin as rows do, and there are {arguments.rows} rows")
    if arguments.min_agreement is not None and not 0 <= arguments.min_agreement <= 1:
        raise InputError(f"--min-agreement is a share from 0 to 1, not {arguments.min_agreement}")


def _original(arguments: argparse.Namespace, artifact: ArtifactModel) -> Any:
    """The model that was exported, in the dtype that it was exported from."""
    from specdec.export.evaluate import check_origin
    from specdec.loading import EMBEDDED, load_model

    source = arguments.target or str(EMBEDDED / "target")
    dtype = artifact.manifest.model["dtype"]
    model = load_model(source, device="cpu", dtype=dtype, trust_remote_code=arguments.trust_remote_code)
    check_origin(artifact, model)
    return model


def _rows(arguments: argparse.Namespace, artifact: ArtifactModel) -> Tensor:
    """Rows of the text, in random order."""
    from specdec.export.evaluate import held_out_rows
    from specdec.loading import load_tokenizer

    tokenizer = load_tokenizer(artifact.folder, arguments.trust_remote_code)
    length = min(arguments.length, artifact.manifest.options.max_seq_len)
    text = Path(arguments.text) if arguments.text else None
    return held_out_rows(text, tokenizer, arguments.rows, length, arguments.seed)


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return "equal" if math.isinf(value) else format(value, form)


def _show_phases(console: Console, found: Evaluation) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{found.tokens} tokens of text", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for heading in ("loss, nats/token", "", "KL to full", "same first choice", "SQNR, dB"):
        table.add_column(heading, justify="right")
    full = found.loss[found.phases[0]]
    for name in found.phases:
        distance = found.to_full.get(name)
        cells = ("", "", "", "")
        if distance is not None:
            cells = (
                f"{found.loss[name] - full:+.4f}", f"{distance.kl:.2e}", f"{distance.agreement:.2%}",
                _number(distance.sqnr["logits"], ".1f"),
            )  # fmt: skip
        table.add_row(name, f"{found.loss[name]:.4f}", *cells)
    console.print(table)


def _show_artifact(console: Console, found: Evaluation) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="the artefact, against", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("same first choice", "SQNR, dB", "worst row", "largest difference"):
        table.add_column(heading, justify="right")
    reference = found.to_reference
    others = {f"{graph.name} against one row": graph.distance for graph in found.graphs}
    for name, distance in {found.reference: reference, **others}.items():
        cells = (_number(distance.sqnr["logits"], ".1f"), _number(distance.worst, ".1f"), f"{distance.largest:.2g}")
        table.add_row(name, f"{distance.agreement:.2%}", *cells)
        for output, decibels in distance.sqnr.items():
            if output != "logits":
                table.add_row(f"  {output}", "", _number(decibels, ".1f"), "", "")
    console.print(table)


def _parting(texts: Sequence[Text]) -> str:
    parted = [text.index for text in texts if text.index is not None]
    margins = [text.margin for text in texts if text.margin is not None]
    said = f"{len(texts) - len(parted)} of {len(texts)} greedy texts are those of full precision"
    if parted:
        said += f"; the others part at token {statistics.median(parted):g}"
        said += f", {statistics.median(margins):.3f} logits apart there (medians)" if margins else " (median)"
    return said


def _identity(found: Identity) -> str:
    said = (
        f"speculative texts (k = {found.k}, greedy and sampled): {found.identical} of {found.texts} are the plain ones"
    )
    if found.acceptance is not None:
        said += f", {found.acceptance:.0%} of the full-precision model's proposals accepted"
    return said + (f"; {len(found.ties)} part at ties within rounding" if found.ties else "")


def _faults(arguments: argparse.Namespace, found: Evaluation, recipe: str | None) -> list[str]:
    usual = _PLAIN if recipe is None else _ALONE if found.reference == found.phases[0] else _ROUNDED
    agreement = usual[0] if arguments.min_agreement is None else arguments.min_agreement
    least = usual[1] if arguments.min_sqnr is None else arguments.min_sqnr
    faults = []
    if found.to_reference.agreement < agreement:
        faults.append(f"{found.to_reference.agreement:.2%} of first choices are the reference's, not {agreement:.2%}")
    if found.to_reference.sqnr["logits"] < least:
        faults.append(f"the logits are {found.to_reference.sqnr['logits']:.1f} dB from the reference's, not {least:g}")
    for graph in found.graphs:
        if graph.distance.agreement < agreement:
            faults.append(f"{graph.name} has {graph.distance.agreement:.2%} of the first choices of one row a step")
    return faults + [f"a speculative text is not the plain one. {bug}" for bug in found.identity.bugs]


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    screen.check_writable(arguments.json)
    screen.quiet(arguments)
    screen.use_threads(arguments.threads)
    from specdec.cli.compare import progress_bar
    from specdec.export.artifact import ArtifactModel
    from specdec.export.evaluate import evaluate

    out, err = screen.consoles()
    artifact = ArtifactModel.open(arguments.artifact)
    model = _original(arguments, artifact)
    rows_RT = _rows(arguments, artifact)
    prompts = [row[: max(1, len(row) // 4)].tolist() for row in rows_RT[: arguments.texts]]
    with progress_bar(err, "verifying") as progress:
        found = evaluate(artifact, model, rows_RT, prompts, new_tokens=arguments.max_new_tokens, told=progress)
    _show_phases(out, found)
    _show_artifact(out, found)
    for name, texts in found.texts.items() if prompts else ():
        out.print(f"{name}: {_parting(texts)}", markup=False, soft_wrap=True)
    if found.identity.texts:
        out.print(_identity(found.identity), markup=False, soft_wrap=True)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    faults = _faults(arguments, found, artifact.manifest.options.recipe)
    for fault in faults:
        out.print(f"FAILED: {fault}", markup=False, soft_wrap=True)
    manifest = artifact.manifest
    content = {
        **found.as_dict(), "faults": faults, "artifact": manifest.key, "options": manifest.options.as_dict(),
        "sizes": manifest.about.get("sizes", {}), "versions": screen.versions(),
    }  # fmt: skip
    screen.write_json(arguments.json, content)
    return 1 if faults else 0
