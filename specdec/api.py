"""`SpeculativeDecoder(...)` around loaded models; `specdec.load(...)`, which loads them, is in `specdec.opening`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

from transformers import LogitsProcessor

from specdec import registry
from specdec.batch import MAX_ROWS, Batch
from specdec.decoder import Task
from specdec.drafter import BuildContext, Drafter, Request
from specdec.errors import IncompatiblePairError, InputError, MemoryBudgetError, SpecdecError
from specdec.exact import Redecide, keep
from specdec.experience import Experience
from specdec.generation import Generation, Stream
from specdec.guard import GuardedDrafter
from specdec.loading import resolve_drafter
from specdec.policy import Policy
from specdec.prompting import Prompt, Prompts, encode, eos_ids, fitting_ids, is_several
from specdec.proposal import Draw
from specdec.runtime.choose import open_backend
from specdec.runtime.clock import clock_of
from specdec.runtime.features import Features, capacity
from specdec.runtime.prefix import PrefixCache, default_bytes
from specdec.runtime.session import Session
from specdec.sampling import Sampling
from specdec.text import Ending
from specdec.trace import Trace
from specdec.verifier import Verifier


class SpeculativeDecoder:
    """A target, a drafter, a verifier and a policy on the KV runtime.

    `target`: a loaded causal LM. `drafter`: a `Drafter`, a loaded draft model, a plugin's name, a folder or a hub id;
    None decodes plainly. `verifier` and `policy`: objects or names; by default `coupled` and `throughput`.
    `allow_lossy` is needed for verifiers that change the distribution. `prefix_cache`: bytes in which prefilled prompts
    are kept for prompts that begin alike (None: a few hundred MiB at most; 0: none). `memory_budget`: bytes that all
    keys and values may take, target's, draft's and kept prompts'; a text that cannot fit is refused before it starts.
    `kv_cache`: "int8" or "mxfp8" stores keys and values in a byte each (`specdec.quant.kv`), the draft's too where it
    can; None as they are computed.

    Lossless: yes, unless a lossy verifier was allowed; then `stats.lossless` is False.
    Raises `InputError` (a `ValueError`) and its kinds before any work when something does not fit.
    """

    def __init__(
        self,
        target: Any,
        *,
        tokenizer: Any = None,
        drafter: Drafter | Any = None,
        verifier: Verifier | str | None = None,
        policy: Policy | str | None = None,
        backend: str | None = None,
        numerics: str | None = None,
        allow_lossy: bool = False,
        prefix_cache: int | None = None,
        memory_budget: int | None = None,
        kv_cache: str | None = None,
    ):
        self.target = target
        self.dtype_reason: str | None = None  # why dtype="auto" chose what it chose
        self.tokenizer = tokenizer
        self.backend = open_backend(target, backend, numerics, kv_cache)
        capabilities = self.backend.capabilities
        self.drafter = resolve_drafter(
            drafter,
            BuildContext(
                target,
                tokenizer,
                device=capabilities.device,
                dtype=capabilities.dtype,
                backend=backend,
                kv_cache=kv_cache,
            ),
        )
        self.verifier: Verifier = registry.create("verifier", verifier or "coupled")
        self.policy: Policy = registry.create("policy", policy or "throughput")
        self._check_backend(self.drafter, self.policy.name, shares=self.drafter.shares_target)
        self.backend = self.drafter.target_backend(self.backend, target)
        self.allow_lossy = allow_lossy
        if memory_budget is not None and (not isinstance(memory_budget, int) or memory_budget < 1):
            raise InputError(f"memory_budget is a number of bytes, or None for no limit, not {memory_budget!r}")
        self.memory_budget = memory_budget
        self.prefixes = PrefixCache(default_bytes(capabilities.device) if prefix_cache is None else prefix_cache)
        self.experience = Experience()
        self._check_parts(self.drafter, self.verifier, self.policy)
        self.policy.check(target, self.drafter)
        self.backend.expose(self.drafter.hidden)

    def _check_backend(self, drafter: Drafter, policy: str, **wanted: Any) -> None:
        """Raise when the target's backend lacks what is wanted of it, see `Capabilities.lacks`."""
        lacking = self.backend.capabilities.lacks(**wanted)
        if lacking is not None:
            raise IncompatiblePairError(
                f"the {drafter.name} drafter with policy {policy} wants more than there is: the target's backend "
                f"({self.backend.describes}) {lacking}; use backend='eager', or another drafter or policy"
            )

    def _check_parts(self, drafter: Drafter, verifier: Verifier, policy: Policy) -> Draw:
        if not verifier.lossless and not self.allow_lossy:
            raise InputError(
                f"the {verifier.name} verifier changes the target's distribution; pass allow_lossy=True "
                "(--allow-lossy) if that is what you want, or use verifier='coupled'"
            )
        draw = verifier.choose_draw(drafter.draws)
        if draw is None or (policy.branches and not verifier.trees):
            what = f"draws {sorted(d.value for d in drafter.draws)}" if draw is None else "trees"
            raise IncompatiblePairError(
                f"the {verifier.name} verifier cannot take {what} from the {drafter.name} drafter; "
                f"these can: {', '.join(fitting_verifiers(drafter, policy))}"
            )
        nodes = policy.most_nodes if policy.branches else 0
        self._check_backend(drafter, policy.name, trees=policy.branches, nodes=nodes, hidden=drafter.hidden)
        if policy.branches and not drafter.trees:
            raise IncompatiblePairError(f"the {drafter.name} drafter proposes chains; policy {policy.name} wants trees")
        if drafter.target_backend(self.backend, self.target) is not self.backend:
            raise IncompatiblePairError(
                f"the {drafter.name} drafter runs the target in its own way: give it to the decoder, as in "
                "SpeculativeDecoder(target, drafter=...), not to one text"
            )
        return draw

    def warmup(self) -> None:
        """Compile the steps of target and draft now instead of once it pays; later processes find them compiled.

        Seconds to a minute or two, once per model shape and machine. A failure is one warning, and nothing is lost.
        """
        self.backend.warmup()
        self.drafter.warmup()

    def encode(self, prompt: Prompt) -> list[int]:
        """A string, token ids, a 1-D tensor, or chat messages, as token ids."""
        return encode(prompt, self.tokenizer)

    def prepare(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        processors: Sequence[LogitsProcessor] = (),
        seed: int = 0,
        stop: str | Sequence[str] = (),
        eos_token_id: int | Sequence[int] | None = None,
        logprobs: bool = False,
        exact: bool = False,
        strict: bool = False,
        sampling: Sampling | None = None,
        drafter: Drafter | None = None,
        verifier: Verifier | None = None,
        policy: Policy | None = None,
        reuse_prefix: bool = True,
    ) -> Task:
        """Check everything and gather what one text needs; options as for `generate`."""
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be a whole number >= 1, not {max_new_tokens!r}")
        drafter, verifier, policy = drafter or self.drafter, verifier or self.verifier, policy or self.policy
        if sampling is None:
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, tuple(processors), seed=seed)
        verifier.check_sampling(sampling)
        if exact and not verifier.keeps_seed:
            raise IncompatiblePairError(
                f"exact=True compares with plain decoding of the same seed, which the {verifier.name} verifier does "
                "not keep; use verifier='coupled'"
            )
        ids = fitting_ids(prompt, self.tokenizer, self.backend.capabilities)
        capabilities = self.backend.capabilities
        if drafter.hidden:
            self.backend.expose(drafter.hidden)
        session = Session(self.backend.fork(0), drafter.hidden)
        request = Request(
            prompt=tuple(ids),
            sampling=sampling,
            draw=self._check_parts(drafter, verifier, policy),
            vocab_size=capabilities.vocab_size,
            max_length=min(capabilities.context, len(ids) + max_new_tokens),
            eos_ids=eos_ids(self.target, eos_token_id),
            features=Features(session) if drafter.hidden else None,
            target=session if drafter.shares_target else None,
        )
        trace = Trace(clock_of(capabilities.device))
        trace.lossless = verifier.lossless
        reuse = reuse_prefix and self.prefixes.limit > 0
        return Task(
            request=request,
            target=session,
            drafter=GuardedDrafter(drafter, verifier, trace, strict),
            verifier=verifier,
            policy=policy,
            ending=Ending(request, self.tokenizer, max_new_tokens, (stop,) if isinstance(stop, str) else tuple(stop)),
            trace=trace,
            logprobs=logprobs,
            prefill=self.prefixes.prefill if reuse else Session.prefilling,
            begin=partial(self.experience.begin, drafter, sampling.is_greedy),
            num_bytes=self._check_memory(request, drafter, policy),
            settle=Redecide() if exact and self.backend.numerics != "invariant" else keep,
        )

    def _check_memory(self, request: Request, drafter: Drafter, policy: Policy) -> int:
        """Bytes of keys, values and kept hidden states that the text may come to need; 0 where nobody set a budget."""
        if self.memory_budget is None:
            return 0
        length = min(request.max_length + policy.most_nodes, self.backend.capabilities.context)
        target, draft = self.backend.bytes_for(length), drafter.bytes_for(length)
        if drafter.hidden:
            width = len(drafter.hidden) * self.target.config.get_text_config(decoder=True).hidden_size
            draft += capacity(length) * width * self.backend.capabilities.dtype.itemsize
        if target + draft > self.memory_budget:
            raise MemoryBudgetError(
                f"{request.max_length} tokens (the prompt has {len(request.prompt)}) need {target:,} bytes of keys and "
                f"values in the target and {draft:,} for the {drafter.name} drafter; the memory budget is "
                f"{self.memory_budget:,}. Lower max_new_tokens, shorten the prompt, use a drafter without a model, or "
                "raise memory_budget"
            )
        self.prefixes.make_room(self.memory_budget - target - draft)
        return target + draft

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """Chunks of text, tokens and origins, one per round; options as for `generate`, checked at once."""
        return Stream(self.prepare(prompt, **options))

    def batch(self, max_rows: int = MAX_ROWS, **options: Any) -> Batch:
        """Continuous batching: `submit` prompts at any time, `step` turn by turn; `options` are each text's defaults.

        At most `max_rows` texts run at once; the others wait their turn.
        """
        return Batch(self, max_rows, **options)

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Prompts, **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Prompt | Prompts, **options: Any) -> Generation | list[Generation]:
        """Decode speculatively: one prompt, or a list of prompts together (a list of whole numbers is one prompt).

        max_new_tokens (128): exactly as many unless an end is met. temperature (0: greedy), top_k, top_p, min_p,
        repetition_penalty, processors (`transformers` LogitsProcessors), seed: see `Sampling`. stop: a string or
        several; eos_token_id: ids (the model's own by default). logprobs: of the emitted tokens, before filters.
        exact: in half precision, re-decide doubtful positions as plain decoding would; that costs about a plain run
        more (docs/numerics.md). strict: raise when the drafter fails. reuse_prefix (True): earlier prompts that begin
        alike save their part of the prefill.

        Several prompts: the same options for all, but `seed` may be a list of one for each; `max_rows` (32) decode at
        once. Each text is the one that its prompt gets alone. When one fails, the others are finished, and its error is
        raised with what there is of all in its `generations`.

        Lossless: yes, unless a lossy verifier was allowed. Errors: `InputError` before work starts;
        `NonFiniteLogitsError` with the tokens so far when the target's logits are NaN or infinite.
        """
        made: Generation | list[Generation] = self._generate(prompt, options)
        return made

    def _generate(self, prompt: Any, options: dict[str, Any]) -> Any:
        return self._together(prompt, options) if is_several(prompt) else self.stream(prompt, **options).finish()

    def _together(self, prompts: Any, options: dict[str, Any]) -> list[Generation]:
        """A list of prompts, in one batch."""
        options = dict(options)
        batch = self.batch(options.pop("max_rows", MAX_ROWS))
        seeds = options.pop("seed", 0)
        if isinstance(seeds, int):
            seeds = [seeds] * len(prompts)
        if len(seeds) != len(prompts):
            raise InputError(f"seed is one number, or one for each prompt: {len(seeds)} for {len(prompts)} prompts")
        tickets = []
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            try:
                tickets.append(batch.submit(prompt, seed=seed, **options))
            except InputError as error:
                error.args = (f"prompt {i} of {len(prompts)}: {error}",)
                raise
        batch.drain()
        for failed in tickets:
            if failed.error is not None:
                if isinstance(failed.error, SpecdecError):
                    failed.error.generations = [ticket.generation for ticket in tickets]
                raise failed.error
        return [ticket.generation for ticket in tickets]

    @overload
    def generate_plain(self, prompt: Prompt, **options: Any) -> Generation: ...

    @overload
    def generate_plain(self, prompt: Prompts, **options: Any) -> list[Generation]: ...

    def generate_plain(self, prompt: Prompt | Prompts, **options: Any) -> Generation | list[Generation]:
        """The same loop with the empty proposal: one token per target step. Same options, same seed, same tokens."""
        plain = {
            "drafter": registry.create("drafter", "none"),
            "verifier": registry.create("verifier", "coupled"),
            "policy": registry.create("policy", "fixed"),
        }
        made: Generation | list[Generation] = self._generate(prompt, {**options, **plain})
        return made


def fitting_verifiers(drafter: Drafter, policy: Policy) -> list[str]:
    """Names of the lossless verifiers that can take what this drafter and policy propose."""
    names = []
    for name in registry.available("verifier"):
        verifier = registry.find("verifier", name)
        draws = any(draw in drafter.draws for draw in verifier.draws)
        if verifier.lossless and draws and (verifier.trees or not policy.branches):
            names.append(name)
    return names
