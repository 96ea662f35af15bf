"""Target and draft of any size, made from a seed, whose greedy agreement is one number. No download, no training.

The target is a random Llama. Its layers after the first few write into the residual stream scaled by one number; the
draft is the target cut after those first layers. So the draft is right as often as that number lets it be, while both
cost what real models of their sizes cost. The text means nothing, but does not loop.

Shape suffixes: B texts, T tokens, H hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError

# Ids below stand for <unk>, <s>, </s> and the 256 bytes, as tokenizers of such models have them; they are never drawn.
NUM_SPECIAL = 3 + 256
DEFAULT_AGREEMENT = 0.77
CONTEXT = 4096
# Spread of logits and of attention scores: large enough that a token depends on its whole context, without which
# random models fall into loops.
_HEAD_GAIN, _GAIN = 4.0, 1.5
# The scale at which later layers overrule the draft nearly always; the search goes on below it.
_MAX_SCALE = 1.0
_SEARCH_STEPS, _SEARCH_TOLERANCE = 12, 0.01


@dataclass(frozen=True)
class Shape:
    """Sizes of a pair. `scale` is what gives an agreement of 0.77, measured by `calibrate` with seed 0."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    draft_layers: int
    scale: float

    def config(self, num_layers: int) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )


PRESETS = {
    "tiny": Shape(4, 128, 256, 4, 2, 1024, 1, 0.0898),
    "134m": Shape(12, 768, 2048, 12, 4, 32000, 2, 0.0508),
    "350m": Shape(24, 1024, 2816, 16, 4, 32000, 3, 0.043),
    "1b": Shape(22, 2048, 5632, 32, 4, 32000, 3, 0.042),
    "3b": Shape(28, 3072, 8192, 24, 8, 32000, 3, 0.042),  # for a GPU; the scale of 1b, not measured at this size
}


@dataclass(frozen=True, eq=False)
class Pair:
    """A target and its draft. `scale` is the number that sets how often they agree."""

    target: Any
    draft: Any
    tokenizer: Any
    shape: Shape
    scale: float
    seed: int

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `folder/target` and `folder/draft` with tokenizers, as `from_pretrained` reads them."""
        folders = Path(folder) / "target", Path(folder) / "draft"
        for model, path in zip((self.target, self.draft), folders, strict=True):
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            note = {"scale": self.scale, "seed": self.seed, "made_by": "specdec.bench.synthetic"}
            (path / "synthetic.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        return folders


def piece(token: int) -> str:
    """How token `token` is written, in all tokenizers of a pair."""
    return f"<t{token:05d}>"


def make_tokenizer(vocab_size: int) -> Any:
    """One piece per id, `<t00259>` and so on: text and ids are the same thing in every engine."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: token for token, name in enumerate(names[:vocab_size])}
    vocab.update({piece(token): token for token in range(NUM_SPECIAL, vocab_size)})
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<t[0-9]{5}>"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _empty(config: Any, device: Any, dtype: torch.dtype) -> Any:
    """A model whose weights are not set yet; its rotary table, which no checkpoint holds, is."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def _later(name: str, shape: Shape) -> bool:
    """Whether this matrix writes into the residual stream in a layer that the draft lacks."""
    part = name.split(".")
    return part[-2] in ("o_proj", "down_proj") and int(part[2]) >= shape.draft_layers


def _fill(model: Any, shape: Shape, scale: float, seed: int) -> None:
    """Random weights; drawn in float32, so that those of other dtypes are these, rounded."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        width = parameter.shape[1] ** -0.5
        if "embed_tokens" in name:
            spread = 1.0
        elif "lm_head" in name:
            spread = _HEAD_GAIN * width
        elif "o_proj" in name or "down_proj" in name:
            spread = width * (scale if _later(name, shape) else 1.0)
        else:
            spread = _GAIN * width
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(spread))
        if "lm_head" in name:
            # Their logits are 0, and the largest of the many others is not: greedy text has ordinary pieces only.
            parameter[:NUM_SPECIAL] = 0.0


@torch.inference_mode(False)
@torch.no_grad()
def make_pair(
    shape: str | Shape = "134m",
    *,
    agreement: float | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    seed: int = 0,
    share: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Pair:
    """A pair of a preset's name or of any `Shape`.

    `agreement` (0 to 1): how often the draft's first choice is the target's, along the target's own greedy text;
    measured, and set by bisection unless it is the default. `scale` sets the number behind it directly. `share`: the
    draft's tensors are the target's own; False copies them, as a real draft has its own bytes to read. Raises
    `InputError` for an unknown preset, for both numbers at once and for an agreement that cannot be reached.
    """
    if isinstance(shape, str):
        if shape not in PRESETS:
            raise InputError(f"no preset is called {shape!r}; there are: {', '.join(PRESETS)}")
        shape = PRESETS[shape]
    if agreement is not None and scale is not None:
        raise InputError("give agreement or scale, not both: one sets the other")
    if shape.vocab_size <= NUM_SPECIAL + 1 or not 0 < shape.draft_layers < shape.num_layers:
        raise InputError(
            f"a pair needs more than {NUM_SPECIAL + 1} pieces, and a draft of at least one layer and fewer than the "
            f"target's {shape.num_layers}"
        )
    if agreement is not None and (agreement != DEFAULT_AGREEMENT or seed != 0):
        scale = calibrate(shape, agreement, seed=seed, device=device, progress=progress)
    scale = shape.scale if scale is None else scale
    target = _empty(shape.config(shape.num_layers), device, dtype)
    _fill(target, shape, scale, seed)
    return Pair(target, _cut(target, shape, share), make_tokenizer(shape.vocab_size), shape, scale, seed)


def _cut(target: Any, shape: Shape, share: bool) -> Any:
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = shape.draft_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: shape.draft_layers]
    with torch.device("meta"):
        draft = type(target)(config)
    weights = target.state_dict()
    draft.load_state_dict({k: weights[k] if share else weights[k].clone() for k in draft.state_dict()}, assign=True)
    draft.model.rotary_emb = type(draft.model.rotary_emb)(config=config).to(target.device)
    return draft.eval().requires_grad_(False)


def make_prompts(shape: Shape, number: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids; the same for the same numbers."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    rows: list[list[int]] = torch.randint(NUM_SPECIAL, shape.vocab_size, (number, length), generator=generator).tolist()
    return rows


@torch.inference_mode()
def greedy_texts(target: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """`[B, T]` prompts of equal length and the target's own continuations."""
    ids_BT = torch.tensor([list(prompt) for prompt in prompts], device=target.device)
    out: Tensor = target.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out


@torch.inference_mode()
def measure_agreement(
    target: Any, draft: Any, prompts: Sequence[Sequence[int]], num_tokens: int = 64
) -> tuple[float, float]:
    """Share of the target's greedy tokens that the draft would choose too, and the texts' share of distinct 4-grams."""
    texts_BT = greedy_texts(target, prompts, num_tokens)
    length = texts_BT.shape[1] - num_tokens
    new = texts_BT[:, length:]
    chosen = draft(texts_BT[:, :-1], use_cache=False, logits_to_keep=num_tokens).logits.argmax(-1)
    return float((chosen == new).float().mean()), distinct_share(new.tolist())


def distinct_share(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """Distinct n-grams over all n-grams, by text; the smallest of them. 1: nothing repeats."""
    shares = []
    for text in texts:
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        shares.append(len(set(grams)) / max(len(grams), 1))
    return min(shares, default=1.0)


@torch.inference_mode(False)
@torch.no_grad()
def calibrate(
    shape: Shape,
    agreement: float,
    *,
    seed: int = 0,
    num_texts: int = 16,
    num_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    tolerance: float = _SEARCH_TOLERANCE,
    progress: Callable[[str], None] | None = None,
) -> float:
    """The scale that gives this greedy agreement, by bisection on measured texts.

    Raises `InputError` for a value outside (0, 1), and when the search ends more than five tolerances away.
    """
    if not 0 < agreement < 1:
        raise InputError(f"agreement is a share between 0 and 1, without its ends, not {agreement}")
    pair = make_pair(replace(shape, scale=_MAX_SCALE), scale=_MAX_SCALE, seed=seed, dtype=dtype, device=device)
    prompts = make_prompts(shape, num_texts, 32, seed)
    originals = {n: p.detach().clone() for n, p in pair.target.named_parameters() if p.ndim == 2 and _later(n, shape)}
    parameters = dict(pair.target.named_parameters())
    low, high, best = 0.0, _MAX_SCALE, (float("inf"), _MAX_SCALE, 0.0)
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        for name, original in originals.items():
            parameters[name].copy_(original * (middle / _MAX_SCALE))
        measured, distinct = measure_agreement(pair.target, pair.draft, prompts, num_tokens)
        if progress is not None:
            progress(f"scale {middle:.4f}: agreement {measured:.3f}, distinct 4-grams {distinct:.2f}")
        best = min(best, (abs(measured - agreement), middle, measured))
        if best[0] <= tolerance:
            break
        low, high = (middle, high) if measured > agreement else (low, middle)
    if best[0] > 5 * tolerance:
        raise InputError(
            f"no scale gives these sizes an agreement of {agreement}; the nearest found is {best[2]:.3f}: use a larger "
            "vocabulary or hidden size, or another agreement"
        )
    return best[1]
