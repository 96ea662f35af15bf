"""The page of a study that is a sweep: `NAME.md` and its figures, from the store of `specdec sweep --config NAME.toml`.

    specdec sweep --config experiments/studies/temperature.toml --acceptance-only --store runs/temperature.db
    python experiments/studies/page.py temperature runs/temperature.db

Tokens per round have their interval over prompts (bootstrap); speed-ups, where they were measured, that of the sweep.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study

from specdec.sweep.setting import Setting
from specdec.sweep.store import load_document
from specdec.train import provenance

TITLES = {
    "temperature": "Temperature, for each rule",
    "trees": "Trees, for each rule",
    "sizes": "Size of the draft",
    "batch": "Batch size",
}
# What a table may tell cells apart by, in this order, and how a setting says it.
COLUMNS = {
    "drafter": lambda s: s.source,
    "draft": lambda s: s.shape,
    "batch": lambda s: s.batch,
    "temperature": lambda s: f"{s.temperature:g}",
    "rule": lambda s: s.verifier,
}


def tokens_per_round(cell: dict[str, Any]) -> dict[str, float]:
    rounds = [row["rounds"] for row in cell["rows"]]
    return study.interval([(sum(n + 1 for n in r["accepted"]), len(r["accepted"])) for r in rounds])


def compact(cell: dict[str, Any]) -> dict[str, Any]:
    kept = {name: cell[name] for name in ("setting", "when", "prompts", "identical", "expects_identity", "speedup")}
    measured = {name: cell[name] for name in ("ideal_speedup", "slices", "clean_slices")} if cell["speedup"] else {}
    stats = {name: cell["stats"][name] for name in ("draft_acceptance_rate", "conditional_acceptance")}
    return {**kept, **measured, **stats, "tokens_per_round": tokens_per_round(cell)}


def table(cells: Sequence[dict[str, Any]]) -> str:
    settings = [Setting.of(cell["setting"]) for cell in cells]
    columns = [name for name, says in COLUMNS.items() if len({says(setting) for setting in settings}) > 1]
    timed = any(cell["speedup"] for cell in cells)
    header = [*columns, "tokens per round", "of drafted accepted", "the plain text"]
    header += ["over plain", "ideal"] if timed else []
    lines = []
    for setting, cell in zip(settings, cells, strict=True):
        same = f"{cell['identical']}/{cell['prompts']}" if cell["expects_identity"] else "another"
        line = [COLUMNS[name](setting) for name in columns]
        line += [study.pair_text(cell["tokens_per_round"]), f"{cell['draft_acceptance_rate']:.1%}", same]
        if timed:
            found = cell["speedup"]
            line += [f"{found['median']:.2f}× ({found['low']:.2f}–{found['high']:.2f})" if found else "–"]
            line += [f"{cell['ideal_speedup']:.2f}×" if found else "–"]
        lines.append(line)
    return study.table(header, lines)


def made_by(name: str, document: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    found, setting = document["environment"], cells[0]["setting"]
    timed = bool(cells[0]["speedup"])
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    clean = (
        f"; {sum(c['clean_slices'] for c in cells)}/{sum(c['slices'] for c in cells)} clean timings" if timed else ""
    )
    return (
        f"`specdec sweep --config experiments/studies/{name}.toml{'' if timed else ' --acceptance-only'}` ({versions}; "
        f"{found['device']}, {found['processor']}, {found['threads']} thread(s), {setting['dtype'] or 'float32'}; "
        f"{cells[0]['prompts']} prompts, {setting['max_new_tokens']} new tokens{clean or '; not timed'})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TITLES)
    parser.add_argument("store", type=Path, help="of the sweep, or its JSON")
    parser.add_argument("--out", type=Path, default=study.HERE, help="folder of the results (default: this one)")
    args = parser.parse_args()
    document = load_document(args.store)
    failed = [cell["label"] for cell in document["cells"] if cell["status"] != "done"]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed ({failed[0]}): run the sweep again with --retry-failed")
    cells = [compact(cell) for cell in document["cells"]]
    args.out.mkdir(parents=True, exist_ok=True)
    provenance.write_json(args.out / f"{args.name}.json", {"environment": document["environment"], "cells": cells})
    study.publish(args, args.name, TITLES[args.name], table(cells), made_by(args.name, document, cells))


if __name__ == "__main__":
    main()
