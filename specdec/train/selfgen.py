"""The target's own texts as training text: what a drafter will have to draft.

They are made by the library's own batch decoding, so the same seed gives the same texts, and kept beside the output
under a digest of everything that they depend on: an interrupted run continues with the next shard.

Shape suffixes: R rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from specdec.errors import InputError
from specdec.train.data import Document, Rows, TrainingData, encode
from specdec.train.provenance import fingerprint

_SHARD, _ROWS = 128, 64  # texts in a file, and decoded at once
_MIN_HELD_OUT = 16

#: Told after each shard: texts made, texts asked for.
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class SelfGeneration:
    """`count` texts of `length` tokens: a prompt of at most `prompt_tokens`, continued by the target until its end.

    `temperatures` take turns. `text_share`: the share of training rows that are the data's own text all the same.
    """

    count: int
    length: int
    prompt_tokens: int = 64
    temperatures: tuple[float, ...] = (0.0, 1.0)
    text_share: float = 0.5
    held_out_share: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--self-generate is a number of texts >= 1, not {self.count}")
        if not 1 <= self.prompt_tokens < self.length:
            raise InputError(
                f"prompts have 1 to {self.length - 1} of a row's {self.length} tokens, not {self.prompt_tokens}"
            )
        if not self.temperatures or min(self.temperatures) < 0:
            raise InputError("temperatures of self-generated texts are numbers >= 0")
        if not 0 <= self.text_share < 1:
            raise InputError(f"the share of the data's own text is at least 0 and below 1, not {self.text_share}")


def choose_prompts(
    documents: Sequence[Sequence[int]], count: int, most: int, opening: int | None, seed: int
) -> list[list[int]]:
    """Short documents whole; of long ones a random window, with the tokenizer's opening token in front again."""
    usable = [list(ids) for ids in documents if ids]
    if not usable:
        raise InputError("there is no text to take prompts from; give --data")
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        for i in rng.permutation(len(usable))[: count - len(prompts)]:
            ids = usable[i]
            if len(ids) <= most:
                prompts.append(ids)
                continue
            opens = opening is not None and ids[0] == opening
            start = int(rng.integers(0, len(ids) - most + 1))
            window = ids[start : start + most]
            prompts.append([ids[0], *window[:-1]] if opens and start else window)
    return prompts


def _shard(decoder: Any, prompts: Sequence[list[int]], first: int, what: SelfGeneration) -> dict[str, np.ndarray]:
    """Rows of `prompts`, the first of which has number `first`, decoded together."""
    batch = decoder.batch(max_rows=_ROWS)
    tickets = []
    for number, prompt in enumerate(prompts, first):
        temperature = what.temperatures[number % len(what.temperatures)]
        room = what.length - len(prompt)
        tickets.append(batch.submit(prompt, max_new_tokens=room, temperature=temperature, seed=what.seed + number))
    batch.drain()
    padding = getattr(decoder.target.config, "pad_token_id", None) or 0
    tokens_RL = np.full((len(prompts), what.length), padding, dtype=np.int32)
    last_R = np.zeros(len(prompts), dtype=np.int32)
    for i, made in enumerate(ticket.result() for ticket in tickets):
        row = made.prompt + made.tokens
        tokens_RL[i, : len(row)] = row
        # Behind the end of a text there is nothing to predict.
        last_R[i] = len(row) - (made.finish_reason == "eos")
    first_R = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int32)
    return {"tokens": tokens_RL, "first": first_R, "last": last_R}


def own_texts(target: Any, prompts: Sequence[list[int]], what: SelfGeneration, folder: Path, told: Told) -> Rows:
    """One row for each prompt; what counts is the target's own part. Kept in `folder`, shard by shard."""
    from specdec.api import SpeculativeDecoder

    key = {"target": fingerprint(target), "length": what.length, "temperatures": what.temperatures, "seed": what.seed}
    digest = hashlib.sha256(json.dumps([key, prompts]).encode()).hexdigest()[:16]
    kept = folder / f"texts-{digest}"
    kept.mkdir(parents=True, exist_ok=True)
    decoder: Any = None
    shards = []
    for first in range(0, len(prompts), _SHARD):
        path = kept / f"{first:07d}.safetensors"
        if not path.exists():
            decoder = decoder or SpeculativeDecoder(target, prefix_cache=0)
            made = _shard(decoder, prompts[first : first + _SHARD], first, what)
            aside = path.with_suffix(".partial")
            save_file(made, aside)
            os.replace(aside, path)
        shard = load_file(path)
        if shard["tokens"].shape != (len(prompts[first : first + _SHARD]), what.length):
            raise InputError(f"{path} is not what it should be; delete it, and the texts are made again")
        shards.append(Rows(shard["tokens"], shard["first"], shard["last"]))
        told(min(first + _SHARD, len(prompts)), len(prompts))
    return Rows(*(np.concatenate([getattr(s, name) for s in shards]) for name in ("tokens_RL", "first_R", "last_R")))


def self_generated(
    target: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    text: TrainingData | None,
    what: SelfGeneration,
    folder: Path,
    told: Told = lambda made, wanted: None,
) -> TrainingData:
    """Own texts from prompts of either side of the split of `documents`, the training side mixed with `text`'s rows.

    In training rows the prompt counts too, for the target's predictions there are as true as elsewhere; judged is
    what the target wrote.
    """
    context = getattr(target.config, "max_position_embeddings", None)
    if context is not None and what.length > context:
        raise InputError(f"rows of {what.length} tokens do not fit into the target's context of {context}")
    opening = getattr(tokenizer, "bos_token_id", None)
    sides = []
    held_out_count = max(_MIN_HELD_OUT, round(what.held_out_share * what.count))
    for held_out, count in ((False, what.count), (True, held_out_count)):
        ids = encode([d.text for d in documents if d.held_out == held_out], tokenizer, closed=False)
        prompts = choose_prompts(ids, count, what.prompt_tokens, opening, what.seed + held_out)
        sides.append(own_texts(target, prompts, what, folder, told))
    train = Rows(sides[0].tokens_RL, np.zeros_like(sides[0].first_R), sides[0].last_R)
    num_text = 0
    if text is not None and what.text_share > 0:
        num_text = min(len(text.train), round(len(train) * what.text_share / (1 - what.text_share)))
        train = train.joined(text.train.take(slice(0, num_text)))
    source = {"self_generated": len(sides[0]), "temperatures": list(what.temperatures), "text_rows": num_text}
    return TrainingData(train, sides[1], source)
