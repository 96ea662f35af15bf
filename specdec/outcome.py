"""From a verdict on the device to an outcome on the host."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specdec.drafter import Outcome
from specdec.proposal import Proposal
from specdec.runtime.session import Rows
from specdec.verifier import Verdict


def finite(rows: Rows) -> tuple[Rows, Tensor]:
    """Rows with NaN or infinite logits, replaced by flat ones and flagged (bool `[N + 1]`).

    A flagged row matters only when the accepted path reaches it: plain decoding would never see the others. Whether
    there is one is not asked here: that would wait for the device.
    """
    broken = ~torch.isfinite(rows.logits.amax(-1))
    return replace(rows, logits=rows.logits.masked_fill(broken[:, None], 0.0)), broken


def conclude(proposal: Proposal, verdict: Verdict, rows: Rows, broken: Tensor) -> Outcome:
    """Read verdict and drafted tokens, and cut the path before its first row that has no finite logits.

    This is the round's only transfer from the device.
    """
    packed = torch.stack((verdict.node.to(verdict.token.device), verdict.token))
    there = [packed, broken.to(packed)]
    given = proposal.tree.tokens
    if given.device == packed.device:
        there.append(given)
    node, token, *rest = torch.cat(there).tolist()
    flags, drafted = rest[: len(broken)], rest[len(broken) :]
    if given.device != packed.device:  # drafted on the host, where nobody waits for them
        drafted = given.tolist()
    path = proposal.tree.path(node)
    tokens = (*(drafted[at] for at in path), token)
    for count, at in enumerate((-1, *path)):
        if flags[at + 1]:
            return Outcome(proposal, path[:count], tokens[:count], rows.logits, broken=True)
    return Outcome(proposal, path, tokens, rows.logits)


def log_probabilities(outcome: Outcome) -> list[float]:
    """Of the emitted tokens under the target's own distribution, before temperature and filters."""
    rows = [0, *(node + 1 for node in outcome.path)][: len(outcome.tokens)]
    log_p = outcome.logits[rows].float().log_softmax(-1)
    return log_p.gather(1, torch.tensor(outcome.tokens, device=log_p.device)[:, None])[:, 0].tolist()
