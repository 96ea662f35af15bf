"""The parallel drafter in the loop, and its training: the same numbers however they are come by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dflash
import tiny_models
import torch
from safetensors.torch import load_file
from specdec.drafters import ParallelDrafter

import specdec
from specdec import loading
from specdec.drafter import BuildContext
from specdec.errors import IncompatiblePairError, InputError
from specdec.formats import dflash as files
from specdec.generation import Stream
from specdec.models.dflash import spread_layers
from specdec.models.dflash_anchors import anchored_hidden
from specdec.models.dflash_text import DFlashContext, DFlashNetwork
from specdec.policy import Fixed, Policy
from specdec.train import provenance
from specdec.train.data import Rows, TrainingData
from specdec.train.dflash import DFlashObjective
from specdec.train.objective import Acceptance, create
from specdec.train.settings import Settings
from specdec.train.trainer import look, train
from specdec.tree_policy import DynamicTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("gpt-neox")


@pytest.fixture(scope="module")
def learned(target: Any) -> Any:
    return tiny_dflash.fitted(target, PROMPT + tiny_models.reference(target, PROMPT, 30), layer_ids=(2, 0))


@pytest.mark.parametrize("policy", [Fixed(4), Fixed(2), Fixed(3, (3, 2)), DynamicTree(8, 4, 3)])
def test_every_round_reads_the_verified_text(target: Any, learned: Any, policy: Policy) -> None:
    """Whatever was accepted, and from whichever branch: the rows are those of the text alone, computed plainly."""
    made = tiny_dflash.drafter(target, learned)
    table, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    decoder = specdec.SpeculativeDecoder(target, drafter=made, policy=policy)
    task = decoder.prepare(PROMPT, max_new_tokens=24, strict=True)
    proposing, seen = made.propose, []

    def watched(state: Any, plan: Any, chance: Any) -> Any:
        if plan.depth:
            tokens = list(task.target.tokens)
            states = target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            read = [states[i][0, :-1] for i in (2, 0)]
            mask = learned.mask_embedding.double()
            plain = tiny_dflash.says(learned.state_dict(), read, tokens[-1], table, head, mask, block=5)
            found = state.text.logits(tokens[-1], 4)
            assert (found - plain).abs().max() <= 1e-9
            seen.append(len(tokens))
        return proposing(state, plan, chance)

    made.propose = watched
    with torch.no_grad():
        for _ in Stream(task):
            pass
    assert len(seen) == len(set(seen)) > 3
    assert task.ending.tokens == tiny_models.reference(target, PROMPT, 24)


def test_some_of_it_is_accepted(target: Any, learned: Any) -> None:
    """So that the tests above go through acceptance and rejection both."""
    out = specdec.SpeculativeDecoder(target, drafter=tiny_dflash.drafter(target, learned), policy=Fixed(4)).generate(
        PROMPT, max_new_tokens=40
    )
    assert 0.1 < out.stats.draft_acceptance_rate < 0.95
    assert {0, 4} <= set(out.stats.acceptance_histogram)


def test_more_than_a_block_is_never_proposed(target: Any, learned: Any) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=tiny_dflash.drafter(target, learned), policy=Fixed(9))
    out = decoder.generate(PROMPT, max_new_tokens=30, strict=True)
    assert max(r.depth_proposed for r in out.trace.rounds) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_and_a_prompt_that_begins_alike(target: Any, learned: Any, temperature: float) -> None:
    prompt = (PROMPT * 20)[:150]  # longer than the first chunk of a prefill, so that its beginning is reused
    prompts = [[*prompt, 9], [*prompt, 11, 4], PROMPT]
    decoder = specdec.SpeculativeDecoder(target, drafter=tiny_dflash.drafter(target, learned), policy=Fixed(4))
    outs = decoder.generate(prompts, max_new_tokens=16, temperature=temperature, seed=2, strict=True)
    for given, out in zip(prompts, outs, strict=True):
        fresh = specdec.SpeculativeDecoder(
            target, drafter=tiny_dflash.drafter(target, learned), policy=Fixed(4), prefix_cache=0
        )
        alone = fresh.generate(given, max_new_tokens=16, temperature=temperature, seed=2, strict=True)
        assert out.tokens == alone.tokens == tiny_models.reference(target, given, 16, temperature=temperature, seed=2)
        assert [r.num_accepted for r in out.trace.rounds] == [r.num_accepted for r in alone.trace.rounds]
    again = decoder.generate(prompts[0], max_new_tokens=16, temperature=temperature, seed=2, strict=True)
    assert again.stats.num_reused_tokens == 128
    assert [r.num_accepted for r in again.trace.rounds] == [r.num_accepted for r in outs[0].trace.rounds]


def test_slots_grow_with_the_text_and_by_it_alone(target: Any) -> None:
    network = DFlashNetwork(target, tiny_dflash.random_model(tiny_dflash.config(target)), "eager")
    text = network.open()
    features = torch.randn(300, 48, dtype=torch.float64)
    sizes = []
    for i in range(300):
        text.append(features[i : i + 1])
        kv = text.slots.kv
        assert kv is not None
        sizes.append(kv.shape[3])
    assert sorted(set(sizes)) == [128, 256, 512]  # buckets: two copies in 300 tokens
    assert network.bytes_for(300) == kv.nbytes
    once = network.open()
    once.append(features)
    assert (once.logits(3, 4) - text.logits(3, 4)).abs().max() < 1e-12


def test_the_users_draft_stays_as_it_is(target: Any, learned: Any) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in learned.state_dict().items()}
    tiny_dflash.drafter(target, learned).network.open().logits(3, 2)
    for name, tensor in learned.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.dtype == torch.float32


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize(("layers", "causal"), [({}, ()), (SLIDING, (False, True)), (SLIDING, (False, False))])
def test_training_sees_what_drafting_sees(target: Any, layers: dict, causal: tuple[bool, ...], anchor: bool) -> None:
    config = tiny_dflash.DFlashConfig(
        tiny_dflash.shape(target, **layers), 5, (0, 1, 2), causal=causal, sample_from_anchor=anchor
    )
    model = tiny_dflash.random_model(config)
    tokens, features = torch.randint(0, 64, (2, 20)), torch.randn(2, 20, 48, dtype=torch.float64)
    table = target.get_input_embeddings().weight
    anchors = torch.tensor([[0, 3, 10, 15], [1, 2, 7, 19]])
    with torch.no_grad():
        hidden = anchored_hidden(model, features, tokens, anchors, table)
        assert hidden.shape[2] == (5 if anchor else 4)
        for row in range(2):
            for at, position in enumerate(anchors[row].tolist()):
                context = DFlashContext(model)
                for first in range(0, position, 4):
                    context.append(features[row, first : min(first + 4, position)])
                alone = context.hidden(int(tokens[row, position]), config.num_positions, table)
                assert (alone - hidden[row, at]).abs().max() < 1e-11


def _objective(target: Any, **options: Any) -> DFlashObjective:
    made = create(DFlashObjective, target, None, **{"block": 4, "anchors": 8, "target_layers": (1, 2), **options})
    assert isinstance(made, DFlashObjective)
    return made


def test_held_out_acceptance_is_what_a_round_would_accept(target: Any) -> None:
    """Against a draft opened on each start's own text."""
    objective = _objective(target)
    objective.module.double().eval()
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 15:] = False
    batch = look(target, tokens, mask, objective.hidden)
    with torch.no_grad():
        overlap, agree = objective.acceptance(batch)
    network = DFlashNetwork(target, objective.module, "eager")
    expected = []
    for row, end in ((0, 24), (1, 15)):
        for start in range(end - 2):
            text = network.open()
            text.append(torch.cat([batch.hidden[i][row, :start] for i in (1, 2)], -1))
            q = text.logits(int(tokens[row, start]), 3).softmax(-1)
            p = batch.logits_BLV[row, start : start + 3].softmax(-1)
            both = torch.minimum(p, q).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()
            expected.append(torch.stack(both))
    want = torch.stack(expected)
    # Starts come in pieces of some anchors of every row; as sets of rows they are the same.
    order, wanted = overlap[:, 0].sort().indices, want[:, 0, 0].sort().indices
    torch.testing.assert_close(overlap[order], want[wanted, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(agree[order], want[wanted, 1])


def test_later_positions_weigh_less_and_masked_ones_nothing(target: Any) -> None:
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    objective = _objective(target, gamma=2.0, anchors=100)
    weights = objective.weights_K / objective.weights_K[0]
    assert weights.tolist() == pytest.approx([1.0, np.exp(-0.5), np.exp(-1.0)])
    objective.module.double()
    mask[1, 10:] = False
    with torch.no_grad():
        clean = objective.loss(look(target, tokens, mask, objective.hidden)).loss
        changed = tokens.clone()
        changed[1, 13:] = 0  # position 9 is the last that counts, and its blocks reach 12
        same = objective.loss(look(target, changed, mask, objective.hidden)).loss
        mask[1] = False
        first = objective.loss(look(target, tokens, mask, objective.hidden)).loss
    assert clean == pytest.approx(float(same), rel=1e-9)
    assert abs(float(first - clean)) > 1e-6


@pytest.mark.parametrize("mask_token", [None, 63])
def test_trained_saved_loaded_exported(target: Any, tmp_path: Path, mask_token: int | None) -> None:
    text = (PROMPT + tiny_models.reference(target, PROMPT, 56)) * 2
    rows = Rows.full(np.array([text[:64], text[16:80]], dtype=np.int32))
    objective = _objective(target, mask_token=mask_token, kv_heads=2)
    settings = Settings(out=tmp_path / "out", steps=40, batch=2, lr=1e-2, evaluations=2, judged_at=0)
    torch.manual_seed(0)
    report = train(objective, TrainingData(rows, rows, {}), settings)
    curve = [row["expected_length_t0"] for row in report.curve]
    assert report.best["expected_length_t0"] > curve[0] + 0.3

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["specdec_drafter"] == "parallel"
    made = loading.resolve_drafter(str(tmp_path / "out"), BuildContext(target))
    assert isinstance(made, ParallelDrafter)
    assert made.hidden == (1, 2)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert ("mask_embedding" in stored) == (mask_token is None)
    out = specdec.SpeculativeDecoder(target, drafter=made, policy=Fixed(3)).generate(PROMPT, max_new_tokens=40)
    assert out.tokens == tiny_models.reference(target, PROMPT, 40)
    assert out.stats.mean_acceptance_length > 1.2

    going_on = _objective(target, init=str(tmp_path / "out"))
    assert going_on.hidden == (1, 2)
    assert all(torch.equal(stored[name].float(), tensor) for name, tensor in going_on.module.state_dict().items())

    if mask_token is None:
        with pytest.raises(InputError, match="--mask-token"):
            DFlashObjective.export(tmp_path / "out", tmp_path / "theirs", "speculators")
        return
    DFlashObjective.export(tmp_path / "out", tmp_path / "theirs", "speculators")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert (theirs["aux_hidden_state_layer_ids"], theirs["mask_token_id"]) == ([1, 2], 63)
    assert theirs["speculators_config"]["verifier"]["architectures"] == ["GPTNeoXForCausalLM"]
    assert not {"block_size", "dflash_config", "specdec_drafter"} & set(theirs["transformer_layer_config"])
    copy, convention = files.read(tmp_path / "theirs")
    assert convention == "hidden_states"
    a, b = (DFlashNetwork(target, model) for model in (copy, files.read(tmp_path / "out")[0]))
    features = torch.randn(7, 32, dtype=torch.float64)
    texts = a.open(), b.open()
    for one in texts:
        one.append(features)
    assert torch.equal(texts[0].logits(4, 3), texts[1].logits(4, 3))
    assert provenance.read(tmp_path / "out")["kind"] == "dflash"


def test_bad_training_options(target: Any) -> None:
    for options, message in (
        ({"block": 1}, "--block"),
        ({"anchors": 0}, "--anchors"),
        ({"gamma": 0.0}, "--gamma"),
        ({"kv_heads": 3}, "equal groups"),
        ({"loss": "mse"}, "no loss"),
    ):
        with pytest.raises(InputError, match=message):
            _objective(target, **options)
    with pytest.raises(IncompatiblePairError, match="hidden state 9"):
        _objective(target, target_layers=(1, 9))
    with pytest.raises(IncompatiblePairError, match="mask token 64"):
        _objective(target, mask_token=64)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    batch = look(target, tokens, torch.zeros_like(tokens, dtype=torch.bool), (1, 2))
    with pytest.raises(InputError, match="no row of the batch"):
        _objective(target).loss(batch)
    found = Acceptance()
    found.add(*_objective(target).acceptance(batch))
    with pytest.raises(InputError, match="no held-out position"):
        found.expected_length(1)


def test_hidden_states_are_spread_over_the_target() -> None:
    assert spread_layers(36, 5) == (2, 10, 18, 26, 34)  # the outputs of layers 1, 9, 17, 25, 33
    assert spread_layers(18, 4) == (2, 7, 11, 16)
    assert all(0 <= i <= layers for layers in range(1, 12) for n in range(1, 5) for i in spread_layers(layers, n))
