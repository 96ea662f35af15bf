"""Fitted trees against the best chain and the untuned 63-node tree of Medusa, per drafter, in the same run.

    python experiments/drafters/trees.py [--quick] [--drafters medusa eagle parallel model] [--repetitions 3]

For each drafter: fit a tree (`specdec tree`), then decode in turns under every chain length, the fitted tree, the
63-node tree, and the trees that follow the drafter's probabilities. Writes JSON per drafter and `trees.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from typing import Any

from measure import Study, Way, arguments, circumstances, embedded, interval, prompts_of, write

from specdec.bench.prompts import read_prompts
from specdec.bench.timing import bootstrap
from specdec.fit import fit
from specdec.policy import Fixed
from specdec.tree_policy import AdaptiveTree, DynamicTree, StaticTree, shape_of_choices

CHAINS = (1, 2, 3, 4, 5, 6)
# The tree that Medusa's first release used for a 7B model, by ranks (arXiv 2401.10774), as published.
_RANKS = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 0000 "
    "011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)
MEDUSA_63 = shape_of_choices([[int(rank) for rank in path] for path in _RANKS.split()])


def study_of(drafter: str, args: argparse.Namespace) -> dict[str, Any]:
    tokens = 24 if args.quick else 96
    fitting = Study(embedded(), [Way("fit", drafter)])
    held = [p.text for p in read_prompts()][6 : 8 if args.quick else 14]  # not those that are measured below
    fitting.warm_up(held[0], {})
    plan = fit(fitting.decoders["fit"], held, nodes=64, max_new_tokens=tokens)
    ways = [Way(f"chain of {k}", drafter, Fixed(k)) for k in (CHAINS[:2] if args.quick else CHAINS)]
    ways += [Way("63-node tree", drafter, StaticTree(MEDUSA_63)), Way("best 24 nodes", drafter, DynamicTree(24, 6, 8))]
    ways += [Way("adaptive tree", drafter, AdaptiveTree()), Way("throughput chain", drafter)]
    if plan.shape:
        ways.append(Way("fitted tree", drafter, StaticTree(plan.shape)))
    prompts = [p for kind in prompts_of(("code", "edit", "prose"), 1 if args.quick else 4).values() for p in kind]
    study = Study(embedded(), ways)
    options = {"max_new_tokens": tokens}
    study.warm_up(prompts[0].text, options)
    gate = study.measure(prompts, 1 if args.quick else args.repetitions, options)
    costs = study.bare_costs(prompts[0].text)
    rows = {way.name: study.row(way.name, prompts, costs) for way in ways}
    chains = [way.name for way in ways if way.name.startswith("chain of")]
    best = max(chains, key=lambda name: rows[name]["speedup"]["median"])
    against = {
        other: bootstrap(study.speedups("fitted tree", prompts, other)).as_dict()
        for other in (best, "63-node tree")
        if plan.shape
    }
    return {
        "date": datetime.date.today().isoformat(),
        "drafter": drafter,
        "shape": plan.shape,
        "evidence": plan.evidence,
        "clean_slices": gate.num_clean,
        "slices": gate.num_slices,
        **circumstances(),
        "best_chain": best,
        "fitted_over": against,
        "rows": rows,
    }


def section(result: dict[str, Any]) -> str:
    lines = ["| draft | nodes | tokens per round | over plain |", "|---|---|---|---|"]
    for name, row in result["rows"].items():
        tokens = f"{row['mean_acceptance_length']:.2f}"
        lines.append(f"| {name} | {row['nodes_per_round']:.1f} | {tokens} | {interval(row['speedup'])} |")
    over = ", ".join(f"{interval(value)} over {name}" for name, value in result["fitted_over"].items())
    measured = result["evidence"]["costs"]
    verify = sorted(measured["verify"].items(), key=lambda item: int(item[0]))
    costs = ", ".join(f"{w}: {1e3 * s:.2f}" for w, s in verify)
    return (
        f"\n## {result['drafter']}, {result['date']}\n\n"
        f"Fitted: {len(result['shape'])} nodes. {over or 'No tree pays.'}\nVerification by rows, ms: {costs}; a draft "
        f"level {1e3 * measured['level']:.3f}, an expanded node {1e3 * measured['node']:.3f}. "
        f"{result['clean_slices']}/{result['slices']} clean slices.\n\n" + "\n".join(lines) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drafters", nargs="*", default=["medusa", "eagle", "parallel", "model"])
    args = arguments(__doc__, parser)
    for drafter in args.drafters:
        write(args.out / f"trees-{drafter}.json", study_of(drafter, args))
    text = "# Trees against chains on the embedded target\n\n`python experiments/drafters/trees.py`\n"
    for path in sorted(args.out.glob("trees-*.json")):
        text += section(json.loads(path.read_text(encoding="utf-8")))
    (args.out / "trees.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
