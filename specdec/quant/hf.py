"""Stored weights in `transformers`: a quantiser for `from_pretrained` and `save_pretrained`, registered on import.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from specdec.errors import InputError
from specdec.quant.blocks import ELEMENTS
from specdec.quant.delta_layout import gaps_of
from specdec.quant.delta_loading import Expanding
from specdec.quant.format import parse
from specdec.quant.layers import candidates
from specdec.quant.linear import PREFIX, PackedLinear
from specdec.quant.recipe import Recipe
from specdec.quant.swap import Swapped, check_files, finish, swap

#: What `quantization_config["quant_method"]` says in the configuration of a model with stored weights.
METHOD = "specdec"


@register_quantization_config(METHOD)
class QuantConfig(QuantizationConfigMixin):
    """`AutoModelForCausalLM.from_pretrained(path, quantization_config=QuantConfig("w4a16"))`.

    `recipe`: whatever `Recipe.of` takes: a format, a named recipe, a JSON file, a dictionary. Weights are rounded while
    they are read, one tensor at a time, from the precision of the files; methods that look at activations need
    `specdec quantize`. `save_pretrained` writes the stored weights, and reading them again rounds nothing. Rounding
    needs no dtype: the same files give the same stored weights in a float32, a bfloat16 and a float16 model.

    `storage`: of folders whose pruned weights lie in delta-CSC (`specdec.quant.delta_model`); they run, and are saved
    again, as the recipe says.

    Lossless: the weights are rounded, once; what is decoded from them speculatively is what plain decoding gives.
    Raises `InputError` for unknown recipes.
    """

    def __init__(self, recipe: Any, quant_method: str = METHOD, storage: Any = None):
        if quant_method != METHOD:
            raise InputError(f"quant_method is {METHOD!r} for this configuration, not {quant_method!r}")
        self.quant_method = METHOD
        self.recipe = Recipe.of(recipe)
        self.gaps, self.storage = gaps_of({"storage": storage}), storage

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        unknown = sorted(set(config_dict) - {"recipe", "quant_method", "storage"})
        if unknown or "recipe" not in config_dict:
            problem = f"has {', '.join(unknown)}, which is unknown here" if unknown else "has no recipe"
            raise InputError(f"the quantization_config of this model {problem}; it holds quant_method and recipe")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        content = {"quant_method": self.quant_method, "recipe": self.recipe.to_dict()}
        return content if self.storage is None else {**content, "storage": self.storage}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


def _of_family(maker: str, format: str, families: Sequence[str], changes: Mapping[str, Any]) -> QuantConfig:
    name = parse(format).name
    if name.split("-")[0] not in families:
        raise InputError(f"{maker} takes one of {', '.join(families)}, not {format!r}; QuantConfig takes any format")
    return QuantConfig({**Recipe.of(name).to_dict(), **changes} if changes else name)


def MXConfig(format: str = "mxfp6_e2m3", **recipe: Any) -> QuantConfig:
    """OCP Microscaling weights: "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", … `recipe`: other fields of a `Recipe`."""
    return _of_family("MXConfig", format, sorted(ELEMENTS), recipe)


def IntConfig(format: str = "int8", **recipe: Any) -> QuantConfig:
    """Integer weights: "int8", "int4", "int4-g64-asym", … `recipe`: other fields of a `Recipe`, such as `head`."""
    return _of_family("IntConfig", format, ("int4", "int8"), recipe)


def SparseConfig(format: str = "sparse", **recipe: Any) -> QuantConfig:
    """Pruned weights by magnitude: "sparse-60", "sparse-2x4", … `recipe`: other fields of a `Recipe`."""
    return _of_family("SparseConfig", format, ("sparse",), recipe)


class _Round(ConversionOps):
    """What becomes of a weight that has just been read."""

    def __init__(self, quantizer: SpecdecQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        model, missing = kwargs["model"], kwargs.get("missing_keys") or set()
        made: dict[str, Tensor] = {}
        for name, given in input_dict.items():
            made.update(self.quantizer.rounded(model, name, given[0] if isinstance(given, list) else given, missing))
        return made


@register_quantizer(METHOD)
class SpecdecQuantizer(HfQuantizer):
    """Puts `PackedLinear` in place of linear layers before the weights are read, and rounds them as they come."""

    requires_calibration = False
    quantization_config: QuantConfig

    def __init__(self, quantization_config: QuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._swapped: Swapped | None = None  # while the model is being loaded
        self._failure: InputError | None = None
        self._expanding: Expanding | None = None  # of layers that lie in delta-CSC

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        method = self.quantization_config.recipe.method
        if method != "rtn" and not self.pre_quantized:
            raise InputError(
                f"{method} looks at the model's activations on some text, which is not there while weights are read: "
                "run specdec quantize, and load the folder that it writes"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        self._swapped = swap(model, self.quantization_config.recipe, waiting=not self.pre_quantized)
        self._failure = None
        if self.pre_quantized:
            self._expanding = Expanding(model, self.quantization_config.gaps)
            check_files(model, checkpoint_files, self._swapped, self._expanding)

    def get_weight_conversions(self) -> list[Any]:
        return self._expanding.converters if self._expanding is not None else []

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and self._swapped is not None and param_name in self._swapped.sources

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        # A weight that will be rounded takes no room: its parts are counted by themselves.
        waits = self._swapped is not None and param_name in self._swapped.weights and not self.pre_quantized
        return 0.0 if waits else float(param.element_size())

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        names = set(converter.target_patterns)
        if self._swapped is not None and names & self._swapped.stored.keys():
            return None  # stored as it is, whatever the model's dtype
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def get_quantize_ops(self) -> _Round:
        return _Round(self)

    def rounded(self, model: Any, name: str, value: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """Tensors by name that the model holds in place of `value`; blank ones once something went wrong.

        What goes wrong is raised when all is read, since `transformers` turns errors in between into a report.
        """
        assert self._swapped is not None
        made: dict[str, Tensor] | None = None
        if self._failure is None:
            try:
                made = self._swapped.made_of(model, name, value)
            except InputError as error:
                self._failure = error
        if made is None:
            made = self._swapped.blank(model, name, value)
        missing -= {name, self._swapped.tied.get(name, name)}
        return made

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        swapped, self._swapped = self._swapped, None
        expanding, self._expanding = self._expanding, None
        if self._failure is not None:
            raise self._failure
        if expanding is not None:
            expanding.done(model)
            self.quantization_config.gaps, self.quantization_config.storage = {}, None
        if swapped is not None:
            finish(model, swapped)
            _check_values(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in packed_layers(model):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(layer.weight_in(dtype or model.dtype), requires_grad=False)
            plain.register_parameter("bias", layer.bias)
            model.set_submodule(name, plain)
        return model


def packed_layers(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def _check_values(model: nn.Module) -> None:
    """`InputError` that names the layer whose stored tensors are not what its format stores."""
    for name, layer in packed_layers(model):
        with align_module_device(layer):
            try:
                layer.format.check(layer.parts, layer.out_features, layer.in_features)
            except InputError as error:
                raise InputError(f"{name}.{PREFIX}*: {error}") from error


def is_ours(model: Any) -> bool:
    """Whether the weights of a loaded model are stored by this library."""
    return isinstance(getattr(model, "hf_quantizer", None), SpecdecQuantizer)


def empty_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of this class without its weights, made from its configuration, with the layers that it says are packed.

    Nothing is initialised where the caller is in `no_init_weights`.
    """
    return with_empty_layers(kind._from_config(config, dtype=dtype).eval())


def with_empty_layers(model: Any) -> Any:
    """The model itself, with packed layers that hold nothing where its configuration says that layers are packed."""
    given = getattr(model.config, "quantization_config", None)
    if given is None:
        return model
    quant = given if isinstance(given, QuantConfig) else QuantConfig.from_dict(given)
    found = candidates(model)
    for name, format in quant.recipe.assign(found).items():
        layer, (N, K) = model.get_submodule(name), found.shapes[name]
        model.set_submodule(name, PackedLinear(format, K, N, layer.bias, device=layer.weight.device))
    return model
