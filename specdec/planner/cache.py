"""Measurements kept between runs: files named by what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from specdec.drafter import Drafter
from specdec.fit.plan import circumstances
from specdec.kernels.build import cache_folder
from specdec.kernels.build import key as kernels_key
from specdec.quant.linear import stored_as
from specdec.train.provenance import fingerprint, versions, write_json

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

# Of what is kept; a file of another one is measured again.
SCHEMA = 1
_DEEPEST = 4


def modules_of(drafter: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Models and heads that a drafter holds, its own or in the drafters inside it."""
    for value in vars(drafter).values():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, nn.Module):
                yield one
            elif isinstance(one, Drafter) and depth < _DEEPEST:
                yield from modules_of(one, depth + 1)


def _plain_facts(drafter: Drafter) -> dict[str, Any]:
    """What a drafter's options left in it."""
    kinds = (bool, int, float, str, tuple)
    return {name: str(value) for name, value in sorted(vars(drafter).items()) if isinstance(value, kinds)}


def identity(decoder: SpeculativeDecoder) -> dict[str, Any]:
    """The models, and all that their numbers depend on besides the machine."""
    drafter, backend = decoder.drafter, decoder.backend
    return {
        "schema": SCHEMA,
        "target": fingerprint(decoder.target),
        "config": decoder.target.config.to_dict(),
        "stored_as": stored_as(decoder.target),
        "drafter": [type(drafter).__module__, type(drafter).__qualname__, _plain_facts(drafter)],
        "drafts_with": [(fingerprint(module), stored_as(module)) for module in modules_of(drafter)],
        "verifier": decoder.verifier.name,
        "dtype": str(backend.capabilities.dtype),
        "kv_cache": backend.kv_cache,
        "backend": [type(backend).__name__, backend.describes, backend.numerics],
        "kernels": kernels_key(),
        "versions": versions(),
    }


def cost_facts(decoder: SpeculativeDecoder, options: Mapping[str, Any], trees: bool) -> dict[str, Any]:
    """What costs depend on. Which prompts is not among it: their tokens cost the same."""
    sampling = {name: options.get(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty")}
    return {
        **identity(decoder),
        "kind": "costs",
        "trees": trees,
        "machine": [platform.machine(), platform.system(), os.cpu_count()],
        "circumstances": circumstances(decoder.target, decoder.drafter),
        "sampling": {**sampling, "random": bool(options.get("temperature", 0.0))},
    }


def acceptance_facts(
    decoder: SpeculativeDecoder, options: Mapping[str, Any], trees: bool, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What acceptance depends on: no clock."""
    texts = hashlib.sha256(json.dumps([list(ids) for ids in prompts]).encode()).hexdigest()
    return {
        **identity(decoder),
        "kind": "acceptance",
        "trees": trees,
        "options": {name: str(value) for name, value in sorted(options.items())},
        "prompts": texts,
    }


def key_of(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Store:
    """JSON files in the user's cache folder (`$SPECDEC_CACHE`, see `specdec.kernels.build`), by key.

    A file appears complete or not at all; one that cannot be read, or was written for other facts, is as good as none.
    A folder that cannot be written costs the next run its measurements, and nothing else.
    """

    def __init__(self, folder: Path | None = None, fresh: bool = False):
        self.folder = (cache_folder() / "plans") if folder is None else folder
        self.fresh = fresh

    def load(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was kept for these facts; nothing when `fresh`."""
        if self.fresh:
            return None
        try:
            found = json.loads(self._path(facts).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        if not isinstance(found, dict) or found.get("key") != key_of(facts) or not isinstance(found.get("what"), dict):
            return None
        what: dict[str, Any] = found["what"]
        return what

    def save(self, facts: Mapping[str, Any], what: Mapping[str, Any]) -> bool:
        """Whether it could be kept."""
        content = {"key": key_of(facts), "facts": json.loads(json.dumps(facts, default=str)), "what": what}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path(facts), content)
        except OSError:
            return False
        return True

    def _path(self, facts: Mapping[str, Any]) -> Path:
        return self.folder / f"{facts['kind']}-{key_of(facts)}.json"
