"""A head on the target's own hidden states drafts: EAGLE-1, -2 and -3.

Shape suffixes: F nodes of a level, N rows, W width of the target's states, H hidden width, V target vocabulary,
R draft vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.bench.prompts import read_prompts
from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, ModelRunner, Outcome, Request
from specdec.errors import InputError
from specdec.formats import eagle as files
from specdec.growth import grow
from specdec.history import History
from specdec.models.eagle import CONVENTIONS, OWN, EagleModel
from specdec.models.eagle_build import build
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.choose import open_draft_backend
from specdec.runtime.session import Session, Steps
from specdec.transfer import to_device
from specdec.tree import TokenTree

# Tokens of the text that conventions are tried on, and how many standard errors apart "clearly" means.
_TRIED, _CLEARLY = 256, 3.0


@dataclass(eq=False)
class EagleState:
    request: Request
    text: History  # all tokens
    session: Session  # of the head: all tokens but the first
    ids_R: Tensor | None  # of the draft vocabulary, where it is not the target's
    columns: Tensor | None  # of the head's logits that `ids_R` names; None: all


class EagleDrafter(ModelRunner):
    """One small layer reads what the target computed anyway, and drafts a chain or a tree level by level.

    Row i of the head is (feature of token i, token i + 1), so its session holds all tokens but the first. A drafted
    node takes the head's own output at its parent for a feature; once the target has accepted tokens, their rows are
    computed anew from its true states. (Li et al., arXiv 2401.15077, 2406.16858, 2503.01840.)

    Lossless: yes, with every lossless verifier. Tokens outside the draft vocabulary have q = 0.
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    memory = Memory.TEXT

    def __init__(self, head: EagleModel, backend: str | None = None, kv_cache: str | None = None):
        self.head = head
        self.hidden = head.config.hidden
        self._backend = open_draft_backend(head, backend, kv_cache)
        self._backend.expose((OWN,))
        ids_R = head.draft_ids
        #: None where the draft vocabulary is the target's.
        self._ids_R = None if bool((ids_R == torch.arange(len(ids_R), device=ids_R.device)).all()) else ids_R
        self._largest_id = int(ids_R.max())
        self._num_known = head.embed_tokens.weight.shape[0]

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        """`hidden_convention`: "input" or "output", against what the head's files say. `self_test`: try both (True)."""
        if context.source is None:
            raise InputError(
                "the eagle drafter needs a head that was trained for this target: pass its folder, as in "
                "drafter='folder/of/eagle-head', or train one: specdec train eagle"
            )
        convention, tested = options.pop("hidden_convention", None), options.pop("self_test", True)
        if convention not in (None, *CONVENTIONS):
            raise InputError(f"hidden_convention is one of {', '.join(CONVENTIONS)}, not {convention!r}")
        config, tensors = files.read(context.source)
        if convention is not None:
            config.hidden_convention = convention
        head = build(config, tensors, context.target)
        if tested and context.tokenizer is not None and config.eagle_version == 3:
            warn_if_misread(head, context.target, context.tokenizer)
        return cls(head, **{"backend": context.backend, "kv_cache": context.kv_cache, **options})

    @classmethod
    def recognises(cls, config: Mapping[str, Any], folder: Path) -> bool:
        return files.layout_of(config, folder) is not None

    @property
    def name(self) -> str:
        return "eagle"

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Padded ids that only the target has stand as token 0: it costs acceptance at most."""
        return [token if token < self._num_known else 0 for token in tokens]

    @torch.inference_mode()
    def _feed(self, state: EagleState, tokens: Sequence[int]) -> None:
        """Append tokens with the target's true states of those before them, fused once."""
        first, features = len(state.session.tokens), state.request.features
        if not tokens:
            return
        assert features is not None
        states_NW = features.read(first, first + len(tokens)).to(self.head.device)
        state.session.append(self._known(tokens), self.head.fuse(states_NW))

    def start(self, request: Request) -> EagleState:
        # Keys and values depend on the first token too, by the target's states.
        session = Session(self._backend.fork(0), hidden=(OWN,), salt=request.prompt[0], keeps=False)
        ids_R, columns = self._ids_R, None
        if ids_R is not None and self._largest_id >= request.vocab_size:  # padding that the target lacks
            columns = (ids_R < request.vocab_size).nonzero()[:, 0]
            ids_R = ids_R[columns]
        state = EagleState(request, History(request.prompt), session, ids_R, columns)
        self._feed(state, request.prompt[1:])
        return state

    def proposing(self, state: EagleState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        session = state.session
        plan = plan.limited(session.context - len(session.tokens) + 1)
        if not session.tokens or plan.depth == 0:
            return Proposal.empty()
        session.drop_tree()
        own_NH: Tensor | None = None  # of the root and of each node that was run

        def expand(ran: TokenTree) -> Steps[Tensor]:
            nonlocal own_NH
            inputs = None if own_NH is None else _rows_of(own_NH, ran.parents[len(own_NH) - 1 :])
            rows = yield from session.forwarding(ran, inputs)
            assert rows.hidden is not None
            own_NH = rows.hidden if own_NH is None else torch.cat((own_NH, rows.hidden))
            return rows.logits if state.columns is None else rows.logits[:, state.columns]

        grown = yield from grow(expand, plan, state.request, state.text, chance, state.ids_R)
        return grown.proposal

    def observe(self, state: EagleState, outcome: Outcome) -> EagleState:
        state.text.extend(outcome.tokens)
        self._feed(state, outcome.tokens)
        return state

    def warmup(self) -> None:
        self._backend.warmup()

    def sessions(self, state: EagleState) -> Sequence[Session]:
        # A text that is longer than the head's context is never drafted for.
        return (state.session,) if 0 < len(state.session.tokens) <= state.session.context else ()

    def bytes_for(self, length: int) -> int:
        return self._backend.bytes_for(min(length, self._backend.capabilities.context))


def _rows_of(own_NH: Tensor, parents: Sequence[int]) -> Tensor:
    """The own features of each new node's parent. A chain's is a slice: nothing goes to the device for it."""
    first = parents[0] + 1
    if list(parents) == list(range(parents[0], parents[0] + len(parents))):
        return own_NH[first : first + len(parents)]
    return own_NH[to_device([parent + 1 for parent in parents], own_NH.device)]


@torch.inference_mode()
def agreement(head: EagleModel, target: Any, tokens: Sequence[int]) -> dict[str, Tensor]:
    """For each convention that the target has the states for, where the head's first choice is the target's own.

    Bool `[len(tokens) - 1]` each: at position i, the head's choice from the states of tokens 0..i and tokens 0..i+1
    beside the target's after token i + 1. One forward of the target, one of the head for each convention.
    """
    device = target.get_input_embeddings().weight.device
    ids = torch.tensor([list(tokens)], device=device)
    out = target(input_ids=ids, use_cache=False, output_hidden_states=True)
    wanted = out.logits[0, 1:].argmax(-1)
    count = len(tokens) - 1
    causal = torch.ones(count, count, dtype=torch.bool, device=device).tril()[None, None]
    found: dict[str, Tensor] = {}
    for convention in CONVENTIONS:
        indices = head.config.hidden_by(convention)
        if max(indices) >= len(out.hidden_states):
            continue
        features = head.fuse(torch.cat([out.hidden_states[i][:, :-1] for i in indices], -1))
        rows = head(
            input_ids=ids[:, 1:],
            features=features,
            position_ids=torch.arange(count, device=device)[None],
            attention_mask=causal,
        )
        found[convention] = head.draft_ids[rows.logits[0].argmax(-1)] == wanted
    return found


def warn_if_misread(head: EagleModel, target: Any, tokenizer: Any) -> dict[str, float]:
    """Try the conventions on a short text; a warning with the numbers when another one is clearly better.

    Returns the share of positions with the target's own choice, by convention.
    """
    text = "\n".join(prompt.text for prompt in read_prompts(limit=4))
    tokens = [token for token in tokenizer(text)["input_ids"] if token < head.embed_tokens.weight.shape[0]]
    tokens = tokens[: min(_TRIED, head.config.max_position_embeddings)]
    if len(tokens) < 2:
        return {}
    found = agreement(head, target, tokens)
    shares = {convention: same.double().mean().item() for convention, same in found.items()}
    mine = head.config.hidden_convention
    for other in shares.keys() - {mine}:
        differing = int((found[other] != found[mine]).sum()) if mine in found else 0
        gained = round((shares[other] - shares.get(mine, 0.0)) * len(found[other]))
        if gained > _CLEARLY * max(1.0, differing) ** 0.5:
            warnings.warn(
                f"the EAGLE head seems to mean other hidden states than hidden_convention={mine!r} reads: its first "
                f"choice is the target's at {shares.get(mine, 0.0):.0%} of {len(found[other])} positions, and at "
                f"{shares[other]:.0%} with {other!r}. Texts stay exact; for more speed pass "
                f"hidden_convention={other!r}",
                UserWarning,
                stacklevel=2,
            )
    return shares
