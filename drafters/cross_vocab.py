"""A causal language model with another tokenizer drafts.

Shape suffix: R tokens that both vocabularies have.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, ModelRunner, Outcome, Request
from specdec.errors import IncompatiblePairError, InputError
from specdec.growth import Grown, grow
from specdec.history import History
from specdec.loading import load_model, load_tokenizer
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.choose import open_draft_backend
from specdec.runtime.session import Session, Steps
from specdec.sampling import Sampling
from specdec.spelling import Spelling
from specdec.translation import Translation, probe_texts
from specdec.tree import TokenTree
from specdec.vocabulary import cut_head, output_device, output_size

METHODS = ("tli", "retokenise")
# Below this share of the target's text in common tokens, drafting in common tokens ends too often.
MIN_COVERAGE = 0.8
# Committed tokens that are tokenised again with what follows them: tokens further back do not change any more.
WINDOW = 8


class CrossVocabDrafter(ModelRunner):
    """Drafts with any causal LM whose tokenizer differs from the target's, by one of two methods.

    `tli`, token-level intersection: the draft's distribution is restricted to the tokens that both have, which are
    those that stand for the same bytes; its head is cut to them on a shallow copy. Chains and trees, every draw.
    `retokenise`: the draft writes text, which is tokenised again for the target. Chains, point masses.
    Without a `method`, `tli` where at least 80 % of the target's tokens of a probe text are common ones, else
    `retokenise`; the drafter's name tells which. (Timor et al., arXiv 2502.05202.)

    By name it takes `draft=` (a folder, a hub id, or a loaded model with `draft_tokenizer=`), `method=` and
    `probe=FILE`. The draft model itself is never changed.

    Lossless: yes, with every lossless verifier.
    """

    quantizes = True
    method: ClassVar[str]  # one of METHODS

    def __init__(self, model: Any, translation: Translation, backend: str | None = None, kv_cache: str | None = None):
        self.model, self.translation = model, translation
        self._backend = open_draft_backend(self._runs(model), backend, kv_cache)

    def _runs(self, model: Any) -> Any:
        """The model whose steps are taken."""
        return model

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        draft, method = options.pop("draft", None), options.pop("method", None)
        tokenizer, probe = options.pop("draft_tokenizer", None), options.pop("probe", None)
        if draft is None:
            raise InputError(
                "cross_vocab needs a draft model: drafter_options={'draft': 'org/model'}, on the command line "
                "--drafter-option draft=org/model"
            )
        if method not in (None, *METHODS):
            raise InputError(f"method is one of {METHODS}, or left out to let the tokenizers decide, not {method!r}")
        if not isinstance(draft, torch.nn.Module):
            trusted = context.trust_remote_code
            tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(draft), trusted)
            draft = load_model(
                str(draft),
                device=context.device,
                dtype=context.dtype,
                quantize=context.quantize,
                trust_remote_code=trusted,
            )
        elif context.quantize is not None:
            raise InputError("draft= is a model that is loaded already: load it with quantization_config=, or name it")
        translation = Translation(context.tokenizer, tokenizer)
        texts = probe_texts(probe)
        if method is None:
            method = "tli" if translation.coverage(texts) >= MIN_COVERAGE else "retokenise"
        options = {"backend": context.backend, "kv_cache": context.kv_cache, **options}
        if method == "tli":
            return CommonTokens(draft, translation, **options)
        return Retokenised(draft, translation, ratio=translation.ratio(texts), **options)

    @property
    def name(self) -> str:
        return f"cross_vocab:{self.method}"

    def warmup(self) -> None:
        self._backend.warmup()

    def sessions(self, state: Any) -> Sequence[Session]:
        # A text that is longer than the draft's context is never drafted for.
        return (state.session,) if len(state.session.tokens) <= state.session.context else ()

    def bytes_for(self, length: int) -> int:
        return self._backend.bytes_for(min(length, self._backend.capabilities.context))

    @abstractmethod
    def proposing(self, state: Any, plan: Plan, chance: Chance) -> Steps[Proposal]: ...


@dataclass(eq=False)
class CommonState:
    request: Request
    session: Session  # of the draft, in its tokens
    text: History  # in the target's
    grown: Grown | None = None


class CommonTokens(CrossVocabDrafter):
    """Token-level intersection. The prompt is tokenised by the draft's tokenizer, what follows token by token.

    Lossless: yes, with every lossless verifier: q is the draft's own, restricted to common tokens and normalised.
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    memory = Memory.PATH
    method = "tli"

    def _runs(self, model: Any) -> Any:
        same, most = self.translation.same, output_size(model)
        tokenizer = self.translation.target.tokenizer
        never = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}  # a text does not begin twice
        common = sorted((mine, theirs) for mine, theirs in same.items() if theirs < most and mine not in never)
        if not common:
            raise IncompatiblePairError("no token of the draft stands for the same text as one of the target's")
        ids = torch.tensor(common, dtype=torch.int64)
        twin = cut_head(model, ids[:, 1])
        device = output_device(twin)
        self._ids_R = ids[:, 0].to(device)
        self._draft_of = torch.zeros(int(ids[-1, 0]) + 1, dtype=torch.int64, device=device)
        self._draft_of[self._ids_R] = ids[:, 1].to(device)
        return twin

    def start(self, request: Request) -> CommonState:
        if int(self._ids_R[-1]) >= request.vocab_size:
            raise IncompatiblePairError("the target's tokenizer has tokens that the target does not have")
        session = Session(self._backend.fork(0))
        session.append(self.translation.prompt(request.prompt))
        return CommonState(request, session, History(request.prompt))

    def proposing(self, state: CommonState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        session = state.session
        session.drop_tree()
        plan = plan.limited(session.context - len(session.tokens) + 1)

        def expand(ran: TokenTree) -> Steps[Tensor]:
            # Where processors leave no common token, one that the draft lacks may be drawn: it stands as another.
            tokens = self._draft_of[ran.tokens.clamp_max(len(self._draft_of) - 1)]
            return (yield from session.forwarding(TokenTree(tokens, ran.parents))).logits

        state.grown = yield from grow(expand, plan, state.request, state.text, chance, self._ids_R)
        return state.grown.proposal

    def observe(self, state: CommonState, outcome: Outcome) -> CommonState:
        path = state.grown.ran_path(outcome.path) if state.grown is not None else []
        drafted, rest = outcome.tokens[: outcome.num_accepted], outcome.tokens[outcome.num_accepted :]
        tokens = [int(self._draft_of[min(token, len(self._draft_of) - 1)]) for token in drafted]
        tokens += [theirs for token in rest for theirs in self.translation.in_draft(token)]
        state.session.commit(path, tokens)
        state.text.extend(outcome.tokens)
        return state


@dataclass(eq=False)
class TextState:
    request: Request
    session: Session
    text: list[int]
    grown: Grown | None = None
    drafted: list[int] = field(default_factory=list)  # of the draft, behind its session's tokens


class Retokenised(CrossVocabDrafter):
    """The draft writes; its text is tokenised again together with the last committed tokens.

    Only tokens that begin where the committed ones end are proposed, so committed ones never change; the last one is
    left out while more text could make it a longer token. `ratio`: the draft's tokens for one of the target.
    The draft's cache keeps the draft's own tokens up to the first that the text made different.

    One transfer from the device per round reads what was drafted. Lossless: yes, with every lossless verifier: the
    proposal is a point mass.
    """

    draws = frozenset({Draw.POINT})
    method = "retokenise"

    def __init__(
        self,
        model: Any,
        translation: Translation,
        backend: str | None = None,
        kv_cache: str | None = None,
        ratio: float = 1.0,
    ):
        super().__init__(model, translation, backend, kv_cache)
        if not 0 < ratio < math.inf:
            raise InputError(f"ratio is how many tokens of the draft stand for one of the target, not {ratio}")
        self.ratio = ratio

    def start(self, request: Request) -> TextState:
        session = Session(self._backend.fork(0))
        session.append(self.translation.prompt(request.prompt))
        own = replace(request, sampling=Sampling(), draw=Draw.POINT, vocab_size=self._backend.capabilities.vocab_size)
        return TextState(own, session, list(request.prompt))

    def proposing(self, state: TextState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        session = state.session
        session.drop_tree()
        room = session.context - len(session.tokens) + 1
        # One more than asked for, so that the last token of the target that is asked for is known to end.
        asked = Plan(math.ceil(plan.depth * self.ratio) + 1, stop_below=plan.stop_below).limited(room)

        def expand(ran: TokenTree) -> Steps[Tensor]:
            return (yield from session.forwarding(ran)).logits

        state.grown = yield from grow(expand, asked, state.request, session.tokens, chance)
        state.drafted = state.grown.proposal.tree.tokens.tolist()
        return Proposal.point(TokenTree.chain(self._in_target(state.text, state.drafted)[: plan.depth]))

    def _in_target(self, text: Sequence[int], drafted: Sequence[int]) -> list[int]:
        target, draft = self.translation.target, self.translation.draft
        end = next((i for i, token in enumerate(drafted) if draft.piece(token) is None), None)
        written = draft.joined(drafted[:end])
        tokens = self._continuation(_window(target, text), written)
        ends = end is not None and drafted[end] == draft.tokenizer.eos_token_id
        if len(tokens) > 1 and not ends and target.may_grow(tokens[-1]):
            tokens.pop()
        if ends and target.tokenizer.eos_token_id is not None and target.joined(tokens) == written:
            tokens.append(target.tokenizer.eos_token_id)
        return tokens

    def _continuation(self, window: Sequence[int], written: bytes) -> list[int]:
        """The target's tokens for what was written, as they are behind the window."""
        target = self.translation.target
        before = target.joined(window)
        tokens, length = target.tokenise(before + written) or [], 0
        for at, token in enumerate(tokens):
            if length == len(before):
                return tokens[at:]
            length += len(target.piece(token) or b"")
        # A token of this text would reach across the end of the committed ones; the target chose otherwise.
        return target.tokenise(written) or []

    def observe(self, state: TextState, outcome: Outcome) -> TextState:
        session, drafted = state.session, state.drafted
        committed = session.tokens
        state.text += outcome.tokens
        keep, tail = self._in_draft(committed, outcome.tokens)
        known = [*committed[keep:], *drafted]
        common = 0
        while common < min(len(known), len(tail)) and known[common] == tail[common]:
            common += 1
        accepted = keep + common - len(committed)
        if accepted >= 0:
            path = state.grown.ran_path(range(accepted)) if state.grown is not None and accepted else []
            session.commit(path, tail[len(committed) - keep :])
        else:
            session.rewind(keep + common)
            session.append(tail[common:])
        state.drafted, state.grown = [], None
        return state

    def _in_draft(self, committed: Sequence[int], tokens: Sequence[int]) -> tuple[int, list[int]]:
        """How many of the draft's committed tokens stay for certain, and all that come behind them."""
        target, window = self.translation.target, _window(self.translation.draft, committed)
        keep = len(committed) - len(window)
        tail: list[int] = []
        run: list[int] = []
        for token in (*tokens, None):
            if token is not None and target.piece(token) is not None:
                run.append(token)
                continue
            tail += self._written(window, target.joined(run))
            window, run = [], []
            if token is not None:
                tail += self.translation.in_draft(token)
        return keep, tail

    def _written(self, window: list[int], data: bytes) -> list[int]:
        draft = self.translation.draft
        together = draft.tokenise(draft.joined(window) + data)
        return together if together is not None else [*window, *(draft.spell(data) or ())]


def _window(spelling: Spelling, tokens: Sequence[int]) -> list[int]:
    """The last tokens of a text, from the beginning of a character on, and none from before a special token."""
    window = list(tokens[-WINDOW:])
    for at in reversed(range(len(window))):
        if spelling.piece(window[at]) is None:
            window = window[at + 1 :]
            break
    while window and (spelling.piece(window[0]) or b" ")[0] & 0xC0 == 0x80:
        window = window[1:]
    return window
