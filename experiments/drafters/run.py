"""Every drafter on the embedded target, at two temperatures, on three kinds of prompts.

    python experiments/drafters/run.py [--quick] [--temperature 0 1] [--ways model eagle ...] [--repetitions 3]

All ways run in turns on the same prompts, each against the plain loop of the same turn. Writes one JSON file per
temperature and `results.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

from measure import PLAIN, Study, Way, arguments, circumstances, embedded, interval, prompts_of, write

from specdec.tree_policy import AdaptiveTree

KINDS = ("code", "edit", "prose")
WAYS = (
    Way("model", "model"),
    Way("model, tree", "model", AdaptiveTree()),
    Way("ngram", "ngram"),
    Way("suffix", "suffix"),
    Way("medusa", "medusa"),
    Way("medusa, tree", "medusa", AdaptiveTree()),
    Way("eagle", "eagle"),
    Way("eagle, tree", "eagle", AdaptiveTree()),
    Way("early_exit", "early_exit"),
    Way("self_quant", "self_quant"),
    Way("parallel", "parallel"),
    Way("parallel, tree", "parallel", AdaptiveTree()),
    Way("hybrid", "hybrid"),
    Way("lookahead", "lookahead"),
)


def table(result: dict[str, Any]) -> str:
    head = "| drafter | kind | tokens per round | nodes | of drafted accepted | over plain | efficiency | same text |"
    lines = [head, "|---" * 8 + "|"]
    for name, kinds in result["rows"].items():
        for kind, row in kinds.items():
            cells = [
                name,
                kind,
                f"{row['mean_acceptance_length']:.2f}",
                f"{row['nodes_per_round']:.1f}",
                f"{row['draft_acceptance_rate']:.2f}",
                interval(row["speedup"]),
                f"{row['efficiency']:.2f}",
                f"{row['identical']}/{row['prompts']}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(temperature: float, args: argparse.Namespace) -> dict[str, Any]:
    ways = [way for way in WAYS if not args.ways or way.name in args.ways]
    prompts = prompts_of(KINDS, 1 if args.quick else None)
    study = Study(embedded(), ways)
    options = {"max_new_tokens": 32 if args.quick else 96, "temperature": temperature, "seed": 1}
    every = [p for kind in KINDS for p in prompts[kind]]
    study.warm_up(every[0].text, options)
    gate = study.measure(every, 1 if args.quick else args.repetitions, options)
    costs = study.bare_costs(every[0].text)
    rows = {
        way.name: {
            **{kind: study.row(way.name, prompts[kind], costs) for kind in KINDS},
            "all": study.row(way.name, every, costs),
        }
        for way in ways
    }
    return {
        "date": datetime.date.today().isoformat(),
        "temperature": temperature,
        "options": options,
        "clean_slices": gate.num_clean,
        "slices": gate.num_slices,
        **circumstances(),
        "bare_target_seconds": costs.target,
        "plain_seconds": {p.id: [run.seconds for run in study.runs[PLAIN, p.id]] for p in every},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.0, 1.0])
    parser.add_argument("--ways", nargs="*", choices=[way.name for way in WAYS])
    args = arguments(__doc__, parser)
    for temperature in args.temperature:
        write(args.out / f"embedded-t{temperature:g}.json", measure(temperature, args))
    text = "# Drafters on the embedded target\n"
    for path in sorted(args.out.glob("embedded-t*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        text += (
            f"\n## Temperature {result['temperature']:g}, {result['date']}\n\n`python experiments/drafters/run.py` on "
            f"{result['machine']}, {result['threads']} thread(s), float32, torch {result['torch']}, transformers "
            f"{result['transformers']}; {result['clean_slices']}/{result['slices']} clean slices. Median of paired "
            "ratios over the plain loop, whole calls, bootstrap 95 % intervals. `efficiency`: of what bare target "
            "forwards and "
            "the draft stage would allow.\n\n" + table(result) + "\n"
        )
    (args.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
