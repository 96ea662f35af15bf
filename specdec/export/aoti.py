"""The compiled step of a model as a package of AOTInductor, with its weights and kernels: no compiler is needed later.

The graph is the one that the `compiled` backend makes: any number of rows, keys and values behind a handle, weights
outside. A package is a shared library: whoever opens it runs its code.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import InputError, UnsupportedModelError
from specdec.export import options as graphs
from specdec.export.exporter import Exporter, Stored, Tell
from specdec.export.manifest import sha256_of
from specdec.export.options import Options
from specdec.export.recipes import digest_of
from specdec.export.step import StaticStep
from specdec.kernels import build, ops
from specdec.quant.linear import PackedLinear
from specdec.quant.methods import create, prepare_model
from specdec.quant.methods.method import Method
from specdec.quant.recipe import Recipe
from specdec.runtime import graph
from specdec.runtime.backends.compiled import CompiledBackend
from specdec.runtime.check import check_step
from specdec.runtime.native import NativeModel, unsupported

PROGRAM = "graph.pt2"
WEIGHTS = "weights.safetensors"
KERNELS = "kernels.so"
#: Logits of a few rows, beside the weights: what a package has to give where it is opened.
EXPECTED = "specdec.expected"
# Instructions that a compiler uses for numbers where the machine has them, as the system names them.
_INSTRUCTIONS = re.compile(
    r"(sse|ssse|avx|amx|fma|bmi|f16c|abm|lzcnt|movbe|popcnt|adx|aes|vaes|sha|gfni|pclmul|vpclmul|asimd|sve|bf16|i8mm|fp)"
)


@dataclass(frozen=True)
class AotiOptions(Options):
    """One graph takes any number of rows, and slots grow: of the graphs' options there is `max_seq_len` only.

    `recipe`: whatever `specdec.quant` takes, a format or a recipe by name: weights are stored so, and multiplied so.
    """

    backend: ClassVar[str] = "aoti"

    prefill_len: int = 1
    k: tuple[int, ...] = (0,)
    max_nodes: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prefill_len, self.k, self.max_nodes) != (1, (0,), 0):
            raise InputError(
                "the graph of the aoti backend takes any number of rows: leave prefill_len, k and max_nodes out"
            )
        if self.recipe is not None:
            Recipe.of(self.recipe)  # an unknown one is refused with the nearest names

    @property
    def methods(self) -> tuple[graphs.Method, ...]:
        return (graphs.Method("up to", graph.MAX_ROWS),)


class _Step(StaticStep):
    """What the contract tells of the model, and the model itself: this graph is not made from slots of fixed number."""

    def __init__(self, model: Any, options: AotiOptions):
        super().__init__(model, 1, hidden=options.hidden, attention="plain")
        self.source = (model,)  # in a tuple, so that it is no part of this module


def _method(recipe: Recipe) -> Method:
    return create(recipe.method, recipe.options)


def instructions() -> str:
    """What this processor can do that compiled code may rely on, in one line."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    found = sorted({flag for flag in flags if _INSTRUCTIONS.match(flag)})
    return " ".join([platform.machine(), *(found or [torch.backends.cpu.get_cpu_capability()])])


class AotiExporter(Exporter):
    name = "aoti"
    options = AotiOptions
    program = PROGRAM

    def versions(self) -> dict[str, str]:
        """Of the kernels' sources, of what a graph is given, and the instructions that the compiler may use here."""
        if not ops.available():
            raise InputError(f"the aoti backend needs the native kernels: {ops.why_not()}")
        return {"kernels": build.key(), "step": str(graph.FORMAT), "instructions": instructions()}

    def check(self, model: Any, options: AotiOptions) -> None:
        super().check(model, options)
        reason = unsupported(model)
        if reason:
            raise UnsupportedModelError(f"{reason}; use --backend executorch or openvino")

    def needs_text(self, options: AotiOptions) -> bool:
        return options.recipe is not None and bool(_method(Recipe.of(options.recipe)).needs)

    def store(self, model: Any, options: AotiOptions, calibration_BT: Tensor | None = None) -> Stored | None:
        if options.recipe is None:
            return None
        recipe = Recipe.of(options.recipe)
        rounded = prepare_model(model, recipe, calibration_BT)
        looks = calibration_BT is not None and _method(recipe).needs
        state = rounded.state_dict()
        layers = Counter(m.format.name for m in rounded.modules() if isinstance(m, PackedLinear))
        facts: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "layers": dict(layers),
            "notes": list(rounded.quantisation_notes),
            "calibration": digest_of([calibration_BT]) if looks else None,
            "sha256": digest_of([state[name] for name in sorted(state)]),
        }
        held = {tensor.data_ptr(): tensor.nbytes for tensor in state.values()}
        return Stored(rounded, facts, sum(held.values()))

    def step(self, model: Any, options: AotiOptions) -> StaticStep:
        return _Step(model, options)

    def lower(
        self, step: StaticStep, options: AotiOptions, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        assert isinstance(step, _Step)
        seconds, started = {}, time.perf_counter()
        tell("compiling the step")
        backend = CompiledBackend.open(step.source[0], compile="never")
        backend.expose(options.hidden)
        native, made = backend.package()
        seconds["compile"], started = time.perf_counter() - started, time.perf_counter()
        tell("writing graph, kernels and weights")
        shutil.copyfile(graph.path_of(native), folder / PROGRAM)
        assert ops.library is not None
        shutil.copyfile(ops.library, folder / KERNELS)
        expected = backend.fork(0).forward(check_step(backend.capabilities, 0)).logits
        write_weights(folder, made.bound, expected, native, contract)
        seconds["write"] = time.perf_counter() - started
        return {"seconds": {name: round(value, 2) for name, value in seconds.items()}}


def write_weights(
    folder: Path, bound: Mapping[str, Tensor], expected: Tensor, native: NativeModel, contract: Mapping[str, Any]
) -> None:
    """Every tensor once, under the names that the graph knows; and, as text, what ties the folder's files together."""
    stored: dict[str, Tensor] = {EXPECTED: expected.contiguous()}
    places: dict[tuple[Any, ...], str] = {}
    names = {}
    for name, tensor in sorted(bound.items()):
        if not tensor.is_contiguous():
            raise UnsupportedModelError(f"{name} does not lie in one piece; save the model, and export what was saved")
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        names[name] = places.setdefault(place, name)
        stored[names[name]] = tensor
    facts = {
        "windows": list(native.windows),
        "stock": native.stock,
        "hidden": list(native.hidden),
        "names": {name: kept for name, kept in names.items() if kept != name},
    }
    files = {name: sha256_of(folder / name) for name in (PROGRAM, KERNELS)}
    texts = {"contract": contract, "native": facts, "files": files}
    save_file(dict(_apart(stored)), folder / WEIGHTS, metadata={name: json.dumps(text) for name, text in texts.items()})


def _apart(stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Parts of one larger tensor become tensors of their own: a file has no views."""
    seen: set[int] = set()
    for name, tensor in stored.items():
        storage = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if storage in seen else tensor
        seen.add(storage)
