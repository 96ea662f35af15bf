"""Weights in 8 or 4 bits and activations in 16 for the HTP: ranges are found once, and every graph has the same.

The graphs of an artefact have to agree: a verification that rounds otherwise than plain decoding would write another
text. So one graph is calibrated, and tensors of the same name get its range in all.

Shape suffixes: B rows of text, T tokens of one; S slots; K inputs, N outputs of a layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import UnsupportedModelError
from specdec.export.options import Method
from specdec.export.step_io import IoStep

Feed = dict[str, np.ndarray]
#: Lowest and highest value of tensors, by name.
Ranges = dict[str, tuple[float, float]]
#: A hidden slot's score in 16 bits: the lower it is, the coarser the other scores; e^-100 is nothing either.
HIDDEN_16 = -100.0
# What normalises rows has a range of its own for every row, and stays in half precision.
_NORM = ("Pow", "ReduceMean", "Sqrt", "Reciprocal")
# Results that are what came in, elsewhere.
_MOVES = ("Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze")
#: Inputs that share a scale in 4 bits: the first that divides a layer's.
_BLOCKS = (64, 32, 16)
# Of ONNX, the first that knows them.
_OPSET_OF_BLOCKS = 21
# Their results have a range by definition.
_BOUNDED = ("Softmax", "Sigmoid", "Tanh")


class _Once:
    """The reader of calibration data that ONNX Runtime's tools ask for."""

    def __init__(self, feeds: Iterator[Feed]):
        self._feeds = feeds

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def feeds(step: IoStep, method: Method, tokens_BT: Tensor, hidden_score: float) -> Iterator[Feed]:
    """What the graph is given while it reads each row of text, in chunks of its width, with keys and values growing."""
    width, slots = method.width, step.num_slots
    names, _ = step.names()
    window = getattr(step.model.config.get_text_config(decoder=True), "sliding_window", None) or slots
    for tokens_T in tokens_BT:
        held = [tensor.clone() for tensor in step.empty()]
        for start in range(0, len(tokens_T) - width + 1, width):
            rows = torch.arange(start, start + width)
            behind = rows[:, None] - torch.cat((torch.arange(slots), rows))[None]
            seen = behind >= 0
            seen[:, start:slots] = False
            masks = [
                torch.where(seen & (behind < window) if kind == "sliding_attention" else seen, 0.0, hidden_score)
                for kind in step.kinds
            ]
            inputs = (tokens_T[rows].int(), rows.int(), *masks, *held)
            yield {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            with torch.inference_mode():
                new = step(*inputs)[-len(held) :]
            held = [tensor.clone() for tensor in held]  # the feed keeps those it was given
            for index, made in enumerate(new):
                if index % 2:
                    held[index][:, rows] = made
                else:
                    held[index][:, :, rows] = made


def calibrate(graph: Path, given: Iterator[Feed]) -> Ranges:
    """Lowest and highest of every tensor of a graph over what it is given."""
    from onnxruntime.quantization.calibrate import create_calibrator

    with tempfile.TemporaryDirectory() as aside:
        augmented = str(Path(aside) / "augmented.onnx")
        calibrator = create_calibrator(graph, [], augmented_model_path=augmented, use_external_data_format=True)
        calibrator.collect_data(_Once(given))
        found = calibrator.compute_data().data
    return {name: (float(np.min(data.lowest)), float(np.max(data.highest))) for name, data in found.items()}


def quantise(graph: Path, ranges: Mapping[str, tuple[float, float]], bits: int, example: Feed, out: Path) -> None:
    """Write the graph with rounded weights and activations: symmetric scales, 16 bits between products.

    Weights of 8 bits have a scale per output; those of 4 bits one for each 64 inputs of an output.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    model = onnx.load(graph, load_external_data=False)
    constants = {tensor.name for tensor in model.graph.initializer}
    weights = QuantType.QInt8
    floats = [v.name for v in model.graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    known = {name: ranges[name] for name in floats}
    matrices = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            matrices.append(node.input[1])
        if node.op_type in _BOUNDED:
            continue
        for name in node.output:
            if name in ranges:
                known[name] = ranges[name]
            elif node.op_type in _MOVES and node.input[0] in known:  # named otherwise in the calibrated graph
                known[name] = known[node.input[0]]
    overrides: dict[str, list[dict[str, Any]]] = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high), "quant_type": QuantType.QUInt16}]
        for name, (low, high) in known.items()
    }
    overrides |= {name: [{"axis": 1, "quant_type": weights, "symmetric": True}] for name in matrices}
    config = get_qnn_qdq_config(
        graph,
        _Once(iter([example])),
        activation_type=QuantType.QUInt16,
        weight_type=weights,
        weight_symmetric=True,
        nodes_to_exclude=[node.name for node in model.graph.node if _is_exact(node, constants, model)],
        init_overrides=overrides,
    )
    config.use_external_data_format = True
    quantize(graph, out, config)
    if bits == 4:
        _in_blocks(graph, matrices, out)


def _in_blocks(graph: Path, matrices: list[str], out: Path) -> None:
    """Replace 8-bit matrices of a rounded graph by 4-bit ones, `[K, N]` with scales `[K / 64, N]`."""
    import onnx
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in onnx.load(graph).graph.initializer if tensor.name in set(matrices)}
    model = onnx.load(out)
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    made = []
    for name, tensor in weights.items():
        value_KN = numpy_helper.to_array(tensor)
        size = next((size for size in _BLOCKS if value_KN.shape[0] % size == 0), None)
        if size is None:
            raise UnsupportedModelError(
                f"w4a16 has blocks of {_BLOCKS[-1]} inputs or more, and a layer has {value_KN.shape[0]}"
            )
        blocks = value_KN.reshape(-1, size, value_KN.shape[1])
        scales = np.maximum(np.abs(blocks).max(1), 1e-12).astype(np.float32) / 7
        codes = np.clip(np.round(blocks / scales[:, None]), -8, 7).astype(np.int8).reshape(value_KN.shape)
        packed = (codes.reshape(-1, 2)[:, 0] & 15) | (codes.reshape(-1, 2)[:, 1] << 4)
        made.append(
            helper.make_tensor(
                f"{name}_codes", onnx.TensorProto.INT4, codes.shape, packed.astype(np.uint8).tobytes(), raw=True
            )
        )
        made.append(numpy_helper.from_array(scales, f"{name}_scales"))
        reader = readers[f"{name}_quantized"]
        reader.CopyFrom(
            helper.make_node(
                "DequantizeLinear",
                [f"{name}_codes", f"{name}_scales"],
                list(reader.output),
                name=reader.name,
                axis=0,
                block_size=size,
            )
        )
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend([*copies, *made])
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = _OPSET_OF_BLOCKS
    onnx.save(model, out, save_as_external_data=True, location=f"{out.name}.data")


def _is_exact(node: Any, constants: set[str], model: Any) -> bool:
    """Whether a node stays in half precision: norms, and tables that are looked up."""
    if node.op_type == "Gather" and node.input[0] in constants:
        return True
    if node.op_type in _NORM:
        return True
    means = {name for other in model.graph.node if other.op_type == "ReduceMean" for name in other.output}
    return node.op_type == "Add" and any(name in means for name in node.input)
