"""A step of any size goes through graphs of fixed width: every row once, every wanted row with logits."""

from __future__ import annotations

import pytest

from specdec.export.options import Method, Options
from specdec.export.plan import plan


@pytest.mark.parametrize("rows", range(1, 45))
def test_a_plan_covers_every_row_once_and_finds_all_logits(rows: int) -> None:
    full = (Method("step_1", 1), Method("step_4", 4))
    for methods in (full, (*full, Method("prefill_16", 16, True))):
        for wanted in {1, 2, 5, rows} & set(range(1, rows + 1)):
            runs = list(plan(methods, rows, wanted))
            assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])]
            assert runs[-1].end == rows
            assert all(0 < run.end - run.start <= run.method.width for run in runs)
            assert sum(run.num_logits for run in runs) == wanted
            assert all(run.num_logits <= 1 for run in runs if run.method.one_logit)
            wide = 16 if len(methods) == 3 else 4
            assert len(runs) <= (rows - wanted) // wide + -(-wanted // 4) + 2


def test_a_prompt_goes_through_the_wide_graph_and_a_verification_through_the_narrowest() -> None:
    methods = Options(prefill_len=32, k=(0, 3, 6)).methods
    assert [m.name for m in methods] == ["step_1", "step_4", "step_7", "prefill_32"]

    def names(rows: int, wanted: int) -> list[str]:
        return [run.method.name for run in plan(methods, rows, wanted)]

    assert names(1, 1) == ["step_1"]
    assert names(3, 3) == ["step_4"]
    assert names(5, 5) == ["step_7"]
    assert names(70, 1) == ["prefill_32", "prefill_32", "step_7"]
    assert names(9, 9) == ["step_7", "step_4"]
