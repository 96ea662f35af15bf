"""The OpenVINO backend: one stateful graph on a device of Intel's; each text has a request of its own, with its state.

Devices that take any shape run one graph at every width. The others (NPU) have a graph per width, compiled at that
width; a text's state moves to the graph that it goes on with.

Shape suffixes: T rows of a graph, S its slots, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError
from specdec.export.openvino import CONTRACT, PROGRAM, check_device_name, installed_version, mask_names
from specdec.export.options import Method
from specdec.kernels.build import cache_folder
from specdec.runtime.artifacts import ArtifactBackend, Inputs, Program

# Everything is computed as the graph says: in float32, with activations as they are.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_FIXED_SHAPES = ("NPU",)


@cache
def _core() -> Any:
    """OpenVINO's entry, one for the process, which stays to its end.

    Two of them do not go well together: each has the CPU plugin set a stack for signal handlers and put the former one
    back when it goes. Of two that go in the order in which they came, the second puts back what the first has freed,
    and the next signal, a Ctrl-C, is a segmentation fault (seen with OpenVINO 2026.4).
    """
    import openvino as ov

    return ov.Core()


def _kind(device: str) -> str:
    return device.split(".")[0]


def choose_device(name: str, there: Sequence[str]) -> str:
    """Raises `InputError`, naming the devices that are there, for one that is not."""
    check_device_name(name)
    if name not in there and (name != _kind(name) or name not in map(_kind, there)):
        raise InputError(f"OpenVINO finds no device {name} here, only {', '.join(there) or 'none'}: use one of those")
    return name


class _State:
    """Of one text: its requests, by width where graphs have one, and the one that holds its keys and values."""

    def __init__(self) -> None:
        self.requests: dict[int, Any] = {}
        self.latest: Any = None


def _move(source: Any, target: Any) -> None:
    """The other request goes on where this one is."""
    import openvino as ov

    held = {state.name: state for state in source.query_state()}
    for state in target.query_state():
        state.state = ov.Tensor(np.array(held[state.name].state.data))


class _Program(Program):
    """A text's `state` is a `_State`, or None before its first step."""

    def __init__(self, model: ArtifactModel, device: str | None = None, fixed_shapes: bool | None = None):
        installed_version()
        super().__init__(model)
        self.name = choose_device(device or self.options.device, _core().available_devices)
        self._fixed = _kind(self.name) in _FIXED_SHAPES if fixed_shapes is None else fixed_shapes
        self._masks = mask_names(len(self.kinds))
        graph = self._read()
        if not graph.has_rt_info(list(CONTRACT)):
            raise ArtifactError(f"{model.folder}: {PROGRAM} carries no contract; export the model again")
        model.manifest.check_contract(model.folder, graph.get_rt_info(list(CONTRACT)).astype(str))
        self._graphs: dict[int, Any] = {}
        if self._fixed:
            for method in self.methods:
                self._graphs[method.width] = self._compile(self._at_width(method))
        else:
            self._graphs[0] = self._compile(graph)

    def _read(self) -> Any:
        path = self.model.folder / PROGRAM
        try:
            return _core().read_model(path)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise ArtifactError(f"{self.model.folder}: {PROGRAM} cannot be read ({reason}); export again") from error

    def _at_width(self, method: Method) -> Any:
        graph, width = self._read(), method.width
        masks = {name: [width, self.options.num_slots + 1] for name in self._masks}
        rows = 1 if method.one_logit else width
        graph.reshape({"tokens": [width], "positions": [width], "slots": [width], "rows": [rows], **masks})
        return graph

    def _compile(self, graph: Any) -> Any:
        known = set(_core().get_property(self.name, "SUPPORTED_PROPERTIES"))
        wanted: dict[str, Any] = {**_EXACT, "PERFORMANCE_HINT": "LATENCY"}
        if _kind(self.name) == "CPU":
            wanted["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        else:  # compiles for minutes, and keeps what came out
            wanted["CACHE_DIR"] = str(cache_folder() / "openvino")
        if _kind(self.name) == "NPU":
            del wanted["INFERENCE_PRECISION_HINT"]  # has half precision only
        return _core().compile_model(graph, self.name, {k: v for k, v in wanted.items() if k in known})

    @property
    def describes(self) -> str:
        recipe = f", {self.options.recipe} weights" if self.options.recipe else ""
        return f"openvino on {self.name}{recipe}"

    def _request(self, text: ArtifactBackend, width: int) -> Any:
        """The text's request at that width, with what the text's slots hold."""
        if text.state is None:
            text.state = _State()
        state: _State = text.state
        key = width if self._fixed else 0
        if key not in state.requests:
            state.requests[key] = self._graphs[key].create_infer_request()
        request = state.requests[key]
        if state.latest is not None and state.latest is not request:
            _move(state.latest, request)
        state.latest = request
        return request

    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        request = self._request(text, method.width)
        rows = inputs.row[0] if method.one_logit else torch.arange(method.width)
        named = {"tokens": inputs.tokens, "positions": inputs.positions, "slots": inputs.slots, "rows": rows}
        named |= dict(zip(self._masks, inputs.masks, strict=True))
        request.infer({name: tensor.numpy() for name, tensor in named.items()}, share_inputs=True)
        names = ("logits", "hidden") if self.options.hidden else ("logits",)
        # The request writes its next results where these lie.
        return tuple(torch.from_numpy(np.array(request.get_tensor(name).data)) for name in names)

    def duplicate(self, text: ArtifactBackend) -> _State | None:
        if text.state is None:
            return None
        twin = _State()
        key = next(key for key, request in text.state.requests.items() if request is text.state.latest)
        twin.latest = twin.requests[key] = self._graphs[key].create_infer_request()
        _move(text.state.latest, twin.latest)
        return twin


class OpenvinoBackend(ArtifactBackend):
    """Runs artefacts of `specdec export --backend openvino` on the device that they were made for, or on `device`.

    `fixed_shapes`: whether each width is a graph of its own; None: where the device wants it.

    Lossless: yes on CPU and GPU, as every backend of artefacts; on an NPU, whose products are half precision, texts
    are those of the artefact, but for ties within that rounding.
    """

    name = "openvino"

    @staticmethod
    def load(model: ArtifactModel, **options: Any) -> Program:
        unknown = options.keys() - {"device", "fixed_shapes"}
        if unknown:
            raise InputError(f"the openvino backend takes device= and fixed_shapes=, not {min(unknown)!r}")
        return _Program(model, **options)
