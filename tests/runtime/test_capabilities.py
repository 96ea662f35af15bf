"""What a backend lacks is data; drafters and policies that want more are refused before the text starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_artifacts
import torch
from specdec.drafters import ModelDrafter

import specdec
from specdec.errors import IncompatiblePairError
from specdec.policy import Fixed
from specdec.runtime.backend import Capabilities
from specdec.runtime.backends.eager import EagerBackend

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
model = tiny_artifacts.model


def test_what_a_backend_lacks_is_refused_before_work_starts() -> None:
    full = Capabilities(64, 128, torch.device("cpu"), torch.float32)
    assert full.lacks(trees=True, hidden=(0, 5)) is None
    assert replace(full, nodes=3).lacks(trees=True, nodes=3) is None
    assert replace(full, nodes=3).lacks(trees=True, nodes=4) == "has room for trees of 3 nodes, not 4"
    poor = replace(full, trees=False, hidden=(1,))
    assert poor.lacks(hidden=(1,)) is None
    assert poor.lacks(trees=True) == "verifies chains only"
    assert "hidden state 2 of the target (gives 1 only)" in str(poor.lacks(hidden=(1, 2)))
    assert "gives none" in str(replace(full, hidden=()).lacks(hidden=(0,)))


def replaced(backend: EagerBackend, **changes: Any) -> EagerBackend:
    made = EagerBackend.open(backend.model)
    made._capabilities = replace(made.capabilities, **changes)
    return made


class ChainsOnly(EagerBackend):
    """A third party's backend that cannot take trees."""

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, trees=False, hidden=())


def test_policies_and_drafters_meet_the_capabilities() -> None:
    made = specdec.SpeculativeDecoder(model(), drafter=ModelDrafter(model()), backend="eager")
    made.backend = ChainsOnly.open(model())
    with pytest.raises(IncompatiblePairError, match=r"policy fixed\(k=2, tree 2\).*verifies chains only"):
        made.generate(PROMPT, policy=Fixed(2, (2,)))
    reading = ModelDrafter(model())
    reading.hidden = (2,)
    with pytest.raises(IncompatiblePairError, match="hidden state 2 of the target"):
        made.generate(PROMPT, drafter=reading, policy=Fixed(2))
    assert made.generate(PROMPT, policy=Fixed(2), max_new_tokens=4).tokens  # a chain is fine
    made.backend = replaced(made.backend, nodes=5)
    assert made.generate(PROMPT, policy=Fixed(2, (2,)), max_new_tokens=4).tokens
    with pytest.raises(IncompatiblePairError, match="room for trees of 5 nodes, not 15"):
        made.generate(PROMPT, policy=Fixed(2, (3, 4)))
