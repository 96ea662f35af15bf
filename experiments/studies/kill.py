"""A sweep of 60 cells on the embedded pair is killed with SIGKILL at random moments, and started again each time.

    python experiments/studies/kill.py --kills 5 --seed 0 --out experiments/studies/kill.md
    python experiments/studies/kill.py --timed        # cells with times: longer, and through all of the code

Its figures of acceptance must be those of a sweep that nobody disturbed. The command is the one that users type, in a
process of its own; moments are drawn evenly over the cells that are left, at least one of which must have finished
since the last kill, so that kills fall into cells, between them, and into the writing of their results.
"""

from __future__ import annotations

import argparse
import datetime
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from specdec.sweep.store import load_document

# 3 drafters x 5 lengths x 2 temperatures x 2 rules.
GRID = ("--drafter", "model,ngram,eagle", "--k", "1,2,3,5,8", "--temperature", "0,1", "--verifier", "coupled,ratio")
NUM_CELLS = 60
FIGURES = ("num_tokens", "num_rounds", "num_draft_tokens", "num_accepted_draft_tokens", "mean_acceptance_length")
FIGURES += ("draft_acceptance_rate", "acceptance_histogram", "joint_acceptance", "conditional_acceptance")


def command(store: Path, more: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "specdec", "sweep", *GRID, "--store", str(store), *more]


def num_finished(store: Path) -> int:
    """Cells in the store, by a look from outside."""
    if not store.exists():
        return 0
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM cells").fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not there yet
            return 0


def kill_and_resume(store: Path, more: Sequence[str], kills: int, chance: random.Random, per_cell: float) -> list[int]:
    """Run until it is done, with `kills` kills on the way; cells in the store after each."""
    found: list[int] = []
    while len(found) < kills:
        before = num_finished(store)
        share = (NUM_CELLS - before) / (kills - len(found) + 1)
        wanted = before + chance.randint(1, max(1, int(share)))
        process = subprocess.Popen(command(store, more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and num_finished(store) < wanted:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, per_cell))
        if process.poll() is not None:
            raise RuntimeError(f"it ended before kill {len(found) + 1}, with exit code {process.returncode}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        found.append(num_finished(store))
        print(f"killed with {found[-1]} of {NUM_CELLS} cells in the store", flush=True)
    subprocess.run(command(store, more), check=True, stdout=subprocess.DEVNULL)
    return found


def acceptance(document: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions, by key."""
    return {
        cell["key"]: [
            cell["setting"],
            cell["identical"],
            [row["rounds"] for row in cell["rows"]],
            [cell["stats"][name] for name in FIGURES],
        ]
        for cell in document["cells"]
        if cell["status"] == "done"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=2, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--timed", action="store_true", help="with times, one repetition")
    parser.add_argument("--out", type=Path, help="write the result there")
    given = parser.parse_args()
    more = ["--limit", str(given.limit), "--max-new-tokens", str(given.max_new_tokens)]
    more += ["--repetitions", "1"] if given.timed else ["--acceptance-only"]
    with tempfile.TemporaryDirectory() as folder:
        quiet, disturbed = (Path(folder).resolve() / name for name in ("quiet.db", "disturbed.db"))
        started = time.monotonic()
        subprocess.run(command(quiet, more), check=True, stdout=subprocess.DEVNULL)
        per_cell = (time.monotonic() - started) / NUM_CELLS
        kills = kill_and_resume(disturbed, more, given.kills, random.Random(given.seed), per_cell)
        a, b = acceptance(load_document(quiet)), acceptance(load_document(disturbed))
    same = a == b and len(a) == NUM_CELLS
    differing = sum(a.get(key) != b.get(key) for key in {*a, *b})
    line = f"{len(b)} cells after {len(kills)} kills (with {', '.join(map(str, kills))} cells in the store): " + (
        "acceptance figures are those of the undisturbed sweep" if same else f"{differing} CELLS DIFFER"
    )
    print(line)
    if given.out is not None:
        options = " ".join(sys.argv[1:])
        today = datetime.date.today().isoformat()
        given.out.write_text(f"{today}, `python experiments/studies/kill.py {options}`\n\n{line}\n", encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
