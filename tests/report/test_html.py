"""The page of a document: its parts, its escaping, its independence, and what it says when something is missing."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from many_cells import many
from sweep_documents import document

from specdec.errors import InputError
from specdec.report.html import render, write
from specdec.report.markup import el, embedded, escape
from specdec.report.view import View

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<!--"


class Tree(HTMLParser):
    """What a parser makes of a page: tags with attributes, and the text of each kind of element."""

    VOID = frozenset({"meta", "br", "hr", "input", "link"})

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str) -> str:
        return "".join(self.texts.get(tag, []))

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.tags if a.get("id")]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def of(*arguments, **options) -> Tree:
    return Tree(render(document(*arguments, **options)))


def data(tree: Tree, page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    return json.loads(found)


@pytest.fixture(scope="module")
def twelve() -> dict:
    return document(12, num_failed=2)


def test_a_page_has_all_its_parts(twelve):
    tree = Tree(render(twelve))
    assert not tree.wrong
    assert not tree.open
    sections = ["summary", "settings", "acceptance", "along", "speed", "time", "prompts", "text", "notes"]
    assert [i for i in tree.ids() if i in sections] == sections
    assert tree.count("h1") == 1
    assert tree.count("h2") == len(sections) - 1
    assert tree.count("tr") == 1 + 12
    assert len(tree.ids()) == len(set(tree.ids()))
    labelled = {a["aria-labelledby"] for tag, a in tree.tags if tag == "section" and "aria-labelledby" in a}
    assert labelled <= set(tree.ids())
    assert all(a.get("aria-label") for tag, a in tree.tags if a.get("role") in ("img", "region", "application"))


def test_the_verdict_is_that_of_the_best_setting(twelve):
    best = max((c for c in twelve["cells"] if c["status"] == "done"), key=lambda c: c["speedup"]["median"])
    tree = Tree(render(twelve))
    assert f"{best['speedup']['median']:.2f}×" in tree.text("h1")
    assert "pays" in tree.text("h1")
    assert f"{best['identical']} of {best['prompts']} texts are those of plain decoding" in tree.text("main")
    assert "a made-up processor" in tree.text("main")
    assert "torch 2.13.0" in tree.text("main")


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [(1.2, 1.5, 1.7, "pays: 1.50×"), (0.7, 0.8, 0.9, "does not pay here: 0.80×"), (0.9, 1.05, 1.2, "No clear gain")],
)
def test_the_verdict_goes_by_the_interval(low, median, high, said):
    told = document(1)
    told["cells"][0]["speedup"].update(low=low, median=median, high=high)
    assert said in Tree(render(told)).text("h1")


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [
        (1.4, 1.5, 1.6, "Speculation pays: 1.50×"),
        (1.02, 1.2, 1.4, "No clear gain over plain decoding: 1.20×"),  # alone it would pay
        (0.7, 0.8, 0.9, "Speculation does not pay here: at best 0.80×"),
    ],
)
def test_the_best_of_many_is_not_judged_by_its_own_interval(low, median, high, said):
    told = copy.deepcopy(document(12))
    for cell in told["cells"]:
        cell["speedup"].update(low=0.5, median=0.6, high=0.7)
    told["cells"][3]["speedup"].update(low=low, median=median, high=high)
    tree = Tree(render(told))
    assert said in tree.text("h1")
    assert ("the best of 12 settings, chosen by the same data" in tree.text("h1")) == (median > 1)
    assert f"95 % interval {low:.2f}–{high:.2f}, " in tree.text("main")
    assert "for the best of 12" in tree.text("main")


def test_one_setting_that_may_gain_is_no_proof_that_none_does():
    told = copy.deepcopy(document(2))
    told["cells"][0]["speedup"].update(low=0.7, median=0.8, high=0.9)
    told["cells"][1]["speedup"].update(low=0.5, median=0.7, high=1.1)
    assert "No clear gain over plain decoding: 0.80×" in Tree(render(told)).text("h1")


def test_a_lossy_rule_and_a_bug_are_said():
    told = document(1)
    told["cells"][0]["stats"]["lossless"] = False
    assert "LOSSY" in Tree(render(told)).text("main")
    told = document(1)
    cell = told["cells"][0]
    cell["identical"], cell["divergences"] = 1, [{"id": "prompt-0", "verdict": "BUG"}]
    shown = Tree(render(told)).text("main")
    assert "this is a bug" in shown
    assert "LOSSY" not in shown


def test_a_lossy_setting_is_not_the_best_one_while_there_is_another():
    told = document(2)
    told["cells"][0]["speedup"]["median"] = 9.0
    told["cells"][0]["stats"]["lossless"] = False
    assert View(told).best.index == 1


def test_nothing_is_loaded_and_only_our_script_may_run(twelve):
    page = render(twelve)
    tree = Tree(page)
    loading = {"img", "link", "iframe", "object", "embed", "video", "audio", "base", "form"}
    assert not loading & {tag for tag, _ in tree.tags}
    assert not any(name in ("src", "srcset", "action", "ping") for _, a in tree.tags for name in a)
    assert not any(name.startswith("on") for _, a in tree.tags for name in a)
    assert all(a["href"].startswith("#") for _, a in tree.tags if a.get("href"))
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"https?:|url\(|@import", outside)
    policy = next(a["content"] for t, a in tree.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1
    assert f"'sha256-{digest}'" in policy
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", scripts[0])


def poisoned(content):
    """The document with every free text replaced."""
    if isinstance(content, dict):
        kept = ("status", "verdict", "prefill")
        return {key: value if key in kept else poisoned(value) for key, value in content.items()}
    if isinstance(content, list):
        return [poisoned(value) for value in content]
    return EVIL if isinstance(content, str) else content


def test_no_text_of_a_document_becomes_markup():
    told = poisoned(document(6, num_failed=1))
    told["cells"][5]["error"] = {"type": EVIL, "message": EVIL}
    page = render(told, title=EVIL)
    tree, honest = Tree(page), of(6, num_failed=1)
    assert not tree.wrong
    assert {tag for tag, _ in tree.tags} <= {tag for tag, _ in honest.tags}
    assert tree.count("script") == 2
    assert not any(name.startswith("on") for _, a in tree.tags for name in a)
    assert data(tree, page) == told
    assert EVIL in tree.text("b")  # and is shown as what it is


def test_an_unescaped_text_would_be_noticed():
    page = render(document(1)).replace("</main>", f"{EVIL}</main>")
    assert Tree(page).count("script") > 2


def test_data_round_trips_whatever_it_holds(twelve):
    page = render(twelve)
    assert data(Tree(page), page) == twelve
    odd = copy.deepcopy(twelve)
    odd["cells"][0]["story"][0]["tokens"][0]["text"] = "\u2028\ud800\x00<!--<script>é漢\U0001f642"
    odd["cells"][1]["efficiency"] = float("nan")
    page = render(odd)
    page.encode("utf-8")
    back = data(Tree(page), page)
    assert back["cells"][0]["story"] == odd["cells"][0]["story"]
    assert back["cells"][1]["efficiency"] is None


def test_markup_escapes_by_construction():
    assert el("td", "a<b", data_x='"') == '<td data-x="&quot;">a&lt;b</td>'
    assert escape("a\x00\x1b") == "a␀␛"
    assert "<" not in embedded("</script>")
    assert json.loads(embedded("</script>&")) == "</script>&"


def test_failed_cells_say_why(twelve):
    tree = Tree(render(twelve))
    assert tree.text("td").count("MemoryBudgetError: the caches of a text do not fit") == 2
    assert "2 more failed" in tree.text("dd")


def test_a_document_of_failures_alone_is_a_page():
    tree = of(2, num_failed=2)
    assert tree.text("h1") == "No setting finished."
    assert "the caches of a text do not fit" in tree.text("main")
    assert not tree.count("figure")


@pytest.mark.parametrize("cells", [[], None, "none", {}])
def test_a_document_without_cells_is_refused(cells):
    with pytest.raises(InputError, match="at least one cell"):
        render({"schema": 1, "environment": {}, "cells": cells})


def test_cells_that_are_no_tables_are_refused():
    with pytest.raises(InputError, match="damaged"):
        render({"cells": [1]})


def test_missing_quality_is_said_and_not_invented(twelve):
    told = copy.deepcopy(twelve)
    for i, cell in enumerate(told["cells"]):
        cell["memory"] = {"target_weights": 50_000_000 + 1_000_000 * i}
    shown = Tree(render(told))
    assert "Quality was not measured" in shown.text("section")
    figures = shown.count("figure")
    for i, cell in enumerate(told["cells"]):
        cell["quality"] = {"loss": 2.0 - 0.01 * i}
    measured = Tree(render(told))
    assert "Quality was not measured" not in measured.text("section")
    assert "nats per token" in measured.text("svg")
    assert measured.count("figure") == figures + 2


def test_dominated_settings_are_pale(twelve):
    told = copy.deepcopy(twelve)
    told["cells"] = [c for c in told["cells"] if c["status"] == "done"][:3]
    for cell, memory, speed in zip(told["cells"], (10, 20, 30), (300.0, 200.0, 400.0), strict=True):
        cell["memory"] = {"target_weights": memory << 20}
        cell["speculative"]["tokens_per_second"] = {"median": speed, "low": speed, "high": speed}
    page = render(told)
    pareto = page[page.index('id="pareto"') : page.index('id="time"')]
    assert re.findall(r'class="series c\d on( pale)?" data-cell="(\d)"', pareto) == [
        (" pale", "1"),
        ("", "0"),
        ("", "2"),
    ]


@pytest.mark.parametrize(
    "missing",
    ["rows", "memory", "quality", "story", "stats", "seconds", "plain", "timing", "when", "efficiency", "slices"],
)
def test_a_missing_field_leaves_out_what_needs_it(missing):
    told = document(3)
    for cell in told["cells"]:
        del cell[missing]
    tree = Tree(render(told))
    assert not tree.wrong
    needs = {"rows": {"along", "prompts"}, "stats": {"acceptance", "time"}, "seconds": {"time"}, "story": {"text"}}
    gone = needs.get(missing, set())
    assert not gone & set(tree.ids())
    assert {"summary", "settings", "notes", "speed"} <= set(tree.ids())


def test_a_setting_and_nothing_else_is_a_page():
    tree = Tree(render({"cells": [{"setting": {"drafter": "model", "k": 4}, "status": "done"}]}))
    assert not tree.wrong
    assert "model · k 4" in tree.text("table").replace("\N{NO-BREAK SPACE}", " ")


def test_without_times_rounds_are_what_counts():
    told = document(4)
    for cell in told["cells"]:
        cell["timing"] = {"measured": False}
    tree = Tree(render(told))
    assert "tokens per round" in tree.text("h1")
    assert "Speed was not measured" in tree.text("p")
    assert "time" not in tree.ids()
    assert "Length of rounds against k" in tree.text("h2")
    assert "tokens per second" not in tree.text("svg")
    assert "Nothing was timed" in tree.text("li")


def test_speed_against_k_has_every_setting_once():
    page = render(many(24))
    section = page[page.index('id="speed"') : page.index('id="time"')]
    points = re.findall(r'<g data-cell="(\d+)">', section)
    assert sorted(map(int, points)) == list(range(24))
    assert section.count("<figure>") == 2  # temperatures


def test_the_text_is_whole_and_coloured_by_origin():
    told = document(1)
    tokens = [
        {"text": "ab", "origin": "model", "round": 0, "p": 0.5, "q": 0.25, "margin": 0.1},
        {"text": "", "origin": "target", "round": 0, "p": 0.5, "q": None, "margin": 0.1},
        {
            "text": "\n é",
            "origin": "target",
            "round": 1,
            "p": 1.0,
            "q": None,
            "margin": 1.0,
            "refused": [{"text": "x"}],
        },
    ]
    told["cells"][0]["story"] = [{"prompt": "p:", "tokens": tokens}]
    page = render(told)
    shown = page[page.index('class="told"') :]
    shown = shown[: shown.index("</div>")]
    assert re.sub(r"<[^>]*>", "", shown.split(">", 1)[1]) == "p:ab\n é"
    assert re.findall(r'<b class="(t [^"]*)"', shown) == ["t drafted o0", "t own empty", "t corrected nl"]
    assert shown.count('class="round"') == 2


def test_of_a_long_prompt_the_end_is_shown():
    told = document(1)
    told["cells"][0]["story"][0]["prompt"] = "".join(f"line {i}\n" for i in range(40))
    shown = Tree(render(told)).text("span")
    assert "… 32 more lines of prompt" in shown
    assert "line 39" in shown
    assert "line 5\n" not in shown


def test_colours_are_those_of_drafters_and_marks_differ():
    view = View(document(12))
    assert [view.colours[c.colour] for c in view.cells] == [c.setting["drafter"] for c in view.cells]
    assert len({c.colour for c in view.chosen}) == len(view.chosen) == 3


def test_write_makes_one_file_and_says_where_it_cannot(tmp_path):
    told = document(2)
    path = write(told, tmp_path / "page.html", title="A title")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert "A title" in Tree(path.read_text(encoding="utf-8")).text("title")
    with pytest.raises(InputError, match="cannot write the report"):
        write(told, tmp_path / "nowhere" / "page.html")


def test_a_page_of_sixty_cells_is_small():
    assert len(render(many(60)).encode()) < 2_000_000
