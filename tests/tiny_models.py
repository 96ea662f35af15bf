"""Tiny random models of many architectures, and slow, obvious references to compare the library with.

Weights are large (`initializer_range` 0.5 and noise on every parameter, norms and biases too), so that texts vary and
a wrong mask, position or cache slot changes them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
import transformers as tf
from specdec.drafters import ModelDrafter
from torch import Tensor

from specdec import registry
from specdec.chance import CounterChance
from specdec.runtime.session import Session

VOCAB = 64
CONTEXT = 256
WINDOW = 7

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _config(kind: type, **changes: object) -> tf.PretrainedConfig:
    return kind(**{**_SHAPE, **changes})


CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: _config(tf.LlamaConfig),
    "llama-tied": lambda: _config(tf.LlamaConfig, tie_word_embeddings=True),
    "llama-mqa": lambda: _config(tf.LlamaConfig, num_key_value_heads=1),
    "llama-mha": lambda: _config(tf.LlamaConfig, num_key_value_heads=4),
    "qwen2": lambda: _config(tf.Qwen2Config),
    "qwen2-sliding": lambda: _config(
        tf.Qwen2Config, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: _config(tf.Qwen3Config, head_dim=8),
    "mistral": lambda: _config(tf.MistralConfig, sliding_window=WINDOW),
    "gemma2": lambda: _config(
        tf.Gemma2Config,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        num_hidden_layers=3,
        layer_types=_MIXED,
    ),
    "gemma3": lambda: _config(
        tf.Gemma3TextConfig,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,
        num_hidden_layers=3,
        layer_types=_MIXED,
    ),
    "gpt-neox": lambda: _config(tf.GPTNeoXConfig, num_key_value_heads=4),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    ),
    "phi": lambda: _config(tf.PhiConfig, partial_rotary_factor=0.5),
    "mixtral": lambda: _config(tf.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
}
ARCHITECTURES = tuple(CONFIGS)


def randomize(model: torch.nn.Module, scale: float, seed: int) -> torch.nn.Module:
    """Add noise to every parameter, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))
    return model


def finish(model: torch.nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    return randomize(model, 0.05, seed).to(dtype).eval()


def tiny(
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    seed: int = 0,
    **changes: object,
) -> torch.nn.Module:
    """A random model in evaluation mode; `changes` override fields of its configuration."""
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    torch.manual_seed(seed)
    # Grouped expert kernels have no float64.
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    return finish(model, dtype, seed)


def noisy(model: torch.nn.Module, scale: float, seed: int = 7) -> torch.nn.Module:
    """A draft that agrees with `model` more or less often."""
    return randomize(copy.deepcopy(model), scale, seed)


def session(model: torch.nn.Module, tokens: Sequence[int] = (), backend: str = "eager") -> Session:
    """`backend`: "compiled" is on the native kernels, without the minute that a graph takes."""
    options = {"compile": "never"} if backend == "compiled" else {}
    made = Session(registry.find("backend", backend).open(model, **options))
    if tokens:
        made.append(tokens)
    return made


def drafter(model: torch.nn.Module) -> ModelDrafter:
    return ModelDrafter(model)


@torch.inference_mode()
def cache_free(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """Logits `[V]` after `tokens`, by one forward over all of them."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]


def reference(
    model: torch.nn.Module,
    prompt: Sequence[int],
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    processors: Sequence[tf.LogitsProcessor] = (),
    seed: int = 0,
) -> list[int]:
    """Plain decoding without cache, session, tree or `Sampling`: one token at a time from a full forward.

    Filters are written out here; only the noise of a position is the library's own.
    """
    tokens = list(prompt)
    chance = CounterChance(seed)
    for _ in range(count):
        scores = cache_free(model, tokens).clone()
        if repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(tokens)))
            scores[seen] = torch.where(
                scores[seen] < 0, scores[seen] * repetition_penalty, scores[seen] / repetition_penalty
            )
        for processor in processors:
            scores = processor(torch.tensor([tokens]), scores[None])[0]
        if temperature == 0:
            tokens.append(int(scores.argmax()))
            continue
        scores = scores / temperature
        if top_k is not None:
            scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
        if top_p is not None:
            order = scores.argsort(descending=True)
            p = scores[order].softmax(-1)
            scores[order[p.cumsum(-1) - p >= top_p]] = -torch.inf
        if min_p is not None:
            p = scores.softmax(-1)
            scores[p < min_p * p.max()] = -torch.inf
        noise = chance.noise(len(tokens), len(scores))
        tokens.append(int((noise / scores.softmax(-1)).argmin()))
    return tokens[len(prompt) :]
