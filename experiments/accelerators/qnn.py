"""The embedded target compiled for a Snapdragon's NPU, and decoded speculatively in the compiler's emulator.

    python experiments/accelerators/qnn.py [--soc sm8650] [--recipes fp16,w8a16,w4a16] [--tokens 24] [--short]

For each recipe: graphs of 1, 8 and 32 rows (plain step, verification of 7 drafted tokens, prompts) in one context
binary; its size, seconds of compilation, and what the NPU took. Then in the emulator: logits and loss on a prompt
against the float32 model, and texts, plain and speculative. No figure here is a speed: emulated seconds are not the
chip's. The small model is also compiled for every chip that is known, and with one graph and with three.
Needs `pip install 'specdec[qnn]'`. Writes `qnn.json` and `qnn.md`. Twenty minutes on two cores; `--short`: two layers
only, two minutes.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from specdec.drafters import ModelDrafter
from torch import Tensor

import specdec
from specdec.bench.prompts import read_prompts
from specdec.export.artifact import ArtifactModel, export
from specdec.export.htp import SOCS, compile_together
from specdec.export.manifest import Manifest
from specdec.export.qnn import PROGRAM, QnnOptions
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.quant.methods import calibration
from specdec.runtime.backend import Backend, Step
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.backends.qnn import QnnBackend

HERE = Path(__file__).parent
K = 7
PROMPT = 64
GRAPHS: dict[str, Any] = {"prefill_len": 32, "k": (0, K), "max_seq_len": 512}


def logits_of(backend: Backend, text: list[int]) -> Tensor:
    """Of all positions, `[T, V]`, in steps of K + 1 rows."""
    rows = []
    for start in range(0, len(text), K + 1):
        part = text[start : start + K + 1]
        count = len(part)
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        step = Step(torch.tensor(part), start, seen, torch.arange(start, start + count), start, count)
        rows.append(backend.forward(step).logits.clone())
    return torch.cat(rows)


def distance(mine: Tensor, stock: Tensor, text: list[int]) -> dict[str, float]:
    following = torch.tensor(text[1:])
    losses = [torch.nn.functional.cross_entropy(rows[:-1], following).item() for rows in (mine, stock)]
    return {
        "relative_error": float((mine - stock).norm() / stock.norm()),
        "max_error": float((mine - stock).abs().max()),
        "same_argmax": float((mine.argmax(-1) == stock.argmax(-1)).float().mean()),
        "loss": losses[0],
        "stock_loss": losses[1],
    }


def made(model: Any, tokenizer: Any, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The artefact's folder, and what it says of itself."""
    given = QnnOptions(**{**GRAPHS, **options})
    text = calibration.tokens("self", model, tokenizer, rows=16, length=128) if given.recipe != "fp16" else None
    folder = export(model, given, tokenizer=tokenizer, calibration_BT=text, tell=lambda stage: print("  ", stage))
    manifest = Manifest.read(folder)
    about = manifest.about
    compiled = sum(seconds for stage, seconds in about["seconds"].items() if stage.startswith("compile"))
    return folder, {
        "binary_bytes": manifest.files[PROGRAM]["bytes"],
        "float32_bytes": about["sizes"]["weight_bytes"],
        "compile_seconds": round(compiled, 1),
        "export_seconds": about["total_seconds"],
        "coverage": about["coverage"],
    }


def decoded(target: Any, draft: Any, folder: Path, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Texts of the artefact, plain and speculative, against eager's."""
    eager = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(draft), policy=Fixed(K), backend="eager")
    expected = eager.generate_plain(prompt, max_new_tokens=tokens).tokens
    twin = specdec.SpeculativeDecoder(ArtifactModel.open(folder), drafter=ModelDrafter(draft), policy=Fixed(K))
    fast = twin.generate(prompt, max_new_tokens=tokens)
    plain = twin.generate_plain(prompt, max_new_tokens=tokens)
    return {
        "tokens": tokens,
        "speculative_is_eager": fast.tokens == expected,
        "plain_is_eager": plain.tokens == expected,
        "speculative_is_plain": fast.tokens == plain.tokens,
        "verifications": fast.stats.num_rounds,
        "tokens_per_verification": fast.stats.mean_acceptance_length,
    }


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    tokenizer = load_tokenizer(EMBEDDED / "target")
    draft = load_model(EMBEDDED / "draft", device="cpu", dtype="float32")
    target = draft if arguments.short else load_model(EMBEDDED / "target", device="cpu", dtype="float32")
    texts = [prompt.text for prompt in read_prompts(None, 2)]
    prompts = [tokenizer(text)["input_ids"][:PROMPT] for text in texts]
    found: dict[str, Any] = {"recipes": {}, "socs": {}, "graphs": {}}
    for recipe in arguments.recipes.split(","):
        print(recipe)
        folder, about = made(target, tokenizer, recipe=recipe, soc=arguments.soc)
        backends = QnnBackend.open(ArtifactModel.open(folder)), EagerBackend.open(target)
        rows = [logits_of(backend, prompts[0]) for backend in backends]
        about["logits"] = distance(rows[0], rows[1], prompts[0])
        about["text"] = decoded(target, draft, folder, prompts[1], arguments.tokens)
        found["recipes"][recipe] = about
    small = made(draft, tokenizer, soc=arguments.soc)[0]
    graphs = {method.name: small / f"{method.name}.onnx" for method in Manifest.read(small).options.methods}
    for name in SOCS:
        print(name)
        found["socs"][name] = binary(graphs, name)
    found["graphs"] = {"1": binary({"step_1": graphs["step_1"]}, arguments.soc), "3": found["socs"][arguments.soc]}
    return found


def binary(graphs: dict[str, Path], soc: str) -> dict[str, Any]:
    """Size and seconds of a context binary of these graphs."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as aside:
        compile_together(graphs, SOCS[soc], Path(aside), seconds)
        size = sum(path.stat().st_size for path in Path(aside).glob("*.bin"))
    return {"binary_bytes": size, "compile_seconds": round(sum(seconds.values()), 1)}


def written(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The results as a page."""
    what = "two-layer draft (1.6M weights)" if arguments.short else "target (13.4M weights, 18 layers)"
    lines = [
        "# The embedded target on Qualcomm's HTP, compiled and emulated",
        "",
        f"{found['date']}, {found['versions']}. The embedded {what} for {arguments.soc}: graphs of 1, 8 and 32 rows in "
        "one context binary, 512 positions. Emulated on x86; nothing here is a speed.",
        "",
        "| recipe | binary, MB | of float32 | compiled in, s | operators on the NPU, outside | logits, relative error "
        f"| same argmax | loss (float32: {next(iter(found['recipes'].values()))['logits']['stock_loss']:.3f}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, row in found["recipes"].items():
        inside, outside = (sum(c[key] for c in row["coverage"].values()) for key in ("delegated", "outside"))
        logits = row["logits"]
        lines.append(
            f"| {recipe} | {row['binary_bytes'] / 1e6:.1f} | {row['binary_bytes'] / row['float32_bytes']:.2f} | "
            f"{row['compile_seconds']:.0f} | {inside}, {outside} | {logits['relative_error']:.4f} | "
            f"{logits['same_argmax']:.0%} | {logits['loss']:.3f} |"
        )
    lines += [
        "",
        f"Greedy texts of {arguments.tokens} tokens, the embedded draft, {K} drafted tokens per verification:",
        "",
        "| recipe | speculative = plain on the artefact | speculative = eager float32 | verifications | "
        "tokens per verification |",
        "|---|---|---|---|---|",
    ]
    for recipe, row in found["recipes"].items():
        text = row["text"]
        said = ["yes" if text[key] else "no" for key in ("speculative_is_plain", "speculative_is_eager")]
        lines.append(
            f"| {recipe} | {said[0]} | {said[1]} | {text['verifications']} | {text['tokens_per_verification']:.2f} |"
        )
    one, three = (found["graphs"][name]["binary_bytes"] for name in ("1", "3"))
    lines += [
        "",
        f"The two-layer draft in fp16 with one graph: {one / 1e6:.2f} MB, with three that share weights: "
        f"{three / 1e6:.2f} MB. For each chip:",
        "",
        "| chip | HTP | binary, MB | compiled in, s |",
        "|---|---|---|---|",
    ]
    for name, row in found["socs"].items():
        soc = SOCS[name]
        lines.append(
            f"| {name}, {soc.product} | V{soc.arch} | {row['binary_bytes'] / 1e6:.2f} | {row['compile_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soc", default="sm8650", choices=list(SOCS))
    parser.add_argument("--recipes", default="fp16,w8a16,w4a16")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--short", action="store_true", help="the two-layer draft in place of the target; prints only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    started = time.perf_counter()
    found = study(arguments)
    packages = ("torch", "onnxruntime", "onnxruntime-qnn", "onnx")
    found["versions"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    found["date"] = datetime.date.today().isoformat()
    found["seconds"] = round(time.perf_counter() - started)
    page = written(found, arguments)
    print(page)
    folder = Path(tempfile.mkdtemp()) if arguments.short else HERE
    (folder / "qnn.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "qnn.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
