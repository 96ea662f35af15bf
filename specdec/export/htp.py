"""Qualcomm's HTP through ONNX Runtime's QNN provider: the chips by name, and sessions that run a whole graph there.

On x86 the same provider compiles for a chip and runs what was compiled for it in a functional emulator: results are
those of the chip's arithmetic, times say nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import InputError, UnsupportedModelError

#: Releases of the provider, and those of torch whose ONNX files each was found to compile.
KNOWN = {"2.7": ("2.13",)}
MESSAGE = "pip install 'specdec[qnn]'"
_PROVIDER = "QNNExecutionProvider"


@dataclass(frozen=True)
class Soc:
    """`model`, `arch`: what Qualcomm's tools number the chip and its HTP by."""

    name: str
    model: int
    arch: int
    product: str


#: Chips whose HTP shares weights between graphs (V73 and later).
SOCS = {
    soc.name: soc
    for soc in (
        Soc("sm8550", 43, 73, "Snapdragon 8 Gen 2"),
        Soc("sc8380xp", 60, 73, "Snapdragon X Elite"),
        Soc("sm8650", 57, 75, "Snapdragon 8 Gen 3"),
        Soc("sm8750", 69, 79, "Snapdragon 8 Elite"),
        Soc("sm8850", 87, 81, "Snapdragon 8 Elite Gen 5"),
    )
}


def soc_of(name: str) -> Soc:
    """Raises `InputError` with the chips that there are."""
    found = SOCS.get(name.lower())
    if found is None:
        known = ", ".join(f"{soc.name} ({soc.product})" for soc in SOCS.values())
        raise InputError(f"no SoC is called {name!r} here; there are {known}")
    return found


@functools.cache
def _devices() -> tuple[Any, ...]:
    import onnxruntime
    import onnxruntime_qnn

    def found() -> tuple[Any, ...]:
        return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER)

    if not found():
        onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    devices = found()
    if not devices:
        raise InputError("onnxruntime-qnn offers no device on this machine: its wheels are for x86-64 and ARM64")
    return devices


def session(
    graph: Path, soc: Soc, entries: Mapping[str, str] | None = None, provider: Mapping[str, str] | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of an ONNX file, all of it on the HTP: what the HTP cannot do is refused.

    `entries`: of the session's configuration; `provider`: options of the QNN provider.
    Raises `UnsupportedModelError` with the compiler's words.
    """
    import onnxruntime
    import onnxruntime_qnn

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised
    for name, value in {"session.disable_cpu_ep_fallback": "1", **(entries or {})}.items():
        options.add_session_config_entry(name, value)
    given = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(soc.model),
        "htp_arch": str(soc.arch),
        "enable_htp_fp16_precision": "1",
        "offload_graph_io_quantization": "0",  # the graph's own edges too: nothing is left to the CPU
        **(provider or {}),
    }
    options.add_provider_for_devices(list(_devices()), given)
    try:
        return onnxruntime.InferenceSession(str(graph), options)
    except Exception as error:  # the bindings raise classes of their own, which have no common base
        raise UnsupportedModelError(
            f"{graph.name} does not run on the HTP of {soc.name} as a whole: {error}"
        ) from error


def compile_together(graphs: Mapping[str, Path], soc: Soc, folder: Path, seconds: dict[str, float]) -> dict[str, Path]:
    """Compile graphs that share weights into one context binary.

    Returns for each graph the ONNX file of one node that stands for it, beside the binary in `folder`.
    """
    import time

    made: dict[str, Path] = {}
    alive = []  # sessions share what they compiled while they live
    for index, (name, path) in enumerate(graphs.items()):
        made[name] = folder / f"{name}_ctx.onnx"
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(made[name]),
            "ep.context_embed_mode": "0",
            "ep.share_ep_contexts": "1",
        }
        if index == len(graphs) - 1:
            entries["ep.stop_share_ep_contexts"] = "1"
        started = time.perf_counter()
        alive.append(session(path, soc, entries, {"enable_htp_weight_sharing": "1"}))
        seconds[name] = time.perf_counter() - started
    return made
