"""The draft vocabulary of a made pair: what is counted, and that its loss is measured on texts apart."""

from __future__ import annotations

import pytest
import torch

from specdec.bench import draft_vocabulary, synthetic
from specdec.errors import InputError

SHAPE = synthetic.Shape(3, 64, 96, 4, 2, 512, 1, 0.1)


def test_it_holds_what_the_target_says_most_and_tells_what_is_lost() -> None:
    pair = synthetic.make_pair(SHAPE)
    small, large = (draft_vocabulary.choose(pair, n, num_texts=8, num_tokens=24) for n in (64, 512))
    assert (len(small.vocabulary), len(large.vocabulary)) == (64, 512)
    assert small.counted_tokens == 6 * 24
    assert large.coverage == 1
    assert large.agreement_cut == large.agreement > 0.3
    assert small.coverage < 1
    assert small.agreement_cut < small.agreement == large.agreement
    assert {1, 2} <= set(small.vocabulary.ids_R.tolist())  # <s> and </s>
    texts = synthetic.greedy_texts(pair.target, synthetic.make_prompts(SHAPE, 8, 32, 2), 24)[2:, 32:]
    often = torch.bincount(texts.flatten(), minlength=512)
    assert int(often[small.vocabulary.ids_R].sum()) == int(often.topk(61).values.sum())  # and three special ones


def test_a_size_that_it_does_not_have() -> None:
    pair = synthetic.make_pair(SHAPE)
    for size in (2, 513):
        with pytest.raises(InputError, match="draft vocabulary of"):
            draft_vocabulary.choose(pair, size)
