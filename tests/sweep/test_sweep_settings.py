"""Settings, axes, filters and files: what is asked for is what is run, and nonsense is refused."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.errors import InputError
from specdec.sweep.axes import (
    Named,
    combine,
    listed,
    select,
    split_counts,
    split_names,
    split_optional,
    split_trees,
)
from specdec.sweep.config import read_configuration
from specdec.sweep.filters import Filter
from specdec.sweep.setting import FIELDS, Setting, labels

SETTINGS = st.builds(
    Setting,
    drafter=st.sampled_from(["model", "ngram", "folder/of heads"]),
    drafter_options=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=2),
    k=st.none() | st.integers(1, 64),
    temperature=st.floats(0, 2),
    top_p=st.none() | st.floats(0.01, 1),
    seed=st.integers(),
    batch=st.integers(1, 8),
    chat=st.booleans(),
)


@given(SETTINGS)
def test_a_setting_survives_json_and_keeps_its_key(setting):
    again = Setting.of(json.loads(json.dumps(setting.as_dict())))
    assert again == setting
    assert again.key == setting.key
    assert hash(again) == hash(setting)
    assert again.keyed("a") != again.keyed("b")
    assert setting.label()


@given(SETTINGS, SETTINGS)
def test_keys_differ_exactly_where_settings_do(a, b):
    assert (a == b) == (a.key == b.key) == (a.as_dict() == b.as_dict())


def test_equal_numbers_are_equal_settings():
    assert Setting(temperature=0).key == Setting(temperature=0.0).key
    assert Setting(tree=[2, 2]).key == Setting(tree=(2, 2)).key


# A value of every field that is not its default.
OTHER = {
    "target": "org/other",
    "draft": "org/draft",
    "drafter": "ngram",
    "drafter_options": {"limit": 3},
    "k": 3,
    "tree": (2, 2),
    "policy": "throughput",
    "policy_options": {"limit": 3},
    "verifier": "ratio",
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "seed": 1,
    "max_new_tokens": 128,
    "quantize": "int8",
    "draft_quantize": "int8",
    "kv_cache": "int8",
    "dtype": "bfloat16",
    "backend": "eager",
    "numerics": "fast",
    "device": "cuda:1",
    "threads": 2,
    "batch": 4,
    "prompt_set": "folder/prompts.jsonl",
    "limit": 2,
    "limit_per_category": 2,
    "turns": 2,
    "truncate": True,
    "chat": True,
    "exact": True,
}


def test_labels_tell_every_field_that_is_not_its_default():
    assert set(OTHER) == set(FIELDS)
    usual = Setting(policy="heuristic")  # it takes options, and a k
    found = [usual.changed(**{name: value}).label() for name, value in OTHER.items()]
    assert len({*found, usual.label()}) == len(OTHER) + 1
    assert Setting(k=4).label() == "model k=4 T=0"
    assert Setting(k=4, top_p=0.9, seed=1, exact=True).label() == "model k=4 T=0 top-p 0.9 seed 1 exact"


def test_labels_together_leave_out_what_is_common():
    settings = [Setting(k=4, seed=seed, top_p=0.9, target="org/t") for seed in (0, 1)]
    assert labels(settings) == ["model k=4 T=0", "model k=4 T=0 seed 1"]
    assert labels([]) == []


@pytest.mark.parametrize(
    "content",
    [
        {"k": 0},
        {"k": True},
        {"k": 2.0},
        {"batch": None},
        {"tree": []},
        {"tree": [2, 0]},
        {"tree": "2,2"},
        {"k": 3, "tree": [2, 2]},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"drafter": None},
        {"chat": 1},
        {"drafter_options": [1]},
        {"colour": "red"},
    ],
)
def test_impossible_settings_are_refused(content):
    with pytest.raises(InputError):
        Setting.of(content)


# ------------------------------------------------------------------ axes


def test_the_product_of_all_axes():
    axes = {"drafter": ["model", "ngram"], "k": [1, 2], "tree": [[2, 2]], "temperature": [0, 1], "batch": [1, 4]}
    found = combine(axes, {"max_new_tokens": 8})
    assert len(found) == len(set(found)) == 2 * 3 * 2 * 2
    assert {s.max_new_tokens for s in found} == {8}
    # Cells of one drafter follow each other: its model is loaded once.
    assert [s.drafter for s in found] == ["model"] * 12 + ["ngram"] * 12


def test_targets_come_first_so_that_each_is_loaded_once():
    found = combine({"quantize": [None, "int8"], "temperature": [0, 1], "drafter": ["model", "ngram"], "k": [1]})
    assert [s.quantize for s in found] == [None] * 4 + ["int8"] * 4


def test_what_has_no_meaning_is_left_out_and_merged():
    found = combine({"drafter": ["none", "model"], "k": [1, 2, 4], "verifier": ["coupled", "block"]})
    assert sum(s.drafter == "none" for s in found) == 1
    assert len(found) == 1 + 3 * 2
    quantized = combine(
        {"drafter": ["model", "ngram"], "k": [2], "draft_quantize": [None, "int8"]}, quantizes=lambda n: n == "model"
    )
    assert [(s.drafter, s.draft_quantize) for s in quantized] == [("model", None), ("ngram", None), ("model", "int8")]
    assert combine({"tree": [[1, 1, 1]], "k": [3]}) == combine({"k": [3]}), "a tree of width 1 is a chain"
    assert combine({"temperature": [0, 0.0], "k": [1]}) == combine({"k": [1]})


def test_policies_and_their_options():
    found = combine({"policy": ["fixed", "throughput", "heuristic:k=4;limit=9"], "k": [2, 3]})
    assert [(s.policy, s.k, s.policy_options) for s in found] == [
        ("fixed", 2, {}),
        ("fixed", 3, {}),
        ("throughput", None, {}),
        ("heuristic", None, {"k": 4, "limit": 9}),
    ]
    assert [s.k for s in combine({})] == [1, 2, 4, 8]
    assert [s.tree for s in combine({"tree": [[2, 2]]})] == [(2, 2)], "a tree alone brings no chains"
    assert combine({"policy": ["throughput"]})[0].k is None


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"policy": ["throughput"], "k": [1, 2]}, "add it"),
        ({"policy": ["fixed:k=3"]}, "from k and tree"),
        ({"colour": ["red"]}, "no axis"),
        ({"k": 3}, "a list of values"),
        ({"k": []}, "a list of values"),
        ({"drafter": "model"}, "a list of values"),
        ({"drafter": [{"neural": "eagle"}]}, "has a name"),
        ({"drafter": ["hybrid:neural=eagle;retrieval"]}, "NAME:key=value"),
        ({"temperature": [-1]}, "temperature"),
    ],
)
def test_axes_that_contradict_themselves_are_refused(axes, words):
    with pytest.raises(InputError, match=words):
        combine(axes)


def test_cells_written_out():
    found = listed(
        [{"drafter": "eagle", "k": 3}, {"policy": "throughput:limit=8"}, {}, {"drafter": "eagle", "k": 3}],
        {"temperature": 1},
    )
    assert [s.label() for s in found] == ["eagle k=3 T=1", "model throughput:limit=8 T=1", "model k=5 T=1"]
    with pytest.raises(InputError, match="shapes of the fixed policy"):
        listed([{"policy": "throughput", "k": 3}])


def test_lists_as_people_type_them():
    assert split_counts("1,2,4-6") == [1, 2, 4, 5, 6]
    assert split_names("model, hybrid:x=[1,2];y=a") == ["model", "hybrid:x=[1,2];y=a"]
    assert split_optional("none,int8") == [None, "int8"]
    assert split_trees("4,2,1;2,2") == [(4, 2, 1), (2, 2)]
    assert Named.of("hybrid:x=[1,2];y=a") == Named("hybrid", {"x": [1, 2], "y": "a"})
    assert Named.of("org/model:latest") == Named("org/model:latest")
    for read, text in ((split_counts, "1,x"), (split_counts, "4-2"), (split_counts, "1-99999"), (split_names, "a,,b")):
        with pytest.raises(InputError):
            read(text)


# ------------------------------------------------------------------ filters


def test_filters_see_fields():
    found = combine({"drafter": ["model", "ngram", "none"], "k": [1, 4, 8], "tree": [[2, 2]]})
    kept = select(found, only=["k <= 4 and drafter == 'model'"])
    assert [(s.drafter, s.k) for s in kept] == [("model", 1), ("model", 4)]
    assert {s.drafter for s in select(found, skip=["drafter in ('model', 'none')"])} == {"ngram"}
    assert [s.tree for s in select(found, only=["tree is not None", "drafter == 'ngram'"])] == [(2, 2)]
    assert [s.k for s in select(found, only=["not k % 4 and 2 * k < 10", "drafter == 'ngram'"])] == [4]
    assert all(s.k is None for s in select(found, skip=["k >= 1"])), "ordering what is not there is false"
    with pytest.raises(InputError, match="none of 9 settings"):
        select(found, only=["k == 99"])


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "k.real",
        "k ** 9999999",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "drafter_options['x']",
        "k if k else 1",
        "(k := 3)",
        "f'{k}'",
        "colour == 1",
        "k <=",
        "",
        "'a' * 999999999 == drafter",
        "k < 'a'",
        "1 / 0 == k",
    ],
)
def test_expressions_that_do_more_are_refused(text):
    with pytest.raises(InputError):
        Filter(text)(Setting(k=2))


@given(st.text(max_size=40))
def test_any_text_is_an_expression_or_an_input_error(text):
    try:
        value = Filter(text)(Setting(k=2))
    except InputError:
        return
    assert value in (True, False)


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9))
def test_filters_compute_as_python_does(a, b, k):
    text = f"({a} < k <= {b} or k + {a} >= 2 * {b}) and not k % 3 == 1"
    assert Filter(text)(Setting(k=k)) == eval(text, {"k": k})


# ------------------------------------------------------------------ files

needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is there from Python 3.11 on")


@needs_toml
def test_toml_has_axes_and_cells(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        'max_new_tokens = 16\nonly = "k != 4"\n[axes]\nk = [2, 4]\ntree = [[3, 1]]\ndrafter = ["model", "ngram"]\n'
        '[[cells]]\ndrafter = {name = "hybrid", neural = "eagle"}\npolicy = "throughput"\n[[cells]]\nk = 2\n',
        encoding="utf-8",
    )
    read = read_configuration(file, {"temperature": 0.5})
    assert [s.label() for s in read.settings] == [
        "model k=2 T=0.5 max 16",
        "model k=4 T=0.5 max 16",
        "model 3x1 T=0.5 max 16",
        "ngram k=2 T=0.5 max 16",
        "ngram k=4 T=0.5 max 16",
        "ngram 3x1 T=0.5 max 16",
        "hybrid:neural=eagle throughput T=0.5 max 16",
    ], "the second cell is one of the axes' own"
    assert {s.max_new_tokens for s in read.settings} == {16}
    assert read.only == ["k != 4"]


def test_python_files_make_settings(tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(
        "from specdec.sweep.setting import Setting\n"
        "def settings():\n    return [Setting(k=k) for k in (1, 2)] + [{'drafter': 'ngram', 'k': 3}]\n",
        encoding="utf-8",
    )
    assert [s.label() for s in read_configuration(file).settings] == ["model k=1 T=0", "model k=2 T=0", "ngram k=3 T=0"]
    file.write_text("CELLS = [{'k': 2}, {'k': 2}]", encoding="utf-8")
    assert len(read_configuration(file, {"seed": 3}).settings) == 1


@needs_toml
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.toml", "k = [", "not valid TOML"),
        ("a.toml", "limit = 3", r"neither \[axes\]"),
        ("a.toml", "colour = 3\n[axes]\nk = [1]", "no 'colour'"),
        ("a.toml", "[axes]\ncolour = [3]", "no axis"),
        ("a.toml", "only = 3\n[axes]\nk = [1]", "only is an expression"),
        ("a.toml", "cells = 3", "every cell stands under"),
        ("a.py", "x = 1", "neither settings"),
        ("a.py", "1 / 0", "ZeroDivisionError"),
        ("a.py", "CELLS = [3]", "a Setting or a table"),
        ("a.py", "CELLS = []", "no settings"),
        ("a.json", "{}", "a .toml or a .py"),
    ],
)
def test_files_that_make_no_sense_are_refused_by_name(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_configuration(file)
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_configuration(tmp_path / "sweep.toml")
