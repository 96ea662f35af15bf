"""Plots as SVG and PNG."""

from __future__ import annotations

import builtins
import copy
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
import sweep_documents
from drift_documents import grid

from specdec.errors import InputError
from specdec.report import look, plots


@pytest.fixture(scope="module")
def document():
    return copy.deepcopy(grid())


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'specdec[plots]'")


@pytest.mark.usefixtures("matplotlib")
def test_an_svg_is_one_picture_for_both_themes_and_the_same_bytes_every_time(document, tmp_path):
    first, again = (plots.save(document, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == again
    text = first.decode()
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text
    # Whatever is drawn in a colour that follows the theme is named in the rules.
    rules = set(re.findall(r'\[style\*="(?:fill|stroke): (#[0-9a-f]{6})"\]', text))
    drawn = set(re.findall(r'style="[^"]*(?:fill|stroke): (#[0-9a-f]{6})', text))
    assert set(look.LIGHT[:3]) <= drawn & rules
    assert {look.LIGHT_SLOTS[i] for i in range(3)} <= drawn & rules
    assert not re.search(r"(href|src)=[\"']?http|url\(http", text)


@pytest.mark.usefixtures("matplotlib")
def test_fixed_themes_do_not_follow_the_reader(document, tmp_path):
    dark = plots.save(document, tmp_path / "d.svg", ["speed"], theme="dark").read_text(encoding="utf-8")
    assert "prefers-color-scheme" not in dark
    assert look.DARK[0] in dark
    assert look.LIGHT[0] not in dark


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("kind", ["speed", "tokens", "acceptance", "text", "pareto", "heatmap"])
def test_every_kind_is_drawn(document, tmp_path, kind):
    for number, cell in enumerate(document["cells"]):
        cell["memory"]["kv"] = 1_300_000 + number * 40_000
    path = plots.save(document, tmp_path / "p.png", [kind])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 5000


@pytest.mark.usefixtures("matplotlib")
def test_nothing_that_is_written_leaves_the_picture(document):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from specdec.report.series import plots as made
    from specdec.report.view import View

    figure = plots.draw(plots.most_telling(made(View(document))), look.LOOKS["light"], overview=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, whole = canvas.get_renderer(), figure.bbox
    written = [text for axes in figure.axes for text in (axes.title, *axes.texts) if text.get_text().strip()]
    boxes = [text.get_window_extent(renderer) for text in written]
    assert len(boxes) > 8
    for box in boxes:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1 + 1
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1 + 1


def test_names_at_line_ends_are_moved_apart_and_keep_their_order():
    moved = plots._spread([1.0, 1.01, 3.0, 0.99], 0.2)
    order = sorted(range(4), key=lambda i: moved[i])
    assert order == [3, 0, 1, 2]
    assert all(moved[b] - moved[a] >= 0.2 - 1e-9 for a, b in pairwise(order))


def test_squares_have_letters_that_can_be_read():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(21):
        fill, ink = (luminance(colour) for colour in look.ramp(step / 20))
        bright, deep = max(fill, ink), min(fill, ink)
        assert (bright + 0.05) / (deep + 0.05) >= 4.0, step


@pytest.mark.parametrize(("name", "message"), [("a.gif", "svg or .png"), ("none/a.svg", "folder that is there")])
def test_other_files_are_refused_before_the_work(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        plots.check(tmp_path / name)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **kw):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **kw)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"pip install 'specdec\[plots\]'"):
        plots.check(tmp_path / "a.svg")


@pytest.mark.usefixtures("matplotlib")
def test_a_document_without_drafts_has_nothing_to_plot(document, tmp_path):
    failed = {**document, "cells": [sweep_documents.cell(sweep_documents.settings(1)[0], failed=True)]}
    with pytest.raises(InputError, match="nothing to plot"):
        plots.save(failed, tmp_path / "a.svg")
    with pytest.raises(InputError, match="--theme"):
        plots.save(document, tmp_path / "a.svg", theme="sepia")
