"""Loading models, tokenizers and drafters by name. Safetensors only; remote code only when asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from specdec import registry
from specdec.drafter import BuildContext, Drafter
from specdec.dtypes import dtype_name
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.export.manifest import is_artifact
from specdec.quant.hf import METHOD, QuantConfig, is_ours
from specdec.quant.recipe import Recipe

EMBEDDED = Path(__file__).parent / "pair"
# Where a drafter's own configuration says what it is.
DRAFTER_KEY = "specdec_drafter"
_TOKENIZER_FILES = ("token*", "vocab*", "*.model", "*.tiktoken", "merges.txt")
_MODEL = "model"  # what drafts with a whole model
# A published head may call itself a model of as many layers at most: only its weights tell.
_HEAD_LAYERS = 4
# Of a head on the hub: no code, and pickled weights only where there are no others.
_HEAD_FILES, _PICKLED = ["*.json", "*.safetensors", "tokenizer*", "mask_embedding.pt"], ["*.bin", "*.pt"]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    """None: float32 on CPU, where half precision changes texts with the draft length; else the checkpoint's own."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise InputError(f"no dtype is called {dtype!r}; try 'float32', 'bfloat16' or 'float16'")
        return found
    return dtype


def stored_dtype(source: str | Path, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a checkpoint names in its configuration; float32 when it names none."""
    try:
        named = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code).dtype
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot load a model from {source}: {str(error).splitlines()[0]}") from error
    return named if isinstance(named, torch.dtype) else torch.float32


def quantisation_of(source: str | Path, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """What the configuration of a model says of stored weights, ours or another library's; None for full weights."""
    try:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # loading the model says what is wrong
        return None
    found = getattr(config, "quantization_config", None)
    return dict(found) if found is not None else None


def _quantisation(source: str | Path, quantize: Any, trust_remote_code: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` for weights that are, or are to be, stored in fewer bits."""
    if quantize is None and "device_map" not in kwargs:
        return {}
    found = quantisation_of(source, trust_remote_code)
    ours = found is not None and found.get("quant_method") == METHOD
    # Stored weights are buffers, which accelerate leaves in memory unless told not to.
    more = {"offload_buffers": True} if "device_map" in kwargs and (ours or quantize is not None) else {}
    if quantize is None:
        return more
    if kwargs.get("quantization_config") is not None:
        raise InputError("quantize= and quantization_config= say the same in two ways; give one of them")
    recipe = Recipe.of(quantize)
    if found is None:
        return {**more, "quantization_config": QuantConfig(recipe)}
    if ours and QuantConfig.from_dict(found).recipe == recipe:
        return more
    name = QuantConfig.from_dict(found).recipe.name if ours else found.get("quant_method", "another library")
    raise InputError(
        f"the weights of {source} are stored already ({name or 'by a recipe of its own'}): leave quantize out, or "
        "start from the full-precision model"
    )


def load_model(
    source: str | Path,
    *,
    device: Any = None,
    dtype: Any = None,
    quantize: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal LM from a folder or hub id, in evaluation mode; of an artefact what stands for it.

    `quantize`: whatever `Recipe.of` takes.

    Raises `UnsupportedModelError` for weights that are pickled, damaged or incomplete, and for stored weights of a
    library that is not installed.
    """
    if is_artifact(source):
        return _open_artifact(source, device, dtype, quantize, kwargs)
    device = torch.device(device) if device is not None else default_device()
    kwargs = {**_quantisation(source, quantize, trust_remote_code, kwargs), **kwargs}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=choose_dtype(dtype, device),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        folder = Path(source)
        pickled = any(path.suffix in (".bin", ".pt", ".pth") for path in folder.glob("*"))
        if pickled and not any(folder.glob("*.safetensors")):
            raise UnsupportedModelError(
                f"{source} has pickled weights only, which can run code when read; convert it once with "
                "model.save_pretrained(folder), which writes safetensors"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            first += "; it is a library that the model needs and that is not installed"
        raise UnsupportedModelError(f"cannot load a model from {source}: {first}") from error
    missing = sorted(report["missing_keys"])
    if missing and (getattr(model, "hf_quantizer", None) is None or is_ours(model)):
        # transformers would go on with random values in their place.
        raise UnsupportedModelError(
            f"cannot load a model from {source}: its files lack {len(missing)} of the weights, for example {missing[0]}"
        )
    if "device_map" not in kwargs:
        model = model.to(device)
    return model.eval()


def _open_artifact(source: str | Path, device: Any, dtype: Any, quantize: Any, options: dict[str, Any]) -> Any:
    """What was exported, in place of a model; `options` go to its backend. `InputError` for what export has settled."""
    from specdec.export.artifact import ArtifactModel  # seldom needed

    if quantize is not None:
        raise InputError(f"{source} is an artefact: its weights are stored as they were exported; leave quantize out")
    model = ArtifactModel.open(source, **options)
    wanted = choose_dtype(dtype, model.device)
    if wanted not in ("auto", model.dtype) or torch.device(device or "cpu").type != "cpu":
        raise InputError(
            f"{source} is an artefact for {dtype_name(model.dtype)} on the CPU; leave dtype and device out"
        )
    return model


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that stands beside the weights, or None when there is none."""
    folder = Path(source)
    if folder.is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        # transformers would make an empty one of the model's kind.
        return None
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None


def check_same_tokenizer(target: Any, draft: Any, source: str = "org/model") -> None:
    """Raise `IncompatiblePairError` unless both tokenizers give the same ids; sizes may differ by padding."""
    if target is None or draft is None:
        return
    a, b = target.get_vocab(), draft.get_vocab()
    differing = [piece for piece in a.keys() & b.keys() if a[piece] != b[piece]]
    by_id = {i: piece for piece, i in b.items()}
    clashing = [piece for piece, i in a.items() if i in by_id and by_id[i] != piece]
    if not differing and not clashing:
        probe = "def f(x):\n    return 'Größe 你好 🙂' + str(x - 1_000)  # 3.14  two  spaces\n"
        if target(probe)["input_ids"] == draft(probe)["input_ids"]:
            return
    example = f" (for example {differing[0]!r})" if differing else ""
    raise IncompatiblePairError(
        f"target and draft have different tokenizers{example}: a drafted id would mean another text. "
        "Choose a draft of the same family; or let this one draft across vocabularies: drafter='cross_vocab' with "
        f"drafter_options={{'draft': {source!r}}} (--drafter cross_vocab --drafter-option draft={source}); or a "
        "drafter without weights: drafter='ngram' or 'suffix'"
    )


def _folder_config(source: str) -> dict[str, Any]:
    path = Path(source) / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _drafter_of(source: str) -> str:
    """The drafter whose weights a folder holds: the one that it names, that knows its layout, or a whole model."""
    config = _folder_config(source)
    if DRAFTER_KEY in config:
        return str(config[DRAFTER_KEY])
    if config:
        for name in registry.available("drafter"):
            if registry.find("drafter", name).recognises(config, Path(source)):
                return name
    return _MODEL


def _from_hub(source: str) -> tuple[str, str]:
    """The drafter whose weights a hub id stands for, and their place: the id itself for a whole model, else a folder.

    Only the configuration is downloaded to find out, and where that leaves it open, the weights of a few layers.
    Raises `UnsupportedModelError` when a head's files cannot be had.
    """
    try:
        found = cached_file(source, "config.json")
    except (OSError, ValueError):  # nobody there, or no network: loading the model says which
        found = None
    if found is None:
        return _MODEL, source
    folder = str(Path(found).parent)
    layers = _folder_config(folder).get("num_hidden_layers")
    if _drafter_of(folder) == _MODEL and not (isinstance(layers, int) and layers <= _HEAD_LAYERS):
        return _MODEL, source
    try:
        folder = snapshot_download(source, allow_patterns=_HEAD_FILES, ignore_patterns=["*/*"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(source, allow_patterns=[*_HEAD_FILES, *_PICKLED], ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"cannot download the drafter {source}: {first}. Download its files where there is a network, and give "
            "their folder"
        ) from error
    drafter = _drafter_of(folder)
    return drafter, source if drafter == _MODEL else folder


def resolve_drafter(drafter: Any, context: BuildContext, **options: Any) -> Drafter:
    """`drafter`: a plugin's name, a folder or hub id of weights, a loaded model, a `Drafter`, or None.

    Weights may be those of a whole model, or of a head in any layout that a drafter recognises. Raises `InputError` for
    options of a drafter that is made already.
    """
    made = "made" if isinstance(drafter, Drafter) else "loaded" if isinstance(drafter, torch.nn.Module) else None
    if made and context.quantize is not None:
        raise InputError(
            f"the draft is {made} already: load its model with quantization_config=specdec.QuantConfig(...), or name it"
        )
    if isinstance(drafter, Drafter):
        if options:
            raise InputError(
                f"the {drafter.name} drafter is made already: give it {', '.join(sorted(options))} when you make it, "
                "or name the drafter"
            )
        return drafter
    if isinstance(drafter, torch.nn.Module):
        inherited = {"backend": context.backend, "kv_cache": context.kv_cache}
        wrapped: Drafter = registry.find("drafter", _MODEL)(drafter, **{**inherited, **options})
        return wrapped
    if drafter is None:
        drafter = "none"
    name = str(drafter)
    if name in registry.available("drafter"):
        own = EMBEDDED / "draft" if name == _MODEL else EMBEDDED / name
        source = str(own) if context.target_source == str(EMBEDDED / "target") and own.is_dir() else None
        plugin = registry.find("drafter", name)
    elif Path(name).is_dir() or "/" in name:
        kind, source = (_drafter_of(name), name) if Path(name).is_dir() else _from_hub(name)
        plugin = registry.find("drafter", kind)
    else:
        registry.find("drafter", name)  # raises, with the nearest names
        raise AssertionError("unreachable")
    if context.quantize is not None and not plugin.quantizes:
        raise InputError(
            f"the {name} drafter loads no whole model whose weights could be stored in fewer bits; leave "
            "draft_quantize (--draft-quantize) out, or let a model draft"
        )
    if source is not None:
        check_same_tokenizer(context.tokenizer, load_tokenizer(source, context.trust_remote_code), source)
    built: Drafter = plugin.build(replace(context, source=source), **options)
    return built
