"""A retrieval drafter and a neural one, of which each round takes what it expects the most of."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from specdec.chance import Chance
from specdec.costs import Costs
from specdec.drafter import BuildContext, Drafter, ModelRunner, Outcome, Prefill, Request
from specdec.errors import InputError
from specdec.estimates import ACCEPTANCE_CARRIED, Track
from specdec.loading import resolve_drafter
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.runtime.backend import Backend
from specdec.runtime.session import Session, Steps
from specdec.tree import TokenTree

# Estimates start from these probabilities: of a model's tokens, and of retrieved ones by how many of them the lookup
# expects to be accepted (up to 0.3, 0.6, 1, 2, 4, more). What is sampled is looked up half as well.
_OF_MODEL, _OF_LOOKUP, _SAMPLED = 0.6, (0.15, 0.3, 0.45, 0.5, 0.6, 0.75), 0.5
_EXPECTED = (0.3, 0.6, 1.0, 2.0, 4.0)
_NEURAL = "neural"
# The neural part's acceptance varies less from text to text than a lookup's, and what is decided on few samples is not
# measured again for a while: more rounds count, and more of earlier texts.
_NEURAL_HALF_LIFE, _NEURAL_CARRIED = 64.0, 8.0
# A part that keeps losing is tried ever more rarely, up to so many times the usual pause. One that is nearly as good is
# tried after so many rounds: a few samples decide there, and a wrong decision costs more than trying.
_LONGEST_PAUSE, _NEAR, _SOON = 8, 0.9, 4
# Levels beyond the usual ones that a look deeper takes: it tells what they cost and bring.
_DEEPER = 2

_NOTHING = Proposal.empty()

Tracks = dict[str, Track]


@dataclass(eq=False)
class HybridState:
    request: Request
    retrieval: Any
    neural: Any
    earlier: Tracks  # of texts before, where rounds may follow the clock
    tracks: Tracks = field(default_factory=dict)
    since_neural: int = 0
    num_tries: int = 0  # of the neural part in a row that did not make it the better one
    since_retrieval: int = 0
    since_deeper: int = 0  # rounds of the neural part since one that looked deeper
    proposed: str = ""  # the track of the last proposal
    num_neural: int = 0  # nodes of the last proposal that the neural drafter drew, the first ones

    def track(self, name: str, plan: Plan) -> Track:
        if name not in self.tracks:
            self.tracks[name] = self._begun(name) if plan.costs is None else self._resumed(name)
        return self.tracks[name]

    def _begun(self, name: str) -> Track:
        if name == _NEURAL:
            return Track(_OF_MODEL, _NEURAL_HALF_LIFE)
        return Track(_OF_LOOKUP[int(name[-1])] * (1.0 if self.request.sampling.is_greedy else _SAMPLED))

    def _resumed(self, name: str) -> Track:
        most = _NEURAL_CARRIED if name == _NEURAL else ACCEPTANCE_CARRIED
        track = self.earlier[name].carried(most) if name in self.earlier else self._begun(name)
        self.earlier[name] = track
        return track


def _bin(found: Proposal) -> int:
    """Retrieved drafts are told apart by what the lookup expects of them; half of them where it does not say."""
    expected = len(found.tree) / 2 if found.expected is None else found.expected
    return bisect_left(_EXPECTED, expected)


class HybridDrafter(ModelRunner):
    """Looks the continuation up when a lookup is worth more than a draft model's tokens, and drafts otherwise.

    Both are weighed in expected tokens per second: acceptance by depth is learnt from the text, for retrieved drafts by
    what the lookup expects; costs are the policy's measurements where it has some (`throughput`), and a text then
    starts from what the one before has shown; else a draft step counts `draft_cost` of a verification. A part is
    tried again after `probe_every` rounds without it; the neural one sooner when it is nearly as good, and ever more
    rarely while it loses. Under a policy of trees both go into one tree. `retrieval` and `neural`: drafters, or names.

    Lossless: yes, with every lossless verifier: which of them proposes depends on earlier rounds, and on a draft that
    is a point mass.
    """

    quantizes = True  # passed on to the neural part

    def __init__(self, retrieval: Drafter, neural: Drafter, draft_cost: float = 0.2, probe_every: int = 24):
        if draft_cost < 0 or probe_every < 1:
            raise InputError(f"need draft_cost >= 0 and probe_every >= 1, not {draft_cost} and {probe_every}")
        if retrieval.hidden or isinstance(retrieval, ModelRunner):
            raise InputError(f"the {retrieval.name} drafter runs a model: it is the neural part; retrieval is a lookup")
        self.retrieval, self.neural = retrieval, neural
        self.draft_cost, self.probe_every = draft_cost, probe_every
        self._earlier: dict[bool, Tracks] = {}  # by whether texts are greedy
        self.hidden, self.shares_target = neural.hidden, neural.shares_target  # type: ignore[misc]
        self.draws, self.trees = neural.draws, neural.trees  # type: ignore[misc]

    @classmethod
    def build(
        cls,
        context: BuildContext,
        retrieval: Any = "suffix",
        neural: Any = "model",
        retrieval_options: Mapping[str, Any] | None = None,
        neural_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Drafter:
        # The embedded target is recognised by where it was loaded from.
        first = resolve_drafter(retrieval, replace(context, quantize=None), **dict(retrieval_options or {}))
        return cls(first, resolve_drafter(neural, context, **dict(neural_options or {})), **options)

    @property
    def name(self) -> str:
        return f"{self.retrieval.name}+{self.neural.name}"

    def target_backend(self, backend: Backend, model: Any) -> Backend:
        return self.neural.target_backend(backend, model)

    def start(self, request: Request) -> HybridState:
        return self._state(request, self.neural.start(request))

    def starting(self, request: Request, prefill: Prefill = Session.prefilling) -> Steps[HybridState]:
        neural = yield from self.neural.starting(request, prefill)
        return self._state(request, neural)

    def _state(self, request: Request, neural: Any) -> HybridState:
        earlier = self._earlier.setdefault(request.sampling.is_greedy, {})
        return HybridState(request, self.retrieval.start(request), neural, earlier)

    def proposing(self, state: HybridState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        found = self.retrieval.propose(state.retrieval, Plan(plan.deepest, stop_below=plan.stop_below), chance)
        name = f"{self.retrieval.name} {_bin(found)}" if len(found.tree) else ""
        if not plan.is_chain:
            return (yield from self._both(state, plan, chance, found, name))
        lookup, drafted = self._lengths(state, plan, name, len(found.tree))
        state.num_neural = 0
        if lookup:
            state.proposed = name
            return _first(found, lookup, self.retrieval.name)
        if not drafted:
            return Proposal.empty()
        state.proposed = _NEURAL
        if plan.costs is not None and state.since_deeper >= self.probe_every:
            state.since_deeper, drafted = 0, min(plan.deepest, drafted + _DEEPER)
        drawn = yield from self.neural.proposing(state.neural, replace(plan, depth=drafted, limit=0), chance)
        state.num_neural = len(drawn.tree)
        return replace(drawn, origin=self.neural.name)

    def _lengths(self, state: HybridState, plan: Plan, name: str, found: int) -> tuple[int, int]:
        """How many retrieved tokens to propose, and how many to draft: not both."""
        costs = plan.costs or Costs(draft_average=self.draft_cost)
        lookup, lookup_rate = 0, 0.0
        if name:
            survival = state.track(name, plan).survival(found)
            lookup, lookup_rate = costs.best_length(survival, self.retrieval.name, levels=0)
        survival = state.track(_NEURAL, plan).survival(plan.deepest)
        drafted, rate = costs.best_length(survival, self.neural.name)
        if plan.costs is None:
            # Nobody measured what drafting costs: as deep as was asked for.
            drafted = plan.depth
            rate = (1 + sum(survival[:drafted])) / costs.round(drafted, drafted, self.neural.name)
        one = (1 + sum(survival[:1])) / costs.round(1, 1, self.neural.name)
        pause = _SOON if one >= _NEAR * max(lookup_rate, rate) else self._pause(state)
        if state.since_neural >= pause:
            return 0, max(1, drafted)
        if found and state.since_retrieval >= self.probe_every:
            return max(1, lookup), 0
        return (lookup, 0) if lookup and lookup_rate >= rate else (0, drafted)

    def _pause(self, state: HybridState) -> int:
        """Rounds without the neural part after which it is tried. Each try costs more than its own round: what the
        draft model missed meanwhile is computed then."""
        return self.probe_every * min(1 << state.num_tries, _LONGEST_PAUSE)

    def _both(self, state: HybridState, plan: Plan, chance: Chance, found: Proposal, name: str) -> Steps[Proposal]:
        """The neural tree, and the retrieved chain where it goes on from it; equal beginnings are one path."""
        drawn = yield from self.neural.proposing(state.neural, plan, chance)
        state.proposed, state.num_neural = "both", len(drawn.tree)
        if not len(found.tree):
            return replace(drawn, origin=self.neural.name)
        survival = state.track(name, plan).survival(len(found.tree))
        length, _ = (plan.costs or Costs()).best_length(survival, self.retrieval.name, levels=0)
        origin = f"{self.neural.name}+{self.retrieval.name}"
        return _merged(drawn, _first(found, min(length, plan.depth), origin), origin)

    def observe(self, state: HybridState, outcome: Outcome) -> HybridState:
        if state.proposed not in ("", "both") and len(outcome.proposal.tree):
            state.tracks[state.proposed].observe(outcome.num_accepted, outcome.num_evaluated)
        looked_up = len(outcome.proposal.tree) > state.num_neural
        if state.num_neural:
            state.num_tries = state.num_tries + 1 if state.since_neural >= self._pause(state) else 0
        state.since_neural = 0 if state.num_neural else state.since_neural + 1
        state.since_deeper += state.num_neural > 0
        state.since_retrieval = 0 if looked_up else state.since_retrieval + 1
        state.retrieval = self.retrieval.observe(state.retrieval, outcome)
        state.neural = self.neural.observe(state.neural, _part(outcome, state.num_neural))
        state.proposed, state.num_neural = "", 0  # a round without drafting does not come by `proposing`
        return state

    def warmup(self) -> None:
        self.neural.warmup()

    def sessions(self, state: HybridState) -> Sequence[Session]:
        return self.neural.sessions(state.neural)

    def bytes_for(self, length: int) -> int:
        return self.neural.bytes_for(length)


def _first(proposal: Proposal, length: int, origin: str) -> Proposal:
    """The first nodes of a chain of point masses."""
    return Proposal(_beginning(proposal.tree, length), proposal.draws[:length], origin=origin)


def _beginning(tree: TokenTree, count: int) -> TokenTree:
    return tree if count == len(tree) else TokenTree(tree.tokens[:count], tree.parents[:count])


def _part(outcome: Outcome, count: int) -> Outcome:
    """What the drafter that drew the first `count` nodes has to know: the text goes on as it did."""
    tree = outcome.proposal.tree
    if count == len(tree):
        return outcome
    if not count:
        return Outcome(_NOTHING, (), outcome.tokens, outcome.logits[:1], outcome.broken)
    own = replace(
        outcome.proposal,
        tree=_beginning(tree, count),
        draws=outcome.proposal.draws[:count],
        q_rows=outcome.proposal.q_rows[:count],
    )
    path = tuple(node for node in outcome.path if node < count)
    return replace(outcome, proposal=own, path=path, logits=outcome.logits[: count + 1])


def _merged(drawn: Proposal, chain: Proposal, origin: str) -> Proposal:
    """One tree: the nodes of `drawn`, then those of the chain that it does not have."""
    tree = drawn.tree
    tokens: list[int] = chain.tree.tokens.tolist()
    have = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens.tolist(), strict=True))
    }
    at, used = -1, 0
    while used < len(tokens) and (at, tokens[used]) in have:
        at = have[at, tokens[used]]
        used += 1
    more = tokens[used:]
    if not more:
        return replace(drawn, origin=origin)
    parents = [at, *range(len(tree), len(tree) + len(more) - 1)]
    new = torch.tensor(more, dtype=torch.int64, device=tree.tokens.device)
    rows = (*drawn.q_rows, *([-1] * len(more))) if drawn.q is not None else ()
    return Proposal(tree.extend(new, parents), (*drawn.draws, *chain.draws[: len(more)]), drawn.q, rows, origin)
