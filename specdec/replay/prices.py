"""What rounds cost, as a recording or a file says it."""

from __future__ import annotations

import math
from typing import Any

from specdec.costs import Costs
from specdec.errors import InputError
from specdec.replay.recording import Recording


def costs_of(recording: Recording) -> Costs | None:
    """What rounds cost where the recording was made; None when that was not measured. Raises `InputError`."""
    found = recording.meta.get("costs")
    return None if found is None else read_costs(found, "the recording")


def read_costs(found: Any, where: str) -> Costs:
    """From `{"verify": {"1": seconds, …}, "draft": seconds, "other": seconds}`. Raises `InputError`."""
    try:
        verify = {int(width): float(value) for width, value in found["verify"].items()}
        costs = Costs(verify, {}, float(found.get("draft", 0.0)), float(found.get("other", 0.0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f'{where}: costs are {{"verify": {{"1": seconds, "5": seconds}}, "draft": seconds a level, "other": '
            f"seconds a round}}, and these lack or garble {error}"
        ) from error
    numbers = [*costs.verify.values(), costs.draft_average, costs.other]
    if 1 not in verify or min(verify) < 1 or min(verify.values()) <= 0 or not all(0 <= n < math.inf for n in numbers):
        raise InputError(f"{where}: costs need seconds > 0 for widths from 1 on, and none below 0")
    return costs
