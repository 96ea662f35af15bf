"""Recording: plain decoding that, at every position, also asks what would have been drafted from there.

It is the loop itself, with a second look at each round that takes nothing but the target's own next token. So a
drafter is asked by its own contract, and every position of the text is the beginning of a round.

Shape suffixes: N drafted nodes, V vocabulary, M kept entries.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.chance import Chance, CounterChance
from specdec.drafter import Drafter, Outcome, Prefill, Request, WrappedDrafter
from specdec.dtypes import dtype_name
from specdec.errors import InputError, NonFiniteLogitsError
from specdec.generation import Stream
from specdec.policy import MAX_DEPTH, Fixed
from specdec.proposal import Draw
from specdec.registry import create
from specdec.replay.recording import FORMAT, LAYOUT, STAGES, Array, Recording
from specdec.runtime.session import Rows, Steps
from specdec.sampling import Sampling
from specdec.text import Chunk, Ending
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.decoder import Task

Tick = Callable[[int, int, str], None]
_RULE = "coupled"  # whose text is plain decoding's at every temperature


@dataclass(frozen=True)
class _Listening(Sampling):
    """A drafter's sampling that remembers the scores it was asked for: one row for each node that was expanded."""

    heard: list[Tensor] = field(default_factory=list)

    @property
    def reads_prefix(self) -> bool:
        return True  # so that columns of a draft vocabulary come under the target's ids

    def scores(self, logits: Tensor, prefix: Sequence[int], tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        found = super().scores(logits, prefix, tree, nodes)
        self.heard.append(found)
        return found


class _Overheard(WrappedDrafter):
    """A drafter whose rows are listened to."""

    def __init__(self, inner: Drafter):
        super().__init__(inner)
        self.heard: list[Tensor] = []

    def starting(self, request: Request, prefill: Prefill = lambda session: session.prefilling()) -> Steps[Any]:
        plain = {f.name: getattr(request.sampling, f.name) for f in fields(Sampling)}
        listening = _Listening(**plain, heard=self.heard)
        return (yield from self.inner.starting(replace(request, sampling=listening), prefill))

    def rows(self, count: int, vocab_size: int) -> Tensor | None:
        """Scores `[N, V]` behind the last `count` drafted tokens; None where the drafter has none of the target's."""
        heard, self.heard[:] = list(self.heard), []
        rows = [row for block in heard for row in block]
        if len(rows) < count or any(len(row) != vocab_size for row in rows):
            return None
        return torch.stack(rows[:count]) if count else None


class _Lingering(Ending):
    """Goes on for `beyond` tokens after an end-of-text or a stop, which rounds that reach over it may accept."""

    beyond = 0
    num_tokens: int | None = None  # of the text proper
    why: str | None = None

    def cut(self, outcome: Outcome, drafter: str, logprobs: Sequence[float] | None = None) -> Chunk:
        chunk = super().cut(outcome, drafter, logprobs)
        if self.reason is not None and self.num_tokens is None:
            self.num_tokens, self.why = len(self.tokens), self.reason
        if self.num_tokens is not None and self.room > 0 and len(self.tokens) < self.num_tokens + self.beyond:
            self.reason = None
        return chunk


class _Notes:
    """The second look: writes a position down, and keeps of the round only the target's own token."""

    def __init__(self, drafter: _Overheard, depth: int, top_m: int):
        self.drafter, self.depth, self.top_m = drafter, depth, top_m
        self.rows: dict[str, list[Any]] = {name: [] for name, (_, letters) in LAYOUT.items() if letters[0] == "P"}
        self.waiting: deque[Tensor | None] = deque(maxlen=depth)  # rows of q of the last positions, newest last
        self.seconds: list[float] = []  # that this took
        self.expected: dict[int, int] = {}  # position -> the target's choice there, by an earlier round's rows
        self.num_inconsistent = 0
        self.first = 0  # of the present text

    def begin(self) -> None:
        """A new text."""
        self.first = len(self.rows["tokens_P"])
        self.waiting.clear()
        self.expected.clear()
        self.drafter.heard.clear()

    def __call__(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        began = time.perf_counter()
        if outcome.tokens:
            self._write(task, rows, outcome)
            outcome = Outcome(outcome.proposal, (), outcome.tokens[:1], outcome.logits)
        self.seconds.append(time.perf_counter() - began)
        return outcome

    def _write(self, task: Task, rows: Rows, outcome: Outcome) -> None:
        tree, token, sampling = outcome.proposal.tree, outcome.tokens[0], task.request.sampling
        position = len(task.target.tokens)
        log_p_NV = sampling.scores(rows.logits, task.target.tokens, tree, range(-1, len(tree))).log_softmax(-1)
        drafted: list[int] = tree.tokens.tolist()
        scores_NV = self.drafter.rows(len(drafted), log_p_NV.shape[-1])
        self._check(position, outcome)
        self.waiting.append(scores_NV)
        self._row("tokens_P", token)
        self._row("text_p_P", float(log_p_NV[0, token].exp()))
        self._padded("drafted_PK", drafted, -1)
        at = torch.tensor(drafted, dtype=torch.int64, device=log_p_NV.device)[:, None]
        self._padded("drafted_p_PK", log_p_NV[:-1].gather(1, at)[:, 0].exp().tolist(), np.nan)
        self._top("target", log_p_NV[0])
        if scores_NV is None:
            self._padded("drafted_q_PK", [], np.nan)
            self._row("overlap_P", np.nan)
            self._top("draft", None)
        else:
            q_NV = scores_NV.softmax(-1)
            self._padded("drafted_q_PK", q_NV.gather(1, at.to(q_NV.device))[:, 0].tolist(), np.nan)
            self._row("overlap_P", float(torch.minimum(log_p_NV[0].exp(), q_NV[0].to(log_p_NV)).sum()))
            self._top("draft", scores_NV[0].log_softmax(-1))
        for name, fill in (("text_q_PK", np.nan), ("place_PK", -1), ("rank_PK", -1)):
            self._padded(name, [], fill)
        self._compare(token, position, outcome.proposal.draws, sampling)

    def _check(self, position: int, outcome: Outcome) -> None:
        """Does this position's token equal what an earlier round's wider step said about it?"""
        said = self.expected.pop(position, outcome.tokens[0])
        self.num_inconsistent += said != outcome.tokens[0]
        for depth, token in enumerate(outcome.tokens[1:], 1):
            self.expected[position + depth] = token

    def _compare(self, token: int, position: int, draws: Sequence[Draw], sampling: Sampling) -> None:
        """Where the text's token stands in the rows that were drafted for its position, from the positions before."""
        here = len(self.rows["tokens_P"]) - 1
        chance: Chance = sampling.chance("draft")
        for depth, scores_NV in enumerate(reversed(self.waiting)):
            row = here - depth
            first = self.rows["drafted_PK"][row][depth]
            if first < 0:
                continue
            right = first == token
            if scores_NV is None:  # a point mass without a law
                self.rows["place_PK"][row][depth] = self.rows["rank_PK"][row][depth] = 0 if right else self.top_m
                continue
            scores_V = scores_NV[depth]
            q_V = scores_V.softmax(-1)
            rank = int((scores_V > scores_V[token]).sum())
            place = rank
            if self.drafter_draw is Draw.SHARED and isinstance(chance, CounterChance):
                arrival_V = chance.noise(position, len(q_V), q_V.device) / q_V.double()
                place = int((arrival_V < arrival_V[token]).sum())
            self.rows["text_q_PK"][row][depth] = float(q_V[token])
            self.rows["rank_PK"][row][depth] = rank
            # What was drafted is the first child; equals are drawn in an order of the device's own.
            self.rows["place_PK"][row][depth] = 0 if right else max(1, place)

    drafter_draw = Draw.POINT

    def _row(self, name: str, value: Any) -> None:
        self.rows[name].append(value)

    def _padded(self, name: str, values: Sequence[Any], fill: Any) -> None:
        self.rows[name].append([*values, *[fill] * (self.depth - len(values))])

    def _top(self, who: str, log_V: Tensor | None) -> None:
        count = 0 if log_V is None else min(self.top_m, len(log_V))
        ids, logs, tail = np.zeros(0, np.int32), np.zeros(0, np.float32), 0.0
        if log_V is not None:
            top = log_V.topk(count)
            ids, logs = top.indices.int().cpu().numpy(), top.values.float().cpu().numpy()
            tail = float(log_V.double().exp().index_fill(0, top.indices, 0.0).sum())
        self._row(f"{who}_ids_PM", ids)
        self._row(f"{who}_logp_PM", logs)
        self._row(f"{who}_tail_P", tail)


@dataclass
class _Run:
    """One recording in the making."""

    decoder: SpeculativeDecoder
    notes: _Notes
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
        ending = _Lingering(task.request, task.ending.tokenizer, task.ending.max_new_tokens, task.ending.stop)
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
    notes = _Notes(_Overheard(decoder.drafter), depth, min(top_m, capabilities.vocab_size))
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
    from specdec.train.provenance import fingerprint, versions

    decoder, drafter = run.decoder, run.decoder.drafter
    sampling = decoder.prepare([0], **run.options).request.sampling
    known = {f.name: getattr(sampling, f.name) for f in fields(Sampling) if f.name != "processors"}
    model = getattr(drafter, "model", None)
    return {
        "format": FORMAT,
        "target": fingerprint(decoder.target),
        "draft": fingerprint(model) if isinstance(model, torch.nn.Module) else None,
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
