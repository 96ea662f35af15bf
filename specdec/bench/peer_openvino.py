"""OpenVINO GenAI as a peer: the pair's own weights as stateful graphs, decoded plainly and with the draft model.

It converts in one process and runs in another, so that none of its threads live beside ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from specdec.bench.peer_process import PeerProcess
from specdec.bench.rows import PLAIN, SPECULATIVE, Made, Method
from specdec.bench.synthetic import Pair
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.bench.peers import Setting

ENGINE = "openvino"
WORKER = "specdec.bench.openvino_worker"
_NEEDS = ("openvino", "openvino_genai", "openvino_tokenizers")
# Exact: no rounding that the weights do not have. Half: bfloat16 and whatever else the plugin then chooses by itself.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
HALF = {"INFERENCE_PRECISION_HINT": "bf16"}


def check() -> None:
    """Raise `InputError` when a package is missing."""
    missing = [name.replace("_", "-") for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--peer openvino needs {', '.join(missing)}: pip install openvino-genai")


def rows(pair: Pair, setting: Setting) -> list[Method]:
    """Plain, and with the draft model at each k; exact settings in float32, its own fast ones for all else."""
    graphs = setting.folder / "openvino"
    with PeerProcess(WORKER) as converter:
        for source in pair.save(setting.folder / "saved"):
            setting.say(f"converting the {source.name} for OpenVINO")
            folder = str(graphs / source.name)
            converter.ask("convert", source=str(source), folder=folder, weights=setting.weights)
    exact = setting.dtype == torch.float32 and setting.weights is None
    properties = {**(EXACT if exact else HALF), "INFERENCE_NUM_THREADS": setting.threads}
    setting.say("loading into OpenVINO")
    worker = setting.started(PeerProcess(WORKER))
    target, draft = str(graphs / "target"), str(graphs / "draft")
    worker.ask("load", name=PLAIN, target=target, draft=None, properties=properties)
    worker.ask("load", name=SPECULATIVE, target=target, draft=draft, properties=properties)

    def method(k: int | None) -> Method:
        plain = k is None

        def run(prompt: Sequence[int]) -> Made:
            name = PLAIN if plain else SPECULATIVE
            made = worker.ask("run", name=name, prompt=list(prompt), max_new_tokens=setting.max_new_tokens, k=k)
            tokens = tuple(made["tokens"])
            # Every step of the target adds one token of its own to those that it accepts.
            return Made(tokens, steps=len(tokens) - made["accepted"], seconds=made["seconds"])

        kind = "exact float32" if exact else "bfloat16, its default settings"
        kind = f"{setting.weights} weights, {kind}" if setting.weights else kind
        return Method(
            ENGINE if plain else f"{ENGINE}-draft-k{k}",
            ENGINE,
            PLAIN if plain else SPECULATIVE,
            ENGINE,
            f"OpenVINO GenAI, {kind}" + ("" if plain else f", draft model, k={k}"),
            run,
            drafter=None if plain else "model",
            k=k,
            cpu_seconds=worker.cpu_seconds,
        )

    return [method(k) for k in (None, *setting.ks)]
