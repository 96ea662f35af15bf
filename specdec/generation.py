"""What comes out: a stream of chunks, and the finished text."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from specdec.decoder import Task, decode
from specdec.runtime.session import answered
from specdec.text import Chunk
from specdec.trace import Stats, Trace


@dataclass(frozen=True, eq=False)
class Generation:
    """A text. `tokens` are the new ones; `finish_reason`: "eos", "stop", "length", "context", or None: not finished."""

    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str | None
    origins: list[str]
    logprobs: list[float] | None
    trace: Trace

    @property
    def stats(self) -> Stats:
        return self.trace.stats

    @staticmethod
    def of(task: Task, logprobs: Sequence[float]) -> Generation:
        """What there is of a task's text so far; `logprobs` are those of its chunks."""
        ending = task.ending
        return Generation(
            prompt=list(task.request.prompt),
            tokens=ending.tokens,
            text=ending.text,
            finish_reason=ending.reason,
            origins=ending.origins,
            logprobs=list(logprobs) if task.logprobs else None,
            trace=task.trace,
        )


class Stream(Iterator[Chunk]):
    """Chunks of text, tokens and origins, one per round. `generation` is the text so far.

    Every stream has sessions of its own; leaving one early, or `close`, rewinds them and leaves nothing behind.
    """

    def __init__(self, task: Task):
        self.task = task
        self._logprobs: list[float] = []
        self._chunks = self._run()

    def _run(self) -> Generator[Chunk, None, None]:
        chunks = answered(decode(self.task))
        try:
            for chunk in chunks:
                self.task.trace.num_tokens = len(self.task.ending.tokens)
                self._logprobs += chunk.logprobs or ()
                yield chunk
        finally:
            chunks.close()
            self.task.target.rewind(0)

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        self._chunks.close()

    def finish(self) -> Generation:
        """Decode to the end."""
        for _ in self:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        return Generation.of(self.task, self._logprobs)
