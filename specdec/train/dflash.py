"""`specdec train dflash`: a draft that fills a block in one pass learns at random anchors (Chen et al., 2602.06036).

Shape suffixes: B rows, L tokens of a row, A anchors of a row, K drafted positions, H hidden width, V vocabulary,
N positions or starts, W width of the target's features.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import Qwen3Config

from specdec.errors import InputError
from specdec.formats import dflash as files
from specdec.formats.files import read_config
from specdec.models.dflash import DFlashConfig, DFlashModel, check_target, spread_layers
from specdec.models.dflash_anchors import anchored_hidden
from specdec.train.losses import LOSSES, check_loss, divergence, in_pieces, overlap
from specdec.train.objective import Batch, Losses, Objective
from specdec.vocabulary import output_size

_HEAD = 64


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 2,9,16") from None


def shape_of(target: Any, options: Mapping[str, Any]) -> Qwen3Config:
    """The draft's layers: the target's width, heads of 64 if they fit, and an MLP twice as wide."""
    text = target.config.get_text_config(decoder=True)
    width = int(target.get_input_embeddings().weight.shape[1])
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    heads = options["heads"] or max(1, width // head)
    kv_heads = options["kv_heads"] or (heads // 2 if heads % 2 == 0 else heads)
    sizes = {
        "num_hidden_layers": options["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": options["intermediate"] or 2 * width,
    }
    if min(sizes.values()) < 1 or heads % kv_heads or head % 2:
        raise InputError(f"layers, heads and widths are whole numbers >= 1, heads in equal groups: {sizes}")
    rope = getattr(text, "rope_parameters", None) or {}
    return Qwen3Config(
        hidden_size=width,
        vocab_size=output_size(target),
        max_position_embeddings=text.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": float(rope.get("rope_theta", 10000.0))},
        rms_norm_eps=1e-6,
        attention_bias=False,
        use_sliding_window=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )


class DFlashObjective(Objective):
    """A draft that fills a block of masked slots in one pass; the `parallel` drafter reads it.

    Every row is cut at random anchors. From an anchor, the last token known, and the target's hidden states before it,
    the draft says what follows at K positions; position k weighs exp(-(k - 1) / gamma) in the loss.
    """

    kind = "dflash"
    layouts = ("speculators",)
    recommended: ClassVar[Mapping[str, Any]] = {"lr": 3e-3, "optimizer": "muon"}

    def __init__(
        self,
        target: Any,
        tokenizer: Any,
        config: DFlashConfig,
        *,
        anchors: int = 32,
        gamma: float = 4.0,
        loss: str = "fkl",
        init: DFlashModel | None = None,
    ):
        super().__init__(target, tokenizer)
        if anchors < 1 or not gamma > 0:
            raise InputError(f"--anchors is a whole number >= 1 and --gamma a number > 0, not {anchors} and {gamma}")
        check_target(config, target)
        self.config, self.anchors, self.loss_name = config, anchors, check_loss(loss)
        self.module: DFlashModel = DFlashModel(config)
        self.module.initialize()
        self.hidden, self.depth = config.layer_ids, config.num_positions
        weights_K = torch.exp(-torch.arange(self.depth, dtype=torch.float32) / gamma)
        self.weights_K = weights_K / weights_K.mean()
        self.table_VH: Tensor = target.get_input_embeddings().weight.detach()
        self.head: Any = target.get_output_embeddings()
        self._calibrate()
        if init is not None:
            self.module.load_state_dict(init.state_dict())

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        shape = parser.add_argument_group("the draft's shape")
        shape.add_argument("--layers", type=int, default=2, metavar="N", help="(default: 2)")
        shape.add_argument("--heads", type=int, metavar="N", help="attention heads (default: the target's width)")
        shape.add_argument("--kv-heads", type=int, metavar="N", help="key-value heads (default: half as many)")
        shape.add_argument(
            "--intermediate", type=int, metavar="N", help="width of the MLP (default: twice the target's)"
        )
        shape.add_argument("--block", type=int, default=8, metavar="N", help="slots, the root's included (default: 8)")
        shape.add_argument(
            "--target-layers",
            type=_whole_numbers,
            metavar="I,J,…",
            help="hidden states to read, 0 the embeddings, i the input of layer i (default: four, spread)",
        )
        shape.add_argument(
            "--mask-token", type=int, metavar="ID", help="for masked slots (default: a vector of the draft's own)"
        )
        shape.add_argument("--sample-from-anchor", action="store_true", help="the root's slot drafts too")
        shape.add_argument("--init", metavar="FOLDER", help="start from this draft, in its shape")
        how = parser.add_argument_group("distillation")
        how.add_argument("--anchors", type=int, default=32, metavar="N", help="blocks of a row (default: 32)")
        how.add_argument(
            "--gamma", type=float, default=4.0, metavar="G", help="position k weighs exp(-(k-1)/G) (default: 4)"
        )
        how.add_argument("--loss", choices=tuple(LOSSES), default="fkl", help="(default: fkl)")

    @classmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> DFlashObjective:
        how = {name: options[name] for name in ("anchors", "gamma", "loss")}
        if options["init"] is not None:
            model, _ = files.read(Path(options["init"]))
            if model.lm_head is not None:
                raise InputError(f"--init {options['init']}: a draft with a vocabulary of its own is not trained here")
            return cls(target, tokenizer, model.config, init=model, **how)
        num_layers = int(target.config.get_text_config(decoder=True).num_hidden_layers)
        if options["block"] < 2:
            raise InputError(f"--block counts the root's slot and at least one more, not {options['block']}")
        config = DFlashConfig(
            shape_of(target, options),
            options["block"],
            options["target_layers"] or spread_layers(num_layers, min(4, num_layers)),
            options["mask_token"],
            options["sample_from_anchor"],
            num_target_layers=num_layers,
        )
        return cls(target, tokenizer, config, **how)

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Start with logits that spread over a few nats, whatever the scale of the target's head."""
        rows_V = self.head.weight.float().norm(dim=-1)
        self.module.norm.weight.fill_(2.0 / float(rows_V.mean().clamp_min(1e-6)))
        if self.module.mask_embedding is not None:  # what could be any token
            self.module.mask_embedding.copy_(self.table_VH.float().mean(0))

    # ------------------------------------------------------------ what the draft says

    def _features(self, batch: Batch) -> Tensor:
        features: Tensor = torch.cat([batch.hidden[i] for i in self.hidden], -1).to(self.module.norm.weight.dtype)
        return features

    def _hidden(self, batch: Batch, anchors_BA: Tensor) -> Tensor:
        """`[B, A, K, H]` at the drafted positions of each anchor."""
        table_VH = self.table_VH.to(self.module.norm.weight.dtype)
        return anchored_hidden(self.module, self._features(batch), batch.tokens_BL, anchors_BA, table_VH)

    def q_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the target's vocabulary, of `_hidden`'s rows."""
        weight_VH, bias_V = self.head.weight, getattr(self.head, "bias", None)
        weight_VH = weight_VH.detach().to(hidden.dtype)
        head = functools.partial(linear, weight=weight_VH, bias=None if bias_V is None else bias_V.to(hidden.dtype))
        return self.module.logits(hidden, head)

    def _places(self, anchors_BA: Tensor) -> tuple[Tensor, Tensor]:
        """Row and position `[B, A, K]` of the target's predictions that the draft's are compared with."""
        places_BAK = anchors_BA[..., None] + torch.arange(self.depth, device=anchors_BA.device)
        rows = torch.arange(len(anchors_BA), device=anchors_BA.device)[:, None, None].expand_as(places_BAK)
        return rows, places_BAK

    # ------------------------------------------------------------ what is minimised, and what is reported

    def loss(self, batch: Batch) -> Losses:
        fits = batch.starts(self.depth - 1)
        if not bool(fits.any()):
            raise InputError("no row of the batch has room for a block; raise --length or lower --block")
        # The places of the largest of random numbers are a random choice without repetition.
        drawn = torch.rand(fits.shape, device=fits.device).masked_fill(~fits, -1.0)
        chosen, anchors_BA = drawn.topk(min(self.anchors, fits.shape[1]))
        hidden = self._hidden(batch, anchors_BA)
        rows, places = self._places(anchors_BA)
        counts_BAK = (chosen >= 0)[..., None].expand_as(places)
        hidden_NH, rows_N, places_N = hidden[counts_BAK], rows[counts_BAK], places[counts_BAK]

        def compared(hidden_NH: Tensor, rows_N: Tensor, places_N: Tensor) -> Tensor:
            p_NV = batch.logits_BLV[rows_N, places_N].softmax(-1)
            return divergence(self.loss_name, p_NV, self.q_logits(hidden_NH))

        vocab_size = batch.logits_BLV.shape[-1]
        each_NK = torch.cat(in_pieces(compared, vocab_size, hidden_NH, rows_N, places_N)).view(-1, self.depth)
        means_K = each_NK.mean(0)
        shown = {"first": means_K[0].detach(), "last": means_K[-1].detach()}
        return Losses((means_K * self.weights_K.to(means_K)).mean(), shown)

    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        fits = batch.starts(self.depth - 1)
        found: list[Tensor] = []
        for first in range(0, fits.shape[1], self.anchors):
            here = torch.arange(first, min(first + self.anchors, fits.shape[1]), device=fits.device)
            counts = fits[:, here]
            if not bool(counts.any()):
                continue
            anchors_BA = here.expand(len(fits), -1)
            rows, places = self._places(anchors_BA)
            hidden_NH = self._hidden(batch, anchors_BA)[counts].flatten(0, 1)
            pieces = in_pieces(
                lambda h, r, t: torch.stack(overlap(batch.logits_BLV[r, t].softmax(-1), self.q_logits(h))),
                batch.logits_BLV.shape[-1],
                hidden_NH,
                rows[counts].flatten(),
                places[counts].flatten(),
            )
            found.append(torch.cat(pieces, 1).unflatten(1, (-1, self.depth)))
        if not found:
            empty = batch.logits_BLV.new_zeros(0, self.depth)
            return empty, empty
        overlap_NK, agree_NK = torch.cat(found, 1)
        return overlap_NK, agree_NK

    # ------------------------------------------------------------ files

    def save(self, folder: Path) -> None:
        config = self.target.config
        name = str(getattr(config, "_name_or_path", "") or "")
        # A folder of this machine names nothing elsewhere.
        verifier = {
            "name_or_path": "" if Path(name).exists() else name,
            "architectures": list(config.architectures or [type(self.target).__name__]),
        }
        files.write(folder, self.module, self.config.layers.vocab_size, verifier=verifier)

    @classmethod
    def export(cls, source: Path, out: Path, layout: str) -> None:
        if layout not in cls.layouts:
            super().export(source, out, layout)
        model, _ = files.read(source)
        verifier = read_config(source).get(files.VERIFIER) or {"name_or_path": "", "architectures": []}
        files.write_speculators(out, model, int(model.config.layers.vocab_size), verifier)
        copy, _ = files.read(out)
        theirs = copy.state_dict()
        same = copy.config.layer_ids == model.config.layer_ids and all(
            torch.equal(tensor.to(theirs[name].dtype), theirs[name]) for name, tensor in model.state_dict().items()
        )
        if not same:
            raise InputError(f"{out} does not read back as it was written; is the disk full?")
