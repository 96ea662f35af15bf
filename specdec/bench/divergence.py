"""Why two texts differ: a tie that the number format cannot decide, or a bug.

Both runs are replayed up to the first difference: the plain one a row at a time, the speculative one in the rounds of
its trace, as wide as they were. So the difference of the two rows holds all that width does, in the row itself and in
the keys and values before it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.api import SpeculativeDecoder
from specdec.chance import CounterChance
from specdec.decoder import Task
from specdec.dtypes import dtype_name
from specdec.errors import InputError
from specdec.exact import choices, margins, ulp
from specdec.generation import Generation
from specdec.runtime.session import Session
from specdec.sampling import Sampling
from specdec.tree import TokenTree

TIE, BUG = "tie at this precision", "BUG"
# Noise below this many units in the last place (of the row's largest logit) counts in any case: products over another
# number of rows may round the last digit either way even where this one replay did not.
FLOOR_ULPS = 2
# Noise above it is no rounding but another computation. Wide formats round every sum, narrow ones (which add up in
# float32) only results: measured up to 2 in bfloat16.
LIMIT_ULPS = {True: 16, False: 1024}


@dataclass(frozen=True)
class Divergence:
    """The first difference between a plain and a speculative text.

    `index`: among the new tokens; `position`: absolute. A token is None when that text ended there. `margin`: between
    the two best candidates of the plain row, `gap`: between the two tokens that were chosen, in processed logits (at
    temperature > 0 of the race: score - log noise); `gap` is infinite when a filter removed the speculative token.
    `noise`: largest difference between the two replayed rows, `ulp`: spacing of the dtype's numbers there, both in raw
    logits. `narrow_token`, `wide_token`: what the replays choose at width 1 and at `width`.
    """

    index: int
    position: int
    plain_token: int | None
    speculative_token: int | None
    verdict: str
    reason: str
    dtype: str
    width: int = 0
    margin: float = math.nan
    gap: float = math.nan
    noise: float = math.nan
    ulp: float = math.nan
    narrow_token: int | None = None
    wide_token: int | None = None

    @property
    def is_bug(self) -> bool:
        return self.verdict == BUG

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite becomes None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def __str__(self) -> str:
        head = (
            f"New token {self.index} (position {self.position}) differs: plain {self.plain_token}, "
            f"speculative {self.speculative_token}. "
        )
        if self.narrow_token is None:
            return f"{head}Verdict: {self.verdict}: {self.reason}."
        return (
            f"{head}The plain row's two best candidates are {self.margin:.4g} apart, "
            f"the two chosen tokens {self.gap:.4g}. "
            f"Replayed in {self.dtype}, one row gives {self.narrow_token}, {self.width} rows give {self.wide_token}; "
            f"their logits differ by up to {self.noise:.4g} (one unit in the last place is {self.ulp:.4g}). "
            f"Verdict: {self.verdict}: {self.reason}."
        )


def explain(
    decoder: SpeculativeDecoder, plain: Generation, speculative: Generation, **options: Any
) -> Divergence | None:
    """None when the tokens are equal; else where they part and whether rounding explains it.

    `options`: those that both texts were generated with (temperature, seed, filters, ...). The rule: with
    e = max(noise, 2 ulp), it is a tie when moving every logit of the plain row by at most e can make the plain rule
    choose the speculative token (without filters: when gap <= 2 e / temperature), and when the noise itself is one
    that rounding explains (16 ulp in 16-bit formats, 1024 ulp in wider ones). Everything else is a BUG: also when one
    text ends where the other goes on.

    Costs one plain step per token up to the difference, and the speculative rounds again.
    Raises `InputError` when the texts do not belong together, or when the options do not reproduce the plain text.
    """
    if plain.prompt != speculative.prompt:
        raise InputError("the two texts have different prompts; there is no difference to explain")
    if plain.tokens == speculative.tokens:
        return None
    task = decoder.prepare(plain.prompt, **options)
    sampling, verifier = task.request.sampling, task.verifier
    if not verifier.lossless or not (sampling.is_greedy or verifier.keeps_seed):
        raise InputError(
            f"the {verifier.name} verifier does not give plain decoding's tokens at this temperature, so a difference "
            "needs no explanation; compare texts under verifier='coupled'"
        )
    a, b = plain.tokens, speculative.tokens
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    position, dtype = len(plain.prompt) + index, dtype_name(task.target.backend.capabilities.dtype)
    if index == min(len(a), len(b)):
        reason = f"one text ends there ({plain.finish_reason}, {speculative.finish_reason}) and the other goes on"
        tokens = (a[index] if index < len(a) else None, b[index] if index < len(b) else None)
        return Divergence(index, position, *tokens, BUG, reason, dtype)
    narrow = _narrow(task, plain.prompt, a[:index])
    wide, width = _wide(Session(decoder.backend.fork(0)), speculative, index)
    return _judge(sampling, [*plain.prompt, *a[:index]], narrow, wide, width, index, a[index], b[index], dtype)


def _narrow(task: Task, prompt: list[int], tokens: list[int]) -> Tensor:
    """The plain run's logits `[V]` after `tokens`."""
    session = task.target
    session.append(prompt)
    session.prefill()
    logits = session.forward().logits[-1]
    for token in tokens:
        session.append([token])
        logits = session.forward().logits[-1]
    return logits


def _wide(session: Session, speculative: Generation, index: int) -> tuple[Tensor, int]:
    """The speculative run's logits `[V]` before token `index`, and how many rows were computed together.

    Its rounds are replayed with their numbers of rows. What was rejected is not in the trace and does not matter to
    the rows that were kept: any token stands in for it.
    """
    session.append(speculative.prompt)
    session.prefill()
    done = 0
    for record in speculative.trace.rounds:
        tokens = speculative.tokens[done : done + record.num_emitted]
        kept = tokens[: record.num_accepted]
        filler = [tokens[-1]] * (record.num_nodes - len(kept))
        logits = session.forward(TokenTree.chain([*kept, *filler])).logits
        if index < done + record.num_emitted:
            return logits[index - done], record.num_nodes + 1
        session.commit(range(len(kept)), tokens)
        done += record.num_emitted
    raise InputError("the speculative text's trace ends before the difference: it belongs to another text")


def _judge(
    sampling: Sampling,
    context: list[int],
    narrow: Tensor,
    wide: Tensor,
    width: int,
    index: int,
    plain: int,
    speculative: int,
    dtype: str,
) -> Divergence:
    def choose(logits: Tensor) -> int:
        return int(choices(logits[None], sampling, context, TokenTree.empty(), [-1]))

    if choose(narrow) != plain:
        raise InputError(
            f"a replay at width 1 chooses {choose(narrow)} where the plain text has {plain}: pass explain() the "
            "options that the texts were generated with"
        )
    unit = float(ulp(narrow[None]))
    noise = float((narrow.double() - wide.double()).nan_to_num(0.0, posinf=torch.inf).abs().max())
    limit = LIMIT_ULPS[narrow.element_size() <= 2] * unit
    allowed = max(noise, FLOOR_ULPS * unit)
    reachable = _reachable(narrow, speculative, allowed, sampling, context)
    if noise > limit:
        verdict, reason = BUG, f"the replays differ by {noise:.4g}, and rounding explains {limit:.4g} at most"
    elif reachable:
        verdict, reason = TIE, f"logits {allowed:.4g} away, which rounding explains, give the speculative token"
    else:
        verdict, reason = BUG, f"no logits within {allowed:.4g} of the plain ones give the speculative token"
    scores = sampling.scores(narrow[None].double(), context, TokenTree.empty(), [-1])
    value = scores[0].double()
    if not sampling.is_greedy:
        value = value - _log_noise(sampling, len(context), value)
    return Divergence(
        index=index,
        position=len(context),
        plain_token=plain,
        speculative_token=speculative,
        verdict=verdict,
        reason=reason,
        dtype=dtype,
        width=width,
        margin=float(margins(scores, sampling, [len(context)])),
        gap=float(value[plain] - value[speculative]),
        noise=noise,
        ulp=unit,
        narrow_token=plain,
        wide_token=choose(wide),
    )


def _log_noise(sampling: Sampling, position: int, like: Tensor) -> Tensor:
    return CounterChance(sampling.seed).noise(position, like.shape[-1], like.device).log()


def _reachable(logits: Tensor, token: int, by: float, sampling: Sampling, context: list[int]) -> bool:
    """Whether logits within `by` of these let the plain rule choose `token`.

    Two moves are most in its favour: it rises and all others fall; it and what is less likely rise and the rest falls
    (which lets it into a top-p set).
    """
    step = by * (1 + 1e-6)
    logits = logits.double()
    alone = torch.full_like(logits, -step)
    alone[token] = step
    tail = torch.where(logits > logits[token], -step, step)
    rows = torch.stack((logits + alone, logits + tail))
    return token in choices(rows, sampling, context, TokenTree.empty(), [-1, -1]).tolist()
