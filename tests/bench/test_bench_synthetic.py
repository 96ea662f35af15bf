"""Pairs made from a seed: their agreement is what one number says, and their text does not loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import specdec
from specdec.bench import synthetic
from specdec.bench.synthetic import NUM_SPECIAL, PRESETS, calibrate, make_pair, make_prompts, measure_agreement, piece
from specdec.cli import bench as command
from specdec.errors import InputError

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def pair():
    return make_pair("tiny")


def test_the_command_offers_the_presets_that_there_are():
    assert [name for name in command.PRESETS if name != command.EMBEDDED] == list(PRESETS)


def test_the_stored_scale_gives_the_agreement_and_text_that_does_not_loop(pair):
    agreement, distinct = measure_agreement(pair.target, pair.draft, make_prompts(TINY, 16, 32, seed=3), 48)
    assert agreement == pytest.approx(synthetic.DEFAULT_AGREEMENT, abs=0.05)
    assert distinct > 0.6


def test_looping_text_has_a_small_share_of_distinct_grams():
    assert synthetic.distinct_share([[1, 2, 3] * 20]) < 0.1
    assert synthetic.distinct_share([list(range(60))]) == 1.0


@pytest.mark.parametrize(("scale", "low", "high"), [(0.0, 1.0, 1.0), (0.5, 0.0, 0.45)])
def test_the_scale_is_the_knob(scale, low, high):
    made = make_pair("tiny", scale=scale)
    agreement, _ = measure_agreement(made.target, made.draft, make_prompts(TINY, 8, 16), 24)
    assert low <= agreement <= high


def test_calibration_finds_the_scale_of_another_agreement():
    scale = calibrate(TINY, 0.6, num_texts=8, num_tokens=32, tolerance=0.02)
    made = make_pair("tiny", scale=scale)
    agreement, _ = measure_agreement(made.target, made.draft, make_prompts(TINY, 8, 32), 32)
    assert agreement == pytest.approx(0.6, abs=0.03)
    assert scale > TINY.scale


def test_greedy_text_has_ordinary_pieces_only(pair):
    texts = synthetic.greedy_texts(pair.target, make_prompts(TINY, 4, 8), 48)
    assert int(texts.min()) >= NUM_SPECIAL


def test_the_same_seed_gives_the_same_weights_and_half_precision_rounds_them(pair):
    again, other = make_pair("tiny").target.state_dict(), make_pair("tiny", seed=1, scale=0.1).target.state_dict()
    half = make_pair("tiny", dtype=torch.bfloat16).target.state_dict()
    for name, value in pair.target.state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.bfloat16(), half[name])
    assert not torch.equal(other["lm_head.weight"], again["lm_head.weight"])


def test_the_draft_shares_the_targets_storage_or_copies_it(pair):
    apart = make_pair("tiny", share=False)
    for made, shared in ((pair, True), (apart, False)):
        target, draft = dict(made.target.named_parameters()), dict(made.draft.named_parameters())
        assert all(torch.equal(value, target[name]) for name, value in draft.items())
        assert all((value.data_ptr() == target[name].data_ptr()) is shared for name, value in draft.items())
    assert len(pair.draft.model.layers) == TINY.draft_layers


def test_a_saved_pair_decodes_to_the_same_text(pair, tmp_path):
    target, draft = pair.save(tmp_path)
    prompt = make_prompts(TINY, 1, 12)[0]
    text = "".join(map(piece, prompt))
    decoder = specdec.load(str(target), str(draft), backend="eager")
    made = decoder.generate(text, max_new_tokens=12)
    assert made.prompt == prompt
    assert made.tokens == synthetic.greedy_texts(pair.target, [prompt], 12)[0, 12:].tolist()
    assert made.text.replace(" ", "") == "".join(map(piece, made.tokens))


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match="tiny, 134m"):
        make_pair("13b")
    with pytest.raises(InputError, match="agreement or scale"):
        make_pair("tiny", agreement=0.5, scale=0.1)
    with pytest.raises(InputError, match="between 0 and 1"):
        calibrate(TINY, 1.5)
    with pytest.raises(InputError, match="at least one layer"):
        make_pair(replace(TINY, draft_layers=TINY.num_layers))
