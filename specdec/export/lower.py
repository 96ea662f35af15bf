"""One program of several graphs for ExecuTorch: traced, lowered to a delegate, with weights and slots stored once."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from specdec.errors import InputError
from specdec.export.options import SWAP, Options
from specdec.export.step import StaticStep, Swap

#: Releases of ExecuTorch, and those of torch that each was found to work with.
KNOWN = {"1.5": ("2.13",)}
#: What the program calls the contract that it carries.
CONTRACT = "specdec_contract"
_MESSAGE = "pip install 'specdec[executorch]'"

#: Told what is going on.
Tell = Callable[[str], None]


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


def trace(step: StaticStep, options: Options, tell: Tell = lambda _: None) -> dict[str, ExportedProgram]:
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

    def __init__(self, programs: Mapping[str, ExportedProgram], options: Options, contract: Mapping[str, Any]):
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


def lower(
    step: StaticStep, options: Options, contract: Mapping[str, Any], path: Path, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Write the program to `path`; seconds by stage, and what the delegate took. Minutes for a dozen layers."""
    installed_version()
    load_operators()
    seconds, started = {}, time.perf_counter()
    programs = trace(step, options, tell)
    seconds["trace"], started = time.perf_counter() - started, time.perf_counter()
    tell(f"lowering {len(programs)} graphs of {len(step.shapes)} layers to {options.delegate}")
    lowered = Lowered(programs, options, contract)
    seconds["lower"], started = time.perf_counter() - started, time.perf_counter()
    coverage = lowered.coverage()
    tell("writing the program")
    lowered.write(path)
    seconds["write"] = time.perf_counter() - started
    return {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "coverage": coverage}
