"""`exact=True`, and the pieces that it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from specdec.drafters import ModelDrafter
from tiny_models import noisy, session, tiny

from specdec import Sampling, SpeculativeDecoder, exact
from specdec.exact import Redecide, choices, doubtful, margins, measure_noise, ulp
from specdec.loading import load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.tree import TokenTree

PROMPT = [5, 17, 3, 9, 17, 3]
EMPTY = TokenTree.empty()
HALF = torch.bfloat16


def wobbly(monkeypatch, scale=1 / 16):
    """Make steps of several rows round differently: every logit of such a step moves by up to `scale`, and so do the
    keys and values that it writes. CPU kernels do this of themselves only at some widths."""
    from specdec.runtime.backends.eager import EagerBackend

    real = EagerBackend.forward

    @torch.inference_mode()
    def forward(self, step):
        result = real(self, step)
        prefill = step.num_logits == 1 and len(step.tokens) > 1
        if len(step.tokens) == 1 or prefill:
            return result
        noise = torch.Generator().manual_seed(1000 * step.start + len(step.tokens))
        for layer in self.cache.layers:
            for kept in (layer.keys, layer.values):
                part = kept[:, :, step.start : step.start + len(step.tokens)]
                part += scale * (2 * torch.rand(part.shape, generator=noise) - 1).to(part.dtype)
        move = scale * (2 * torch.rand(result.logits.shape, generator=noise) - 1)
        return type(result)(result.logits + move.to(result.logits.dtype), result.hidden_MW)

    monkeypatch.setattr(EagerBackend, "forward", forward)


def flat(dtype=HALF):
    """A tiny model with many near-ties: a small head gives small logits."""
    model = tiny("llama", dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    return model


SHAPES = {"chain": Fixed(4), "tree": Fixed(3, (3, 2, 1))}
SAMPLINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "warm": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.2, "top_p": 0.7},
    "min-p": {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_exact_text_is_plain_text_under_heavy_rounding(monkeypatch, shape, name):
    model = flat()
    decoder = SpeculativeDecoder(model, backend="eager", drafter=ModelDrafter(noisy(model, 0.01)), policy=SHAPES[shape])
    wobbly(monkeypatch)
    different = 0
    for seed in range(4):
        options = {"max_new_tokens": 60, "seed": seed, "strict": True, **SAMPLINGS[name]}
        prompt = [*PROMPT, seed]
        plain = decoder.generate_plain(prompt, **options)
        different += plain.tokens != decoder.generate(prompt, **options).tokens
        out = decoder.generate(prompt, exact=True, **options)
        assert out.tokens == plain.tokens
        stats = out.stats
        assert 0 < stats.num_redecided <= stats.num_recomputed_rows <= 60 + len(PROMPT)
        assert 0 < stats.redecide_seconds <= stats.seconds["verify"]
        assert stats.num_accepted_draft_tokens > 0
    assert different, "without exact=True some text differs, or this test shows nothing"


def test_recomputing_the_cache_is_what_does_it(monkeypatch):
    """Negative control: deciding again at one row, on the cache as it is, leaves differences."""
    model = flat()
    decoder = SpeculativeDecoder(model, backend="eager", drafter=ModelDrafter(noisy(model, 0.01)), policy=Fixed(4))
    wobbly(monkeypatch)

    class OnlyTheRow(Redecide):
        def _again(self, task, *args):
            self.clean = len(task.target.tokens) - 1
            return super()._again(task, *args)

    def differing(kind):
        monkeypatch.setattr("specdec.api.Redecide", kind)
        count = 0
        for seed in range(6):
            options = {"max_new_tokens": 60, "seed": seed}
            prompt = [*PROMPT, seed]
            plain = decoder.generate_plain(prompt, **options)
            count += plain.tokens != decoder.generate(prompt, exact=True, **options).tokens
        return count

    assert differing(OnlyTheRow) > 0
    assert differing(Redecide) == 0


def test_nothing_is_decided_again_in_wide_formats_without_ties():
    model = tiny("llama")
    decoder = SpeculativeDecoder(model, backend="eager", drafter=ModelDrafter(noisy(model, 0.02)), policy=Fixed(4))
    out = decoder.generate(PROMPT, max_new_tokens=50, exact=True)
    assert out.tokens == decoder.generate_plain(PROMPT, max_new_tokens=50).tokens
    assert out.stats.num_redecided == out.stats.num_recomputed_rows == 0


def test_a_prompt_of_one_token(monkeypatch):
    """There is nothing to measure noise on; the unit in the last place stands in."""
    model = flat()
    decoder = SpeculativeDecoder(model, backend="eager", drafter=ModelDrafter(noisy(model, 0.01)), policy=Fixed(4))
    wobbly(monkeypatch, 1 / 256)
    out = decoder.generate([3], max_new_tokens=40, exact=True)
    assert out.tokens == decoder.generate_plain([3], max_new_tokens=40).tokens
    assert out.stats.num_redecided > 0


@pytest.mark.parametrize("parents", [(-1, 0, 1), (-1, -1, 0, 1, 1, 3)], ids=["chain", "tree"])
def test_replay_gives_the_bits_of_plain_decoding(parents):
    model = flat()
    tree = TokenTree.of(range(10, 10 + len(parents)), parents)
    path = tree.path(len(parents) - 1)
    tokens = tree.tokens[list(path)].tolist()
    plain, wide = session(model, PROMPT), session(model, PROMPT)
    expected = [plain.forward().logits[-1]]
    for token in tokens:
        plain.append([token])
        expected.append(plain.forward().logits[-1])
    wide.forward(tree)
    fresh = session(model, PROMPT[:1])  # a clean cache before the root, as after a prompt
    fresh.forward()
    for token in PROMPT[1:]:
        fresh.append([token])
        fresh.forward()
    singles = list(wide.replay(0, path))
    plain = session(model, PROMPT[:1])
    expected = [plain.forward().logits[-1]]
    for token in [*PROMPT[1:], *tokens]:
        plain.append([token])
        expected.append(plain.forward().logits[-1])
    for single, row in zip(singles, expected[len(PROMPT) - 1 :], strict=True):
        assert torch.equal(single, row)
    wide.commit(path, [*tokens, 40])
    plain.append([40])
    assert torch.equal(wide.forward().logits[-1], plain.forward().logits[-1])


def test_margins_are_the_distance_to_another_decision():
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    for sampling in (Sampling(), Sampling(0.7, seed=3), Sampling(1.3, seed=4, top_k=9)):
        positions = [5] * 6
        scores = sampling.scores(logits, [0] * 5, EMPTY, [-1] * 6)
        gap = margins(scores, sampling, positions)
        winner = choices(logits, sampling, [0] * 5, EMPTY, [-1] * 6)
        scale = sampling.temperature or 1.0
        for share, flips in ((0.999, False), (1.001, True)):
            moved = logits.clone()
            moved.scatter_add_(1, winner[:, None], (-share * gap * scale)[:, None])
            after = choices(moved, sampling, [0] * 5, EMPTY, [-1] * 6)
            assert ((after != winner) == flips).all()


def test_one_candidate_has_no_rival():
    assert margins(torch.zeros(1, 1), Sampling(), [0]).item() == float("inf")


@pytest.mark.parametrize(
    "sampling", [Sampling(0.9, seed=1, **f) for f in ({}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2})]
)
def test_doubt_covers_every_change_that_the_noise_can_make(sampling):
    """Random moves within the noise never change a row that is not called doubtful, and few rows are called so."""
    generator = torch.Generator().manual_seed(2)
    rows, noise = 300, 0.05
    logits = 2 * torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    nodes = [-1] * rows
    called = doubtful(logits, torch.full((rows,), noise), sampling, [0, 1], EMPTY, nodes)
    before = choices(logits, sampling, [0, 1], EMPTY, nodes)
    changed = torch.zeros(rows, dtype=torch.bool)
    for _ in range(60):
        sign = torch.randint(0, 2, logits.shape, generator=generator) * 2 - 1
        changed |= choices(logits + noise * sign, sampling, [0, 1], EMPTY, nodes) != before
    assert changed.any()
    assert not (changed & ~called).any()
    assert called.double().mean() < 0.35


def test_ulp_is_the_spacing_of_the_dtype():
    for dtype in (HALF, torch.float16, torch.float32):
        row = torch.tensor([[-9.5, 3.0, float("-inf")]], dtype=dtype)
        step = torch.nextafter(row[0, 0].abs(), torch.tensor(100.0, dtype=dtype)) - row[0, 0].abs()
        assert ulp(row).item() == step.item()


def test_noise_is_measured_on_a_copy(monkeypatch):
    model = flat()
    target = session(model, PROMPT)
    target.forward()
    before = (list(target.tokens), target.num_cached)
    assert measure_noise(session(model, [3])) == 0.0
    wobbly(monkeypatch, 0.25)
    assert measure_noise(target) > 0.01
    assert (target.tokens, target.num_cached) == before


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_real_weights_in_bfloat16(shared: Path, temperature, capsys):
    target, draft = (load_model(shared / "models" / name, dtype=HALF) for name in ("bitllama-1M", "stories260K"))
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    decoder = SpeculativeDecoder(
        target, tokenizer=tokenizer, backend="eager", drafter=ModelDrafter(draft), policy=Fixed(4)
    )
    prompts = ["Once upon a time, there was a little girl named Lily.", "One day, Tom and his dog went to the park.",
               "The sun was hot and", "Ben had a red ball. He"]  # fmt: skip
    different = {False: 0, True: 0}
    for seed, prompt in enumerate(prompts):
        options = {"max_new_tokens": 150, "temperature": temperature, "seed": seed, "eos_token_id": ()}
        plain = decoder.generate_plain(prompt, **options)
        for mode in different:
            different[mode] += decoder.generate(prompt, exact=mode, **options).tokens != plain.tokens
    with capsys.disabled():
        print(f"\nbfloat16, temperature {temperature}: {different[False]}/4 texts differ, exact: {different[True]}/4")
    assert different[True] == 0


def test_the_default_takes_no_second_look():
    assert exact.keep(None, None, "outcome") == "outcome"
