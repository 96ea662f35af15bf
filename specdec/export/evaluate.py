"""Does an artefact say what its model says? Full precision, the rounded model in torch, and the artefact, on one text.

All three run behind the ordinary session, so that any backend can be judged: rows as wide as a verification, and texts
as decoding makes them. The text is none that a recipe's method has looked at.

Shape suffixes: R rows of text, T tokens, V vocabulary, W width of hidden states, B rows of calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.api import SpeculativeDecoder
from specdec.errors import InputError
from specdec.export import artifact_texts
from specdec.export.artifact import CALIBRATION, ArtifactModel, model_hash
from specdec.export.artifact_texts import Identity, Text
from specdec.export.distance import LOGITS, Distance
from specdec.export.exporter import exporter
from specdec.export.options import Method
from specdec.policy import Fixed
from specdec.runtime.backend import Backend
from specdec.runtime.session import Session
from specdec.train import stdlib
from specdec.train.data import encode, pack, read_texts
from specdec.tree import TokenTree

FULL, ROUNDED, ARTIFACT = "full precision", "rounded, in torch", "artefact"
# So many tokens in a row that also stand in the calibration text are no chance.
_RUN = 32
# Rows of steps where a graph takes any number of them.
_ANY = (1, 8)

#: Told of steps done, steps in all, and what is at hand.
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Graph:
    """A graph of an artefact against its narrowest one, on the same text: nothing should depend on the width."""

    name: str
    distance: Distance


@dataclass
class Evaluation:
    """What `evaluate` found. `reference`: the phase that the artefact should be equal to."""

    phases: tuple[str, ...]
    reference: str
    tokens: int
    loss: dict[str, float]
    to_full: dict[str, Distance]
    to_reference: Distance
    graphs: list[Graph]
    texts: dict[str, list[Text]]
    identity: Identity
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """JSON."""
        return {
            "phases": list(self.phases),
            "reference": self.reference,
            "tokens": self.tokens,
            "loss": self.loss,
            "to_full": {name: found.as_dict() for name, found in self.to_full.items()},
            "to_reference": self.to_reference.as_dict(),
            "graphs": [{"name": one.name, **one.distance.as_dict()} for one in self.graphs],
            "texts": {name: [asdict(text) for text in texts] for name, texts in self.texts.items()},
            "identity": asdict(self.identity),
            "notes": self.notes,
        }


def outputs(backend: Backend, tokens: Sequence[int], width: int, hidden: Sequence[int] = ()) -> dict[str, Tensor]:
    """Logits `[T, V]` after each token, and the hidden states by name, computed as verification does: `width` rows a
    step, the last step as many as are left."""
    session = Session(backend.fork(0), hidden, keeps=False)
    logits, states = [], []
    for start in range(0, len(tokens), width):
        root, *drafted = tokens[start : start + width]
        session.append([root])
        rows = session.forward(TokenTree.chain(drafted))
        session.commit(range(len(drafted)), drafted)
        logits.append(rows.logits.cpu())
        if rows.hidden is not None:
            states.append(rows.hidden.cpu())
    found = {LOGITS: torch.cat(logits)}
    if states:
        parts = torch.cat(states).chunk(len(hidden), -1)
        found |= {f"hidden state {index}": part for index, part in zip(hidden, parts, strict=True)}
    return found


def check_origin(artifact: ArtifactModel, target: Any) -> None:
    """Raise `InputError` unless this model in full precision is the one that was exported."""
    said, found = artifact.manifest.model["sha256"], model_hash(target)
    if said != found:
        raise InputError(
            f"{artifact.folder} was exported from another model ({said[:12]}…, not {found[:12]}…): give the original, "
            "--target ORIGINAL, in the dtype that it was exported from"
        )


def calibration_of(artifact: ArtifactModel) -> Tensor | None:
    """Tokens int64 `[B, T]` that the artefact's recipe looked at; None for a recipe that needed none."""
    if CALIBRATION not in artifact.manifest.files:
        return None
    tokens: Tensor = load_file(artifact.folder / CALIBRATION)["tokens"]
    return tokens.long()


def rounded_again(artifact: ArtifactModel, target: Any) -> tuple[Any, list[str]]:
    """The model as the artefact's recipe rounds it, in torch, and what is to be said of it. None: only graphs round it,
    or nothing does."""
    manifest = artifact.manifest
    if manifest.options.recipe is None:
        return None, []
    stored = exporter(manifest.backend).store(target, manifest.options, calibration_of(artifact))
    if stored is None or stored.model is target:
        return None, [
            f"{manifest.backend} rounds in the graphs alone: there is no rounded model in torch to compare with"
        ]
    said, found = manifest.model["stored"]["sha256"], stored.facts["sha256"]
    if found == said:
        return stored.model, []
    return stored.model, [
        f"rounding the model again gives other weights here ({found[:12]}…, in the artefact {said[:12]}…): another "
        "machine or version made it; read the rounded phase as a neighbour"
    ]


def held_out_rows(text: Path | None, tokenizer: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """Rows int64 `[R, T]` of a text or JSONL file, in random order; of None, of files of the standard library that
    neither the embedded models nor the calibration text "stdlib" have seen. `InputError` without text for one row."""
    if text is None:
        texts = [document.text for document in stdlib.documents() if document.held_out]
    else:
        texts = read_texts(text)
    found = pack(encode(texts, tokenizer), length).tokens_RL
    if not len(found):
        raise InputError(f"the text is too short for one row of {length} tokens; give more of it, or a smaller length")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:rows]
    return torch.from_numpy(found).long()[order]


def apart(rows_RT: Tensor, calibration_BT: Tensor | None) -> Tensor:
    """The rows that have no run of 32 tokens in common with the calibration text. `InputError` when none is left."""
    if calibration_BT is None:
        return rows_RT
    seen = {bytes(run) for row in calibration_BT.int() for run in row.unfold(0, min(_RUN, len(row)), 1).numpy()}
    new = [
        not any(bytes(run) in seen for run in row.unfold(0, min(_RUN, len(row)), 1).numpy()) for row in rows_RT.int()
    ]
    if not any(new):
        raise InputError(
            "every row of the text also stands in the text that the recipe was calibrated on: figures on it would say "
            "nothing; give other text, --text FILE"
        )
    return rows_RT[torch.tensor(new)]


def evaluate(
    artifact: ArtifactModel,
    target: Any,
    rows_RT: Tensor,
    prompts: Sequence[Sequence[int]] = (),
    *,
    new_tokens: int = 48,
    told: Told = lambda done, of, what: None,
) -> Evaluation:
    """Judge an artefact by the model that it was exported from.

    `rows_RT`: int64 text that neither training nor calibration should have seen, T at most the artefact's context.
    `prompts`: of texts that are decoded, plain in every phase, and speculatively on the artefact with the model itself
    as the draft. Raises `InputError` for another model, and for text that the recipe was calibrated on.
    """
    check_origin(artifact, target)
    rounded, notes = rounded_again(artifact, target)
    kept_RT = apart(rows_RT, calibration_of(artifact))
    if len(kept_RT) < len(rows_RT):
        notes.append(f"{len(rows_RT) - len(kept_RT)} rows left out: they stand in the calibration text too")
    models = {FULL: target, ROUNDED: rounded, ARTIFACT: artifact}
    run = _Run(artifact, {name: model for name, model in models.items() if model is not None}, kept_RT, told)
    measured = run.measure(len(prompts))
    texts = artifact_texts.greedy(run.decoders, prompts, new_tokens, run.tell)
    rounds = artifact.manifest.options.recipe is not None
    identity = artifact_texts.speculative(run.decoders[ARTIFACT], run.k, prompts, new_tokens, run.tell, rounds=rounds)
    return Evaluation(**measured, texts=texts, identity=identity, notes=notes)


class _Run:
    """One evaluation: what decodes, on what, and how far it is. The full-precision model drafts for the artefact."""

    def __init__(self, artifact: ArtifactModel, models: dict[str, Any], rows_RT: Tensor, told: Told):
        options = artifact.manifest.options
        self.rows_RT, self.hidden = rows_RT, options.hidden
        self.graphs = sorted((m for m in options.methods if not m.one_logit), key=lambda method: method.width)
        if self.graphs[0].width > 1:  # one graph for steps of any width
            self.graphs = [Method(f"{self.graphs[0].name} of {width} rows", width) for width in _ANY]
        self.prefill = [method for method in options.methods if method.one_logit]
        self.k = self.graphs[-1].width - 1
        self.reference = ROUNDED if ROUNDED in models else FULL
        own: dict[str, Any] = {"drafter": models[FULL], "policy": Fixed(self.k)} if self.k else {}
        self.decoders = {
            name: SpeculativeDecoder(model, **(own if name == ARTIFACT else {"backend": "eager"}))
            for name, model in models.items()
        }
        for decoder in self.decoders.values():
            decoder.backend.expose(self.hidden)
        self._told, self._done, self._steps = told, 0, 0

    def tell(self, what: str) -> None:
        self._told(self._done, self._steps, what)
        self._done += 1

    @torch.inference_mode()
    def measure(self, num_prompts: int) -> dict[str, Any]:
        """All figures of the text. `num_prompts`: that will be decoded after it."""
        beside = max(len(self.graphs) - 1, len(self.prefill))  # of rows that other graphs compute again
        texts = num_prompts * (len(self.decoders) + (2 if self.k else 0))
        self._steps = len(self.rows_RT) * (len(self.decoders) + beside) + texts
        loss = dict.fromkeys(self.decoders, 0.0)
        to_full = {name: Distance() for name in self.decoders if name != FULL}
        to_reference, graphs = Distance(), {m.name: Distance() for m in (*self.graphs[1:], *self.prefill)}
        for row_T in self.rows_RT:
            found = {name: self._outputs(name, row_T) for name in self.decoders}
            for name, given in found.items():
                chances_TV = given[LOGITS][:-1].double().log_softmax(-1)
                loss[name] -= float(chances_TV.gather(1, row_T[1:, None]).sum())
                if name != FULL:
                    to_full[name].add(found[FULL], given)
            to_reference.add(found[self.reference], found[ARTIFACT])
            if graphs:
                self._compare(row_T, found[ARTIFACT], graphs)
        judged = self.rows_RT.shape[0] * (self.rows_RT.shape[1] - 1)
        return {
            "phases": tuple(self.decoders),
            "reference": self.reference,
            "tokens": judged,
            "loss": {name: value / judged for name, value in loss.items()},
            "to_full": {name: distance.done() for name, distance in to_full.items()},
            "to_reference": to_reference.done(),
            "graphs": [Graph(name, distance.done()) for name, distance in graphs.items() if distance.tokens],
        }

    def _outputs(self, name: str, row_T: Tensor) -> dict[str, Tensor]:
        self.tell(name)
        width = self.graphs[-1].width if name == ARTIFACT else len(row_T)
        return outputs(self.decoders[name].backend, row_T.tolist(), width, self.hidden)

    def _compare(self, row_T: Tensor, widest: dict[str, Tensor], graphs: dict[str, Distance]) -> None:
        backend, tokens = self.decoders[ARTIFACT].backend, row_T.tolist()
        self.tell(f"{self.graphs[0].name} by itself")
        alone_TV = outputs(backend, tokens, self.graphs[0].width)[LOGITS]
        for method in self.graphs[1:]:
            given_TV = widest[LOGITS]
            if method is not self.graphs[-1]:
                self.tell(f"{method.name} by itself")
                given_TV = outputs(backend, tokens, method.width)[LOGITS]
            whole = len(tokens) - len(tokens) % method.width  # what is left over goes through a narrower graph
            if whole:
                graphs[method.name].add({LOGITS: alone_TV[:whole]}, {LOGITS: given_TV[:whole]})
        for method in self.prefill:
            session = Session(backend.fork(0))
            session.append(tokens)
            session.prefill()
            graphs[method.name].add({LOGITS: alone_TV[-1:]}, {LOGITS: session.forward().logits[-1:]})
