"""One program of several graphs for ExecuTorch: traced, lowered to a delegate, with weights and slots stored once."""

from __future__ import annotations

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
from torch import Tensor
from torch.export import ExportedProgram
from typing_extensions import Self

from specdec.errors import InputError
from specdec.export import recipes
from specdec.export.delegates import DELEGATES, partitioners
from specdec.export.exporter import Exporter, Stored, Tell, together
from specdec.export.options import Method, Options
from specdec.export.sections import Span, numbered
from specdec.export.step import ATTENTIONS, StaticStep, Swap
from specdec.export.step_io import IoStep
from specdec.export.versions import tried

PROGRAM = "model.pte"
#: The graph that exchanges what the slots hold.
SWAP = "swap"
#: Who writes keys and values: graphs into slots of their own, the host, which gives them to graphs, or either.
KV = ("graph", "host", "both")
#: Releases of ExecuTorch, and those of torch that each was found to work with.
KNOWN = {"1.5": ("2.13",)}
#: What the program calls the contract that it carries.
CONTRACT = "specdec_contract"
_MESSAGE = "pip install 'specdec[executorch]'"


@dataclass(frozen=True)
class ExecutorchOptions(Options):
    """`attention`: by ExecuTorch's operators for language models ("custom") or in core operators ("plain").

    `delegate`: who runs the products, a name of `DELEGATES`. `kv`: who writes keys and values; of a program that has
    both kinds of graphs this is chosen when it is opened. `share_buffers=False` gives every graph keys and values of
    its own, which is wrong, and there to show it.
    """

    backend: ClassVar[str] = "executorch"

    attention: str = "custom"
    delegate: str = "xnnpack"
    kv: str = "graph"
    share_buffers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("attention", ATTENTIONS)
        self.check_choice("delegate", tuple(DELEGATES))
        self.check_choice("kv", KV)
        if self.kv != "host" and not DELEGATES[self.delegate].owns:
            raise InputError(
                f"the {self.delegate} delegate takes no graphs with slots of their own: give kv='host' (--kv host) too"
            )
        if self.recipe is None:
            return
        object.__setattr__(self, "recipe", recipes.canonical(self.recipe))  # the same weights, the same key
        if self.delegate != "xnnpack":
            raise InputError(
                f"recipes are for the delegate xnnpack, and {self.delegate} is given; leave one of them out"
            )


def installed_version() -> str:
    """Of ExecuTorch. Raises `InputError` when it is not there, or was never tried with the torch that is."""
    return tried("executorch", KNOWN, _MESSAGE)


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


def host_graph(method: Method) -> str:
    """What the graph of these rows is called that is given keys and values."""
    return f"host_{method.name}"


def graphs(options: ExecutorchOptions) -> list[str]:
    """Of a program that decode, narrow ones first."""
    owning = [m.name for m in options.methods] if options.kv != "host" else []
    return owning + ([host_graph(m) for m in options.methods] if options.kv != "graph" else [])


class _Steps(StaticStep):
    """A step that owns its slots, and beside it one on the same weights that is given them."""

    def __init__(self, model: Any, options: ExecutorchOptions):
        super().__init__(model, options.num_slots, hidden=options.hidden, attention=options.attention)
        given = IoStep(model, options.num_slots, hidden=options.hidden) if options.kv == "both" else None
        self.given = (given,)  # in a tuple, so that it is no part of this module

    def part(self, span: Span) -> Self:
        twin = super().part(span)
        twin.given = (self.given[0] and self.given[0].part(span),)
        return twin


def trace(step: StaticStep, options: ExecutorchOptions, tell: Tell = lambda _: None) -> dict[str, ExportedProgram]:
    """One exported program per graph of the options, and the one that exchanges what the slots hold."""
    programs: dict[str, ExportedProgram] = {}

    def add(name: str, module: StaticStep, method: Method) -> None:
        tell(f"tracing {name}")
        module = module.last_only() if method.one_logit else module
        programs[name] = torch.export.export(module, module.example(method.width), strict=False)

    with torch.no_grad(), quietly():
        if not isinstance(step, IoStep):
            for method in options.methods:
                add(method.name, step, method)
            swap = Swap(step)
            programs[SWAP] = torch.export.export(swap, swap.example(), strict=False)
        given = step if isinstance(step, IoStep) else step.given[0] if isinstance(step, _Steps) else None
        if given is not None:
            for method in options.methods:
                add(host_graph(method), given, method)
    return programs


class _Planning:
    """Memory of each graph: those with slots share them; those that are given keys and values read them where they lie,
    instead of copying them into memory of their own at every step."""

    def __init__(self, share_buffers: bool):
        from executorch.exir.passes import MemoryPlanningPass

        self._owning = MemoryPlanningPass(share_mutable_buffers=share_buffers)
        self._given = MemoryPlanningPass(alloc_graph_input=False)

    def run(self, module: Any, signature: Any = None) -> Any:
        owns = bool(signature is not None and signature.buffers_to_mutate)
        return (self._owning if owns else self._given).run(module, signature)

    def run_multimethod(self) -> None:
        self._owning.run_multimethod()


class Lowered:
    """Graphs that were lowered and can be written out, with or without common slots."""

    def __init__(
        self, programs: Mapping[str, ExportedProgram], options: ExecutorchOptions, contract: Mapping[str, Any]
    ):
        with quietly():
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            self._edge = to_edge_transform_and_lower(
                dict(programs),
                partitioner={name: partitioners(options.delegate, options.recipe) for name in programs},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={CONTRACT: json.dumps(contract)},
            )
        self.options = options

    def coverage(self) -> dict[str, dict[str, int]]:
        """Of each graph: parts that the delegate took, operators in them, and operators left outside."""
        from executorch.devtools.backend_debug import get_delegation_info

        found = {}
        for name in graphs(self.options):
            info = get_delegation_info(self._edge.exported_program(name).graph_module)
            found[name] = {
                "delegates": int(info.num_delegated_subgraphs),
                "delegated": int(info.num_delegated_nodes),
                "outside": int(info.num_non_delegated_nodes),
            }
        return found

    def write(self, path: Path) -> None:
        from executorch.exir import ExecutorchBackendConfig

        planning: Any = _Planning(self.options.share_buffers)
        with quietly():
            program = self._edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        with path.open("wb") as file:
            program.write_to_file(file)


class ExecutorchExporter(Exporter):
    name = "executorch"
    options = ExecutorchOptions
    program = PROGRAM
    parts = True

    def versions(self) -> dict[str, str]:
        return {"executorch": installed_version()}

    def needs_text(self, options: ExecutorchOptions) -> bool:
        return options.recipe is not None and recipes.needs_text(options.recipe)

    def store(self, model: Any, options: ExecutorchOptions, calibration_BT: Tensor | None = None) -> Stored | None:
        return recipes.quantise(model, options.recipe, calibration_BT) if options.recipe is not None else None

    def step(self, model: Any, options: ExecutorchOptions) -> StaticStep:
        if options.kv == "host":
            step: StaticStep = IoStep(model, options.num_slots, hidden=options.hidden)
            given = None
        else:
            step = _Steps(model, options)
            given = step.given[0]
        if options.recipe is not None:
            recipes.unwrap(step)
            if given is not None:
                recipes.unwrap(given)
        return step

    def lower(
        self, step: StaticStep, options: ExecutorchOptions, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        """Seconds by stage, and what the delegate took. Minutes for a dozen layers."""
        load_operators()
        partitioners(options.delegate)  # refuses before anything is spent
        seconds, coverage = dict.fromkeys(("trace", "lower", "write"), 0.0), []
        for index, part in enumerate(step.in_parts(options.parts)):
            if options.parts > 1:
                tell(f"part {index + 1} of {options.parts}")
            started = time.perf_counter()
            programs = trace(part, options, tell)
            traced = time.perf_counter()
            tell(f"lowering {len(programs)} graphs of {len(part.layers)} layers to {options.delegate}")
            lowered = Lowered(programs, options, contract)
            done = time.perf_counter()
            coverage.append(lowered.coverage())
            tell("writing the program")
            lowered.write(folder / numbered(PROGRAM, index))
            for name, value in (("trace", traced - started), ("lower", done - traced)):
                seconds[name] += value
            seconds["write"] += time.perf_counter() - done
        return {"seconds": {name: round(value, 2) for name, value in seconds.items()}, "coverage": together(coverage)}
