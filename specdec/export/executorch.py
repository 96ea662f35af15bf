"""One program of several graphs for ExecuTorch: traced, lowered to a delegate, with weights and slots stored once."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram

from specdec.errors import InputError
from specdec.export.exporter import Exporter, Tell
from specdec.export.options import Options
from specdec.export.step import ATTENTIONS, StaticStep, Swap

PROGRAM = "model.pte"
#: The graph that exchanges what the slots hold.
SWAP = "swap"
#: Who runs the parts of a graph that a delegate takes.
DELEGATES = ("xnnpack", "portable")
#: Releases of ExecuTorch, and those of torch that each was found to work with.
KNOWN = {"1.5": ("2.13",)}
#: What the program calls the contract that it carries.
CONTRACT = "specdec_contract"
_MESSAGE = "pip install 'specdec[executorch]'"


@dataclass(frozen=True)
class ExecutorchOptions(Options):
    """`attention`: by ExecuTorch's operators for language models ("custom") or in core operators ("plain").

    `delegate`: who runs the products. `share_buffers=False` gives every graph keys and values of its own, which is
    wrong, and there to show it.
    """

    backend: ClassVar[str] = "executorch"

    attention: str = "custom"
    delegate: str = "xnnpack"
    share_buffers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("attention", ATTENTIONS)
        self.check_choice("delegate", DELEGATES)
        self.check_recipe(())


def installed_version() -> str:
    """Of ExecuTorch. Raises `InputError` when it is not there, or was never tried with the torch that is."""
    try:
        version = importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the executorch backend needs the package executorch: {_MESSAGE}") from None
    release, torch_release = (".".join(v.split("+")[0].split(".")[:2]) for v in (version, torch.__version__))
    if torch_release not in KNOWN.get(release, ()):
        tried = "; ".join(f"executorch {name} with torch {', '.join(those)}" for name, those in KNOWN.items())
        raise InputError(
            f"executorch {version} with torch {torch.__version__} was never tried with specdec: use {tried}"
        )
    return version


@contextmanager
def quietly() -> Iterator[None]:
    """Tracing and lowering remark on many things that are as they should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def load_operators() -> None:
    """Attention and cache update for language models, in torch and in the runtime."""
    with quietly():
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - registers them


def trace(step: StaticStep, options: ExecutorchOptions, tell: Tell = lambda _: None) -> dict[str, ExportedProgram]:
    """One exported program per graph of the options, and the one that exchanges what the slots hold."""
    programs: dict[str, ExportedProgram] = {}
    with torch.no_grad(), quietly():
        for method in options.methods:
            tell(f"tracing {method.name}")
            module = step.last_only() if method.one_logit else step
            programs[method.name] = torch.export.export(module, module.example(method.width), strict=False)
        swap = Swap(step)
        programs[SWAP] = torch.export.export(swap, swap.example(), strict=False)
    return programs


def _partitioners(delegate: str) -> list[Any]:
    if delegate == "portable":
        return []
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


class Lowered:
    """Graphs that were lowered and can be written out, with or without common slots."""

    def __init__(
        self, programs: Mapping[str, ExportedProgram], options: ExecutorchOptions, contract: Mapping[str, Any]
    ):
        with quietly():
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            self._edge = to_edge_transform_and_lower(
                dict(programs),
                partitioner={name: _partitioners(options.delegate) for name in programs},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={CONTRACT: json.dumps(contract)},
            )
        self.options = options

    def coverage(self) -> dict[str, dict[str, int]]:
        """Of each graph: parts that the delegate took, operators in them, and operators left outside."""
        from executorch.devtools.backend_debug import get_delegation_info

        found = {}
        for method in self.options.methods:
            info = get_delegation_info(self._edge.exported_program(method.name).graph_module)
            found[method.name] = {
                "delegates": int(info.num_delegated_subgraphs),
                "delegated": int(info.num_delegated_nodes),
                "outside": int(info.num_non_delegated_nodes),
            }
        return found

    def write(self, path: Path) -> None:
        from executorch.exir import ExecutorchBackendConfig
        from executorch.exir.passes import MemoryPlanningPass

        planning = MemoryPlanningPass(share_mutable_buffers=self.options.share_buffers)
        with quietly():
            program = self._edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        with path.open("wb") as file:
            program.write_to_file(file)


class ExecutorchExporter(Exporter):
    name = "executorch"
    options = ExecutorchOptions
    program = PROGRAM

    def versions(self) -> dict[str, str]:
        return {"executorch": installed_version()}

    def step(self, model: Any, options: ExecutorchOptions) -> StaticStep:
        return StaticStep(model, options.num_slots, hidden=options.hidden, attention=options.attention)

    def lower(
        self, step: StaticStep, options: ExecutorchOptions, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        """Seconds by stage, and what the delegate took. Minutes for a dozen layers."""
        load_operators()
        seconds, started = {}, time.perf_counter()
        programs = trace(step, options, tell)
        seconds["trace"], started = time.perf_counter() - started, time.perf_counter()
        tell(f"lowering {len(programs)} graphs of {len(step.shapes)} layers to {options.delegate}")
        lowered = Lowered(programs, options, contract)
        seconds["lower"], started = time.perf_counter() - started, time.perf_counter()
        coverage = lowered.coverage()
        tell("writing the program")
        lowered.write(folder / PROGRAM)
        seconds["write"] = time.perf_counter() - started
        return {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "coverage": coverage}
