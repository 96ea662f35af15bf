"""Draft lengths in a batch follow from the cost of common steps: arithmetic, without a clock."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from specdec.goodput import Curve, Joined, Load, share_out
from specdec.policy import Fixed, PolicyRun, Throughput, ThroughputRun


def busy(rows: np.ndarray, width: int = 8, seconds: float = 1.0) -> np.ndarray:
    """Flat while the hardware waits for the weights, then proportional to the rows."""
    return seconds * np.maximum(1.0, np.asarray(rows) / width)


def decode(accept: list[float], turns: int, draft: float = 0.05, fixed: int = 0, k: int = 4) -> list[list[int]]:
    """A batch in a world of known costs; text i accepts each token with rate `accept[i]`. Depths by turn."""
    load = Load()
    policy = Throughput(k=k, limit=8, probe_every=30)
    joined = [Joined(policy, load) for _ in accept]
    runs = [one.start() for one in joined]
    luck = np.random.default_rng(1)
    chosen = []
    for _ in range(turns):
        load.new_turn(fixed, fixed)
        depths = [run.plan().depth for run in runs]
        chosen.append(depths)
        for run, depth, rate in zip(runs, depths, accept, strict=True):
            accepted = next((d for d in range(depth) if luck.random() > rate), depth)
            run.observe(Facts(depth, accepted))
        rows = fixed + sum(depth + 1 for depth in depths)
        waves = [(sum(d > wave for d in depths), draft) for wave in range(max(depths))]
        load.observe(rows, float(busy(np.array(rows))), waves, 0.02)
    return chosen


class Facts:
    """A round in which `accepted` of `depth` tokens were taken."""

    def __init__(self, depth: int, accepted: int):
        self.depth_proposed = self.num_nodes = depth
        self.num_accepted, self.num_evaluated = accepted, accepted + (accepted < depth)
        self.seconds: dict[str, float] = {}
        self.drafter, self.expected = "model", None


def late(chosen: list[list[int]]) -> np.ndarray:
    return np.array(chosen[len(chosen) // 2 :])


def test_drafting_fades_as_the_batch_grows_until_there_is_none() -> None:
    usual = {texts: float(np.median(late(decode([0.7] * texts, 120)))) for texts in (1, 2, 4, 8, 16, 32)}
    assert usual[1] >= 3
    assert all(usual[a] >= usual[b] for a, b in itertools.pairwise(usual))
    assert usual[16] == usual[32] == 0


def test_looking_deeper_in_a_large_batch_is_rare_and_common() -> None:
    chosen = np.array(decode([0.7] * 32, 200))
    drafted = chosen[20:].max(1) > 0
    assert drafted.sum() <= 7  # of 180 turns
    assert all((row > 0).all() for row in chosen[20:][drafted])


def test_in_an_unequal_batch_those_draft_whose_drafts_are_accepted() -> None:
    usual = np.median(late(decode([0.95, 0.95, 0.2, 0.2, 0.2, 0.2], 200)), 0)
    assert usual[:2].min() >= 1
    assert usual[2:].max() == 0


def test_texts_with_lengths_of_their_own_count_as_load() -> None:
    assert np.median(late(decode([0.7], 120, fixed=0))) >= 3
    assert np.median(late(decode([0.7], 120, fixed=40))) == 0


def test_dear_drafts_are_shared() -> None:
    """A draft step that no text alone could pay for pays when all take part."""
    assert np.median(late(decode([0.7], 150, draft=0.8))) == 0
    assert np.median(late(decode([0.7] * 4, 150, draft=0.8))) == 0  # one token for each costs 0.8 of a step: 1.7 < 1.8
    assert np.median(late(decode([0.9] * 4, 150, draft=0.5))) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_other_lengths_are_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    survival = [np.cumprod(rng.random(3)).tolist() for _ in range(3)]
    base, draft, width = 3 + int(rng.integers(4)), float(rng.random() / 4), int(rng.integers(2, 12))

    def rate(depths: tuple[int, ...]) -> float:
        tokens = len(depths) + sum(sum(row[:d]) for row, d in zip(survival, depths, strict=True))
        return tokens / float(busy(np.array(base + sum(depths)), width) + draft * max(depths))

    got = tuple(share_out(survival, base, lambda rows: busy(rows, width), draft))
    assert rate(got) == pytest.approx(max(rate(d) for d in itertools.product(range(4), repeat=3)), rel=1e-12)


def test_the_curve_between_and_beyond_what_was_measured() -> None:
    curve = Curve()
    for _ in range(20):
        curve.add(8, 1.0)
        curve.add(16, 2.0)
    assert curve(np.array([1, 8, 12, 16, 32])).tolist() == pytest.approx([1.0, 1.0, 1.5, 2.0, 4.0])
    curve.add(64, 0.5)  # more rows are never cheaper
    assert float(curve(np.array([64]))[0]) == pytest.approx(2.0)
    for _ in range(200):
        curve.add(16, 3.0)
    assert float(curve(np.array([16]))[0]) == pytest.approx(3.0, rel=1e-3)


def test_texts_leave_and_other_policies_do_not_mind() -> None:
    load = Load()
    fixed = Joined(Fixed(3), load)
    assert fixed.start().plan().depth == 3
    joined = Joined(Throughput(), load)
    run: PolicyRun = joined.start()
    assert isinstance(run, ThroughputRun)
    assert (load.runs, joined.name, joined.branches) == ([run], "throughput", False)
    load.leave(fixed.run)
    load.leave(run)
    load.leave(None)
    assert load.runs == []
