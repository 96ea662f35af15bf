"""OpenVINO's side of the benchmark, `python -m specdec.bench.openvino_worker`: converts, loads and runs on request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.bench.peer_process import serve

_pipelines: dict[str, Any] = {}


def convert(source: str, folder: str, weights: str | None) -> None:
    from specdec.bench.openvino_graph import convert  # needs torch and transformers, which running does not

    convert(source, folder, weights)


def load(name: str, target: str, draft: str | None, properties: Mapping[str, Any]) -> None:
    """A pipeline for `run`: of the target alone, or with a draft model."""
    import openvino_genai as genai

    drafting = {} if draft is None else {"draft_model": genai.draft_model(draft, "CPU", **properties)}
    _pipelines[name] = genai.LLMPipeline(
        target, "CPU", scheduler_config=genai.SchedulerConfig(), **drafting, **properties
    )


def run(name: str, prompt: Sequence[int], max_new_tokens: int, k: int | None) -> dict[str, Any]:
    """Greedy text: its ids, how many of them were drafted, and the seconds that it took."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = max_new_tokens, False, True
    if k is not None:
        config.num_assistant_tokens = k
    started = time.perf_counter()
    result = _pipelines[name].generate(ov.Tensor(np.array([list(prompt)], dtype=np.int64)), config)
    seconds = time.perf_counter() - started
    accepted = result.extended_perf_metrics.get_num_accepted_tokens() if k is not None else 0
    return {"tokens": [int(token) for token in result.tokens[0]], "accepted": int(accepted), "seconds": seconds}


if __name__ == "__main__":
    serve({"convert": convert, "load": load, "run": run})
