"""Recording: plain decoding that, at every position, also asks what would have been drafted from there.

It is the loop itself, with a second look at each round that takes nothing but the target's own next token. So a
drafter is asked by its own contract, and every position of the text is the beginning of a round.

Shape suffixes are those of `specdec.replay.recording`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.dtypes import dtype_name
from specdec.errors import InputError, NonFiniteLogitsError
from specdec.generation import Stream
from specdec.policy import MAX_DEPTH, Fixed
from specdec.proposal import Draw
from specdec.registry import create
from specdec.replay.notes import Lingering, Notes, Overheard
from specdec.replay.recording import FORMAT, LAYOUT, STAGES, Array, Recording
from specdec.sampling import Sampling

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

Tick = Callable[[int, int, str], None]
_RULE = "coupled"  # whose text is plain decoding's at every temperature


@dataclass
class _Run:
    """One recording in the making."""

    decoder: SpeculativeDecoder
    notes: Notes
    depth: int
    options: Mapping[str, Any]
    texts: list[list[int]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    finished: list[str | None] = field(default_factory=list)
    draw: Draw = Draw.POINT

    def text(self, ids: Sequence[int], seed: int) -> None:
        self.notes.begin()
        rule, policy = create("verifier", _RULE), Fixed(self.depth)
        more = {"drafter": self.notes.drafter, "verifier": rule, "policy": policy, "strict": True, "seed": seed}
        task = self.decoder.prepare(list(ids), **{**self.options, **more})
        self.draw = Draw.POINT if task.request.sampling.is_greedy else task.request.draw
        self.notes.drafter_draw = self.draw
        ending = Lingering(task.request, task.ending.tokenizer, task.ending.max_new_tokens, task.ending.stop)
        ending.beyond, room = self.depth, ending.room
        if room < 1:
            raise InputError("a prompt fills the model's context: there is no room for a token")
        stream = Stream(replace(task, ending=ending, settle=self.notes))
        before = len(self.notes.seconds)
        try:
            made = stream.finish()
        except NonFiniteLogitsError as error:
            raise InputError(f"a recording needs whole texts: {error}") from error
        count = len(made.tokens)
        for record, own in zip(made.trace.rounds, self.notes.seconds[before:], strict=True):
            taken = {**record.seconds, "verify": max(0.0, record.seconds["verify"] - own)}
            self.notes.rows["seconds_PF"].append([taken[stage] for stage in STAGES])
        self.texts.append([len(ids), count, ending.num_tokens or count, room])
        self.prompts += ids
        self.finished.append(ending.why)

    def arrays(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        positions = len(self.notes.rows["tokens_P"])
        for name, (kind, letters) in LAYOUT.items():
            rows: Any = {"texts_TC": self.texts, "prompts_Q": self.prompts}.get(name, self.notes.rows.get(name))
            if letters == "PM" and name.startswith("draft_") and any(len(row) == 0 for row in rows):
                rows = _without_gaps(rows, name)
            found[name] = np.array(rows, dtype=kind)
            if letters == "PM":
                found[name] = found[name].reshape(positions, -1) if positions else found[name]
        return found


def _without_gaps(rows: list[Array], name: str) -> list[Array]:
    """Where nothing was drafted there is no row either."""
    width = max(len(row) for row in rows)
    fill = np.full(width, 0 if name.endswith("ids_PM") else -np.inf)
    return [row if len(row) else fill for row in rows]


def record(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Any],
    *,
    depth: int = 8,
    top_m: int = 64,
    costs: bool = True,
    setting: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
    tick: Tick | None = None,
    **options: Any,
) -> Recording:
    """Decode the prompts plainly, drafting a chain of `depth` tokens at every position; `options` as for `generate`.

    `seed` may be a list of one for each prompt: texts of one seed share the noise of their positions, so that they are
    no independent evidence about others. `top_m`: entries of each row that are kept. `costs`: also time bare steps (two
    seconds), for predicted speed-ups. `setting`, `names`: what the models and the prompts are called.
    `tick(done, total, name)` is called after each text. One target step of `depth + 1` rows and `depth` draft steps
    per token. Raises `InputError` before any work.

    Lossless: yes; the recorded texts are plain decoding's.
    """
    if not 1 <= depth <= MAX_DEPTH or top_m < 1:
        raise InputError(f"depth lies between 1 and {MAX_DEPTH}, and top_m is at least 1: {depth} and {top_m}")
    if options.get("exact"):
        raise InputError("exact=True decides positions again, one by one: record without it, in float32")
    if decoder.drafter.name == "none":
        raise InputError("there is no drafter to record: name one, as in specdec.load(drafter='model')")
    capabilities = decoder.backend.capabilities
    seeds = options.pop("seed", 0)
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else list(seeds)
    if not prompts or len(seeds) != len(prompts):
        raise InputError(f"no prompts to record, or no seed for each: {len(prompts)} prompts, {len(seeds)} seeds")
    encoded = [
        list(decoder.prepare(prompt, seed=seed, **options).request.prompt)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    notes = Notes(Overheard(decoder.drafter), depth, min(top_m, capabilities.vocab_size))
    run = _Run(decoder, notes, depth, options)
    for number, (ids, seed) in enumerate(zip(encoded, seeds, strict=True)):
        run.text(ids, seed)
        if tick is not None:
            tick(number + 1, len(encoded), names[number] if names else "")
    arrays = run.arrays()
    meta = _meta(run, arrays, setting or {}, list(names) or [str(i + 1) for i in range(len(encoded))])
    meta["seeds"] = seeds
    meta["sampling"]["seed"] = seeds[0]
    meta["costs"] = _costs(run, encoded[0], arrays) if costs else None
    return Recording(arrays, meta)


def _meta(run: _Run, arrays: Mapping[str, Array], setting: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    from specdec.train.provenance import draft_fingerprint, fingerprint, versions

    decoder, drafter = run.decoder, run.decoder.drafter
    sampling = decoder.prepare([0], **run.options).request.sampling
    known = {f.name: getattr(sampling, f.name) for f in fields(Sampling) if f.name != "processors"}
    return {
        "format": FORMAT,
        "target": fingerprint(decoder.target),
        "draft": draft_fingerprint(drafter),
        "drafter": drafter.name,
        "memory": drafter.memory.value,
        "draw": run.draw.value,
        "draws": sorted(draw.value for draw in drafter.draws),
        "trees": drafter.trees,
        "greedy": sampling.is_greedy,
        "sampling": known,
        "processors": len(sampling.processors),
        "vocab_size": decoder.backend.capabilities.vocab_size,
        "max_new_tokens": int(run.options.get("max_new_tokens", 128)),
        "prompts": names,
        "finished": run.finished,
        "num_inconsistent": run.notes.num_inconsistent,
        "dtype": dtype_name(decoder.backend.capabilities.dtype),
        "device": str(decoder.backend.capabilities.device),
        "backend": decoder.backend.describes,
        "numerics": decoder.backend.numerics,
        "versions": versions(),
        "setting": dict(setting),
    }


def _costs(run: _Run, prompt: Sequence[int], arrays: Mapping[str, Array]) -> dict[str, Any]:
    """Seconds: of verification by rows, of a drafted level, and of the rest of a round."""
    from specdec.bench import bare

    widths = sorted({1, 2, 3, 5, 9, 17, run.depth + 1})
    text = [*prompt, *arrays["tokens_P"][: run.texts[0][1]].tolist()]
    found = bare.measure(run.decoder, text[: max(len(prompt), len(text) // 2)], widths)
    seconds = arrays["seconds_PF"]
    levels = (arrays["drafted_PK"] >= 0).sum(1)
    full = levels == run.depth if (levels == run.depth).any() else levels >= 0
    known = max(width for width in found.target)
    beside = max(0.0, statistics.median(seconds[full, 1].tolist()) - found.target[min(known, run.depth + 1)])
    drafting = [float(taken) / int(n) for taken, n in zip(seconds[:, 0], levels, strict=True) if n]
    return {
        "verify": {str(width): value + beside for width, value in found.target.items()},
        "draft": statistics.median(drafting) if drafting else 0.0,
        "other": statistics.median((seconds[:, 2] + seconds[:, 3]).tolist()),
    }
