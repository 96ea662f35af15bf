"""The loss that a cell tells of its target: against cross entropy by hand, and what has none."""

import pytest
import tiny_models
import torch

from specdec.sweep.quality import prompt_loss


def test_the_mean_over_all_tokens_but_the_first() -> None:
    model = tiny_models.tiny("llama")
    prompts = [[3, 5, 7, 2], [9], [4, 4, 1]]
    parts = []
    for ids in (prompts[0], prompts[2]):
        logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        parts += [-float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    found = prompt_loss(model, prompts)
    assert found is not None
    assert found["tokens"] == 5
    assert found["loss"] == pytest.approx(sum(parts) / 5, rel=1e-6)


def test_nothing_to_judge() -> None:
    assert prompt_loss(tiny_models.tiny("llama"), [[3]]) is None
    assert prompt_loss(object(), [[3, 4]]) is None
