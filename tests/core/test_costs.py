"""Costs between and beyond the measured widths."""

from __future__ import annotations

import pytest

from specdec.costs import cost_at


def test_between_measured_widths_costs_lie_on_a_line() -> None:
    known = {1: 1.0, 5: 3.0, 9: 3.0}
    assert [cost_at(known, width) for width in (1, 3, 5, 7, 9)] == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0])


def test_beyond_the_widest_costs_go_on_along_the_line_from_the_narrowest() -> None:
    assert cost_at({1: 1.0, 5: 3.0}, 9) == pytest.approx(5.0)
    assert cost_at({1: 2.0, 5: 1.0}, 9) == pytest.approx(1.0)  # noise: more rows are never cheaper


def test_below_the_narrowest_and_with_one_width_costs_are_constant() -> None:
    assert [cost_at({4: 2.0}, width) for width in (1, 4, 8)] == [2.0, 2.0, 2.0]
    assert cost_at({4: 2.0, 8: 3.0}, 1) == 2.0
