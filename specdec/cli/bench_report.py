"""The report of `specdec bench`, drawn from the same fields that `--json` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from specdec.bench.targets import MET, NOT_MEASURED, NOT_MET
from specdec.cli import screen
from specdec.cli.compare_report import _section, _table

if TYPE_CHECKING:
    from rich.console import Console

_LEGEND = (
    "ms/token: whole calls, prefill included (llama.cpp: its own prompt and text times, loading left out); medians "
    "over prompts and repetitions. × ours, × own: speed over our plain loop and over the engine's own plain mode, "
    "medians of neighbouring timings. same: prompts whose ids are those of the own plain mode. eff.: bare forwards' "
    "share of the time achieved, prefill left out. Bold: the fastest that drafts."
)
_STYLES = {MET: "green", NOT_MET: "red", NOT_MEASURED: "dim"}
_ENGINES = {"specdec": "specdec", "transformers": "transformers", "openvino": "OpenVINO", "llama.cpp": "llama.cpp"}


def _head(console: Console, report: dict[str, Any]) -> None:
    sizes = {part: screen.count(n) if n else None for part, n in report["parameters"].items()}
    draft = f", draft {sizes['draft']}" if sizes["draft"] else ""
    agreement = report["agreement"]
    agrees = f", agreement {agreement:.2f}" if agreement is not None else ""
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    lengths = report["prompt_tokens"]
    prompt = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)}–{max(lengths)}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    console.print(f"\n[bold]{escape(report['preset'])}[/] target {sizes['target']} parameters{draft}{agrees}")
    formats = [f"{part} stored as {name}" for part, name in report["stored_as"].items() if name]
    if formats:
        console.print("; ".join(formats))
    if report.get("draft_vocabulary"):
        cut = report["draft_vocabulary"]
        console.print(
            f"our draft predicts {cut['size']} tokens, {cut['coverage']:.0%} of the target's text; on texts apart it "
            f"agrees {cut['agreement_cut']:.3f} of the time, with all tokens {cut['agreement']:.3f}"
        )
    console.print(f"{escape(report['device'])}, {report['dtype']}, {threads}; {versions}")
    for name, backend in report["backends"].items():
        console.print(f"{name}: {escape(backend['describes'])}; {backend['numerics']} numerics")
    console.print(
        f"{report['prompts']} prompts of {prompt} tokens × {report['repetitions']}, "
        f"{report['max_new_tokens']} new tokens, greedy, batch 1; {report['date']}"
    )


def _same(row: dict[str, Any], prompts: int) -> str:
    same = row["plain_identical"]
    if same is None:
        return ""
    return f"[green]{same}/{prompts}[/]" if same == prompts else f"[yellow]{same}/{prompts}[/]"


def _rows(console: Console, report: dict[str, Any]) -> None:
    for engine, title in _ENGINES.items():
        rows = [row for row in report["rows"] if row["engine"] == engine]
        if not rows:
            continue
        ours = engine == "specdec"
        heads = ["ms/token", "95 %", "× ours", "× own", "tok/step", "same", "eff.", "clean"]
        table = _table("", *(head for head in heads if ours or head != "eff."))
        drafting = [row for row in rows if row["mode"] == "speculative"]
        best = min(drafting, key=lambda row: row["ms_per_token"]["median"])["name"] if drafting else None
        for row in rows:
            took, own, steps = row["ms_per_token"], row["over_own_plain"], row["tokens_per_step"]
            efficiency = [f"{row['ideal']['efficiency']:.2f}" if row["ideal"] else ""] if ours else []
            table.add_row(
                f"[bold]{row['name']}[/]" if row["name"] == best else row["name"],
                f"{took['median']:.2f}",
                f"[dim]{took['low']:.2f} – {took['high']:.2f}[/]",
                f"{row['over_our_plain']['median']:.2f}×",
                f"{own['median']:.2f}×" if own else "",
                f"{steps:.2f}" if steps else "",
                _same(row, report["prompts"]),
                *efficiency,
                f"[dim]{row['clean_slices']}/{row['slices']}[/]",
            )
        _section(console, title, table)


def _limits(console: Console, report: dict[str, Any]) -> None:
    table = _table("bare step of", "backend", "width 1, ms", "width 8, ms", "8 ÷ 1", "draft, ms", left=2)
    for backend, found in report["bare"].items():
        ratio = found["verify8_over_decode1"]
        table.add_row(
            "target",
            backend,
            f"{found['target_ms']['1']:.2f}",
            f"{found['target_ms']['8']:.2f}" if "8" in found["target_ms"] else "",
            f"{ratio:.2f}" if ratio else "",
            f"{found['draft_ms']:.2f}" if found["draft_ms"] else "",
        )
    machine = report["machine"]
    line = (
        f"read bandwidth {machine['read_bytes_per_second'] / 1e9:.1f} GB/s (median of the run "
        f"{machine['read_bytes_per_second_median'] / 1e9:.1f}; {machine['read_by']}); the {machine['backend']} step "
        f"reads {machine['bytes_per_token'] / 1e6:.0f} MB a token: {machine['share']:.2f} of the reading beside it, "
        f"{machine['share_of_best']:.2f} of the best"
    )
    _section(console, "Limits", table, f"[dim]{line}[/]")
    drafting = [row for row in report["rows"] if row["ideal"] and "ideal_speedup" in row["ideal"]]
    if drafting:
        best = min(drafting, key=lambda row: row["ms_per_token"]["median"])
        ideal = best["ideal"]
        console.print(
            f"  [dim]{best['name']}: bare forwards alone would take {ideal['ideal_ms']:.2f} ms/token "
            f"({ideal['ideal_speedup']:.2f}× plain; achieved {ideal['speedup']:.2f}×); "
            f"{ideal['overhead_us']:.0f} µs a round go elsewhere[/]"
        )


def _profile(console: Console, report: dict[str, Any]) -> None:
    for found in report.get("profile", ()):
        stages = _table("stage", "ms/round", "bare forwards", "rest")
        for stage in found["stages"]:
            spent, bare = stage["ms_per_round"], stage["bare_ms_per_round"]
            stages.add_row(stage["stage"], f"{spent:.3f}", f"{bare:.3f}", f"{spent - bare:.3f}")
        functions = _table("function", "calls/round", "own ms/round")
        for line in found["functions"]:
            functions.add_row(
                escape(line["function"][:70]), f"{line['calls_per_round']:.1f}", f"{line['own_ms_per_round']:.3f}"
            )
        note = f"[dim]{found['rounds']} rounds; functions under the profiler, which slows Python down[/]"
        _section(console, f"Profile: {found['row']}", stages, functions, note)


def show_targets(console: Console, lines: list[dict[str, Any]]) -> None:
    table = _table("", "needs", "has", "", "")
    for column in table.columns[3:]:
        column.justify = "left"
    table.columns[4].no_wrap = False
    for line in lines:
        value = f"{line['value']:.2f}" if line["value"] is not None else "–"
        verdict = f"[{_STYLES[line['verdict']]}]{line['verdict']}[/]"
        table.add_row(line["target"], line["needs"], value, verdict, f"[dim]{escape(line['of'])}[/]")
    _section(console, "Targets", table)


def _footnotes(console: Console, report: dict[str, Any]) -> None:
    if report["absent"]:
        console.print()
        for row in report["absent"]:
            console.print(f"[yellow]not measured:[/] {escape(row['name'])}: {escape(row['reason'])}")
    clean, slices = report["clean_slices"], report["slices"]
    console.print()
    console.print(f"[dim]{_LEGEND}[/]")
    repeated = f"{report['repeated_slices']} repeated ({report['clean_means']})"
    console.print(f"[dim]Clean timings: {clean} of {slices}, {repeated}.[/]")
    if clean < slices:
        console.print("[yellow]Other processes disturbed some timings even after retries: take speeds with care.[/]")
    console.print()


def show(console: Console, report: dict[str, Any]) -> None:
    for part in (_head, _rows, _limits, _profile):
        part(console, report)
    show_targets(console, report["targets"])
    _footnotes(console, report)
