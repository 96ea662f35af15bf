"""Early exit: no layer runs twice for a token, every exit layer keeps the text, and what cannot be cut is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import EarlyExitDrafter, NoDrafter

import specdec
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.generation import Stream
from specdec.policy import Fixed, Policy
from specdec.runtime.split import SplitBackend
from specdec.tree import TokenTree
from specdec.tree_policy import DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def decoder(model: Any, exit_layer: int | None = None, policy: Policy | None = None) -> specdec.SpeculativeDecoder:
    drafter = EarlyExitDrafter(exit_layer)
    return specdec.SpeculativeDecoder(model, drafter=drafter, policy=policy or Fixed(4), backend="eager")


def count_rows(model: Any) -> Counter:
    """Rows that went through each layer, counted by hooks on the user's own model."""
    rows: Counter = Counter()
    for i, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: torch.Tensor, i: int = i) -> None:
            rows[i] += output.shape[1]

        layer.register_forward_hook(count)
    return rows


@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (3, 2)), StaticTree((-1, -1, 0, 0, 1, 2, 2, 5))])
def test_no_layer_runs_twice_for_a_token(policy: Policy) -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=4)
    rows = count_rows(model)
    for exit_layer in (1, 2, 3):
        made = decoder(model, exit_layer, policy)
        rows.clear()
        out = made.generate(PROMPT, max_new_tokens=30, strict=True)
        # The prompt but its last token; then, in each round, the root and the nodes.
        expected = len(PROMPT) - 1 + sum(1 + r.num_nodes for r in out.trace.rounds)
        assert rows == dict.fromkeys(range(4), expected)
        assert out.stats.num_draft_tokens > 30


def test_nodes_that_were_expanded_and_dropped_ran_below_only() -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=3)
    rows = count_rows(model)
    made = decoder(model, 1, DynamicTree(budget=5, k=4, width=3))
    rows.clear()
    out = made.generate(PROMPT, max_new_tokens=30, strict=True)
    expected = len(PROMPT) - 1 + sum(1 + r.num_nodes for r in out.trace.rounds)
    assert rows[1] == rows[2] == expected
    assert expected < rows[0] <= expected + sum(3 * r.depth_proposed for r in out.trace.rounds)


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_every_exit_layer_keeps_the_text(exit_layer: int) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_models.tiny("gemma3", num_hidden_layers=5, layer_types=kinds)
    made = decoder(model, exit_layer)
    for policy in (Fixed(4), DynamicTree(budget=8, k=4, width=3)):
        out = made.generate(PROMPT, max_new_tokens=24, policy=policy, strict=True)
        assert out.tokens == tiny_models.reference(model, PROMPT, 24)


def test_the_draft_is_the_lower_layers_with_the_models_own_norm_and_head() -> None:
    model = tiny_models.tiny("mistral", num_hidden_layers=4, sliding_window=64)
    made = decoder(model, 2)
    task = made.prepare(PROMPT, max_new_tokens=8)
    stream = Stream(task)  # held: a stream that is dropped rewinds its sessions
    next(stream)
    tokens = list(task.target.tokens)
    session = task.target.backend.draft_session(task.target)
    rows = session.forward()
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[2][0, -1]
        expected = model.lm_head(model.model.norm(states))
    torch.testing.assert_close(rows.hidden[0], states, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rows.logits[0], expected, rtol=1e-10, atol=1e-10)


def test_what_was_drafted_is_used_for_that_proposal_only() -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=3)
    made = decoder(model, 1)
    rows = count_rows(model)
    for tree in (TokenTree.chain([1, 2, 3]), TokenTree.of([1, 2, 3], [-1, -1, 0]), TokenTree.chain([1, 2])):
        task = made.prepare(PROMPT, max_new_tokens=20, policy=Fixed(3))
        stream = Stream(task)  # held: a stream that is dropped rewinds its sessions
        next(stream)
        drafter, target = task.drafter.inner, task.target
        chance = task.request.sampling.chance("draft")
        proposal = drafter.propose(drafter.start(task.request), Fixed(3).start().plan(), chance)
        assert proposal.tree.parents == (-1, 0, 1)
        assert proposal.tree.tokens.tolist() != [1, 2, 3]
        rows.clear()
        logits = target.forward(tree).logits
        assert rows[0] == rows[2] == 1 + len(tree)  # all of it, through all layers
        for node in range(-1, len(tree)):
            text = [*target.tokens, *tree.tokens[list(tree.path(node))].tolist()]
            torch.testing.assert_close(logits[node + 1], tiny_models.cache_free(model, text), rtol=1e-10, atol=1e-10)


def test_the_default_is_a_quarter_of_the_layers() -> None:
    chosen = [decoder(tiny_models.tiny("llama", num_hidden_layers=n)).backend.exit_layer for n in (2, 4, 8, 9)]
    assert chosen == [1, 1, 2, 2]


def test_a_whole_number_of_layers_is_wanted() -> None:
    model = tiny_models.tiny("llama", num_hidden_layers=3)
    for wrong in (0, 3, -1, "1", 1.0):
        with pytest.raises(InputError, match="from 1 to 2 for the 3 layers of LlamaForCausalLM"):
            decoder(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="one layer"):
        decoder(tiny_models.tiny("llama", num_hidden_layers=1))
    with pytest.raises(IncompatiblePairError, match="exit_layer=2"):
        decoder(model, 1).generate(PROMPT, drafter=EarlyExitDrafter(2))


def test_a_model_without_a_list_of_its_layers_is_refused() -> None:
    model = tiny_models.tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = None
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no single list of its 2 layers"):
        decoder(model)


def test_a_model_whose_layers_know_more_than_the_hidden_state_is_refused() -> None:
    """The second layer adds what the first one left in this very call."""
    model = tiny_models.tiny("llama")
    left: dict[str, torch.Tensor] = {}
    model.model.embed_tokens.register_forward_hook(lambda *_: left.clear())
    model.model.layers[0].register_forward_hook(lambda _, __, out: left.update(first=out))
    model.model.layers[1].register_forward_hook(lambda _, __, out: out + left["first"] if left else out)
    with pytest.raises(UnsupportedModelError, match="in two parts differs from the whole model by"):
        decoder(model)


def test_a_model_that_accelerate_spreads_out_is_refused() -> None:
    from accelerate import cpu_offload

    model = cpu_offload(tiny_models.tiny("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="spread out by accelerate"):
        SplitBackend.open(model, exit_layer=1, whole=None)


def test_hidden_states_are_refused() -> None:
    class Reads(NoDrafter):
        hidden = (1,)

    made = decoder(tiny_models.tiny("llama"))
    with pytest.raises(InputError, match="gives no hidden states"):
        made.generate(PROMPT, drafter=Reads())
    with pytest.raises(InputError, match="in two parts"):
        made.backend.expose((1,))
