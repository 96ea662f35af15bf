"""What the measured acceptance and bare forward costs would allow.

A bare forward is the backend's own step, without proposing, verifying, committing or sampling.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from specdec.bench.timing import synchronize
from specdec.costs import cost_at
from specdec.runtime.backend import Step
from specdec.runtime.session import Session

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

# More widths than this are not measured one by one; those between lie on a line.
_MAX_WIDTHS = 12
_MIN_REPETITIONS, _MAX_REPETITIONS = 5, 40
_SECONDS = 2.0


class RoundShape(Protocol):
    """What the ideal needs of a round of the trace."""

    @property
    def num_nodes(self) -> int: ...
    @property
    def depth_proposed(self) -> int: ...
    @property
    def num_emitted(self) -> int: ...


@dataclass(frozen=True)
class BareCosts:
    """Median seconds of one forward: of the target by width (rows), of the draft model at width 1 (0: no model)."""

    target: Mapping[int, float] = field(default_factory=dict)
    draft: float = 0.0
    length: int = 0  # tokens in the cache meanwhile


def round_seconds(rounds: Sequence[RoundShape], costs: BareCosts) -> float:
    """Bare seconds of all rounds: each one target forward over root and nodes, one draft forward per drafted depth."""
    return sum(costs.draft * r.depth_proposed + cost_at(costs.target, r.num_nodes + 1) for r in rounds)


def ideal_speedup(rounds: Sequence[RoundShape], costs: BareCosts) -> float:
    """Plain seconds per token over speculative seconds per token, if only bare forwards cost anything.

    0 without rounds.
    """
    seconds = round_seconds(rounds, costs)
    emitted = sum(r.num_emitted for r in rounds)
    return cost_at(costs.target, 1) * emitted / seconds if seconds > 0 else 0.0


def choose_widths(rounds: Sequence[RoundShape]) -> list[int]:
    """Width 1, and the widths that the rounds really had; evenly thinned when there are many."""
    widths = sorted({1, *(r.num_nodes + 1 for r in rounds)})
    if len(widths) <= _MAX_WIDTHS:
        return widths
    step = (len(widths) - 1) / (_MAX_WIDTHS - 1)
    return sorted({widths[round(i * step)] for i in range(_MAX_WIDTHS)})


def _step(session: Session, width: int) -> Step:
    """A chain of `width` rows behind what the session has cached."""
    start = session.num_cached
    tokens = torch.tensor([session.tokens[i % len(session.tokens)] for i in range(width)], dtype=torch.int64)
    block = torch.ones(width, width, dtype=torch.bool).tril()
    capabilities = session.backend.capabilities
    read = capabilities.input_width
    inputs = torch.zeros(width, read, dtype=capabilities.dtype, device=capabilities.device) if read else None
    return Step(tokens, start, block, torch.arange(start, start + width), start, width, inputs_MW=inputs)


def forwards(
    decoder: SpeculativeDecoder, text: Sequence[int], widths: Sequence[int], draft_width: int = 1
) -> tuple[dict[tuple[str, int], Callable[[], object]], int]:
    """Bare forwards behind `text` (token ids), by ("target", width) and ("draft", 1), and the tokens cached meanwhile.

    `draft_width`: rows of the draft's step, which is called ("draft", 1) all the same.

    Each call computes the same step again. Widths beyond the context are left out.
    """
    task = decoder.prepare(list(text), max_new_tokens=1)
    task.target.append(text)
    task.target.prefill()
    room = task.target.context - task.target.num_cached
    drafting = decoder.drafter.sessions(decoder.drafter.start(task.request))
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for width in [width for width in widths if width <= room] or [1]:
        step = _step(task.target, width)
        calls["target", width] = lambda step=step: task.target.backend.forward(step)  # type: ignore[misc]
    for session in drafting[:1]:
        session.prefill()
        own = _step(session, draft_width)
        calls["draft", 1] = lambda session=session, own=own: session.backend.forward(own)  # type: ignore[misc]
    return calls, task.target.num_cached


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def collect(seconds: Mapping[tuple[str, int], Sequence[float]], length: int) -> BareCosts:
    """Medians, by what was called."""
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    target = {width: value for (what, width), value in medians.items() if what == "target"}
    return BareCosts(target, medians.get(("draft", 1), 0.0), length)


def measure(decoder: SpeculativeDecoder, text: Sequence[int], widths: Sequence[int], batch: int = 1) -> BareCosts:
    """Time bare forwards behind `text` (token ids): every width once per repetition, the draft between them.

    `batch`: so many texts decode together. Then each step has the rows of all of them, and what is returned is one
    text's share of its seconds. (All rows stand behind one text here: attention to many caches costs a little more.)
    """
    calls, length = forwards(decoder, text, [width * batch for width in widths], batch)
    device = decoder.backend.capabilities.device
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    began = time.perf_counter()
    for repetition in range(_MAX_REPETITIONS + 1):
        if repetition > _MIN_REPETITIONS and time.perf_counter() - began > _SECONDS:
            break
        for key, call in calls.items():
            taken = timed(call, device)
            if repetition:  # the first one warms up
                seconds[key].append(taken / batch)
    return collect({(what, max(1, width // batch)): values for (what, width), values in seconds.items()}, length)
