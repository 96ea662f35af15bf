"""The step's graphs as ONNX files for an NPU's compiler: static shapes, weights of all graphs stored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.export.executorch import quietly
from specdec.export.options import Method
from specdec.export.step_io import IoStep

OPSET = 18
WEIGHTS = "weights.bin"
#: Under which name a file carries the contract.
CONTRACT = "specdec_contract"
# Constants smaller than this stay in the graph.
_SMALL = 1024
_ALIGNED = 4096


def trace(step: IoStep, method: Method) -> Any:
    """One graph as an `onnx.ModelProto`; inputs and outputs are named as `IoStep.names` says."""
    module = step.last_only() if method.one_logit else step
    assert isinstance(module, IoStep)
    inputs, outputs = module.names()
    with torch.no_grad(), quietly():
        program = torch.onnx.export(
            module.eval(),
            module.example(method.width),
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.graph.name = method.name
    _tidy(model)
    return model


def _tidy(model: Any) -> None:
    """Constants as an HTP compiler expects them, and nothing of the machine that traced them."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in constants:  # too large for the exporter's own folding
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            value = numpy_helper.to_array(constants[node.input[0]]).transpose(order)
            folded = numpy_helper.from_array(np.ascontiguousarray(value), node.output[0])
            constants[folded.name] = folded
            graph.initializer.append(folded)
            continue
        if node.op_type in ("Mul", "Add") and node.input[0] in constants and node.input[1] not in constants:
            # The compiler takes a norm's product for one it knows, and fails where the weight comes first.
            node.input[0], node.input[1] = node.input[1], node.input[0]
        kept.append(node)
    for node in kept:
        del node.metadata_props[:]  # the tracer's stack, with paths
        node.doc_string = ""
    used = {name for node in kept for name in node.input} | {value.name for value in graph.output}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, items in (("node", kept), ("initializer", weights)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]
        graph.ClearField(field)
        getattr(graph, field).extend(copies)
    del graph.value_info[:]
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]


def save(models: Mapping[str, Any], folder: Path, contract: Mapping[str, Any]) -> dict[str, Path]:
    """`NAME.onnx` for each graph, and one file of constants for all, in which equal ones are stored once.

    The models' large constants are moved out of them.
    """
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, tuple[int, int]] = {}
    files: dict[str, Path] = {}
    with (folder / WEIGHTS).open("wb") as weights:
        for name, model in models.items():
            for tensor in model.graph.initializer:
                content = tensor.raw_data
                if len(content) < _SMALL:
                    continue
                digest = hashlib.sha256(content).digest()
                if digest not in places:
                    weights.write(b"\0" * (-weights.tell() % _ALIGNED))
                    places[digest] = weights.tell(), len(content)
                    weights.write(content)
                set_external_data(tensor, WEIGHTS, *places[digest])
                tensor.ClearField("raw_data")
                tensor.data_location = onnx.TensorProto.EXTERNAL
            onnx.helper.set_model_props(model, {CONTRACT: json.dumps(contract)})
            files[name] = folder / f"{name}.onnx"
            files[name].write_bytes(model.SerializeToString())
    return files


def operators(nodes: Iterable[Any]) -> int:
    return sum(1 for node in nodes if node.op_type not in ("QuantizeLinear", "DequantizeLinear"))
