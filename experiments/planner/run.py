"""How far is the planner off? Predicted against measured speed-up, 12 settings on each of two pairs.

    python experiments/planner/run.py [--pairs embedded 134m] [--out FOLDER] [--fresh]

The embedded pair (float32, one thread), and a synthetic pair that reads 100M parameters per token (134m, bfloat16, two
threads). A plan is made for every drafter, rule and temperature, from costs that are measured now and from prompts
that are not measured later; then every setting is compared with plain decoding on other prompts, interleaved, with
the gate of `specdec compare`. Error: predicted over measured, less 1. Twelve minutes on a quiet machine. Every
setting is written as it is done, and a second start goes on from there (--fresh starts over).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pairs
import torch

from specdec.bench.compare import compare
from specdec.bench.comparison import PLAIN, SPECULATIVE
from specdec.cli.screen import versions
from specdec.fit.plan import circumstances
from specdec.planner.cache import Store
from specdec.planner.planner import make_plan
from specdec.policy import Fixed, Policy
from specdec.train.provenance import write_json
from specdec.tree import branching_shape
from specdec.tree_policy import StaticTree

HERE = Path(__file__).parent
TOKENS = 64
SECONDS = 25.0  # of measuring acceptance for one plan


@dataclass(frozen=True)
class Way:
    """What one plan is made for."""

    drafter: str = "model"
    temperature: float = 0.0
    verifier: str = "coupled"

    @property
    def label(self) -> str:
        return f"{self.drafter}, {self.verifier}, temperature {self.temperature:g}"


@dataclass(frozen=True)
class Case:
    pair: str
    way: Way
    k: int = 0
    branching: tuple[int, ...] = ()

    @property
    def setting(self) -> str:
        return f"tree {','.join(map(str, self.branching))}" if self.branching else f"k = {self.k}"

    @property
    def key(self) -> str:
        return f"{self.pair} | {self.way.label} | {self.setting}"

    @property
    def policy(self) -> Policy:
        return StaticTree(branching_shape(self.branching)) if self.branching else Fixed(self.k)


def cases(embedded: str, synthetic: str) -> list[Case]:
    found = [Case(embedded, Way(), k) for k in (1, 2, 4, 8, 16)]
    found += [Case(embedded, Way(), branching=(2, 1, 1))]
    found += [Case(embedded, Way(temperature=1.0), k) for k in (1, 3)]
    found += [Case(embedded, Way(temperature=1.0, verifier="block"), 4)]
    found += [Case(embedded, Way("ngram"), 4), Case(embedded, Way("suffix"), 8), Case(embedded, Way("eagle"), 3)]
    found += [Case(synthetic, Way(), k) for k in (1, 2, 3, 4, 6, 8, 16)]
    found += [Case(synthetic, Way(), branching=branching) for branching in ((2, 1, 1), (2, 2, 1))]
    found += [Case(synthetic, Way(temperature=0.7), k) for k in (2, 4, 8)]
    return found


class Study:
    """Rows that are done, in a file."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists() and not fresh:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["versions"] == versions():
                self.rows = {row["key"]: row for row in found["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.save()

    def save(self, **more: Any) -> None:
        head = {"date": datetime.date.today().isoformat(), "versions": versions(), "max_new_tokens": TOKENS}
        write_json(self.path, {**head, **more, "rows": list(self.rows.values())})


def run_way(pair: pairs.Pair, way: Way, todo: list[Case], folder: Path) -> Iterator[dict[str, Any]]:
    """Plan once, then measure every case."""
    torch.set_num_threads(pair.threads)
    decoder = pair.decoder(way.drafter, way.verifier)
    options = {**pair.options, "max_new_tokens": TOKENS, "temperature": way.temperature, "seed": 1}
    report = make_plan(
        decoder,
        [prompt.text for prompt in pair.planned],
        options,
        lengths=[case.k for case in todo if case.k] or [1],
        with_trees=any(case.branching for case in todo),
        seconds=SECONDS,
        store=Store(folder, fresh=True),
    )
    predicted = {row.setting.label: row for row in report.rows}
    for case in todo:
        row = predicted[case.setting]
        found = compare(
            decoder, pair.measured, {**options, "policy": case.policy}, repetitions=pair.repetitions, warmup=1
        )
        measured = pairs.pooled(
            [tuple(sum(run.seconds for run in r.runs[name]) for name in (PLAIN, SPECULATIVE)) for r in found.rows]
        )
        yield {
            "key": case.key,
            "pair": case.pair,
            "way": way.label,
            "setting": case.setting,
            "predicted": {"median": row.speedup, "low": row.low, "high": row.high},
            "measured": measured.as_dict(),
            "error": row.speedup / measured.median - 1,
            "medians": {"predicted": row.median, "measured": found.ratio(SPECULATIVE, PLAIN).median},
            "tokens_per_round": {
                "predicted": row.tokens_per_round,
                "measured": sum(len(run.tokens) for r in found.rows for run in r.runs[SPECULATIVE])
                / found.stats().num_rounds,
            },
            "clean": f"{found.num_clean}/{found.num_slices}",
            "identical": f"{found.num_identical()}/{len(found.rows)}" if found.expects_identity else "law",
            "circumstances": circumstances(decoder.target, decoder.drafter),
        }


def text_of(rows: list[dict[str, Any]], command: str) -> str:
    def interval(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

    head = ["pair", "drafter, rule", "setting", "predicted", "measured", "error", "tokens per round: predicted",
            "measured", "same text", "clean"]  # fmt: skip
    lines = []
    for row in rows:
        tokens = row["tokens_per_round"]
        cells = [row["pair"], row["way"], row["setting"], interval(row["predicted"]), interval(row["measured"])]
        cells += [f"{row['error']:+.1%}", f"{tokens['predicted']:.2f}", f"{tokens['measured']:.2f}"]
        lines.append("| " + " | ".join([*cells, row["identical"], row["clean"]]) + " |")
    errors = [abs(row["error"]) for row in rows]
    by_pair = {name: [abs(row["error"]) for row in rows if row["pair"] == name] for name in {r["pair"] for r in rows}}
    medians = ", ".join(f"{name} {statistics.median(found):.1%}" for name, found in sorted(by_pair.items()))
    here = next(iter(rows))["circumstances"]["device"]
    return (
        "# Predicted against measured speed-up\n\n"
        f"{datetime.date.today().isoformat()}, {here}; {TOKENS} new tokens. Printed by `{command}`. Whole calls "
        "over our own plain loop, all prompts together. Plans saw other prompts than those that were measured.\n\n"
        f"Median absolute error of {len(rows)} settings: **{statistics.median(errors):.1%}** ({medians}); the largest "
        f"{max(errors):.1%}.\n\n"
        "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(lines) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="*", default=["embedded", "134m"], choices=["embedded", "134m", "350m"])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    parser.add_argument("--quick", action="store_true", help="two prompts, a tiny synthetic pair: does it run?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out / "error.json", args.fresh)
    for name in args.pairs:
        wanted = cases("embedded", "134m" if name == "embedded" else name)
        todo = [case for case in wanted if case.pair == name and case.key not in study.rows]
        if not todo:
            continue
        pair = pairs.embedded(args.quick) if name == "embedded" else pairs.synthetic(args.quick, name)
        for way in dict.fromkeys(case.way for case in todo):
            cache = args.out / "runs"
            for row in run_way(pair, way, [case for case in todo if case.way == way], cache):
                study.add(row)
                print(f"{row['key']}: predicted {row['predicted']['median']:.2f}, measured "
                      f"{row['measured']['median']:.2f} ({row['error']:+.1%})", flush=True)  # fmt: skip
    rows = [row for row in study.rows.values() if row["pair"] in args.pairs]
    text = text_of(rows, "python experiments/planner/run.py")
    (args.out / "error.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
