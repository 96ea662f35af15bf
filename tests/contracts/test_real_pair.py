"""Two trained models with one tokenizer, from beside the checkout: stories260K drafts for bitllama-1M, in float32."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import specdec
from specdec.policy import Fixed
from specdec.trace import Round

# The share of positions of the target's greedy texts where the draft's first choice is the target's, measured once
# outside this library: what a chain's acceptance must come to.
GREEDY_AGREEMENT = 0.809
TOKENS = 100


@pytest.fixture(scope="module")
def decoder(shared: Path) -> specdec.SpeculativeDecoder:
    target, draft = shared / "models" / "bitllama-1M", shared / "models" / "stories260K"
    if not (target.is_dir() and draft.is_dir()):
        pytest.skip("no bitllama-1M and stories260K in ../shared/models")
    return specdec.load(target, drafter=draft, dtype="float32")


@pytest.fixture(scope="module")
def prompts(shared: Path) -> list[str]:
    path = shared / "data" / "tinystories_eval_prompts.yaml"
    if not path.is_file():
        pytest.skip("no tinystories_eval_prompts.yaml in ../shared/data")
    blocks = re.findall(r"^- \|-\n((?:  .*\n|\n)+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return ["\n".join(line[2:] for line in block.rstrip("\n").split("\n")) for block in blocks]


def generate(decoder: specdec.SpeculativeDecoder, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        out = decoder.target.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (3, 2))], ids=lambda policy: policy.name)
def test_texts_are_those_of_generate(decoder: specdec.SpeculativeDecoder, prompts: list[str], policy: Fixed) -> None:
    for prompt in prompts[:8]:
        out = decoder.generate(prompt, max_new_tokens=80, policy=policy, strict=True)
        assert out.tokens == generate(decoder, out.prompt, 80)
        assert out.text == decoder.tokenizer.decode(out.prompt + out.tokens, skip_special_tokens=True)[len(prompt) :]
        assert out.stats.num_rounds < len(out.tokens) / 1.5


def test_sampled_texts_keep_the_seed(decoder: specdec.SpeculativeDecoder, prompts: list[str]) -> None:
    for seed, prompt in enumerate(prompts[8:12]):
        options = {"max_new_tokens": 60, "temperature": 0.8, "top_p": 0.95, "seed": seed}
        out = decoder.generate(prompt, policy=Fixed(4), strict=True, **options)
        assert out.tokens == decoder.generate_plain(prompt, **options).tokens
        assert out.stats.num_accepted_draft_tokens > 10


def test_a_chains_acceptance_is_the_greedy_agreement(decoder: specdec.SpeculativeDecoder, prompts: list[str]) -> None:
    """Acceptance per evaluated position, over all depths.

    Depth 1 alone has less: a round begins where the last one was refused, and refusals come in clusters.
    """
    rounds: list[Round] = []
    same = positions = 0
    for prompt in prompts[::2]:
        out = decoder.generate(prompt, max_new_tokens=TOKENS, policy=Fixed(8), strict=True)
        rounds += out.trace.rounds
        with torch.inference_mode():
            logits = decoder.drafter.model(torch.tensor([out.prompt + out.tokens])).logits[0]
        choices = logits[len(out.prompt) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(choices, out.tokens, strict=True))
        positions += len(out.tokens)
    accepted, evaluated = sum(r.num_accepted for r in rounds), sum(r.num_evaluated for r in rounds)
    assert same / positions == pytest.approx(GREEDY_AGREEMENT, abs=0.03)
    assert accepted / evaluated == pytest.approx(GREEDY_AGREEMENT, abs=0.03)
