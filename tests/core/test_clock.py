"""Where seconds are counted when a device works on after the host has gone ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch

import specdec
from specdec.drafter import Outcome
from specdec.policy import Fixed
from specdec.proposal import Proposal
from specdec.runtime import clock
from specdec.runtime.clock import DeviceClock, HostClock, clock_of
from specdec.trace import Trace


class Lagging(HostClock):
    """A device whose moments are told beforehand."""

    lags = True

    def __init__(self, moments: Iterator[float]):
        self.moments = moments

    def mark(self) -> float:
        return next(self.moments)


def one_round(device: HostClock | None, monkeypatch: pytest.MonkeyPatch, away: float = 0.0) -> dict[str, float]:
    """A host that takes 1 s to draft, 4 s to verify and 1 s to commit."""
    trace, now = Trace(device), [0.0]
    monkeypatch.setattr("specdec.trace.time.perf_counter", lambda: now[0])
    with trace.round() as record:
        with trace.stage("draft"):
            now[0] += 1.0 + away
            trace.seconds_away += away
        with trace.stage("verify"):
            now[0] += 4.0
        with trace.stage("commit"):
            now[0] += 1.0
        record.take("model", Outcome(Proposal.empty(), (), (1,), torch.zeros(1, 4)))
    return record.seconds


@pytest.mark.parametrize(
    ("drafting", "draft", "verify"),
    [(0.5, 1.0, 4.0), (3.0, 3.0, 2.0), (9.0, 5.0, 0.0)],
    ids=["the host is slower", "the device is slower", "no more than there was"],
)
def test_what_the_device_still_drafts_is_the_drafts(
    drafting: float, draft: float, verify: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = one_round(Lagging(iter([10.0, 10.0 + drafting])), monkeypatch)
    assert (seconds["draft"], seconds["verify"], seconds["commit"], seconds["other"]) == (draft, verify, 1.0, 0.0)


def test_where_nothing_lags_or_other_texts_came_between_the_host_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (
        one_round(None, monkeypatch),
        one_round(HostClock(), monkeypatch),
        one_round(Lagging(iter([0.0, 3.0])), monkeypatch, away=2.0),
    ):
        assert (seconds["draft"], seconds["verify"]) == (1.0, 4.0)


def test_a_batch_learns_the_devices_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns in which the host only queues: what a step takes is between the device's own moments."""
    made = specdec.SpeculativeDecoder(
        target := tiny_models.tiny(),
        drafter=specdec.drafters.ModelDrafter(tiny_models.noisy(target, 0.02), "eager"),
        policy=Fixed(2),
        backend="eager",
    )
    batch = made.batch()
    moments = (float(100 * i * i) for i in range(10_000))  # each span is longer than the last one
    batch._clock = Lagging(moments)
    batch.submit([3, 5, 7], max_new_tokens=12)
    seen: list[tuple[int, float, Any, float]] = []
    monkeypatch.setattr(batch.load, "observe", lambda *measured: seen.append(measured))
    batch.drain()
    assert len(seen) > 2
    spans = {100.0 * ((i + 1) ** 2 - i**2) for i in range(10_000)}
    for rows, verify, waves, overhead in seen:
        assert rows == 3 or len(waves) < 2  # the last draft is cut to what room is left
        assert verify in spans
        assert all(texts == 1 and seconds in spans and seconds < verify for texts, seconds in waves)
        assert overhead == 0.0


def test_a_device_is_asked_for_its_own_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: str) -> None:
            self.stream = stream

        def elapsed_time(self, other: Event) -> float:
            assert self.stream == other.stream == "stream of cuda:1"
            return 250.0

    monkeypatch.setattr(clock.torch.cuda, "Event", Event)
    monkeypatch.setattr(clock.torch.cuda, "current_stream", lambda device: f"stream of {device}")
    made = clock_of(torch.device("cuda:1"))
    assert isinstance(made, DeviceClock)
    assert made.between(made.mark(), made.mark()) == 0.25
    assert not clock_of(torch.device("cpu")).lags


@pytest.mark.gpu
def test_on_a_gpu_a_queued_product_takes_its_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    made = clock_of(device := torch.device("cuda"))
    x = torch.ones(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    start = made.mark()
    x @ x
    end = made.mark()
    torch.cuda.synchronize()
    assert made.between(start, end) > 0
