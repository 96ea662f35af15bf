"""`specdec train eagle`: a head that drafts from the target's own hidden states (EAGLE-3, arXiv 2503.01840).

Step j from start t (see `specdec.train.unroll`) predicts token t+2+j, which the target's logits at t+1+j are the truth
of.

Shape suffixes: B rows, L tokens of a row, S starts of a row, V vocabulary, R draft vocabulary, H hidden width,
N starts that count, K steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.formats import eagle as files
from specdec.loading import EMBEDDED, load_model
from specdec.models.eagle import EagleConfig, EagleModel
from specdec.models.eagle_build import bind, default_layer_ids, own_tensors
from specdec.train import provenance
from specdec.train.losses import LOSSES, check_loss, divergence, in_pieces, overlap
from specdec.train.objective import Batch, Losses, Objective
from specdec.train.unroll import unroll, unrolling
from specdec.vocabulary import output_size, output_weight

_DECAY = 0.8  # of a step's weight against the one before
# EAGLE-1: the weight of cross-entropy beside that of the regression, and the width of the features' noise.
_CE_WEIGHT, _NOISE = 0.1, 0.2
_HEAD = 64


def frequent_ids(rows: np.ndarray, vocab_size: int, count: int, always: set[int]) -> Tensor:
    """The `count` most frequent tokens of the rows, `always` among them, in rising order; int64 `[R]`."""
    seen = np.bincount(rows.reshape(-1), minlength=vocab_size)[:vocab_size].astype(np.float64)
    seen[sorted(i for i in always if 0 <= i < vocab_size)] = np.inf
    order = np.argsort(-seen, kind="stable")[:count]
    return torch.from_numpy(np.sort(order).astype(np.int64))


def new_config(target: Any, options: Mapping[str, Any]) -> EagleConfig:
    """A head's shape for this target: as wide, with as many key as query heads, since the drafted token's embedding
    reaches the layer by its values alone."""
    of_target = target.config.get_text_config(decoder=True)
    width, vocab = int(of_target.hidden_size), output_size(target)
    rows, table_width = target.get_input_embeddings().weight.shape
    if table_width != width:
        raise InputError(f"the target's embeddings are {table_width} wide and its layers {width}: not supported")
    version, num_layers = options["eagle"], int(of_target.num_hidden_layers)
    head_dim = _HEAD if width % _HEAD == 0 else width // int(of_target.num_attention_heads)
    heads = options["heads"] or width // head_dim
    if width % heads or (width // heads) % 2:
        raise InputError(f"--heads {heads} does not divide the target's width {width} into even parts")
    if options["draft_vocab"] is not None and not 1 < options["draft_vocab"] <= vocab:
        raise InputError(f"--draft-vocab is between 2 and the target's {vocab}, not {options['draft_vocab']}")
    ids = options["read"] or default_layer_ids(num_layers)
    if not all(0 <= i <= num_layers for i in ids):
        raise InputError(f"--read names hidden states 0 to {num_layers} of the target, not {list(ids)}")
    return EagleConfig(
        eagle_version=version,
        vocab_size=rows,
        draft_vocab_size=(options["draft_vocab"] or vocab) if version == 3 else vocab,
        hidden_size=width,
        target_hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        intermediate_size=options["intermediate"] or 4 * width,
        rms_norm_eps=1e-5,
        max_position_embeddings=of_target.max_position_embeddings,
        target_layer_ids=list(ids) if version == 3 else [num_layers],
        fc_norm=version == 3,
        norm_output=version == 3,
        own_head=version == 3 and options["head"] == "own",
        bos_token_id=None,
        eos_token_id=None,
    )


@torch.no_grad()
def new_head(config: EagleConfig, target: Any) -> EagleModel:
    """A head that begins as near to the target as it can: features from the highest state, the target's head."""
    config._attn_implementation = "sdpa"
    head: EagleModel = EagleModel(config).float()
    width, high = config.hidden_size, head.fc.weight[:, -config.hidden_size :]
    high += torch.eye(width)
    bind(head, target)
    if config.own_head:
        head.lm_head.weight.copy_(output_weight(target)[head.draft_ids].float())
    return head


class EagleObjective(Objective):
    """An EAGLE head: one decoder layer that reads the target's hidden states; the `eagle` drafter reads it."""

    kind = "eagle"
    layouts = ("speculators",)
    recommended: ClassVar[Mapping[str, Any]] = {
        "lr": 3e-3,
        "optimizer": "muon",
        "judged_at": 0,
        "precision": "auto",
        "minutes": 40.0,
    }

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        head: EagleModel,
        *,
        loss: str = "fkl",
        unroll: int = 4,
        k: int = 5,
        draft_vocab: int | None = None,
    ):
        super().__init__(target, tokenizer)
        if unroll < 1 or k < 1:
            raise InputError(f"--unroll and --k are numbers of steps >= 1, not {unroll} and {k}")
        self.head, self.unroll_steps, self.depth = head, unroll, k
        self.hidden = tuple(sorted(set(head.config.hidden)))
        self.loss_name = check_loss(loss)
        self.draft_vocab = draft_vocab
        self.trained: dict[str, nn.Parameter] = {}
        self._only_own()

    def _only_own(self) -> None:
        """Train what is the head's own, in float32; the tables of the target stay what and where they are."""
        own = own_tensors(self.head)
        for name, parameter in self.head.named_parameters():
            parameter.requires_grad_(name in own and name != "embed_tokens.weight")
        self.module = _Own(self.head, own.keys())

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        shape = parser.add_argument_group("the head's shape")
        shape.add_argument("--eagle", type=int, choices=(1, 3), default=3, help="EAGLE-1 or EAGLE-3 (default: 3)")
        shape.add_argument("--heads", type=int, metavar="N", help="attention heads (default: of width 64)")
        shape.add_argument("--intermediate", type=int, metavar="N", help="width of the MLP (default: 4 x the target's)")
        shape.add_argument(
            "--draft-vocab", type=int, metavar="N", help="the N most frequent tokens only (default: all; EAGLE-3)"
        )
        shape.add_argument(
            "--read",
            type=lambda text: tuple(int(part) for part in text.split(",")),
            metavar="I,J,K",
            help="hidden states of the target that are read (default: 2, half way, 3 before the end; EAGLE-3)",
        )
        shape.add_argument(
            "--head",
            choices=("own", "target"),
            default="own",
            help="predict with a head of its own that starts from the target's, or with the target's (default: own)",
        )
        how = parser.add_argument_group("training")
        how.add_argument("--loss", choices=tuple(LOSSES), default="fkl", help="(default: fkl)")
        how.add_argument(
            "--unroll", type=int, metavar="N", help="steps on its own features (default: 4 for EAGLE-3, 1 for EAGLE-1)"
        )
        how.add_argument("--k", type=int, default=5, metavar="N", help="drafted positions that are judged (default: 5)")

    @classmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> EagleObjective:
        head = new_head(new_config(target, options), target)
        steps = options["unroll"] if options["unroll"] is not None else (4 if options["eagle"] == 3 else 1)
        return cls(
            target,
            tokenizer,
            head,
            loss=options["loss"],
            unroll=steps,
            k=options["k"],
            draft_vocab=options["draft_vocab"] if options["eagle"] == 3 else None,
        )

    def begin(self, rows: np.ndarray) -> None:
        config = self.head.config
        if self.draft_vocab is None or config.draft_vocab_size == config.vocab_size:
            return
        of_target = self.target.config.get_text_config(decoder=True).eos_token_id
        always = {*(of_target if isinstance(of_target, list) else [of_target])} - {None}
        ids = frequent_ids(rows, config.vocab_size, int(config.draft_vocab_size or 0), always)
        self.head.d2t.copy_(ids - torch.arange(len(ids)))
        with torch.no_grad():
            if config.own_head:
                chosen = output_weight(self.target)[ids.to(self.target.device)]
                self.head.lm_head.weight.copy_(chosen.to(self.head.lm_head.weight))
        bind(self.head, self.target)
        self._only_own()

    # ------------------------------------------------------------ forward

    def _features(self, batch: Batch) -> Tensor:
        """The target's states, fused, `[B, L, H]` in float32 or the target's float64."""
        return self.head.fuse(torch.cat([batch.hidden[i] for i in self.head.config.hidden], -1))

    def _truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The target's distributions within the draft vocabulary, `[B, L, R]`, and where they count, bool `[B, L]`.

        Not where the target's best token cannot be drafted: there is nothing to learn about it.
        """
        ids_R, logits_BLV = self.head.draft_ids, batch.logits_BLV
        if len(ids_R) == logits_BLV.shape[2]:
            return logits_BLV.softmax(-1), torch.ones_like(batch.mask_BL)
        can_V = torch.zeros(logits_BLV.shape[2], dtype=torch.bool, device=ids_R.device)
        can_V[ids_R] = True
        return logits_BLV[..., ids_R].softmax(-1), can_V[logits_BLV.argmax(-1)]

    def _step_loss(self, own_NH: Tensor, p_NR: Tensor, counts_N: Tensor) -> Tensor:
        loss_N = divergence(self.loss_name, p_NR, self.head.lm_head(own_NH))
        return torch.where(counts_N, loss_N, torch.zeros_like(loss_N)).sum()

    def loss(self, batch: Batch) -> Losses:
        features_BLH = self._features(batch)
        is_first = self.head.config.eagle_version == 1
        truth_BLH = features_BLH
        if is_first and self.module.training:
            noise = (torch.rand_like(features_BLH) - 0.5) * _NOISE * 512 / features_BLH.shape[1]
            features_BLH = features_BLH + noise
        steps = self.unroll_steps
        starts_BS = batch.starts(steps, 1)
        num_starts = starts_BS.shape[1]
        p_BLR, can_BL = self._truth(batch)
        total, weights, by_step = features_BLH.new_zeros(()), 0.0, []
        for j, (_, own) in enumerate(unrolling(self.head, batch.tokens_BL, features_BLH, steps, logits=False)):
            ahead = slice(1 + j, 1 + j + num_starts)
            normed = own if is_first or self.head.config.norm_output else self.head.norm(own)
            counts_BS = starts_BS & can_BL[:, ahead]
            pieces = [tensor.flatten(0, 1) for tensor in (normed, p_BLR[:, ahead], counts_BS)]
            value = torch.stack(in_pieces(self._step_loss, p_BLR.shape[-1], *pieces)).sum()
            value = value / counts_BS.sum().clamp_min(1)
            if is_first:
                gap = nn.functional.smooth_l1_loss(own, truth_BLH[:, ahead], reduction="none").mean(-1)
                value = (gap * starts_BS).sum() / starts_BS.sum().clamp_min(1) + _CE_WEIGHT * value
            total = total + _DECAY**j * value
            weights += _DECAY**j
            by_step.append(value.detach())
        return Losses(total / weights, {"first": by_step[0], "last": by_step[-1]})

    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        counts_BS = batch.starts(self.depth, 1)
        num_starts, ids_R = counts_BS.shape[1], self.head.draft_ids
        found: list[Tensor] = []
        for j, (q_logits, _) in enumerate(unroll(self.head, batch.tokens_BL, self._features(batch), self.depth)):
            p_logits = batch.logits_BLV[:, 1 + j : 1 + j + num_starts]
            rows = [overlap(p.softmax(-1), q, ids_R) for p, q in zip(p_logits, q_logits, strict=True)]
            found.append(torch.stack([torch.stack(row) for row in rows], 1)[:, counts_BS])
        overlap_NK, agree_NK = torch.stack(found, 2)
        return overlap_NK, agree_NK

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        files.write_own(folder, self.head)

    @classmethod
    def export(cls, source: Path, out: Path, layout: str) -> None:
        """Raises `InputError` for a head that predicts with its target's, unless that is the embedded target."""
        found = files.read(source)
        table = None if found.config.own_head else _embedded_head(source)
        files.export(found, out, table)


def _embedded_head(source: Path) -> Tensor:
    target = load_model(EMBEDDED / "target", device="cpu")
    if provenance.read(source)["target"] != provenance.fingerprint(target):
        raise InputError(
            "this head predicts with its target's own head, which the speculators layout cannot say; train it with "
            "--head own, or use it as it is"
        )
    rows: Tensor = target.get_output_embeddings().weight.detach()
    return rows


class _Own(nn.Module):
    """The head without the tables that it shares: what moves, is trained, and is kept in checkpoints."""

    def __init__(self, head: EagleModel, names: Any):
        super().__init__()
        self._names = tuple(names)
        self.head = head

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        whole = self.head.state_dict()
        return {name: whole[name] for name in self._names}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.head.load_state_dict(state_dict, strict=False)
