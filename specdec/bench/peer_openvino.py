"""OpenVINO GenAI as a peer: the pair's own weights as stateful graphs, decoded plainly and with the draft model.

Shape suffixes: B sequences, T new tokens, S tokens seen.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.bench.rows import PLAIN, SPECULATIVE, Made, Method
from specdec.bench.synthetic import Pair
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.bench.peers import Setting

ENGINE = "openvino"
_NEEDS = ("openvino", "openvino_genai", "openvino_tokenizers")
_NUM_FIXED_INPUTS = 3
# Exact: no rounding that the weights do not have. Half: bfloat16 and whatever else the plugin then chooses by itself.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
HALF = {"INFERENCE_PRECISION_HINT": "bf16"}


def check() -> None:
    """Raise `InputError` when a package is missing."""
    missing = [name.replace("_", "-") for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--peer openvino needs {', '.join(missing)}: pip install openvino-genai")


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
    from openvino._offline_transformations import apply_make_stateful_transformation

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
    for port, name in zip(graph.inputs, fixed + before, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)  # GenAI finds some inputs by this name
        if name in fixed:
            port.get_node().set_partial_shape(ov.PartialShape([-1, -1]))
            port.get_node().set_element_type(ov.Type.i64)
        else:
            port.get_node().set_partial_shape(ov.PartialShape([-1, heads, -1, size]))
    for port, name in zip(graph.outputs, ["logits", *after], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    order = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    for port in graph.inputs[_NUM_FIXED_INPUTS:]:
        users = list(port.get_node().output(0).get_target_inputs())
        reordered = ops.gather(port.get_node(), order, ops.constant(0, ov.Type.i64))
        for user in users:
            user.replace_source_output(reordered.output(0))
    graph.add_parameters([order])
    apply_make_stateful_transformation(graph, dict(zip(before, after, strict=True)))
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


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what `LLMPipeline` reads: the graph, the tokenizer and the detokenizer. Weights stay float32."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    float32 = model if model.dtype == torch.float32 else _as_float32(model)
    ov.save_model(build_graph(float32), folder / "openvino_model.xml", compress_to_fp16=False)
    for part, graph in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
    ):
        ov.save_model(graph, folder / f"openvino_{part}.xml")
    model.config.save_pretrained(folder)


def _as_float32(model: Any) -> Any:
    """The same values in float32: what a bfloat16 plugin rounds them back to."""
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": "float32"})
    with torch.device("meta"):
        twin = type(model)(config)
    twin.load_state_dict({name: value.float() for name, value in model.state_dict().items()}, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(config=config)
    return twin.eval().requires_grad_(False)


def rows(pair: Pair, setting: Setting) -> list[Method]:
    """Plain, and with the draft model at each k; exact settings in float32, its own fast ones in bfloat16."""
    import openvino_genai as genai

    target, draft = setting.folder / "openvino" / "target", setting.folder / "openvino" / "draft"
    for model, folder in ((pair.target, target), (pair.draft, draft)):
        setting.say(f"converting the {folder.name} for OpenVINO")
        save(model, pair.tokenizer, folder)
    exact = setting.dtype == torch.float32
    properties = {**(EXACT if exact else HALF), "INFERENCE_NUM_THREADS": setting.threads}
    setting.say("loading into OpenVINO")
    plain = genai.LLMPipeline(str(target), "CPU", scheduler_config=genai.SchedulerConfig(), **properties)
    drafting = genai.LLMPipeline(
        str(target),
        "CPU",
        scheduler_config=genai.SchedulerConfig(),
        draft_model=genai.draft_model(str(draft), "CPU", **properties),
        **properties,
    )
    kind = "exact float32" if exact else "bfloat16, its default settings"
    made = [
        Method(
            "openvino",
            ENGINE,
            PLAIN,
            "openvino",
            f"OpenVINO GenAI, {kind}",
            lambda prompt: _generate(plain, prompt, setting.max_new_tokens, None),
        )
    ]
    for k in setting.ks:
        made.append(
            Method(
                f"openvino-draft-k{k}",
                ENGINE,
                SPECULATIVE,
                "openvino",
                f"OpenVINO GenAI, {kind}, draft model, k={k}",
                lambda prompt, k=k: _generate(drafting, prompt, setting.max_new_tokens, k),  # type: ignore[misc]
                drafter="model",
                k=k,
            )
        )
    return made


def _generate(pipeline: Any, prompt: Sequence[int], max_new_tokens: int, k: int | None) -> Made:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = max_new_tokens, False, True
    if k is not None:
        config.num_assistant_tokens = k
    result = pipeline.generate(ov.Tensor(np.array([list(prompt)], dtype=np.int64)), config)
    tokens = tuple(int(token) for token in result.tokens[0])
    accepted = result.extended_perf_metrics.get_num_accepted_tokens() if k is not None else 0
    # Every step of the target adds one token of its own to those that it accepts.
    return Made(tokens, steps=len(tokens) - accepted)
