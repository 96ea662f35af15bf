"""Many ways to draft for one target, in turns on the same prompts, each against the plain loop of the same turn."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import specdec
from specdec.bench import bare
from specdec.bench.prompts import Prompt, read_prompts
from specdec.bench.timing import Gate, bootstrap
from specdec.costs import cost_at
from specdec.drafter import BuildContext
from specdec.loading import EMBEDDED, load_model, load_tokenizer, resolve_drafter
from specdec.policy import Policy
from specdec.trace import Round, summarize

HERE = Path(__file__).parent
PLAIN = "plain"
_RETRY_SHARE = 0.5


@dataclass(frozen=True)
class Way:
    """One row: a drafter by name (or folder), its options, and a policy; None is the default, `throughput`."""

    name: str
    drafter: str
    policy: Policy | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    seconds: float
    clean: bool
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]


class Study:
    """A target, its decoders, and what they took."""

    def __init__(self, target: str | Path, ways: Sequence[Way]):
        self.source = str(target)
        self.model = load_model(target)
        self.tokenizer = load_tokenizer(target)
        self.ways = list(ways)
        self.decoders = {way.name: self._decoder(way) for way in ways}
        self.runs: dict[tuple[str, str], list[Run]] = {}  # (way, prompt)

    def _decoder(self, way: Way) -> Any:
        context = BuildContext(
            self.model, self.tokenizer, device=self.model.device, dtype=self.model.dtype, target_source=self.source
        )
        drafter = resolve_drafter(way.drafter, context, **way.options)
        return specdec.SpeculativeDecoder(
            self.model, tokenizer=self.tokenizer, drafter=drafter, policy=way.policy, prefix_cache=0
        )

    def warm_up(self, text: str, options: Mapping[str, Any]) -> None:
        for name, decoder in self.decoders.items():
            print(f"warming up {name}", flush=True)
            decoder.warmup()
            decoder.generate(text, **{**options, "max_new_tokens": 16})
            decoder.generate_plain(text, **{**options, "max_new_tokens": 4})

    def measure(self, prompts: Sequence[Prompt], repetitions: int, options: Mapping[str, Any]) -> Gate:
        """Every way on every prompt in turns; the plain loop is one of them, on the first way's decoder."""
        calls: dict[str, Callable[[str], Any]] = {
            PLAIN: lambda text: self.decoders[self.ways[0].name].generate_plain(text, **options)
        }
        for name, decoder in self.decoders.items():
            calls[name] = lambda text, decoder=decoder: decoder.generate(text, **options)
        names = list(calls)
        gate = Gate(self.model.device, budget=int(_RETRY_SHARE * len(prompts) * repetitions * len(names)))
        began = time.monotonic()
        for repetition in range(repetitions):
            for number, prompt in enumerate(prompts):
                turn = (repetition + number) % len(names)
                for name in names[turn:] + names[:turn]:
                    timed = gate.time(lambda name=name, text=prompt.text: calls[name](text))
                    made = timed.result
                    run = Run(timed.seconds, timed.clean, tuple(made.tokens), tuple(made.trace.rounds))
                    self.runs.setdefault((name, prompt.id), []).append(run)
                done = repetition * len(prompts) + number + 1
                left = (time.monotonic() - began) / done * (repetitions * len(prompts) - done)
                print(f"{done}/{repetitions * len(prompts)} {prompt.id}, {left:.0f} s left", flush=True)
        return gate

    def speedups(self, name: str, prompts: Sequence[Prompt], over: str = PLAIN) -> list[list[float]]:
        """Paired ratios of seconds per token, one list per prompt."""
        return [
            [
                (b.seconds / len(b.tokens)) / (a.seconds / len(a.tokens))
                for a, b in zip(self.runs[name, p.id], self.runs[over, p.id], strict=True)
            ]
            for p in prompts
        ]

    def row(self, name: str, prompts: Sequence[Prompt], costs: bare.BareCosts) -> dict[str, Any]:
        runs = [run for p in prompts for run in self.runs[name, p.id]]
        rounds = [r for run in runs for r in run.rounds]
        stats = summarize(rounds, sum(len(run.tokens) for run in runs))
        speedup = bootstrap(self.speedups(name, prompts))
        return {
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
            "nodes_per_round": statistics.fmean(r.num_nodes for r in rounds),
            "conditional_acceptance": stats.conditional_acceptance[:8],
            "speedup": speedup.as_dict(),
            "efficiency": speedup.median / ideal(rounds, costs),
            "seconds": stats.seconds,
            "identical": sum(
                all(run.tokens == self.runs[PLAIN, p.id][0].tokens for run in self.runs[name, p.id]) for p in prompts
            ),
            "prompts": len(prompts),
            "clean": sum(run.clean for run in runs),
            "runs": [[run.seconds for run in self.runs[name, p.id]] for p in prompts],
        }

    def bare_costs(self, text: str) -> bare.BareCosts:
        """Of the target alone, by width, behind this text."""
        widths = sorted({r.num_nodes + 1 for runs in self.runs.values() for run in runs for r in run.rounds})
        step = max(1, len(widths) // 12)
        decoder = self.decoders[self.ways[0].name]
        return bare.measure(decoder, decoder.encode(text), sorted({1, *widths[::step], widths[-1]}))


def ideal(rounds: Sequence[Round], costs: bare.BareCosts) -> float:
    """Speed-up if a round cost its bare target forward and the draft stage as it was, and nothing else."""
    draft = statistics.median(r.seconds["draft"] for r in rounds) * len(rounds)
    seconds = draft + sum(cost_at(costs.target, r.num_nodes + 1) for r in rounds)
    return cost_at(costs.target, 1) * sum(r.num_emitted for r in rounds) / seconds


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def circumstances() -> dict[str, Any]:
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def prompts_of(kinds: Sequence[str], per_kind: int | None = None) -> dict[str, list[Prompt]]:
    every = read_prompts(HERE / "prompts.jsonl")
    return {kind: [p for p in every if p.category == kind][:per_kind] for kind in kinds}


def embedded() -> Path:
    return EMBEDDED / "target"


def arguments(doc: str | None, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with what every study of this folder takes."""
    parser.description, parser.formatter_class = doc, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="few prompts, once: does it run?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def interval(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f}× ({value['low']:.2f}–{value['high']:.2f})"
