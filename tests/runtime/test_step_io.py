"""The static step whose keys and values come in and go out, against the stock model: chains, trees, any place."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from specdec.export.step_io import HIDDEN_HALF, IoStep
from specdec.tree import TokenTree

SLOTS, WIDTH = 32, 8
TEXT = [(7 * i + 3) % 64 for i in range(20)]
MODELS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "phi", "mixtral")


class Host:
    """What stands around the graph: it writes the rows' keys and values, and says what each row sees."""

    def __init__(self, step: IoStep, window: int | None, places: list[int] | None = None):
        self.step, self.window, self.held = step, window, list(step.empty())
        self.places = places or list(range(SLOTS))  # of positions, in slots
        self.length = 0

    def _mask(self, kind: str, positions: Tensor, own: Tensor) -> Tensor:
        mask = torch.full((WIDTH, SLOTS + WIDTH), HIDDEN_HALF)
        cached = torch.arange(self.length)
        count = len(positions)
        seen = torch.ones(count, self.length, dtype=torch.bool)
        if kind == "sliding_attention" and self.window:
            seen &= positions[:, None] - cached[None] < self.window
            own = own & (positions[:, None] - positions[None] < self.window)
        mask[:count, self.places[: self.length]] = torch.where(seen, 0.0, HIDDEN_HALF)
        mask[:count, SLOTS : SLOTS + count] = torch.where(own, 0.0, HIDDEN_HALF)
        return mask

    def run(self, tokens: list[int], tree: TokenTree | None = None, row: int | None = None) -> tuple[Tensor, ...]:
        """Logits and hidden states; a chain's rows are written, a tree's are not."""
        count = len(tokens)
        own = torch.ones(count, count, dtype=torch.bool).tril() if tree is None else tree.ancestors_NN
        depths = torch.arange(count) if tree is None else torch.tensor(tree.depths) - 1
        inputs = [torch.zeros(WIDTH, dtype=torch.int32) for _ in range(2)]
        inputs[0][:count] = torch.tensor(tokens)
        inputs[1][:count] = self.length + depths
        rows = [] if row is None else [torch.tensor([row], dtype=torch.int32)]
        masks = [self._mask(kind, self.length + depths, own) for kind in self.step.kinds]
        with torch.inference_mode():
            logits, hidden, *new = (self.step if row is None else self.step.last_only())(
                *inputs, *rows, *masks, *self.held
            )
        if tree is None:
            slots = self.places[self.length : self.length + count]
            for index, rows_made in enumerate(new):
                if index % 2:
                    self.held[index][:, slots] = rows_made[:, :count]
                else:
                    self.held[index][:, :, slots] = rows_made[:, :, :count]
            self.length += count
        return logits[:count], hidden[:count]


def made(name: str) -> tuple[Any, IoStep, int | None]:
    model = tiny_models.tiny(name, dtype=torch.float32, attention="eager")
    return model, IoStep(model, SLOTS, hidden=(0, 1)), getattr(model.config, "sliding_window", None)


def assert_near(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_any_size_give_the_rows_of_the_model(name: str) -> None:
    model, step, window = made(name)
    host, at = Host(step, window), 0
    with torch.inference_mode():
        theirs = model(torch.tensor([TEXT]), output_hidden_states=True)
    for count in (8, 3, 1, 5, 3):
        logits, hidden = host.run(TEXT[at : at + count])
        assert_near(logits, theirs.logits[0, at : at + count])
        assert_near(hidden[:, : hidden.shape[1] // 2], theirs.hidden_states[0][0, at : at + count])
        at += count


def test_slots_may_stand_anywhere_and_one_row_of_logits_is_enough() -> None:
    model, step, window = made("mistral")
    host = Host(step, window, torch.randperm(SLOTS, generator=torch.Generator().manual_seed(0)).tolist())
    host.run(TEXT[:8])
    host.run(TEXT[8:13])
    (row,) = host.run(TEXT[13:17], row=2)[0]
    assert_near(row, tiny_models.cache_free(model, TEXT[:16]))


def test_the_rows_of_a_tree_see_their_ancestors() -> None:
    model, step, window = made("llama")
    host = Host(step, window)
    host.run(TEXT[:8])
    tree = TokenTree.of([9, 8, 7, 6], [-1, -1, 0, 2])
    logits, _ = host.run([9, 8, 7, 6], tree)
    for node, path in enumerate(([9], [8], [9, 7], [9, 7, 6])):
        assert_near(logits[node], tiny_models.cache_free(model, [*TEXT[:8], *path]))
    chain, _ = host.run([9, 8, 7, 6])
    assert float((chain - logits)[1:].abs().max()) > 1e-2  # so the mask matters


def test_what_is_hidden_does_not_matter() -> None:
    """Slots that were never written, or hold what was rejected, may hold anything finite."""
    _, step, window = made("llama")
    one, other = Host(step, window), Host(step, window)
    for host in (one, other):
        host.run(TEXT[:8])
    for index, held in enumerate(other.held):
        (held[:, 8:] if index % 2 else held[:, :, 8:]).fill_(3.0)
    assert torch.equal(one.run(TEXT[8:11])[0], other.run(TEXT[8:11])[0])


def test_the_model_stays_as_it_was() -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32)
    before = tiny_models.cache_free(model, TEXT)
    names = [type(module).__name__ for module in model.modules()]
    IoStep(model, SLOTS)
    assert [type(module).__name__ for module in model.modules()] == names
    assert torch.equal(tiny_models.cache_free(model, TEXT), before)
