"""`specdec.report.diff`: pairs by setting, verdicts, alarms, and what is never compared silently."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import sweep_documents
from drift_documents import cell, document, failed, rates

from specdec.errors import InputError
from specdec.report.changes import BEYOND, REAL, SAME, TOO_FEW, WITHIN
from specdec.report.diff import diff


def acceptance(found):
    return [pair.acceptance.verdict for pair in found.pairs]


def test_a_document_does_not_differ_from_itself():
    made = sweep_documents.document(8, num_failed=1)
    found = diff(made, copy.deepcopy(made))
    assert acceptance_of_done(found) == [SAME] * 7
    assert not found.alarms
    assert not found.missing
    assert not found.new
    assert not found.environment
    assert "fails in both" in found.pairs[-1].notes[0]
    json.dumps(found.as_dict(), allow_nan=False)


def acceptance_of_done(found):
    return [pair.acceptance.verdict for pair in found.pairs if pair.acceptance]


def test_where_nothing_recorded_differs_one_other_round_is_real():
    before = document(cell(rates(8), seed=1))
    after = copy.deepcopy(before)
    row = after["cells"][0]["rows"][3]["rounds"]
    row["accepted"][0] = 0 if row["accepted"][0] else 1
    assert acceptance(diff(before, after)) == [REAL]
    after["environment"]["versions"]["torch"] = "2.14.0"
    found = diff(before, after)
    assert acceptance(found) == [WITHIN]  # one round of one prompt, on another version: noise
    assert found.environment == {"versions.torch": ("2.13.0", "2.14.0")}


@pytest.mark.parametrize(
    "fields", [{"policy": "throughput", "k": None}, {"drafter": "hybrid"}, {"policy": "someone-elses"}]
)
def test_rounds_that_a_clock_may_steer_are_never_called_real(fields):
    before = document(cell(rates(8), seed=1, **fields))
    after = document(cell(rates(8), seed=2, **fields))
    assert acceptance(diff(before, after)) == [WITHIN]


def test_other_weights_under_the_same_setting_are_said_and_not_called_real():
    before, after = document(cell(rates(8), seed=1)), document(cell(rates(8), seed=2, key="other"))
    found = diff(before, after)
    assert acceptance(found) == [WITHIN]
    assert "other models" in found.pairs[0].notes[0]


def test_what_the_program_chose_differently_is_said_and_not_called_real():
    before, after = document(cell(rates(8), seed=1)), document(cell(rates(8), seed=2))
    before["cells"][0]["details"], after["cells"][0]["details"] = {"backend": "native"}, {"backend": "eager"}
    found = diff(before, after)
    assert acceptance(found) == [WITHIN]
    assert found.pairs[0].notes == ("backend: native → eager",)


def test_runs_that_differ_by_chance_alone_raise_no_alarm_and_a_drop_of_five_points_is_called():
    chances = rates(64)
    same, fallen = [], []
    for seed in range(20):
        before = document(cell(chances, seed=seed), torch="a")
        same += acceptance(diff(before, document(cell(chances, seed=1000 + seed), torch="b")))
        fallen += acceptance(diff(before, document(cell(chances - 0.05, seed=2000 + seed), torch="b")))
    assert same.count(BEYOND) <= 3  # a level of 0.05: more than 3 of 20 come once in 60 times
    assert fallen.count(BEYOND) >= 19


def test_the_change_is_told_with_its_sign():
    found = diff(document(cell(rates(32), seed=1), a=1), document(cell(rates(32) - 0.2, seed=2), a=2))
    change = found.pairs[0].acceptance
    assert change.low < change.change < change.high < 0
    assert change.after < change.before
    assert change.adjusted <= 0.05


def test_three_prompts_are_too_few_to_tell():
    found = diff(document(cell(rates(3), seed=1), a=1), document(cell(rates(3) - 0.3, seed=2), a=2))
    assert acceptance(found) == [TOO_FEW]
    assert found.pairs[0].acceptance.visible is None


def test_a_lost_identity_is_an_alarm_and_a_won_one_is_none():
    before = document(cell(rates(8), seed=1))
    after = copy.deepcopy(before)
    after["cells"][0]["rows"][2]["identical"] = False
    after["cells"][0]["divergences"] = [{"id": "p2", "verdict": "BUG"}]
    found = diff(before, after)
    assert found.alarms[0][1].startswith("identity lost on p2: 8 → 7")
    assert "BUG" in found.alarms[1][1]
    back = diff(after, before)
    assert not back.alarms
    assert back.pairs[0].identity.won == ("p2",)


def test_a_bug_that_was_known_is_no_new_alarm():
    before = document(cell(rates(8), seed=1))
    before["cells"][0]["rows"][2]["identical"] = False
    before["cells"][0]["divergences"] = [{"id": "p2", "verdict": "BUG"}]
    assert not diff(before, copy.deepcopy(before)).alarms


def test_rules_that_promise_no_identity_lose_none():
    before = document(cell(rates(8), seed=1, verifier="ratio", temperature=1.0))
    before["cells"][0]["expects_identity"] = False
    after = copy.deepcopy(before)
    after["cells"][0]["rows"][0]["identical"] = False
    assert not diff(before, after).alarms


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        ({"expects_identity": False}, "no longer have to be"),
        ({"stats": {"lossless": False, "drafter_error": None}}, "lossless"),
        ({"stats": {"lossless": True, "drafter_error": "it broke"}}, "it broke"),
    ],
)
def test_what_else_got_worse_is_an_alarm(change, alarm):
    before = document(cell(rates(8), seed=1))
    after = document({**before["cells"][0], **change})
    assert alarm in diff(before, after).alarms[0][1]
    assert not diff(after, before).alarms


def test_a_cell_that_fails_now_is_an_alarm():
    before = document(cell(rates(8), seed=1))
    after = document(failed(before["cells"][0]["setting"]))
    assert "the caches do not fit" in diff(before, after).alarms[0][1]
    assert not diff(after, before).alarms


def test_settings_that_differ_are_not_compared():
    found = diff(document(cell(rates(8), seed=1, k=4)), document(cell(rates(8), seed=1, k=5)))
    assert not found.pairs
    assert len(found.missing) == len(found.new) == 1


def test_ignored_fields_are_said_and_must_leave_cells_apart():
    before, after = document(cell(rates(8), seed=1, k=4)), document(cell(rates(8), seed=1, k=5))
    found = diff(before, after, ignored=["k"])
    assert found.pairs[0].notes == ("k: 4 → 5",)
    assert acceptance(found) != [REAL]
    both = document(cell(rates(8), seed=1, k=4), cell(rates(8), seed=1, k=5))
    with pytest.raises(InputError, match="alike"):
        diff(both, after, ignored=["k"])
    with pytest.raises(InputError, match="--ignore colour"):
        diff(before, after, ignored=["colour"])


def test_of_cells_with_one_setting_the_newest_is_compared_and_that_is_said():
    old = {**cell(rates(8), seed=2, key="old"), "when": "2026-01-01T00:00:00+00:00"}
    new = {**cell(rates(8), seed=1), "when": "2026-02-01T00:00:00+00:00"}
    found = diff(document(new, old), document(new))
    assert acceptance(found) == [SAME]
    assert len(found.notes) == 1
    assert "the newest counts, of 2026-02-01 00:00" in found.notes[0]
    assert not found.missing
    assert not diff(document(new), document(new)).notes


def test_prompts_are_paired_by_what_they_are():
    before, after = document(cell(rates(9), seed=1)), document(cell(rates(8), seed=1))
    after["cells"][0]["rows"][0]["num_prompt_tokens"] = 99  # another text under an old name
    pair = diff(before, after).pairs[0]
    assert pair.num_prompts == 7
    assert "prompts 9 and 8, 7 in common" in pair.notes
    after["cells"][0]["rows"] = [{**row, "id": f"x{row['id']}"} for row in after["cells"][0]["rows"]]
    nothing = diff(before, after).pairs[0]
    assert nothing.acceptance is None
    assert "prompts 9 and 8, 0 in common" in nothing.notes


def test_rows_without_rounds_are_refused():
    before = document(cell(rates(4), seed=1))
    after = copy.deepcopy(before)
    del after["cells"][0]["rows"][0]["rounds"]
    with pytest.raises(InputError, match="does not list its rounds"):
        diff(before, after)


def test_speed_is_judged_by_prompt_and_small_changes_are_not_called():
    chances = rates(16)
    before = document(cell(chances, seed=1, speed=1.5))
    faster, hardly = document(cell(chances, seed=4, speed=2.0)), document(cell(chances, seed=1, speed=1.5 * 1.03))
    speed = diff(before, faster).pairs[0].speed
    assert speed.verdict == BEYOND
    assert 1.2 < speed.low < speed.ratio < speed.high < 1.5
    assert speed.ratio == pytest.approx(2.0 / 1.5, rel=0.05)
    small = diff(before, hardly).pairs[0].speed
    assert small.adjusted <= 0.05  # every prompt moved alike: significant
    assert small.verdict == WITHIN  # and too small to be more than another hour of the same machine


def test_where_a_cell_ran_counts_not_where_the_last_one_did():
    before = document(cell(rates(8), seed=1))
    after = document(cell(rates(8), seed=2))
    after["environments"] = {"x": {**after["environment"], "threads": 2}}
    after["cells"][0]["environment"] = "x"
    assert acceptance(diff(before, after)) == [WITHIN]
    after["environments"]["x"]["threads"] = 1
    assert acceptance(diff(before, after)) == [REAL]


def test_labels_of_settings_from_other_versions_are_their_json():
    from specdec.report.pairs import label

    assert label({"k": 4}) == "model k=4 T=0"
    assert json.loads(label({"new_field": 1})) == {"new_field": 1}


def test_means_of_speedups_are_geometric():
    before, after = document(cell([0.5] * 4, seed=1)), document(cell([0.5] * 4, seed=1))
    for row, value in zip(after["cells"][0]["rows"], [1.0, 2.0, 4.0, 8.0], strict=True):
        row["speedup"] = value
    assert diff(before, after).pairs[0].speed.after == pytest.approx(np.prod([1, 2, 4, 8]) ** 0.25)


def test_cells_that_were_not_timed_have_no_speed_and_do_not_spoil_others():
    first, second = cell(rates(8), seed=1, k=2), cell(rates(8), seed=1, k=4)
    for row in first["rows"]:
        row["speedup"] = None
    made = document(first, second)
    assert [pair.speed is None for pair in diff(made, copy.deepcopy(made)).pairs] == [True, False]
