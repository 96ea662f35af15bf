"""A smaller causal language model drafts.

Shape suffix: R draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, ModelRunner, Outcome, Request
from specdec.errors import InputError
from specdec.growth import Grown, grow
from specdec.loading import load_model
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.choose import open_draft_backend
from specdec.runtime.session import Session, Steps
from specdec.tree import TokenTree
from specdec.vocabulary import (
    DraftVocabulary,
    always_included,
    count_tokens,
    cut_head,
    most_frequent,
    output_device,
    output_size,
)

Vocabulary = DraftVocabulary | Tensor | Sequence[int] | str | Path


@dataclass(eq=False)
class ModelState:
    request: Request
    session: Session
    grown: Grown | None = None  # what was proposed last


class ModelDrafter(ModelRunner):
    """Drafts a chain, or a tree level by level, with any causal LM that shares the target's tokenizer.

    At temperature 0 children are the top tokens; above it they are drawn as the verifier wants: by the shared race,
    sampled without replacement, or the top ones. The draft's cache follows the text by itself: what was accepted but
    never computed (the last token after full acceptance) is computed by the next round's first forward.

    `vocabulary`: the only tokens that are drafted, as a `DraftVocabulary`, ids (int64), or a file of `specdec vocab`;
    end-of-text is always among them. The output head is cut to their rows on a shallow copy of the model, which makes
    a step cheaper by what the other rows cost; a target token outside it is always a rejection. (FR-Spec: Zhao et al.,
    arXiv 2502.14856.) By name also `vocabulary=N`, the most frequent tokens of the text `vocabulary_data=FILE`.

    Lossless: yes, with every lossless verifier. (Leviathan et al., arXiv 2211.17192.)
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True
    quantizes = True
    memory = Memory.PATH
    _ids_R: Tensor | None = None  # of a draft vocabulary

    def __init__(
        self,
        model: Any,
        backend: str | None = None,
        vocabulary: Vocabulary | None = None,
        kv_cache: str | None = None,
    ):
        self.model = model
        self._vocab_size = output_size(model)
        self.vocabulary = None if vocabulary is None else _resolved(vocabulary).including(always_included(None, model))
        runs, self._ids_R = model, None
        if self.vocabulary is not None:
            self.vocabulary.check(self._vocab_size, "the draft model")
            runs = cut_head(model, self.vocabulary.ids_R)
            self._ids_R = self.vocabulary.ids_R.to(output_device(runs))
        self._backend = open_draft_backend(runs, backend, kv_cache)

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        if context.source is None:
            raise InputError(
                "the model drafter needs weights: pass a folder or hub id, as in drafter='org/small-model'"
            )
        model = load_model(
            context.source,
            device=context.device,
            dtype=context.dtype,
            quantize=context.quantize,
            trust_remote_code=context.trust_remote_code,
        )
        vocabulary, data = options.pop("vocabulary", None), options.pop("vocabulary_data", None)
        if vocabulary is not None:
            vocabulary = _built(vocabulary, data, context)
        elif data is not None:
            raise InputError("vocabulary_data is what a number of tokens is chosen from: give vocabulary=N too")
        inherited = {"backend": context.backend, "kv_cache": context.kv_cache}
        return cls(model, **{**inherited, "vocabulary": vocabulary, **options})

    @property
    def name(self) -> str:
        return "model"

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Padded ids that only the target has stand as token 0 in the draft's cache: it costs acceptance at most."""
        return [token if token < self._vocab_size else 0 for token in tokens]

    def start(self, request: Request) -> ModelState:
        if self.vocabulary is not None:
            self.vocabulary.check(request.vocab_size, "the target")
        session = Session(self._backend.fork(0))
        session.append(self._known(request.prompt))
        return ModelState(request, session)

    def proposing(self, state: ModelState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        session = state.session
        session.drop_tree()
        plan = plan.limited(session.context - len(session.tokens) + 1)

        def expand(ran: TokenTree) -> Steps[Tensor]:
            return (yield from session.forwarding(ran)).logits

        state.grown = yield from grow(expand, plan, state.request, session.tokens, chance, self._ids_R, session)
        return state.grown.proposal

    def observe(self, state: ModelState, outcome: Outcome) -> ModelState:
        path = state.grown.ran_path(outcome.path) if state.grown is not None else []
        state.session.commit(path, self._known(outcome.tokens))
        return state

    def warmup(self) -> None:
        self._backend.warmup()

    def sessions(self, state: ModelState) -> Sequence[Session]:
        # A text that is longer than the draft's context is never drafted for.
        return (state.session,) if len(state.session.tokens) <= state.session.context else ()

    def bytes_for(self, length: int) -> int:
        return self._backend.bytes_for(min(length, self._backend.capabilities.context))


def _resolved(vocabulary: Vocabulary) -> DraftVocabulary:
    if isinstance(vocabulary, DraftVocabulary):
        return vocabulary
    if isinstance(vocabulary, (str, Path)):
        return DraftVocabulary.load(vocabulary)
    if isinstance(vocabulary, int):
        raise InputError(
            f"vocabulary={vocabulary}: the {vocabulary} most frequent tokens of which text? Pass vocabulary_data=FILE "
            "with the drafter's name, or a file made by specdec vocab"
        )
    return DraftVocabulary.of(vocabulary)


def _built(vocabulary: Any, data: Any, context: BuildContext) -> DraftVocabulary:
    """A vocabulary that the user named, with the special tokens of the tokenizer; checked against the target."""
    always = always_included(context.tokenizer, context.target)
    if isinstance(vocabulary, int) and data is not None:
        from specdec.train.data import encode, read_texts  # seldom needed, and slow to import

        size = output_size(context.target)
        counts_V = count_tokens(encode(read_texts(Path(data)), context.tokenizer), size)
        return most_frequent(counts_V, vocabulary, always)
    found = _resolved(vocabulary).including(always)
    found.check(output_size(context.target), "the target")
    return found
