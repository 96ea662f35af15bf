"""What artefacts cost and give: size, export, time of each graph, first token, and speculative against plain decoding.

    python experiments/accelerators/run.py [--pair embedded|134m|tiny] [--again] [--tokens 96]

Exports the target four times (one graph; the default graphs; kv mode; four steps), finds what it exported before, and
times all in turns on an otherwise idle machine: slices during which other processes were busy are repeated and counted.
Beside the artefact stand the same model's eager and compiled steps. Writes `PAIR-DATE.json` and adds to `results.md`.
Half an hour for the embedded pair and an hour for 134m on two cores, most of it exports; ten minutes from the second
run on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from specdec.drafters import ModelDrafter

import specdec
from specdec.bench import bare
from specdec.bench.machine import peak_memory
from specdec.bench.synthetic import make_pair, make_prompts
from specdec.bench.timing import Gate, bootstrap
from specdec.export.artifact import ArtifactModel, export
from specdec.export.executorch import ExecutorchOptions
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed

HERE = Path(__file__).parent
CONTEXT = 512
EXPORTS = {
    "one graph": ExecutorchOptions(prefill_len=1, k=(0,), max_seq_len=CONTEXT),
    "default": ExecutorchOptions(max_seq_len=CONTEXT),
    "kv mode": ExecutorchOptions(prefill_len=1, max_seq_len=CONTEXT),
    "four steps": ExecutorchOptions(k=(0, 3, 6, 7), max_seq_len=CONTEXT),
}
PROMPT = 128
REPETITIONS = 3
PROMPTS = 4
K = (3, 6)


def pair_of(name: str) -> tuple[Any, Any, list[list[int]]]:
    """Target, draft, prompts as token ids; float32."""
    if name != "embedded":
        made = make_pair(name)
        return made.target, made.draft, make_prompts(made.shape, PROMPTS, PROMPT)
    from specdec.bench.prompts import read_prompts

    tokenizer = load_tokenizer(EMBEDDED / "target")
    texts = [prompt.text for prompt in read_prompts(None, PROMPTS)]
    target, draft = (load_model(EMBEDDED / part, device="cpu") for part in ("target", "draft"))
    return target, draft, [tokenizer(text)["input_ids"][:PROMPT] for text in texts]


def widths_of(options: ExecutorchOptions) -> list[int]:
    return sorted({method.width for method in options.methods})


def step_seconds(decoders: Mapping[str, Any], text: Sequence[int], widths: Sequence[int], gate: Gate) -> dict[str, Any]:
    """Median milliseconds of one step by backend and rows, all in turns."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for name, decoder in decoders.items():
        found, _ = bare.forwards(decoder, text, widths)
        calls |= {(name, width): call for (what, width), call in found.items() if what == "target"}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for repetition in range(12):
        for key, call in calls.items():
            taken = gate.time(call).seconds
            if repetition > 1:
                seconds[key].append(taken)
    return {
        name: {str(w): 1e3 * statistics.median(values) for (n, w), values in seconds.items() if n == name}
        for name in decoders
    }


def texts_per_second(decoder: Any, prompts: Sequence[Sequence[int]], tokens: int, k: int, gate: Gate) -> dict[str, Any]:
    """Plain against speculative texts of one decoder, in turns; the ideal of bare steps beside them."""
    ratios: list[list[float]] = []
    rounds: list[Any] = []
    same, plain_ms = 0, []
    policy = Fixed(k)
    options = {"max_new_tokens": tokens, "reuse_prefix": False}
    for prompt in prompts:
        decoder.generate(prompt, policy=policy, **{**options, "max_new_tokens": 8})  # warms up
        mine: list[float] = []
        for _ in range(REPETITIONS):
            plain = gate.time(lambda prompt=prompt: decoder.generate_plain(prompt, **options))
            fast = gate.time(lambda prompt=prompt: decoder.generate(prompt, policy=policy, strict=True, **options))
            mine.append(plain.seconds / fast.seconds)
            plain_ms.append(1e3 * plain.seconds / len(plain.result.tokens))
        ratios.append(mine)
        same += plain.result.tokens == fast.result.tokens
        rounds += fast.result.trace.rounds
    costs = bare.measure(decoder, list(prompts[0]), bare.choose_widths(rounds))
    ideal = bare.ideal_speedup(rounds, costs)
    speedup = bootstrap(ratios)
    return {
        "k": k,
        "speedup": speedup.as_dict(),
        "ideal": ideal,
        "efficiency": speedup.median / ideal,
        "plain_ms_per_token": statistics.median(plain_ms),
        "tokens_per_round": sum(r.num_emitted for r in rounds) / len(rounds),
        "identical": same,
        "prompts": len(prompts),
    }


def first_token(decoder: Any, prompt: Sequence[int], gate: Gate) -> float:
    """Milliseconds from a prompt to its first token."""
    call = lambda: decoder.generate_plain(list(prompt), max_new_tokens=1, reuse_prefix=False)  # noqa: E731
    call()
    return 1e3 * statistics.median(gate.time(call).seconds for _ in range(5))


def measure(name: str, tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    target, draft, prompts = pair_of(name)
    artifacts = {}
    for label, options in EXPORTS.items():
        say(f"export: {label}")
        artifacts[label] = ArtifactModel.open(export(target, options, tell=lambda stage: say(f"  {stage}")))
    drafter = ModelDrafter(draft)
    # Loading packs the weights once for every graph: no more artefacts than are timed.
    opened = {label: specdec.SpeculativeDecoder(artifacts[label], drafter=drafter) for label in ("default", "kv mode")}
    torch_decoders = {
        name: specdec.SpeculativeDecoder(target, drafter=drafter, backend=name) for name in ("eager", "compiled")
    }
    torch_decoders["compiled"].warmup()
    gate = Gate(retries=3, budget=400)
    widths = sorted({1, 4, 7, 8, *widths_of(EXPORTS["default"])})
    say("steps")
    steps = step_seconds({"artefact": opened["default"], **torch_decoders}, prompts[0], widths, gate)
    say("texts")
    texts = {
        label: [texts_per_second(decoder, prompts, tokens, k, gate) for k in K]
        for label, decoder in {"artefact": opened["default"], **torch_decoders}.items()
    }
    say("first tokens")
    long = (list(prompts[0]) * PROMPT)[:PROMPT]
    first = {label: first_token(opened[label], long, gate) for label in ("default", "kv mode")}
    first |= {label: first_token(decoder, long, gate) for label, decoder in torch_decoders.items()}
    return {
        "pair": name,
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": artifacts["default"].manifest.contract["versions"],
        "exports": {label: {"contract": m.manifest.contract, **m.manifest.about} for label, m in artifacts.items()},
        "step_ms": steps,
        "texts": texts,
        "first_token_ms": first,
        "peak_memory": peak_memory(torch.device("cpu")),
        "clean_slices": [gate.num_clean, gate.num_slices],
    }


def report(found: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    one = found["exports"]["one graph"]["sizes"]["program_bytes"]
    lines = [f"## {found['pair']}, {found['date']}, {found['threads']} threads", ""]
    lines += ["| artefact | graphs | MB | × one graph | export, s | peak memory, MB |", "|---|---|---|---|---|---|"]
    for label, about in found["exports"].items():
        size = about["sizes"]["program_bytes"]
        graphs = ", ".join(about["coverage"])
        lines.append(
            f"| {label} | {graphs} | {size / 1e6:.2f} | {size / one:.3f} | {about['total_seconds']:.0f} | "
            f"{about['peak_memory_bytes'] / 1e6:.0f} |"
        )
    widths = list(next(iter(found["step_ms"].values())))
    lines += ["", "| step, ms | " + " | ".join(f"{w} rows" for w in widths) + " | 4 rows / 1 | 7 rows / 1 |"]
    lines.append("|---" * (len(widths) + 3) + "|")
    for label, times in found["step_ms"].items():
        ratios = [times[w] / times["1"] for w in ("4", "7")]
        lines.append(
            "| " + " | ".join([label, *(f"{times[w]:.2f}" for w in widths), *(f"{r:.2f}" for r in ratios)]) + " |"
        )
    lines += ["", "| decoding | k | plain, ms/token | speculative / plain | ideal | efficiency | same texts |"]
    lines.append("|---" * 7 + "|")
    for label, rows in found["texts"].items():
        for row in rows:
            speedup = row["speedup"]
            lines.append(
                f"| {label} | {row['k']} | {row['plain_ms_per_token']:.2f} | {speedup['median']:.2f} "
                f"({speedup['low']:.2f}–{speedup['high']:.2f}) | {row['ideal']:.2f} | {row['efficiency']:.2f} | "
                f"{row['identical']}/{row['prompts']} |"
            )
    first = ", ".join(f"{label} {value:.1f} ms" for label, value in found["first_token_ms"].items())
    lines += ["", f"First token after {PROMPT}: {first}. Clean slices: {found['clean_slices'][0]} of "
              f"{found['clean_slices'][1]}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=("embedded", "134m", "tiny"), default="embedded")
    parser.add_argument("--tokens", type=int, default=96, help="of each text (default: 96)")
    parser.add_argument("--again", action="store_true", help="measure anew where there is a file of the same day")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.pair}-{datetime.date.today().isoformat()}.json"
    if path.is_file() and not arguments.again:
        found = json.loads(path.read_text())
    else:
        found = measure(arguments.pair, arguments.tokens, lambda text: print(text, file=sys.stderr, flush=True))
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = report(found)
    print(text)
    results = arguments.out / "results.md"
    before = results.read_text(encoding="utf-8") if results.is_file() else "# Artefacts\n\n"
    if text not in before:
        results.write_text(before + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
