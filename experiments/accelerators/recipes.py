"""What each recipe of an ExecuTorch artefact costs in quality and saves in size. No speed: any machine will do.

    python experiments/accelerators/recipes.py --torch            every recipe in torch: minutes
    python experiments/accelerators/recipes.py                    and as artefacts, those of `ARTIFACTS`
    python experiments/accelerators/recipes.py --only int8 --rows 4 --texts 1        does it run?

The embedded target, on rows of standard library files that were held out of its training; recipes with a method are
calibrated on others. Three phases: full precision, the rounded model in torch, the artefact (`specdec verify-backend`
does the same for any artefact). An export takes minutes on an idle core; artefacts are kept by key, and rows in
`recipes.json`: a run that was ended goes on there. Delete that file to measure anew. Writes `recipes.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.export import recipes
from specdec.export.artifact import ArtifactModel, export
from specdec.export.distance import LOGITS, Distance
from specdec.export.evaluate import ARTIFACT, FULL, ROUNDED, evaluate, held_out_rows, outputs
from specdec.export.executorch import ExecutorchOptions
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.quant.methods import calibration
from specdec.runtime.backends.eager import EagerBackend
from specdec.train import provenance

HERE = Path(__file__).parent
ROWS, LENGTH, TEXTS, NEW_TOKENS = 24, 128, 8, 64
CALIBRATION_ROWS, CALIBRATION_LENGTH = 32, 256
GRAPHS: dict[str, Any] = {"prefill_len": 1, "k": (0, 6), "max_seq_len": 256, "max_nodes": 8}
NONE = "float32"
ARTIFACTS = (NONE, "int8", "w4a8-head8", "w4a8")


class Study:
    """The model, its text, and what was found so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.path = args, args.out / "recipes.json"
        self.model = load_model(EMBEDDED / "target", device="cpu", dtype="float32")
        self.tokenizer = load_tokenizer(EMBEDDED / "target")
        self.rows_RT = held_out_rows(None, self.tokenizer, args.rows, LENGTH)
        self.setting = {"rows": args.rows, "length": LENGTH, "texts": args.texts, "new_tokens": NEW_TOKENS}
        self._text_BT: torch.Tensor | None = None
        self.found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["setting"] == self.setting:
                self.found = document["recipes"]

    def keep(self, name: str, facts: dict[str, Any]) -> None:
        self.found.setdefault(name, {}).update(facts)
        document = {
            "setting": self.setting,
            "date": datetime.date.today().isoformat(),
            "versions": provenance.versions(),
            "recipes": self.found,
        }
        provenance.write_json(self.path, document)

    def text(self, name: str) -> torch.Tensor | None:
        if name == NONE or not recipes.needs_text(name):
            return None
        if self._text_BT is None:
            size = {"rows": CALIBRATION_ROWS, "length": CALIBRATION_LENGTH}
            self._text_BT = calibration.tokens(calibration.STDLIB, self.model, self.tokenizer, **size)
        return self._text_BT

    @torch.inference_mode()
    def in_torch(self, name: str) -> dict[str, Any]:
        """The rounded model against full precision."""
        stored = recipes.quantise(self.model, name, self.text(name)) if name != NONE else None
        full, rounded = (EagerBackend.open(m) for m in (self.model, stored.model if stored else self.model))
        distance, loss = Distance(), 0.0
        for row_T in self.rows_RT:
            a, b = (outputs(backend, row_T.tolist(), len(row_T)) for backend in (full, rounded))
            distance.add(a, b)
            loss -= float(b[LOGITS][:-1].double().log_softmax(-1).gather(1, row_T[1:, None]).sum())
        size = stored.num_bytes if stored else sum(p.nbytes for p in self.model.parameters())
        judged = len(self.rows_RT) * (LENGTH - 1)
        return {"bytes": size, "loss": loss / judged, **distance.done().as_dict()}

    def as_artifact(self, name: str, console: Console) -> dict[str, Any]:
        options = ExecutorchOptions(recipe=None if name == NONE else name, **GRAPHS)
        tell = lambda stage: console.print(f"  {stage}", style="dim")  # noqa: E731
        text_BT = self.text(name)
        folder = export(self.model, options, tokenizer=self.tokenizer, calibration_BT=text_BT, tell=tell)
        artifact = ArtifactModel.open(folder)
        prompts = [row[: LENGTH // 4].tolist() for row in self.rows_RT[: self.args.texts]]
        found = evaluate(artifact, self.model, self.rows_RT, prompts, new_tokens=NEW_TOKENS).as_dict()
        return {**found, "sizes": artifact.manifest.about["sizes"], "key": artifact.manifest.key}


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def phases(found: dict[str, dict[str, Any]]) -> str:
    full = found[NONE]["torch"]["loss"]
    lines = [
        "| recipe | weights, MB | loss, nats/token | | KL to full precision | same first choice | SQNR of logits, dB |",
        "|---" * 7 + "|",
    ]
    for name in (NONE, *recipes.NAMES):
        row = found.get(name, {})
        if "torch" not in row:
            continue
        one = row["torch"]
        cells = [
            name, f"{one['bytes'] / 1e6:.1f}", f"{one['loss']:.4f}", f"{one['loss'] - full:+.4f}", f"{one['kl']:.5f}",
            f"{one['agreement']:.2%}", _db(one["sqnr"][LOGITS]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def artifacts(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| recipe | program, MB | loss | same first choice as the rounded model | SQNR of logits to it, dB | 7 rows "
        "against 1: same first choice | largest difference | greedy texts of full precision | first other token, "
        "margin (medians) | speculative = plain | accepted |",
        "|---" * 11 + "|",
    ]
    for name, row in found.items():
        if "artifact" not in row:
            continue
        one = row["artifact"]
        reference, graph, texts = one["to_reference"], one["graphs"][0], one["texts"][ARTIFACT]
        parted = [text for text in texts if text["index"] is not None]
        where = "–"
        if parted:
            margins = [text["margin"] for text in parted if text["margin"] is not None] or [float("nan")]
            first = statistics.median(text["index"] for text in parted)
            where = f"{first:g}, {statistics.median(margins):.3f}"
        identity = one["identity"]
        cells = [
            name, f"{one['sizes']['program_bytes'] / 1e6:.1f}", f"{one['loss'][ARTIFACT]:.4f}",
            f"{reference['agreement']:.2%}", _db(reference["sqnr"][LOGITS]), f"{graph['agreement']:.2%}",
            f"{graph['largest']:.2g}", f"{len(texts) - len(parted)}/{len(texts)}", where,
            f"{identity['identical']}/{identity['texts']}", f"{identity['acceptance']:.1%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(study: Study) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    text = (
        f"# Recipes of ExecuTorch artefacts, {datetime.date.today().isoformat()}\n\n"
        f"`python experiments/accelerators/recipes.py` ({versions}; {platform.machine()}). The embedded target, "
        f"{study.setting['rows']} held-out rows of {LENGTH} tokens; methods saw {CALIBRATION_ROWS} other rows of "
        f"{CALIBRATION_LENGTH}. Weights in MB: all of them, the float32 embedding of 4.2 MB included.\n\n"
        f"## {FULL.capitalize()} → {ROUNDED}\n\n{phases(study.found)}\n"
    )
    if any("artifact" in row for row in study.found.values()):
        text += (
            f"\n## {ROUNDED.capitalize()} → {ARTIFACT}\n\n{artifacts(study.found)}\n\nGraphs of 1 and 7 rows; programs "
            "carry the float32 embedding too. Speculative texts: greedy and at temperature 1, with the full-precision "
            f"model as the draft, k = 6, {study.setting['texts']} prompts of {LENGTH // 4} tokens, {NEW_TOKENS} new "
            "ones.\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="no artefacts")
    parser.add_argument("--only", nargs="*", help="recipes (default: all)")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, study = Console(stderr=True, highlight=False), Study(args)
    chosen = [name for name in (NONE, *recipes.NAMES) if name == NONE or not args.only or name in args.only]
    chosen.sort(key=lambda name: name != NONE and recipes.needs_text(name))  # what is quick comes first
    for name in chosen:
        if "torch" not in study.found.get(name, {}):
            console.print(f"{name}, in torch")
            study.keep(name, {"torch": study.in_torch(name)})
    for name in ARTIFACTS if not args.torch else ():
        if (not args.only or name in args.only) and "artifact" not in study.found.get(name, {}):
            console.print(f"{name}, as an artefact")
            study.keep(name, {"artifact": study.as_artifact(name, console)})
    text = report(study)
    (args.out / "recipes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
