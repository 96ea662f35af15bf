"""Models of a sweep, each loaded once: a target, its drafters, and prompts as the target reads them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from specdec import registry
from specdec.api import SpeculativeDecoder
from specdec.bench.acceptance import PlainTexts
from specdec.bench.forks import PromptForks
from specdec.bench.prompt_sets import Encoded, Selection
from specdec.bench.prompts import PromptSet
from specdec.drafter import BuildContext
from specdec.errors import InputError
from specdec.loading import EMBEDDED as SHIPPED
from specdec.loading import load_model, load_tokenizer, resolve_drafter, stored_dtype
from specdec.policy import Policy
from specdec.runtime.choose import fastest_dtype
from specdec.sweep.quality import prompt_loss
from specdec.sweep.setting import BUILT_IN, EMBEDDED, Setting, canonical

if TYPE_CHECKING:
    from specdec.chat import Chat

# Fields that make a target, and those that make a decoder of it.
_TARGET = ("target", "quantize", "dtype", "device")
_DECODER = ("backend", "numerics", "kv_cache", "draft", "drafter", "drafter_options", "draft_quantize")
_TEXT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_new_tokens", "exact")
_PROMPTS = ("prompt_set", "limit", "limit_per_category", "turns", "truncate", "chat")


def quantizes(name: str) -> bool:
    """Whether the drafter of that name may load a model whose weights can be stored in fewer bits."""
    if name not in registry.available("drafter"):
        return True  # a folder or hub id: what it is shows when it is loaded
    return bool(registry.find("drafter", name).quantizes)


def build_policy(setting: Setting) -> Policy:
    """Raises `InputError` for options that the policy does not take."""
    options = dict(setting.policy_options)
    if setting.tree is not None:
        options.update(k=len(setting.tree), branching=setting.tree)
    elif setting.k is not None:
        options["k"] = setting.k
    try:
        policy: Policy = registry.create("policy", setting.policy, **options)
    except TypeError as error:
        raise InputError(f"the {setting.policy} policy refuses its options: {error}") from error
    return policy


def text_options(setting: Setting) -> dict[str, Any]:
    """What `generate` is given."""
    return {name: getattr(setting, name) for name in _TEXT}


@lru_cache(maxsize=64)
def read_prompts(name: str, limit: int | None, per_category: int | None, changed: int) -> PromptSet:
    """`changed`: when the file was, so that a new version is read again."""
    return Selection(None if name == BUILT_IN else name, limit, per_category).read()


class Pool:
    """Decoders by setting. One target is held at a time, with all drafters that were used with it.

    `chat`: how a chat template is filled in, for settings with one. `allow_lossy` admits lossy rules.
    """

    def __init__(
        self, *, allow_lossy: bool = False, chat: Chat | None = None, warm: Callable[[Any], None] | None = None
    ):
        self.allow_lossy, self.chat, self.warm = allow_lossy, chat, warm
        self.num_loads = 0
        self._default_threads = torch.get_num_threads()
        self._target: tuple[str, Any, Any] | None = None  # its key, model and tokenizer
        self._decoders: dict[str, SpeculativeDecoder | InputError] = {}
        self._forks: dict[str, PromptForks] = {}
        self._plain: dict[str, PlainTexts] = {}
        self._encoded: dict[str, list[Encoded]] = {}
        self._quality: dict[str, dict[str, Any] | None] = {}

    def clear(self) -> None:
        """Let go of all models and caches."""
        self._target = None
        for kept in (self._decoders, self._forks, self._plain, self._encoded, self._quality):
            kept.clear()  # type: ignore[attr-defined]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def decoder(self, setting: Setting) -> SpeculativeDecoder:
        """The decoder of a setting, with its rule and policy. Models that are loaded already are used again.

        Raises `InputError` and its kinds for whatever does not fit.
        """
        self._use_threads(setting)
        policy = build_policy(setting)  # refused before anything is loaded
        verifier = registry.create("verifier", setting.verifier)
        twin = copy.copy(self._loaded(setting))
        twin.verifier, twin.policy = verifier, policy
        twin._check_parts(twin.drafter, verifier, policy)
        policy.check(twin.target, twin.drafter)
        return twin

    def forks(self, setting: Setting) -> PromptForks:
        """Where prompts of the setting's decoder are kept; those of the decoder before are let go of."""
        key = _key(setting, _TARGET + _DECODER)
        if key not in self._forks:
            self._forks.clear()
            self._forks[key] = PromptForks()
        return self._forks[key]

    def plain(self, setting: Setting) -> PlainTexts:
        """Plain texts of the setting's target and options, shared by all rules, policies and batches.

        Not by drafters: some have the target run in their own way.
        """
        return self._plain.setdefault(_key(setting, _TARGET + _DECODER + _TEXT), {})

    def prompts(self, setting: Setting, decoder: SpeculativeDecoder) -> list[Encoded]:
        """The setting's prompts as ids. Later turns stand behind plain answers, which the target gives once."""
        key = _key(setting, _TARGET + _TEXT + _PROMPTS)
        if key not in self._encoded:
            found = prompt_set(setting)
            options = {**text_options(setting), "exact": False}
            selection = self._selection(setting)
            self._encoded[key] = selection.encode(decoder, found.prompts, options)
        return self._encoded[key]

    def quality(self, setting: Setting, decoder: SpeculativeDecoder) -> dict[str, Any] | None:
        """What the target makes of the prompts themselves (`prompt_loss`); once for each target."""
        key = _key(setting, _TARGET + _TEXT + _PROMPTS)
        if key not in self._quality:
            prompts = [encoded.ids for encoded in self.prompts(setting, decoder) if encoded.turn == 1]
            self._quality[key] = prompt_loss(decoder.target, prompts)
        return self._quality[key]

    def _selection(self, setting: Setting) -> Selection:
        from specdec.chat import Chat

        chat = (self.chat or Chat()) if setting.chat else None
        return Selection(None, turns=setting.turns, truncate=setting.truncate, chat=chat)

    def num_threads(self, setting: Setting) -> int:
        """CPU threads that the setting's cell is run with."""
        # As the other commands: a second thread slows the embedded pair's small products.
        return setting.threads or (1 if setting.target == EMBEDDED else self._default_threads)

    def _use_threads(self, setting: Setting) -> None:
        torch.set_num_threads(self.num_threads(setting))

    def _loaded(self, setting: Setting) -> SpeculativeDecoder:
        key = _key(setting, _TARGET + _DECODER)
        target, tokenizer, source = self._load_target(setting)
        if key not in self._decoders:
            try:
                self._decoders[key] = self._load(setting, target, tokenizer, source)
            except InputError as error:
                self._decoders[key] = error  # the other cells of this drafter need not try again
        found = self._decoders[key]
        if isinstance(found, InputError):
            raise found
        return found

    def _load_target(self, setting: Setting) -> tuple[Any, Any, str]:
        key = _key(setting, _TARGET)
        source = str(SHIPPED / "target") if setting.target == EMBEDDED else setting.target
        if self._target is None or self._target[0] != key:
            self.clear()
            dtype: Any = setting.dtype
            if dtype == "auto":
                dtype, _ = fastest_dtype(stored_dtype(source), setting.device)
            model = load_model(source, device=setting.device, dtype=dtype, quantize=setting.quantize)
            self.num_loads += 1
            self._target = key, model, load_tokenizer(source)
        return self._target[1], self._target[2], source

    def _load(self, setting: Setting, target: Any, tokenizer: Any, source: str) -> SpeculativeDecoder:
        context = BuildContext(
            target,
            tokenizer,
            device=target.device,
            dtype=target.dtype,
            backend=setting.backend,
            target_source=source,
            kv_cache=setting.kv_cache,
            quantize=setting.draft_quantize,
        )
        try:
            drafter = resolve_drafter(setting.draft or setting.drafter, context, **setting.drafter_options)
        except TypeError as error:
            raise InputError(f"the drafter {setting.drafter} refuses its options: {error}") from error
        decoder = SpeculativeDecoder(
            target,
            tokenizer=tokenizer,
            drafter=drafter,
            backend=setting.backend,
            numerics=setting.numerics,
            allow_lossy=self.allow_lossy,
            prefix_cache=0,
            kv_cache=setting.kv_cache,
        )
        self.num_loads += 1
        if self.warm is not None:
            self.warm(decoder)
        return decoder


def prompt_set(setting: Setting) -> PromptSet:
    """The prompts that the setting names. Raises `InputError` for a file that cannot be read."""
    from pathlib import Path

    path = Path(setting.prompt_set)
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return read_prompts(setting.prompt_set, setting.limit, setting.limit_per_category, changed)


def prompt_contents(setting: Setting) -> list[Mapping[str, Any]]:
    """All that the prompts say, for telling sets apart."""
    return [asdict(prompt) for prompt in prompt_set(setting).prompts]


def _key(setting: Setting, names: tuple[str, ...]) -> str:
    content = setting.as_dict()
    return canonical([content[name] for name in names])
