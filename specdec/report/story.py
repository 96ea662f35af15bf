"""A text, token by token: who wrote it in which round, and what target and draft thought of it.

Shape suffixes: M emitted tokens of a round, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.exact import Settle
from specdec.generation import Generation, Stream
from specdec.prompting import Prompt
from specdec.sampling import Sampling
from specdec.text import Detokenizer
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.decoder import Task
    from specdec.drafter import Outcome
    from specdec.runtime.session import Rows

_DIGITS = 4  # of probabilities, after the point
# Refused siblings that are kept per round; a tree may have more.
_MAX_REFUSED = 4
_CHOICES = tuple(f.name for f in fields(Sampling))


@dataclass(frozen=True)
class _Look:
    """One use of `Sampling.scores`: processed logits of some nodes of a tree."""

    scores_FV: Tensor
    tree: TokenTree
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class WatchedSampling(Sampling):
    """The same sampling, which keeps every row of scores that it was asked for, the drafts' and the target's.

    Lossless: yes; nothing is computed otherwise.
    """

    looks: list[_Look] = field(default_factory=list, compare=False, repr=False)

    @property
    def reads_prefix(self) -> bool:
        """True, so that drafters with a vocabulary of their own give their rows in the target's ids."""
        return True

    def scores(self, logits: Tensor, prefix: Sequence[int], tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        found = super().scores(logits, prefix, tree, nodes)
        self.looks.append(_Look(found, tree, tuple(nodes)))
        return found


class _Drafted:
    """The draft's rows of one round, by the drafted tokens that stand before them."""

    def __init__(self, looks: Sequence[_Look], vocab_size: int):
        self.by_path: dict[tuple[int, ...], Tensor] = {}
        self.by_depth: list[Tensor] = []
        for look in looks:
            if look.scores_FV.shape[-1] != vocab_size:  # columns of a draft vocabulary, not named by the target's ids
                continue
            if len(look.nodes) > 1 and not len(look.tree):  # heads that do not see what the others drafted
                self.by_depth = list(look.scores_FV)
                continue
            tokens = look.tree.tokens.tolist()
            for row_V, node in zip(look.scores_FV, look.nodes, strict=True):
                self.by_path[tuple(tokens[at] for at in look.tree.path(node))] = row_V

    def probability(self, before: Sequence[int], token: int) -> float | None:
        """What the draft gave `token` after these drafted tokens; None where it did not look."""
        row_V = self.by_path.get(tuple(before))
        if row_V is None and len(before) < len(self.by_depth):
            row_V = self.by_depth[len(before)]
        return None if row_V is None else round(float(row_V.softmax(-1)[token]), _DIGITS)


class _Teller:
    """A settle hook: looks on, and leaves the decision to `settle`."""

    def __init__(self, sampling: WatchedSampling, settle: Settle, tokenizer: Any):
        self.sampling, self.settle, self.tokenizer = sampling, settle, tokenizer
        self.notes: list[dict[str, Any]] = []  # of every emitted token
        self.num_rounds = 0

    def __call__(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        drafted = _Drafted(self.sampling.looks[:-1], rows.logits.shape[-1])  # the last look is the loop's own
        outcome = self.settle(task, rows, outcome)
        tree, count = outcome.proposal.tree, len(outcome.tokens)
        nodes = (-1, *outcome.path)[:count]
        if count:
            logits_MV = rows.logits[[node + 1 for node in nodes]]
            p_MV = self.sampling.scores(logits_MV, task.target.tokens, tree, nodes).softmax(-1)
            best_MV = p_MV.topk(min(2, p_MV.shape[-1])).values
            for i, token in enumerate(outcome.tokens):
                before = outcome.tokens[:i]
                self.notes.append(
                    {
                        "round": self.num_rounds,
                        "p": round(float(p_MV[i, token]), _DIGITS),
                        "q": drafted.probability(before, token),
                        "margin": round(float(best_MV[i, 0] - best_MV[i, 1:].sum()), _DIGITS),
                        "refused": self._refused(outcome, i, p_MV[i], drafted, before),
                    }
                )
        self.sampling.looks.clear()
        self.num_rounds += 1
        return outcome

    def _refused(
        self, outcome: Outcome, i: int, p_V: Tensor, drafted: _Drafted, before: Sequence[int]
    ) -> list[dict[str, Any]]:
        """What was drafted for this place and not taken."""
        if i < len(outcome.path):
            return []
        tree = outcome.proposal.tree
        children = tree.children(outcome.path[-1] if outcome.path else -1)[:_MAX_REFUSED]
        tokens = [int(tree.tokens[child]) for child in children]
        return [
            {
                "text": self.tokenizer.decode([token]),
                "p": round(float(p_V[token]), _DIGITS),
                "q": drafted.probability(before, token),
            }
            for token in tokens
            if token != outcome.tokens[i]
        ]


def pieces(tokenizer: Any, generation: Generation) -> list[str]:
    """The text, cut by token: joined they are `generation.text`.

    A character of several tokens belongs to the one that completes it; what a stop string cut off is nobody's.
    """
    detokenizer, left, found = Detokenizer(tokenizer, generation.prompt), generation.text, []
    for token in generation.tokens:
        length = len(detokenizer.push([token]))
        found.append(left[:length])
        left = left[length:]
    if found:
        found[-1] += left  # bytes that were given out only because the text ended
    return found


def _watched(options: dict[str, Any]) -> WatchedSampling:
    given = options.pop("sampling", None)
    choices = {name: options.pop(name) for name in _CHOICES if name in options}
    if given is not None:
        return WatchedSampling(**{name: getattr(given, name) for name in _CHOICES})
    if "processors" in choices:
        choices["processors"] = tuple(choices["processors"])
    return WatchedSampling(**choices)


@torch.inference_mode()
def tell(decoder: SpeculativeDecoder, prompt: Prompt, **options: Any) -> list[dict[str, Any]]:
    """Decode one prompt speculatively and say of every token where it came from; options as for `generate`.

    One dictionary per token: `text` (joined: the text), `origin` (a drafter's name, or "target"), `round` and
    `position` (both from 0), and
      `p`: the target's probability of the token: the softmax of its processed logits, penalties, temperature and
           filters included; at temperature 0, where the rule's own distribution is one-hot, that of temperature 1.
      `q`: the same of the draft, where it looked at this place with a model (else None: lookups, plain steps);
      `margin`: the target's largest probability there less the second largest, in [0, 1];
      `refused`: what had been drafted for this place and was not taken: `text`, `p`, `q` of each.

    Lossless: yes: the tokens are those of `generate` with the same options. Raises `InputError` as `generate` does,
    and without a tokenizer.
    """
    if decoder.tokenizer is None:
        raise InputError("a story needs a tokenizer: pass tokenizer= to the decoder")
    options = dict(options)
    sampling = _watched(options)
    task = decoder.prepare(prompt, **options, sampling=sampling)
    teller = _Teller(sampling, task.settle, decoder.tokenizer)
    generation = Stream(replace(task, settle=teller)).finish()
    told = zip(pieces(decoder.tokenizer, generation), generation.origins, teller.notes, strict=False)
    return [{"text": text, "origin": origin, "position": i, **note} for i, (text, origin, note) in enumerate(told)]
