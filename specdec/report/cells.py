"""A comparison as a document of one cell, which is what pages are made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.cli import options
from specdec.dtypes import dtype_name
from specdec.registry import available
from specdec.sweep import identity
from specdec.sweep.cell import done_cell
from specdec.sweep.setting import BUILT_IN, DEFAULT_VERIFIER, EMBEDDED, FIXED, Setting

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.bench.comparison import Comparison
    from specdec.bench.prompt_sets import Encoded

SCHEMA = 1
#: Texts that a page of one comparison tells token by token.
NUM_STORIES = 3


def setting_of(arguments: argparse.Namespace, decoder: SpeculativeDecoder) -> Setting:
    """The setting that the command line described, as a sweep would have written it."""
    chosen, policy = options.chosen_drafter(arguments), options.chosen_policy(arguments)
    policy_options: dict[str, Any] = dict(arguments.policy_option)
    for name, key in (("threshold", "threshold"), ("tree_plan", "plan_file")):
        if getattr(arguments, name, None) is not None:
            policy_options[key] = getattr(arguments, name)
    depth = arguments.k if arguments.k is not None else policy_options.pop("k", None)
    if depth is None and arguments.tree is None and policy == FIXED and decoder.drafter.name != "none":
        depth = decoder.policy.start().plan().depth
    return Setting(
        target=arguments.target or EMBEDDED,
        draft=None if chosen in available("drafter") else chosen,
        drafter=decoder.drafter.name if decoder.drafter.name in available("drafter") else chosen,
        drafter_options=dict(arguments.drafter_option),
        k=None if arguments.tree is not None else depth,
        tree=arguments.tree,
        policy=policy,
        policy_options=policy_options,
        verifier=arguments.verifier or DEFAULT_VERIFIER,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        quantize=arguments.quantize,
        draft_quantize=arguments.draft_quantize,
        kv_cache=arguments.kv_cache,
        dtype=dtype_name(decoder.backend.capabilities.dtype),
        backend=arguments.backend,
        numerics=decoder.backend.numerics,
        device=arguments.device,
        threads=arguments.threads,
        prompt_set=arguments.prompts or BUILT_IN,
        limit=arguments.limit,
        chat=bool(arguments.chat),
        exact=arguments.exact,
    )


def memory_of(decoder: SpeculativeDecoder, length: int) -> dict[str, int]:
    """Bytes of the weights, and of the keys and values of a text of `length` tokens."""
    from specdec.planner.memory import memory_needed

    needed = memory_needed(decoder, length, 1)
    return {
        "target_weights": needed.target_weights,
        "draft_weights": needed.draft_weights,
        "kv": needed.target_kv + needed.draft_kv,
    }


def stories_of(
    decoder: SpeculativeDecoder, prompts: Sequence[Encoded], texts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The first prompts' texts, told token by token; `texts`: options of `generate`."""
    from specdec.report.story import tell

    return [
        {
            "prompt": decoder.tokenizer.decode(list(prompt.ids), skip_special_tokens=True),
            "tokens": tell(decoder, list(prompt.ids), **texts),
        }
        for prompt in prompts[:NUM_STORIES]
    ]


def document_of(
    comparison: Comparison,
    arguments: argparse.Namespace,
    decoder: SpeculativeDecoder,
    story: list[dict[str, Any]] | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
    seconds: float = 0.0,
) -> dict[str, Any]:
    """A document (`schema`, `environment`, `cells`) of one cell, as it would come out of a store."""
    import torch

    setting = setting_of(arguments, decoder)
    longest = max(row.num_prompt_tokens for row in comparison.rows) + setting.max_new_tokens
    length = min(longest, decoder.backend.capabilities.context)
    key = setting.keyed(identity.models(setting))
    cell = done_cell(setting, key, comparison, memory=memory_of(decoder, length), story=story, seconds=seconds)
    environment = {
        **identity.environment(decoder.backend.capabilities.device, torch.get_num_threads()),
        "parameters": dict(parameters or {}),
        "command": list(command),
    }
    written = {"schema": SCHEMA, "environment": environment, "cells": [cell]}
    return dict(json.loads(json.dumps(written)))  # keys of tables as texts, as from a store
