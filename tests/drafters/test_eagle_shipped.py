"""The EAGLE head in the package."""

from __future__ import annotations

import json

import pytest
from specdec.drafters import EagleDrafter

import specdec
from specdec.bench.prompts import read_prompts
from specdec.loading import EMBEDDED
from specdec.policy import Fixed
from specdec.train.provenance import PROVENANCE, fingerprint

FOLDER = EMBEDDED / "eagle"
TOKENS = 48


@pytest.fixture(scope="module")
def decoder() -> specdec.SpeculativeDecoder:
    return specdec.load(drafter="eagle", policy=Fixed(5))


def test_it_drafts_for_the_embedded_target_by_its_name(decoder: specdec.SpeculativeDecoder) -> None:
    assert isinstance(decoder.drafter, EagleDrafter)
    rounds = []
    for prompt in read_prompts()[::3]:
        out = decoder.generate(prompt.text, max_new_tokens=TOKENS, strict=True)
        assert out.tokens == decoder.generate_plain(prompt.text, max_new_tokens=TOKENS).tokens
        rounds += out.trace.rounds
    assert 1 + sum(r.num_accepted for r in rounds) / len(rounds) >= 2.6


def test_its_files_are_small_and_say_where_they_came_from(decoder: specdec.SpeculativeDecoder) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6 << 20
    made = json.loads((FOLDER / PROVENANCE).read_text(encoding="utf-8"))
    assert made["kind"] == "eagle"
    assert made["target"] == fingerprint(decoder.target)
    assert not any("/" in str(value) for value in made["data"]["files"])
