"""Rules and drafting laws that look right and are not: the oracle must catch every one of them.

Each is a mistake that was made, or nearly made, in real code. They are negative controls: if one passed, the oracle
would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from specdec.verifiers import Block, Ratio, Recursive
from torch import Tensor

from specdec.chance import Chance
from specdec.oracle import Law, Toy
from specdec.proposal import Draw, Proposal
from specdec.tree import TokenTree
from specdec.verifier import Verdict, Verifier, positive_part

Context = tuple[int, ...]
SAMPLED = frozenset({Draw.SAMPLED})


# Laws


def _chain(toy: Toy, context: Context, chance: Chance, depth: int, drawn_from: Callable[[Tensor], Tensor]) -> Proposal:
    """A sampled chain that reports the plain rows of q, whatever its tokens were drawn from."""
    tokens: list[int] = []
    rows = []
    for _ in range(depth):
        rows.append(toy.q((*context, *tokens)))
        tokens.append(int(chance.draw(drawn_from(rows[-1])[None])))
    return Proposal.sampled(TokenTree.chain(tokens), torch.stack(rows))


def honest_chain(toy: Toy, context: Context, chance: Chance) -> Proposal:
    return _chain(toy, context, chance, 3, lambda q: q)


def filtered_draft(toy: Toy, context: Context, chance: Chance) -> Proposal:
    """Drawn from the two best tokens of q, reported as drawn from all of q."""

    def top_two(q: Tensor) -> Tensor:
        return torch.where(q >= q.topk(2).values[-1], q, 0.0)

    return _chain(toy, context, chance, 3, top_two)


def weak_token_dropped(toy: Toy, context: Context, chance: Chance) -> Proposal:
    """The chain ends *before* the first token whose own probability is low, instead of after it."""
    full = honest_chain(toy, context, chance)
    assert full.q is not None
    own = full.q.gather(1, full.tree.tokens[:, None])[:, 0]
    count = int((own >= 0.25).long().cumprod(0).sum())
    return Proposal.sampled(TokenTree.chain(full.tree.tokens[:count]), full.q[:count])


def _tree(
    toy: Toy,
    context: Context,
    chance: Chance,
    branching: tuple[int, ...],
    children_of: Callable[[Tensor, int, Chance], list[int]],
) -> Proposal:
    """Level by level; every child reports the row of its parent."""
    tree, texts, level, rows, q_rows = TokenTree.empty(), {-1: context}, [-1], [], []
    for count in branching:
        grown = []
        for node in level:
            rows.append(toy.q(texts[node]))
            for token in children_of(rows[-1], count, chance):
                texts[len(tree)] = (*texts[node], token)
                grown.append(len(tree))
                tree = tree.extend(torch.tensor([token]), [node])
                q_rows.append(len(rows) - 1)
        level = grown
    return Proposal.sampled(tree, torch.stack(rows), q_rows) if len(tree) else Proposal.empty()


def _distinct(q: Tensor, count: int, chance: Chance) -> list[int]:
    left, drawn = q.clone(), []
    for _ in range(count):
        drawn.append(int(chance.draw(left[None])))
        left[drawn[-1]] = 0
    return drawn


def _independent(q: Tensor, count: int, chance: Chance) -> list[int]:
    return [int(token) for token in chance.draw(q.expand(count, -1))]


def honest_tree(toy: Toy, context: Context, chance: Chance) -> Proposal:
    return _tree(toy, context, chance, (2, 1), _distinct)


def weak_child_dropped(toy: Toy, context: Context, chance: Chance) -> Proposal:
    def strong(q: Tensor, count: int, chance: Chance) -> list[int]:
        return [token for token in _distinct(q, count, chance) if q[token] >= 0.25]

    return _tree(toy, context, chance, (2, 1), strong)


def best_as_if_sampled(toy: Toy, context: Context, chance: Chance) -> Proposal:
    return _tree(toy, context, chance, (2, 1), lambda q, count, _: q.topk(count).indices.tolist())


def sorted_siblings(toy: Toy, context: Context, chance: Chance) -> Proposal:
    """Drawn without replacement, then sorted by probability: the order of drawing is lost."""

    def in_order(q: Tensor, count: int, chance: Chance) -> list[int]:
        return sorted(_distinct(q, count, chance), key=lambda token: -float(q[token]))

    return _tree(toy, context, chance, (2, 1), in_order)


def independent_siblings(toy: Toy, context: Context, chance: Chance) -> Proposal:
    """With replacement: siblings may carry the same token (`TokenTree.check` forbids it; the rule below does not)."""
    return _tree(toy, context, chance, (2,), _independent)


def duplicates_merged(toy: Toy, context: Context, chance: Chance) -> Proposal:
    def merged(q: Tensor, count: int, chance: Chance) -> list[int]:
        return list(dict.fromkeys(_independent(q, count, chance)))

    return _tree(toy, context, chance, (2,), merged)


def two_paths(toy: Toy, context: Context, chance: Chance) -> Proposal:
    """Two chains drawn independently of each other, side by side below the root."""
    chains = [_chain(toy, context, chance, 2, lambda q: q) for _ in range(2)]
    tokens = torch.cat([chain.tree.tokens for chain in chains])
    rows = [chain.q for chain in chains if chain.q is not None]
    return Proposal.sampled(TokenTree(tokens, (-1, 0, -1, 2)), torch.cat(rows), range(4))


# Rules


class WithReplacement(Recursive):
    """Not broken: recursive rejection for siblings drawn independently; duplicates are tested again."""

    updates_residual = True

    @property
    def name(self) -> str:
        return "with-replacement"

    def _one_level(
        self, residual: Tensor, proposal: Proposal, parent: int, chance: Chance
    ) -> tuple[int | None, Tensor]:
        first = residual
        for child in proposal.tree.children(parent):
            q, token = proposal.distribution(child, len(residual)), proposal.tree.tokens[child]
            tested = residual if self.updates_residual else first
            if bool(chance.accept(tested[token], q[token])):
                return child, residual
            residual = positive_part(tested - q, tested)
            residual = residual / residual.sum()
        return None, residual


class StaleResidual(WithReplacement):
    """Every sibling is tested against p itself, as if none had been refused before it."""

    updates_residual = False

    @property
    def name(self) -> str:
        return "stale-residual"


class FilteredResidual(Ratio):
    """Applies top-p to the residual, although the filters belong to p and q alone."""

    top_p = 0.8

    @property
    def name(self) -> str:
        return "filtered-residual"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        q, k = proposal.chain_distributions(p), len(proposal.tree)
        x = proposal.tree.tokens[:, None]
        n = int(chance.accept(p[:-1].gather(1, x), q.gather(1, x)).long().cumprod(0).sum())
        if n == k:
            return Verdict.of(n - 1, chance.draw(p[-1:])[0])
        residual = positive_part(p[n] - q[n], p[n])
        row, order = (residual / residual.sum()).sort(descending=True)
        kept = torch.zeros_like(row)
        kept[order] = torch.where(row.cumsum(0) - row < self.top_p, row, 0.0)
        return Verdict.of(n - 1, chance.draw(kept[None])[0])


def _longest(proposal: Proposal, verdicts: list[Verdict]) -> Verdict:
    depth = [proposal.tree.depths[int(v.node)] if int(v.node) >= 0 else 0 for v in verdicts]
    return verdicts[depth.index(max(depth))]


def _paths(p: Tensor, proposal: Proposal) -> list[tuple[list[int], Tensor, Proposal]]:
    """For every leaf: its nodes, the rows of p along it, and the chain by itself."""
    tree = proposal.tree
    leaves = [node for node in range(len(tree)) if not tree.children(node)]
    parts = []
    for nodes in (list(tree.path(leaf)) for leaf in leaves):
        rows = torch.stack([proposal.distribution(node, p.shape[-1]) for node in nodes])
        chain = Proposal.sampled(TokenTree.chain(tree.tokens[nodes]), rows)
        parts.append((nodes, p[[0, *(node + 1 for node in nodes)]], chain))
    return parts


class LongestOfPaths(Verifier):
    """Ratio test on every path by itself; the longest acceptance wins."""

    trees, draws = True, (Draw.SAMPLED,)
    rule: Verifier = Ratio()

    @property
    def name(self) -> str:
        return "longest-of-paths"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        verdicts = []
        for nodes, rows, chain in _paths(p, proposal):
            verdict = self.rule.verify(rows, chain, position, chance)
            kept = int(verdict.node)
            verdicts.append(Verdict.of(nodes[kept] if kept >= 0 else -1, verdict.token))
        return _longest(proposal, verdicts)


class FreshSamplePerPath(LongestOfPaths):
    """Sample and match, with new target samples for each path."""

    class _Match(Verifier):
        draws = (Draw.SAMPLED,)

        def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
            for node, token in enumerate(proposal.tree.tokens.tolist()):
                y = chance.draw(p[node][None])[0]
                if int(y) != token:
                    return Verdict.of(node - 1, y)
            return Verdict.of(len(proposal.tree) - 1, chance.draw(p[-1:])[0])

    rule = _Match()

    @property
    def name(self) -> str:
        return "fresh-sample-per-path"


class ArgmaxElseSample(Verifier):
    """Accept a drafted token that is the target's most likely one; otherwise draw from p, at any temperature."""

    draws = (Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "argmax-else-sample"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        accepted = (proposal.tree.tokens == p[:-1].argmax(-1)).long().cumprod(0).sum()
        return Verdict(accepted - 1, chance.draw(p[accepted][None])[0])


class ImpatientBlock(Block):
    """Block verification that stops at the first prefix that is not kept."""

    @property
    def name(self) -> str:
        return "impatient-block"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        return super().verify(p, proposal, position, _Impatient(chance))


class _Impatient(Chance):
    """Forgets everything that was accepted after the first refusal."""

    def __init__(self, chance: Chance):
        self._chance = chance

    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        return self._chance.accept(p, q).long().cumprod(0).bool()

    def draw(self, weights_RV: Tensor) -> Tensor:
        return self._chance.draw(weights_RV)

    def race(self, weights_RV: Tensor, positions: Sequence[int], k: int = 1) -> Tensor:
        return self._chance.race(weights_RV, positions, k)


@dataclass(frozen=True)
class Control:
    """A broken pair, and the range (and mean) of total variation that an independent enumeration found for it."""

    name: str
    law: Law
    verifier: Verifier
    low: float
    high: float
    mean: float


def _on_chains(propose: Callable[[Toy, Context, Chance], Proposal]) -> Law:
    return Law(propose.__name__, propose, SAMPLED, vocab_size=4, depth=3)


def _on_trees(propose: Callable[[Toy, Context, Chance], Proposal], depth: int = 2, vocab_size: int = 3) -> Law:
    return Law(propose.__name__, propose, SAMPLED, vocab_size, depth, trees=True)


CONTROLS = (
    Control("filtered draft", _on_chains(filtered_draft), Ratio(), 0.22, 0.50, 0.33),
    Control("weak token dropped", _on_chains(weak_token_dropped), Ratio(), 0.0, 0.23, 0.13),
    Control("weak child dropped", _on_trees(weak_child_dropped), Recursive(), 0.0, 0.39, 0.18),
    Control("best as if sampled", _on_trees(best_as_if_sampled), Recursive(), 0.18, 0.57, 0.38),
    Control("sorted siblings", _on_trees(sorted_siblings), Recursive(), 0.09, 0.31, 0.20),
    Control("duplicates merged", _on_trees(duplicates_merged, 1), WithReplacement(), 0.0, 0.026, 0.008),
    Control("stale residual", _on_trees(independent_siblings, 1), StaleResidual(), 0.014, 0.12, 0.06),
    Control("top-p on the residual", _on_chains(honest_chain), FilteredResidual(), 0.0, 0.09, 0.025),
    Control("longest of independent paths", _on_trees(two_paths), LongestOfPaths(), 0.03, 0.12, 0.07),
    Control("fresh sample per path", _on_trees(two_paths), FreshSamplePerPath(), 0.03, 0.13, 0.06),
    Control("argmax, else sample", _on_chains(honest_chain), ArgmaxElseSample(), 0.11, 0.30, 0.18),
    Control("impatient block", _on_chains(honest_chain), ImpatientBlock(), 0.13, 0.55, 0.26),
)
#: The same laws and machinery without the mistake: these must be exact, or a control could fail for another reason.
SOUND = (
    ("chain", _on_chains(honest_chain), Ratio()),
    ("chain, block", _on_chains(honest_chain), Block()),
    ("tree", _on_trees(honest_tree), Recursive()),
    ("with replacement", _on_trees(independent_siblings, 1), WithReplacement()),
)
