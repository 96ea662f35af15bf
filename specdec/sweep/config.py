"""Settings from a file: TOML with axes and cells, or Python that makes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.sweep.axes import check_known, combine, listed, sensible
from specdec.sweep.setting import Setting

_RUN = ("only", "skip", "axes", "cells")


@dataclass(frozen=True)
class Configuration:
    """What a file asks for."""

    settings: list[Setting]
    only: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)


def read_configuration(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    quantizes: Callable[[str], bool] | None = None,
) -> Configuration:
    """The settings that `path` describes; `overrides` (fields of settings) hold for all of them.

    `.toml`: fields at the top hold for all cells; `[axes]` holds lists, whose product is taken; every `[[cells]]` is
    one cell more; `only` and `skip` are lists of expressions. `.py`: the file is run, and `settings()` or `CELLS` gives
    settings or tables; it is your own program, and can do what it likes. Raises `InputError` with the file's name.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.suffix == ".py":
        return _from_python(file, overrides or {}, quantizes)
    if file.suffix != ".toml":
        raise InputError(f"{file}: a configuration is a .toml or a .py file")
    content = _read_toml(file)
    base = {name: value for name, value in content.items() if name not in _RUN}
    check_known(base, str(file))
    base.update(overrides or {})
    axes, cells = content.get("axes"), content.get("cells", [])
    if not isinstance(axes or {}, Mapping) or not isinstance(cells, list):
        raise InputError(f"{file}: [axes] is a table of lists, and every cell stands under [[cells]]")
    if axes is None and not cells:
        raise InputError(f"{file} has neither [axes] nor [[cells]]")
    try:
        taken = {name: values for name, values in (axes or {}).items() if name not in (overrides or {})}
        settings = combine(taken, base, quantizes=quantizes) if axes is not None else []
        settings += listed(({**cell, **(overrides or {})} for cell in cells), base, quantizes=quantizes)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return Configuration(list(dict.fromkeys(settings)), _texts(content, "only", file), _texts(content, "skip", file))


def _texts(content: Mapping[str, Any], name: str, file: Path) -> list[str]:
    value = content.get(name, [])
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{file}: {name} is an expression, or a list of them")
    return found


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise InputError(
            f"{file}: reading TOML needs Python 3.11; write the settings as a Python file (CELLS = [...]) instead"
        ) from None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid TOML: {error}") from None


def _from_python(file: Path, overrides: Mapping[str, Any], quantizes: Callable[[str], bool] | None) -> Configuration:
    spec = importlib.util.spec_from_file_location("specdec_sweep_configuration", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        given = module.settings() if hasattr(module, "settings") else module.CELLS
    except AttributeError as error:
        raise InputError(f"{file} defines neither settings() nor CELLS ({error})") from error
    except Exception as error:
        raise InputError(f"{file} fails: {type(error).__name__}: {error}") from error
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
        raise InputError(f"{file}: settings() and CELLS are lists of settings or tables")
    found = []
    for one in given:
        try:
            if isinstance(one, Setting):
                found.append(sensible(one.changed(**overrides), quantizes))
            elif isinstance(one, Mapping):
                found += listed([{**one, **overrides}], quantizes=quantizes)
            else:
                raise InputError(f"a cell is a Setting or a table, not {one!r}")
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
    if not found:
        raise InputError(f"{file} gives no settings")
    return Configuration(list(dict.fromkeys(found)))
