"""Spec-Bench's figures against numbers worked out by hand, and the table that shows them."""

from __future__ import annotations

import json

import pytest
import tiny_models
from rich.console import Console
from specdec.drafters import NgramDrafter
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec.bench import bare
from specdec.bench.compare import compare
from specdec.bench.prompts import Prompt
from specdec.bench.specbench import comparison_rows, concerns, measure, measure_document
from specdec.bench.specbench_table import markdown, show
from specdec.bench.timing import Gate
from specdec.policy import Fixed


def row(question, category, tokens, plain, speculative, accepted, turn=1, **more):
    """`plain` and `speculative`: seconds by repetition."""
    repetitions = len(plain)
    return {
        "id": str(question) if turn == 1 else f"{question}.{turn}",
        "question": str(question),
        "category": category,
        "num_tokens": tokens,
        "tokens": {"plain": [tokens] * repetitions, "speculative": [tokens] * repetitions},
        "seconds": {"plain": list(plain), "speculative": list(speculative)},
        "rounds": {"accepted": list(accepted)},
        **more,
    }


def by_hand():
    """Two turns of one question (16 tokens in 4 s plainly, 2 s speculatively: 4 and 8 per second), another question
    (10 in 1 s and 0.5 s: 10 and 20), and a translation that lost (10 in 1 s and 2 s: 10 and 5).
    """
    return [
        row(81, "writing", 12, [3.0], [1.0], [3, 3, 3]),
        row(81, "writing", 4, [1.0], [1.0], [0, 0, 0, 0], turn=2),
        row(91, "math", 10, [1.0], [0.5], [4, 4]),
        row(161, "translation", 10, [1.0], [2.0], [0] * 10),
    ]


def test_figures_by_hand():
    made = measure(by_hand())
    assert list(made.tasks) == ["mt_bench", "translation"]
    multi, translation, overall = made.tasks["mt_bench"], made.tasks["translation"], made.overall
    assert (multi.num_questions, multi.num_turns) == (2, 3)
    assert multi.mean_accepted == pytest.approx((12 + 4 + 10) / 9), "pooled over steps, the target's own token included"
    assert multi.plain_rate == pytest.approx((4 + 10) / 2)
    assert multi.speculative_rate == pytest.approx((8 + 20) / 2)
    assert multi.speedup == pytest.approx(2.0)
    assert (translation.speedup, translation.mean_accepted) == (pytest.approx(0.5), 1.0)
    assert overall.speedup == pytest.approx((8 + 20 + 5) / (4 + 10 + 10)), "pooled over questions, no mean of tasks"
    assert overall.speedup != pytest.approx((2.0 + 0.5) / 2)
    assert overall.mean_accepted == pytest.approx(36 / 19)


def test_repetitions_are_averaged_and_pairs_stay_together():
    """Questions differ tenfold in speed, but every one gains twofold: the interval has no width."""
    rows = [row(i, "qa", 10, [s, s], [s / 2, s / 2], [1] * 5) for i, s in enumerate((0.1, 1.0, 0.3, 0.5))]
    qa = measure(rows).tasks["qa"]
    assert (qa.speedup, qa.low, qa.high) == pytest.approx((2.0, 2.0, 2.0))
    rows[0]["seconds"]["speculative"] = [0.1, 0.025]
    qa = measure(rows).tasks["qa"]
    assert qa.speedup == pytest.approx((250 + 20 + 200 / 3 + 40) / (100 + 10 + 100 / 3 + 20))
    assert qa.low < qa.speedup < qa.high


def test_one_repetition_of_other_length_counts_its_own_tokens():
    """At temperature 1 a rule may give other texts than plain decoding: rates take each method's own tokens."""
    rows = [row(1, "qa", 10, [1.0], [1.0], [0])]
    rows[0]["tokens"] = {"plain": [10], "speculative": [5]}
    assert measure(rows).tasks["qa"].speedup == pytest.approx(0.5)
    del rows[0]["tokens"]
    assert measure(rows).tasks["qa"].speedup == pytest.approx(1.0)


def test_only_its_own_categories():
    assert concerns(by_hand())
    assert concerns(by_hand()[:3]), "MT-Bench alone"
    assert not concerns([])
    other = [*by_hand(), row(1, "gardening", 5, [1.0], [1.0], [0])]
    assert not concerns(other)
    assert measure(other) is None
    assert measure([row(1, "", 5, [1.0], [1.0], [0])]) is None


def document(rows, **more):
    cell = {"status": "done", "label": "model k=4", "rows": rows, **more}
    failed = {"status": "failed", "label": "eagle", "error": {"type": "InputError", "message": "no"}}
    return json.loads(json.dumps({"schema": 1, "environment": {}, "cells": [failed, cell]}))


SIX = [
    row(100 + i, category, 10, [1.0], [1.0 / gain], [accepted] * 3)
    for i, (category, gain, accepted) in enumerate(
        [
            ("roleplay", 1.1, 1),
            ("translation", 1.2, 2),
            ("summarization", 1.3, 3),
            ("qa", 1.4, 4),
            ("math_reasoning", 1.5, 5),
            ("rag", 1.6, 6),
        ]
    )
]


def printed(content, width, **options) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert show(console, content, **options)
    return console.export_text()


@pytest.mark.parametrize(("width", "heads"), [(100, "Multi Trans Sum QA Math RAG MAT Overall"), (130, None)])
def test_the_six_columns(width, heads):
    text = printed(document(SIX), width)
    lines = [line.split() for line in text.splitlines()]
    expected = heads or "Multi-turn Translation Summarization QA Math RAG MAT Overall"
    assert ["speed-up", *expected.split()] in lines
    assert ["model", "k=4", "1.10×", "1.20×", "1.30×", "1.40×", "1.50×", "1.60×", "4.50", "1.35×"] in lines
    assert ["model", "k=4", "2.00", "3.00", "4.00", "5.00", "6.00", "7.00", "4.50"] in lines
    assert "1 of the 80 questions of each task" in text
    assert "EAGLE2" not in text
    assert max(map(len, text.splitlines())) <= width


def test_published_figures_are_marked_as_other_hardware():
    text = printed(document(SIX), 100, published=True)
    line = next(line for line in text.splitlines() if line.startswith("EAGLE2"))
    assert line.split() == ["EAGLE2", "2.84×", "1.88×", "2.34×", "2.15×", "2.79×", "2.13×", "4.34", "2.36×"]
    assert "SAMD[EAGLE2]" in text, "no markup"
    assert "A100" in text
    assert "other hardware" in text


def test_markdown_is_a_table():
    lines = markdown(document(SIX), published=True).splitlines()
    assert lines[0] == "|  | Multi-turn | Translation | Summarization | QA | Math | RAG | MAT | Overall |"
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {10}
    assert table[2].startswith("| model k=4 | 1.10× | 1.20× | 1.30× | 1.40× | 1.50× | 1.60× | 4.50 | 1.35× (")
    assert any("Published" in line and "other hardware" in line for line in lines)


def test_what_is_missing_is_a_dash_and_what_was_cut_is_said():
    rows = [dict(row(81, "writing", 5, [1.0], [0.5], [4]), num_cut_tokens=3), row(161, "translation", 5, [1], [1], [0])]
    text = printed(document(rows, timing={"prefill": "forked"}), 100)
    assert ["model", "k=4", "2.00×", "1.00×", "–", "–", "–", "–", "3.00", "1.50×"] in [
        line.split() for line in text.splitlines()
    ]
    assert "1 of 2 prompts were cut" in text
    assert "leave the prefill out" in text
    assert "Multi-turn 1, Translation 1" in text


def test_cells_without_times_have_acceptance():
    rows = [{**one, "seconds": None} for one in SIX]
    text = printed(document(rows), 100)
    lines = [line.split() for line in text.splitlines()]
    assert ["model", "k=4", *["–"] * 6, "4.50", "–"] in lines
    assert ["model", "k=4", "2.00", "3.00", "4.00", "5.00", "6.00", "7.00", "4.50"] in lines


def test_documents_of_other_sets_print_nothing():
    console = Console(record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    other = document([row(1, "code", 5, [1.0], [1.0], [0])])
    assert not show(console, other)
    assert console.export_text() == ""
    assert markdown(other) == ""
    assert measure_document(other) == []


def test_a_real_comparison_gives_the_statistics_of_its_own(monkeypatch):
    """MAT is the pooled mean acceptance length of the comparison: the same definition, counted twice."""
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    target = tiny_models.tiny("llama", vocab_size=TEXT_VOCAB, num_hidden_layers=1)
    decoder = specdec.SpeculativeDecoder(target, tokenizer=byte_tokenizer(), drafter=NgramDrafter(), policy=Fixed(3))
    prompts = [Prompt("81", "abcabcabc", "writing", ("abcabcabc", "again")), Prompt("321", "xyxyxyxy", "qa")]
    result = compare(decoder, prompts, {"max_new_tokens": 24}, repetitions=2, warmup=0, gate=Gate(read=lambda: None))
    made = measure(comparison_rows(result))
    assert (made.overall.num_questions, made.overall.num_turns) == (2, 3)
    assert made.overall.mean_accepted == pytest.approx(result.stats().mean_acceptance_length)
    assert made.overall.mean_accepted > 1
    assert list(made.tasks) == ["mt_bench", "qa"]
