"""What each format and method costs in quality, on text that neither training nor calibration saw.

    python experiments/quantised/quality.py                                 the embedded target, an hour on one thread
    python experiments/quantised/quality.py --model PATH/bitllama-1M        and another model, on text of its own

The embedded target is calibrated on files of the standard library that it was trained on and judged on those held
out; greedy texts begin with the built-in prompts. Another model is calibrated on, and judged by, texts that it writes
itself, from other first tokens.

For each format and method: bits per quantised weight and the model's bytes; loss in nats per token; KL divergence from
full precision; how often the first choice is the same; and the index of the first token at which a greedy text leaves
that of full precision, with the margin there: how much less full precision likes the other token, in logits.
Writes `quality.json`, row by row, and `quality.md` beside this file; rows that are there are kept, so that it goes on
where it was interrupted. Delete the file to measure anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import specdec
from specdec.bench.prompts import read_prompts
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.quant import named_packed
from specdec.quant.methods import calibration, prepare_model
from specdec.quant.methods.walk import unpacked
from specdec.quant.recipe import Recipe
from specdec.train import provenance, stdlib
from specdec.train.data import encode, pack

HERE = Path(__file__).parent
LENGTH, HELD_OUT_ROWS, CALIBRATION_ROWS = 256, 40, 32
PROMPTS, NEW_TOKENS = 16, 64
FULL = "full precision"
INTEGERS = ("int8", "int4", "int4-asym", "int4-g64", "int4-g128", "int4-a8", "mxfp4-a8")
MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
SPARSE = ("sparse-60", "sparse", "sparse-2x4")
RECIPES = ("w4a16", "mx4")


@dataclass(frozen=True)
class Way:
    """One row: a recipe by name and how its values are chosen."""

    recipe: str
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.options.items())])


def ways() -> list[Way]:
    found = []
    for format in (*INTEGERS, *MX):
        found += [Way(format, method) for method in ("rtn", "awq", "gptq")]
    found.append(Way("int8", "smoothquant"))
    found += [Way(format, "awq", {"rounding": "gptq"}) for format in ("int4", "mxfp4")]
    found += [Way(format, "gptq", {"act_order": True}) for format in ("int4", "mxfp4")]
    for format in SPARSE:
        found += [Way(format, method) for method in ("rtn", "wanda")]
    for recipe in RECIPES:
        found += [Way(recipe, method) for method in ("rtn", "awq", "gptq")]
    return found


@dataclass
class Judge:
    """A model in full precision and what it says about held-out text, with which others are compared."""

    name: str
    model: Any
    calibration_BT: Tensor
    held_out_BT: Tensor
    texts: list[tuple[list[int], list[int]]]  # a prompt, and the greedy text behind it
    exact: list[Tensor] = field(default_factory=list)  # its log probabilities, a row `[T, V]` each

    @torch.inference_mode()
    def __post_init__(self) -> None:
        self.exact = [self.model(input_ids=row_T[None]).logits[0].log_softmax(-1) for row_T in self.held_out_BT]

    @torch.inference_mode()
    def judge(self, model: Any) -> dict[str, Any]:
        loss, kl, same = 0.0, 0.0, 0.0
        for row_T, p_TV in zip(self.held_out_BT, self.exact, strict=True):
            q_TV = model(input_ids=row_T[None]).logits[0].log_softmax(-1)
            loss -= float(q_TV[:-1].gather(1, row_T[1:, None]).mean())
            kl += float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())
            same += float((p_TV.argmax(-1) == q_TV.argmax(-1)).double().mean())
        count = len(self.held_out_BT)
        return {"loss": loss / count, "kl": kl / count, "agreement": same / count, **self._divergences(model)}

    def _divergences(self, model: Any) -> dict[str, Any]:
        """A greedy text is left at the first position whose first choice is another one: up to there both texts, and so
        all that the model reads, are the same."""
        firsts: list[int | None] = []
        margins = []
        for prompt, text in self.texts:
            row = torch.tensor([prompt + text])
            behind = slice(len(prompt) - 1, -1)
            p_TV, q_TV = (m(input_ids=row).logits[0, behind].double() for m in (self.model, model))
            other = (q_TV.argmax(-1) != p_TV.argmax(-1)).nonzero()
            if not len(other):
                firsts.append(None)
                continue
            at = int(other[0])
            firsts.append(at)
            margins.append(float(p_TV[at].max() - p_TV[at, int(q_TV[at].argmax())]))
        return {"first_divergences": firsts, "margins": margins}


def embedded() -> Judge:
    model, tokenizer = load_model(EMBEDDED / "target", device="cpu"), load_tokenizer(EMBEDDED / "target")
    held_out = [document.text for document in stdlib.documents() if document.held_out]
    prompts = [tokenizer(prompt.text)["input_ids"] for prompt in read_prompts(None, PROMPTS)]
    return Judge(
        "embedded target",
        model,
        calibration.tokens(calibration.STDLIB, model, tokenizer, rows=CALIBRATION_ROWS, length=LENGTH),
        # Built-in prompts come from the same files; whatever is judged here was seen by nobody.
        from_held_out(held_out, tokenizer),
        greedy(model, tokenizer, prompts),
    )


def from_held_out(texts: list[str], tokenizer: Any) -> Tensor:
    rows = pack(encode(texts, tokenizer), LENGTH).tokens_RL
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:HELD_OUT_ROWS]
    return torch.from_numpy(rows).long()[order]


def other(folder: Path) -> Judge:
    model, tokenizer = load_model(folder, device="cpu"), load_tokenizer(folder)
    both = calibration.from_model(model, tokenizer, CALIBRATION_ROWS + HELD_OUT_ROWS, LENGTH, seed=0)
    held_out = both[CALIBRATION_ROWS:]
    prompts = [row[: LENGTH // 8].tolist() for row in held_out[:PROMPTS]]
    return Judge(folder.name, model, both[:CALIBRATION_ROWS], held_out, greedy(model, tokenizer, prompts))


def greedy(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    decoder = specdec.SpeculativeDecoder(model, tokenizer=tokenizer, backend="eager")
    texts = [(prompt, decoder.generate_plain(prompt, max_new_tokens=NEW_TOKENS).tokens) for prompt in prompts]
    return [(prompt, text) for prompt, text in texts if text]


def measure(judge: Judge, way: Way) -> dict[str, Any]:
    began = time.monotonic()
    recipe = {**Recipe.of(way.recipe).to_dict(), "method": way.method, "options": way.options}
    model = prepare_model(judge.model, recipe, judge.calibration_BT)
    seconds = time.monotonic() - began
    layers = named_packed(model).values()
    with unpacked(model, torch.float32):
        quality = judge.judge(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(layer.num_bytes for layer in layers)
    rest = {id(p): p.numel() * 2 for p in model.parameters()}  # what is not quantised, in bfloat16
    return {
        "recipe": way.recipe,
        "method": way.label,
        "bits": 8 * stored / weights,
        "megabytes": (stored + sum(rest.values())) / 1e6,
        "seconds": seconds,
        "notes": model.quantisation_notes,
        **quality,
    }


def full_row(judge: Judge) -> dict[str, Any]:
    size = sum({id(p): p.numel() * 2 for p in judge.model.parameters()}.values()) / 1e6
    return {"recipe": FULL, "method": "", "bits": 16.0, "megabytes": size, "seconds": 0.0, **judge.judge(judge.model)}


def table(rows: list[dict[str, Any]]) -> str:
    full = rows[0]["loss"]
    lines = [
        "| format or recipe | method | bits | MB | loss | KL | same first choice | greedy texts the same "
        "| first divergence, median | margin there, median | seconds |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        firsts = [first for first in row["first_divergences"] if first is not None]
        kept = len(row["first_divergences"]) - len(firsts)
        cells = [
            row["recipe"],
            row["method"],
            f"{row['bits']:.2f}",
            f"{row['megabytes']:.1f}",
            f"{row['loss']:.4f} ({row['loss'] - full:+.4f})",
            f"{row['kl']:.5f}",
            f"{row['agreement']:.1%}",
            f"{kept}/{len(row['first_divergences'])}",
            f"{statistics.median(firsts):g}" if firsts else "–",
            f"{statistics.median(row['margins']):.3f}" if firsts else "–",
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Store:
    """`quality.json`: every row that was ever measured, by model, recipe and method; written after each."""

    def __init__(self, path: Path):
        self.path = path
        self.models: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.models = json.loads(path.read_text(encoding="utf-8"))["models"]

    def row(self, model: str, way: Way) -> dict[str, Any] | None:
        return self.models.get(model, {}).get(f"{way.recipe} {way.label}")

    def put(self, model: str, row: dict[str, Any]) -> None:
        row = {**row, "date": datetime.date.today().isoformat()}
        self.models.setdefault(model, {})[f"{row['recipe']} {row['method']}".strip()] = row
        provenance.write_json(self.path, {"versions": provenance.versions(), "models": self.models})


def study(judge: Judge, store: Store, chosen: list[Way], until: float, console: Console) -> None:
    store.put(judge.name, full_row(judge))
    # What is quick comes first.
    for number, way in enumerate(sorted(chosen, key=lambda way: way.method != "rtn"), 1):
        if store.row(judge.name, way) is None and time.monotonic() < until:
            console.print(f"{judge.name} {number}/{len(chosen)}: {way.recipe}, {way.label}")
            store.put(judge.name, measure(judge, way))


def report(store: Store) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    text = (
        f"# Quality of quantised weights, {datetime.date.today().isoformat()}\n\n"
        f"`python experiments/quantised/quality.py` ({versions}; {platform.machine()}, one thread, float32 "
        f"activations). {HELD_OUT_ROWS} held-out rows and {CALIBRATION_ROWS} calibration rows of {LENGTH} tokens; "
        f"{PROMPTS} greedy texts of {NEW_TOKENS} tokens. MB: packed weights, and the rest in bfloat16. Seconds "
        "that a method takes were measured on a busy machine.\n"
    )
    for model, rows in store.models.items():
        found = [store.row(model, way) for way in ways()]
        text += f"\n## {model}\n\n{table([rows[FULL], *(row for row in found if row is not None)])}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a folder; skipped when it is absent")
    parser.add_argument("--only", nargs="*", help="formats and recipes (default: all)")
    parser.add_argument("--methods", nargs="*", help="(default: all)")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after so many; go on another time")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    console = Console(highlight=False)
    chosen = [
        way
        for way in ways()
        if (not args.only or way.recipe in args.only) and (not args.methods or way.method in args.methods)
    ]
    store = Store(args.out / "quality.json")
    study(embedded(), store, chosen, until, console)
    for path in args.model:
        if path.is_dir():
            study(other(path), store, chosen, until, console)
        else:
            console.print(f"{path} is not there: skipped")
    text = report(store)
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
