"""The oracle says no: every broken pair is caught, and by as much as an independent enumeration found."""

from __future__ import annotations

import random

import pytest
import torch
from broken import CONTROLS, SOUND, Control

from specdec.oracle import TOLERANCE, EnumeratedChance, Law, OracleError, Toy, enumerate_outcomes, measure
from specdec.verifier import Verifier

PAIRS = 10


@pytest.mark.parametrize(("name", "law", "verifier"), SOUND, ids=[name for name, *_ in SOUND])
def test_the_machinery_of_the_controls_is_sound(name: str, law: Law, verifier: Verifier) -> None:
    assert max(measure(verifier, law, Toy(n, law.vocab_size)).tv for n in range(3)) <= TOLERANCE


@pytest.mark.parametrize("control", CONTROLS, ids=[control.name for control in CONTROLS])
def test_broken_pair_is_caught(control: Control) -> None:
    law = control.law
    tv = [measure(control.verifier, law, Toy(n, law.vocab_size)).tv for n in range(PAIRS)]
    low, mean, high = min(tv), sum(tv) / PAIRS, max(tv)
    print(f"{control.name}: TV {low:.4f}-{high:.4f} (mean {mean:.4f})")
    assert high > 1e-3
    assert low <= control.high, "further off than the known range"
    assert high >= control.low, "closer than the known range"
    assert control.mean / 3 <= mean <= control.mean * 3


def test_randomness_from_elsewhere_is_noticed() -> None:
    hidden = random.Random(0)

    def program(chance: EnumeratedChance) -> int:
        return int(chance.draw(torch.tensor([[0.9, 0.1]] if hidden.random() < 0.5 else [[0.1, 0.9]])))

    def often() -> None:
        for _ in range(50):
            list(enumerate_outcomes(program))

    with pytest.raises(OracleError, match="not from `chance`"):
        often()
