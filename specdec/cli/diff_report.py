"""What `specdec diff` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from specdec.report.changes import BEYOND, MIN_SPEED, REAL, SAME, TOO_FEW
from specdec.report.gate import FAIL, PASS, UNDECIDED

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from specdec.report.diff import Difference, Pair
    from specdec.report.gate import Gate

_STYLES = {PASS: "green", FAIL: "bold red", UNDECIDED: "yellow"}


def _table(*heads: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right", no_wrap=i >= left, overflow="fold")
    return table


def _section(console: Console, title: str, *parts: RenderableType) -> None:
    console.print(f"\n[bold]{title}[/]")
    for part in parts:
        console.print(Padding(part, (0, 0, 0, 2), expand=False))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


def _value(value: Any) -> str:
    return "–" if value is None else escape(str(value))


def _environment(console: Console, differences: Mapping[str, tuple[Any, Any]]) -> None:
    if not differences:
        console.print("[dim]environment: the same[/]")
        return
    table = _table("", "before", "after", left=3)
    for name, (before, after) in differences.items():
        table.add_row(escape(name), _value(before), _value(after))
    _section(console, "Environment differs", table)


def _colour(value: float | None, text: str) -> str:
    return text if not value else f"[green]{text}[/]" if value > 0 else f"[red]{text}[/]"


def _verdict(verdict: str, change: float | None) -> str:
    if verdict in (REAL, BEYOND):
        return _colour(change, f"[bold]{verdict}[/]")
    return f"[yellow]{verdict}[/]" if verdict == TOO_FEW else f"[dim]{verdict}[/]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _range(low: str, high: str) -> str:
    return f"[dim]{low} – {high}[/]"


def _acceptance(pairs: Sequence[Pair]) -> Table:
    table = _table("setting", "before", "after", "change", "95 %", "p", "")
    for pair in pairs:
        found = pair.acceptance
        if found is None:
            continue
        table.add_row(
            escape(pair.label),
            f"{found.before:.3f}",
            f"{found.after:.3f}",
            _percent(found.change),
            _range(_percent(found.low), _percent(found.high)) if found.low is not None else "",
            "" if found.verdict == SAME else _p(found.adjusted),
            _verdict(found.verdict, found.change),
        )
    return table


def _speed(pairs: Sequence[Pair]) -> Table:
    table = _table("setting", "before", "after", "ratio", "95 %", "p", "")
    for pair in pairs:
        found = pair.speed
        if found is None:
            continue
        table.add_row(
            escape(pair.label),
            f"{found.before:.2f}×",
            f"{found.after:.2f}×",
            f"{found.ratio:.3f}",
            _range(f"{found.low:.3f}", f"{found.high:.3f}"),
            _p(found.adjusted),
            _verdict(found.verdict, found.ratio - 1),
        )
    return table


def _listed(console: Console, title: str, labels: Sequence[str]) -> None:
    if labels:
        _section(console, f"{title}: {len(labels)}", *(escape(one) for one in labels))


def _alarms(console: Console, found: Difference) -> None:
    checked = [pair.identity for pair in found.pairs if pair.identity is not None and pair.identity.expected]
    if found.alarms:
        lines = [f"[bold red]✗[/] {escape(pair.label)}: {escape(alarm)}" for pair, alarm in found.alarms]
        _section(console, "[red]Alarms[/]", *lines)
    elif checked:
        after = sum(one.after for one in checked)
        total = sum(pair.num_prompts for pair in found.pairs if pair.identity in checked)
        console.print(f"[green]✓[/] no identity lost: {after} of {total} texts are those of plain decoding")
    won = [(pair.label, pair.identity.won) for pair in found.pairs if pair.identity is not None and pair.identity.won]
    for name, prompts in won:
        console.print(f"[green]✓[/] {escape(name)}: {len(prompts)} more texts are those of plain decoding")


def _passed_over(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"[yellow]![/] {escape(note)}")


def _notes(console: Console, pairs: Sequence[Pair]) -> None:
    lines = [f"{escape(pair.label)}: {escape(note)}" for pair in pairs for note in pair.notes]
    if lines:
        _section(console, "Not the same within a pair", *(f"[yellow]![/] {line}" for line in lines))


def show(console: Console, found: Difference, before: str, after: str, *, everything: bool) -> None:
    console.print(f"\nbefore  {escape(before)}\nafter   {escape(after)}")
    _environment(console, found.environment)
    if found.ignored:
        console.print(f"[yellow]paired without[/] {', '.join(found.ignored)}")
    _passed_over(console, found.notes)
    if not found.pairs:
        console.print("[yellow]no setting is in both documents[/]: choose fields that may differ with --ignore FIELDS")
    _alarms(console, found)
    _notes(console, found.pairs)
    judged = [pair for pair in found.pairs if pair.acceptance is not None]
    moved = [pair for pair in judged if everything or (pair.acceptance and pair.acceptance.verdict != SAME)]
    same = found.count("acceptance", SAME)
    summary = f"{len(judged)} cells: {same} with the same rounds"
    for verdict in dict.fromkeys(pair.acceptance.verdict for pair in judged if pair.acceptance):
        if verdict != SAME:
            summary += f", {found.count('acceptance', verdict)} {verdict}"
    if judged:
        _section(console, "Accepted tokens per round", summary, *([_acceptance(moved)] if moved else []))
    timed = [pair for pair in judged if pair.speed is not None]
    if timed:
        faster = [pair for pair in timed if everything or (pair.speed and pair.speed.verdict == BEYOND)]
        summary = f"{len(timed)} cells: {found.count('speed', BEYOND)} beyond noise and at least {MIN_SPEED:.0%} apart"
        _section(console, "Speed-up over the plain loop", summary, *([_speed(faster)] if faster else []))
    _listed(console, "Only before", found.missing)
    _listed(console, "Only after", found.new)
    if judged:
        console.print(
            "\n[dim]real: nothing that is recorded differs and no clock steers the rounds, so it is no noise. p: by "
            "sign flips of prompts, adjusted for all cells (step-down max-T); beyond noise: p ≤ "
            f"{found.level:g}. 95 %: by bootstrap over prompts. Two runs on one machine may differ in speed by more "
            "than their prompts tell.[/]\n"
        )


def show_gate(console: Console, judged: Gate, reference: str, now: str) -> None:
    for head, name, made in zip(("\nreference", "judged   "), (reference, now), judged.made, strict=True):
        console.print(f"{head}  {escape(name)}" + (f" [dim]({escape(made)})[/]" if made else ""))
    _environment(console, judged.environment)
    _passed_over(console, judged.notes)
    table = _table("", "setting", "prompts", "before", "after", "change", "seen from", left=2)
    for cell in judged.cells:
        has = cell.before is not None and cell.after is not None
        table.add_row(
            f"[{_STYLES[cell.outcome]}]{cell.outcome}[/]",
            escape(cell.label),
            str(cell.num_prompts or ""),
            f"{cell.before:.3f}" if has else "",
            f"{cell.after:.3f}" if has else "",
            _percent(cell.change) if has else "",
            "" if cell.reason == SAME or not has else "never" if cell.visible is None else f"−{cell.visible:.1%}",
        )
    _section(console, "Accepted tokens per round", table)
    for cell in judged.cells:
        for line in ([] if cell.outcome == PASS else [cell.reason]) + [f"note: {note}" for note in cell.notes]:
            console.print(f"  [{_STYLES[cell.outcome]}]{escape(cell.label)}[/]: {escape(line)}")
        if cell.prompts_needed is not None:
            console.print(f"  [dim]about {cell.prompts_needed} prompts like these would show it, if nothing is lost[/]")
    _listed(console, "Not in the reference, not judged", judged.extra)
    outcomes = [cell.outcome for cell in judged.cells]
    counts = ", ".join(f"{outcomes.count(one)} {one}" for one in (PASS, FAIL, UNDECIDED) if one in outcomes)
    console.print(f"\n[{_STYLES[judged.outcome]}]{judged.outcome.upper()}[/] ({counts})")
    console.print(
        f"[dim]Tolerance {judged.tolerance:.1%} of the accepted tokens. fail: identity is lost, or a larger loss is "
        f"shown at level {judged.level:g} for all cells together; pass: the same rounds, or such a loss is excluded at "
        "that level. seen from: the loss that fails with 80 % chance.[/]\n"
    )
