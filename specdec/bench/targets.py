"""The speeds that this project set itself, judged on the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from specdec.bench.rows import BATCH, OURS, PLAIN, SPECULATIVE

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
WITHIN_IDEAL = 0.95

Report = Mapping[str, Any]
# A value and what it is of; None when the run does not hold it.
Found = tuple[float, str] | None


@dataclass(frozen=True)
class Judged:
    """One line of the table. `value` is what `needs` is about, in its own unit."""

    target: str
    needs: str
    value: float | None
    of: str
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """`measure` reads a report. `at_most`: smaller is better. `where`: the runs that can tell."""

    name: str
    bound: float
    measure: Callable[[Report], Found]
    where: Callable[[Report], bool]
    needs_run: str  # in words, shown where it was not measured
    at_most: bool = False

    @property
    def needs(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"

    def judge(self, report: Report) -> Judged:
        found = self.measure(report) if self.where(report) else None
        if found is None:
            return Judged(self.name, self.needs, None, self.needs_run, NOT_MEASURED)
        value, of = found
        met = value <= self.bound if self.at_most else value >= self.bound
        return Judged(self.name, self.needs, value, of, MET if met else NOT_MET)


def _rows(report: Report, engine: str, mode: str, **fields: Any) -> list[Mapping[str, Any]]:
    rows = [row for row in report["rows"] if row["engine"] == engine and row["mode"] == mode]
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def _fastest(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["ms_per_token"]["median"], default=None)


def _ours(report: Report, mode: str) -> Mapping[str, Any] | None:
    """Our fastest row of this mode, drafting with the model where anything drafts."""
    fields = {"drafter": "model"} if mode == SPECULATIVE else {}
    return _fastest(_rows(report, OURS, mode, **fields))


def _compiled_plain(report: Report) -> Mapping[str, Any] | None:
    return _fastest(_rows(report, OURS, PLAIN, backend="compiled"))


def _ratio(mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Found:
    """How many times faster than `other`: from the two rows' own ratios to our plain loop, which are paired."""
    if mine is None or other is None:
        return None
    return mine["over_our_plain"]["median"] / other["over_our_plain"][
        "median"
    ], f"{mine['name']} against {other['name']}"


def over_assisted(report: Report) -> Found:
    return _ratio(_ours(report, SPECULATIVE), _fastest(_rows(report, "transformers", SPECULATIVE)))


def over_generate(report: Report) -> Found:
    other = next((row for row in report["rows"] if row["name"] == "hf"), None)
    return _ratio(_ours(report, SPECULATIVE), other)


def over_static(report: Report) -> Found:
    other = next((row for row in report["rows"] if row["name"] == "hf-static"), None)
    return _ratio(_ours(report, SPECULATIVE), other)


def plain_over_generate(report: Report) -> Found:
    other = next((row for row in report["rows"] if row["name"] == "hf"), None)
    return _ratio(_compiled_plain(report), other)


def _compiled_speculative(report: Report) -> Mapping[str, Any] | None:
    return _fastest(_rows(report, OURS, SPECULATIVE, backend="compiled", drafter="model"))


def over_own_plain(report: Report) -> Found:
    row = _compiled_speculative(report)
    return None if row is None else (row["over_own_plain"]["median"], row["name"])


def of_ideal(report: Report) -> Found:
    row = _compiled_speculative(report)
    return None if row is None or not row["ideal"] else (row["ideal"]["of_ideal"], row["name"])


def efficiency(report: Report) -> Found:
    row = _ours(report, SPECULATIVE)
    return None if row is None or not row["ideal"] else (row["ideal"]["efficiency"], row["name"])


def overhead(report: Report) -> Found:
    row = _ours(report, SPECULATIVE)
    return None if row is None or not row["ideal"] else (row["ideal"]["overhead_us"], row["name"])


def bandwidth_share(report: Report) -> Found:
    machine = report.get("machine")
    return None if not machine else (machine["share"], f"{machine['backend']} step")


def over_openvino(report: Report) -> Found:
    return _ratio(_ours(report, SPECULATIVE), _fastest(_rows(report, "openvino", SPECULATIVE)))


def over_llama_cpp(report: Report) -> Found:
    """The fastest of either side, plain or speculative."""
    ours = [row for mode in (PLAIN, SPECULATIVE) for row in _rows(report, OURS, mode)]
    its = [row for mode in (PLAIN, SPECULATIVE) for row in _rows(report, "llama.cpp", mode)]
    return _ratio(_fastest(ours), _fastest(its))


def verify_cost(report: Report) -> Found:
    """The backend whose step is the cheapest."""
    known = {name: bare for name, bare in report["bare"].items() if bare["verify8_over_decode1"] is not None}
    name = min(known, key=lambda name: known[name]["target_ms"]["1"], default=None)
    return None if name is None else (known[name]["verify8_over_decode1"], f"{name} step")


def batch(report: Report) -> Found:
    row = _fastest(_rows(report, OURS, BATCH))
    return None if row is None or not row["over_own_plain"] else (row["over_own_plain"]["median"], row["name"])


def _on(
    preset: str, dtype: str | None = None, device: str = "cpu", draft: str | None = None
) -> Callable[[Report], bool]:
    """`draft`: how the draft's weights are stored, None: as they were made, like the target's."""

    def where(report: Report) -> bool:
        fits = report["preset"] == preset and report["device_type"] == device
        stored = report.get("stored_as", {})
        as_made = stored.get("target") is None and stored.get("draft") == draft
        return bool(fits and as_made and dtype in (None, report["dtype"]))

    return where


BF16, FP32 = "bfloat16", "float32"
_MAIN, _MAIN_FP32 = _on("134m", BF16), _on("134m", FP32)
_GPU = _on("1b", BF16, "cuda")
_RUN, _RUN_FP32 = "134m, bf16", "134m, fp32"
_COMPILED, _OPENVINO, _LLAMA = ", compiled", ", openvino", ", llama.cpp"
_ON_GPU = "1b, bf16, a GPU"

TARGETS: Sequence[Target] = (
    Target("over transformers assisted at its best", 1.75, over_assisted, _MAIN, _RUN),
    Target("over transformers generate", 2.0, over_generate, _MAIN, _RUN),
    Target("over our plain compiled loop", 1.35, over_own_plain, _MAIN, _RUN + _COMPILED),
    Target("… share of that pair's ideal", WITHIN_IDEAL, of_ideal, _MAIN, _RUN + _COMPILED),
    Target(
        "over our plain loop, draft in int8",
        1.35,
        over_own_plain,
        _on("134m", BF16, draft="int8"),
        _RUN + _COMPILED + ", --draft-quantize int8",
    ),
    Target("plain compiled over transformers generate", 1.4, plain_over_generate, _MAIN, _RUN + _COMPILED),
    Target("efficiency, 134m", 0.93, efficiency, _MAIN, _RUN),
    Target("efficiency, embedded pair", 0.80, efficiency, _on("embedded"), "embedded"),
    Target("share of read bandwidth, plain step", 0.5, bandwidth_share, _MAIN, _RUN),
    Target("over OpenVINO with draft model, bf16", 1.0, over_openvino, _MAIN, _RUN + _OPENVINO),
    Target("over OpenVINO with draft model, fp32", 1.0, over_openvino, _MAIN_FP32, _RUN_FP32 + _OPENVINO),
    Target("over llama.cpp at its best, bf16", 1.0, over_llama_cpp, _MAIN, _RUN + _LLAMA),
    Target("over llama.cpp at its best, f32", 1.0, over_llama_cpp, _MAIN_FP32, _RUN_FP32 + _LLAMA),
    Target("verify 8 ÷ decode 1, bf16", 1.25, verify_cost, _MAIN, _RUN, at_most=True),
    Target("verify 8 ÷ decode 1, fp32", 1.3, verify_cost, _MAIN_FP32, _RUN_FP32, at_most=True),
    Target("batch 8 over batch 1, tokens/s, plain", 4.0, batch, _MAIN, f"{_RUN}, batches"),
    Target("GPU: over transformers assisted at its best", 4.0, over_assisted, _GPU, _ON_GPU),
    Target("GPU: over transformers static, compiled", 2.0, over_static, _GPU, _ON_GPU),
    Target("GPU: share of memory bandwidth, plain step", 0.75, bandwidth_share, _GPU, _ON_GPU),
    Target("GPU: overhead per round, µs", 60.0, overhead, _GPU, _ON_GPU, at_most=True),
)


def judge(reports: Sequence[Report]) -> list[Judged]:
    """Every target, by the first of these reports that can tell."""
    judged = []
    for target in TARGETS:
        lines = [target.judge(report) for report in reports]
        judged.append(next((line for line in lines if line.verdict != NOT_MEASURED), lines[0]))
    return judged
