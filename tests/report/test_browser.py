"""The page in a real browser: no errors, nothing beside the window or over each other, and it does what it says."""

from __future__ import annotations

import json
import re

import headless
import pytest
from many_cells import many

from specdec.report.html import render, write

PROGRAM = headless.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here: pages are not looked at in a browser")

SIZES = (1, 12, 60)
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def page():
    with headless.browser(PROGRAM) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {n: write(many(n, num_failed=2 if n > 2 else 0), folder / f"{n}.html") for n in SIZES}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("cells", SIZES)
def test_nothing_overlaps_or_sticks_out(page, files, cells, width, record_property):
    seconds = page.open(files[cells], width)
    record_property("load_seconds", seconds)
    print(f"{cells} cells at {width} px: loaded in {seconds:.2f} s, {files[cells].stat().st_size:,} bytes")
    found = page.run(headless.MEASURE)
    assert page.messages == []
    assert found["width"] <= width
    assert found["words"] > 100
    assert found["overlaps"] == []
    assert found["smallest"] >= 10  # boxes of text, in pixels
    assert page.requests == [files[cells].as_uri()]


def test_the_measure_sees_what_is_wrong(page, tmp_path):
    path = tmp_path / "wrong.html"
    path.write_text("<p style='position:absolute;top:9px'>one<p style='position:absolute;top:12px;width:3000px'>other")
    page.open(path, 390)
    found = page.run(headless.MEASURE)
    assert found["overlaps"] == [["one", "other"]]
    assert found["width"] > 390


def test_errors_would_be_seen(page, tmp_path):
    path = tmp_path / "error.html"
    path.write_text("<script>console.error('heard'); nothing.at.all</script>")
    page.open(path, 390)
    assert any("heard" in message for message in page.messages)
    assert any("nothing" in message for message in page.messages)


def _luminance(page) -> float:
    colour = page.run("getComputedStyle(document.body).backgroundColor")
    return sum(float(c) for c in re.findall(r"[\d.]+", colour)[:3]) / 3


def test_light_and_dark(page, files):
    light, dark = [], []
    for system in (False, True):
        page.open(files[12], 1280, dark=system)
        (dark if system else light).append(_luminance(page))
        page.run("document.getElementById('theme').click()")
        (light if system else dark).append(_luminance(page))
        page.open(files[12], 1280, dark=not system, query=f"?theme={'dark' if system else 'light'}")
        (dark if system else light).append(_luminance(page))
    assert min(light) > 240
    assert max(dark) < 40


# Contrast of WCAG 2.1: relative luminances of every text and of what is behind it.
CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return Array.from(canvas.getImageData(0, 0, 1, 1).data);
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let up = node; up; up = up.parentElement) {
      const found = rgba(getComputedStyle(up).backgroundColor);
      if (found[3] > 200) return found;
    }
    return [255, 255, 255, 255];
  };
  const worst = {};
  const texts = "p, dt, dd, h1, h2, th, td, li, a, label, figcaption, text, b, .piece";
  for (const node of document.querySelectorAll(texts)) {
    if (!Array.from(node.childNodes).some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(node);
    const colour = rgba(node.namespaceURI.includes("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const name = node.tagName + "." + (node.getAttribute("class") ?? "");
    worst[name] = Math.min(worst[name] ?? 99, ratio);
  }
  return worst;
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_what_is_behind_them(page, files, dark):
    page.open(files[12], 1280, dark=dark)
    weak = {name: round(ratio, 2) for name, ratio in page.run(CONTRAST).items() if ratio < 4.5}
    assert weak == {}


def _column(page, number: int) -> list[str]:
    rows = "document.querySelectorAll('#cells tbody tr:not([hidden])')"
    return page.run(f"Array.from({rows}, r => r.cells[{number}]?.textContent ?? '')")


def test_the_table_sorts_and_filters(page, files):
    page.open(files[12], 1280)
    heads = page.run("Array.from(document.querySelectorAll('#cells thead th'), h => h.textContent)")
    at = heads.index("per round")
    click = f"document.querySelectorAll('#cells thead th')[{at}].querySelector('button').click()"
    page.run(click)
    falling = [float(v) for v in _column(page, at)[:10]]
    assert falling == sorted(falling, reverse=True)
    page.run(click)
    rising = [float(v) for v in _column(page, at)[:10]]
    assert rising == sorted(rising)
    assert page.run(f"document.querySelectorAll('#cells thead th')[{at}].ariaSort") == "ascending"
    assert all(
        "failed" in row
        for row in page.run("[...document.querySelectorAll('#cells tbody tr')].slice(-2).map(r => r.textContent)")
    )
    page.run(
        "(s => { s.value = 'ngram'; s.dispatchEvent(new Event('change')) })(document.querySelector('[data-filter=f0]'))"
    )
    assert set(_column(page, heads.index("drafter"))) == {"ngram"}
    assert page.run("document.getElementById('shown').textContent") == "4 of 12"


def test_a_ticked_setting_is_drawn_in_colour(page, files):
    page.open(files[12], 1280)
    shown = "document.querySelectorAll('#acceptance .series.on').length"
    before = page.run(shown)
    page.run("document.querySelector('[data-choose]:not(:checked)').click()")
    assert page.run(shown) == before + 2  # conditional and joint
    page.run("document.querySelector('[data-choose]:checked').click()")
    assert page.run(shown) == before


def test_marks_and_tokens_say_what_they_are(page, files):
    page.open(files[12], 1280)
    place = """
    (async node => { node.scrollIntoView({ block: "center" });
                     for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
                     const b = node.getBoundingClientRect();
                     return [b.left + b.width / 2, b.top + b.height / 2] })"""
    page.point(*page.run(f"{place}(document.querySelector('#speed .hit'))"))
    assert "tokens per round" in page.run("document.getElementById('tip').textContent")
    assert page.run("document.getElementById('tip').hidden") is False
    page.point(*page.run(f"{place}(document.querySelectorAll('.told .t')[4])"))
    said = page.run("document.getElementById('reading').textContent")
    assert re.search(r"by model\s*round 2\s*position 5\s*p 0\.7", said.replace("\u00a0", " ")), said
    page.run("document.querySelector('.told').focus()")
    page.press("ArrowRight")
    assert "round 2" in page.run("document.getElementById('reading').textContent")
    assert "position 6" in page.run("document.getElementById('reading').textContent")


def test_colours_of_the_text_can_stand_for_doubt(page, files):
    page.open(files[12], 1280)
    look = "Array.from(document.querySelectorAll('.told .t'), t => getComputedStyle(t).backgroundColor)"
    by_origin = page.run(look)
    choose = (
        "(name => { const s = document.getElementById('tone'); s.value = name; s.dispatchEvent(new Event('change')) })"
    )
    page.run(f"{choose}('p')")
    doubt = page.run("Array.from(document.querySelectorAll('.told .t'), t => +t.style.getPropertyValue('--doubt'))")
    tokens = many(12)["cells"][0]["story"][0]["tokens"]
    assert doubt == pytest.approx([1 - token["p"] for token in tokens])
    assert page.run(look) != by_origin
    page.run(f"{choose}('')")
    assert page.run(look) == by_origin
    assert page.messages == []


def test_the_data_is_saved_as_it_was(page, files):
    page.open(files[12], 1280)
    keep = "(make => { URL.createObjectURL = (blob) => { window.saved = blob; return make.call(URL, blob) } })"
    page.run(f"{keep}(URL.createObjectURL)")
    page.run("document.getElementById('save').click()")
    assert json.loads(page.run("window.saved.text()")) == many(12, num_failed=2)


def test_no_text_runs_as_a_script(page, tmp_path):
    told = many(2)
    evil = '<img src=x onerror="window.hurt=1"></script><script>window.hurt=2</script>'
    told["environment"]["device"] = evil
    told["cells"][0]["story"][0]["tokens"][0].update(text=evil, refused=[{"text": evil, "p": 0.1, "q": 0.2}])
    page.open(write(told, tmp_path / "evil.html", title=evil), 1280)
    page.run("document.querySelector('.told').focus()")
    assert page.run("window.hurt === undefined") is True
    assert page.messages == []
    assert page.run("document.querySelectorAll('img').length") == 0
    # Even a text that got out of its quotes would be refused by the page's own policy.
    broken = render(told).replace("</main>", f"{evil}</main>")
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    page.open(tmp_path / "broken.html", 1280)
    assert page.run("window.hurt === undefined") is True
    assert any("Content Security Policy" in message for message in page.messages)


def test_without_scripts_it_is_still_a_report(page, files):
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(files[12], 1280)
        found = page.run(headless.MEASURE)
        assert found["overlaps"] == []
        assert page.run("document.querySelectorAll('svg.chart').length") >= 6
        assert page.run("getComputedStyle(document.getElementById('save')).display") is not None
        assert page.run("document.getElementById('save').offsetParent === null") is True
    finally:
        page.call("Emulation.setScriptExecutionDisabled", value=False)
