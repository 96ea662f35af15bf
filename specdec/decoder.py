"""The loop. Every drafter, verifier, policy and backend goes through it; plain decoding too."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

from specdec.drafter import Drafter, Prefill, Request
from specdec.errors import NonFiniteLogitsError
from specdec.exact import Settle, keep
from specdec.outcome import conclude, finite, log_probabilities
from specdec.policy import Policy, PolicyRun
from specdec.runtime.session import Call, Session
from specdec.text import Chunk, Ending
from specdec.trace import Trace
from specdec.verifier import Verifier


@dataclass(frozen=True, eq=False)
class Task:
    """Everything one text needs."""

    request: Request
    target: Session
    drafter: Drafter
    verifier: Verifier
    policy: Policy
    ending: Ending
    trace: Trace
    logprobs: bool = False
    settle: Settle = keep  # re-decides doubtful positions when exact=True
    prefill: Prefill = Session.prefilling  # reuses what earlier prompts left
    begin: Callable[[Policy], PolicyRun] = methodcaller("start")  # or goes on from earlier texts
    num_bytes: int = 0  # of keys and values, target and drafter together, when the text is as long as it may get


def decode(task: Task) -> Generator[Chunk | Call, Any, None]:
    """The loop: propose, one target forward over root and tree, verify, commit, observe. Plain decoding is the empty
    proposal. Yields each round's text, tokens, and who produced them; and, wherever a model has to run, a `Call` that
    is to be answered with its result: at once for one text, together with those of other texts in a batch."""
    request, target, drafter, trace = task.request, task.target, task.drafter, task.trace
    sampling, ending = request.sampling, task.ending
    chance = sampling.chance("verify")
    draft_chance = chance.stream("draft")
    with trace.prefill():
        target.append(request.prompt)
        yield from task.prefill(target)
        state = yield from drafter.starting(request, task.prefill)
        trace.num_reused_tokens = target.num_reused
        policy = task.begin(task.policy)
    while ending.reason is None:
        with trace.round() as record:
            plan = policy.plan().limited(ending.room - 1)
            with trace.stage("draft"):
                proposal = yield from drafter.proposing(state, plan, draft_chance)
            with trace.stage("verify"):
                rows, broken = finite((yield from target.forwarding(proposal.tree)))
                p = sampling.probabilities(rows.logits, target.tokens, proposal.tree)
                verdict = task.verifier.verify(p, proposal, len(target.tokens), chance)
                outcome = task.settle(task, rows, conclude(proposal, verdict, rows, broken))
            with trace.stage("commit"):
                target.commit(outcome.path, outcome.tokens)
                state = drafter.observe(state, outcome)
            record.take(drafter.name, outcome)
            chunk = ending.cut(outcome, drafter.name, log_probabilities(outcome) if task.logprobs else None)
        policy.observe(record)
        yield chunk
        if outcome.broken and ending.reason is None:
            raise NonFiniteLogitsError(len(target.tokens), ending.tokens, ending.text)
