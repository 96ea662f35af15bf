"""Timing of rows in turns: the order, the ratios, and which samples count."""

from __future__ import annotations

import pytest
import torch

from specdec.bench.benchmark import Subject, machine
from specdec.bench.machine import ReadProbe, streamed_bytes
from specdec.bench.rows import OURS, Absent, Made, Method, warm_up
from specdec.bench.runbench import BareProbe, Bench, Sample, run
from specdec.bench.synthetic import PRESETS, make_pair
from specdec.bench.timing import Gate
from specdec.trace import Round


def method(name: str, run, *, engine: str = "other", mode: str = "plain", base: str | None = None, **more) -> Method:
    return Method(name, engine, mode, base or name, name, run, **more)


def quiet() -> Gate:
    return Gate(read=lambda: None)


def samples(*seconds: float, tokens: tuple[int, ...] = (1, 2), clean: tuple[bool, ...] = ()) -> list[Sample]:
    return [Sample(Made(tokens), s, clean[i] if clean else True) for i, s in enumerate(seconds)]


def bench(**rows: list[list[Sample]]) -> Bench:
    return Bench([method(name, lambda _: Made(())) for name in rows], dict(rows), {}, [], quiet())


def test_rows_take_turns_and_each_meets_every_prompt():
    seen: list[tuple[str, int]] = []

    def record(name):
        return lambda prompt: seen.append((name, prompt[0])) or Made((0,))

    done = run([method(n, record(n)) for n in "abc"], [[10], [20]], repetitions=2, gate=quiet())
    assert [name for name, _ in seen] == list("abcbcacababc")
    assert [prompt for _, prompt in seen] == [10] * 3 + [20] * 3 + [10] * 3 + [20] * 3
    assert all(len(group) == 2 for groups in done.samples.values() for group in groups)


def test_an_engines_own_clock_counts_where_it_has_one():
    done = run([method("a", lambda _: Made((1, 2), seconds=3.0))], [[0]], repetitions=1, gate=quiet())
    assert done.milliseconds("a").median == 1500


def test_ratios_are_of_neighbours():
    found = bench(ours=[samples(1.0, 10.0)], other=[samples(2.0, 20.0)])
    assert found.speed("ours", "other").median == 2.0


def test_clean_samples_count_alone_where_there_are_any():
    found = bench(a=[samples(1.0, 9.0, clean=(True, False))], b=[samples(9.0, 9.0, clean=(False, False))])
    assert found.milliseconds("a").median == 500
    assert found.milliseconds("b").median == 4500
    assert found.num_clean("a") == (1, 2)
    # No pair is clean, so all of them are looked at.
    assert found.speed("a", "b").median == pytest.approx((9 + 1) / 2)


def test_identical_means_every_repetition():
    same, other = samples(1, 1), [*samples(1), *samples(1, tokens=(1, 3))]
    found = bench(plain=[same, same], row=[same, other])
    assert found.num_identical("row", "plain") == 1


def test_texts_of_a_batch_are_compared_one_by_one():
    made = Made((1, 2, 5, 6, 7, 8), texts=((1, 2), (5, 6), (7, 8)))
    groups = [[Sample(made, 1.0, True)], [Sample(made, 1.0, True)]]
    found = bench(plain=[samples(1, tokens=(1, 2)), samples(1, tokens=(5, 0))], batch=groups)
    assert found.num_identical("batch", "plain") == 1


def test_ideal_is_the_bare_forwards_of_the_rows_own_rounds():
    """Two rounds of three rows (30 ms) after two drafts (4 ms each) emit five tokens: 76 ms; achieved 100."""
    rounds = tuple(Round(num_nodes=2, depth_proposed=2, num_emitted=n) for n in (3, 2))
    ours = method("x model k=2", lambda _: Made(()), engine=OURS, mode="speculative", base="x plain")
    ours = Method(**{**vars(ours), "backend": "x", "drafter": "model", "k": 2})
    plain = Method(**{**vars(method("x plain", lambda _: Made(()), engine=OURS)), "backend": "x"})
    probe = BareProbe({}, 100, torch.device("cpu"))
    probe.add({("target", 1): [0.02, 0.02], ("target", 3): [0.03], ("draft", 1): [0.004]})
    found = Bench(
        [plain, ours],
        {
            "x plain": [[Sample(Made(tuple(range(5)), prefill_seconds=1.0), 1.11, True)]],
            "x model k=2": [[Sample(Made(tuple(range(5)), 2, None, 1.0, rounds), 1.1, True)]],
        },
        {"x": probe},
        [],
        quiet(),
    )
    ideal = found.ideal("x model k=2")
    assert ideal["ideal_ms"] == pytest.approx(76 / 5)
    assert ideal["efficiency"] == pytest.approx(0.76)
    assert ideal["overhead_us"] == pytest.approx(12_000)
    assert ideal["ideal_speedup"] == pytest.approx(100 / 76)
    assert ideal["speedup"] == pytest.approx(1.1)
    assert ideal["of_ideal"] == pytest.approx(1.1 / (100 / 76))
    assert found.tokens_per_step("x model k=2") == 2.5
    assert probe.ratio(3) == pytest.approx(1.5)
    assert probe.ratio(8) is None


def test_widths_are_compared_within_the_same_minute():
    """Medians of either side may fall into different states of the machine."""
    one, wide = [1.0, 1.0, 1.0, 2.0, 2.0], [1.2, 1.2, 2.6, 2.4, 2.4]
    probe = BareProbe({}, 0, torch.device("cpu"), {("target", 1): one, ("target", 8): wide})
    assert probe.costs.target[8] / probe.costs.target[1] == pytest.approx(2.4)
    assert probe.ratio(8) == pytest.approx(1.2)


def test_another_engine_that_fails_leaves_the_rest_of_the_table():
    def fail(_):
        raise RuntimeError("no such instruction\nand more")

    kept, absent, made = warm_up([method("good", lambda _: Made((7,))), method("bad", fail)], [0], lambda _: None)
    assert [m.name for m in kept] == list(made) == ["good"]
    assert absent == [Absent("bad", "no such instruction")]
    with pytest.raises(RuntimeError):
        warm_up([method("ours", fail, engine=OURS)], [0], lambda _: None)


def test_bytes_of_a_step_leave_out_the_rows_of_the_embedding_that_are_not_read():
    shape, pair = PRESETS["tiny"], make_pair("tiny", dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in pair.target.parameters())
    embedding = shape.vocab_size * shape.hidden
    kv = 2 * shape.num_layers * shape.num_kv_heads * (shape.hidden // shape.num_heads) * 100
    assert streamed_bytes(pair.target, 100) == 2 * (parameters - embedding + shape.hidden + kv)


def test_a_tied_embedding_is_read_whole():
    pair = make_pair("tiny")
    apart = streamed_bytes(pair.target, 0)
    pair.target.lm_head.weight = pair.target.model.embed_tokens.weight
    shape = PRESETS["tiny"]
    assert streamed_bytes(pair.target, 0) == apart - 4 * shape.hidden


def test_the_bandwidth_is_of_the_best_pass(monkeypatch):
    probe = ReadProbe("cpu", num_bytes=1 << 12)
    ticks = iter([0, 4, 10, 12, 20, 23, 30, 38])  # passes of 4, 2, 3 and 8 seconds
    monkeypatch.setattr("specdec.bench.machine.time.perf_counter", lambda: next(ticks))
    assert probe() == (1 << 12) / 2


def test_a_step_is_compared_with_the_reading_of_its_turn():
    """A machine that reads half as fast for a while is not held against the step."""
    pair = make_pair("tiny")
    streamed = streamed_bytes(pair.target, 0)
    fast, slow = streamed / 100.0, streamed / 50.0  # seconds, where the machine reads 200 and 100 bytes a second
    steps = [fast, fast, fast, 9 * fast, slow, slow, slow, slow, slow, slow, slow, 0.0]
    probe = BareProbe({}, 0, torch.device("cpu"), {("target", 1): steps})
    assert probe.plain_steps == [fast, slow, slow]
    measured = Bench([], {}, {"eager": probe}, [200.0, 100.0, 100.0], quiet())
    found = machine(measured, Subject("tiny", pair.target, pair.draft, None, [], []))
    assert found["share"] == pytest.approx(0.5)
    assert found["share_of_best"] == pytest.approx(0.25)
