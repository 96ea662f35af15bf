"""A replay by `append` computes one row at a time, as plain decoding does: in half precision the width matters."""

from __future__ import annotations

from tiny_models import session, tiny

import specdec
from specdec.bench.divergence import explain
from specdec.policy import Fixed
from specdec.runtime.backends.eager import EagerBackend


def test_append_computes_only_what_is_new(monkeypatch):
    widths = []
    forward = EagerBackend.forward
    monkeypatch.setattr(
        EagerBackend, "forward", lambda self, step: widths.append(len(step.tokens)) or forward(self, step)
    )
    replay = session(tiny("llama"), [3, 1, 4])
    replay.prefill()
    replay.forward()
    for token in (1, 5, 9):
        replay.append([token])
        replay.forward()
    assert widths == [2, 1, 1, 1, 1]


def test_half_precision_differences_of_a_real_pair_are_explained(shared):
    """The replay at width 1 gives the plain text's own token, so that the explainer has a verdict."""
    models = shared / "models"
    decoder = specdec.load(models / "bitllama-1M", models / "stories260K", dtype="bfloat16", policy=Fixed(5))
    prompt = "One day a girl walked into the living room and noticed something very strange. There was a huge cabinet"
    verdicts = []
    for seed in range(4):
        options = {"max_new_tokens": 120, "temperature": 0.7, "seed": seed}
        plain, speculative = decoder.generate_plain(prompt, **options), decoder.generate(prompt, **options)
        found = explain(decoder, plain, speculative, **options)
        verdicts.append(None if found is None else found.verdict)
    assert set(verdicts) <= {None, "tie at this precision"}
