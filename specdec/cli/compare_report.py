"""The report of `specdec compare`, drawn from the same fields that `--json` writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from specdec.cli import screen
from specdec.trace import STAGES

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Above this, prompts are summed up by category.
_MAX_ROWS = 24
# Positions shown; acceptance beyond them is in the JSON.
_MAX_POSITIONS = 10
_BAR = 24


def _table(*heads: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < left else "right", no_wrap=True)
    return table


def _section(console: Console, title: str, *parts: RenderableType) -> None:
    console.print(f"\n[bold]{title}[/]")
    for part in parts:
        console.print(Padding(part, (0, 0, 0, 2), expand=False))


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: float, mark: bool = True) -> str:
    text = f"{value:.2f}×"
    return text if not mark else f"[green]{text}[/]" if value >= 1.005 else f"[red]{text}[/]" if value < 0.995 else text


def _range(low: str, high: str) -> str:
    return f"[dim]{low} – {high}[/]"


def _short(text: str, width: int) -> str:
    """The end of a long id tells more than its beginning."""
    return escape(text if len(text) <= width else "…" + text[1 - width :])


def _head(console: Console, report: dict[str, Any]) -> None:
    options = report["options"]

    def model(part: str) -> str:
        number = report["parameters"][part]
        size = "no weights" if number is None else f"{screen.count(number)} parameters"
        formats = report["stored_as"][part]
        size += f", {formats}" if formats else ""
        return f"{escape(report[part])} [dim]({size})[/]"

    sampling = "greedy" if not options["temperature"] else f"temperature {options['temperature']:g}"
    for name in ("top_k", "top_p", "min_p"):
        if options["temperature"] and options[name] is not None:
            sampling += f", {name} {options[name]:g}"
    if options["temperature"]:
        sampling += f", seed {options['seed']}"
    threads = f", {report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("target", model("target"))
    grid.add_row("drafter", model("draft"))
    grid.add_row("method", f"verifier {report['verifier']}, policy {report['policy']}")
    runs = f"{report['prompts']} prompts × {report['repetitions']}"
    grid.add_row("texts", f"{runs}, {sampling}, up to {options['max_new_tokens']} new tokens")
    grid.add_row("where", f"{report['device']}, {report['dtype_reason'] or report['dtype']}{threads}")
    grid.add_row("step", f"{report['backend']}; {report['numerics']} numerics")
    grid.add_row("versions", versions)
    console.print()
    console.print(grid)


def _identity(console: Console, report: dict[str, Any]) -> None:
    same, total = report["identical"], report["prompts"]
    if not report["stats"]["lossless"]:
        line = f"[yellow]![/] lossy verifier: {same}/{total} texts happen to be those of plain decoding"
    elif not report["expects_identity"]:
        line = (
            f"[green]✓[/] same law, other tokens: the {report['verifier']} verifier does not keep the seed at "
            f"temperature > 0 [dim](identical texts: {same}/{total})[/]"
        )
    elif same == total:
        line = f"[bold green]✓ identical texts {same}/{total}[/]"
    else:
        line = f"[bold red]✗ identical texts {same}/{total}[/]"
    console.print()
    console.print(line)
    for found in report["divergences"]:
        bug = found["verdict"] == "BUG"
        style = "bold red" if bug else "yellow"
        measured = [f"{name} {found[name]:.2g}" for name in ("margin", "gap", "noise") if found[name] is not None]
        text = (
            f"[{style}]{found['verdict']}[/] {_short(found['id'], 40)}: new token {found['index']} is "
            f"{found['plain_token']} plainly, {found['speculative_token']} speculatively"
            f"{'; ' if measured else ''}{', '.join(measured)}\n[dim]{escape(found['reason'])}[/]"
        )
        console.print(Padding(text, (0, 0, 0, 2), expand=False))
    if report["stats"]["num_redecided"]:
        stats = report["stats"]
        console.print(
            f"  [dim]exact: {stats['num_redecided']} doubtful positions decided again at width 1, "
            f"{stats['redecide_seconds']:.3f} s of verify[/]"
        )
    if report["stats"]["drafter_error"]:
        console.print(f"  [yellow]finished by plain decoding:[/] {escape(report['stats']['drafter_error'])}")


def _speed(console: Console, report: dict[str, Any]) -> None:
    table = _table("", "tokens/s", "95 %", "speed", "95 %", "spec. ÷ it", "same")

    def rate(value: dict[str, float]) -> tuple[str, str]:
        return _rate(value["median"]), _range(_rate(value["low"]), _rate(value["high"]))

    speedup = report["speedup"]
    table.add_row("plain loop", *rate(report["plain"]["tokens_per_second"]), "1.00×", "", "", "")
    table.add_row(
        "[bold]speculative[/]",
        *rate(report["speculative"]["tokens_per_second"]),
        f"[bold]{_times(speedup['median'])}[/]",
        _range(f"{speedup['low']:.2f}", f"{speedup['high']:.2f}"),
        "",
        f"{report['identical']}/{report['prompts']}",
    )
    for name, found in report["baselines"].items():
        over, plain = found["speculative_over_it"], found["plain_over_it"]
        table.add_row(
            name,
            *rate(found["tokens_per_second"]),
            _times(1 / plain["median"], mark=False),
            _range(f"{1 / plain['high']:.2f}", f"{1 / plain['low']:.2f}"),
            f"{over['median']:.2f}×",
            f"{found['identical']}/{report['prompts']}",
        )
    if not report["baselines"]:
        table.columns[5].header = ""
    if report["stats"]["num_draft_tokens"]:
        line = (
            f"ideal [bold]{report['ideal_speedup']:.2f}×[/], efficiency [bold]{report['efficiency']:.0%}[/] "
            "[dim](what bare forwards would allow, and how much of it is reached)[/]"
        )
    else:
        line = "[dim]nothing was drafted: this is the plain loop twice[/]"
    _section(console, "Speed", table, line)


def _acceptance(console: Console, report: dict[str, Any]) -> None:
    stats = report["stats"]
    depth = len(stats["joint_acceptance"])
    shown = min(depth, _MAX_POSITIONS)
    line = (
        f"mean acceptance length [bold]{stats['mean_acceptance_length']:.2f}[/] tokens per round · draft acceptance "
        f"rate [bold]{stats['draft_acceptance_rate']:.1%}[/]\n"
        f"[dim]{stats['num_rounds']} rounds, {stats['num_draft_tokens']} tokens drafted, "
        f"{stats['num_accepted_draft_tokens']} accepted[/]"
    )
    parts: list[RenderableType] = [line]
    if shown:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
        table.add_column("position", no_wrap=True)
        for i in range(shown):
            table.add_column(str(i + 1), justify="right", min_width=4)
        table.add_row("conditional", *(f"{x:.2f}" for x in stats["conditional_acceptance"][:shown]))
        table.add_row("joint", *(f"{x:.2f}" for x in stats["joint_acceptance"][:shown]))
        parts.append(table)
        if depth > shown:
            parts.append(f"[dim]… {depth - shown} more positions in --json[/]")
    parts.append(_histogram(stats["acceptance_histogram"]))
    _section(console, "Acceptance", *parts)


def _histogram(histogram: dict[int, int]) -> Table:
    """Rounds by number of accepted tokens; the tail in one row."""
    table = _table("accepted", "rounds", "", left=0)
    table.columns[2].justify = "left"
    total, counts = sum(histogram.values()), dict(histogram)
    tail = {n: c for n, c in counts.items() if n > _MAX_POSITIONS}
    rows = [(str(n), counts.get(n, 0)) for n in range(min(max(counts, default=0), _MAX_POSITIONS) + 1)]
    if tail:
        rows.append((f"> {_MAX_POSITIONS}", sum(tail.values())))
    top = max((c for _, c in rows), default=1) or 1
    for label, number in rows:
        table.add_row(label, str(number), f"[cyan]{_bar(number / top)}[/] [dim]{number / max(total, 1):.0%}[/]")
    return table


def _bar(share: float) -> str:
    """Eighths of a character, so that small shares show."""
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _seconds(console: Console, report: dict[str, Any]) -> None:
    seconds, plain, num_tokens = report["seconds"], report["plain"]["seconds"], report["stats"]["num_tokens"]
    total = sum(seconds.values()) or 1.0
    table = _table("stage", "seconds", "ms/token", "plain loop", "share of the speculative time")
    table.columns[4].justify = "left"
    for stage in STAGES:
        value = seconds[stage]
        per_token = 1e3 * value / max(num_tokens, 1)
        table.add_row(
            stage,
            f"{value:.3f}",
            f"{per_token:.3f}",
            f"[dim]{plain[stage]:.3f} s[/]",
            f"[cyan]{_bar(value / total)}[/] [dim]{value / total:.0%}[/]",
        )
    bare = report["bare_seconds"]
    widths = sorted(bare["target"].items(), key=lambda item: int(item[0]))
    if len(widths) > 4:
        widths = [widths[0], widths[len(widths) // 3], widths[2 * len(widths) // 3], widths[-1]]
    costs = ", ".join(f"{1e3 * value:.2f} at width {width}" for width, value in widths)
    draft = f"; draft {1e3 * bare['draft']:.2f}" if bare["draft"] else ""
    line = f"[dim]bare forward, ms: target {costs}{draft}[/]"
    peak = report["peak_memory_bytes"]
    memory = ", ".join(f"{name} {screen.size(value)}" for name, value in peak.items())
    _section(console, "Time", table, line, f"[dim]peak memory: {memory or 'unknown'}[/]")


def _prompts(console: Console, report: dict[str, Any]) -> None:
    rows: Sequence[dict[str, Any]] = report["rows"]
    room = max(20, min(44, console.width - 58))

    def cells(rate: dict[str, float], speedup: float, accepted: float, same: str) -> tuple[str, ...]:
        return _rate(rate["plain"]), _rate(rate["speculative"]), _times(speedup), f"{accepted:.2f}", same

    if len(rows) <= _MAX_ROWS:
        table = _table("prompt", "tokens", "plain", "spec.", "speed-up", "per round", "same")
        for row in rows:
            mark = "[green]✓[/]" if row["identical"] else "[red]✗[/]" if report["expects_identity"] else "–"
            values = cells(row["tokens_per_second"], row["speedup"], row["mean_acceptance_length"], mark)
            table.add_row(_short(row["id"], room), str(row["num_tokens"]), *values)
        _section(console, "Prompts", table)
        return
    table = _table("category", "prompts", "plain", "spec.", "speed-up", "per round", "same")
    for category in dict.fromkeys(row["category"] for row in rows):
        group = [row for row in rows if row["category"] == category]

        def middle(key: str, group: list[dict[str, Any]] = group) -> float:
            return float(statistics.median(row[key] for row in group))

        rate = {m: statistics.median(row["tokens_per_second"][m] for row in group) for m in ("plain", "speculative")}
        same = f"{sum(row['identical'] for row in group)}/{len(group)}"
        values = cells(rate, middle("speedup"), middle("mean_acceptance_length"), same)
        table.add_row(escape(category) or "–", str(len(group)), *values)
    _section(console, "Prompts", table, "[dim]medians by category; every prompt is in --json[/]")


def _footnotes(console: Console, report: dict[str, Any]) -> None:
    clean, slices = report["clean_slices"], report["slices"]
    lines = ["Speeds are of whole calls, prefill included, against the plain loop; paired by prompt, run in turns."]
    if report["clean_means"] == "unknown":
        lines.append("Clean timings: unknown, this system does not tell about other processes.")
    else:
        lines.append(f"Clean timings: {clean} of {slices} ({report['clean_means']}).")
    console.print()
    for line in lines:
        console.print(f"[dim]{line}[/]")
    if clean < slices:
        console.print("[yellow]Other processes disturbed some timings even after retries: take speeds with care.[/]")
    console.print()


def show(console: Console, report: dict[str, Any]) -> None:
    for part in (_head, _identity, _speed, _acceptance, _seconds, _prompts, _footnotes):
        part(console, report)
