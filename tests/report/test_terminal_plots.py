"""Plots in a terminal: within the width, without colours if asked, without braille where there is none."""

from __future__ import annotations

import io

import pytest
from drift_documents import grid
from rich.console import Console

from specdec.report.series import plots
from specdec.report.shapes import Line, Panel, Plot, Spot
from specdec.report.terminal import HEIGHT, Canvas, panel_rows, show
from specdec.report.view import View


@pytest.fixture(scope="module")
def found():
    return plots(View(grid()))


def printed(found, width, encoding="utf-8", **options):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    show(Console(file=file, width=width, highlight=False, **options), found)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_none_is_wrapped(found, width):
    text = printed([plot for plot in found if getattr(plot, "kind", "") != "pareto"], width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for title in ("Speed-up over the plain loop", "Acceptance by position", "Tokens per round along the text"):
        assert title in text


def test_panels_stand_side_by_side_where_there_is_room(found):
    narrow, wide = printed(found[:1], 50), printed(found[:1], 160)
    assert wide.count("\n") < narrow.count("\n") / 2
    assert any(line.count("└") == 4 for line in wide.splitlines())


def test_colours_are_for_terminals_that_want_them(found, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38" not in printed(found, 80, force_terminal=True)
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[38" in printed(found, 80, force_terminal=True, color_system="truecolor")


def test_every_line_has_a_mark_of_its_own_so_that_colours_are_not_needed(found):
    legend = next(line for line in printed(found[:1], 80).splitlines() if "ngram" in line)
    assert legend.split() == ["●", "model", "■", "ngram", "◆", "eagle"]


def test_where_there_is_no_braille_plain_characters_do(found):
    text = printed(found, 80, encoding="ascii")
    assert "o model" in text
    assert text.isascii()


def plot_of(spots, **options):
    line = Line("a", 0, spots)
    return Plot("speed", "t", "k", "x", [Panel("", [line])], ["a"], **options)


def test_values_stand_where_the_axis_says():
    plot = plot_of([Spot(0, 0.0), Spot(1, 2.0)], ticks=[(0, "1"), (1, "2")])
    rows = [row.plain for row in panel_rows(plot, plot.panels[0], 40)]
    assert "●" in rows[0]
    assert rows[0].strip().startswith("2")
    assert "●" in rows[HEIGHT - 1]
    assert rows[HEIGHT - 1].strip().startswith("0")
    assert rows[0].index("●") > rows[HEIGHT - 1].index("●")
    ruler = rows[-1]
    assert abs(ruler.index("2") - rows[0].index("●")) <= 1


def test_intervals_reach_from_low_to_high():
    spots = [Spot(0, 2.0, 0.0, 4.0), Spot(1, 2.0, 1.9, 2.1)]
    plot = plot_of(spots, ticks=[(0, "1"), (1, "2")])
    rows = [row.plain[7:] for row in panel_rows(plot, plot.panels[0], 40)][:HEIGHT]
    column = next(row.index("●") for row in rows if "●" in row)
    assert all(row[column] in "│●" for row in rows)
    wide = next(row.rindex("●") for row in rows if "●" in row)
    assert rows[0][wide] == " "


def test_a_single_value_and_a_flat_line_are_drawn():
    for spots in ([Spot(0, 1.0)], [Spot(0, 1.0), Spot(1, 1.0)]):
        rows = panel_rows(plot_of(spots), plot_of(spots).panels[0], 30)
        assert sum(row.plain.count("●") for row in rows) == len(spots)


def test_a_canvas_joins_dots_of_a_character():
    canvas = Canvas(1, 1)
    canvas.dot(0, 1, "")
    canvas.dot(1, 0, "")
    assert [row.plain for row in canvas.rows()] == [chr(0x2800 + 0x01 + 0x80)]
    canvas.sign(0, 0, "●", "")
    assert [row.plain for row in canvas.rows()] == ["●"]
