"""`specdec.load(...)`: a decoder from names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specdec.api import SpeculativeDecoder
from specdec.drafter import BuildContext
from specdec.errors import InputError
from specdec.loading import EMBEDDED, load_model, load_tokenizer, resolve_drafter, stored_dtype
from specdec.policy import Policy
from specdec.runtime.choose import fastest_dtype
from specdec.verifier import Verifier


def load(
    target: Any = None,
    drafter: Any = None,
    *,
    verifier: Verifier | str | None = None,
    policy: Policy | str | None = None,
    device: Any = None,
    dtype: Any = None,
    tokenizer: Any = None,
    backend: str | None = None,
    numerics: str | None = None,
    allow_lossy: bool = False,
    prefix_cache: int | None = None,
    memory_budget: int | None = None,
    kv_cache: str | None = None,
    quantize: Any = None,
    draft_quantize: Any = None,
    trust_remote_code: bool = False,
    drafter_options: Mapping[str, Any] | None = None,
    **model_options: Any,
) -> SpeculativeDecoder:
    """A decoder from names: `load("Qwen/Qwen3-8B", drafter="Qwen/Qwen3-0.6B")`.

    `target`: hub id, local folder or loaded model; None is the embedded pair's target. `drafter`: a plugin's name
    (`model`, `ngram`, …), hub id, folder, loaded model, `Drafter`, or None for plain decoding. `dtype`: None is float32
    on CPU and the checkpoint's own elsewhere; "auto" is the faster of the two here, by a short measurement whose
    outcome is in `decoder.dtype_reason`. `backend`, `numerics`, `kv_cache`: see `open_backend`. `quantize`,
    `draft_quantize`: how the weights of target and draft are stored, by a format ("mxfp6_e2m3", "int4-g64"), a named
    recipe ("w4a16"), a file, a dictionary or a `Recipe`; folders that `specdec quantize` wrote need neither.
    `model_options` go to `from_pretrained` (`device_map`, `quantization_config`, …). Remote code runs only with
    trust_remote_code=True; weights are read from safetensors.

    Lossless: yes, unless allow_lossy=True admits a lossy verifier. A quantised target is another model than the
    full-precision one; its texts are its own plain ones.
    """
    source, reason = None, None
    if target is None:
        target = EMBEDDED / "target"
    if not isinstance(target, torch.nn.Module):
        source = str(target)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code)
        if dtype == "auto":
            dtype, reason = fastest_dtype(stored_dtype(source, trust_remote_code), device)
        target = load_model(
            source, device=device, dtype=dtype, quantize=quantize, trust_remote_code=trust_remote_code, **model_options
        )
    elif quantize is not None:
        raise InputError(
            "the target is a model that is loaded already: load it with quantization_config=specdec.QuantConfig(...), "
            "or give its folder or hub id"
        )
    context = BuildContext(
        target,
        tokenizer,
        device=device if device is not None else target.device,
        dtype=target.dtype,
        backend=backend,
        target_source=source,
        kv_cache=kv_cache,
        quantize=draft_quantize,
        trust_remote_code=trust_remote_code,
    )
    drafter = resolve_drafter(drafter, context, **dict(drafter_options or {}))
    decoder = SpeculativeDecoder(
        target,
        tokenizer=tokenizer,
        drafter=drafter,
        verifier=verifier,
        policy=policy,
        backend=backend,
        numerics=numerics,
        allow_lossy=allow_lossy,
        prefix_cache=prefix_cache,
        memory_budget=memory_budget,
        kv_cache=kv_cache,
    )
    decoder.dtype_reason = reason
    return decoder
