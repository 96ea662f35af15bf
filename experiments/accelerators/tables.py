"""The figures of `run.py` as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def exports(found: Mapping[str, Any]) -> list[str]:
    one = min(about["sizes"]["program_bytes"] for about in found.values())
    head = ("artefact", "graphs", "MB", "× one graph", "export, s of CPU", "peak memory, MB")
    return table(
        head,
        [
            (
                label,
                ", ".join(about["coverage"]),
                f"{about['sizes']['program_bytes'] / 1e6:.2f}",
                f"{about['sizes']['program_bytes'] / one:.3f}",
                f"{about.get('cpu_seconds', float('nan')):.0f}",
                f"{about['peak_memory_bytes'] / 1e6:.0f}",
            )
            for label, about in found.items()
        ],
    )


def steps(found: Mapping[str, Any]) -> list[str]:
    widths = list(next(iter(found.values())))
    rows = [
        (label, *(f"{times[w]:.2f}" for w in widths), *(f"{times[w] / times['1']:.2f}" for w in ("4", "7")))
        for label, times in found.items()
    ]
    return table(("step, ms", *(f"{w} rows" if w.isdigit() else w for w in widths), "4 rows / 1", "7 rows / 1"), rows)


def decoding(found: Mapping[str, Any]) -> list[str]:
    head = ("decoding", "k", "plain, ms/token", "speculative / plain", "ideal", "efficiency", "same texts", "as eager")
    rows = []
    for name, row in found.items():
        if not name.startswith("texts, "):
            continue
        speedup = row["speedup"]
        rows.append(
            (
                name.split(", ")[1],
                row["k"],
                f"{row['plain_ms_per_token']:.2f}",
                f"{speedup['median']:.2f} ({speedup['low']:.2f}–{speedup['high']:.2f})",
                f"{row['ideal']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['identical']}/{row['prompts']}",
                f"{row['as_eager']}/{row['prompts']}",
            )
        )
    return table(head, rows)


def updaters(found: Sequence[Mapping[str, Any]]) -> list[str]:
    copied = ("rows/step, prompts too", "bytes/row", "published", "bytes/step", "µs/step", "ms/step")
    head = ("updater", *copied, "held, kB", "published, kB", "same text")
    rows = []
    for row in found:
        cost = row["published"]
        time = row["microseconds_per_step"]
        rows.append(
            (
                row["updater"],
                f"{row['rows_per_step']:.2f}",
                f"{row['bytes_per_row']:.0f}",
                "-" if cost is None else cost["copied_keys"] + cost["copied_values"],
                f"{row['bytes_per_step']:.0f}",
                "in the graph" if time is None else f"{time:.0f}",
                f"{row['milliseconds_per_step']:.2f}",
                f"{row['held_bytes'] / 1e3:.0f}",
                "-" if cost is None else f"{(cost['held_keys'] + cost['held_values']) / 1e3:.0f}",
                "yes" if row["same_text"] else "no",
            )
        )
    return table(head, rows)


def report(found: Mapping[str, Any]) -> str:
    lines = [f"## {found['pair']}, {found['date']}, {found['threads']} threads", ""]
    lines += exports(found["exports"]) + steps(found["step_ms"]) + decoding(found)
    if "updaters" in found:
        lines += updaters(found["updaters"])
    prefix = "first token, "
    first = ", ".join(f"{k.removeprefix(prefix)} {v:.1f} ms" for k, v in found.items() if k.startswith(prefix))
    versions = next(iter(found["exports"].values()))["contract"]["versions"]
    clean, every = found["clean_slices"]
    peak = found["peak_memory"].get("process", 0) / 1e6
    lines += [
        f"First token after a prompt of {found['prompt']} (one graph: kv mode; four graphs: hybrid): {first}. "
        f"Clean slices: {clean} of {every}. Peak memory of the run: {peak:.0f} MB. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"
