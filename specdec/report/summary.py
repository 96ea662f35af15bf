"""The verdict in a sentence, the figures beside it, where it was measured, and what the numbers mean."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from specdec.bench.timing import Interval
from specdec.cli.screen import count, size
from specdec.report.markup import Markup, el
from specdec.report.view import Cell, View, short


def _span(interval: Interval) -> str:
    return f"{interval.low:.2f}–{interval.high:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"


def _speedups(view: View) -> list[Interval]:
    """Of the settings that the best one was chosen from."""
    return [cell.speedup for cell in view.rivals if cell.speedup is not None and cell.stats.get("num_draft_tokens")]


def headline(view: View) -> str:
    """One sentence that a hurried reader may take away; the best of several is not judged by its interval alone."""
    best = view.best
    if best is None:
        return "No setting finished."
    if not best.stats.get("num_draft_tokens"):
        return "Nothing was drafted: this is plain decoding twice."
    s = best.speedup
    if s is None:
        return f"{best.per_round or 1:.2f} tokens per round, where plain decoding has one."
    all_of_them = _speedups(view)
    chosen = f", the best of {len(all_of_them)} settings, chosen by the same data" if len(all_of_them) > 1 else ""
    if s.among(len(all_of_them)).low > 1:
        return f"Speculation pays: {_times(s.median)} the speed of plain decoding{chosen}."
    # Every setting has to fail, so that each is judged by its own interval.
    if all(one.high < 1 for one in all_of_them):
        least = "at best " if chosen else ""
        return f"Speculation does not pay here: {least}{_times(s.median)} the speed of plain decoding."
    return f"No clear gain over plain decoding: {_times(s.median)}{chosen}."


def _identity(cell: Cell) -> tuple[str, str]:
    """(class, what is to be said) about whether the text is the target's own."""
    same, total = cell.raw.get("identical"), cell.raw.get("prompts")
    if not cell.lossless:
        return "warn", "LOSSY: the rule does not keep the target's distribution."
    if same is None or not total:
        return "", "Whether the texts are those of plain decoding was not recorded."
    if not cell.raw.get("expects_identity"):
        return (
            "good",
            f"Lossless: the target's distribution, other tokens than plain decoding ({same} of {total} alike).",
        )
    if same == total:
        return "good", f"Lossless: {same} of {total} texts are those of plain decoding, token for token."
    verdicts = {str(d.get("verdict")) for d in cell.raw.get("divergences") or ()}
    if "BUG" in verdicts:
        return "warn", f"{total - same} of {total} texts differ from plain decoding, and this is a bug."
    return "warn", f"{total - same} of {total} texts differ from plain decoding, at ties of the precision."


def _lead(view: View) -> Markup:
    best = view.best
    if best is None:
        reasons = list(dict.fromkeys(cell.error for cell in view.failed if cell.error))[:3]
        return el("p", "; ".join(reasons) or "No reason was recorded.", cls="lead")
    parts: list[Any] = []
    if len(view.done) > 1:
        parts += ["Best of ", str(len(view.done)), " settings: "]
    parts.append(el("strong", best.label))
    if best.speedup is not None:
        parts.append(f", 95 % interval {_span(best.speedup)}")
        if (number := len(_speedups(view))) > 1:
            parts.append(f", {_span(best.speedup.among(number))} for the best of {number}")
    kind, said = _identity(best)
    clean, slices = best.raw.get("clean_slices"), best.raw.get("slices")
    noisy = (
        best.speedup is not None and slices and (clean or 0) < slices / 2 and best.raw.get("clean_means") != "unknown"
    )
    warning = " Other programs disturbed the timings: take speeds with care." if noisy else None
    untimed = " Speed was not measured." if best.speedup is None else None
    return el(
        "p", parts, ". ", el("span", said, cls=kind or None), el("span", warning, cls="warn"), untimed, cls="lead"
    )


def _figures(view: View) -> Markup:
    best, shown = view.best, []

    def add(title: str, value: str, note: str = "", kind: str | None = None) -> None:
        # The value first for the eye, the name first for whoever listens.
        shown.append(
            el("div", el("dt", title), el("dd", value, cls=kind), el("dd", note, cls="under") if note else None)
        )

    if best is not None:
        if best.speedup is not None:
            add("speed-up", _times(best.speedup.median), f"{best.speedup.low:.2f}–{best.speedup.high:.2f}")
        if best.per_round is not None:
            add("tokens per round", f"{best.per_round:.2f}", "the target's own included")
        if best.acceptance is not None:
            drafted = best.stats.get("num_draft_tokens")
            add("draft acceptance", f"{best.acceptance:.0%}", f"of {drafted:,} tokens" if drafted else "")
        same, total = best.raw.get("identical"), best.raw.get("prompts")
        if same is not None and total:
            bad = best.raw.get("expects_identity") and same < total
            add("identical texts", f"{same}/{total}", "to plain decoding", "warn" if bad else None)
        if best.speedup is not None and best.raw.get("efficiency") and best.acceptance is not None:
            add(
                "of the ideal",
                f"{best.raw['efficiency']:.0%}",
                f"bare forwards allow {_times(best.raw['ideal_speedup'])}",
            )
    if len(view.cells) > 1 or view.failed:
        add("settings", str(len(view.done)), f"{len(view.failed)} more failed" if view.failed else "none failed")
    return el("dl", shown, cls="figures-row")


def facts(view: View) -> Markup:
    """Models, machine, versions, date, command."""
    environment = view.environment
    rows: list[tuple[str, Any]] = []
    details = (view.best.raw.get("details") if view.best else None) or {}
    parameters = {**(details.get("parameters") or {}), **(environment.get("parameters") or {})}
    for name in ("target", "draft"):
        names = list(dict.fromkeys(short(c.setting[name]) for c in view.cells if c.setting.get(name)))
        number = parameters.get(name)
        text = ", ".join(names) or ("embedded" if number else "")
        if number:
            text = " ".join(filter(None, (text, f"({count(number)} parameters)")))
        if text:
            rows.append((name, text))
    same = [f"{title} {value}" for title, value in view.fixed if title not in ("target", "draft", "device", "threads")]
    if same:
        rows.append(("in all settings" if len(view.cells) > 1 else "setting", ", ".join(same)))
    threads = environment.get("threads")
    where = [environment.get("device"), environment.get("processor")]
    where += [f"{threads} thread{'s' if threads != 1 else ''}"] if threads else []
    if any(where):
        rows.append(("device", ", ".join(str(part) for part in where if part)))
    if details.get("backend"):
        rows.append(("step", f"{details['backend']}; {details.get('numerics') or 'unknown'} numerics"))
    versions = environment.get("versions") or {}
    if versions:
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    dates = sorted(str(cell.raw["when"])[:10] for cell in view.cells if cell.raw.get("when"))
    if dates:
        rows.append(("date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"))
    if environment.get("command"):
        rows.append(("command", el("code", _command(environment["command"]))))
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in rows], cls="facts")


def _command(command: Any) -> str:
    return shlex.join(map(str, command)) if isinstance(command, (list, tuple)) else str(command)


def summary(view: View) -> Markup:
    return el(
        "section", el("h1", headline(view)), _lead(view), _figures(view), facts(view), cls="summary", id="summary"
    )


def footnotes(view: View) -> Markup:
    """What is timed, how sure it is, and how to get it again."""
    lines: list[Any] = []
    forked = any((cell.raw.get("timing") or {}).get("prefill") == "forked" for cell in view.done)
    if view.timed:
        lines.append(
            "Speed-ups are medians of paired ratios: the same prompt, plainly and speculatively, in turns. "
            "Intervals are 95 % bootstrap intervals over prompts and their repetitions."
        )
        lines.append(
            "Prompts were prefilled once and forked: times are of decoding alone, for both sides."
            if forked
            else "Times are of whole calls, prefill included, for both sides."
        )
        lines.append(_clean(view))
    else:
        lines.append("Nothing was timed: acceptance, texts and memory do not depend on the machine's load.")
    seeds = sorted({int(c.setting["seed"]) for c in view.cells if c.setting.get("seed") is not None})
    repeats = sorted({int(c.raw["repetitions"]) for c in view.done if c.raw.get("repetitions")})
    if repeats:
        runs = ", ".join(map(str, repeats))
        lines.append(f"Repetitions of each prompt: {runs}. Seeds: {', '.join(map(str, seeds)) or 'not recorded'}.")
    lines.append(
        "A round emits the accepted tokens and one of the target's own. Conditional acceptance: of the rounds in which "
        "that position was decided about; joint: of all rounds."
    )
    lines.append(
        "p and q are the probabilities that target and draft gave a token after penalties, temperature and filters "
        "(temperature 0 is shown as 1, where it would be 0 or 1); the margin is the target's largest probability less "
        "its second."
    )
    if view.environment.get("command"):
        lines.append(["Again: ", el("code", _command(view.environment["command"]))])
    lines.append("All numbers are in this file: “data” above saves them as JSON, which `specdec report` reads.")
    return el("ol", [el("li", line) for line in lines], cls="footnotes")


def _clean(view: View) -> str:
    cells = [c for c in view.done if c.raw.get("slices")]
    slices, clean = sum(c.raw["slices"] for c in cells), sum(c.raw.get("clean_slices") or 0 for c in cells)
    means = next((c.raw["clean_means"] for c in cells if c.raw.get("clean_means") not in (None, "unknown")), None)
    if not slices or means is None:
        return "Whether other programs disturbed the timings is unknown: this system does not tell."
    share = f"Clean timings: {clean} of {slices} ({means})."
    return share if clean == slices else f"{share} The others were disturbed: take their speeds with care."


def memory_note(cell: Cell | None) -> str:
    memory: Mapping[str, Any] = (cell.raw.get("memory") or {}) if cell else {}
    parts = [f"{name.replace('_', ' ')} {size(value)}" for name, value in memory.items() if value]
    return ", ".join(parts)
