"""The packed products compile for GPUs that are not here: the interpreter runs what no compiler takes, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from packed_cases import NAMES

_COMPILE = """
import json, re, sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdec.kernels import triton_packed as host, triton_products as ops, tuning
from specdec.quant import parse


def compiled(capability, kernel, kinds, fixed, plan, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in kinds or n in ("N", "K")}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in fixed.items()}, aligned)
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False, **options)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def one(capability, name, N, K, wide):
    format = parse(name)
    family = host.family(format)
    parts = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in format.parts(N, K).items()}
    common = dict(x="*bf16", bias="*bf16", y="*bf16")
    if family in host.CODES:
        fixed = host.fixed(host.CODES[family], parts, N, K, torch.bfloat16)
        plan = tuning.default(N, wide, fixed["S"], 2)
        kinds = dict(common, codes="*i32", scales="*bf16" if family == "int4" else "*u8", zeros="*u8")
        made = compiled(capability, ops.product, kinds, dict(fixed, BIAS=True, BM=plan.rows, BN=plan.outputs), plan)
    elif family == "int8":
        plan = tuning.default(N, wide, 1, 1)
        kinds = dict(common, x="*i8", codes="*i8", scales="*fp32", x_scales="*fp32")
        fixed = dict(BIAS=True, WIDE=False, BM=plan.rows, BN=plan.outputs, BK=256)
        made = compiled(capability, ops.int8, kinds, fixed, plan)
    else:
        plan = tuning.default(N, wide, 1, 2)
        kinds = dict(common, mask="*i32", values="*bf16")
        fixed = dict(BIAS=True, WIDE=False, ACC=tl.float32, BM=plan.rows, BN=plan.outputs, BK=512)
        made = compiled(capability, ops.sparse, kinds, fixed, plan)
    text = made.asm["ttgir"]
    # What decides the order within a tile: the instruction, and which inputs one of them takes.
    order = sorted(set(re.findall(r"kWidth = \\d+|versionMajor = \\d+", text)))
    return dict(order=order, cubin="cubin" in made.asm, shared=made.metadata.shared, mma="mma" in made.asm["ptx"])


print(json.dumps([one(*given) for given in json.loads(sys.argv[1])]))
"""
# Shared memory of one block, in bytes: compute capability 8.0 and 9.0.
ROOM = {80: 163 << 10, 90: 227 << 10}


def compile_all(jobs: list[tuple[int, str, int, int, bool]], folder: Path) -> list[dict[str, Any]]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(jobs)],
        env={**environment, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(run.stdout)
    for job, made in zip(jobs, found, strict=True):
        assert made["cubin"], job
        assert made["mma"], job
        assert made["shared"] <= ROOM[job[0]], job
        assert "versionMajor = 2" in made["order"], job
    return found


def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """To machine code, on tensor cores; and tiles of few and of many rows take their inputs in the same order."""
    jobs = [(90, "mxfp4", 2048, 2048, False), (90, "mxfp4", 2048, 2048, True), (80, "int8", 2048, 2048, False)]
    narrow, wide, _ = compile_all(jobs, tmp_path)
    assert narrow["order"] == wide["order"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ROOM)
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    shapes = [(2048, 2048), (28672, 8192)]
    jobs = [(capability, name, *shape, wide) for name in NAMES for shape in shapes for wide in (False, True)]
    found = compile_all(jobs, tmp_path)
    for (job, one), (other, two) in pairwise(zip(jobs, found, strict=True)):
        if job[:4] == other[:4]:
            assert one["order"] == two["order"], job
