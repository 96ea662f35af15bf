"""Who runs the parts of an ExecuTorch graph, by name: what each needs, here and where the program runs.

A delegate is chosen at export. Some compile without their hardware: such a program is whole, and its manifest says what
runs it, but the runtime of this machine refuses it by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specdec.errors import InputError


def _xnnpack(recipe: str | None) -> list[Any]:
    from executorch.backends.xnnpack.partition import xnnpack_partitioner as xnnpack

    # Products of rounded rows first: the general one would take their float parts alone.
    rounded = [xnnpack.XnnpackDynamicallyQuantizedPartitioner()] if recipe is not None else []
    return [*rounded, xnnpack.XnnpackPartitioner()]


def _vulkan(recipe: str | None) -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


def _coreml(recipe: str | None) -> list[Any]:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # In half precision, its default, texts would not be the model's.
    specs = CoreMLBackend.generate_compile_specs(compute_precision=coremltools.precision.FLOAT32)
    return [CoreMLPartitioner(compile_specs=specs)]


def _openvino(recipe: str | None) -> list[Any]:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    return [OpenvinoPartitioner([CompileSpec("device", b"CPU")])]


#: Where Qualcomm's SDK stands, and for which of its chips to compile.
_QNN_SDK, _QNN_SOC = "QNN_SDK_ROOT", "QNN_SOC_MODEL"


def _qnn(recipe: str | None) -> list[Any]:
    if _QNN_SDK not in os.environ:  # without it, the package would try to download one
        raise ModuleNotFoundError(f"Qualcomm's AI Engine Direct SDK ({_QNN_SDK} names its folder)")
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
    )

    soc = os.environ.get(_QNN_SOC, "SM8650")
    if soc not in QcomChipset.__members__:
        raise InputError(f"{_QNN_SOC} is one of {', '.join(sorted(QcomChipset.__members__))}, not {soc!r}")
    options = generate_htp_compiler_spec(use_fp16=True)
    specs = generate_qnn_executorch_compiler_spec(soc_model=QcomChipset[soc], backend_options=options)
    return [QnnPartitioner(specs)]


@dataclass(frozen=True)
class Delegate:
    """`runtime`: what the runtime calls it, None: its own kernels. `make`: partitioners by recipe. `owns`: whether it
    takes graphs that write into slots of their own. `needs`: beside ExecuTorch, to compile."""

    runtime: str | None
    make: Callable[[str | None], list[Any]] | None
    owns: bool
    needs: str = ""


DELEGATES = {
    "xnnpack": Delegate("XnnpackBackend", _xnnpack, True),
    "portable": Delegate(None, None, True),
    "vulkan": Delegate("VulkanBackend", _vulkan, False),
    "coreml": Delegate("CoreMLBackend", _coreml, False, "pip install coremltools"),
    "openvino": Delegate(
        "OpenvinoBackend", _openvino, False, "pip install openvino nncf; or use --backend openvino, without ExecuTorch"
    ),
    "qnn": Delegate("QnnBackend", _qnn, False, "or use --backend qnn, which needs no SDK"),
}  # fmt: skip


def partitioners(name: str, recipe: str | None = None) -> list[Any]:
    """Of a delegate. Raises `InputError` saying what is missing on this machine."""
    found = DELEGATES[name]
    if found.make is None:
        return []
    try:
        return found.make(recipe)
    except (ImportError, OSError, RuntimeError) as error:
        hint = f": {found.needs}" if found.needs else ""
        raise InputError(f"the {name} delegate cannot compile here, it lacks {_missing(error)}{hint}") from error


def _missing(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the package {error.name.partition('.')[0]}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check_runtime(name: str, registered: list[str], what: object) -> None:
    """Raise `InputError` when the installed runtime cannot run this delegate's parts. `what`: the artefact."""
    wanted = DELEGATES[name].runtime
    if wanted is not None and wanted not in registered:
        raise InputError(
            f"{what} was compiled for {wanted}, which the ExecuTorch runtime of this machine does not have (it has "
            f"{', '.join(sorted(registered))}): it runs where the runtime was built with it; here, export with "
            "--delegate xnnpack"
        )
