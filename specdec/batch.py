"""Continuous batching: many texts in turns, each in the loop of its own, with the models' steps in common.

A text keeps its own sessions, drafter state, policy and ending; there is no padding, and no text sees another. Only the
calls that the loops make are answered together: in each turn the draft steps of all texts, until every one waits for
the target, and then one step of the target. New texts join between turns; a prompt is prefilled a chunk a turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specdec.decoder import Task, decode
from specdec.errors import InputError
from specdec.generation import Generation
from specdec.goodput import Joined, Load
from specdec.runtime.clock import clock_of
from specdec.runtime.session import Answer, Call, answer
from specdec.text import Chunk

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

#: When something began and ended, on a clock.
Span = tuple[Any, Any]
MAX_ROWS = 32
# Rows of one model step, prefill chunks and all: bounds its scratch, and how long decoding texts wait for prompts.
MAX_STEP_ROWS = 1024


class Ticket:
    """A text of a batch. `generation` is what there is of it; `error` is why it ended, when it failed."""

    def __init__(self, number: int, task: Task):
        self.number = number
        self.error: Exception | None = None
        self.is_done = False
        self._task: Task | None = task
        self._logprobs: list[float] = []
        self._generation: Generation | None = None

    def __repr__(self) -> str:
        state = "failed" if self.error else "done" if self.is_done else "not done"
        return f"Ticket({self.number}, {state})"

    @property
    def generation(self) -> Generation:
        if self._generation is not None:
            return self._generation
        assert self._task is not None
        return Generation.of(self._task, self._logprobs)

    def result(self) -> Generation:
        """The finished text; raises what ended it when it failed, and `InputError` when it is not over yet."""
        if self.error is not None:
            raise self.error
        if not self.is_done:
            raise InputError("this text is not finished; call the batch's drain() or step() first")
        return self.generation

    def _take(self, chunk: Chunk) -> None:
        assert self._task is not None
        self._task.trace.num_tokens = len(self._task.ending.tokens)
        self._logprobs += chunk.logprobs or ()

    def _finish(self, error: Exception | None = None) -> None:
        self._generation = self.generation
        self._task = None  # lets go of the caches
        self.error, self.is_done = error, True


class _Row:
    """A text that runs: its loop, and what the loop waits for: the answer to `call`, or (None) the next turn."""

    def __init__(self, ticket: Ticket, task: Task, load: Load):
        self.ticket = ticket
        self.policy = Joined(task.policy, load)
        self.task = replace(task, policy=self.policy)
        self.loop: Generator[Chunk | Call, Any, None] = decode(self.task)
        self.call: Call | None = None
        self._left = time.perf_counter()

    @property
    def is_prefilling(self) -> bool:
        return self.task.trace.is_prefilling

    def resume(self, given: Answer | Exception | None = None, share: float = 0.0) -> Chunk | None:
        """Run on until the loop waits again; the chunk when it has one. `share`: seconds of it to account for.

        An exception that leaves the loop ends this text and no other.
        """
        self.task.trace.seconds_away += time.perf_counter() - self._left - share
        self.call, chunk = None, None
        try:
            event = self.loop.throw(given) if isinstance(given, Exception) else self.loop.send(given)
            if isinstance(event, Chunk):
                chunk = event
                self.ticket._take(chunk)
            else:
                self.call = event
        except StopIteration:
            self.ticket._finish()
        except Exception as error:
            self.ticket._finish(error)
        self._left = time.perf_counter()
        return chunk


class Batch:
    """Texts that decode together. Made by `SpeculativeDecoder.batch`.

    `submit` checks a prompt and queues it; `step` runs one turn and returns the chunks it brought; `drain` runs until
    nothing is left. At most `max_rows` texts run at once, and as many as the decoder's memory budget holds. Iterating
    runs turns and gives (ticket, chunk).

    Lossless: yes. A text's tokens are those it has alone; in half precision on stock kernels, those it has alone up to
    near-ties (docs/numerics.md).
    """

    def __init__(self, decoder: SpeculativeDecoder, max_rows: int = MAX_ROWS, **options: Any):
        if not isinstance(max_rows, int) or max_rows < 1:
            raise InputError(f"max_rows must be a whole number >= 1, not {max_rows!r}")
        self.decoder, self.max_rows, self.options = decoder, max_rows, options
        self.load = Load()
        self._family = decoder.backend.family
        self._clock = clock_of(decoder.backend.capabilities.device)
        self._queue: deque[tuple[Ticket, Task]] = deque()
        self._rows: list[_Row] = []
        self._num_submitted = 0

    @property
    def running(self) -> list[Ticket]:
        return [row.ticket for row in self._rows]

    @property
    def waiting(self) -> list[Ticket]:
        return [ticket for ticket, _ in self._queue]

    def submit(self, prompt: Any, **options: Any) -> Ticket:
        """Queue a prompt; options as for `generate`, before those of the batch. `InputError` when it cannot run."""
        task = self.decoder.prepare(prompt, **{**self.options, **options})
        self._reserve()
        ticket = Ticket(self._num_submitted, task)
        self._num_submitted += 1
        self._queue.append((ticket, task))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a text where it is; its generation stays, with no finish reason."""
        for row in self._rows:
            if row.ticket is ticket:
                row.loop.close()
                ticket._finish()
        for item in list(self._queue):
            if item[0] is ticket:
                self._queue.remove(item)
                ticket._finish()
        self._leave()

    def __iter__(self) -> Iterator[tuple[Ticket, Chunk]]:
        while self._rows or self._queue:
            yield from self.step()

    def drain(self) -> None:
        """Run until every text is done."""
        for _ in self:
            pass

    def step(self) -> list[tuple[Ticket, Chunk]]:
        """One turn: new texts join, all draft, and the target runs once over what it is asked for."""
        started = time.perf_counter()
        planning = {id(run) for run in self.load.runs}
        others = [row for row in self._rows if id(row.policy.run) not in planning and not row.is_prefilling]
        last = [row.task.trace.current for row in others]
        self.load.new_turn(sum(r.num_nodes + 1 for r in last), sum(r.num_emitted for r in last))
        self._admit()
        for row in self._rows:
            if row.call is None:
                row.resume()
        marks = self._draft()
        chunks, rows, span = self._verify()
        if rows:  # and the verdicts have been read: a device is done with all of it
            seconds = self._clock.between(*span)
            waves = [
                (texts, self._clock.between(*taken) / levels) for texts, levels, taken in marks for _ in range(levels)
            ]
            overhead = time.perf_counter() - started - seconds - sum(wave[1] for wave in waves)
            self.load.observe(rows, seconds, waves, max(0.0, overhead))
        self._leave()
        return chunks

    def _reserve(self, more: int = 0) -> bool:
        """Whether `more` bytes fit beside the running texts; kept prompts make room for all."""
        if self.decoder.memory_budget is None:
            return True
        left = self.decoder.memory_budget - sum(row.task.num_bytes for row in self._rows) - more
        if left >= 0:
            self.decoder.prefixes.make_room(left)
        return left >= 0

    def _admit(self) -> None:
        while self._queue and len(self._rows) < self.max_rows and self._reserve(self._queue[0][1].num_bytes):
            ticket, task = self._queue.popleft()
            self._rows.append(_Row(ticket, task, self.load))

    def _leave(self) -> None:
        for row in self._rows:
            if row.ticket.is_done:
                self.load.leave(row.policy.run)
        self._rows = [row for row in self._rows if not row.ticket.is_done]

    def _draft(self) -> list[tuple[int, int, Span]]:
        """Answer the drafts' calls until every text waits for the target; prompts get one chunk. Of each call in which
        no prompt took part: the texts, the steps one after another, and when it began and ended."""
        waves: list[tuple[int, int, Span]] = []
        prompts = True
        while True:
            asking = [row for row in self._rows if row.call is not None and self._drafts(row.call)]
            chosen = _within([row for row in asking if prompts or not row.is_prefilling])
            if not chosen:
                return waves
            prompts = any(row.is_prefilling for row in chosen)
            started = self._clock.mark()
            levels = max(row.call.num_levels for row in chosen if row.call is not None)
            for row, given, share in _answers(chosen):
                row.resume(given, share)
            if not prompts:
                waves.append((len(chosen), levels, (started, self._clock.mark())))
            prompts = False

    def _drafts(self, call: Call) -> bool:
        return call.backend.family is not self._family

    def _verify(self) -> tuple[list[tuple[Ticket, Chunk]], int, Span]:
        """One step of the target. The chunks; its rows, when it was one of decoding texts alone; and its time."""
        asking = [row for row in self._rows if row.call is not None and not self._drafts(row.call)]
        chosen = _within(asking)
        pure = len(chosen) == len(asking) and not any(row.is_prefilling for row in chosen)
        num_rows = sum(row.call.num_rows for row in chosen if row.call is not None)
        started = self._clock.mark()
        answers = list(_answers(chosen))
        span = started, self._clock.mark()
        # Those that were served wait at the end of the line, behind those that did not fit.
        self._rows = [row for row in self._rows if row not in chosen] + chosen
        chunks = []
        for row, given, share in answers:
            chunk = row.resume(given, share)
            if chunk is not None:
                chunks.append((row.ticket, chunk))
        return chunks, num_rows if pure else 0, span


def _within(rows: Sequence[_Row]) -> list[_Row]:
    """The first of them whose calls fit into one step; never none when there are any."""
    chosen: list[_Row] = []
    room = MAX_STEP_ROWS
    for row in rows:
        assert row.call is not None
        room -= row.call.num_rows
        if room < 0 and chosen:
            break
        chosen.append(row)
    return chosen


def _answers(rows: Sequence[_Row]) -> Iterator[tuple[_Row, Answer | Exception, float]]:
    """Answer the calls of these texts, those of one family together; each with its share of the seconds, by rows."""
    families: dict[tuple[int, bool], list[_Row]] = {}
    for row in rows:
        assert row.call is not None
        families.setdefault((id(row.call.backend.family), row.call.chain is None), []).append(row)
    for group in families.values():
        calls = [row.call for row in group if row.call is not None]
        started = time.perf_counter()
        answers = _forward(calls)
        per_row = (time.perf_counter() - started) / sum(call.num_rows for call in calls)
        for row, call, given in zip(group, calls, answers, strict=True):
            yield row, given, per_row * call.num_rows


def _forward(calls: Sequence[Call]) -> Sequence[Answer | Exception]:
    try:
        return answer(calls)
    except Exception as error:
        if len(calls) == 1:
            return [error]
        # One text's failure is not the others': writing a slot twice writes the same.
        return [given for call in calls for given in _forward([call])]
