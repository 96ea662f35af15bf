"""The gate: what falls fails, what is kept passes, and what cannot be told is an outcome of its own."""

from __future__ import annotations

import copy
import json

import pytest
from drift_documents import cell, document, failed, rates

from specdec.errors import InputError
from specdec.report.gate import FAIL, PASS, UNDECIDED, gate


def outcomes(judged):
    return [one.outcome for one in judged.cells]


def test_the_same_rounds_pass_whatever_their_number():
    reference = document(cell(rates(2), seed=1))
    judged = gate(reference, copy.deepcopy(reference), tolerance=0.0)
    assert outcomes(judged) == [PASS]
    assert judged.exit_code == 0
    json.dumps(judged.as_dict(), allow_nan=False)


def test_equal_stores_fail_no_more_often_than_the_level_and_fallen_ones_hardly_ever_pass():
    """A family of three cells, drawn anew: false alarms, and passes of a loss as large as the tolerance."""
    chances, kept, fallen = rates(16), [], []
    for seed in range(150):
        cells = [cell(chances, seed=3 * seed + k, num_tokens=64, k=k) for k in (2, 4, 6)]
        again = [cell(chances, seed=90_000 + 3 * seed + k, num_tokens=64, k=k) for k in (2, 4, 6)]
        worse = [cell(chances - 0.05, seed=50_000 + 3 * seed + k, num_tokens=64, k=k) for k in (2, 4, 6)]
        kept.append(gate(document(*cells), document(*again), tolerance=0.0).outcome)
        fallen.append(gate(document(*cells), document(*worse), tolerance=0.03).outcome)
    assert kept.count(FAIL) <= 14  # 7.5 are expected; more than 14 come once in a hundred times
    assert fallen.count(PASS) <= 3  # each cell lost 5 points, 5 % or more of its accepted tokens


def test_a_drop_of_five_points_is_caught_with_enough_prompts():
    chances = rates(96)
    found = [
        gate(document(cell(chances, seed=s)), document(cell(chances - 0.05, seed=500 + s)), tolerance=0.02).outcome
        for s in range(20)
    ]
    assert found.count(FAIL) >= 16
    assert PASS not in found


def test_enough_prompts_show_that_nothing_was_lost():
    chances = rates(256)
    judged = gate(document(cell(chances, seed=1)), document(cell(chances, seed=2)), tolerance=0.08)
    assert outcomes(judged) == [PASS]
    assert judged.cells[0].p_kept <= 0.05


def test_too_little_data_is_an_outcome_and_says_what_it_would_take():
    chances = rates(6)
    judged = gate(document(cell(chances, seed=1)), document(cell(chances, seed=2)), tolerance=0.02)
    assert outcomes(judged) == [UNDECIDED]
    assert judged.exit_code == 2
    one = judged.cells[0]
    assert one.visible is None or one.visible > 0.02
    assert one.prompts_needed > 6


def test_a_reference_that_accepts_nothing_cannot_catch_anything_and_says_so():
    """The guard that compares with a reference of one token per round would pass whatever happens."""
    reference = document(cell([0.0] * 8, seed=1))
    judged = gate(reference, copy.deepcopy(reference))
    assert outcomes(judged) == [UNDECIDED]
    assert "nothing can be lost" in judged.cells[0].reason
    plain = document(cell([0.0] * 8, seed=1, drafter="none"))
    assert outcomes(gate(plain, copy.deepcopy(plain))) == [PASS]


def test_the_tolerance_is_of_the_accepted_tokens_not_of_the_tokens_per_round():
    """Tokens per round 1.10 against 1.00 are 9 % apart; all that was accepted is lost."""
    reference = document(cell([0.1] * 24, seed=1))
    judged = gate(reference, document(cell([0.0] * 24, seed=2)), tolerance=0.5)
    assert outcomes(judged) == [FAIL]


def test_a_loss_within_the_tolerance_never_fails():
    reference = document(cell(rates(64), seed=1))
    judged = gate(reference, document(cell(rates(64) - 0.05, seed=2)), tolerance=0.3)
    assert outcomes(judged) == [PASS]
    assert judged.cells[0].change < 0


def test_lost_identity_fails_though_the_rounds_are_the_same():
    reference = document(cell(rates(8), seed=1))
    now = copy.deepcopy(reference)
    now["cells"][0]["rows"][5]["identical"] = False
    judged = gate(reference, now)
    assert judged.exit_code == 1
    assert "identity lost on p5" in judged.cells[0].reason


def test_cells_that_fail_fail_and_cells_that_lack_are_not_passed_over():
    reference = document(cell(rates(8), seed=1, k=2), cell(rates(8), seed=1, k=4))
    broken = document(failed(reference["cells"][0]["setting"]), reference["cells"][1])
    judged = gate(reference, broken)
    assert sorted(outcomes(judged)) == [FAIL, PASS]
    assert judged.exit_code == 1
    absent = gate(reference, document(reference["cells"][1]))
    assert absent.exit_code == 2
    assert any(one.reason == "was not run" for one in absent.cells)


def test_cells_that_the_reference_does_not_know_are_named_and_not_judged():
    reference = document(cell(rates(8), seed=1, k=2))
    judged = gate(reference, document(reference["cells"][0], cell(rates(8), seed=1, k=4)))
    assert judged.exit_code == 0
    assert judged.extra == ["model k=4 T=0 max 128"]


def test_other_prompts_are_no_evidence():
    reference, now = document(cell(rates(8), seed=1)), document(cell(rates(8), seed=1))
    for row in now["cells"][0]["rows"]:
        row["id"] = f"other-{row['id']}"
    judged = gate(reference, now)
    assert judged.exit_code == 2
    assert "no prompt in common" in judged.cells[0].reason


def test_prompts_that_were_not_run_leave_the_gate_undecided():
    reference = document(cell(rates(9), seed=1))
    now = copy.deepcopy(reference)
    del now["cells"][0]["rows"][7:]
    judged = gate(reference, now)
    assert judged.exit_code == 2
    assert judged.cells[0].reason == "2 of the reference's 9 prompts were not run"
    assert judged.cells[0].prompts_needed is None
    assert gate(now, reference).exit_code == 0, "more prompts than the reference has are no fault"
    worse = document(cell(rates(20) - 0.4, seed=2))
    del worse["cells"][0]["rows"][18:]
    assert gate(document(cell(rates(20), seed=1)), worse).exit_code == 1, "a loss that is shown is one"
    for content in (reference, now):
        content["cells"][0]["rows"][0]["rounds"] = {n: [] for n in ("nodes", "accepted", "evaluated", "emitted")}
    assert gate(reference, copy.deepcopy(reference)).exit_code == 0, "a text that ends before its first round was run"
    assert "2 of the reference's 9 prompts" in gate(reference, now).cells[0].reason


def test_the_gate_says_when_and_by_which_versions_cells_were_made():
    old = {**cell(rates(8), seed=1), "when": "2026-01-02T03:04:05+00:00"}
    new = {**cell(rates(8), seed=1), "when": "2026-02-03T04:05:06+00:00"}
    judged = gate(document(old), document(new, versions={"specdec": "0.2.0"}))
    assert judged.made == ("2026-01-02 03:04, specdec 0.1.0, torch 2.13.0", "2026-02-03 04:05, specdec 0.2.0")


def test_of_cells_with_one_setting_the_newest_counts_on_both_sides():
    old = {**cell(rates(16) - 0.4, seed=5, key="a"), "when": "2026-01-01T00:00:00+00:00"}
    new = {**cell(rates(16), seed=1, key="b"), "when": "2026-02-01T00:00:00+00:00"}
    for cells in ([old, new], [new, old]):
        judged = gate(document(*cells), document(new))
        assert outcomes(judged) == [PASS], "the older one is not missing"
        assert "the first document has 2 cells of model k=4" in judged.notes[0]
        assert "2026-02-01" in judged.notes[0]
        assert outcomes(gate(document(new), document(*cells))) == [PASS]
    fallen = {**old, "when": "2026-03-01T00:00:00+00:00"}
    assert outcomes(gate(document(new), document(new, fallen))) == [FAIL]
    broken = {**failed(new["setting"]), "when": "2026-03-01T00:00:00+00:00"}
    assert outcomes(gate(document(new), document(new, broken))) == [FAIL]
    assert outcomes(gate(document(new, broken), document(new))) == [PASS], "a failure is no reference"


def test_a_cell_that_failed_in_the_reference_is_not_judged():
    made = cell(rates(8), seed=1, k=2)
    reference = document(made, failed(cell(rates(2), seed=1, k=4)["setting"]))
    assert outcomes(gate(reference, document(made))) == [PASS]
    with pytest.raises(InputError, match="no finished cell"):
        gate(document(reference["cells"][1]), document(made))


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, 7])
def test_tolerances_out_of_range_are_refused(tolerance):
    made = document(cell(rates(4), seed=1))
    with pytest.raises(InputError, match="tolerance"):
        gate(made, made, tolerance=tolerance)
