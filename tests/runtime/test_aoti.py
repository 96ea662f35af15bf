"""Packages that start without a compiler: the step of the compiled backend, its bits, and who may open them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from specdec.drafters import MedusaDrafter, ModelDrafter, NgramDrafter
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec import cli
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.export import aoti
from specdec.export.aoti import EXPECTED, KERNELS, PROGRAM, WEIGHTS, AotiOptions
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError, Manifest, listed
from specdec.formats.medusa_heads import HeadShape, MedusaHeads
from specdec.policy import Fixed
from specdec.runtime import graph
from specdec.runtime.backend import Step
from specdec.runtime.backends.aoti import AotiBackend, check_machine
from specdec.runtime.backends.compiled import CompiledBackend
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


@pytest.fixture(scope="module")
def artifact() -> ArtifactModel:
    return ArtifactModel.open(tiny_artifacts.exported("aoti"))


@pytest.fixture(scope="module")
def decoder(artifact: ArtifactModel) -> specdec.SpeculativeDecoder:
    draft = ModelDrafter(tiny_models.noisy(tiny_artifacts.model(), 0.02), backend="eager")
    return specdec.SpeculativeDecoder(artifact, drafter=draft, policy=Fixed(3, (3, 2)))


def expected(prompt: list[int], count: int, **options: Any) -> list[int]:
    return tiny_models.reference(tiny_artifacts.model(), prompt, count, **options)


def test_texts_are_those_of_the_model(decoder: specdec.SpeculativeDecoder) -> None:
    assert decoder.backend.describes.startswith("aoti, native kernels")
    assert decoder.backend.numerics == "invariant"
    for options in ({}, {"temperature": 0.7, "top_k": 8, "repetition_penalty": 1.2, "seed": 5}):
        text = expected(PROMPT, 40, **options)
        assert decoder.generate_plain(PROMPT, max_new_tokens=40, **options).tokens == text
        out = decoder.generate(PROMPT, max_new_tokens=40, strict=True, **options)
        assert out.tokens == text
        assert 0.05 < out.stats.draft_acceptance_rate < 1
    assert decoder.generate(PROMPT, max_new_tokens=24, exact=True).tokens == expected(PROMPT, 24)
    prompts = [[3, 5, 7], [8, 9], [1, 2, 3, 4, 5]]
    texts = [out.tokens for out in decoder.generate(prompts, max_new_tokens=10, strict=True)]
    assert texts == [expected(prompt, 10) for prompt in prompts]


def test_a_row_has_the_same_bits_in_every_step_and_those_of_the_compiled_backend(artifact: ArtifactModel) -> None:
    opened = AotiBackend.open(artifact)
    compiled = CompiledBackend.open(tiny_artifacts.model(), compile="never")
    compiled.expose((0, 1, 2))
    compiled._shared.take(graph.Graph(artifact.folder / PROGRAM, graph.tensors(compiled._shared.native)))
    rows = []
    for backend, tree in ((opened, (9, 8, 7, 6, 5)), (opened, (9,)), (compiled, (9, 8, 7))):
        session = Session(backend.fork(0))
        session.append(PROMPT)
        rows.append(session.forward(TokenTree.chain(list(tree))).logits[:2])
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_keys_and_values_in_fewer_bits(artifact: ArtifactModel) -> None:
    small, usual = open_backend(artifact, kv_cache="int8"), AotiBackend.open(artifact)
    assert small.describes.endswith("keys and values in int8")
    assert small.bytes_per_token <= 0.5 * usual.bytes_per_token
    made = specdec.SpeculativeDecoder(artifact, drafter=NgramDrafter(), policy=Fixed(3))
    made.backend = small
    text = made.generate_plain(PROMPT, max_new_tokens=30).tokens
    assert made.generate(PROMPT, max_new_tokens=30, strict=True).tokens == text
    with pytest.raises(InputError, match="takes kv_cache= and no other option"):
        AotiBackend.open(artifact, compile="now")


def whole(text: list[int]) -> Step:
    """All of a text in one step."""
    rows = torch.arange(len(text))
    return Step(torch.tensor(text), 0, torch.ones(len(text), len(text), dtype=torch.bool).tril(), rows, 0, 1)


def test_more_rows_than_the_graph_takes_go_in_several_calls(
    artifact: ArtifactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = AotiBackend.open(artifact)
    calls: list[int] = []
    run = opened.family.call  # type: ignore[attr-defined]
    monkeypatch.setattr(opened.family, "call", lambda given: calls.append(given[0].shape[1]) or run(given))
    monkeypatch.setattr(graph, "MAX_ROWS", 5)
    texts = [[3, 5, 7], [8, 9], [1, 2, 3, 4]]
    found = AotiBackend.forward_many([opened.fork(0) for _ in texts], [whole(text) for text in texts])
    for text, result in zip(texts, found, strict=True):
        right = tiny_models.cache_free(tiny_artifacts.model(), text)
        torch.testing.assert_close(result.logits[-1], right, rtol=1e-4, atol=1e-4)
    assert len(calls) > 1
    assert max(calls) <= 5
    assert sum(calls) == 9
    with pytest.raises(InputError, match="a step of 6 rows: the graph takes 5"):
        opened.fork(0).forward(whole([1] * 6))


def test_drafts_and_hidden_states(artifact: ArtifactModel) -> None:
    heads = tiny_models.randomize(MedusaHeads(HeadShape(3, 1, 16, TEXT_VOCAB, TEXT_VOCAB, "tied")), 0.03, 0)
    made = specdec.SpeculativeDecoder(artifact, drafter=MedusaDrafter(artifact, heads), policy=Fixed(3, (3, 2)))
    out = made.generate(PROMPT, max_new_tokens=20, strict=True)
    assert out.tokens == expected(PROMPT, 20)
    assert out.stats.num_draft_tokens > 20
    target = tiny_models.noisy(tiny_artifacts.model(), 0.02)
    drafted = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(artifact), policy=Fixed(3), backend="eager")
    out = drafted.generate(PROMPT, max_new_tokens=30)
    assert out.tokens == tiny_models.reference(target, PROMPT, 30)
    assert out.stats.num_accepted_draft_tokens > 0
    with pytest.raises(InputError, match=r"hidden state 3 .*gives 0, 1, 2 only.*--hidden 0,1,2,3"):
        made.backend.expose((3,))
    with pytest.raises(IncompatiblePairError, match="keeps its slots to itself"):
        specdec.SpeculativeDecoder(artifact, drafter="early_exit", policy=Fixed(3))


def test_weights_by_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_artifacts.needs("aoti")
    whole = tiny_models.tiny("mistral", dtype=torch.float32, num_hidden_layers=1)
    whole.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("SPECDEC_CACHE", str(tiny_artifacts._folder("aoti")))  # compiled once per machine
    out = ["--max-seq-len", "96", "--out", str(tmp_path / "out")]
    assert cli.main(["export", str(tmp_path / "model"), "--backend", "aoti", "--recipe", "int8", *out]) == 0
    assert "8 layers in int8" in " ".join(capsys.readouterr().out.split())
    rounded = ArtifactModel.open(tmp_path / "out")
    made = specdec.SpeculativeDecoder(rounded, drafter=NgramDrafter(), policy=Fixed(3))
    assert "int8 weights" in made.backend.describes
    from specdec.quant.methods import prepare_model

    text = tiny_models.reference(prepare_model(whole, "int8"), PROMPT, 30)
    assert made.generate_plain(PROMPT, max_new_tokens=30).tokens == text
    assert made.generate(PROMPT, max_new_tokens=30, strict=True).tokens == text
    session = Session(made.backend.fork(0))
    session.append(PROMPT)
    right = tiny_models.cache_free(whole, PROMPT)
    assert 1e-4 < float((session.forward().logits[-1] - right).abs().max() / right.abs().max()) < 0.1
    sizes = rounded.manifest.about["sizes"]
    assert sizes["stored_bytes"] < 0.6 * sizes["weight_bytes"]
    with pytest.raises(InputError, match="int9"):
        AotiOptions(recipe="int9")


# Who may open it.

_START = """
import json, shutil, sys
from pathlib import Path
assert not any(shutil.which(name) for name in ("c++", "g++", "gcc", "cc", "clang", "clang++", "ninja")), "a compiler"
import specdec
from specdec.policy import Fixed
decoder = specdec.load(sys.argv[1], drafter="ngram", policy=Fixed(3))
from specdec.kernels import ops
print(json.dumps({
    "library": str(ops.library),
    "tokens": list(decoder.generate([3, 5, 7, 3, 5, 7, 3, 5], max_new_tokens=20, strict=True).tokens),
    "describes": decoder.backend.describes,
    "cache": Path(sys.argv[2]).exists(),
}))
"""


def test_it_starts_where_no_compiler_is(artifact: ArtifactModel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"  # where nothing was compiled before
    kept = {k: v for k, v in os.environ.items() if k not in ("PATH", "CXX", "CC")}
    (tmp_path / "bin").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _START, str(artifact.folder), str(cache)],
        capture_output=True, text=True, cwd=tmp_path,
        env={**kept, "PATH": str(tmp_path / "bin"), "SPECDEC_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["tokens"] == expected(PROMPT, 20)
    assert "one compiled graph" in found["describes"]
    assert found["library"] == str(artifact.folder / KERNELS) or "prebuilt" in found["library"]
    assert not found["cache"]
    assert "compiling" not in done.stderr


def copied(artifact: ArtifactModel, target: Path) -> Path:
    """A copy that may be changed: nothing of it is a link."""
    shutil.copytree(artifact.folder, target)
    return target


def signed(folder: Path, **changes: Any) -> Path:
    """The folder again with a manifest that fits its files: whoever changes a file can change that too."""
    old = Manifest.read(folder, check_files=False)
    contract = {name: {**old.contract[name], **changes.get(name, {})} for name in ("options", "model", "versions")}
    Manifest({"backend": old.contract["backend"], **contract}, listed(folder), old.about).write(folder)
    return folder


def test_what_was_changed_is_refused_before_any_of_its_code_runs(artifact: ArtifactModel, tmp_path: Path) -> None:
    for index, name in enumerate((PROGRAM, KERNELS, WEIGHTS)):
        folder = copied(artifact, tmp_path / str(index))
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=rf"files.{name}.sha256 is"):
            ArtifactModel.open(folder)
        if name != WEIGHTS:  # a manifest made to fit: the weights know which code they were exported with
            with pytest.raises(ArtifactError, match=rf"files.{name} is not the file"):
                AotiBackend.open(ArtifactModel.open(signed(folder)))
    folder = signed(copied(artifact, tmp_path / "options"), options={"max_seq_len": 90})
    with pytest.raises(ArtifactError, match=r"options.max_seq_len is 90 in the manifest and 96 in what lies there"):
        AotiBackend.open(ArtifactModel.open(folder))
    (folder / KERNELS).unlink()
    with pytest.raises(ArtifactError, match=r"kernels.so is missing"):
        ArtifactModel.open(folder)


def test_a_package_that_computes_something_else_is_refused(artifact: ArtifactModel, tmp_path: Path) -> None:
    folder = copied(artifact, tmp_path / "wrong")
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    stored = load_file(folder / WEIGHTS)
    name = next(name for name in stored if "up_proj" in name)
    save_file({**stored, name: stored[name] * 1.5}, folder / WEIGHTS, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"logits are off by .* from those at the export"):
        AotiBackend.open(ArtifactModel.open(signed(folder)))
    assert EXPECTED in stored


def test_machine_code_for_something_else_is_refused_by_field(
    artifact: ArtifactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = artifact.manifest.contract["versions"]
    check_machine(versions)
    for name, value in (("torch", "2.99.0"), ("kernels", "0" * 24), ("step", "1")):
        with pytest.raises(ArtifactError, match=rf"versions.{name} is '{value}' in the artefact and '.*' here"):
            check_machine({**versions, name: value})
    with pytest.raises(ArtifactError, match=r"versions.instructions of the artefact has avx1024, which .* lacks"):
        check_machine({**versions, "instructions": f"{versions['instructions']} avx1024"})
    monkeypatch.setattr("specdec.runtime.backends.aoti.instructions", lambda: f"{aoti.instructions()} avx1024")
    check_machine(versions)  # more than is needed
    with pytest.raises(UnsupportedModelError, match=r"runs exported artefacts.*--backend aoti"):
        AotiBackend.open(tiny_artifacts.model())


def test_options_that_mean_nothing_here_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ({"k": (0, 3)}, {"prefill_len": 32}, {"max_nodes": 16}):
        with pytest.raises(InputError, match="leave prefill_len, k and max_nodes out"):
            AotiOptions(**wrong)
    assert cli.main(["export", "--backend", "aoti", "--k", "0,3"]) == 2
    assert "any number of rows" in capsys.readouterr().err
    assert cli.main(["export", "--backend", "aoti", "--device", "GPU"]) == 2
    assert "the aoti backend has no option 'device'" in capsys.readouterr().err


def test_commands(artifact: ArtifactModel, tmp_path: Path) -> None:
    common = ("--artifact", str(artifact.folder), "--threads", "1", "--max-new-tokens", "12")
    assert cli.main(["generate", "import os", *common, "--k", "3", "--json", str(tmp_path / "text.json")]) == 0
    made = json.loads((tmp_path / "text.json").read_text())
    assert made["tokens"] == expected(byte_tokenizer()("import os")["input_ids"], 12)
    (tmp_path / "prompts.txt").write_text("import os\ndef f(x):\n")
    report = tmp_path / "report.json"
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--repetitions", "1", "--warmup", "0"]
    arguments += ["--drafter-artifact", str(artifact.folder), "--k", "2", "--json", str(report)]
    assert cli.main(["compare", *common, *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["identical"] == found["prompts"] == 2
    assert found["stats"]["draft_acceptance_rate"] == 1.0  # it drafts for itself
