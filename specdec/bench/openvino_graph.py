"""A saved Llama as the stateful graph that OpenVINO GenAI runs, with its tokenizer.

Shape suffixes: B sequences, T new tokens, S tokens seen.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.export.openvino import make_stateful, name_ports, round_weights

_NUM_FIXED_INPUTS = 3


class _Joining(CacheLayerMixin):
    """Old keys and values come in, old and new ones go out: no state of its own, so that a graph can hold it."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat((self.keys, key_states), 2)
        self.values = torch.cat((self.values, value_states), 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class _Graph(nn.Module):
    """The stock model as a function of ids, masks, positions and the cache; the cache comes and goes as tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids_BT: Tensor, attention_mask_BS: Tensor, position_ids_BT: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = Cache(layers=[_Joining(past[i], past[i + 1]) for i in range(0, len(past), 2)])
        rows = torch.arange(input_ids_BT.shape[1]) + past[0].shape[2]
        seen_TS = torch.arange(attention_mask_BS.shape[1])[None, :] <= rows[:, None]
        allowed = seen_TS[None, None] & (attention_mask_BS != 0)[:, None, None, :]
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        out = self.model(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=bias,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))


def _names(num_layers: int, prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def build_graph(model: Any) -> Any:
    """A stateful `openvino.Model` of a float32 Llama, with the inputs that GenAI expects.

    The cache tensors become the graph's state, reordered by `beam_idx`, empty at first.
    """
    import openvino as ov
    from openvino import opset13 as ops

    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, heads, 3, size) for _ in range(2 * config.num_hidden_layers)]
    example = (torch.ones(2, 4).long(), torch.ones(2, 7).long(), torch.arange(3, 7).repeat(2, 1), *past)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on branches that the example takes rightly
        graph = ov.convert_model(_Graph(model), example_input=example)
    before = _names(config.num_hidden_layers, "past_key_values")
    after = _names(config.num_hidden_layers, "present")
    fixed = ["input_ids", "attention_mask", "position_ids"]
    for port in graph.inputs[:_NUM_FIXED_INPUTS]:
        port.get_node().set_element_type(ov.Type.i64)
    shapes = [[-1, -1]] * len(fixed) + [[-1, heads, -1, size]] * len(before)
    name_ports(graph, fixed + before, ["logits", *after], shapes)
    order = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    for port in graph.inputs[_NUM_FIXED_INPUTS:]:
        users = list(port.get_node().output(0).get_target_inputs())
        reordered = ops.gather(port.get_node(), order, ops.constant(0, ov.Type.i64))
        for user in users:
            user.replace_source_output(reordered.output(0))
    graph.add_parameters([order])
    make_stateful(graph, before, after)
    _start_empty(graph, heads, size)
    return graph


def _start_empty(graph: Any, heads: int, size: int) -> None:
    """Give every state variable its first value: no tokens, for as many sequences as there are ids."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    shape = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0], ov.Type.i64), ops.constant(0, ov.Type.i64))
    empty = ops.concat([batch, ops.constant(np.array([heads, 0, size], dtype=np.int64))], 0)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([ops.broadcast(ops.constant(np.array(0, dtype=np.float32)), empty)])
    graph.validate_nodes_and_infer_types()


def convert(source: str, folder: str, weights: str | None) -> None:
    """Write what `LLMPipeline` reads of a saved model: graph, tokenizer, detokenizer. Weights become float32.

    Half-precision weights keep their values: a plugin that computes in bfloat16 rounds them back to what they were.
    `weights`: what `round_weights` then makes of them; None: nothing.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    graph = build_graph(model)
    if weights is not None:
        round_weights(graph, weights)
    ov.save_model(graph, target / "openvino_model.xml", compress_to_fp16=False)
    made = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    for part, graph in zip(("tokenizer", "detokenizer"), made, strict=True):
        ov.save_model(graph, target / f"openvino_{part}.xml")
    model.config.save_pretrained(target)
