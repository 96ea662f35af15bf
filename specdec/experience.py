"""What one text taught a policy, kept for the next text of the same decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

from specdec.drafter import Drafter
from specdec.policy import Policy, PolicyRun

# A decoder seldom drafts in more ways than these in turn.
_MOST = 8


@dataclass(eq=False)
class Experience:
    """The last run of each way to draft: policy, drafter, greedy or sampled.

    Lossless: yes. It is for policies that follow the clock, whose rounds differ between runs as it is.
    """

    runs: list[tuple[Policy, Drafter, bool, PolicyRun]] = field(default_factory=list)

    def begin(self, drafter: Drafter, greedy: bool, policy: Policy) -> PolicyRun:
        """A run for a text that begins now."""
        if type(policy).resume is Policy.resume:  # has nothing to learn from earlier texts
            return policy.start()
        for at, (last_policy, last_drafter, last_greedy, last) in enumerate(self.runs):
            if last_drafter is drafter and last_greedy == greedy and last_policy == policy:
                del self.runs[at]
                run = policy.resume(last)
                break
        else:
            run = policy.start()
        self.runs = [*self.runs[-_MOST + 1 :], (policy, drafter, greedy, run)]
        return run
