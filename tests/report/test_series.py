"""What a document gives to plot."""

from __future__ import annotations

import copy

import pytest
import sweep_documents
from drift_documents import grid

from specdec.errors import InputError
from specdec.report.series import KINDS, frontier, plots
from specdec.report.shapes import Heat
from specdec.report.view import MIN_REACHED, View


@pytest.fixture(scope="module")
def view():
    return View(grid())


def only(view, kind):
    return plots(view, [kind])[0]


def test_speed_against_k_has_a_line_per_drafter_and_a_panel_per_rest(view):
    plot = only(view, "speed")
    assert [text for _, text in plot.ticks] == ["1", "4"]
    assert [panel.title for panel in plot.panels] == ["T 0 · coupled", "T 0 · ratio", "T 1 · coupled", "T 1 · ratio"]
    assert plot.names == ["model", "ngram", "eagle"]
    first = next(cell for cell in view.done if cell.setting["k"] == 4)
    line = next(line for line in plot.panels[0].lines if line.name == "model")
    spot = line.spots[1]
    assert (spot.y, spot.low, spot.high) == (first.speedup.median, first.speedup.low, first.speedup.high)
    low, high = plot.y_span
    assert low <= 1.0 <= high
    assert all(low <= s.low <= s.high <= high for s in plot.spots)


def test_trees_and_policies_stand_behind_a_gap_and_are_not_joined():
    from specdec.sweep.setting import Setting

    settings = [Setting(k=k) for k in (2, 4)] + [Setting(policy="throughput")]
    cells = [sweep_documents.cell(setting) for setting in settings]
    plot = only(View({"cells": cells}), "tokens")
    assert plot.ticks == [(0, "2"), (1, "4"), (2.5, "throughput")]
    assert [line.joined for line in plot.panels[0].lines] == [True, False]


def test_acceptance_is_of_the_deepest_draft_and_of_positions_that_were_reached(view):
    plot = only(view, "acceptance")
    line = next(line for line in plot.panels[0].lines if line.name == "ngram")
    cell = next(c for c in view.done if c.setting["drafter"] == "ngram" and c.setting["k"] == 4)
    evaluated = [n for row in cell.rows for n in row["rounds"]["evaluated"]]
    assert [s.y for s in line.spots] == cell.stats["conditional_acceptance"][: len(line.spots)]
    assert sum(n >= len(line.spots) for n in evaluated) >= MIN_REACHED
    assert plot.y_span == (0.0, 1.0)


def test_the_heat_map_has_every_temperature_and_verifier(view):
    heat = only(view, "heatmap")
    assert isinstance(heat, Heat)
    assert (heat.rows, heat.columns) == (["coupled", "ratio"], ["0", "1"])
    for _, values in heat.maps:
        assert len(values) == 4
    assert len(heat.maps) == 6


def test_the_frontier_is_what_nothing_beats():
    class Point:
        def __init__(self, index):
            self.index = index

    points = [Point(i) for i in range(4)]
    goods = {0: (-10, 2.0), 1: (-20, 3.0), 2: (-20, 2.5), 3: (-30, 3.0)}
    assert [p.index for p in frontier(points, goods)] == [0, 1]
    assert [p.index for p in frontier(points[:1], {0: (1, 1)})] == [0]
    twins = [Point(0), Point(1)]
    assert len(frontier(twins, {0: (1, 1), 1: (1, 1)})) == 2


def test_quality_is_plotted_where_it_was_measured():
    document = sweep_documents.document(8)
    for number, cell in enumerate(document["cells"]):
        cell["quality"] = {"loss": 1.5 + 0.1 * number}
        cell["memory"]["target_weights"] += number << 20
    titles = [panel.title for panel in only(View(document), "pareto").panels]
    assert titles == ["memory, MiB", "loss, nats per token"]


def test_without_times_tokens_per_round_are_plotted_and_speed_is_refused():
    document = sweep_documents.document(8)
    for cell in document["cells"]:
        cell["speedup"] = None
    view = View(document)
    assert "speed" not in [getattr(plot, "kind", "") for plot in plots(view)]
    with pytest.raises(InputError, match="that were timed"):
        plots(view, ["speed"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_single_cell_does_not_allow_is_refused_by_name(kind):
    document = sweep_documents.document(1, num_prompts=1)
    document["cells"][0]["rows"][0]["rounds"] = {name: [] for name in ("nodes", "accepted", "evaluated", "emitted")}
    if kind == "acceptance":
        assert only(View(document), kind).panels
        return
    with pytest.raises(InputError, match=f"--kind {kind} needs"):
        plots(View(document), [kind])


def test_panels_that_compare_nothing_are_left_out_and_counted():
    from specdec.sweep.setting import Setting

    settings = [Setting(drafter=d, k=k) for d in ("model", "ngram") for k in (1, 2)]
    settings += [Setting(drafter="model", k=2, temperature=t) for t in (0.5, 1.0)]
    view = View({"cells": [sweep_documents.cell(setting) for setting in settings]})
    for kind in ("tokens", "acceptance"):
        plot = only(view, kind)
        assert [panel.title for panel in plot.panels] == ["T 0"], kind
        assert plot.left_out == 2
    alone = View({"cells": [sweep_documents.cell(setting) for setting in settings[4:]]})
    assert [line.name for line in only(alone, "acceptance").panels[0].lines] == ["0.5", "1"]


def test_unknown_kinds_are_refused(view):
    with pytest.raises(InputError, match="no kind of plot"):
        plots(view, ["pie"])


def test_axes_beyond_the_panels_go_into_the_names_of_lines():
    from specdec.sweep.setting import Setting

    settings = [
        Setting(drafter=d, k=k, temperature=t, seed=s)
        for d in ("model", "ngram") for k in (1, 2) for t in (0.0, 0.5, 0.7, 1.0) for s in range(5)
    ]  # fmt: skip
    cells = [sweep_documents.cell(setting, num_prompts=1) for setting in settings]
    plot = only(View({"cells": copy.deepcopy(cells)}), "tokens")
    names = {line.name for line in plot.panels[0].lines}
    assert "model · seed 3" in names
    assert len(plot.panels) == 4
