"""`transformers`' own generation on the same loaded models, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from specdec.errors import IncompatiblePairError, InputError
from specdec.prompting import eos_ids

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

NAMES = ("hf", "hf-assisted")

Generate = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True)
class Baseline:
    """`generate(prompt ids) -> new token ids`."""

    name: str
    describes: str
    generate: Generate


def _generation_config(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> Any:
    """Everything is set, so that nothing is filled in from the checkpoint's own defaults."""
    from transformers import GenerationConfig

    temperature = options.get("temperature", 0.0)
    eos = sorted(eos_ids(decoder.target, options.get("eos_token_id")))
    stop = options.get("stop") or None
    sampling = (
        {
            "do_sample": True,
            "temperature": temperature,
            "top_k": options.get("top_k") or 0,
            "top_p": options.get("top_p") or 1.0,
            "min_p": options.get("min_p"),
        }
        if temperature
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=options.get("max_new_tokens", 128),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
        stop_strings=[stop] if isinstance(stop, str) else list(stop) if stop else None,
        num_beams=1,
        use_cache=True,
        **sampling,
    )


@contextmanager
def _own_generation_config(model: Any, **changes: Any) -> Iterator[None]:
    """`transformers` reads, and sometimes writes, settings on the model: give it a copy, and put the original back."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = before


def _generator(
    decoder: SpeculativeDecoder,
    options: Mapping[str, Any],
    assistant: Any = None,
    schedule: Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> Generate:
    model = decoder.target if model is None else model
    config = _generation_config(decoder, options)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    context = decoder.backend.capabilities.context
    extra: dict[str, Any] = {"tokenizer": decoder.tokenizer} if config.stop_strings else {}
    if assistant is not None:
        extra["assistant_model"] = assistant

    @torch.inference_mode()
    def generate(prompt: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(prompt)], device=model.device)
        config.max_new_tokens = min(options.get("max_new_tokens", 128), context - len(prompt))
        torch.manual_seed(options.get("seed", 0))
        with _own_generation_config(model), _own_generation_config(assistant or model, **(schedule or {})):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, **extra)
        return [int(token) for token in out[0, len(prompt) :]]

    return generate


def plain(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> Baseline:
    """`model.generate`."""
    return Baseline("hf", "transformers generate", _generator(decoder, options))


def static(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> Baseline:
    """`model.generate` with a static cache and a compiled decoding step, on every kind of device.

    It works on a shallow copy of the model: `transformers` keeps the compiled step and the cache on the object.
    """
    from transformers import CompileConfig

    # On a GPU with CUDA graphs, as transformers has it by itself.
    mode = "reduce-overhead" if decoder.target.device.type == "cuda" else "default"
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode=mode)
    compile_config._compile_all_devices = True  # transformers' switch for devices other than accelerators
    settings = {"cache_implementation": "static", "compile_config": compile_config}
    generate = _generator(decoder, options, model=copy.copy(decoder.target), settings=settings)
    return Baseline("hf-static", "transformers generate, static cache, compiled", generate)


def assisted(decoder: SpeculativeDecoder, options: Mapping[str, Any], draft: Any, k: int | None = None) -> Baseline:
    """`model.generate(assistant_model=draft)`: with its default schedule, or with a constant number of tokens."""
    if k is None:
        default = f"{getattr(draft.generation_config, 'num_assistant_tokens_schedule', None) or 'constant'} schedule"
        return Baseline("hf-assisted", f"transformers assisted, {default}", _generator(decoder, options, draft))
    constant = {
        "num_assistant_tokens": k,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return Baseline(f"hf-assisted-k{k}", f"transformers assisted, k={k}", _generator(decoder, options, draft, constant))


def build(name: str, decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> list[Baseline]:
    """The baselines that `--baseline NAME` asks for.

    `hf`: `model.generate`. `hf-assisted`: the same with `assistant_model`, once with its default schedule and once
    with a constant four tokens. Raises `InputError` for another name or when there is no draft model.
    """
    if name == "hf":
        return [plain(decoder, options)]
    if name != "hf-assisted":
        raise InputError(f"no baseline is called {name!r}; there are: {', '.join(NAMES)}")
    draft = getattr(decoder.drafter, "model", None)
    if not isinstance(draft, torch.nn.Module) or not hasattr(draft, "generate"):
        raise IncompatiblePairError(
            f"the hf-assisted baseline drafts with a model, and the {decoder.drafter.name} drafter has none; "
            "use --drafter model, a hub id or a folder, or leave --baseline hf-assisted out"
        )
    sizes = decoder.target.config.vocab_size, getattr(draft.config, "vocab_size", None)
    if sizes[0] != sizes[1]:
        raise IncompatiblePairError(
            f"transformers' assisted generation wants equal vocabulary sizes; target and draft have "
            f"{sizes[0]} and {sizes[1]}: leave --baseline hf-assisted out"
        )
    return [assisted(decoder, options, draft), assisted(decoder, options, draft, 4)]
