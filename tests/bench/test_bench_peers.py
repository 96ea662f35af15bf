"""Other engines: what their tools print, the files written for them, and what is said when they are missing."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from specdec.bench import peer_llama_cpp, peers, rows, runbench
from specdec.bench.gguf_file import interleave, tensor_name
from specdec.bench.peer_llama_cpp import parse_bench, parse_ids, parse_speculative
from specdec.bench.peer_process import PeerError, PeerProcess
from specdec.bench.synthetic import greedy_texts, make_pair, make_prompts, piece
from specdec.bench.timing import Gate, Reading, others_share
from specdec.errors import InputError

# Recorded from llama.cpp 0.5.0-dev.
SPECULATIVE = """
0.00.067.151 I encoded   64 tokens in    0.023 seconds, speed: 2793.662 t/s
0.00.067.171 I decoded   33 tokens in    0.019 seconds, speed: 1727.387 t/s
0.00.067.184 I
0.00.067.197 I n_draft   = 4
0.00.067.210 I n_predict = 33
0.00.067.223 I n_drafted = 38
0.00.067.235 I n_accept  = 23
0.00.067.249 I accept    = 60.526%
0.00.067.403 I common_perf_print: prompt eval time =      32.80 ms /   113 tokens (    0.29 ms per token)
"""
BENCH = """[
  {
    "build_commit": "unknown",
    "model_type": "llama ?B all F32",
    "n_prompt": 64,
    "n_gen": 32,
    "avg_ns": 11488029,
    "samples_ns": [ 11488029 ]
  }
]
"""


def test_the_speculative_tools_lines():
    printed = parse_speculative(SPECULATIVE)
    assert (printed.prompt_seconds, printed.text_seconds) == (0.023, 0.019)
    assert (printed.num_tokens, printed.num_accepted) == (33, 23)


def test_the_bench_tools_json():
    assert parse_bench("warning: something\n" + BENCH) == pytest.approx(0.011488029)


def test_output_that_lacks_its_end_is_an_error_and_no_number():
    with pytest.raises(PeerError, match="no timing lines"):
        parse_speculative(SPECULATIVE[: SPECULATIVE.index("n_accept")])
    with pytest.raises(PeerError, match="no timing"):
        parse_bench(BENCH[:60])
    with pytest.raises(PeerError, match="no timing"):
        parse_bench("[]")


def test_ids_come_from_the_text():
    prompt, new = [300, 301], [999, 300, 412]
    text = "\n\n" + "".join(map(piece, prompt + new)) + "\n"
    assert parse_ids(text, prompt, 2) == (999, 300)
    with pytest.raises(PeerError, match="5 pieces"):
        parse_ids(text, prompt, 4)
    with pytest.raises(PeerError, match="not the prompt"):
        parse_ids(text, [300, 302], 2)


def fake_tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    (folder / name).chmod(0o755)


def test_a_tool_whose_last_lines_got_lost_is_run_again(tmp_path):
    counter = tmp_path / "count"
    script = f'echo x >> {counter}\n[ "$(wc -l < {counter})" -ge 3 ] && echo whole || echo half'
    fake_tool(tmp_path, "tool", script)

    def read(out: str, _: str) -> str:
        if "whole" not in out:
            raise peer_llama_cpp._Incomplete("half")
        return out.strip()

    assert peer_llama_cpp._until_read([str(tmp_path / "tool")], read) == "whole"
    assert len(counter.read_text(encoding="ascii").split()) == 3


def test_a_tool_that_fails_says_so(tmp_path):
    fake_tool(tmp_path, "tool", "echo no such model >&2; exit 3")
    with pytest.raises(PeerError, match="tool ended with status 3: no such model"):
        peer_llama_cpp._call([str(tmp_path / "tool")])


def test_names_in_a_gguf_file():
    assert tensor_name("model.embed_tokens.weight") == "token_embd.weight"
    assert tensor_name("lm_head.weight") == "output.weight"
    assert tensor_name("model.layers.11.self_attn.o_proj.weight") == "blk.11.attn_output.weight"
    assert tensor_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"


def test_rotated_pairs_become_neighbours():
    """Row i of a head's first half stands beside row i of its second half."""
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def check(*names: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    peers.check(names, device, dtype)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"there are openvino and llama\.cpp=FOLDER"):
        check("vllm")
    with pytest.raises(InputError, match="name the folder"):
        check("llama.cpp")
    with pytest.raises(InputError, match=r"no llama-bench and no llama-completion .*build/bin"):
        check(f"llama.cpp={tmp_path}")
    for tool in peer_llama_cpp.TOOLS:
        fake_tool(tmp_path, tool, "exit 0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        check(f"llama.cpp={tmp_path}")
    with pytest.raises(InputError, match="pip install openvino-genai"):
        check("openvino")


def test_peers_run_on_the_cpu_in_float32_or_bfloat16(tmp_path, monkeypatch):
    for tool in peer_llama_cpp.TOOLS:
        fake_tool(tmp_path, tool, "exit 0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check(f"llama.cpp={tmp_path}", "openvino", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="--device cpu"):
        check("openvino", device="cuda")
    with pytest.raises(InputError, match="--dtype bf16"):
        check("openvino", dtype=torch.float16)


def test_a_gguf_file_holds_every_weight(tmp_path):
    gguf = pytest.importorskip("gguf")
    from specdec.bench.gguf_file import write_gguf

    pair = make_pair("tiny", dtype=torch.bfloat16)
    write_gguf(pair.target, tmp_path / "t.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "t.gguf").tensors}
    assert set(tensors) == {tensor_name(name) for name, _ in pair.target.named_parameters()}
    raw = torch.from_numpy(tensors["output.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(raw, pair.target.lm_head.weight)


ENGINE = """
import os, sys, time
from specdec.bench.peer_process import serve

def double(number):
    print("a library says hello")
    os.write(1, b"and so does its C part\\n")
    return 2 * number

def fail():
    raise ValueError("no such graph\\nand a second line")

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def die():
    sys.stderr.write("out of memory\\n")
    sys.stderr.flush()
    os._exit(3)

serve({"double": double, "fail": fail, "work": work, "die": die})
"""


@pytest.fixture
def engine(tmp_path, monkeypatch) -> Iterator[PeerProcess]:
    (tmp_path / "an_engine.py").write_text(ENGINE, encoding="ascii")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2]))))
    with PeerProcess("an_engine") as process:
        yield process


def test_a_process_answers_whatever_its_libraries_print(engine):
    assert engine.ask("double", number=21) == 42
    assert engine.ask("double", number=[1]) == [1, 1]


def test_a_failed_request_is_an_error_and_the_next_one_is_answered(engine):
    with pytest.raises(PeerError, match=r"^no such graph$"):
        engine.ask("fail")
    assert engine.ask("double", number=1) == 2


def test_a_process_that_ended_says_why(engine):
    for _ in range(2):
        with pytest.raises(PeerError, match="ended with status 3: out of memory"):
            engine.ask("die")


def test_it_ends_with_the_run(engine):
    with ExitStack() as stack:
        setting = peers.Setting(torch.float32, 1, (), 8, Path(), print, stack)
        process = setting.started(engine)
        assert process.ask("double", number=1) == 2
    assert engine._process.returncode == 0


def test_its_work_is_the_rows_own_and_nobody_elses(engine):
    """A machine on which nothing but this process and the engine runs: only a row that runs there may count it."""
    engine.ask("double", number=1)
    if not engine.cpu_seconds():
        pytest.skip("this system does not tell what another process used")

    def read() -> Reading:
        own = time.process_time()
        return Reading(time.perf_counter(), own + engine.cpu_seconds(), own)

    def run(_: object) -> rows.Made:
        engine.ask("work", seconds=0.2)
        return rows.Made((1,))

    there = rows.Method("there", "engine", rows.PLAIN, "there", "", run, cpu_seconds=engine.cpu_seconds)
    here = rows.Method("here", "engine", rows.PLAIN, "here", "", run)
    bench = runbench.run([there, here], [[1]], repetitions=1, gate=Gate(retries=0, read=read))
    assert bench.samples["there"][0][0].clean
    assert not bench.samples["here"][0][0].clean
    before = read()
    engine.ask("work", seconds=0.1)
    assert others_share(before, read(), tick=0) > 0


def test_openvino_gives_its_own_process_the_work_and_exact_float32_the_same_ids(tmp_path):
    for name in ("openvino_genai", "openvino_tokenizers"):
        pytest.importorskip(name)
    pair = make_pair("tiny", dtype=torch.float32)
    (prompt,) = make_prompts(pair.shape, 1, 16)
    expected = tuple(greedy_texts(pair.target, [prompt], 16)[0, 16:].tolist())
    with ExitStack() as stack:
        made = peers.open_peer("openvino", pair, peers.Setting(torch.float32, 1, (3,), 16, tmp_path, print, stack))
        plain, drafting = (method.run(prompt) for method in made)
        assert all(method.cpu_seconds and method.cpu_seconds() > 0 for method in made)
    assert plain.tokens == drafting.tokens == expected
    assert plain.steps == 16
    assert drafting.steps < 16
    assert plain.seconds
    assert plain.seconds > 0


@pytest.mark.parametrize(("weights", "error"), [("int8", 0.01), ("int4", 0.15)])
def test_openvino_products_on_rounded_weights_are_near_the_exact_ones(weights, error):
    ov = pytest.importorskip("openvino")
    from openvino import opset13 as ops

    from specdec.export.openvino import round_weights

    noise = np.random.default_rng(0)
    weight, rows_of = noise.standard_normal((48, 128), np.float32), noise.standard_normal((3, 128), np.float32)
    x = ops.parameter([-1, 128], ov.Type.f32)
    graph = ov.Model([ops.matmul(x, ops.constant(weight), False, True)], [x])
    assert round_weights(graph, weights) == 1
    out = ov.Core().compile_model(graph, "CPU", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})([rows_of])[0]
    expected = rows_of @ weight.T
    apart = np.abs(out - expected).mean() / np.abs(expected).mean()
    assert error / 20 < apart < error


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_gguf_files_hold_rounded_matrices(weights, bits, tmp_path):
    gguf = pytest.importorskip("gguf")
    from specdec.bench.gguf_file import LAYOUTS, write_gguf

    pair = make_pair("tiny", dtype=torch.bfloat16)
    write_gguf(pair.target, tmp_path / "model.gguf", weights)
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        matrix = len(tensor.shape) > 1
        assert tensor.tensor_type.name == (LAYOUTS[weights] if matrix else "F32")
        assert tensor.n_bytes * 8 == tensor.n_elements * (bits if matrix else 32)
