"""The exact law of what a (drafting law, verifier) pair emits, and how far it is from the target's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from specdec.errors import IncompatiblePairError, SpecdecError
from specdec.oracle.chance import EnumeratedChance, Intervals, enumerate_outcomes
from specdec.oracle.laws import LAWS, Context, Law
from specdec.oracle.toy import Toy
from specdec.proposal import Proposal
from specdec.sampling import Sampling
from specdec.verifier import Verifier

# Sums of some thousand float64 products; exact rules stay below 1e-15.
TOLERANCE = 1e-12
# A distance up to here looks like float32 arithmetic somewhere in the rule.
ROUNDING = 1e-5
GREEDY_PAIRS = 10


@dataclass(frozen=True)
class Measurement:
    """`tv`: total variation from the target's joint law. `expected_tokens`: emitted by the first round, on average.

    `seed_broken`: the probability that a token differs from the one plain decoding gets from the same noise (measured
    only when the verifier says that it keeps the seed).
    """

    tv: float
    expected_tokens: float
    seed_broken: float


@dataclass(frozen=True)
class Result:
    """One line of the certificate. `error`: why it did not pass; when the verifier raised, there are no numbers."""

    verifier: str
    law: str
    pairs: int
    tv_max: float | None
    expected_tokens: float | None
    lossless: bool
    passed: bool
    keeps_seed: bool = False
    shares_noise: bool = False
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _verdicts(
    verifier: Verifier, toy: Toy, context: Context, proposal: Proposal, noise: Intervals
) -> Iterator[tuple[float, Context, bool, Intervals]]:
    """Every verdict on one proposal: probability, emitted tokens, whether they are those that plain decoding gets
    from the same noise, and what is still open about that noise."""
    verifier.check_proposal(proposal)
    tree, position = proposal.tree, 1 + len(context)  # the root token comes first
    p = toy.target_rows(context, tree)
    paths = [tree.path(node) for node in range(-1, len(tree))]
    texts = [tuple(int(tree.tokens[n]) for n in path) for path in paths]

    def program(chance: EnumeratedChance) -> tuple[Context, bool]:
        verdict = verifier.verify(p.clone(), proposal, position, chance)
        node, token = int(verdict.node), int(verdict.token)
        if not -1 <= node < len(tree) or not 0 <= token < toy.vocab_size:
            raise SpecdecError(f"the verdict names node {node} and token {token}, which do not exist")
        emitted = (*texts[node + 1], token)
        if not verifier.keeps_seed:
            return emitted, True
        rows = (p[node + 1] for node in (-1, *paths[node + 1]))
        return emitted, emitted == tuple(chance.settled(row, position + i) for i, row in enumerate(rows))

    for weight, (emitted, same), rest in enumerate_outcomes(program, noise):
        yield weight, emitted, same, rest


def _round(
    verifier: Verifier, law: Law, toy: Toy, context: Context, noise: Intervals
) -> Iterator[tuple[float, Context, bool, Intervals]]:
    """Every outcome of one round, as `_verdicts`; all randomness but shared noise is fresh."""
    for weight, proposal, seen in enumerate_outcomes(lambda chance: law.propose(toy, context, chance), noise):
        for likely, emitted, same, rest in _verdicts(verifier, toy, context, proposal, seen):
            yield weight * likely, emitted, same, rest


def measure(verifier: Verifier, law: Law, toy: Toy) -> Measurement:
    """Enumerate `law.rounds` rounds, complete what they emitted with the target's own law, and compare."""
    # The noise of positions ahead outlives a round: what was seen of it conditions the next.
    State = tuple[Context, tuple[tuple[int, tuple[float, float]], ...]]
    states: dict[State, float] = {((), ()): 1.0}
    expected, broken = 0.0, 0.0
    for number in range(law.rounds):
        following: dict[State, float] = defaultdict(float)
        for (context, noise), before in states.items():
            if len(context) >= law.length:
                following[context, ()] += before
                continue
            for weight, emitted, same, rest in _round(verifier, law, toy, context, dict(noise)):
                expected += before * weight * len(emitted) if number == 0 else 0.0
                broken += 0.0 if same else before * weight
                text = (context + emitted)[: law.length]
                ahead = {n: interval for n, interval in rest.items() if n > len(text)}
                following[text, tuple(sorted(ahead.items()))] += before * weight
        states = following
    emitted_law: dict[Context, float] = defaultdict(float)
    for (text, _), weight in states.items():
        emitted_law[text] += weight
    target = complete({(): 1.0}, toy, law.length)
    actual = complete(emitted_law, toy, law.length)
    tv = sum(abs(actual.get(text, 0.0) - target.get(text, 0.0)) for text in actual.keys() | target.keys()) / 2
    return Measurement(tv, expected, broken)


def complete(prefixes: dict[Context, float], toy: Toy, length: int) -> dict[Context, float]:
    """The law of texts of `length` tokens, when each prefix is continued by plain sampling from the target."""
    law: dict[Context, float] = defaultdict(float, prefixes)
    for done in range(length):
        for context in [text for text in law if len(text) == done]:
            weight = law.pop(context)
            for token, probability in enumerate(toy.p(context).tolist()):
                if probability > 0:
                    law[(*context, token)] += weight * probability
    return dict(law)


def _covers_sampling(verifier: Verifier) -> bool:
    try:
        verifier.check_sampling(Sampling(temperature=1.0))
    except IncompatiblePairError:
        return False
    return True


def applicable(verifier: Verifier, laws: Sequence[Law] = LAWS) -> list[Law]:
    """The laws that the verifier says it takes; those at temperature 0 alone when it refuses other temperatures."""
    sampling = _covers_sampling(verifier)
    return [
        law
        for law in laws
        if law.draws <= set(verifier.draws)
        and (verifier.trees or not law.trees)
        and (sampling or law.greedy or not law.draws)
    ]


def certify(verifier: Verifier, law: Law, pairs: int) -> Result:
    """One line of the certificate, on `pairs` random toys.

    At temperature 0 a toy has a single outcome, so `GREEDY_PAIRS` times as many are looked at.
    A verifier passes when it is as exact, and keeps the seed as well, as it says, on every proposal that its `draws`
    and `trees` declare; one that raises fails.
    """
    if not law.draws and not _covers_sampling(verifier):
        law = replace(law, greedy=True)
    pairs *= GREEDY_PAIRS if law.greedy else 1
    toys = [law.toy(number) for number in range(pairs)]

    def result(passed: bool, tv: float | None, expected: float | None, error: str | None = None) -> Result:
        claims = verifier.lossless, verifier.keeps_seed, law.shares_noise
        return Result(verifier.name, law.name, pairs, tv, expected, claims[0], passed, *claims[1:], error)

    try:
        measured = [measure(verifier, law, toy) for toy in toys]
    except Exception as error:  # a plugin may raise anything, and all of it means that it did not pass
        return result(False, None, None, f"{type(error).__name__}: {error}")
    tv, broken = max(m.tv for m in measured), max(m.seed_broken for m in measured)
    expected = sum(m.expected_tokens for m in measured) / pairs
    if not verifier.lossless:
        return result(True, tv, expected)
    reason = None
    if not tv <= TOLERANCE:
        reason = "rounds: the rule leaves the dtype of p" if tv <= ROUNDING else "not exact"
    elif not broken <= TOLERANCE:
        reason = "says that it keeps the seed, and does not"
    return result(reason is None, tv, expected, reason)
