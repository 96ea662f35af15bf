"""Spec-Bench's table, for terminals and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.bench.specbench import PUBLISHED, PUBLISHED_ON, Figures, SpecBench, measure_document
from specdec.bench.specbench_tasks import COLUMNS

if TYPE_CHECKING:
    from rich.console import Console

# Full heads need this much; else the benchmark's own short ones.
_WIDE = 120
_SHORT = dict(zip(COLUMNS, ("Multi", "Trans", "Sum", "QA", "Math", "RAG"), strict=True))
_NONE = "–"
_SPEED = (
    "Speed-ups as Spec-Bench has them: tokens per second averaged over questions, over the plain loop's; below them "
    "95 %, questions resampled in pairs. MAT: tokens per target step, the target's own included."
)
_FORKED = "Prompts were prefilled beforehand, so these times leave the prefill out; Spec-Bench's include it."


def _times(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}×"


def _range(one: Figures | None) -> str:
    """One question says nothing about others."""
    if one is None or one.low is None or one.high is None or one.num_questions < 2:
        return ""
    return f"{one.low:.2f}–{one.high:.2f}"


def _over(one: Figures | None) -> str:
    """A speed-up over its interval."""
    own = _range(one)
    return f"{_times(one.speedup if one else None)}{f'{chr(10)}[not bold dim]{own}[/]' if own else ''}"


def _cells(made: SpecBench) -> list[Figures | None]:
    return [made.tasks.get(task) for task in COLUMNS]


def _measured_tasks(results: Sequence[tuple[str, SpecBench]]) -> str:
    counts = [(COLUMNS[task], one.num_questions) for task, one in results[0][1].tasks.items()]
    each = {count for _, count in counts}
    if len(each) == 1 and len(counts) == len(COLUMNS):
        return f"{each.pop()} of the 80 questions of each task"
    return "questions: " + ", ".join(f"{name} {count}" for name, count in counts)


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What has to be known to compare the table with others."""
    results = measure_document(document)
    lines = [_SPEED, f"Measured on {_measured_tasks(results)}; all turns of a question count as one."]
    cut = max(made.overall.num_cut for _, made in results)
    if cut:
        total = results[0][1].overall.num_turns
        lines.append(f"{cut} of {total} prompts were cut in front to fit the context: not comparable with whole ones.")
    if any((cell.get("timing") or {}).get("prefill") == "forked" for cell in document["cells"]):
        lines.append(_FORKED)
    return lines


def show(console: Console, document: Mapping[str, Any], *, published: bool = False) -> bool:
    """Print the six columns, MAT and Overall of every cell of Spec-Bench; MAT by task; and, if asked for, what others
    published. Returns whether there was such a cell; prints nothing if not.
    """
    from rich.markup import escape
    from rich.table import Table

    results = measure_document(document)
    if not results:
        return False
    heads = COLUMNS if console.width >= _WIDE else _SHORT

    def table(first: str, *last: str) -> Table:
        made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        made.add_column(first, overflow="ellipsis", max_width=34)
        for head in (*heads.values(), *last):
            made.add_column(head, justify="right", no_wrap=True)
        return made

    speed, accepted = table("speed-up", "MAT", "Overall"), table("MAT", "all")
    for label, made in results:
        figures, overall = _cells(made), made.overall
        speed.add_row(
            escape(label),
            *(_over(one) for one in figures),
            f"{overall.mean_accepted:.2f}",
            f"[bold]{_over(overall)}[/]",
        )
        values = (f"{one.mean_accepted:.2f}" if one else _NONE for one in (*figures, overall))
        accepted.add_row(escape(label), *values)
    console.print("\n[bold]Spec-Bench[/]")
    console.print(speed)
    console.print()
    console.print(accepted)
    if published:
        console.print(f"\n[bold]Published[/] [dim]({PUBLISHED_ON})[/]")
        console.print(_published(table("speed-up", "MAT", "Overall")))
    console.print()
    for line in remarks(document):
        console.print(f"[dim]{line}[/]")
    return True


def _published(table: Any) -> Any:
    for name, values in PUBLISHED.items():
        *tasks, mean_accepted, overall = values
        table.add_row(name.replace("[", "\\["), *map(_times, tasks), f"{mean_accepted:.2f}", _times(overall))
    return table


def markdown(document: Mapping[str, Any], *, published: bool = False) -> str:
    """The same as a Markdown table; an empty string where no cell is Spec-Bench's."""
    results = measure_document(document)
    if not results:
        return ""
    heads = ["", *COLUMNS.values(), "MAT", "Overall"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for label, made in results:
        values = [_beside(one) for one in _cells(made)]
        lines.append(_line(label, *values, f"{made.overall.mean_accepted:.2f}", _beside(made.overall)))
    if published:
        for name, row in PUBLISHED.items():
            *tasks, mean_accepted, overall = row
            lines.append(_line(f"{name} (published)", *map(_times, tasks), f"{mean_accepted:.2f}", _times(overall)))
    notes = remarks(document)
    if published:
        notes.append(f"Published: {PUBLISHED_ON}.")
    return "\n".join([*lines, "", *notes]) + "\n"


def _beside(one: Figures | None) -> str:
    if one is None or one.speedup is None:
        return _NONE
    own = _range(one)
    return f"{_times(one.speedup)} ({own})" if own else _times(one.speedup)


def _line(*values: str) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
