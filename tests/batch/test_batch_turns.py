"""How a batch runs: which steps are merged, the queue, failures of one text, budgets, and arguments."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter
from tiny_text import BOS, TEXT_VOCAB, ScriptedDrafter, byte_tokenizer

import specdec
from specdec import batch as batch_module
from specdec.errors import DrafterWarning, InputError, MemoryBudgetError, NonFiniteLogitsError
from specdec.policy import Fixed
from specdec.runtime.backend import Backend, Step, StepResult
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.session import PREFILL_CHUNK, Session

PROMPTS = [[3, 5, 7], list(range(20)), [9], [4] * 11]


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("gpt-neox")


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, list[int]]]:
    """Family and row counts of every step that the eager backend was asked for together."""
    seen: list[tuple[object, list[int]]] = []

    def forward_many(cls: Any, backends: Sequence[Backend], steps: Sequence[Step]) -> list[StepResult]:
        assert len({id(backend) for backend in backends}) == len(backends)
        assert len({id(backend.family) for backend in backends}) == 1
        seen.append((backends[0].family, [step.num_rows for step in steps]))
        return [backend.forward(step) for backend, step in zip(backends, steps, strict=True)]

    monkeypatch.setattr(EagerBackend, "forward_many", classmethod(forward_many))
    return seen


def eager(model: Any, drafter: Any = None, k: int = 3, **options: Any) -> specdec.SpeculativeDecoder:
    made = ModelDrafter(drafter, backend="eager") if isinstance(drafter, torch.nn.Module) else drafter
    return specdec.SpeculativeDecoder(model, drafter=made, policy=Fixed(k), backend="eager", **options)


def test_a_turn_is_k_draft_steps_and_one_target_step_for_all(target: Any, merged: list) -> None:
    made = eager(target, tiny_models.noisy(target, 0.03))
    batch = made.batch(max_new_tokens=30, strict=True)
    tickets = [batch.submit(prompt) for prompt in PROMPTS]
    batch.step()
    batch.step()  # prompts, the target's and then the draft's
    family = made.backend.family
    for _ in range(3):
        merged.clear()
        chunks = batch.step()
        assert {ticket for ticket, _ in chunks} == set(tickets)
        assert [rows for of, rows in merged if of is family] == [[4, 4, 4, 4]]
        drafts = [rows for of, rows in merged if of is not family]
        assert [len(rows) for rows in drafts] == [4, 4, 4]
        assert {of is merged[0][0] for of, _ in merged[:-1]} == {True}
        assert merged[-1][0] is family


def test_a_long_prompt_is_prefilled_a_chunk_a_turn_beside_the_others(target: Any, merged: list) -> None:
    model = tiny_models.tiny("gpt-neox", max_position_embeddings=2048)
    made = eager(model)
    batch = made.batch(max_new_tokens=40)
    first = batch.submit([3, 5, 7])
    batch.step()
    batch.step()
    long = batch.submit([i % 60 for i in range(1200)])
    merged.clear()
    for _ in range(4):
        assert [ticket for ticket, _ in batch.step()] == [first]
    assert [sorted(rows) for _, rows in merged] == [[1, 128], [1, 128], [1, 256], [1, 512]]
    assert first in batch.running
    while not any(ticket is long for ticket, _ in batch.step()):
        pass
    batch.drain()
    assert long.result().tokens == made.generate(long.generation.prompt, max_new_tokens=40).tokens


def test_the_rows_of_one_step_are_bounded_and_nobody_starves(
    target: Any, merged: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "MAX_STEP_ROWS", 5)
    made = eager(target, tiny_models.noisy(target, 0.03), k=2)
    out = made.generate(PROMPTS, max_new_tokens=12, strict=True)
    assert [o.tokens for o in out] == [tiny_models.reference(target, p, 12) for p in PROMPTS]
    assert all(sum(rows) <= 5 or len(rows) == 1 for _, rows in merged)
    batch = made.batch(max_new_tokens=12)
    tickets = [batch.submit(prompt) for prompt in PROMPTS]
    counts = dict.fromkeys(tickets, 0)
    for ticket, _ in batch:
        counts[ticket] += 1
        if not any(t.is_done for t in tickets):
            assert max(counts.values()) - min(counts.values()) <= 8


def test_no_more_than_max_rows_run_and_the_others_wait_in_order(target: Any) -> None:
    batch = eager(target).batch(max_rows=2, max_new_tokens=3)
    tickets = [batch.submit(prompt) for prompt in PROMPTS]
    order = []
    while batch.running or batch.waiting:
        for ticket, _ in batch.step():
            if ticket not in order:
                order.append(ticket)
        assert len(batch.running) <= 2
    assert order == tickets
    with pytest.raises(InputError, match="max_rows must be a whole number >= 1, not 0"):
        eager(target).batch(max_rows=0)


def broken_at(token: int) -> Any:
    """A model whose logits are NaN from the moment it reads `token`."""
    model = tiny_models.tiny("gpt-neox")
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    return model


def test_a_text_that_fails_leaves_the_others_alone() -> None:
    made = eager(broken_at(63), "ngram")
    prompts = [[3, 5, 7], [63, 2], [9]]
    with pytest.raises(NonFiniteLogitsError, match="position 2") as info:
        made.generate(prompts, max_new_tokens=6)
    texts = info.value.generations
    assert [len(t.tokens) for t in texts] == [6, 0, 6]
    assert texts[0].tokens == made.generate(prompts[0], max_new_tokens=6).tokens
    batch = made.batch(max_new_tokens=6)
    tickets = [batch.submit(prompt) for prompt in prompts]
    with pytest.raises(InputError, match="not finished"):
        tickets[0].result()
    batch.drain()
    assert [type(t.error) for t in tickets] == [type(None), NonFiniteLogitsError, type(None)]
    with pytest.raises(NonFiniteLogitsError):
        tickets[1].result()
    assert tickets[2].result().tokens == texts[2].tokens


def test_a_step_that_fails_for_all_is_tried_for_each(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_many(cls: Any, backends: Any, steps: Any) -> Any:
        raise RuntimeError("out of memory")

    forward = EagerBackend.forward

    def fails_on_ones(self: EagerBackend, step: Step) -> StepResult:
        if bool((step.tokens == 1).any()):
            raise RuntimeError("out of memory")
        return forward(self, step)

    monkeypatch.setattr(EagerBackend, "forward_many", classmethod(forward_many))
    made = eager(target)
    expected = made.generate([9], max_new_tokens=5).tokens
    assert 1 not in expected
    monkeypatch.setattr(EagerBackend, "forward", fails_on_ones)
    batch = made.batch(max_new_tokens=5)
    good, bad = batch.submit([9]), batch.submit([3, 1, 4])
    batch.drain()
    assert good.result().tokens == expected
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result()


def test_a_drafter_that_fails_in_a_common_step_costs_its_own_texts_speed_only(target: Any) -> None:
    """The draft's steps raise from the third round on: the guard of each text sees it, and the texts stay."""
    draft = tiny_models.noisy(target, 0.03)
    made = eager(target, draft)
    count = 0

    def fails(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > 40:
            raise RuntimeError("device lost")

    handle = draft.register_forward_pre_hook(fails, with_kwargs=True)
    with pytest.warns(DrafterWarning, match="failed in propose: RuntimeError: device lost"):
        out = made.generate(PROMPTS, max_new_tokens=20)
    handle.remove()
    assert [o.tokens for o in out] == [tiny_models.reference(target, p, 20) for p in PROMPTS]
    assert all(o.stats.drafter_error for o in out)
    assert sum(o.stats.num_draft_tokens for o in out) > 0


def test_a_drafter_without_a_model_rides_along(target: Any) -> None:
    script = tiny_models.reference(target, [3, 5, 7], 20)
    made = eager(target, ScriptedDrafter(script, wrong_every=4))
    out = made.generate([[3, 5, 7], [9]], max_new_tokens=20, strict=True)
    assert out[0].tokens == script
    assert out[0].stats.num_accepted_draft_tokens > 8
    assert out[1].tokens == tiny_models.reference(target, [9], 20)


def test_a_finished_text_lets_go_of_its_caches(target: Any) -> None:
    made = eager(target, tiny_models.noisy(target, 0.03), prefix_cache=0)
    batch = made.batch(max_new_tokens=4)
    ticket = batch.submit([3, 5, 7])
    batch.step()
    caches = [weakref.ref(row.task.target) for row in batch._rows]
    batch.drain()
    gc.collect()
    assert ticket.result().tokens
    assert [ref() for ref in caches] == [None]


def test_seconds_of_a_text_are_its_share(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only steps move: together they are the batch's own time, not each text's waiting for others."""
    clock = 0.0

    def forward_many(cls: Any, backends: Sequence[Backend], steps: Sequence[Step]) -> list[StepResult]:
        nonlocal clock
        clock += 1.0
        return [original(backend, step) for backend, step in zip(backends, steps, strict=True)]

    def forward(self: EagerBackend, step: Step) -> StepResult:
        return EagerBackend.forward_many([self], [step])[0]

    made = eager(target, tiny_models.noisy(target, 0.03))
    original = EagerBackend.forward
    monkeypatch.setattr(EagerBackend, "forward_many", classmethod(forward_many))
    monkeypatch.setattr(EagerBackend, "forward", forward)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    out = made.generate([PROMPTS[0]] * 12, max_new_tokens=25, strict=True)
    monkeypatch.undo()
    assert sum(o.stats.total_seconds for o in out) == pytest.approx(clock)
    assert all(o.stats.total_seconds == pytest.approx(clock / 12) for o in out)  # twelve times the same text
    for stage in ("prefill", "draft", "verify"):
        assert out[0].stats.seconds[stage] > 0
    assert out[0].stats.seconds["commit"] == pytest.approx(0, abs=1e-9)
    alone = made.generate(PROMPTS[0], max_new_tokens=25).stats
    assert out[0].stats.num_rounds == alone.num_rounds
    assert out[0].stats.seconds["draft"] == pytest.approx(sum(r.depth_proposed for r in out[0].trace.rounds) / 12)


# One memory budget.


def test_bytes_are_those_that_the_caches_take(target: Any) -> None:
    backend = EagerBackend.open(target)
    for length in (1, 100, 128, 129, 200):
        session = Session(backend.fork(0))
        session.append([i % 60 for i in range(length)])
        session.forward()
        assert backend.bytes_for(length) == session.backend.num_bytes


def test_a_text_that_cannot_fit_is_refused_before_it_starts(target: Any) -> None:
    draft = tiny_models.noisy(target, 0.03)
    both = 2 * EagerBackend.open(target).bytes_for(128)
    made = eager(target, draft, memory_budget=both)
    assert len(made.generate([3, 5, 7], max_new_tokens=100, strict=True).tokens) == 100
    with pytest.raises(
        MemoryBudgetError, match=r"203 tokens \(the prompt has 3\).*Lower max_new_tokens, shorten.*raise"
    ):
        made.generate([3, 5, 7], max_new_tokens=200)
    assert len(made.generate_plain([3, 5, 7], max_new_tokens=200).tokens) == 200  # no draft, twice the room
    for budget in (0, 1.5):
        with pytest.raises(InputError, match="memory_budget is a number of bytes"):
            eager(target, memory_budget=budget)


def test_texts_wait_until_the_budget_holds_them_and_kept_prompts_give_way(target: Any) -> None:
    one = EagerBackend.open(target).bytes_for(256)
    made = eager(target, memory_budget=2 * one)
    long = [i % 60 for i in range(150)]
    made.generate(long, max_new_tokens=2)
    assert made.prefixes.num_bytes == one
    batch = made.batch(max_new_tokens=4)
    tickets = [batch.submit([*long, i]) for i in range(3)]
    most = 0
    while batch.running or batch.waiting:
        batch.step()
        most = max(most, len(batch.running))
        held = sum(row.task.target.backend.num_bytes for row in batch._rows) + made.prefixes.num_bytes
        assert held <= 2 * one
    assert most == 2
    assert [t.result().tokens for t in tickets] == [tiny_models.reference(target, [*long, i], 4) for i in range(3)]


# Arguments.


def test_lists_of_every_kind_of_prompt() -> None:
    model = tiny_models.tiny("gpt-neox", vocab_size=TEXT_VOCAB)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = specdec.SpeculativeDecoder(model, tokenizer=tokenizer, drafter="ngram")
    texts = made.generate(["ab", "c"], max_new_tokens=4)
    ids = [tokenizer("ab")["input_ids"], tokenizer("c")["input_ids"]]
    assert [o.tokens for o in texts] == [made.generate(p, max_new_tokens=4).tokens for p in ids]
    for same in (ids, tuple(ids), [torch.tensor(i) for i in ids]):
        assert [o.tokens for o in made.generate(same, max_new_tokens=4)] == [o.tokens for o in texts]
    chats = [[{"role": "user", "content": "ab"}], [{"role": "user", "content": "c"}]]
    assert [o.tokens for o in made.generate(chats, max_new_tokens=4)] == [
        made.generate(chat, max_new_tokens=4).tokens for chat in chats
    ]
    assert made.generate([97, 98], max_new_tokens=4).prompt == [97, 98]  # a flat list stays one prompt
    assert made.generate(chats[0], max_new_tokens=1).prompt
    assert made.generate([], max_new_tokens=1).prompt == [BOS]


def test_bad_arguments_for_several_prompts(target: Any) -> None:
    made = eager(target)
    with pytest.raises(InputError, match="2 for 3 prompts"):
        made.generate([[1], [2], [3]], seed=[1, 2])
    with pytest.raises(InputError, match="prompt 1 of 2: the prompt has a token outside the vocabulary"):
        made.generate([[1], [999]])
    with pytest.raises(InputError, match="several prompts are a list of those"):
        made.stream([[1], [2]])
    with pytest.raises(InputError, match="max_new_tokens must be"):
        made.batch().submit([1], max_new_tokens=0)
    out = made.generate([[1], [2], [3]], max_new_tokens=2, max_rows=1, seed=[1, 2, 3])
    assert [len(o.tokens) for o in out] == [2, 2, 2]


def test_a_prefill_chunk_is_at_most_so_long() -> None:
    assert batch_module.MAX_STEP_ROWS >= PREFILL_CHUNK
