"""The noise that decodes: one function of (seed, position, token), with the law of an exponential race."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from specdec.chance import CounterChance, exponentials, mix, uniforms

MASK = (1 << 64) - 1
POSITIONS = 20_000
P = torch.tensor([0.45, 0.05, 0.2, 0.3]).double()
Q = torch.tensor([0.25, 0.35, 0.3, 0.1]).double()


def splitmix64(state: int, count: int) -> list[int]:
    """The published generator, one number at a time, on Python's integers."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(z ^ (z >> 31))
    return numbers


def close(observed: float, probability: float, count: int = POSITIONS) -> bool:
    """Within five standard deviations of a binomial frequency; the noise is fixed, so this never wavers."""
    return abs(observed - probability) <= 5 * math.sqrt(probability * (1 - probability) / count)


def test_reference_is_the_published_stream() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(0x9E3779B97F4A7C15) == splitmix64(0, 1)[0]


@pytest.mark.parametrize("key", [0, 1, 1234567, (1 << 63) - 1, 1 << 63, MASK, -5])
def test_uniforms_are_the_stream_of_their_key(key: int) -> None:
    expected = [((z >> 11) + 0.5) * 2.0**-53 for z in splitmix64(key & MASK, 40)]
    assert uniforms([key], 40)[0].tolist() == expected
    assert uniforms([17, key, 4], 40)[1].tolist() == expected
    assert exponentials([key], 40)[0].tolist() == pytest.approx([-math.log1p(-u) for u in expected], rel=1e-14)


def test_noise_does_not_depend_on_batch_order_or_history() -> None:
    alone = {n: CounterChance(3).noise(n, 50) for n in (0, 7, 8, 63, 64, 500, 10**6)}
    chance = CounterChance(3, "draft")
    chance.draw(torch.ones(4, 50))
    for n in (10**6, 500, 0, 64, 7, 8, 63, 500, 0):
        assert torch.equal(chance.noise(n, 50), alone[n])
    weights = torch.rand(5, 50, generator=torch.Generator().manual_seed(0))
    positions = [8, 7, 500, 8, 64]
    together = CounterChance(3).race(weights, positions, 3)
    for row in reversed(range(5)):
        assert torch.equal(CounterChance(3, "other").race(weights[row][None], [positions[row]], 3)[0], together[row])
    assert torch.equal(CounterChance(3).race(weights, positions)[:, 0], together[:, 0])
    assert len({tuple(CounterChance(seed).noise(7, 4).tolist()) for seed in (3, 4, 5)}) == 3


def test_a_vocabulary_that_is_padded_keeps_its_noise() -> None:
    assert torch.equal(CounterChance(1).noise(9, 520)[:512], CounterChance(1).noise(9, 512))


def test_streams_are_replayed_and_never_meet() -> None:
    weights = torch.ones(200, 100)
    draft, verify = CounterChance(1, "draft"), CounterChance(1, "verify")
    first = draft.draw(weights)
    assert torch.equal(first, CounterChance(1, "draft").draw(weights))
    assert float((first == verify.draw(weights)).double().mean()) < 0.1
    assert float((first == draft.draw(weights)).double().mean()) < 0.1
    rows = CounterChance(1, "draft")
    assert torch.equal(torch.cat([rows.draw(weights[i][None]) for i in range(5)]), first[:5])


def test_accept_and_draw_have_their_laws() -> None:
    chance = CounterChance(11)
    p, q = torch.tensor([0.3, 0.9, 0.0, 0.2]), torch.tensor([0.4, 0.3, 0.5, 0.0])
    accepted = chance.accept(p.expand(POSITIONS, -1), q.expand(POSITIONS, -1)).double().mean(0)
    assert close(float(accepted[0]), 0.75)
    assert accepted[1:].tolist() == [1.0, 0.0, 1.0]
    drawn = chance.draw(P.expand(POSITIONS, -1) * 3)
    for token in range(4):
        assert close(float((drawn == token).double().mean()), float(P[token]))


def test_race_winner_and_places_follow_the_closed_form() -> None:
    """P(first = a, second = b) = w_a / (1 - 0) * w_b / (1 - w_a): drawing without replacement."""
    places = CounterChance(2).race(P.expand(POSITIONS, -1), range(POSITIONS), 4)
    assert (places.sort(-1).values == torch.arange(4)).all()
    for token in range(4):
        assert close(float((places[:, 0] == token).double().mean()), float(P[token]))
    for a, b in permutations(range(4), 2):
        both = float(((places[:, 0] == a) & (places[:, 1] == b)).double().mean())
        assert close(both, float(P[a] * P[b] / (1 - P[a])))


def test_two_racers_meet_as_often_as_the_formula_says() -> None:
    """Two rows on one noise choose x together with probability 1 / sum_y max(p_y/p_x, q_y/q_x)."""
    draft, target = CounterChance(5, "draft"), CounterChance(5, "verify")
    positions = range(POSITIONS)
    x = draft.race(Q.expand(POSITIONS, -1), positions)[:, 0]
    y = target.race(P.expand(POSITIONS, -1), positions)[:, 0]
    rate = 0.0
    for token in range(4):
        joint = 1 / float(torch.maximum(P / P[token], Q / Q[token]).sum())
        assert close(float(((x == token) & (y == token)).double().mean()), joint)
        rate += joint
    assert close(float((x == y).double().mean()), rate)
    tv = float((P - Q).abs().sum()) / 2
    assert (1 - tv) / (1 + tv) <= rate <= 1 - tv
    assert rate > float((P * Q).sum()) + 0.2, "sharing the noise is what makes them meet"


def test_race_without_weight_is_absent() -> None:
    row = torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    assert CounterChance(0).race(row, [3], 4)[0].tolist()[2:] == [-1, -1]
