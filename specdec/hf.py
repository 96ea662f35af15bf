"""Drop-in for `transformers`: `model.generate(**inputs, custom_generate=specdec.hf.speculate(drafter=...))`.

`generate` prepares everything as always (prompt, logits processors, stopping criteria, generation config) and then
calls this instead of its own loop. What the configuration asks for is honoured, or refused before work starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from specdec.api import SpeculativeDecoder
from specdec.decoder import Task
from specdec.drafter import Drafter, Outcome
from specdec.errors import InputError
from specdec.generation import Stream
from specdec.policy import Policy
from specdec.sampling import Sampling
from specdec.text import Chunk, Ending
from specdec.trace import Stats
from specdec.verifier import Verifier

# What `generate` hands to every decoding method; anything else is an input of the model that no session carries.
_KNOWN_KWARGS = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})
# Other layouts of the same keys and values give the same tokens, and specdec has its own preallocated one.
_SAME_TOKENS_CACHES = frozenset({None, "dynamic", "static", "hybrid", "hybrid_chunked", "sliding_window"})
# These keep a state from call to call, so that trying a token and taking it back would change what follows.
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_REFUSED = {
    "output_attentions": "attention weights are not kept",
    "output_hidden_states": "hidden states are not kept",
    "compile_config": "the step runs on specdec's own backend",
    "prefill_chunk_size": "prefill runs in specdec's own chunks",
    "remove_invalid_values": "NaN logits end the text with an error that names the position",
    "low_memory": "it does nothing here",
    "assistant_ensemble_weight": "it changes the distribution",
    "speculation_type": "speculate(drafter=...) says what drafts",
}


def speculate(
    drafter: Drafter | Any = "ngram",
    *,
    verifier: Verifier | str | None = None,
    policy: Policy | str | None = None,
    tokenizer: Any = None,
    stop_strings: str | Sequence[str] = (),
    streamer: Any = None,
    backend: str = "eager",
    kv_cache: str | None = None,
    exact: bool = False,
    strict: bool = False,
    allow_lossy: bool = False,
    stats: Callable[[Stats], None] | None = None,
) -> Speculation:
    """A callable for `custom_generate=`: the same tokens as plain `generate`, sooner.

    ```python
    draft = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    faster = specdec.hf.speculate(drafter=draft, stats=print)
    model.generate(**inputs, max_new_tokens=200, custom_generate=faster)
    ```
    `drafter`: a loaded draft model, a plugin's name ("ngram", "suffix": no weights needed), a folder, a hub id or a
    `Drafter`; None decodes plainly. `verifier`, `policy`, `backend`, `exact`, `strict`, `allow_lossy`: as for
    `SpeculativeDecoder`; `kv_cache` too, with which the tokens are those of plain decoding on such a cache. `stats` is
    called with the `Stats` of each text. Keep the callable: the drafter and the runtime are built at the first call for
    a model and reused.

    `generate` drops `streamer`, `tokenizer` and `assistant_model` on the way to a callable. Give `streamer=` and
    `stop_strings=` with `tokenizer=` here; the two others that reach `generate` are refused.

    Input ids int64 `[1, S]`; returns `[1, S + new]`, or a `GenerateDecoderOnlyOutput` (sequences, scores, logits;
    `past_key_values` is None) with return_dict_in_generate. Stopping criteria are asked after every token, and
    tokens behind a stop are cut. Processors must be functions of (ids, scores), and draft tokens go through them too.

    Lossless: yes. Greedy: the same tokens as `generate` (in half precision up to rounding, see `exact`). With
    do_sample: the same distribution, not the same tokens, since `generate` draws its random numbers in another way;
    the seed comes from torch's global generator, so that `set_seed` makes a text reproducible.
    Raises `InputError` before any work for batches, beams, padding, `inputs_embeds`, caches with a content, or an
    option that it could not honour.
    """
    if stop_strings and tokenizer is None:
        raise InputError("stop_strings need a tokenizer; pass tokenizer= beside them")
    options = dict(
        verifier=verifier,
        policy=policy,
        tokenizer=tokenizer,
        backend=backend,
        kv_cache=kv_cache,
        allow_lossy=allow_lossy,
    )
    stops = StoppingCriteriaList()
    if stop_strings:
        texts = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        stops.append(StopStringCriteria(tokenizer, texts))
    return Speculation(drafter, options, stops, streamer, exact=exact, strict=strict, stats=stats)


class Speculation:
    """What `speculate` returns. Called by `generate` only."""

    def __init__(
        self,
        drafter: Any,
        options: dict[str, Any],
        stops: StoppingCriteriaList,
        streamer: Any,
        *,
        exact: bool,
        strict: bool,
        stats: Callable[[Stats], None] | None,
    ):
        self._drafter, self._options, self._stops, self._streamer = drafter, options, stops, streamer
        self._exact, self._strict, self._stats = exact, strict, stats
        self._decoders: dict[tuple[Any, ...], SpeculativeDecoder] = {}

    def decoder(self, model: Any) -> SpeculativeDecoder:
        """The decoder around `model`: built once, and again after the model moved or changed its type."""
        attention = model.config._attn_implementation
        key = (id(model), model.device, model.dtype, model.training, attention)
        if key not in self._decoders:
            self._decoders[key] = SpeculativeDecoder(model, drafter=self._drafter, **self._options)
        return self._decoders[key]

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        config = generation_config
        _refuse_dropped(_arguments_of_generate())
        _refuse_config(config, logits_processor)
        _refuse_inputs(input_ids, model_kwargs)
        decoder = self.decoder(model)
        task, ending = self._task(decoder, input_ids, logits_processor, stopping_criteria, config)
        if self._streamer is not None:
            self._streamer.put(input_ids.cpu())
        try:
            for chunk in Stream(task):
                if self._streamer is not None:
                    for token in chunk.tokens:
                        self._streamer.put(torch.tensor([token]))
        finally:
            if self._streamer is not None:
                self._streamer.end()
        if self._stats is not None:
            self._stats(task.trace.stats)
        sequences = torch.cat((input_ids, torch.tensor([ending.tokens]).to(input_ids)), -1)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(ending.scores) if config.output_scores else None,
            logits=tuple(ending.raw_logits) if config.output_logits else None,
        )

    def _task(
        self,
        decoder: SpeculativeDecoder,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> tuple[Task, _Ending]:
        context = decoder.backend.capabilities.context
        if config.max_length > context:
            raise InputError(
                f"prompt and text may reach {config.max_length} tokens and the model's context is {context}; "
                f"lower max_new_tokens to {context - input_ids.shape[1]} or less"
            )
        room = config.max_length - input_ids.shape[1]
        # generate() works on float32 scores whatever the model's type.
        exact_type = decoder.backend.capabilities.dtype != torch.float64
        seen = () if exact_type and not processors else (_RowByRow(processors),)
        seed = int(torch.randint(1 << 62, ())) if config.do_sample else 0
        sampling = Sampling(float(bool(config.do_sample)), processors=seen, seed=seed)
        eos = config._eos_token_tensor
        task = decoder.prepare(
            input_ids[0],
            max_new_tokens=room,
            sampling=sampling,
            eos_token_id=() if eos is None else eos.flatten().tolist(),
            exact=self._exact,
            strict=self._strict,
        )
        scores = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        ending = _Ending(task, input_ids, room, StoppingCriteriaList([*criteria, *self._stops]), scores)
        return replace(task, ending=ending), ending


class _RowByRow(LogitsProcessor):
    """`generate`'s processors, for one sequence at a time: some take a row's number for the prompt's."""

    def __init__(self, processors: LogitsProcessorList):
        self.processors = processors

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [self.processors(input_ids[r : r + 1], scores[r : r + 1].float()) for r in range(len(scores))]
        return torch.cat(rows)


class _Ending(Ending):
    """Ends the text where `generate`'s stopping criteria do, and keeps the scores of emitted tokens on request."""

    def __init__(
        self, task: Task, input_ids: Tensor, room: int, criteria: StoppingCriteriaList, keep_scores: bool
    ) -> None:
        self._criteria, self._keep_scores, self._sampling = criteria, keep_scores, task.request.sampling
        self._ids = torch.empty(1, input_ids.shape[1] + room, dtype=input_ids.dtype, device=input_ids.device)
        self._ids[:, : input_ids.shape[1]] = input_ids
        self.scores: list[Tensor] = []
        self.raw_logits: list[Tensor] = []
        self._fresh: Iterator[tuple[Tensor, Tensor]] = iter(())
        super().__init__(task.request, None, room)

    def _check_room(self) -> None:
        super()._check_room()
        if not self.tokens:
            return
        if self._keep_scores:
            score, logits = next(self._fresh)
            self.scores.append(score[None])
            self.raw_logits.append(logits[None])
        length = len(self.request.prompt) + len(self.tokens)
        self._ids[0, length - 1] = self.tokens[-1]
        # Asked for every token, also the last one: a criterion may count.
        done = self._criteria(self._ids[:, :length], tuple(self.scores) if self._keep_scores else None)
        if bool(done.all()) and self.reason is None:
            self.reason = "stop"

    def cut(self, outcome: Outcome, drafter: str, logprobs: Sequence[float] | None = None) -> Chunk:
        if self._keep_scores:
            nodes = (-1, *outcome.path)[: len(outcome.tokens)]
            logits = outcome.logits[[node + 1 for node in nodes]].float().clone()
            prefix = [*self.request.prompt, *self.tokens]
            scores = self._sampling.scores(logits, prefix, outcome.proposal.tree, nodes).float()
            self._fresh = iter(zip(scores, logits, strict=True))
        return super().cut(outcome, drafter, logprobs)


def _arguments_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` call that we run in: it drops some of them without a word."""
    frame = inspect.currentframe()
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    while frame is not None and frame.f_code is not generate:
        frame = frame.f_back
    return dict(frame.f_locals) if frame is not None else {}


def _refuse_dropped(arguments: dict[str, Any]) -> None:
    for name, advice in (
        ("streamer", "give it to speculate(streamer=...)"),
        ("assistant_model", "give it to speculate(drafter=...)"),
    ):
        if arguments.get(name) is not None:
            raise InputError(f"generate() drops {name}= before it calls custom_generate; {advice} instead")


def _refuse_config(config: GenerationConfig, processors: LogitsProcessorList) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"the generation config asks for {mode.value.replace('_', ' ')}; speculative decoding covers greedy "
            "search and sampling: set num_beams=1 and leave out assisted and contrastive options"
        )
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise InputError(f"{name} cannot be honoured: {reason}; leave it out")
    if config.use_cache is False:
        raise InputError("use_cache=False cannot be honoured: every step works on cached keys and values")
    if config.cache_implementation not in _SAME_TOKENS_CACHES:
        raise InputError(
            f"cache_implementation={config.cache_implementation!r} cannot be honoured: keys and values lie in "
            "specdec's own cache, which is neither quantised nor offloaded; leave it out"
        )
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise InputError(
                f"{type(processor).__name__} keeps a state from token to token, which cannot be taken back when a "
                "drafted token is rejected; leave it out"
            )


def _refuse_inputs(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    rows, length = input_ids.shape
    if rows != 1:
        raise InputError(
            f"{rows} sequences at once (prompts times num_return_sequences); call generate once per sequence"
        )
    if length == 0:
        raise InputError("inputs_embeds without input_ids cannot be decoded; pass input_ids")
    unknown = sorted(k for k, v in model_kwargs.items() if v is not None and k not in _KNOWN_KWARGS)
    if unknown:
        raise InputError(f"these inputs of the model cannot be carried along: {', '.join(unknown)}; leave them out")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise InputError(
            "the attention mask hides some of the prompt (padding, or a pad token inside it); pass the prompt "
            "without padding"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.flatten().tolist() != list(range(length)):
        raise InputError("position_ids other than 0, 1, 2, ... cannot be honoured; leave them out")
    cache = model_kwargs.get("past_key_values")
    if getattr(cache, "_is_user_defined", False):
        raise InputError("past_key_values cannot be honoured: keys and values lie in specdec's own cache")
