"""Configurations of heads whose fields are of the wrong type: refused in our words, whichever field it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import test_eagle
import test_parallel_formats
import tiny_models
from specdec.drafters import EagleDrafter, ParallelDrafter

from specdec.drafter import BuildContext, Drafter
from specdec.errors import InputError, UnsupportedModelError
from specdec.formats import dflash, eagle
from specdec.formats.files import describing
from specdec.loading import resolve_drafter

WRONG: tuple[Any, ...] = ("x", -1, [], {"a": 1})
LAYOUTS: dict[str, tuple[type[Drafter], Callable[[Path], Any], int]] = {
    "original EAGLE-3": (EagleDrafter, lambda folder: test_eagle.write(folder, "original-3"), test_eagle.LAYERS),
    "original EAGLE-1": (EagleDrafter, lambda folder: test_eagle.write(folder, "original-1"), test_eagle.LAYERS),
    "speculators EAGLE-3": (EagleDrafter, lambda folder: test_eagle.write(folder, "speculators"), test_eagle.LAYERS),
    "z-lab DFlash": (ParallelDrafter, test_parallel_formats.z_lab, 3),
    "speculators DFlash": (ParallelDrafter, test_parallel_formats.speculators, 3),
}


def places(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def put(config: Mapping[str, Any], place: tuple[str, ...], value: Any) -> str:
    changed: Any = copy.deepcopy(config)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_field_of_a_wrong_type_is_refused_or_ignored(layout: str, tmp_path: Path) -> None:
    kind, write, num_layers = LAYOUTS[layout]
    target = tiny_models.tiny("llama", num_hidden_layers=num_layers)
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    context = BuildContext(target, source=str(tmp_path), backend="eager")
    assert isinstance(resolve_drafter(str(tmp_path), context), kind)
    refused = 0
    for place in places(config):
        for value in WRONG:
            (tmp_path / "config.json").write_text(put(config, place, value))
            try:
                kind.build(context)  # nothing but our own errors may come out
            except InputError:
                refused += 1
    assert refused > len(config)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "rope_theta"])
def test_the_message_says_what_to_do(field: str, tmp_path: Path) -> None:
    test_eagle.write(tmp_path, "original-3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(put(config, (field,), "x"))
    target = tiny_models.tiny("llama", num_hidden_layers=test_eagle.LAYERS)
    with pytest.raises(UnsupportedModelError, match=r"config\.json describes no EAGLE head: .*; download it again"):
        EagleDrafter.build(BuildContext(target, source=str(tmp_path)))


@pytest.mark.parametrize("named", [3, True, [1.5], {"a": 1}, "EagleModel"])
def test_classes_that_are_no_list_of_words_name_no_head(named: Any, tmp_path: Path) -> None:
    config = {"architectures": named, "model_type": ["llama"], "num_hidden_layers": 1}
    assert eagle.layout_of(config, tmp_path) is None
    assert not dflash.is_dflash({**config, "dflash_config": {}})


def test_errors_that_are_no_fields_fault_pass() -> None:
    with pytest.raises(MemoryError), describing("EAGLE head"):
        raise MemoryError
    with pytest.raises(InputError, match=r"^as it was$"), describing("EAGLE head"):
        raise InputError("as it was")
