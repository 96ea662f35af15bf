"""Which widths an artefact should have, from what its backend's graphs cost: `specdec export --k auto`.

Kernels work on tiles of rows, and where the tile ends the cost jumps; no k is right for every backend. So graphs of all
widths are made of the model's first one and two layers, and timed; the difference is a layer, and the whole model's
cost c(M) follows.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specdec.costs import Costs
from specdec.errors import InputError
from specdec.export.exporter import Tell
from specdec.export.options import Options
from specdec.runtime.cache import layer_types
from specdec.runtime.parts import layers_path, with_layers_at

#: Rows of the graphs that are timed; costs between them lie on lines. Tiles of 4, 7 and 8 end among them.
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 14, 15, 16)
#: Acceptance that a list of k should serve.
ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)
# A graph has to bring this much of the best speed.
_WORTH = 0.01
_REPETITIONS = 9
_TEXT = 16
# Reading more than this leaves nothing of the weights in any cache.
_MOST_READ = 256 << 20


def first_layers(model: Any, count: int) -> Any:
    """The model with its first layers only, on the same tensors. `UnsupportedModelError` where they have no list."""
    path, config = layers_path(model), copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    kinds = layer_types(text)[:count]
    cut = with_layers_at(model, path, model.get_submodule(path)[:count], kinds)
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(kinds)
    cut.config = config
    return cut


def _bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


def _flush(num_bytes: int) -> Tensor:
    """What is read between two steps: the other layers' weights, which would have pushed these out of the caches."""
    return torch.zeros(max(1, min(num_bytes, _MOST_READ) // 4))


def _step_seconds(
    model: Any, options: Options, read: Tensor, tell: Tell, calibration_BT: Tensor | None
) -> dict[int, float]:
    """Median seconds of a step by its rows, one graph for each."""
    from specdec.api import SpeculativeDecoder
    from specdec.bench import bare
    from specdec.bench.timing import Gate
    from specdec.export.artifact import ArtifactModel, export

    folder = export(model, options, calibration_BT=calibration_BT, tell=tell)
    decoder = SpeculativeDecoder(ArtifactModel.open(folder), drafter="none")
    text = [1 + i % 7 for i in range(min(_TEXT, options.max_seq_len // 2))]
    calls, _ = bare.forwards(decoder, text, [k + 1 for k in options.k])
    seconds: dict[int, list[float]] = {width: [] for _, width in calls}
    gate = Gate(retries=2, budget=100)
    for repetition in range(_REPETITIONS + 2):
        for (_, width), call in calls.items():
            read.sum()
            taken = gate.time(call).seconds
            if repetition > 1:
                seconds[width].append(taken)
    return {width: statistics.median(values) for width, values in seconds.items()}


def measure_curve(
    model: Any, options: Options, tell: Tell = lambda _: None, calibration_BT: Tensor | None = None
) -> dict[int, float]:
    """Seconds of a step of the whole model by its rows, M → c(M), never falling.

    Exports probes of one and two layers with the options' recipe and delegate, which are kept like any artefact.
    Raises `InputError` where graphs do not run on this device in real time.
    """
    from specdec.export.exporter import exporter
    from specdec.fit.optimum import RoundCost
    from specdec.planner.costs import with_curve

    if not exporter(options.backend).real_time:
        raise InputError(f"--k auto times graphs, and those of {options.backend} only run in an emulator here: name k")
    exporter(options.backend).check(model, options)
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    widths = [width for width in WIDTHS if width < options.max_seq_len - _TEXT] or [1]
    probe = replace(options, k=tuple(w - 1 for w in widths), prefill_len=1, hidden=())
    found = []
    for count in (1, 2)[:num_layers]:
        tell(f"costs: graphs of {len(widths)} widths, {count} of {num_layers} layers")
        cut = first_layers(model, count)
        found.append(_step_seconds(cut, probe, _flush(_bytes(model) - _bytes(cut)), tell, calibration_BT))
    one, two = found[0], found[-1]
    whole = {w: max(one[w], one[w] + (num_layers - 1) * (two[w] - one[w])) for w in one}
    return dict(with_curve(RoundCost(verify={1: whole[1]}), whole).verify)


@dataclass(frozen=True)
class Proposal:
    """`k`, and the share of the speed of a list of every k that it has, on average over `ACCEPTANCE`."""

    k: tuple[int, ...]
    share: float
    curve: Mapping[int, float]

    def best(self, acceptance: float) -> int:
        """Which of `k` decodes fastest, for a draft that is right so often."""
        return max(self.k, key=lambda k: _rate(self.curve, k, acceptance))


def _rate(curve: Mapping[int, float], k: int, acceptance: float, draft: float = 0.1) -> float:
    """Tokens per second of rounds of k drafted tokens; a draft step costs `draft` plain steps."""
    tokens = math.fsum(acceptance**i for i in range(k + 1))
    return tokens / Costs(verify=curve, draft_average=draft * curve[min(curve)]).round(k, k)


def propose(curve: Mapping[int, float], count: int = 3, acceptance: Sequence[float] = ACCEPTANCE) -> Proposal:
    """The shortest list of at most `count` k that loses little beside a list of all: 0, and where the curve is kind.

    Each step takes the graph that its draft's length wants, so that a list is as good as its best member. Raises
    `InputError` without costs.
    """
    if not curve or count < 1:
        raise InputError("a proposal needs costs, of one row at least, and room for one k")
    every = tuple(width - 1 for width in sorted(curve))
    rates = {(k, a): _rate(curve, k, a) for k in {0, *every} for a in acceptance}
    best = {a: max(rates[k, a] for k in every) for a in acceptance}

    def share(ks: Sequence[int]) -> float:
        return statistics.fmean(max(rates[k, a] for k in ks) / best[a] for a in acceptance)

    found: tuple[tuple[int, ...], float] = ((0,), share((0,)))
    for size in range(1, min(count, len(every))):
        lists = [(0, *more) for more in itertools.combinations([k for k in every if k], size)]
        made = max(lists, key=share)
        if share(made) > found[1] + _WORTH:
            found = (made, share(made))
    return Proposal(found[0], found[1], dict(curve))
