"""Acceptance and identity alone, without time: each text once, and plain texts shared by whoever needs the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.bench.bare import BareCosts
from specdec.bench.compare import Progress, explain_differences, group, ready, ways
from specdec.bench.comparison import PLAIN, SPECULATIVE, Comparison, Timed
from specdec.bench.forks import PromptForks
from specdec.bench.machine import peak_memory

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.bench.prompt_sets import Encoded
    from specdec.bench.prompts import Prompt
    from specdec.chat import Chat
    from specdec.generation import Generation

#: Plain texts by the token ids of their prompts.
PlainTexts = dict[tuple[int, ...], "Generation"]


def accept(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    options: Mapping[str, Any] | None = None,
    *,
    chat: Chat | bool | None = None,
    batch: int = 1,
    forks: PromptForks | None = None,
    plain: PlainTexts | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Decode every prompt once, speculatively; its figures of speed are None.

    Acceptance is a function of models, prompts and options (under policies that do not look at the clock), so once is
    enough. `plain`: texts of the same target and options that are known already; what is missing is decoded, once
    whatever `batch` is, and added. Other arguments as for `compare`.

    Lossless: yes where `generate` is; `rows[i].identical(...)` says so for each prompt.
    """
    options = dict(options or {})
    groups = group(ready(decoder, prompts, options, chat), batch)
    plain, forks = plain if plain is not None else {}, forks if forks is not None else PromptForks()
    methods = ways(decoder, options, forked=True)
    with forks.serving(decoder):
        for done, one in enumerate(groups, 1):
            for ids in one.ids:
                if ids not in plain:
                    ((_, generation),) = methods[PLAIN]((ids,))
                    assert generation is not None
                    plain[ids] = generation
            for row, ids, (tokens, made) in zip(one.rows, one.ids, methods[SPECULATIVE](one.ids), strict=True):
                row.runs[PLAIN] = [Timed(tuple(plain[ids].tokens), 0.0, True, plain[ids])]
                row.runs[SPECULATIVE] = [Timed(tuple(tokens), 0.0, True, made)]
            if progress is not None:
                progress(done, len(groups), one.name)
    rows = [row for one in groups for row in one.rows]
    return Comparison(
        rows=rows,
        baselines=[],
        costs=BareCosts(),
        repetitions=1,
        expects_identity=explain_differences(decoder, rows, options),
        num_slices=0,
        num_clean=0,
        watching=False,
        peak_memory=peak_memory(decoder.backend.capabilities.device),
        timed=False,
    )
