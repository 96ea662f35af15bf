"""How far a run may lie from a replay because both are draws of one law."""

from __future__ import annotations

import math
import statistics

from specdec.trace import Round

# Half-widths of 95 % intervals, in standard errors: of many draws, and (Student's) of n + 2 texts.
_SIGMAS = 1.96
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_interval(texts: list[list[Round]], times: int) -> float:
    """Half a 95 % interval of the difference between one run's tokens per round and the replay's.

    The run's text and the recorded one are two draws of the same law; rounds of a text vary together, so that the
    larger of two estimates counts: rounds as independent draws, and texts as independent draws. One text is halved.
    """
    rounds = [float(r.num_accepted) for text in texts for r in text]
    if len(rounds) < 2:
        return 0.0
    mean, per_run = statistics.fmean(rounds), len(rounds) / times
    groups = texts if len(texts) > 1 else [texts[0][0::2], texts[0][1::2]]
    n = len(groups)
    residuals = [sum(r.num_accepted - mean for r in group) / times for group in groups]
    by_text = math.sqrt(sum(r * r for r in residuals) * n / (n - 1)) / per_run
    by_round = math.sqrt(statistics.pvariance(rounds) / per_run)
    student = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else _SIGMAS
    # Nothing accepted in one of two runs of one law, and up to five in the other: that would not surprise.
    return max(math.sqrt(2) * max(_SIGMAS * by_round, student * by_text), 5.0 / per_run)
