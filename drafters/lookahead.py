"""Lookahead decoding: n-grams that the target itself wrote down, in rows that ride along with its verification.

Shape suffixes: N tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from specdec.chance import Chance, mix
from specdec.drafter import Drafter, Outcome, Request
from specdec.errors import InputError
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.tree import TokenTree


class Pool:
    """For each token the last `guesses` n-grams that began with it, newest last, without their first token."""

    def __init__(self, guesses: int):
        self.guesses = guesses
        self._after: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        known = self._after.setdefault(ngram[0], {})
        known.pop(tuple(ngram[1:]), None)
        known[tuple(ngram[1:])] = None
        if len(known) > self.guesses:
            del known[next(iter(known))]

    def after(self, token: int) -> list[tuple[int, ...]]:
        """Newest first."""
        return list(reversed(self._after.get(token, {})))


class Trie:
    """A tree that grows by paths; paths that begin alike share nodes. `depth` and `size` are never exceeded."""

    def __init__(self, depth: int, size: int):
        self.depth, self.size = depth, size
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._depths: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def missing(self, path: Iterable[int]) -> int:
        """How many nodes of the path from the root are not there yet."""
        node, missing = -1, 0
        for token in path:
            found = None if missing else self._child.get((node, token))
            if found is None:
                missing += 1
            else:
                node = found
        return missing

    def add(self, token: int, parent: int) -> int | None:
        """The parent's child with this token, made if there is room for it."""
        if (parent, token) in self._child:
            return self._child[parent, token]
        depth = 1 if parent < 0 else self._depths[parent] + 1
        if depth > self.depth or len(self.tokens) >= self.size:
            return None
        self.tokens.append(token)
        self.parents.append(parent)
        self._depths.append(depth)
        self._child[parent, token] = len(self.tokens) - 1
        return len(self.tokens) - 1

    def add_path(self, path: Iterable[int], parent: int = -1) -> list[int]:
        """The nodes of as much of the path as there is room for."""
        nodes: list[int] = []
        for token in path:
            node = self.add(token, nodes[-1] if nodes else parent)
            if node is None:
                break
            nodes.append(node)
        return nodes

    @property
    def tree(self) -> TokenTree:
        return TokenTree.of(self.tokens, self.parents)


@dataclass(eq=False)
class LookaheadState:
    """`columns[j]`: N - 1 tokens of the window that stand `j` behind the root and on; those of column 0 begin with it.

    `ages[j]`: of how many of them the target has the say. `cells[j]`: the nodes of the last proposal that are column
    j's, from its own first token on. `tail`: what the target said behind the first rejection of a chain.
    """

    eos_ids: frozenset[int]
    pool: Pool
    text: list[int]
    columns: list[list[int]] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    cells: list[list[int]] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)
    fills: int = 0  # columns that were ever filled from the text


class LookaheadDrafter(Drafter):
    """Drafts n-grams from a pool that Jacobi iterations of the target fill. No weights, no second model.

    The window has `window` columns of `ngram - 1` tokens. Column j guesses the text from j tokens behind the root on;
    its first token stands on the path through the first tokens of the columns before it, and its others hang from
    there. That is a tree: a spine of `window - 1` nodes, and at the root and at each of its nodes a chain of
    `ngram - 2`. A round computes them as nodes of the proposal. The target's own choice behind each column's last
    token makes an n-gram for the pool and the column's new last token, and the columns move on by what was emitted.
    Up to `guesses` n-grams of the pool that begin with the root are proposed in the same tree; paths that begin alike
    share nodes, and a window node that turns out right is accepted as any other. (Fu et al., arXiv 2402.02057.)

    All of it fits into the plan: guesses take at most half of its nodes, columns the rest, as deep as it allows
    (`window + ngram - 3` is needed for the whole window). So the window wants a policy with trees, such as
    `DynamicTree(budget=60, k=10)`. In a plan for a chain, the newest n-grams are laid end to end, then what the target
    last said about those places (Jacobi decoding), and its answers behind a rejection go to the pool.

    `from_text` puts the n-grams of prompt and text into the pool too. Rows are deterministic: one transfer from the
    device per round reads the target's choices. It helps where the step has compute to spare: every node is a row.

    Lossless: yes, with every lossless verifier: the proposal is a point mass.
    """

    trees = True

    def __init__(self, window: int = 7, ngram: int = 5, guesses: int = 7, from_text: bool = True):
        if window < 1 or ngram < 2 or guesses < 1:
            raise InputError(f"need window >= 1, ngram >= 2 and guesses >= 1, not {window}, {ngram} and {guesses}")
        self.window, self.ngram, self.guesses, self.from_text = window, ngram, guesses, from_text

    @property
    def name(self) -> str:
        return "lookahead"

    def start(self, request: Request) -> LookaheadState:
        state = LookaheadState(request.eos_ids, Pool(self.guesses), [])
        self._append(state, request.prompt)
        return state

    def _append(self, state: LookaheadState, tokens: Sequence[int]) -> None:
        first = len(state.text)
        state.text += tokens
        if self.from_text:
            for end in range(max(first, self.ngram - 1), len(state.text)):
                state.pool.add(state.text[end - self.ngram + 1 : end + 1])

    def _fill(self, state: LookaheadState) -> None:
        """Columns that are missing begin as tokens that stand together somewhere in the text."""
        while len(state.columns) < self.window:
            state.fills += 1
            at = mix(state.fills) % len(state.text)
            state.columns.append([state.text[(at + i) % len(state.text)] for i in range(self.ngram - 1)])
            state.ages.append(0)

    def propose(self, state: LookaheadState, plan: Plan, chance: Chance) -> Proposal:
        state.cells = []
        if plan.depth < 1:
            return Proposal.empty()
        is_chain = not plan.budget and plan.num_nodes == plan.depth
        tree = self._chain(state, plan) if is_chain else self._tree(state, plan)
        return Proposal.point(tree)

    def _chain(self, state: LookaheadState, plan: Plan) -> TokenTree:
        draft: list[int] = []
        while len(draft) < plan.depth:
            more = self._continuation(state.pool, [*state.text[-self.ngram :], *draft])
            if not more:
                break
            draft += more
        draft = [*draft, *state.tail[len(draft) :]]
        if len(draft) < plan.depth:  # Jacobi iterations begin anywhere, and go on from there
            at = mix(len(state.text)) % len(state.text)
            draft += [state.text[(at + i) % len(state.text)] for i in range(plan.depth - len(draft))]
        draft = draft[: plan.depth]
        ends = [i for i, token in enumerate(draft) if token in state.eos_ids]
        return TokenTree.chain(draft[: ends[0] + 1] if ends else draft)

    def _continuation(self, pool: Pool, text: Sequence[int]) -> tuple[int, ...]:
        """What follows in the n-gram that begins with the longest end of the text; of several the newest."""
        for matched in range(min(self.ngram - 1, len(text)), 0, -1):
            end = tuple(text[len(text) - matched + 1 :])
            for rest in pool.after(text[-matched]):
                if rest[: matched - 1] == end:
                    return rest[matched - 1 :]
        return ()

    def _tree(self, state: LookaheadState, plan: Plan) -> TokenTree:
        trie = Trie(plan.depth, plan.num_nodes)
        root = state.text[-1]
        # A window without guesses would learn for nothing, guesses without a window would learn nothing.
        for guess in state.pool.after(root)[: self.guesses]:
            if len(trie.tokens) + trie.missing(guess[: plan.depth]) <= (plan.num_nodes + 1) // 2:
                trie.add_path(guess)
        self._fill(state)
        state.columns[0][0] = root
        spine = -1
        for j, column in enumerate(state.columns):
            if j:
                step = trie.add(column[0], spine)
                if step is None:
                    break
                spine = step
            nodes = trie.add_path(column[1:], spine)
            if len(nodes) < len(column) - 1:
                break
            state.cells.append([spine, *nodes])
        return trie.tree

    def observe(self, state: LookaheadState, outcome: Outcome) -> LookaheadState:
        tree, state.tail = outcome.proposal.tree, []
        moved = len(outcome.tokens)
        if len(tree):
            said: list[int] = outcome.logits.argmax(-1).tolist()
            if state.cells:
                self._learn_window(state, said)
                moved -= 1  # updated columns stand one place further on than they did
            elif tree.is_chain:
                self._learn_chain(state, outcome, said)
        self._append(state, outcome.tokens)
        del state.columns[: max(0, moved)], state.ages[: max(0, moved)]
        state.cells = []
        return state

    def _learn_window(self, state: LookaheadState, said: Sequence[int]) -> None:
        for j, cell in enumerate(state.cells):
            column, newest = state.columns[j], said[cell[-1] + 1]
            # Filler is nobody's n-gram: the pool waits until all but the first token are the target's own.
            if state.ages[j] >= self.ngram - 2:
                state.pool.add([*column, newest])
            state.columns[j] = [*column[1:], newest]
            state.ages[j] = min(state.ages[j] + 1, self.ngram - 1)
        # There was no room for the others in the plan: they stand where they stood, which is the wrong place now.
        del state.columns[len(state.cells) :], state.ages[len(state.cells) :]

    def _learn_chain(self, state: LookaheadState, outcome: Outcome, said: Sequence[int]) -> None:
        """Behind the first rejection the target went on from a wrong token: what it said is a guess for the next round.

        `said[i]` follows node i - 1, so those behind the emitted tokens begin at the rejected node's own row.
        """
        state.tail = list(said[len(outcome.path) + 1 :])
        guess = [*outcome.tokens[-1:], *state.tail]
        for first in range(len(guess) - self.ngram + 1):
            state.pool.add(guess[first : first + self.ngram])
