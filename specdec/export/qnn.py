"""Artefacts for Qualcomm's HTP: ONNX graphs with keys and values outside, compiled into one binary that shares weights.

The binary is for the chip, and cannot be loaded on x86; the ONNX files stay beside it, for the emulator.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from specdec.errors import InputError, UnsupportedModelError
from specdec.export import htp, onnx_graphs
from specdec.export.executorch import quietly
from specdec.export.exporter import Exporter, Stored, Tell, together
from specdec.export.options import Options
from specdec.export.qnn_quantise import HIDDEN_16, calibrate, feeds, quantise
from specdec.export.recipes import digest_of
from specdec.export.step import StaticStep
from specdec.export.step_io import HIDDEN_HALF, IoStep
from specdec.export.versions import tried
from specdec.quant.methods.calibration import check_tokens

#: What goes to the chip: the binary, and for each graph an ONNX file of one node that stands for it.
DEVICE = "device"
PROGRAM = f"{DEVICE}/model.bin"
#: Weights and activations in half precision; weights in 8 bits with a scale per output or in 4
#: with one for each 64 inputs, activations in 16.
RECIPES = ("fp16", "w8a16", "w4a16")
# Ranges settle soon.
_MOST_ROWS = 16


@dataclass(frozen=True)
class QnnOptions(Options):
    """`soc`: the chip, by a name of `htp.SOCS`."""

    backend: ClassVar[str] = "qnn"

    recipe: str | None = "fp16"
    soc: str = "sm8650"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "recipe", self.recipe or "fp16")
        object.__setattr__(self, "soc", htp.soc_of(self.soc).name)
        self.check_recipe(RECIPES)
        if self.parts > 1 and self.recipe != "fp16":
            raise InputError(f"ranges are found over the whole model: the recipe {self.recipe} takes no parts")

    @property
    def hidden_score(self) -> float:
        """Of a slot that a row does not see."""
        return HIDDEN_HALF if self.recipe == "fp16" else HIDDEN_16


def installed_version() -> str:
    """Of the provider. Raises `InputError` when it is not there, or was never tried with the torch that is."""
    return tried("onnxruntime-qnn", htp.KNOWN, htp.MESSAGE)


class QnnExporter(Exporter):
    name = "qnn"
    options = QnnOptions
    program = PROGRAM
    parts = True
    real_time = False

    def __init__(self) -> None:
        self._text_BT: Tensor | None = None

    def versions(self) -> dict[str, str]:
        found = {"onnxruntime-qnn": installed_version()}
        for package in ("onnxruntime", "onnx", "onnxscript"):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise InputError(f"an export for qnn needs the package {package}: {htp.MESSAGE}") from None
        return found

    def needs_text(self, options: QnnOptions) -> bool:
        return options.recipe != "fp16"

    def store(self, model: Any, options: QnnOptions, calibration_BT: Tensor | None = None) -> Stored | None:
        """Only the graphs are rounded, by ranges that are found on the text; the model stays as it is."""
        if not self.needs_text(options):
            return None
        text_BT = check_tokens(calibration_BT, model, str(options.recipe))[:_MOST_ROWS, : options.max_seq_len]
        self._text_BT = text_BT
        weights = {
            id(p): p.numel() for module in model.modules() if isinstance(module, nn.Linear) for p in [module.weight]
        }
        rest = sum(p.numel() for p in model.parameters() if id(p) not in weights)
        facts = {"recipe": options.recipe, "calibration": digest_of([text_BT])}
        return Stored(model, facts, sum(weights.values()) * _bits(options) // 8 + 2 * rest)

    def step(self, model: Any, options: QnnOptions) -> StaticStep:
        step = IoStep(model, options.num_slots, hidden=options.hidden)
        step.calibration_BT = self._text_BT
        return step

    def lower(
        self, step: StaticStep, options: QnnOptions, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        """Seconds by stage and graph, and what the HTP took: all of it, or there is no artefact."""
        assert isinstance(step, IoStep)
        soc, seconds = htp.soc_of(options.soc), dict[str, float]()
        coverage = []
        for index, part in enumerate(step.in_parts(options.parts)):
            place = folder / part_folder(index)
            place.mkdir(exist_ok=True)
            if options.parts > 1:
                tell(f"part {index + 1} of {options.parts}")
            coverage.append(_compiled(part, options, contract, place, seconds, tell))
        return {
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "coverage": together(coverage),
            "soc": {"name": soc.name, "product": soc.product, "htp_arch": soc.arch, "soc_model": soc.model},
        }


def part_folder(index: int) -> str:
    """Where the graphs of a part stand in the artefact: the first at its top."""
    return f"part_{index}" if index else "."


def _compiled(
    step: IoStep,
    options: QnnOptions,
    contract: Mapping[str, Any],
    folder: Path,
    seconds: dict[str, float],
    tell: Tell,
) -> dict[str, dict[str, int]]:
    """One part: its graphs as ONNX files, and one binary of all. Coverage by graph; times are added to `seconds`."""

    def took(what: str, value: float) -> None:
        seconds[what] = seconds.get(what, 0.0) + value

    models: dict[str, Any] = {}
    for method in options.methods:
        tell(f"tracing {method.name}")
        started = time.perf_counter()
        models[method.name] = onnx_graphs.trace(step, method)
        took(f"trace {method.name}", time.perf_counter() - started)
    if options.recipe != "fp16":
        models = _rounded(step, options, models, seconds, tell)
    files = onnx_graphs.save(models, folder, contract)
    counts = {name: onnx_graphs.operators(model.graph.node) for name, model in models.items()}
    (folder / DEVICE).mkdir()
    tell(f"compiling {len(files)} graphs of {len(step.layers)} layers for {options.soc}")
    taken: dict[str, float] = {}
    made = htp.compile_together(files, htp.soc_of(options.soc), folder / DEVICE, taken)
    for name, value in taken.items():
        took(f"compile {name}", value)
    return _one_binary(made, folder / PROGRAM, contract, counts)


def _bits(options: QnnOptions) -> int:
    return 8 if options.recipe == "w8a16" else 4


def _rounded(
    step: IoStep, options: QnnOptions, models: Mapping[str, Any], seconds: dict[str, float], tell: Tell
) -> dict[str, Any]:
    """The same graphs with few-bit weights; ranges come from the widest one that gives all rows' logits."""
    import onnx

    assert step.calibration_BT is not None
    bits = _bits(options)
    widest = max((m for m in options.methods if not m.one_logit), key=lambda m: m.width)
    rounded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as aside, quietly():
        files = onnx_graphs.save(models, Path(aside), {})
        tell(f"calibrating on {step.calibration_BT.numel()} tokens")
        started = time.perf_counter()
        text = feeds(step, widest, step.calibration_BT, options.hidden_score)
        ranges = calibrate(files[widest.name], text)
        seconds["calibrate"], started = time.perf_counter() - started, time.perf_counter()
        tell(f"rounding weights to {bits} bits")
        for method in options.methods:
            out = Path(aside) / f"{method.name}-rounded.onnx"
            module = step.last_only() if method.one_logit else step
            assert isinstance(module, IoStep)
            names, values = module.names()[0], module.example(method.width)
            example = {name: value.numpy() for name, value in zip(names, values, strict=True)}
            quantise(files[method.name], ranges, bits, example, out)
            rounded[method.name] = onnx.load(out)
        seconds["round"] = time.perf_counter() - started
    return rounded


def _one_binary(
    made: Mapping[str, Path], program: Path, contract: Mapping[str, Any], counts: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Give the binary its name, and check that each graph is one node, of the HTP. Coverage by graph."""
    import onnx

    binaries = sorted(program.parent.glob("*.bin"))
    if len(binaries) != 1:
        raise UnsupportedModelError(
            f"the compiler wrote {len(binaries)} binaries in place of one with common weights: "
            f"{', '.join(path.name for path in binaries) or 'none'}"
        )
    binaries[0].rename(program)
    coverage = {}
    for name, path in made.items():
        stand_in = onnx.load(path)
        parts = [node for node in stand_in.graph.node if node.op_type == "EPContext"]
        outside = len(stand_in.graph.node) - len(parts)
        if len(parts) != 1 or outside:
            raise UnsupportedModelError(f"{name} is {len(parts)} parts on the HTP, and {outside} operators outside")
        for attribute in parts[0].attribute:
            if attribute.name == "ep_cache_context":
                attribute.s = program.name.encode()
        onnx.helper.set_model_props(stand_in, {onnx_graphs.CONTRACT: json.dumps(contract)})
        onnx.save(stand_in, path)
        coverage[name] = {"delegates": len(parts), "delegated": counts[name], "outside": outside}
    return coverage
