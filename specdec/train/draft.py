"""`specdec train draft`: a small language model learns what the target would say (DistillSpec, arXiv 2310.08461).

Shape suffixes: B rows, L tokens of a row, V vocabulary, H hidden width, N positions or starts, K drafted positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from specdec.errors import IncompatiblePairError, InputError
from specdec.loading import DRAFTER_KEY, EMBEDDED, check_same_tokenizer, load_model, load_tokenizer
from specdec.train.losses import LOSSES, check_loss, divergence, overlap
from specdec.train.objective import Batch, Losses, Objective
from specdec.vocabulary import output_size

_SHAPE = ("layers", "hidden", "heads", "kv_heads", "intermediate")
_HEAD = 64


def shape_of(target: Any, options: Mapping[str, Any]) -> dict[str, int]:
    """The shape asked for, completed: two layers, three quarters of the target's width in heads of 64."""
    width = int(target.get_input_embeddings().weight.shape[1])
    hidden = options["hidden"] or max(_HEAD, 3 * width // 4 // _HEAD * _HEAD)
    heads = options["heads"] or max(1, hidden // _HEAD)
    shape = {
        "num_hidden_layers": options["layers"] or 2,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": options["kv_heads"] or (heads // 3 if heads % 3 == 0 else heads),
        "intermediate_size": options["intermediate"] or max(1, round(hidden * 8 / 3 / _HEAD)) * _HEAD,
    }
    if min(shape.values()) < 1:
        raise InputError(f"layers, widths and heads are whole numbers >= 1: {shape}")
    if hidden % heads or (hidden // heads) % 2 or heads % shape["num_key_value_heads"]:
        raise InputError(
            f"--hidden {hidden} does not divide into --heads {heads} of an even width, or these into --kv-heads "
            f"{shape['num_key_value_heads']} equal groups"
        )
    return shape


def new_model(target: Any, options: Mapping[str, Any]) -> LlamaForCausalLM:
    """A llama of the asked shape with the target's vocabulary, special tokens and context."""
    shape = shape_of(target, options)
    config = target.config.get_text_config()
    special = {f"{name}_token_id": getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    table_VH = target.get_input_embeddings().weight.detach().float()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(table_VH),
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            **special,
            **shape,
        )
    )
    project_embedding(model, table_VH)
    return model


@torch.no_grad()
def project_embedding(model: LlamaForCausalLM, table_VH: Tensor) -> None:
    """Start the draft's embedding from the target's, on its strongest directions: a draft this small learns the layers
    in the time at hand, not a whole vocabulary of vectors."""
    own = model.get_input_embeddings().weight
    width = min(own.shape[1], table_VH.shape[1])
    centred_VH = table_VH - table_VH.mean(0)
    directions = torch.linalg.eigh(centred_VH.T @ centred_VH).eigenvectors.flip(1)[:, :width]
    small = table_VH @ directions
    own[:, :width] = small.to(own.device) * (model.config.initializer_range / small.std())


class DraftObjective(Objective):
    """A causal language model with the target's tokenizer; the `model` drafter reads it.

    Its K drafted positions are K predictions in a row on the text's own tokens, which is what the draft has before it
    as long as everything before was accepted.
    """

    kind = "draft"

    def __init__(
        self, target: Any, tokenizer: Any, model: Any, *, loss: str = "fkl", on_policy: float = 0.0, k: int = 5
    ):
        super().__init__(target, tokenizer)
        if not 0 <= on_policy <= 1:
            raise InputError(f"--on-policy is a share of the rows, 0 to 1, not {on_policy}")
        if k < 1:
            raise InputError(f"--k is a number of drafted tokens >= 1, not {k}")
        sizes = [output_size(m) for m in (target, model)]
        if sizes[0] != sizes[1]:
            raise IncompatiblePairError(f"the target has {sizes[0]} tokens and the draft {sizes[1]}")
        self.model = self.module = model.train()
        self.depth, self.on_policy = k, on_policy
        self.loss_name = check_loss(loss)

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        shape = parser.add_argument_group("the draft's shape")
        shape.add_argument("--layers", type=int, metavar="N", help="(default: 2)")
        shape.add_argument("--hidden", type=int, metavar="N", help="width (default: three quarters of the target's)")
        shape.add_argument("--heads", type=int, metavar="N", help="attention heads (default: of width 64)")
        shape.add_argument("--kv-heads", type=int, metavar="N", help="key-value heads (default: a third, or all)")
        shape.add_argument("--intermediate", type=int, metavar="N", help="width of the MLP (default: 8/3 of --hidden)")
        shape.add_argument(
            "--init", metavar="FOLDER", help="start from this draft instead; 'embedded' is the one in the package"
        )
        how = parser.add_argument_group("distillation")
        how.add_argument("--loss", choices=tuple(LOSSES), default="fkl", help="(default: fkl)")
        how.add_argument(
            "--on-policy",
            type=float,
            default=0.0,
            metavar="SHARE",
            help="of rows that the draft continues (default: 0)",
        )
        how.add_argument("--k", type=int, default=5, metavar="N", help="drafted positions that are judged (default: 5)")

    @classmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> DraftObjective:
        init = options["init"]
        if init is None:
            model = new_model(target, options)
        else:
            given = [name for name in _SHAPE if options[name] is not None]
            if given:
                raise InputError(f"--init brings its own shape; leave out --{given[0].replace('_', '-')}")
            source = str(EMBEDDED / "draft") if init == "embedded" else str(init)
            check_same_tokenizer(tokenizer, load_tokenizer(source))
            model = load_model(source, dtype="float32", device="cpu")
        return cls(target, tokenizer, model, **{name: options[name] for name in ("loss", "on_policy", "k")})

    def replace(self, tokens_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """A share of the rows, continued by the draft as it is now from somewhere in their second quarter."""
        num_rows, length = tokens_BL.shape
        wanted = int(self.on_policy * num_rows + torch.rand(()).item())
        if not wanted:
            return tokens_BL, mask_BL
        start = int(torch.randint(length // 4, length // 2, ()))
        rows = torch.randperm(num_rows)[:wanted].to(tokens_BL.device)
        rows = rows[mask_BL[rows, :start].all(1)]
        if not len(rows):
            return tokens_BL, mask_BL
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - start, pad_token_id=0
        )
        prompts = tokens_BL[rows, :start]
        self.module.eval()
        made = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        self.module.train()
        tokens_BL, mask_BL = tokens_BL.clone(), mask_BL.clone()
        tokens_BL[rows], mask_BL[rows] = made, True
        return tokens_BL, mask_BL

    def _q_logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.module(input_ids=batch.tokens_BL, use_cache=False).logits
        return logits

    def loss(self, batch: Batch) -> Losses:
        q_logits_NV, p_logits_NV = batch.counted(self._q_logits(batch)), batch.counted(batch.logits_BLV)
        return Losses(divergence(self.loss_name, p_logits_NV.softmax(-1), q_logits_NV).mean())

    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        both = [
            torch.stack(overlap(p_logits_LV.softmax(-1), q_logits_LV))
            for p_logits_LV, q_logits_LV in zip(batch.logits_BLV, self._q_logits(batch), strict=True)
        ]
        windows = torch.stack(both, 1).unfold(2, self.depth, 1)  # [2, B, L - K + 1, K]
        overlap_NK, agree_NK = windows[:, batch.starts(self.depth - 1)]
        return overlap_NK, agree_NK

    def save(self, folder: Path) -> None:
        setattr(self.model.config, DRAFTER_KEY, "model")
        self.model.generation_config.do_sample = False
        self.model.save_pretrained(folder)
