"""The calls of `transformers-neuronx` for speculative decoding, on whatever device there is.

Cells that were written for that library run here after a change of two imports. Its words are kept: `k` is the number
of tokens that the target scores in one pass, the last known one included, so k - 1 are drafted; `sequence_length` is
that of prompt and text together.

Shape suffixes: B texts, L prompt tokens, S tokens of prompt and text.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.api import SpeculativeDecoder
from specdec.errors import BackendWarning, InputError
from specdec.generation import Generation
from specdec.loading import load_model
from specdec.policy import Fixed
from specdec.verifier import Verifier

_AMP = {"bf16": "bfloat16", "f32": "float32"}
_QUANT = {"s8": "int8", "f8e4m3fn": "mxfp8_e4m3"}


@dataclass(frozen=True)
class QuantizationConfig:
    """Stored weights: "s8" is our `int8`, which rounds activations by rows too, "f8e4m3fn" our `mxfp8_e4m3`."""

    quant_dtype: str = "s8"
    dequant_dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.quant_dtype not in _QUANT:
            raise InputError(f"quant_dtype is one of {', '.join(_QUANT)}, not {self.quant_dtype!r}")


@dataclass(frozen=True)
class NeuronConfig:
    """What of it means something elsewhere. `weight_tiling` orders weights for that chip, and changes nothing here."""

    quant: QuantizationConfig | None = None
    weight_tiling: bool = False


class ForSampling:
    """A model with the life of that library's: made from a folder, given its context, prepared, sampled from.

    `amp`: "bf16" or "f32". `n_positions`: the longest sequence. `tp_degree`: cores to spread over; there is one device
    here, which a warning says. `LlamaForSampling` and its like are this class: the folder names the architecture.
    """

    def __init__(self, model: Any, n_positions: int, batch_size: int = 1):
        self.model, self.n_positions, self.batch_size = model, n_positions, batch_size
        self.speculation_lengths: tuple[int, ...] = ()
        self._decoder: SpeculativeDecoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        n_positions: int = 2048,
        batch_size: int = 1,
        tp_degree: int = 1,
        amp: str = "f32",
        neuron_config: NeuronConfig | None = None,
        device: Any = None,
    ) -> ForSampling:
        """Raises `InputError` for an unknown `amp`, and when `n_positions` exceeds the model's context."""
        if amp not in _AMP:
            raise InputError(f"amp is one of {', '.join(_AMP)}, not {amp!r}")
        if tp_degree != 1:
            warnings.warn(f"tp_degree={tp_degree}: one device here, nothing is spread", BackendWarning, stacklevel=2)
        quant = neuron_config.quant if neuron_config is not None else None
        model = load_model(path, dtype=_AMP[amp], device=device, quantize=_QUANT[quant.quant_dtype] if quant else None)
        context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if context is not None and n_positions > context:
            raise InputError(f"n_positions is {n_positions}, and the model's context is {context}: ask for less")
        return cls(model, n_positions, batch_size)

    def enable_speculative_decoder(self, k: int | list[int]) -> None:
        """Tokens that one pass may score. Other lengths run as well; a target that was not told any refuses all."""
        lengths = tuple(k) if isinstance(k, list) else (k,)
        if not lengths or any(not isinstance(length, int) or length < 2 for length in lengths):
            raise InputError(f"k counts the known token too, so it is a whole number >= 2, not {k!r}")
        self.speculation_lengths = lengths

    def to_neuron(self) -> None:
        """Prepare the model's step: there is no other chip, so this compiles what this device runs."""
        self._plain().warmup()

    def _plain(self) -> SpeculativeDecoder:
        if self._decoder is None:
            self._decoder = SpeculativeDecoder(self.model)
        return self._decoder

    def sample(
        self,
        input_ids: Tensor,
        sequence_length: int,
        *,
        top_k: int | None = 50,
        top_p: float | None = None,
        temperature: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        attention_mask: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Plain autoregressive text: int64 `[B, S]`, prompts included, shorter rows filled with `pad_token_id`."""
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        prompts = _prompts(input_ids, attention_mask)
        _check_length(self, sequence_length, prompts)
        made = [
            self._plain().generate_plain(
                prompt, max_new_tokens=sequence_length - len(prompt), eos_token_id=_eos(eos_token_id), **options
            )
            for prompt in prompts
        ]
        return _padded(made, pad_token_id)


LlamaForSampling = MistralForSampling = GPT2ForSampling = OPTForSampling = ForSampling


class SpeculativeGenerator:
    """`SpeculativeGenerator(draft, target, k).sample(input_ids, sequence_length=…)`.

    `draft`: a `ForSampling`, a loaded model, or anything that `SpeculativeDecoder` takes as a drafter. `k`: tokens that
    the target scores in one pass; k - 1 are drafted. `acceptor`: a verification rule by name or object; `coupled` by
    default. The library that this mirrors drafts by argmax and accepts as if its draft had been sampled, which
    changes the distribution; the rules here do not (`specdec certify`).

    Lossless: yes, unless `acceptor` is not.
    """

    def __init__(self, draft: Any, target: ForSampling, k: int = 4, acceptor: Verifier | str | None = None):
        if not isinstance(k, int) or k < 2:
            raise InputError(f"k counts the known token too, so it is a whole number >= 2, not {k!r}")
        if not target.speculation_lengths:
            raise InputError(f"call target.enable_speculative_decoder({k}) first")
        if k > max(target.speculation_lengths):
            raise InputError(
                f"k is {k}, and the target was prepared for {', '.join(map(str, target.speculation_lengths))}: call "
                f"target.enable_speculative_decoder({k})"
            )
        self.target, self.k = target, k
        self.decoder = SpeculativeDecoder(
            target.model,
            drafter=draft.model if isinstance(draft, ForSampling) else draft,
            verifier=acceptor,
            policy=Fixed(k - 1),
        )
        #: What the last call gave, with statistics.
        self.generations: list[Generation] = []

    def sample(
        self,
        input_ids: Tensor,
        sequence_length: int,
        *,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """int64 `[B, S]`: prompts `[B, L]` and texts, exactly `sequence_length` tokens unless an end is met before.

        `attention_mask` `[B, L]` marks the prompts of right-padded rows. `streamer`: `put(ids)` and `end()`, for one
        row. Temperature 0 is greedy. Raises `InputError` when prompt and text do not fit the target's `n_positions`.
        """
        prompts = _prompts(input_ids, attention_mask)
        _check_length(self.target, sequence_length, prompts)
        options = {"temperature": temperature, "top_k": top_k, "seed": seed, "eos_token_id": _eos(eos_token_id)}
        if streamer is not None and len(prompts) > 1:
            raise InputError(f"a streamer takes one text; input_ids has {len(prompts)} rows")
        self.generations = []
        for prompt in prompts:
            stream = self.decoder.stream(prompt, max_new_tokens=sequence_length - len(prompt), **options)
            for chunk in stream:
                if streamer is not None:
                    streamer.put(torch.tensor(chunk.tokens))
            self.generations.append(stream.generation)
        if streamer is not None:
            streamer.end()
        return _padded(self.generations, pad_token_id)


def _eos(eos_token_id: int | None) -> tuple[int, ...]:
    """None: that library goes on to the length that was asked for."""
    return () if eos_token_id is None else (eos_token_id,)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    rows_BL = torch.as_tensor(input_ids)
    if rows_BL.ndim != 2 or not rows_BL.numel():
        raise InputError(f"input_ids has two dimensions, texts and tokens; its shape is {list(rows_BL.shape)}")
    if attention_mask is None:
        return [[int(token) for token in row] for row in rows_BL.tolist()]
    mask_BL = torch.as_tensor(attention_mask).bool()
    if mask_BL.shape != rows_BL.shape or not bool((mask_BL[:, :-1] >= mask_BL[:, 1:]).all()):
        raise InputError("attention_mask has the shape of input_ids, and its rows are padded on the right")
    return [row[mask].tolist() for row, mask in zip(rows_BL, mask_BL, strict=True)]


def _check_length(target: ForSampling, sequence_length: int, prompts: list[list[int]]) -> None:
    longest = max(map(len, prompts))
    if not longest < sequence_length <= target.n_positions:
        raise InputError(
            f"sequence_length counts prompt and text: more than the prompt's {longest}, and at most n_positions = "
            f"{target.n_positions}; it is {sequence_length}"
        )


def _padded(made: list[Generation], pad: int) -> Tensor:
    rows = [torch.tensor([*text.prompt, *text.tokens]) for text in made]
    padded: Tensor = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return padded
