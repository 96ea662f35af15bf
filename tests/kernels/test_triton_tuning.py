"""Schedules of packed products: what they may change, how they are measured, kept, and read again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packed_cases import DEVICE, packed_kernels
from torch import Tensor

from specdec.kernels import tuning
from specdec.kernels.tuning import Schedule
from specdec.quant import parse


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return packed_kernels()


def test_the_order_of_sums_follows_from_shape_and_dtype(kernels: ModuleType) -> None:
    assert [kernels.strips(N, 4096, torch.bfloat16) for N in (256, 8191, 8192)] == [4, 4, 1]
    assert [kernels.strips(256, K, torch.bfloat16) for K in (992, 1024)] == [1, 4]
    assert kernels.strips(256, 4096, torch.float32) == 1
    for code in kernels.CODES.values():
        assert {kernels.depth(code, 4, dtype) for dtype in kernels.DTYPES} == {128}  # covers the largest group
    for N in (64, 4096, 30000):
        for wide in (False, True):
            for strips in (1, 4):
                options = tuning.candidates(N, wide, strips, 2)
                assert len(set(options)) == len(options) > 4
                assert all(option.rows in ((16, 32) if wide else (16,)) for option in options)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    tuning.schedule.cache_clear()
    yield tuning.path_for(DEVICE)
    tuning.schedule.cache_clear()


def test_the_fastest_schedule_is_kept(kernels: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format, told, every = parse("mxfp4"), [], tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda *given: every(*given)[:4])

    def seconds(calls: list[Any]) -> float:
        assert calls[0]().shape in ((1, 20), (17, 20))
        told.append(len(told))
        return 1.0 if len(told) in (3, 6) else 2.0

    before = {wide: tuning.schedule("mxfp4 bfloat16", 20, 64, wide, 1, 2, DEVICE) for wide in (False, True)}
    found = kernels.tune(format, 20, 64, device=DEVICE, num_rows=(1, 17), seconds=seconds)
    assert len(told) == 8
    for M, plan in found.items():
        wide = M > 16
        assert plan != before[wide]
        assert tuning.schedule("mxfp4 bfloat16", 20, 64, wide, 1, 2, DEVICE) == plan
        assert tuning.schedule("mxfp4 bfloat16", 20, 96, wide, 1, 2, DEVICE) == before[wide]
    assert json.loads(cache.read_text())["mxfp4 bfloat16 20x64 narrow"] == list(found[1])


def test_a_schedule_that_changes_bits_is_not_taken(kernels: ModuleType, cache: Path) -> None:
    options = tuning.candidates(20, False, 1, 2)
    cost = {option: float(-i) for i, option in enumerate(options)}

    def run(option: Schedule) -> Tensor:
        return torch.tensor([1.0 if option in options[:3] else 1.0 + 2**-23])

    assert tuning.fastest("x", options, run, cost.__getitem__, DEVICE) == options[2]


@pytest.mark.parametrize(
    "stored",
    ["{", "[]", '{"mxfp4 bfloat16 20x64 narrow": [64, 16, 4, 4]}', '{"mxfp4 bfloat16 20x64 narrow": ["16", 16]}'],
)
def test_a_cache_that_was_written_by_others_is_not_trusted(kernels: ModuleType, cache: Path, stored: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(stored)
    assert tuning.schedule("mxfp4 bfloat16", 20, 64, False, 1, 2, DEVICE) == tuning.default(20, False, 1, 2)


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments/quantised/gpu.py"
    spec = importlib.util.spec_from_file_location("experiments_gpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="torch finds none here"):
        script().main()


def test_the_benchmark_judges_by_bytes() -> None:
    gpu = script()
    where = {"inputs": 64, "outputs": 32, "rows": 1}
    times = {gpu.TORCH: (4096, 8e-6), gpu.OURS: (4096, 16e-6), "mxfp4": (1024, 2.5e-6)}
    rows = [
        {"name": name, **where, "bytes": size, "fewer_bytes": 4096 / size, "seconds": s, "low": s, "high": s}
        for name, (size, s) in times.items()
    ]
    *_, found = products = gpu.judged(rows, 1e9)
    assert found["over_torch"] == pytest.approx(3.2)
    assert found["over_own"] == pytest.approx(6.4)
    assert found["reach"] == pytest.approx(0.8)
    assert found["of_bandwidth"] == pytest.approx(0.4096)
    found["seconds"] *= 1.1
    about = {"date": "d", "torch": "t", "triton": "3", "bandwidth": 1e9, "rounds": 3, "arguments": "", "device": "X"}
    text = gpu.markdown({**about, "products": gpu.judged(products, 1e9)})
    assert "Below 0.8 of the bytes' ratio for one row: mxfp4 64×32 (0.73)." in text
    heads, rule, *cells = (line for line in text.splitlines() if line.startswith("|"))
    assert {line.count("|") for line in (heads, rule, *cells)} == {len(gpu.HEADS) + 1}
    assert len(cells) == 3
