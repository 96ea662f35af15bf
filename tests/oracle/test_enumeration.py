"""The instrument itself: what `EnumeratedChance` enumerates has the marginals that it promises."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from specdec.oracle import EnumeratedChance, OracleError, Toy, complete, enumerate_outcomes

ROW_P, ROW_Q = torch.tensor([0.5, 0.2, 0.3]).double(), torch.tensor([0.1, 0.6, 0.3]).double()


def _law(program) -> dict:
    law: dict = defaultdict(float)
    for weight, outcome, _ in enumerate_outcomes(program):
        law[outcome] += weight
    return dict(law)


def test_accept_branches_on_each_entry_by_itself() -> None:
    p, q = torch.tensor([0.2, 0.9, 0.0, 0.3]), torch.tensor([0.4, 0.3, 0.5, 0.0])
    law = _law(lambda chance: tuple(chance.accept(p, q).tolist()))
    assert law == {(True, True, False, True): pytest.approx(0.5), (False, True, False, True): pytest.approx(0.5)}


def test_draw_rows_are_independent_and_unnormalised_weights_are_fine() -> None:
    weights = torch.stack((ROW_P * 7, ROW_Q, ROW_Q * 0))
    law = _law(lambda chance: tuple(chance.draw(weights).tolist()))
    assert law == {
        (a, b, 0): pytest.approx(float(ROW_P[a] * ROW_Q[b])) for a in range(3) for b in range(3)
    }  # a row without weight gives 0, like the real generator


def test_race_has_the_right_marginals_and_shares_its_noise() -> None:
    def program(chance):
        drafted = chance.race(ROW_Q[None], [5], 3)
        chosen = chance.race(torch.stack((ROW_P, ROW_Q, ROW_P)), [5, 5, 6])
        return tuple(drafted[0].tolist()), *chosen[:, 0].tolist()

    law = _law(program)
    assert sum(law.values()) == pytest.approx(1)
    for place, row in ((1, ROW_P), (2, ROW_Q), (3, ROW_P)):
        for token in range(3):
            assert sum(w for o, w in law.items() if o[place] == token) == pytest.approx(float(row[token]))
    assert all(drafted[0] == again for drafted, _, again, _ in law), "the same row at the same position"
    assert all(sorted(drafted) == [0, 1, 2] for drafted, *_ in law)
    for a in range(3):  # another position is independent
        for b in range(3):
            both = sum(w for (_, x, _, y), w in law.items() if (x, y) == (a, b))
            assert both == pytest.approx(float(ROW_P[a] * ROW_P[b]))
    # Same uniform: the two rows agree as often as their distribution functions overlap at it.
    assert sum(w for (_, x, y, _), w in law.items() if x == y) == pytest.approx(0.1 + 0.2 + 0.3)


def test_race_leaves_absent_places_empty() -> None:
    row = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    law = _law(lambda chance: tuple(map(tuple, chance.race(row, [1, 2], 3).tolist())))
    assert law == {((1, -1, -1), (0, 2, -1)): pytest.approx(0.5), ((1, -1, -1), (2, 0, -1)): pytest.approx(0.5)}


def test_noise_that_was_seen_conditions_what_comes_later() -> None:
    first = [(w, o, seen) for w, o, seen in enumerate_outcomes(lambda c: int(c.race(ROW_Q[None], [9])[0, 0]))]
    joint: dict = defaultdict(float)
    for weight, q_token, seen in first:
        for likely, p_token, _ in enumerate_outcomes(lambda c: int(c.race(ROW_P[None], [9])[0, 0]), seen):
            joint[q_token, p_token] += weight * likely
    together = _law(lambda c: (int(c.race(ROW_Q[None], [9])[0, 0]), int(c.race(ROW_P[None], [9])[0, 0])))
    assert dict(joint) == {key: pytest.approx(value) for key, value in together.items()}


def test_a_race_is_settled_when_its_noise_is_known_well_enough() -> None:
    def program(chance: EnumeratedChance) -> tuple[int | None, ...]:
        before = chance.settled(ROW_P, 4), chance.settled(torch.tensor([0.0, 1.0, 0.0]), 4)
        winner = int(chance.race(ROW_P[None], [4])[0, 0])
        return *before, winner, chance.settled(ROW_P * 3, 4)

    assert set(_law(program)) == {(None, 1, token, token) for token in range(3)}


@pytest.mark.parametrize("row", [[float("nan"), 1.0], [float("inf"), 1.0], [-1.0, -2.0]])
def test_weights_that_are_none_raise(row: list[float]) -> None:
    with pytest.raises(OracleError, match="finite weights"):
        list(enumerate_outcomes(lambda chance: int(chance.draw(torch.tensor([row])))))


def test_complete_continues_each_prefix_with_the_target() -> None:
    toy = Toy(0, 3)
    law = complete({(1,): 0.25, (0, 2): 0.75}, toy, 2)
    assert sum(law.values()) == pytest.approx(1)
    assert law[0, 2] == 0.75
    assert law[1, 1] == pytest.approx(0.25 * float(toy.p((1,))[1]))


def test_toys_are_reproducible_and_sparse_where_they_say_so() -> None:
    assert torch.equal(Toy(3, 4).p((1, 2)), Toy(3, 4).p((1, 2)))
    assert not torch.equal(Toy(3, 4).p((1, 2)), Toy(4, 4).p((1, 2)))
    sparse = Toy(3, 4, sparse=True)
    assert (sparse.p(()) > 0).all()
    assert int((sparse.p((1,)) == 0).sum()) == int((sparse.q((1,)) == 0).sum()) == 1
    assert sorted(Toy(3, 4, greedy=True).p((1,)).tolist()) == [0, 0, 0, 1]
