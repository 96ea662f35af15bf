"""A draft vocabulary: the tokens that a drafter's output head predicts, so that it need not predict all of them.

Shape suffixes: R draft vocabulary, V the target's, H hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.dtypes import dtype_name
from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.linear import PackedLinear

#: What the tensor in a file is called: the target's id of each column, absolute (EAGLE's `d2t` holds offsets).
TENSOR = "d2t_absolute"
_LARGEST = 1 << 24


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """`ids_R`: the target's ids, int64, rising. `about`: how it was made, kept in the file's metadata."""

    ids_R: Tensor
    about: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(ids: Tensor | Iterable[int], about: Mapping[str, str] | None = None) -> DraftVocabulary:
        """Of ids in any order; ids that stand there twice count once. `InputError` for none, or negative ones."""
        given = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
        if given.ndim != 1 or given.dtype.is_floating_point or given.dtype == torch.bool or not len(given):
            raise InputError(
                f"a draft vocabulary is one row of token ids, not {dtype_name(given.dtype)} {list(given.shape)}"
            )
        ids_R = given.to("cpu", torch.int64).unique()
        if int(ids_R[0]) < 0:
            raise InputError(f"a draft vocabulary holds token ids, and {int(ids_R[0])} is none")
        return DraftVocabulary(ids_R, dict(about or {}))

    def __len__(self) -> int:
        return len(self.ids_R)

    def including(self, ids: Iterable[int]) -> DraftVocabulary:
        extra = torch.tensor(sorted(set(ids)), dtype=torch.int64)
        return DraftVocabulary.of(torch.cat((self.ids_R, extra)), self.about)

    def check(self, vocab_size: int, whose: str) -> None:
        """Raise `InputError` for ids that a vocabulary of this size does not have."""
        if int(self.ids_R[-1]) >= vocab_size:
            raise InputError(
                f"the draft vocabulary has the token {int(self.ids_R[-1])}, and {whose} has {vocab_size} tokens: it "
                "was made for another tokenizer; make one with specdec vocab --target"
            )

    def coverage(self, counts_V: Tensor) -> float:
        """The share of counted tokens that it holds."""
        inside = self.ids_R[self.ids_R < len(counts_V)]
        return float(counts_V[inside].sum() / counts_V.sum().clamp_min(1))

    def save(self, path: str | Path) -> None:
        save_file({TENSOR: self.ids_R.contiguous()}, str(path), metadata=dict(self.about))

    @staticmethod
    def load(path: str | Path) -> DraftVocabulary:
        """Read what `save` wrote. `InputError` for a file that holds something else."""
        try:
            with safe_open(str(path), "pt") as file:
                if TENSOR not in file.keys():  # noqa: SIM118 - not a mapping
                    raise InputError(f"{path} has no tensor {TENSOR!r}: make one with specdec vocab")
                shape = file.get_slice(TENSOR).get_shape()
                if len(shape) != 1 or not 0 < shape[0] <= _LARGEST:
                    raise InputError(f"{path}: {TENSOR} has shape {list(shape)}, and should be one row of token ids")
                return DraftVocabulary.of(file.get_tensor(TENSOR), file.metadata())
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read a draft vocabulary from {path}: {str(error).splitlines()[0]}") from error


def count_tokens(rows: Iterable[Sequence[int]], vocab_size: int) -> Tensor:
    """How often each token stands in rows of ids; int64 `[V]`."""
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        counts_V += torch.bincount(torch.as_tensor(row, dtype=torch.int64), minlength=vocab_size)[:vocab_size]
    return counts_V


def most_frequent(counts_V: Tensor, size: int, always: Iterable[int] = ()) -> DraftVocabulary:
    """`always`, and the most frequent others up to `size` tokens in all; of equally frequent ones the lower ids.

    (FR-Spec: Zhao et al., arXiv 2502.14856.) Digits and punctuation are kept by their frequency, as words are.
    """
    kept = sorted({token for token in always if 0 <= token < len(counts_V)})
    if not len(kept) < size <= len(counts_V):
        raise InputError(
            f"a draft vocabulary of {size} tokens: give a number above {len(kept)}, the special tokens that are always "
            f"in, and at most {len(counts_V)}, all tokens"
        )
    ranked = counts_V.clone()
    ranked[kept] = ranked.max() + 1
    return DraftVocabulary.of(ranked.sort(descending=True, stable=True).indices[:size])


def always_included(tokenizer: Any = None, *models: Any) -> set[int]:
    """End-of-text ids of the models, and all special tokens of the tokenizer."""
    ids = set(getattr(tokenizer, "all_special_ids", ()) or ())
    for model in models:
        for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            end = getattr(config, "eos_token_id", None)
            ids |= set(end) if isinstance(end, (list, tuple)) else {end} - {None}
    return {int(token) for token in ids if token is not None}


def output_size(model: Any) -> int:
    """Rows of a causal LM's output head: the tokens that it knows, paddings included."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(head.out_features if weight is None else weight.shape[0])


def output_weight(model: Any) -> nn.Parameter:
    """The head's weights `[V, H]`; of a head that stores them in fewer bits a copy, in the embedding's dtype."""
    head = model.get_output_embeddings()
    if not isinstance(head, PackedLinear):
        weight: nn.Parameter = head.weight
        return weight
    return nn.Parameter(head.weight_in(model.get_input_embeddings().weight.dtype), requires_grad=False)


def output_device(model: Any) -> torch.device:
    """Where the head's logits come from."""
    head = model.get_output_embeddings()
    tensor: Tensor = next(chain(head.parameters(), head.buffers()))
    return tensor.device


def cut_head(model: Any, rows_R: Tensor) -> Any:
    """A shallow copy of a causal LM whose logits are those of `rows_R` alone, in that order: `[..., R]`.

    Shares every tensor with the model but the head's rows, which are copied; input embeddings stay whole, also where
    the head was tied to them. The model itself is not changed. `UnsupportedModelError` where the head is no linear
    layer, plain or with stored weights.
    """
    head = model.get_output_embeddings()
    if isinstance(head, PackedLinear):
        twin = _shared(model)
        twin.set_output_embeddings(head.rows(rows_R))
        return twin
    if type(head) is not nn.Linear:
        kind = "none" if head is None else type(head).__name__
        raise UnsupportedModelError(
            f"{type(model).__name__} has an output head ({kind}) that cannot be cut to a draft vocabulary; leave "
            "vocabulary out"
        )
    twin = _shared(model)
    rows = rows_R.to(head.weight.device)
    narrow = nn.Linear(head.in_features, len(rows), bias=head.bias is not None, device="meta")
    narrow.weight = nn.Parameter(head.weight.detach()[rows].clone(), requires_grad=False)
    if head.bias is not None:
        narrow.bias = nn.Parameter(head.bias.detach()[rows].clone(), requires_grad=False)
    twin.set_output_embeddings(narrow)
    return twin


def _shared(model: Any) -> Any:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}).eval()
