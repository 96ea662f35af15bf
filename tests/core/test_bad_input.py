"""Bad input: a clear error before work starts; what breaks in the middle of a text loses nothing."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load, save
from specdec.drafters import ModelDrafter
from tiny_text import TEXT_VOCAB, ScriptedDrafter, byte_tokenizer

import specdec
from specdec.chance import Chance
from specdec.drafter import Drafter, Outcome, Request
from specdec.errors import (
    DrafterError,
    DrafterWarning,
    IncompatiblePairError,
    InputError,
    NonFiniteLogitsError,
    SpecdecError,
    UnknownPluginError,
    UnsupportedModelError,
)
from specdec.loading import check_same_tokenizer, load_model
from specdec.policy import Confidence, Fixed, Heuristic, Plan, Throughput
from specdec.proposal import Draw, Proposal
from specdec.tree import TokenTree

PROMPT = [3, 5, 7]


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return tiny_models.tiny("gpt-neox")


@pytest.fixture(scope="module")
def plain(target: Any) -> list[int]:
    return tiny_models.reference(target, PROMPT, 24)


@pytest.fixture
def no_forward(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error must come before any work."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(target, "forward", refuse)


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be a number >= 0, not -0\.1; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature must be a number >= 0, not nan"),
        ({"temperature": float("inf")}, "temperature must be a number >= 0, not inf"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0\.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], not 1\.5"),
        ({"top_p": float("nan")}, r"top_p must lie in \(0, 1\], not nan"),
        ({"top_k": 0}, "top_k must be a whole number >= 1 or None, not 0"),
        ({"top_k": 2.5}, r"top_k must be a whole number >= 1 or None, not 2\.5"),
        ({"min_p": -0.1}, r"min_p must lie in \[0, 1\], not -0\.1"),
        ({"min_p": 2.0}, r"min_p must lie in \[0, 1\], not 2\.0"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be > 0, not 0\.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be > 0, not nan"),
        ({"seed": 1.5}, r"seed must be a whole number, not 1\.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, not 0"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens must be a whole number >= 1, not 2\.0"),
    ],
)
def test_arguments_out_of_range(target: Any, no_forward: None, options: dict, message: str) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter="ngram")
    for run in (decoder.generate, decoder.generate_plain, decoder.stream):  # a stream checks at once, too
        with pytest.raises(InputError, match=message):
            run(PROMPT, **options)


@pytest.mark.parametrize("k", [0, -1, 1.5])
@pytest.mark.parametrize(
    "policy", [Fixed, lambda k: Confidence(0.4, k), Heuristic, Throughput, lambda k: Throughput(limit=k)]
)
def test_k_below_one(policy: Any, k: Any) -> None:
    with pytest.raises(InputError, match=f"k is the number of drafted tokens per round.*>= 1, not {k}"):
        policy(k)


def test_other_policy_arguments() -> None:
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\], not 1.5"):
        Confidence(1.5)
    for branching in ((0,), (2, 2, 2), (1.5,)):
        with pytest.raises(InputError, match="branching has one number >= 1 per depth, at most k = 2"):
            Fixed(2, branching)


# Prompts


def test_prompts_that_cannot_be_decoded(no_forward: None, target: Any) -> None:
    decoder = specdec.SpeculativeDecoder(target)
    for length in (tiny_models.CONTEXT, tiny_models.CONTEXT + 50):
        with pytest.raises(InputError, match=rf"prompt has {length} tokens and the model's context is 256.*shorten"):
            decoder.generate([1] * length)
    with pytest.raises(InputError, match="prompt is empty and the tokenizer has no BOS"):
        decoder.generate([])
    for token in (-1, tiny_models.VOCAB):
        with pytest.raises(InputError, match="outside the vocabulary of 64"):
            decoder.generate([1, token])
    with pytest.raises(InputError, match="a text prompt needs a tokenizer"):
        decoder.generate("text")
    with pytest.raises(InputError, match="a text prompt needs a tokenizer"):
        decoder.generate([{"role": "user", "content": "text"}])
    with pytest.raises(InputError, match="prompt is empty"):
        specdec.SpeculativeDecoder(target, tokenizer=byte_tokenizer(bos=False)).generate("")


# Tokenizers


def test_tokenizers_are_compared_by_content() -> None:
    ours = byte_tokenizer()
    check_same_tokenizer(ours, byte_tokenizer())
    check_same_tokenizer(ours, None)
    with pytest.raises(IncompatiblePairError, match=r"different tokenizers \(for example .*ngram"):
        check_same_tokenizer(ours, byte_tokenizer(order=-1))  # as many pieces, other numbers
    # Every piece they share has one number, and yet they cut a text differently.
    with pytest.raises(IncompatiblePairError, match="different tokenizers"):
        check_same_tokenizer(ours, byte_tokenizer(merges=[("d", "e")]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models: target and draft with one tokenizer, a draft with another."""
    root = tmp_path_factory.mktemp("models")
    for name, order in (("target", 1), ("draft", 1), ("foreign", -1)):
        model = tiny_models.tiny("llama", vocab_size=TEXT_VOCAB, dtype=torch.float32, num_hidden_layers=1)
        model.save_pretrained(root / name)
        byte_tokenizer(order=order).save_pretrained(root / name)
    return root


def test_a_draft_with_another_tokenizer_is_refused_before_its_weights_load(folders: Path) -> None:
    decoder = specdec.load(folders / "target", drafter=folders / "draft")
    assert decoder.drafter.name == "model"
    out = decoder.generate("abc", max_new_tokens=8)
    assert out.stats.draft_acceptance_rate == 1.0
    with pytest.raises(IncompatiblePairError, match="different tokenizers"):
        specdec.load(folders / "target", drafter=folders / "foreign")


def test_loading_says_what_is_wrong(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cannot load a model from .*nowhere"):
        specdec.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no dtype is called 'float33'"):
        specdec.load(folders / "target", dtype="float33")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        specdec.load(folders / "target", drafter=tmp_path)
    assert specdec.load(folders / "target", dtype="float64").target.dtype is torch.float64
    assert specdec.load(folders / "target").target.dtype is torch.float32


def test_pickled_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders / "target" / "config.json").read_text())
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pickled weights only.*save_pretrained"):
        load_model(tmp_path)
    with pytest.raises(UnsupportedModelError, match="pickled weights only"):
        specdec.load(folders / "target", drafter=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "shape", "missing"])
def test_damaged_weights_are_refused(folders: Path, tmp_path: Path, damage: str) -> None:
    content = (folders / "target" / "model.safetensors").read_bytes()
    config = json.loads((folders / "target" / "config.json").read_text())
    if damage == "shape":
        config["hidden_size"] = 32
    if damage == "missing":
        weights = load(content)
        del weights["model.norm.weight"]
        content = save(weights, {"format": "pt"})
    content = {"truncated": content[: len(content) // 2], "header": b"\xff" * 64, "empty": b""}.get(damage, content)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # beside it: the damage must not be taken for pickled weights
    with pytest.raises(UnsupportedModelError, match=f"cannot load a model from {re.escape(str(tmp_path))}"):
        load_model(tmp_path)


# Names


def test_unknown_plugins_offer_the_nearest_names(target: Any) -> None:
    for options, message in (
        ({"drafter": "ngarm"}, "no drafter is called 'ngarm'; did you mean 'ngram'"),
        ({"verifier": "cuopled"}, "no verifier is called 'cuopled'; did you mean 'coupled'"),
        ({"policy": "fixd"}, "no policy is called 'fixd'; did you mean 'fixed'"),
        ({"backend": "eagre"}, "no backend is called 'eagre'; did you mean 'eager'"),
        ({"drafter": "zzzzzz"}, "no drafter is called 'zzzzzz'; there are: .*model, ngram, none, .*suffix"),
    ):
        with pytest.raises(UnknownPluginError, match=message):
            specdec.SpeculativeDecoder(target, **options)
    with pytest.raises(InputError, match="model drafter needs weights"):
        specdec.SpeculativeDecoder(target, drafter="model")


def test_every_error_is_one_of_ours() -> None:
    kinds = (InputError, UnknownPluginError, IncompatiblePairError, UnsupportedModelError, DrafterError)
    assert all(issubclass(kind, SpecdecError) for kind in (*kinds, NonFiniteLogitsError))
    assert issubclass(InputError, ValueError)


# Logits that are no numbers


def breaking(model: Any, prefixes: list[list[int]], value: float = float("nan")) -> Any:
    """A model whose logits are broken right after each of `prefixes`, wherever these stand in a batch or tree."""
    twin = copy.deepcopy(model)
    forward = twin.forward
    marks = {tuple(prefix) for prefix in prefixes}
    known: dict[int, tuple[int, ...]] = {}

    def broken(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        cache, ids = kwargs.get("past_key_values"), kwargs["input_ids"][0].tolist()
        start, mask = cache.cursor.start, kwargs["attention_mask"]
        for row in range(len(ids)):
            seen = (mask[0, 0, row, :start] == 0).nonzero()[:, 0].tolist()
            own = (mask[0, 0, row, start:] == 0).nonzero()[:, 0].tolist()
            prefix = tuple(known[slot] for slot in seen) + tuple(ids[i] for i in own)
            if prefix in marks and row >= len(ids) - out.logits.shape[1]:
                out.logits[0, row - len(ids), 9] = value
        known.update({start + row: token for row, token in enumerate(ids)})
        return out

    twin.forward = broken
    return twin


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 7, 10])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_broken_logits_stop_the_text_with_the_position_named(
    target: Any, plain: list[int], k: int, at: int, value: float, logprobs: bool
) -> None:
    model = breaking(target, [[*PROMPT, *plain[:at]]], value)
    decoder = specdec.SpeculativeDecoder(model, drafter=ModelDrafter(target), policy=Fixed(k))
    position = len(PROMPT) + at
    for run in (decoder.generate, decoder.generate_plain):
        with pytest.raises(
            NonFiniteLogitsError, match=f"position {position} are NaN.*{at} tokens were emitted"
        ) as info:
            run(PROMPT, max_new_tokens=24, logprobs=logprobs)
        assert info.value.tokens == plain[:at]
        assert info.value.position == position
    given: list[int] = []
    stream = decoder.stream(PROMPT, max_new_tokens=24, logprobs=logprobs)
    with pytest.raises(NonFiniteLogitsError):
        given.extend(token for chunk in stream for token in chunk.tokens)
    assert given == plain[:at]


def test_broken_logits_after_the_end_do_not_matter(target: Any, plain: list[int]) -> None:
    model = breaking(target, [[*PROMPT, *plain[:8]]])
    decoder = specdec.SpeculativeDecoder(model, drafter=ModelDrafter(target), policy=Fixed(10))
    assert decoder.generate(PROMPT, max_new_tokens=8).tokens == plain[:8]
    out = decoder.generate(PROMPT, max_new_tokens=24, eos_token_id=plain[7])
    assert out.tokens == plain[: plain.index(plain[7]) + 1]


@pytest.mark.parametrize("verifier", ["coupled", "ratio", "block", "recursive", "traversal", "match", "greedy"])
def test_broken_logits_on_a_rejected_branch_do_not_stop_the_text(target: Any, plain: list[int], verifier: str) -> None:
    wrong = [(token + 1) % tiny_models.VOCAB if i % 4 == 2 else token for i, token in enumerate(plain)]
    prefixes = [[*PROMPT, *plain[:i], wrong[i]] for i in range(2, len(plain), 4)]
    decoder = specdec.SpeculativeDecoder(
        breaking(target, prefixes), drafter=ScriptedDrafter(wrong), verifier=verifier, policy=Fixed(6)
    )
    out = decoder.generate(PROMPT, max_new_tokens=24, strict=True)
    assert out.tokens == plain
    assert out.stats.num_draft_tokens > out.stats.num_accepted_draft_tokens > 0
    with pytest.raises(NonFiniteLogitsError):  # negative control: the model is broken there
        decoder.generate_plain(prefixes[0], max_new_tokens=1)


# Drafters that fail


class Bad(ScriptedDrafter):
    """Right for two rounds, then wrong in one way."""

    def __init__(self, script: list[int], fault: str):
        super().__init__(script)
        self.fault = fault

    @property
    def name(self) -> str:
        return "bad-plugin"

    def start(self, request: Request) -> Any:
        if self.fault == "start":
            raise OSError("no weights")
        return super().start(request)

    def propose(self, state: Any, plan: Plan, chance: Chance) -> Any:
        good = super().propose(state, plan, chance)
        if state[0] < 4:
            return good
        chain = good.tree.tokens
        faults = {
            "type": lambda: chain.tolist(),
            "none": lambda: None,
            "deep": lambda: Proposal.point(TokenTree.chain(self.script[:9])),
            "vocabulary": lambda: Proposal.point(TokenTree.of([tiny_models.VOCAB], [-1])),
            "negative": lambda: Proposal.point(TokenTree.of([-1], [-1])),
            "float": lambda: Proposal.point(TokenTree(torch.tensor([0.5]), (-1,))),
            "shape": lambda: Proposal.point(TokenTree(torch.tensor([[1]]), (-1,))),
            "count": lambda: Proposal.point(TokenTree(torch.tensor([1, 2]), (-1,))),
            "parents": lambda: Proposal.point(TokenTree.of([1, 2], [1, -1])),
            "siblings": lambda: Proposal.point(TokenTree.of([1, 1], [-1, -1])),
            "draws": lambda: Proposal(TokenTree.chain([1, 2]), (Draw.POINT,)),
            "no q": lambda: Proposal(TokenTree.chain([1]), (Draw.SAMPLED,)),
            "q width": lambda: Proposal.sampled(TokenTree.chain([1]), torch.ones(1, 9) / 9),
            "q rows": lambda: Proposal.sampled(TokenTree.chain([1]), torch.eye(64)[1:2], [3]),
            "q sum": lambda: Proposal.sampled(TokenTree.chain([1]), torch.ones(1, 64)),
            "q support": lambda: Proposal.sampled(TokenTree.chain([1]), torch.eye(64)[2:3]),
            "raise": lambda: 1 / 0,
        }
        return faults[self.fault]() if self.fault in faults else good

    def observe(self, state: Any, outcome: Outcome) -> Any:
        if self.fault == "observe" and state[0] >= 4:
            raise KeyError("lost")
        return super().observe(state, outcome)


FAULTS = {
    "type": "TypeError: propose returned list, not a Proposal",
    "none": "TypeError: propose returned NoneType",
    "deep": "proposed 9 deep where the plan allows 3",
    "vocabulary": "outside the target's vocabulary of 64",
    "negative": "outside the target's vocabulary of 64",
    "float": "tokens must be int64",
    "shape": "tokens must be int64 of shape",
    "count": "tokens must be int64 of shape",
    "parents": "parents come before their children",
    "siblings": "two siblings carry the same token",
    "draws": "2 nodes but 1 draws",
    "no q": "q of shape",
    "q width": "q of shape",
    "q rows": "row of q that does not exist",
    "q sum": "no distribution",
    "q support": "no distribution",
    "raise": "ZeroDivisionError",
    "observe": "failed in observe: KeyError",
    "start": "failed in start: OSError: no weights",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_drafter_that_fails_costs_speed_only(target: Any, plain: list[int], fault: str) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=Bad(plain, fault), policy=Fixed(3))
    with pytest.warns(DrafterWarning, match=r"'bad-plugin' failed in.*finished by plain decoding") as warned:
        out = decoder.generate(PROMPT, max_new_tokens=24)
    assert len(warned) == 1
    assert out.tokens == plain
    assert out.finish_reason == "length"
    assert out.stats.drafter_error is not None
    assert re.search(FAULTS[fault], out.stats.drafter_error)
    assert "finished by plain decoding" in str(out.stats)
    assert (out.stats.num_accepted_draft_tokens > 0) == (fault != "start")
    with pytest.raises(DrafterError, match=FAULTS[fault]) as info:
        decoder.generate(PROMPT, max_new_tokens=24, strict=True)
    assert info.value.__cause__ is not None


def test_a_tree_for_a_chain_rule_is_a_failure_of_the_drafter(target: Any, plain: list[int]) -> None:
    class Branches(ScriptedDrafter):
        def propose(self, state: Any, plan: Plan, chance: Chance) -> Proposal:
            return Proposal.point(TokenTree.of([1, 2], [-1, -1]))

    decoder = specdec.SpeculativeDecoder(target, drafter=Branches(plain), verifier="ratio", policy=Fixed(3))
    with pytest.warns(DrafterWarning, match="takes chains, and the drafter proposed a tree"):
        assert decoder.generate(PROMPT, max_new_tokens=24).tokens == plain


def test_a_draw_that_the_rule_does_not_take_is_a_failure_of_the_drafter(target: Any, plain: list[int]) -> None:
    class Shares(ScriptedDrafter):
        def propose(self, state: Any, plan: Plan, chance: Chance) -> Proposal:
            return Proposal.shared(super().propose(state, plan, chance).tree)

    decoder = specdec.SpeculativeDecoder(target, drafter=Shares(plain), verifier="block", policy=Fixed(3))
    with pytest.warns(DrafterWarning, match=r"cannot take nodes drawn as \['shared'\]"):
        assert decoder.generate(PROMPT, max_new_tokens=24).tokens == plain


def test_interrupts_are_not_swallowed(target: Any) -> None:
    class Interrupted(ScriptedDrafter):
        def propose(self, state: Any, plan: Plan, chance: Chance) -> Proposal:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        specdec.SpeculativeDecoder(target, drafter=Interrupted([1])).generate(PROMPT)


def test_a_drafter_is_an_abstract_contract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Drafter()  # type: ignore[abstract]
