"""The hybrid takes the part that is worth more, learns which that is, and merges both under policies of trees."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import HybridDrafter, ModelDrafter, NgramDrafter, SuffixDrafter
from specdec.drafters.hybrid import Track, _bin, _merged

import specdec
from specdec.costs import Costs
from specdec.errors import InputError
from specdec.policy import Constant, Fixed, Plan, Policy, PolicyRun, Throughput
from specdec.proposal import Draw, Proposal
from specdec.tree import TokenTree
from specdec.tree_policy import DynamicTree


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return tiny_models.tiny("llama")


def decoder(target: torch.nn.Module, draft: torch.nn.Module, policy: Policy, **options: Any):
    hybrid = HybridDrafter(SuffixDrafter(), ModelDrafter(draft), **options)
    return specdec.SpeculativeDecoder(target, drafter=hybrid, policy=policy)


def looping(target: torch.nn.Module) -> torch.nn.Module:
    """A target that says the same seven tokens for ever, whatever its layers do."""
    model = tiny_models.tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = torch.eye(64, 16, dtype=torch.float64)[torch.arange(64) % 16]
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.zero_()
        for token in range(7):
            model.lm_head.weight[(token + 1) % 7, token] = 5.0
        model.model.norm.weight.fill_(1.0)
    return model


def origins(generation: Any) -> set[str]:
    return set(generation.origins)


def test_a_repetitive_text_is_looked_up(target: torch.nn.Module) -> None:
    model = looping(target)
    wrong = tiny_models.noisy(target, 1.0)
    out = decoder(model, wrong, Fixed(6)).generate([0, 1, 2, 3, 4, 5, 6, 0, 1, 2], max_new_tokens=80, strict=True)
    assert out.tokens == [(3 + i) % 7 for i in range(80)]
    by = [out.origins.count(name) for name in ("suffix", "model", "target")]
    assert by[0] > 50
    assert by[0] > 10 * by[1]


def test_a_text_without_repetitions_is_drafted(target: torch.nn.Module) -> None:
    out = decoder(target, target, Fixed(4)).generate([3, 5, 7], max_new_tokens=60, temperature=1.5, seed=3, strict=True)
    assert out.origins.count("model") > 3 * out.origins.count("suffix")
    assert out.tokens == tiny_models.reference(target, [3, 5, 7], 60, temperature=1.5, seed=3)


@pytest.mark.parametrize(
    "policy", [Fixed(3), Throughput(k=3, limit=6, probe_every=4), DynamicTree(8, 4, 3), Fixed(3, (3, 2))]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_targets(target: torch.nn.Module, policy: Policy, temperature: float) -> None:
    draft = tiny_models.noisy(target, 0.03)
    prompt = [3, 5, 7, 3, 5, 7, 3, 5]
    made = decoder(target, draft, policy, probe_every=3)
    out = made.generate(prompt, max_new_tokens=60, temperature=temperature, seed=2, strict=True)
    assert out.tokens == tiny_models.reference(target, prompt, 60, temperature=temperature, seed=2)


def test_the_part_that_was_not_taken_is_tried_again(target: torch.nn.Module) -> None:
    """A part that was bad at first gets another chance; without chances it would be lost for the text."""
    draft = tiny_models.noisy(target, 0.02)
    prompt = [3, 5, 7, 3, 5, 7, 3, 5]
    out = decoder(target, draft, Fixed(3), probe_every=2).generate(prompt, max_new_tokens=90, strict=True)
    drawn = [r.drafter for r in out.trace.rounds if r.num_nodes]
    longest = max(
        len(run) for name in ("suffix", "model") for run in "".join("x" if d == name else " " for d in drawn).split()
    )
    assert {"suffix", "model"} <= set(drawn)
    assert longest < len(drawn)


def test_a_part_that_keeps_losing_is_tried_ever_more_rarely(target: torch.nn.Module) -> None:
    made = decoder(looping(target), tiny_models.noisy(target, 1.0), Fixed(3), probe_every=2)
    out = made.generate([0, 1, 2, 3, 4, 5, 6, 0, 1, 2], max_new_tokens=230, strict=True)
    tried = [i for i, r in enumerate(out.trace.rounds) if r.drafter == "model"]
    pauses = [b - a for a, b in itertools.pairwise(tried)]
    assert pauses[-1] > 3 * pauses[0]
    assert max(pauses) <= 2 * 8 + 1


def test_estimates_follow_what_was_seen() -> None:
    track = Track()
    assert track.survival(3) == [0.5, 0.25, 0.125]
    for _ in range(200):
        track.observe(2, 3)
    first, second, third, fourth = track.survival(4)
    assert first > 0.95
    assert second > 0.9
    assert third < 0.1
    assert fourth < third


@pytest.mark.parametrize(
    ("length", "expected", "bin"), [(9, 0.2, 0), (1, None, 1), (2, 0.9, 2), (2, None, 2), (3, None, 3), (9, 8.5, 5)]
)
def test_lookups_are_told_apart_by_what_they_expect(length: int, expected: float | None, bin: int) -> None:
    assert _bin(Proposal.point(TokenTree.chain(list(range(length))), expected)) == bin


def test_costs_pick_the_length() -> None:
    costs = Costs({1: 1.0, 9: 1.0}, draft_average=0.3)
    assert costs.best_length([0.1, 0.01])[0] == 0
    assert costs.best_length([0.9, 0.8, 0.7, 0.1])[0] == 3
    assert costs.best_length([0.1, 0.01], levels=0)[0] == 2  # what costs nothing to draft may be long
    dear = Costs({1: 1.0, 2: 2.0}, draft_average=0.0)
    assert dear.best_length([0.9, 0.8])[0] == 0


@pytest.mark.parametrize("chain", [[4, 6, 8], [4, 9], [7], [4, 6], [5, 1, 2]])
def test_a_merged_tree_has_every_path_once(chain: list[int]) -> None:
    drawn = Proposal.shared(TokenTree.of([4, 5, 6], [-1, -1, 0]))
    merged = _merged(drawn, Proposal.point(TokenTree.chain(chain)), "both")
    merged.check(16)
    tokens = merged.tree.tokens.tolist()
    paths = {tuple(tokens[n] for n in merged.tree.path(node)) for node in range(len(merged.tree))}
    assert paths == {(4,), (5,), (4, 6), *(tuple(chain[: i + 1]) for i in range(len(chain)))}
    assert merged.draws[:3] == (Draw.SHARED,) * 3
    assert set(merged.draws[3:]) <= {Draw.POINT}


def test_a_sampled_tree_keeps_its_rows_when_merged() -> None:
    q = torch.full((2, 16), 1 / 16)
    drawn = Proposal.sampled(TokenTree.of([4, 6], [-1, 0]), q)
    merged = _merged(drawn, Proposal.point(TokenTree.chain([4, 9, 2])), "both")
    merged.check(16)
    assert merged.q_rows == (0, 1, -1, -1)


def test_bad_input(target: torch.nn.Module) -> None:
    model = ModelDrafter(target)
    with pytest.raises(InputError, match="it is the neural part"):
        HybridDrafter(model, model)
    with pytest.raises(InputError, match="probe_every >= 1"):
        HybridDrafter(NgramDrafter(), model, probe_every=0)


def test_by_name_on_the_embedded_pair() -> None:
    made = specdec.load(drafter="hybrid", drafter_options={"retrieval": "ngram"})
    assert made.drafter.name == "ngram+model"
    out = made.generate("import os\nimport sys\nimport os\n", max_new_tokens=24, strict=True)
    assert out.tokens == made.generate_plain("import os\nimport sys\nimport os\n", max_new_tokens=24).tokens
    assert origins(out) <= {"ngram", "model", "target"}
    assert made.drafter.propose is not None
    assert Plan(2, limit=8).deepest == 8


def test_a_part_that_is_nearly_as_good_is_tried_again_soon(target: torch.nn.Module) -> None:
    """One sample too few decided against it; waiting long would cost more than trying."""

    def pause(level: float) -> int:
        """Rounds until the neural part is tried again, which lost its first draft, at so many seconds a level."""
        made = HybridDrafter(NgramDrafter(), ModelDrafter(target), probe_every=24)
        request = specdec.SpeculativeDecoder(target).prepare([3, 5, 7]).request
        state = made.start(request)
        plan = Plan(4, costs=Costs({1: 1.0, 5: 1.0}, draft_average=level), limit=4)
        state.track("neural", plan).observe(0, 1)
        while made._lengths(state, plan, "", 0) == (0, 0):
            state.since_neural += 1
        return state.since_neural

    assert pause(0.4) == 4
    assert pause(3.0) == 24


@dataclass(frozen=True)
class Priced(Policy):
    """Plans with costs at which a second level seldom pays."""

    def start(self) -> PolicyRun:
        return Constant(Plan(4, costs=Costs({1: 1.0, 9: 1.0}, draft_average=0.2), limit=4))


def test_the_neural_part_looks_deeper_now_and_then(target: torch.nn.Module) -> None:
    """What a second level costs, and brings, is not known from first ones."""
    draft = tiny_models.noisy(target, 1.0)
    sizes = [r.num_nodes for r in neural_rounds(target, draft, probe_every=4)]
    assert sizes.count(1) > len(sizes) / 2
    assert sizes.count(3) >= 3
    assert 3 not in [r.num_nodes for r in neural_rounds(target, draft, probe_every=10**6)]


def neural_rounds(target: torch.nn.Module, draft: torch.nn.Module, **options: Any) -> list[Any]:
    """Of texts without repetitions."""
    made = decoder(target, draft, Priced(), **options)
    outs = [made.generate([3, 5, 7, i], max_new_tokens=40, temperature=1.0, seed=i) for i in range(3)]
    return [r for out in outs for r in out.trace.rounds if r.drafter == "model"]
