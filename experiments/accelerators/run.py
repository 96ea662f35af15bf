"""What artefacts cost and give: size, export, time of each graph, first token, updaters, and speculative decoding.

    python experiments/accelerators/run.py --pair embedded --export     exports only: no measurement, any machine
    python experiments/accelerators/run.py --pair embedded              measures; on an otherwise idle machine
    python experiments/accelerators/run.py --pair 134m --quick          the same with few repetitions: does it run?

Exports stand in `--artifacts` (by default beside the compiled kernels) and are made once; their seconds of CPU do not
depend on what else runs. Slices during which other processes were busy are repeated and counted. Beside the artefact
stand the same model's eager and compiled steps. Every stage that is done is in `PAIR-DATE.json`; a run that was ended
goes on there, and the last one adds to `results.md`. Without exports: three minutes for the embedded pair.
`OMP_NUM_THREADS=1` is what small models want.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables
import torch
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec.bench import bare
from specdec.bench.machine import peak_memory
from specdec.bench.synthetic import make_pair, make_prompts
from specdec.bench.timing import Gate, bootstrap
from specdec.export.artifact import ArtifactModel, export, model_hash
from specdec.export.executorch import ExecutorchOptions
from specdec.kernels.build import cache_folder
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.runtime.backend import Step
from specdec.runtime.updaters import SCATTER, UPDATERS, published_cost

HERE = Path(__file__).parent
CONTEXT = 512
#: kv mode is one graph, which reads prompts too; hybrid mode is the default.
ONE, DEFAULT, BOTH = "one graph", "four graphs", "for updaters"
EXPORTS = {
    ONE: ExecutorchOptions(prefill_len=1, k=(0,), max_seq_len=CONTEXT),
    DEFAULT: ExecutorchOptions(max_seq_len=CONTEXT),
    BOTH: ExecutorchOptions(prefill_len=32, k=(0, 3), max_seq_len=CONTEXT, kv="both"),
}
PAIRS = {"embedded": (ONE, DEFAULT, BOTH), "134m": (ONE, DEFAULT), "tiny": (ONE, DEFAULT, BOTH)}
PROMPT = 128
CHUNK = EXPORTS[DEFAULT].prefill_len
K = (3, 6)


class Plan:
    """How much is measured."""

    def __init__(self, quick: bool, tokens: int):
        self.prompts, self.repetitions, self.steps = (1, 1, 3) if quick else (4, 3, 12)
        self.tokens = min(tokens, 24) if quick else tokens
        self.k = K[:1] if quick else K


def pair_of(name: str, prompts: int) -> tuple[Any, Any, list[list[int]]]:
    """Target, draft, prompts as token ids; float32."""
    if name != "embedded":
        made = make_pair(name)
        return made.target, made.draft, make_prompts(made.shape, prompts, PROMPT)
    from specdec.bench.prompts import read_prompts

    tokenizer = load_tokenizer(EMBEDDED / "target")
    texts = [prompt.text for prompt in read_prompts(None, prompts)]
    target, draft = (load_model(EMBEDDED / part, device="cpu") for part in ("target", "draft"))
    return target, draft, [tokenizer(text)["input_ids"][:PROMPT] for text in texts]


# Exports.


def export_here(pair: str, label: str, folder: Path) -> None:
    """In a process of its own, so that its memory and its CPU time are the export's."""
    target = pair_of(pair, 1)[0]
    before = os.times()
    export(target, EXPORTS[label], out=folder, tell=lambda stage: print(f"  {stage}", file=sys.stderr, flush=True))
    after = os.times()
    cpu = after.user - before.user + after.system - before.system
    (folder.parent / f"{folder.name}.json").write_text(json.dumps({"cpu_seconds": round(cpu, 1)}), encoding="utf-8")


def artifact(pair: str, label: str, target: Any, parent: Path, say: Callable[[str], None]) -> Path:
    """The folder of an export that fits the model, made if it is not there. Raises `SystemExit` where it cannot be."""
    folder = parent / pair / label.replace(" ", "-")
    if not folder.is_dir():
        say(f"export: {label}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--pair", pair, "--export-one", label, "--artifacts", str(parent)]
        subprocess.run(command, check=True)
    manifest = ArtifactModel.open(folder).manifest
    if manifest.options != EXPORTS[label] or manifest.model["sha256"] != model_hash(target):
        raise SystemExit(f"{folder} is of another model or of other options: remove it")
    return folder


def facts(folder: Path) -> dict[str, Any]:
    manifest = ArtifactModel.open(folder).manifest
    beside = folder.parent / f"{folder.name}.json"
    more = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return {"contract": manifest.contract, **manifest.about, **more}


# Measurements.


class Decoders:
    """The pair on the artefact and in torch, opened when they are first wanted: loading packs every graph's weights."""

    def __init__(self, target: Any, draft: Any, folders: Mapping[str, Path]):
        self.target, self.folders, self.drafter = target, folders, ModelDrafter(draft)
        self._made: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._made:
            if name in self.folders:
                model, options = ArtifactModel.open(self.folders[name]), {}
            else:
                model, options = self.target, {"backend": name}
            self._made[name] = specdec.SpeculativeDecoder(model, drafter=self.drafter, **options)
            if name == "compiled":
                self._made[name].warmup()
        return self._made[name]


NAMES = (DEFAULT, "eager", "compiled")


def prefill(decoder: Any, text: Sequence[int]) -> Callable[[], object]:
    """One chunk behind a text, of which only the last row's logits are wanted."""
    task = decoder.prepare(list(text), max_new_tokens=1)
    task.target.append(text)
    task.target.prefill()
    start = task.target.num_cached
    tokens = torch.tensor([text[i % len(text)] for i in range(CHUNK)])
    block = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    step = Step(tokens, start, block, torch.arange(start, start + CHUNK), start, 1)
    return lambda: task.target.backend.forward(step)


def step_milliseconds(decoders: Decoders, text: Sequence[int], plan: Plan, gate: Gate) -> dict[str, Any]:
    """Median of one step by backend and rows, all in turns; with "prefill", of a chunk of a prompt."""
    widths = [1, 4, 7, 8]
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name in NAMES:
        found, _ = bare.forwards(decoders(name), text, widths)
        calls |= {(name, str(width)): call for (what, width), call in found.items() if what == "target"}
        calls[name, f"prefill {CHUNK}"] = prefill(decoders(name), text)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for repetition in range(plan.steps + 2):
        for key, call in calls.items():
            taken = gate.time(call).seconds
            if repetition > 1:
                seconds[key].append(taken)
    return {
        name: {w: 1e3 * statistics.median(values) for (n, w), values in seconds.items() if n == name} for name in NAMES
    }


def texts(decoder: Any, eager: Any, prompts: Sequence[Sequence[int]], k: int, plan: Plan, gate: Gate) -> dict[str, Any]:
    """Plain against speculative texts of one decoder, in turns; the ideal of bare steps beside them."""
    ratios: list[list[float]] = []
    rounds: list[Any] = []
    same, as_eager, plain_ms = 0, 0, []
    policy = Fixed(k)
    options = {"max_new_tokens": plan.tokens, "reuse_prefix": False}
    for prompt in prompts:
        decoder.generate(prompt, policy=policy, **{**options, "max_new_tokens": 8})  # warms up
        mine: list[float] = []
        for _ in range(plan.repetitions):
            plain = gate.time(lambda prompt=prompt: decoder.generate_plain(prompt, **options))
            fast = gate.time(lambda prompt=prompt: decoder.generate(prompt, policy=policy, strict=True, **options))
            mine.append(plain.seconds / fast.seconds)
            plain_ms.append(1e3 * plain.seconds / len(plain.result.tokens))
        ratios.append(mine)
        same += plain.result.tokens == fast.result.tokens
        as_eager += fast.result.tokens == eager.generate_plain(prompt, **options).tokens
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
        "as_eager": as_eager,
        "prompts": len(prompts),
    }


def first_token(decoder: Any, prompt: Sequence[int], plan: Plan, gate: Gate) -> float:
    """Milliseconds from a prompt to its first token."""
    call = lambda: decoder.generate_plain(list(prompt), max_new_tokens=1, reuse_prefix=False)  # noqa: E731
    call()
    return 1e3 * statistics.median(gate.time(call).seconds for _ in range(2 * plan.repetitions - 1))


def updaters(folder: Path, prompts: Sequence[Sequence[int]], plan: Plan, gate: Gate) -> list[dict[str, Any]]:
    """One artefact under each updater: what is copied per step and held, beside the published formulas."""
    rows = []
    for name in UPDATERS:
        decoder = specdec.SpeculativeDecoder(
            ArtifactModel.open(folder, kv_updater=name), drafter=NgramDrafter(), policy=Fixed(3)
        )
        program, widths = decoder.backend.family, []
        execute = program.execute
        program.execute = lambda text, method, *more, e=execute, w=widths: (
            w.append(method.width) or e(text, method, *more)
        )
        options = {"max_new_tokens": plan.tokens, "reuse_prefix": False, "strict": True}
        decoder.generate(prompts[0], **options)
        copied = getattr(program, "copied", None)
        before = (copied.num_bytes, copied.seconds, copied.rows) if copied is not None else (0, 0.0, 0)
        widths.clear()
        taken = gate.time(lambda d=decoder, o=options: [d.generate(prompt, **o).tokens for prompt in prompts])
        per_token = decoder.backend.bytes_per_token if name == SCATTER else None
        # Graphs that own their slots write a row for each of theirs, padding included.
        done = (
            (copied.num_bytes - before[0], copied.seconds - before[1], copied.rows - before[2])
            if copied is not None
            else (per_token * sum(widths), None, sum(widths))
        )
        steps = len(widths)
        layers = program.model.manifest.model["slots"]
        heads, size = layers[0][0], layers[0][1]
        cost = None
        if name != SCATTER:
            cost = vars(published_cost(name, heads, size, program.options.num_slots).as_bytes(4, len(layers)))
        rows.append(
            {
                "updater": name,
                "steps": steps,
                "rows_per_step": done[2] / steps,
                "bytes_per_row": done[0] / done[2],
                "bytes_per_step": done[0] / steps,
                "microseconds_per_step": None if done[1] is None else 1e6 * done[1] / steps,
                "milliseconds_per_step": 1e3 * taken.seconds / steps,
                "held_bytes": program.slot_bytes,
                "published": cost,
                "tokens": taken.result,
            }
        )
    for row in rows:
        row["same_text"] = row["tokens"] == rows[0]["tokens"]
        row.pop("tokens") if row is not rows[0] else None
    rows[0].pop("tokens")
    return rows


def measure(arguments: argparse.Namespace, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All stages that `path` does not have yet."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() and not arguments.again else {}
    plan = Plan(arguments.quick, arguments.tokens)
    target, draft, prompts = pair_of(arguments.pair, plan.prompts)
    folders = {
        label: artifact(arguments.pair, label, target, arguments.artifacts, say) for label in PAIRS[arguments.pair]
    }
    if arguments.export:
        return found
    decoders, gate = Decoders(target, draft, folders), Gate(retries=3, budget=40 if arguments.quick else 400)
    long = (list(prompts[0]) * PROMPT)[:PROMPT]

    def stage(name: str, call: Callable[[], Any]) -> None:
        if name in found:
            return
        say(name)
        found[name] = call()
        counted = found.setdefault("clean_slices", [0, 0])
        found["clean_slices"] = [counted[0] + gate.num_clean, counted[1] + gate.num_slices]
        gate.num_clean = gate.num_slices = 0
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    stage("exports", lambda: {label: facts(folder) for label, folder in folders.items()})
    stage("step_ms", lambda: step_milliseconds(decoders, prompts[0], plan, gate))
    for name in NAMES:
        for k in plan.k:
            stage(f"texts, {name}, {k}", lambda: texts(decoders(name), decoders("eager"), prompts, k, plan, gate))  # noqa: B023
    for name in (ONE, *NAMES):
        stage(f"first token, {name}", lambda: first_token(decoders(name), long, plan, gate))  # noqa: B023
    if BOTH in folders:
        stage("updaters", lambda: updaters(folders[BOTH], prompts[:2], plan, gate))
    stage("peak_memory", lambda: peak_memory(torch.device("cpu")))
    about = {"pair": arguments.pair, "date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    found |= {**about, "quick": arguments.quick, "prompt": PROMPT}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="embedded")
    parser.add_argument("--export", action="store_true", help="make the artefacts, and measure nothing")
    parser.add_argument("--export-one", choices=EXPORTS, help=argparse.SUPPRESS)
    parser.add_argument("--artifacts", type=Path, default=cache_folder() / "study-artifacts", help="where they stand")
    parser.add_argument("--tokens", type=int, default=96, help="of each text (default: 96)")
    parser.add_argument("--quick", action="store_true", help="a few repetitions, to see that everything runs")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured today")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    if arguments.export_one:
        folder = arguments.artifacts / arguments.pair / arguments.export_one.replace(" ", "-")
        return export_here(arguments.pair, arguments.export_one, folder)
    date = datetime.date.today().isoformat()
    path = arguments.out / f"{arguments.pair}{'-quick' if arguments.quick else ''}-{date}.json"
    found = measure(arguments, path, lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.export:
        return None
    text = tables.report(found)
    print(text)
    results = arguments.out / "results.md"
    before = results.read_text(encoding="utf-8") if results.is_file() else "# Artefacts\n\n"
    if text not in before and not arguments.quick:
        results.write_text(before + text + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
