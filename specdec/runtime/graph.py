"""The compiled step: one ahead-of-time graph per model, for any number of rows, kept between processes.

The graph holds no weights and no caches. Weights are bound from the loaded model without a copy, so that every model of
the same shape uses the same file; keys and values stand behind a handle, so that texts come and go without compiling.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from specdec.kernels.build import cache_folder
from specdec.quant.linear import PackedLinear
from specdec.runtime.native import NativeModel

#: Rows of one call, at most: more go through the model's own Python.
MAX_ROWS = 4096
# A step's own loops are short; the products inside bring their threads along.
_INDUCTOR = {
    "aot_inductor.package_constants_in_so": False,
    "cpp.threads": 1,
    # Folding would bake weights of this very model, such as a norm of ones, into a graph that others will use.
    "joint_graph_constant_folding": False,
}
#: Raised when the operators' signatures change, or what the graph is given.
FORMAT = 2
_INLINED = 8
# Fields of a configuration that say where a model came from, not what it computes (dtypes are known by tensor).
_UNIMPORTANT = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def tensors(model: NativeModel) -> dict[str, Tensor]:
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in named.items()}


def fingerprint(model: NativeModel) -> str:
    """What the graph's code depends on: architecture, shapes, dtypes, versions."""
    given = model.model.config.to_dict().items()
    config = {k: v for k, v in given if not k.startswith("_") and "token_id" not in k and k not in _UNIMPORTANT}
    found = sorted(tensors(model).items())
    shapes = [(name, list(t.shape), list(t.stride()), str(t.dtype)) for name, t in found]
    # The compiler writes such small tensors into the code as numbers.
    inlined = [(name, t.double().tolist()) for name, t in found if t.numel() <= _INLINED]
    # Formats may store tensors of the same shapes, and their products are written into the code.
    stored = [(name, m.format.name) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    facts = {
        "format": FORMAT,
        "stored": stored,
        "class": f"{type(model.model).__module__}.{type(model.model).__qualname__}",
        "config": config,
        "tensors": shapes,
        "inlined": inlined,
        "hidden": model.hidden,
        "input_width": model.input_width,
        "versions": [torch.__version__, transformers.__version__],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
    }
    if config.get("tie_word_embeddings") and _is_untied(model.model):
        facts["untied"] = True  # the code reads two tensors, whatever the configuration says
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _is_untied(model: Any) -> bool:
    head = getattr(model.get_output_embeddings(), "weight", None)
    return head is not None and head.data_ptr() != model.get_input_embeddings().weight.data_ptr()


def folder() -> Path:
    return cache_folder() / "graphs"


def _loader(path: Path) -> Any:
    """What `torch._inductor.aoti_load_package` wraps, without its check of the CPU.

    That check runs the system's compiler for seconds, in every process, and ends in a warning; the fingerprint knows
    the CPU too.
    """
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except (AttributeError, TypeError):  # no public name, no promise: another torch may have it elsewhere
        return torch._inductor.aoti_load_package(str(path)).loader


class Graph:
    """A loaded graph with the weights of one model bound to it.

    `graph(tokens [1, M], positions [1, M], rows [L], handle [1][, inputs [1, M, W]]) -> [logits [L, V], hidden states
    [M, W] ...]`.
    """

    def __init__(self, path: Path, bound: Mapping[str, Tensor]):
        """`bound`: the weights by name, `tensors` of a model."""
        package = _loader(path)
        wanted = package.get_constant_fqns()
        missing = [name for name in wanted if name not in bound]
        if missing:
            raise RuntimeError(f"the graph wants {missing[0]}, which the model does not have")
        # The graph reads these where they lie: they must live as long as it does.
        self.bound = {name: bound[name].detach() for name in wanted}
        package.load_constants(self.bound, False, True, True)  # into the active set; all of them; used where they lie
        self._run: Callable[[list[Tensor]], list[Tensor]] = package.run

    def __call__(self, *given: Tensor) -> Sequence[Tensor]:
        return self._run(list(given))


def path_of(model: NativeModel) -> Path:
    """Where the model's graph is kept, or will be."""
    return folder() / f"{fingerprint(model)}.pt2"


def find(model: NativeModel) -> Graph | None:
    """The graph that an earlier process compiled, or None."""
    path = path_of(model)
    return Graph(path, tensors(model)) if path.is_file() else None


def compile(model: NativeModel, handle: Tensor) -> Graph:
    """Compile, keep, and load. `handle` names any steps: tracing never runs them. Raises what torch raises."""
    target = path_of(model)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    some, few = torch.export.Dim("rows", min=1, max=MAX_ROWS), torch.export.Dim("kept", min=1, max=MAX_ROWS)
    example = [torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None], torch.arange(3), handle]
    shapes: dict[str, dict[int, object] | None] = {
        "tokens": {1: some}, "positions": {1: some}, "rows": {0: few}, "handle": None
    }  # fmt: skip
    if model.input_width:
        example.append(torch.zeros(1, 5, model.input_width, dtype=model.model.dtype))
        shapes["inputs"] = {1: some}
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            program = torch.export.export(model, tuple(example), dynamic_shapes=shapes, strict=False)
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(scratch) / "step.pt2"), inductor_configs=dict(_INDUCTOR)
        )
        os.replace(made, target)
    return Graph(target, tensors(model))
