"""Artefacts of ExecuTorch decode as the model does: every drafter, trees, draft artefacts, batches, reused prompts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_dflash
import tiny_eagle
import tiny_models
import torch
from specdec.drafters import EagleDrafter, HybridDrafter, MedusaDrafter, ModelDrafter, NgramDrafter
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec import cli, registry
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.formats.medusa_heads import HeadShape, MedusaHeads
from specdec.policy import Fixed
from specdec.runtime.session import Session
from specdec.tree import TokenTree
from specdec.tree_policy import StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


@pytest.fixture(scope="module")
def artifact() -> Any:
    tiny_artifacts.needs_executorch()
    from specdec.export.artifact import ArtifactModel

    return ArtifactModel.open(tiny_artifacts.exported())


@pytest.fixture(scope="module")
def decoder(artifact: Any) -> specdec.SpeculativeDecoder:
    draft = ModelDrafter(tiny_models.noisy(tiny_artifacts.model(), 0.02), backend="eager")
    return specdec.SpeculativeDecoder(artifact, drafter=draft, policy=Fixed(3))


def expected(prompt: list[int], count: int, **options: Any) -> list[int]:
    return tiny_models.reference(tiny_artifacts.model(), prompt, count, **options)


# Decoding on an artefact.


def test_plain_and_speculative_texts_are_those_of_the_model(decoder: specdec.SpeculativeDecoder) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.7, "top_k": 8, "repetition_penalty": 1.2}):
        text = expected(PROMPT, 40, **options)
        assert decoder.generate_plain(PROMPT, max_new_tokens=40, **options).tokens == text
        out = decoder.generate(PROMPT, max_new_tokens=40, strict=True, **options)
        assert out.tokens == text
        assert 0.2 < out.stats.draft_acceptance_rate < 1  # both acceptance and rejection were met


@pytest.mark.parametrize("name", ["model", "ngram", "suffix", "lookahead", "hybrid", "self", "none"])
def test_every_drafter_of_chains_and_trees_keeps_the_text(decoder: specdec.SpeculativeDecoder, name: str) -> None:
    made = {
        "model": lambda: decoder.drafter,
        "self": lambda: ModelDrafter(decoder.target),  # the artefact drafts for itself: texts take turns in one program
        "hybrid": lambda: HybridDrafter(NgramDrafter(), decoder.drafter),
    }.get(name, lambda: registry.create("drafter", name))()
    text = expected(PROMPT, 30)
    trees = (Fixed(3, (3, 2)), StaticTree((-1, -1, 0, 0, 1, 2, 2, 5))) if made.trees else ()
    for policy in (Fixed(1), Fixed(3), Fixed(7), *trees):
        out = decoder.generate(PROMPT, max_new_tokens=30, strict=True, drafter=made, policy=policy)
        assert out.tokens == text, policy.name


@pytest.mark.parametrize("name", ["eagle", "medusa", "parallel"])
def test_drafters_that_read_hidden_states(artifact: Any, name: str) -> None:
    """They share embeddings and output head with the target: the artefact brings both along."""
    model = tiny_artifacts.model()
    text = expected(PROMPT, 30)
    if name == "eagle":
        made: Any = EagleDrafter(tiny_eagle.fitted(copy.deepcopy(model).double(), PROMPT + text).float())
    elif name == "medusa":
        heads = MedusaHeads(HeadShape(3, 1, 16, TEXT_VOCAB, TEXT_VOCAB, "tied"))
        made = MedusaDrafter(artifact, tiny_models.randomize(heads, 0.03, 0))
    else:
        made = tiny_dflash.drafter(artifact, tiny_dflash.fitted(model, PROMPT + text))
    for policy in (Fixed(3), Fixed(3, (3, 2))):
        decoder = specdec.SpeculativeDecoder(artifact, drafter=made, policy=policy)
        out = decoder.generate(PROMPT, max_new_tokens=30, strict=True)
        assert out.tokens == text
        usual = specdec.SpeculativeDecoder(model, drafter=made, policy=policy, backend="eager")
        stats = usual.generate(PROMPT, max_new_tokens=30, strict=True).stats
        assert stats.num_accepted_draft_tokens == out.stats.num_accepted_draft_tokens
        assert out.stats.num_draft_tokens > 20
        assert out.stats.num_accepted_draft_tokens > 0 or name == "medusa"  # whose heads learned nothing


def test_an_artifact_drafts_for_a_model_in_torch(artifact: Any) -> None:
    target = tiny_models.noisy(tiny_artifacts.model(), 0.02)
    text = tiny_models.reference(target, PROMPT, 30)
    accepted = []
    for draft in (ModelDrafter(artifact), ModelDrafter(tiny_artifacts.model(), backend="eager")):
        out = specdec.SpeculativeDecoder(target, drafter=draft, policy=Fixed(3)).generate(PROMPT, max_new_tokens=30)
        assert out.tokens == text
        accepted.append(out.stats.num_accepted_draft_tokens)
    assert accepted[0] == accepted[1] > 0  # the same draft, on another backend


def test_texts_take_turns_in_one_program(decoder: specdec.SpeculativeDecoder) -> None:
    prompts = [[3, 5, 7], [8, 9], [1, 2, 3, 4, 5], [60]]
    texts = [out.tokens for out in decoder.generate(prompts, max_new_tokens=12, strict=True)]
    assert texts == [expected(prompt, 12) for prompt in prompts]


def test_one_text_exchanges_nothing(decoder: specdec.SpeculativeDecoder) -> None:
    program = decoder.backend.family
    before = program.num_swaps
    decoder.generate(PROMPT, max_new_tokens=30, reuse_prefix=False)
    assert program.num_swaps == before + 1


def test_a_committed_branch_copies_nothing(artifact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.runtime.backends.executorch import ExecutorchBackend

    session = Session(tiny_artifacts.opened().fork(0))
    session.append(PROMPT)
    session.forward(TokenTree.of([9, 8, 7], [-1, -1, 1]))
    called: list[str] = []
    program = session.backend._program
    call = program.call
    monkeypatch.setattr(program, "call", lambda name, inputs: called.append(name) or call(name, inputs))
    session.commit([1, 2], [8, 7, 6])
    assert called == []
    row = session.forward().logits[-1]
    assert called == ["step_1"]
    torch.testing.assert_close(
        row, tiny_models.cache_free(tiny_artifacts.model(), [*PROMPT, 8, 7, 6]), rtol=1e-4, atol=1e-4
    )
    assert isinstance(session.backend, ExecutorchBackend)


def test_what_was_not_exported_is_refused(decoder: specdec.SpeculativeDecoder, artifact: Any) -> None:
    with pytest.raises(IncompatiblePairError, match="room for trees of 16 nodes, not 39"):
        decoder.generate(PROMPT, policy=Fixed(3, (3, 3, 3)))
    with pytest.raises(InputError, match=r"hidden state 3 .*gives 0, 1, 2 only.*--hidden 0,1,2,3"):
        decoder.backend.expose((3,))
    for name in ("early_exit", "self_quant"):
        with pytest.raises(IncompatiblePairError, match=f"the {name} drafter .* keeps its slots to itself"):
            specdec.SpeculativeDecoder(artifact, drafter=name, policy=Fixed(3))
    with pytest.raises(UnsupportedModelError, match=r"runs exported artefacts.*specdec export"):
        specdec.SpeculativeDecoder(tiny_artifacts.model(), backend="executorch")
    with pytest.raises(UnsupportedModelError, match="runs on the executorch backend"):
        specdec.SpeculativeDecoder(artifact, backend="eager")
    with pytest.raises(UnsupportedModelError, match="no weights"):
        artifact(torch.zeros(1, 1))
    with pytest.raises(InputError, match="the prompt has 96 tokens"):
        decoder.generate([1] * 96)


def test_memory_is_told(decoder: specdec.SpeculativeDecoder) -> None:
    backend = decoder.backend.fork(0)
    shape = tiny_artifacts.model().config
    size = shape.hidden_size // shape.num_attention_heads
    assert backend.bytes_per_token == 2 * 2 * shape.num_key_value_heads * size * 4
    assert backend.num_bytes == 0
    assert backend.bytes_for(1) == backend.bytes_for(96) == backend.bytes_per_token * (96 + 16 + 1)
    session = Session(backend)
    session.append(PROMPT)
    session.forward()
    assert backend.num_bytes == backend.bytes_for(96)


# The commands, without the original weights.


def test_generate_and_compare_run_from_the_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_artifacts.needs_executorch()
    folder = str(tiny_artifacts.exported())
    common = ("--artifact", folder, "--threads", "1", "--max-new-tokens", "12")
    assert cli.main(["generate", "import os", *common, "--k", "3", "--json", str(tmp_path / "text.json")]) == 0
    made = json.loads((tmp_path / "text.json").read_text())
    assert made["tokens"] == expected(byte_tokenizer()("import os")["input_ids"], 12) == made["tokens"][:12]
    assert made["drafter"] == "ngram"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import os\ndef f(x):\n")
    report = tmp_path / "report.json"
    arguments = ["--prompts", str(prompts), "--repetitions", "1", "--warmup", "0", "--json", str(report)]
    assert cli.main(["compare", *common, "--drafter-artifact", folder, "--k", "2", *arguments]) == 0
    found = json.loads(report.read_text())
    assert found["identical"] == found["prompts"] == 2
    assert found["parameters"]["target"] == sum(p.numel() for p in tiny_artifacts.model().parameters())
    assert "executorch on xnnpack, graphs of 1, 4, 8 rows" in found["backend"]
    assert found["stats"]["draft_acceptance_rate"] == 1.0  # it drafts for itself
    capsys.readouterr()
    assert cli.main(["generate", "x", "--artifact", folder, "--target", "org/model"]) == 2
    assert "--artifact stands for a --target" in capsys.readouterr().err
    assert cli.main(["generate", "x", "--artifact", str(tmp_path)]) == 2
    assert "is no artefact: it has no manifest.json" in capsys.readouterr().err
    assert cli.main(["export", folder]) == 2
    assert "is an artefact already" in capsys.readouterr().err


# The negative control of shared buffers, and the size of several graphs.


def _sizes_and_faults(folder: Path) -> str:
    """In a process of its own, for the fault is one of memory.

    The wide graph's rows take more room than its slots, so that its slots stand elsewhere than those of the narrow one.
    """
    return f"""
import torch, tiny_models, sys
from pathlib import Path
from specdec.export import executorch
from specdec.export.executorch import ExecutorchOptions
from specdec.export.step import StaticStep, HIDDEN
from specdec.export.artifact import ArtifactModel, contract_of
from specdec.export.manifest import Manifest, listed
from specdec.runtime.backends.executorch import ExecutorchBackend
shape = dict(num_hidden_layers=1, hidden_size=256, intermediate_size=512, head_dim=64)
model = tiny_models.tiny("llama", dtype=torch.float32, **shape)
sizes = []
executorch.load_operators()
for k, prefill, shared in (((0,), 1, True), ((0, 3), 32, True), ((0,), 32, False)):
    options = ExecutorchOptions(prefill_len=prefill, k=k, max_seq_len=32, max_nodes=0, share_buffers=shared)
    step = StaticStep(model, options.num_slots)
    path = Path({str(folder)!r}) / f"{{prefill}}{{shared}}" / "model.pte"
    path.parent.mkdir()
    contract = contract_of(model, step, options)
    executorch.Lowered(executorch.trace(step, options), options, contract).write(path)
    model.config.save_pretrained(path.parent)
    Manifest(contract, listed(path.parent)).write(path.parent)
    try:
        ExecutorchBackend.open(ArtifactModel.open(path.parent))
        print("opened")
    except Exception as error:
        print("refused:", error)
    sizes.append(path.stat().st_size)
print(sizes[0], sizes[1], sum(p.nbytes for p in model.parameters()))
from executorch.runtime import Runtime
tokens = [3, 5, 7, 9, 11]
right = tiny_models.cache_free(model, tokens)
for shared in (True, False):
    program = Runtime.get().load_program(Path({str(folder)!r}) / f"32{{shared}}" / "model.pte")
    run = {{name: program.load_method(name) for name in ("prefill_32", "step_1", "swap")}}
    run["swap"].execute([torch.zeros(1, 33, h, 64) for h in (2, 2)])
    mask = torch.full((32, 33), HIDDEN)
    mask[:4, :4] = torch.where(torch.ones(4, 4).tril() > 0, 0.0, HIDDEN)
    slots = torch.tensor([0, 1, 2, 3] + [32] * 28)
    ids = torch.tensor(tokens[:4] + [0] * 28)
    run["prefill_32"].execute([ids, torch.arange(32), slots, torch.tensor([3]), mask])
    mask = torch.full((1, 33), HIDDEN)
    mask[0, :5] = 0
    at = torch.tensor([4])
    logits = run["step_1"].execute([torch.tensor(tokens[4:]), at, at, mask])[0][0]
    print(float((logits - right).abs().max() / right.abs().max()))
"""


def test_weights_are_stored_once_and_without_shared_buffers_it_is_wrong(tmp_path: Path) -> None:
    tiny_artifacts.needs_executorch()
    tests = Path(tiny_models.__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _sizes_and_faults(tmp_path)],
        capture_output=True, text=True, cwd=tests,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *opened, sizes, right, wrong = done.stdout.strip().splitlines()[-6:]
    one, three, weights = map(int, sizes.split())
    assert one >= weights
    assert three <= 1.05 * one
    assert float(right) < 1e-4
    assert not float(wrong) < 1e-2  # NaN too
    assert opened[:2] == ["opened", "opened"]
    assert "is not there for the other graphs" in opened[2]
