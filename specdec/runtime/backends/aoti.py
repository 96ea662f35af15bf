"""The AOTInductor backend: a package of `specdec export --backend aoti`, its weights and its kernels; no compiler.

The step is that of the `compiled` backend, with everything it can do: any number of rows, trees, batches in one call,
the same bits for a row whatever rides along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError
from specdec.export.aoti import EXPECTED, KERNELS, PROGRAM, WEIGHTS, instructions
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError, difference, sha256_of
from specdec.kernels import build, ops
from specdec.runtime import graph
from specdec.runtime.artifacts import check_artifact, check_exposed
from specdec.runtime.backend import Capabilities, Step, StepResult, stored_as
from specdec.runtime.check import TOLERANCE, apart, check_step
from specdec.runtime.native import Exposing
from specdec.runtime.opened import NativeBackend, Opened


class _Hidden(Exposing):
    def __init__(self, hidden: Sequence[int]):
        self.hidden = tuple(hidden)


def _header(model: ArtifactModel) -> dict[str, Any]:
    """What the weights' file says of its folder, as data. Raises `ArtifactError` where the folder is not that."""
    try:
        with safe_open(model.folder / WEIGHTS, "pt") as file:
            found = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{model.folder}: {WEIGHTS} cannot be read ({error}); export the model again") from error
    if not {"contract", "native", "files"} <= found.keys():
        raise ArtifactError(f"{model.folder}: {WEIGHTS} carries no contract; export the model again")
    model.manifest.check_contract(model.folder, json.dumps(found["contract"]))
    here = {name: sha256_of(model.folder / name) for name in found["files"]}
    other = difference({"files": found["files"]}, {"files": here})
    if other is not None:
        raise ArtifactError(
            f"{model.folder}: {other[0]} is not the file that was exported with {WEIGHTS}; export again"
        )
    return found


def check_machine(versions: Mapping[str, str]) -> None:
    """Raise `ArtifactError`, naming the field, for machine code that was made for something else than what is here."""
    here = {"torch": torch.__version__.split("+")[0], "kernels": build.key(), "step": str(graph.FORMAT)}
    for name, found in here.items():
        if versions.get(name) != found:
            raise ArtifactError(
                f"versions.{name} is {versions.get(name)!r} in the artefact and {found!r} here, and machine code fits "
                "one only: export the model again, with what is installed here"
            )
    missing = sorted(set(str(versions.get("instructions", "")).split()) - set(instructions().split()))
    if missing:
        raise ArtifactError(
            f"versions.instructions of the artefact has {', '.join(missing)}, which this processor lacks: export the "
            "model on a machine of this kind"
        )


class _Package(Opened):
    """A package that was loaded, with its weights bound."""

    def __init__(self, model: ArtifactModel, kv_cache: str | None):
        header = _header(model)
        check_machine(model.manifest.contract["versions"])
        ops.offer(model.folder / KERNELS)
        if not ops.available():
            raise InputError(f"the aoti backend needs the native kernels: {ops.why_not()}")
        facts = header["native"]
        self.model, self.stock = model, list(facts["stock"])
        hidden = tuple(facts["hidden"])
        manifest = model.manifest
        capabilities = Capabilities(
            vocab_size=manifest.model["vocab_size"],
            context=manifest.options.max_seq_len,
            device=model.device,
            dtype=model.dtype,
            shares=False,
            hidden=hidden,
        )
        super().__init__(_Hidden(hidden), capabilities, len(facts["windows"]), kv_cache)
        stored = load_file(model.folder / WEIGHTS)
        self._expected = stored.pop(EXPECTED)
        bound = {**stored, **{name: stored[kept] for name, kept in facts["names"].items()}}
        self._run = graph.Graph(model.folder / PROGRAM, bound)

    def call(self, given: list[Tensor]) -> Sequence[Tensor]:
        return self._run(*given)

    def check(self) -> None:
        """Raise unless a few rows have the logits that they had when the package was made."""
        found = AotiBackend(self, self.exact_slots()).forward(check_step(self.capabilities, 0)).logits
        share = apart(found, self._expected, TOLERANCE[self.capabilities.dtype])
        if share is not None:
            raise ArtifactError(
                f"{self.model.folder}: logits are off by {share:.1e} of the largest from those at the export; export "
                "the model again"
            )


class AotiBackend(NativeBackend):
    """Runs artefacts of `specdec export --backend aoti`. Opening one loads machine code: open those that you trust.

    `kv_cache`: how keys and values are stored (`specdec.quant.kv`).

    Lossless: yes, to the bit where `numerics` is "invariant".
    """

    name = "aoti"

    def __init__(self, opened: _Package, slots: Any = None):
        super().__init__(opened, slots)
        self._package = opened

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        artifact = check_artifact(model, cls.name)
        options = {**artifact.runtime_options, **options}
        kv_cache = options.pop("kv_cache", None)
        if options:
            raise InputError(f"the aoti backend takes kv_cache= and no other option, not {sorted(options)}")
        package = _Package(artifact, kv_cache)
        package.check()
        made = cls(package)
        if kv_cache is not None:
            made.bytes_per_token  # noqa: B018 - a token goes through, so that sizes that do not fit are refused now
        return made

    @property
    def numerics(self) -> str:
        return "fast" if self._package.stock else "invariant"

    @property
    def describes(self) -> str:
        recipe = self._package.model.manifest.options.recipe
        stored = f", {recipe} weights" if recipe else ""
        stock = f", stock products in {', '.join(self._package.stock)}" if self._package.stock else ""
        return f"aoti, native kernels ({ops.isa()}), one compiled graph{stored}{stock}{stored_as(self.kv_cache)}"

    def expose(self, hidden: Sequence[int]) -> None:
        check_exposed(self.capabilities, hidden)

    @classmethod
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """In one call, up to the rows that the graph takes."""
        rows = sum(step.num_rows for step in steps)
        if rows <= graph.MAX_ROWS:
            return super().forward_many(backends, steps)
        if len(steps) == 1:
            raise InputError(f"a step of {rows} rows: the graph takes {graph.MAX_ROWS}")
        half = len(steps) // 2
        return cls.forward_many(backends[:half], steps[:half]) + cls.forward_many(backends[half:], steps[half:])
