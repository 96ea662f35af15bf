"""One OpenVINO graph for any number of rows: the static step with its keys and values as state.

The graph is plain data, a text file and the weights. Devices that take no dynamic shapes are given it at each width.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.export.exporter import Exporter, Tell
from specdec.export.options import Options
from specdec.export.step import StaticStep
from specdec.export.versions import tried

PROGRAM = "model.xml"
#: How weights are stored: in half precision, or in 8 or 4 bits with a scale per output or per 64 inputs.
RECIPES = ("fp16", "int8", "int4")
#: Where the graph carries the contract.
CONTRACT = ("specdec", "contract")
#: Releases of OpenVINO, and those of torch whose traces each was found to read.
KNOWN = {"2026.4": ("2.13",)}
_MESSAGE = "pip install 'specdec[openvino]'"
_DEVICE = re.compile(r"(CPU|GPU|NPU)(\.\d+)?")
_GROUP = 64  # inputs that share a scale in 4 bits


@dataclass(frozen=True)
class OpenvinoOptions(Options):
    """`device`: where the graph runs unless it is opened for another one: CPU, GPU, NPU, or one of several, GPU.1."""

    backend: ClassVar[str] = "openvino"

    device: str = "CPU"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)
        self.check_recipe(RECIPES)


def check_device_name(name: str) -> None:
    if not _DEVICE.fullmatch(name):
        raise InputError(f"device is CPU, GPU, NPU, or one of several such as GPU.1; not {name!r}")


def installed_version() -> str:
    """Of OpenVINO. Raises `InputError` when it is not there, or was never tried with the torch that is."""
    return tried("openvino", KNOWN, _MESSAGE)


class _Opened(nn.Module):
    """The step with what its slots hold as arguments and results, `[1, S, K, D]` each: they become its state."""

    def __init__(self, step: StaticStep):
        super().__init__()
        self.step = step.last_only()
        self.names = step.slot_names

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Tensor, *more: Tensor) -> tuple[Any, ...]:
        masks, held = more[: len(self.step.kinds)], more[len(self.step.kinds) :]
        before = {name: getattr(self.step, name) for name in self.names}
        try:
            for name, tensor in zip(self.names, held, strict=True):
                setattr(self.step, name, tensor)
            out = self.step(tokens, positions, slots, rows, *masks)
            return (*out, *(getattr(self.step, name) for name in self.names))
        finally:
            for name, tensor in before.items():
                setattr(self.step, name, tensor)

    def example(self) -> tuple[Tensor, ...]:
        """A few rows, and logits of fewer: numbers that occur nowhere else."""
        tokens, positions, slots, row, *masks = self.step.example(5)
        return (tokens, positions, slots, row.expand(3), *masks, *(getattr(self.step, name) for name in self.names))


def mask_names(count: int) -> list[str]:
    """Of the inputs, one for each kind of attention layers."""
    return [f"mask_{index}" for index in range(count)]


def build(step: StaticStep) -> Any:
    """The step as an `openvino.Model` with state.

    Inputs `tokens [T]`, `positions [T]`, `slots [T]`, `rows [L]` (whose logits are wanted) and `mask_i [T, S]`; outputs
    `logits [L, V]` and, where the step has any, `hidden [T, W]`. The state is what the slots hold, zeros at first.
    """
    import openvino as ov

    opened = _Opened(step)
    example = opened.example()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on branches that the example takes rightly
        graph = ov.convert_model(opened, example_input=example)
    masks = mask_names(len(step.kinds))
    inputs = ["tokens", "positions", "slots", "rows", *masks, *opened.names]
    outputs = ["logits", *(["hidden"] if step.hidden else []), *(f"new_{name}" for name in opened.names)]
    shapes = [[-1]] * 4 + [[-1, step.num_slots + 1]] * len(masks) + [list(t.shape) for t in example[4 + len(masks) :]]
    name_ports(graph, inputs, outputs, shapes)
    make_stateful(graph, opened.names, [f"new_{name}" for name in opened.names])
    return graph


def name_ports(graph: Any, inputs: Sequence[str], outputs: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    """Give inputs their names and shapes (-1: any size), and outputs their names."""
    import openvino as ov

    for port, name, shape in zip(graph.inputs, inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)  # some readers look for this name
        port.get_node().set_partial_shape(ov.PartialShape(list(shape)))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()


def make_stateful(graph: Any, before: Sequence[str], after: Sequence[str]) -> None:
    """From now on what comes in under a name of `before` is what went out under that of `after`."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(graph, dict(zip(before, after, strict=True)))


def round_weights(graph: Any, weights: str) -> int:
    """Store the matrices of all products in 8 bits (a scale per output) or 4 (a scale for 64 inputs); how many.

    As OpenVINO's own tool writes them: unsigned codes, less their middle, times the scale.
    """
    import numpy as np
    from openvino import opset13 as ops

    bits, count = {"int8": 8, "int4": 4}[weights], 0
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.input_value(1).get_node().get_type_name() != "Constant":
            continue
        constant = node.input_value(1).get_node()
        weight = np.array(constant.data, dtype=np.float32)
        if not node.get_attributes()["transpose_b"] or weight.ndim != 2:
            continue
        outputs, inputs = weight.shape
        # Where groups do not come out even, an output has one scale.
        grouped = weight.reshape(outputs, -1, _GROUP if bits == 4 and inputs % _GROUP == 0 else inputs)
        middle = 1 << (bits - 1)
        scales = np.maximum(np.abs(grouped).max(-1, keepdims=True), 1e-30) / (middle - 1)
        codes = (np.rint(grouped / scales) + middle).astype(np.uint8)
        # The plugin reads weights as stored only where their middle is stored alike.
        middles = np.full(scales.shape, middle, dtype=np.uint8)
        stored, shift = (_four_bits(codes), _four_bits(middles)) if bits == 4 else map(ops.constant, (codes, middles))
        shifted = ops.subtract(ops.convert(stored, "f32"), ops.convert(shift, "f32"))
        shape = ops.constant(np.array([outputs, inputs], dtype=np.int64))
        exact = ops.reshape(ops.multiply(shifted, ops.constant(scales)), shape, False)
        node.input(1).replace_source_output(exact.output(0))
        count += 1
    graph.validate_nodes_and_infer_types()
    return count


def _four_bits(codes: Any) -> Any:
    import openvino as ov
    from openvino import opset13 as ops

    pairs = codes.reshape(-1, 2)
    stored = ov.Tensor(ov.Type.u4, ov.Shape(list(codes.shape)))  # has memory of its own, which the constant shares
    stored.data.reshape(-1)[:] = pairs[:, 0] | pairs[:, 1] << 4
    return ops.constant(stored)


class OpenvinoExporter(Exporter):
    name = "openvino"
    options = OpenvinoOptions
    program = PROGRAM

    def versions(self) -> dict[str, str]:
        return {"openvino": installed_version()}

    def step(self, model: Any, options: OpenvinoOptions) -> StaticStep:
        return StaticStep(model, options.num_slots, hidden=options.hidden, attention="plain")

    def lower(
        self, step: StaticStep, options: OpenvinoOptions, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        import openvino as ov

        seconds, started = {}, time.perf_counter()
        tell(f"converting {len(step.shapes)} layers")
        graph = build(step)
        seconds["convert"], started = time.perf_counter() - started, time.perf_counter()
        rounded = {}
        if options.recipe in ("int8", "int4"):
            tell(f"rounding weights to {options.recipe}")
            rounded = {"rounded_matrices": round_weights(graph, options.recipe)}
        graph.set_rt_info(json.dumps(contract), list(CONTRACT))
        tell("writing the graph")
        ov.save_model(graph, folder / PROGRAM, compress_to_fp16=options.recipe == "fp16")
        seconds["write"] = time.perf_counter() - started
        return {"seconds": {name: round(value, 2) for name, value in seconds.items()}, **rounded}
