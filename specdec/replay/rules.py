"""What a recorded text tells of a rule: whether, or how probably, each of its tokens was drafted and accepted.

A lossless rule emits the target's text whatever was drafted. So the recorded text may be taken for the rule's own, and
what remains is the law of acceptance *given the text*, where y is the text's token and p, q its probabilities:

* a point mass is accepted if and only if it is y, under every rule;
* the ratio test accepts with probability min(1, q/p);
* block verification accepts d tokens or more with probability min over i <= d of prod_{j <= i} q_j/p_j, at most 1;
* of children drawn from one row, rules that draw the target's token first accept the child that equals it.

Under shared noise, and at temperature 0, the text of a seed is the same whatever was drafted, and nothing is random.
"""

from __future__ import annotations

import math
import random

import numpy as np

from specdec import registry
from specdec.drafter import Memory
from specdec.errors import IncompatiblePairError, InputError
from specdec.policy import Plan
from specdec.proposal import Draw
from specdec.replay.recording import NEVER, Recording
from specdec.replay.view import View
from specdec.tree import Structure, branching_shape, structure
from specdec.verifier import Verifier

#: Rules that keep the longest prefix, and those that test one token after the other; both on chains.
_BY_BLOCK = ("block", "traversal")
_ONE_BY_ONE = ("ratio", "recursive", "greedy-multi")


def tree_of(plan: Plan) -> tuple[int, ...]:
    """Parents of the nodes of a plan without a budget, in the order in which they are drafted."""
    if plan.shape:
        return plan.shape
    return branching_shape(plan.children(depth) for depth in range(plan.depth))


class Rule:
    """A verification rule on a recording: `accepts` says how far the text follows a tree."""

    def __init__(self, recording: Recording, verifier: str | Verifier):
        made: Verifier = registry.create("verifier", verifier)
        offered = frozenset(Draw(name) for name in recording.meta["draws"])
        draw = made.choose_draw(offered)
        if draw is None:
            raise IncompatiblePairError(
                f"the {made.name} verifier takes nothing that {recording.meta['drafter']} draws"
            )
        if not made.lossless:
            raise InputError(f"the {made.name} verifier changes the text, so that no recorded text is its own: run it")
        if made.name == "greedy" and not recording.is_greedy:
            raise IncompatiblePairError(
                "the greedy verifier is exact at temperature 0 only; record with --temperature 0"
            )
        self.verifier, self.recording = made, recording
        self.draw = Draw.POINT if recording.is_greedy else draw
        #: Whether the text of the same seed is the recorded one.
        self.keeps_text = recording.is_greedy or made.keeps_seed
        #: Whether acceptance, given the text, is random.
        self.is_random = self.draw in (Draw.SAMPLED, Draw.MIXED)
        self.by_block = made.name in _BY_BLOCK
        if self.is_random and made.name not in (*_BY_BLOCK, *_ONE_BY_ONE):
            raise InputError(
                f"replay knows no law of acceptance for the {made.name} verifier on sampled tokens: run it"
            )

    def check_tree(self) -> None:
        """Raise when trees of this rule and drafter cannot be."""
        if not self.verifier.trees:
            raise IncompatiblePairError(f"the {self.verifier.name} verifier takes chains, not trees")
        if not self.recording.meta["trees"]:
            raise IncompatiblePairError(f"the {self.recording.meta['drafter']} drafter proposes chains, not trees")
        if self.recording.memory is Memory.ROUNDS:
            raise InputError(
                f"how {self.recording.meta['drafter']} fills a tree depends on earlier rounds, and its chains do not "
                "tell: run it"
            )
        if self.is_random and self.verifier.name not in ("greedy-multi", "recursive"):
            raise InputError(
                f"a trace does not tell how {self.verifier.name} treats trees of sampled tokens: run it, or replay "
                "recursive, which tests the same trees"
            )

    def accepted(self, view: View, at: int, tree: Structure, draw: random.Random) -> tuple[int, bool]:
        """How many of the text's tokens from `at` on a tree brings, and whether a rejection ended it."""
        node, depth, survival, product = -1, 0, 1.0, 1.0
        threshold = draw.random() if self.is_random and tree.is_chain else 0.0
        while children := tree.children[node + 1]:
            if self.is_random and tree.is_chain:
                ratio = self._ratio(view, at, depth)
                product *= ratio
                survival = min(survival, product) if self.by_block else survival * min(1.0, ratio)
                child = 0 if threshold < survival else -1
            elif self.is_random:
                child = self._sampled_child(view, at, depth, len(children), draw)
            else:
                child = self._child(view, at, depth)
            if not 0 <= child < len(children):
                return depth, True
            node, depth = children[child], depth + 1
        return depth, False

    def _child(self, view: View, at: int, depth: int) -> int:
        """Which child the text's token is; as many as there are, or more, where it is none."""
        drafted_so = self.draw.value == self.recording.meta["draw"] or not self.recording.has_rows
        if not drafted_so and self.draw is not Draw.POINT:
            raise InputError(f"the recording drew {self.recording.meta['draw']}, not {self.draw.value}, tokens")
        found = view.nearest(at, depth)
        if found is None:
            return 0 if view.assume == "always" else -1
        row, column = found
        places = view.place if drafted_so else view.rank
        value = int(places[row][column])
        return value if value >= 0 else NEVER

    def _ratio(self, view: View, at: int, depth: int) -> float:
        """q/p of the text's token."""
        found = view.nearest(at, depth)
        if found is None:
            return 1.0 if view.assume == "always" else 0.0
        row, column = found
        q = view.text_q[row][column]
        return 0.0 if math.isnan(q) else q / max(view.text_p[at + depth], 1e-30)

    def _sampled_child(self, view: View, at: int, depth: int, count: int, draw: random.Random) -> int:
        """Of siblings that are sampled: by the rule's law given the text, from the recorded rows of p and q."""
        found = view.whole_row(at, depth)
        if found is None:
            return 0 if view.assume == "always" else -1
        row = found
        p, q = view.text_p[row], view.text_q[row][0]
        if math.isnan(q) or p <= 0:
            return -1
        if self.verifier.name == "greedy-multi":
            return self._mixed(view, row, count, p, q, draw)
        return self._siblings(view, row, count, draw)

    def _mixed(self, view: View, row: int, count: int, p: float, q: float, draw: random.Random) -> int:
        """The top count - 1 are accepted where they are the text's; the first child is tested on what they leave."""
        rank = int(view.rank[row][0])
        if rank < count - 1:
            return rank + 1 if q > 0 else -1
        logs = self.recording.arrays["draft_logp_PM"][view.text.first + row]
        if count - 1 > len(logs):
            raise InputError(f"{count} children need --top-m {count - 1} or more; the recording has {len(logs)}")
        rest = 1.0 - float(np.exp(logs[: count - 1].astype(np.float64)).sum())
        return 0 if rest > 0 and draw.random() * p < q / rest else -1

    def _siblings(self, view: View, row: int, count: int, draw: random.Random) -> int:
        """Children sampled without replacement, each tested against what the earlier ones left of p.

        Given that the text goes on with y and that a child was refused, the child's law is norm(max(D - R, 0)), and
        does not depend on y: that is what makes the rule lossless.
        """
        residual, left = self._rows(view, row)  # of each the text's token first
        for child in range(count):
            if left.sum() <= 0:
                return -1
            if draw.random() * residual[0] < min(residual[0], left[0]):
                return child
            refused = np.maximum(left - residual, 0.0)
            if refused.sum() <= 0:
                return -1
            gone = draw.choices(range(len(refused)), refused.tolist())[0]
            rest = np.maximum(residual - left, 0.0)
            residual = rest / rest.sum() if rest.sum() > 0 else residual
            if gone < len(left) - 1:  # the last entry is the tail: many tokens, of which one is gone
                left[gone] = 0.0
            left = left / left.sum() if left.sum() > 0 else left
        return -1

    def _rows(self, view: View, row: int) -> tuple[np.ndarray, np.ndarray]:
        """p and q over the text's token, the recorded tokens of either, and one entry for all others."""
        here, arrays, found = view.text.first + row, self.recording.arrays, []
        y = view.tokens[row]
        ids = {who: arrays[f"{who}_ids_PM"][here].tolist() for who in ("target", "draft")}
        others = sorted({*ids["target"], *ids["draft"]} - {y})
        number = {y: 0, **{token: i for i, token in enumerate(others, 1)}}
        for who, own in (("target", view.text_p[row]), ("draft", view.text_q[row][0])):
            values = np.zeros(len(number) + 1)
            values[[number[token] for token in ids[who]]] = np.exp(arrays[f"{who}_logp_PM"][here].astype(np.float64))
            tail = float(arrays[f"{who}_tail_P"][here]) - (0.0 if y in ids[who] else own)
            values[0], values[-1] = own, max(0.0, tail)
            view.doubts.tails += values[-1]
            found.append(values / values.sum())
        return found[0], found[1]


def chain(depth: int) -> Structure:
    return structure(tuple(range(-1, depth - 1)))
