"""The made-up documents that other tests use have the shape of real ones."""

from __future__ import annotations

import json

import pytest
from sweep_documents import cell, document, settings

from specdec.errors import InputError
from specdec.sweep.setting import FIELDS, Setting
from specdec.sweep.store import Store, load_document


def test_documents_go_through_a_store_unchanged(tmp_path):
    made = document(num_cells=7, num_failed=1)
    path = tmp_path / "sweep.db"
    with Store(path) as store:
        for one in made["cells"]:
            assert store.add(one, made["environment"])
    found = load_document(path)
    (place,) = found["environments"]
    assert found["cells"] == [{**one, "environment": place} for one in made["cells"]]
    assert found["environment"] == made["environment"]
    (tmp_path / "sweep.json").write_text(json.dumps(made), encoding="utf-8")
    assert load_document(tmp_path / "sweep.json")["cells"] == made["cells"]


def test_documents_are_the_same_every_time_and_hang_together():
    made = document(num_cells=60)
    assert made == document(num_cells=60)
    assert len({one["key"] for one in made["cells"]}) == 60
    for one in made["cells"]:
        assert set(one["setting"]) == set(FIELDS)
        for row in one["rows"]:
            assert sum(row["rounds"]["emitted"]) == one["setting"]["max_new_tokens"]
            assert len({len(values) for values in row["rounds"].values()}) == 1
    assert len(settings(200)) == len(set(settings(200))) == 200


def test_settings_say_what_they_are():
    setting = settings(1)[0]
    assert Setting.of(json.loads(json.dumps(setting.as_dict()))) == setting
    assert setting.label() == "model k=1 T=0 limit 3"
    other = setting.changed(tree=[4, 2], k=None, batch=4, quantize="int8", limit=None)
    assert other.label() == "model 4x2 T=0 int8/full batch 4"
    with pytest.raises(InputError, match="no 'tempreature'"):
        Setting.of({"tempreature": 1})
    assert cell(setting, failed=True)["error"]["type"] == "MemoryBudgetError"
