"""A synthetic pair's model as a GGUF file, written tensor by tensor through the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.bench.synthetic import NUM_SPECIAL, piece

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` as `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.weight"


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key matrix `[heads * head_dim, hidden]`: halves of a rotated pair become neighbours."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


#: llama.cpp's own layouts of as many bits as ours.
LAYOUTS = {"int8": "Q8_0", "int4": "Q4_0"}


def write_gguf(model: Any, path: Path, weights: str | None = None) -> None:
    """Write a float32 or bfloat16 Llama of `synthetic.make_pair`; norms are float32, as llama.cpp wants them.

    `weights`: of `LAYOUTS`, for all matrices; None: as they are.

    Pieces are user-defined tokens, which its tokenizer matches literally: the text `<t00300><t00301>` is two ids.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    half = model.dtype == torch.bfloat16
    layout = gguf.GGMLQuantizationType[LAYOUTS[weights]] if weights else None
    kinds = gguf.LlamaFileType
    plain = kinds.MOSTLY_BF16 if half else kinds.ALL_F32
    writer.add_file_type(kinds[f"MOSTLY_{layout.name}"] if layout is not None else plain)
    _add_tokenizer(writer, config.vocab_size)
    for name, weight in model.named_parameters():
        _add_tensor(writer, name, weight.detach(), config, layout)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, vocab_size: int) -> None:
    import gguf

    kind = gguf.TokenType
    special = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    special += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    pieces = special + [(piece(token), kind.USER_DEFINED) for token in range(NUM_SPECIAL, vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([int(value) for _, value in pieces])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def _add_tensor(writer: Any, name: str, weight: Tensor, config: Any, layout: Any) -> None:
    import gguf

    if "q_proj" in name:
        weight = interleave(weight, config.num_attention_heads)
    elif "k_proj" in name:
        weight = interleave(weight, config.num_key_value_heads)
    if weight.ndim > 1 and layout is not None:
        raw = gguf.quants.quantize(weight.float().contiguous().numpy(), layout)
        writer.add_tensor(tensor_name(name), raw, raw_dtype=layout)
        return
    if weight.ndim == 1 or weight.dtype == torch.float32:
        writer.add_tensor(tensor_name(name), weight.float().contiguous().numpy())
        return
    raw = weight.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(tensor_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
