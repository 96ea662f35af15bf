"""EAGLE heads as papers and files describe them: rows, loops, no cache, no library code; and their files.

Shape suffixes: M rows, H head width, D width of an attention head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

THETA = 10000.0
EPS = 1e-5


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """In float32, as `transformers` has it: a float64 model is no more precise there."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x_MD: Tensor, positions: Sequence[int]) -> Tensor:
    """Angles in float32, as in `transformers`."""
    half = x_MD.shape[1] // 2
    speeds = 1.0 / THETA ** (torch.arange(half).float() * 2 / x_MD.shape[1])
    rows = []
    for row, position in zip(x_MD, positions, strict=True):
        angle = speeds * float(position)
        cos, sin = angle.cos().double(), angle.sin().double()
        low, high = row[:half], row[half:]
        rows.append(torch.cat((low * cos - high * sin, high * cos + low * sin)))
    return torch.stack(rows)


class Plain:
    """One head: `shape` is what the test put into its files, `t` its tensors by their published names."""

    def __init__(self, shape: Mapping[str, Any], t: Mapping[str, Tensor], embed: Tensor, lm_head: Tensor):
        self.shape, self.t, self.embed, self.lm_head = shape, t, embed, lm_head

    def feature(self, states: Sequence[Tensor]) -> Tensor:
        """Of one token, from the target's hidden states, low to high."""
        if self.shape["version"] == 1:
            return states[0]
        if self.shape.get("fc_norm"):
            states = [rms(s, self.t[f"fc_norm.{i}.weight"]) for i, s in enumerate(states)]
        fused = torch.cat(list(states))
        if self.shape.get("norm_before_fc"):
            fused = rms(fused, self.t["input_norm.weight"])
        return self.t["fc.weight"] @ fused

    def attend(self, x_MH: Tensor) -> Tensor:
        t, heads, kv, width = self.t, self.shape["heads"], self.shape["kv_heads"], self.shape["head_dim"]
        name = "layers.0.self_attn."
        q, k, v = (x_MH @ t[f"{name}{which}_proj.weight"].T for which in "qkv")
        positions = range(len(x_MH))
        outs = []
        for head in range(heads):
            own, other = slice(head * width, (head + 1) * width), head * kv // heads
            theirs = slice(other * width, (other + 1) * width)
            q_MD, k_MD = q[:, own], k[:, theirs]
            if f"{name}q_norm.weight" in t:
                q_MD, k_MD = rms(q_MD, t[f"{name}q_norm.weight"]), rms(k_MD, t[f"{name}k_norm.weight"])
            q_MD, k_MD = rotate(q_MD, positions), rotate(k_MD, positions)
            scores = q_MD @ k_MD.T / width**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            outs.append(scores.softmax(-1) @ v[:, theirs])
        return torch.cat(outs, 1) @ t[f"{name}o_proj.weight"].T

    def rows(self, features_MH: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits and own features of rows that stand behind each other."""
        t, e_MH = self.t, self.embed[list(tokens)]
        if self.shape["version"] == 1:
            x = torch.cat((e_MH, features_MH), 1) @ t["fc.weight"].T + t.get("fc.bias", torch.zeros(()))
            residual = x
        else:
            normed = rms(features_MH, t["layers.0.hidden_norm.weight"])
            residual = normed if self.shape.get("norm_before_residual") else features_MH
            x = torch.cat((rms(e_MH, t["layers.0.input_layernorm.weight"]), normed), 1)
        x = residual + self.attend(x)
        y = rms(x, t["layers.0.post_attention_layernorm.weight"])
        gate, up = y @ t["layers.0.mlp.gate_proj.weight"].T, y @ t["layers.0.mlp.up_proj.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ t["layers.0.mlp.down_proj.weight"].T
        if self.shape["version"] == 1:
            return x @ self.lm_head.T, x
        last = rms(x, t["norm.weight"])
        return last @ self.lm_head.T, last if self.shape.get("norm_output") else x

    def says(self, states: Sequence[Sequence[Tensor]], text: Sequence[int], path: Sequence[int]) -> Tensor:
        """Draft logits after `text` and the drafted tokens of `path`. `states[i]`: the target's of token i."""
        features = torch.stack([self.feature(states[i]) for i in range(len(text) - 1)])
        tokens = list(text[1:])
        logits, own = self.rows(features, tokens)
        for token in path:
            features = torch.cat((features, own[-1:]))
            tokens.append(token)
            logits, own = self.rows(features, tokens)
        return logits[-1]


# ------------------------------------------------------------ files


def _llama(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": shape.get("kind", "llama"),
        "hidden_size": shape["width"],
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "max_position_embeddings": 256,
        "vocab_size": shape["vocab"],
        "hidden_act": "silu",
    }


def _flags(shape: Mapping[str, Any]) -> dict[str, Any]:
    return {n: shape.get(n, False) for n in ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")}


def _mask(t: Mapping[str, Tensor], vocab: int) -> dict[str, Tensor]:
    if "d2t" not in t:
        return {}
    return {"t2d": torch.zeros(vocab, dtype=torch.bool).index_fill_(0, torch.arange(len(t["d2t"])) + t["d2t"], True)}


def _midlayer(t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.0.", "midlayer."): tensor for name, tensor in t.items()}


def _config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def original(folder: Path, shape: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    """EAGLE-3 as its authors publish it, EAGLE-1 too: pickled tensors, and a config that says Llama."""
    more = {"draft_vocab_size": shape["draft_vocab"]} if shape["version"] == 3 else {}
    _config(folder, {"architectures": ["LlamaForCausalLM"], **_llama(shape), **more})
    named = _midlayer({**t, **_mask(t, shape["vocab"])}) if shape["version"] == 3 else dict(t)
    torch.save(named, folder / "pytorch_model.bin")


def specforge(folder: Path, shape: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    more = {"draft_vocab_size": shape["draft_vocab"], "target_hidden_size": shape["target_width"]}
    _config(folder, {"architectures": ["LlamaForCausalLMEagle3"], **_llama(shape), **more})
    save_file(_midlayer({**t, **_mask(t, shape["vocab"])}), folder / "model.safetensors")


def modelopt(folder: Path, shape: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    nested = {
        "eagle_aux_hidden_state_layer_ids": list(shape["ids"]),
        "use_aux_hidden_state": True,
        "use_last_layernorm": True,
        **_flags(shape),
    }
    more = {"draft_vocab_size": shape["draft_vocab"], "eagle_config": nested}
    _config(folder, {"architectures": ["LlamaForCausalLMEagle3"], **_llama(shape), **more})
    save_file({**t, **_mask(t, shape["vocab"])}, folder / "model.safetensors")


def speculators(folder: Path, shape: Mapping[str, Any], t: Mapping[str, Tensor]) -> None:
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x", "architectures": []}},
        "transformer_layer_config": _llama(shape),
        "draft_vocab_size": shape["draft_vocab"],
        "target_hidden_size": shape["target_width"],
        "eagle_aux_hidden_state_layer_ids": list(shape["ids"]),
        **_flags(shape),
    }
    _config(folder, config)
    save_file({**t, **_mask(t, shape["vocab"])}, folder / "model.safetensors")


WRITERS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], None]] = {
    "original": original,
    "specforge": specforge,
    "modelopt": modelopt,
    "speculators": speculators,
}
