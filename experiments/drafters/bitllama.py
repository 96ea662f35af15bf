"""Every drafter on bitllama-1M, with heads trained on its own texts; models and stories lie beside the checkout.

    python experiments/drafters/bitllama.py --models FOLDER --stories FILE --heads FOLDER [--acceptance] [--quick]

Heads that are not there yet are trained first (some minutes); an interrupted training goes on. `--acceptance` takes
fixed draft lengths and no clock, so its numbers are the same on every run: `bitllama-acceptance.json`. Without it,
all ways run in turns against the plain loop under the default policy, as in `run.py`: `bitllama-t*.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import run
from measure import Study, Way, arguments, circumstances, prompts_of, write

from specdec.bench.prompts import Prompt
from specdec.policy import Fixed, Policy
from specdec.trace import summarize
from specdec.tree_policy import AdaptiveTree, DynamicTree

KINDS = ("story", "edit", "prose")
PER_KIND = 6
_TEXTS = ("--self-generate", "384", "--self-temperature", "0,1", "--text-share", "0", "--prompt-tokens", "48")
_TRAIN = ("--length", "160", "--evaluations", "8", *_TEXTS)
HEADS: dict[str, tuple[str, ...]] = {
    "medusa": ("medusa", "--steps", "250"),
    "eagle": ("eagle", "--steps", "250"),
    "parallel": ("dflash", "--steps", "400"),
}


def stories(path: Path) -> list[str]:
    """The prompts of a YAML list of block texts."""
    blocks = re.findall(r"^- \|-\n((?:  .*\n|\n)+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return ["\n".join(line[2:] for line in block.rstrip("\n").split("\n")) for block in blocks]


def prompts(texts: Sequence[str]) -> list[Prompt]:
    """Beginnings of stories; stories whose beginning comes again; and the English sentences of the other study."""
    chosen = texts[:PER_KIND]
    found = [Prompt(f"story/{i}", text, category="story") for i, text in enumerate(chosen)]
    for i, text in enumerate(chosen):
        again = text[: max(20, len(text) // 4)]
        found.append(Prompt(f"edit/{i}", f"{text}\n\n{again}", category="edit"))
    return [*found, *prompts_of(("prose",), PER_KIND)["prose"]]


def train(models: Path, texts: Sequence[str], heads: Path) -> None:
    """Heads that are not there yet, on texts that the target writes behind beginnings of the other stories."""
    heads.mkdir(parents=True, exist_ok=True)
    data = heads / "beginnings.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for text in texts[PER_KIND:]:
            words = text.split(" ")
            file.writelines(
                json.dumps({"text": " ".join(words[:count])}) + "\n" for count in range(4, len(words) + 1, 6)
            )
    for name, options in HEADS.items():
        if (heads / name / "provenance.json").is_file():
            continue
        target = ["--target", str(models / "bitllama-1M"), "--data", str(data), "--threads", "1"]
        command = [sys.executable, "-m", "specdec", "train", *options, *target, *_TRAIN, "--out", str(heads / name)]
        subprocess.run(command, check=True)


def ways(models: Path, heads: Path, acceptance: bool) -> list[Way]:
    chain: Policy | None = Fixed(4) if acceptance else None
    tree: Policy = DynamicTree(24, 4, 8) if acceptance else AdaptiveTree()
    draft, own = str(models / "stories260K"), {name: str(heads / name) for name in HEADS}
    branching = {"model": draft, **own}
    found = [Way(name, source, chain) for name, source in branching.items()]
    found += [Way(f"{name}, tree", source, tree) for name, source in branching.items()]
    found += [Way(name, name, chain) for name in ("ngram", "suffix", "early_exit", "self_quant", "lookahead")]
    # At fixed lengths a hybrid's choice would be the clock's.
    return found if acceptance else [*found, Way("hybrid", "hybrid", None, {"neural": own["eagle"]})]


def accepted(study: Study, asked: Sequence[Prompt], temperature: float, count: int) -> dict[str, Any]:
    """By way and kind, without a clock; every text is compared with the plain one."""
    options = {"max_new_tokens": count, "temperature": temperature, "seed": 1}
    rows: dict[str, Any] = {}
    plain = {p.id: next(iter(study.decoders.values())).generate_plain(p.text, **options).tokens for p in asked}
    for name, decoder in study.decoders.items():
        made = {p.id: decoder.generate(p.text, **options) for p in asked}
        for kind in KINDS:
            chosen = [p for p in asked if p.category == kind]
            rounds = [r for p in chosen for r in made[p.id].trace.rounds]
            stats = summarize(rounds, sum(len(made[p.id].tokens) for p in chosen))
            rows.setdefault(name, {})[kind] = {
                "mean_acceptance_length": stats.mean_acceptance_length,
                "draft_acceptance_rate": stats.draft_acceptance_rate,
                "nodes_per_round": sum(r.num_nodes for r in rounds) / len(rounds),
                "identical": sum(made[p.id].tokens == plain[p.id] for p in chosen),
                "prompts": len(chosen),
            }
        print(f"temperature {temperature:g}: {name}", flush=True)
    return rows


def provenance(heads: Path) -> dict[str, Any]:
    """What the heads were trained on and for how long, without the curve."""
    found = {}
    for name in HEADS:
        record = json.loads((heads / name / "provenance.json").read_text(encoding="utf-8"))
        wanted = ("target", "data", "tokens_seen", "steps_done", "num_trained_parameters", "best")
        found[name] = {key: record[key] for key in wanted}
    return found


def acceptance_table(result: Mapping[str, Any]) -> str:
    lines = ["| drafter | temperature | story | edit | prose | of drafted accepted (story) | same text |"]
    lines.append("|---" * 7 + "|")
    for temperature, rows in result["rows"].items():
        for name, kinds in rows.items():
            lengths = [f"{kinds[kind]['mean_acceptance_length']:.2f}" for kind in KINDS]
            same = f"{sum(k['identical'] for k in kinds.values())}/{sum(k['prompts'] for k in kinds.values())}"
            cells = [name, temperature, *lengths, f"{kinds['story']['draft_acceptance_rate']:.2f}", same]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("models", "stories", "heads"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--acceptance", action="store_true")
    args = arguments(__doc__, parser)
    texts = stories(args.stories)
    train(args.models, texts, args.heads)
    asked = prompts(texts)
    if args.quick:
        asked = [next(p for p in asked if p.category == kind) for kind in KINDS]
    count = 24 if args.quick else 96
    study = Study(args.models / "bitllama-1M", ways(args.models, args.heads, args.acceptance))
    about = {"date": datetime.date.today().isoformat(), "heads": provenance(args.heads), **circumstances()}
    if args.acceptance:
        rows = {f"{temperature:g}": accepted(study, asked, temperature, count) for temperature in (0.0, 1.0)}
        result = {**about, "max_new_tokens": count, "seed": 1, "rows": rows}
        write(args.out / "bitllama-acceptance.json", result)
        text = (
            f"# Drafters on bitllama-1M: tokens per round, {result['date']}\n\nChains of 4, trees of 24 nodes, "
            f"{count} tokens, `python experiments/drafters/bitllama.py --acceptance`; no clock, so every run gives "
            f"these numbers.\n\n{acceptance_table(result)}\n"
        )
        (args.out / "bitllama-acceptance.md").write_text(text, encoding="utf-8")
        print(text)
        return
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": count, "temperature": temperature, "seed": 1}
        study.runs.clear()
        study.warm_up(asked[0].text, options)
        gate = study.measure(asked, 1 if args.quick else args.repetitions, options)
        costs = study.bare_costs(asked[0].text)
        groups = {**{kind: [p for p in asked if p.category == kind] for kind in KINDS}, "all": asked}
        rows = {w.name: {kind: study.row(w.name, some, costs) for kind, some in groups.items()} for w in study.ways}
        slices = {"clean_slices": gate.num_clean, "slices": gate.num_slices}
        result = {**about, "temperature": temperature, "options": options, **slices, "rows": rows}
        write(args.out / f"bitllama-t{temperature:g}.json", result)
        print(f"temperature {temperature:g}\n{run.table(result)}", flush=True)


if __name__ == "__main__":
    main()
