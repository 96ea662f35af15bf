"""From a set of prompts to token ids: turns, chat templates, and prompts that are too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.bench.prompts import Prompt, PromptSet, read_prompt_set, turn_id
from specdec.chat import Chat
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

Progress = Callable[[int, int, str], None]
# Between an answer and the next turn, where no chat template says what stands there.
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Encoded:
    """One turn of one prompt, ready to decode. `turn` counts from 1; `num_cut`: tokens that were cut off in front."""

    prompt: Prompt
    ids: tuple[int, ...]
    turn: int = 1
    num_cut: int = 0

    @property
    def id(self) -> str:
        return turn_id(self.prompt, self.turn)


@dataclass(frozen=True)
class Selection:
    """Which prompts, and how they are put to a model; all that `--prompts` and the options beside it say.

    `turns`: at most so many of each prompt (None: all). `truncate`: cut prompts that are too long, in front, instead of
    refusing them. `chat`: through the chat template.
    """

    name: str | None = None
    limit: int | None = None
    limit_per_category: int | None = None
    turns: int | None = None
    truncate: bool = False
    chat: Chat | None = None

    def __post_init__(self) -> None:
        if self.turns is not None and self.turns < 1:
            raise InputError(f"turns is a number of turns >= 1, not {self.turns}")

    def read(self) -> PromptSet:
        return read_prompt_set(self.name, self.limit, self.limit_per_category)

    def encode(
        self,
        decoder: SpeculativeDecoder,
        prompts: Sequence[Prompt],
        options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> list[Encoded]:
        """As `encode_prompts`."""
        return encode_prompts(
            decoder, prompts, options, chat=self.chat, turns=self.turns, truncate=self.truncate, progress=progress
        )

    def check(
        self, decoder: SpeculativeDecoder, prompts: Sequence[Prompt], options: Mapping[str, Any] | None = None
    ) -> None:
        """Refuse what `encode` would refuse of the first turns, without decoding anything."""
        encode_prompts(decoder, prompts, options, chat=self.chat, turns=1, truncate=self.truncate)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Talk:
    """A conversation so far, as messages or as a text."""

    prompt: Prompt
    chat: Chat | None
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        if self.prompt.system:
            self.messages.append({"role": "system", "content": self.prompt.system})
            self.text = self.prompt.system + _BETWEEN

    def ask(self, turn: str) -> None:
        self.messages.append({"role": "user", "content": turn})
        self.text += turn

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.text += text + _BETWEEN

    def ids(self, decoder: SpeculativeDecoder) -> list[int]:
        if self.chat is not None:
            return self.chat.encode(decoder.tokenizer, self.messages)
        return decoder.encode(self.text)


def _fit(decoder: SpeculativeDecoder, ids: list[int], max_new_tokens: int, truncate: bool) -> tuple[list[int], int]:
    """The ids, or the last ones that leave room for `max_new_tokens`; and how many were cut off.

    A BOS token in front stays there: models that were trained with one answer badly without it.
    """
    context = decoder.backend.capabilities.context
    if not truncate or len(ids) + max_new_tokens <= context:
        return ids, 0
    head = ids[:1] if ids[0] == getattr(decoder.tokenizer, "bos_token_id", None) else []
    room = context - max_new_tokens - len(head)
    if room < 1:
        raise InputError(
            f"{max_new_tokens} new tokens leave no room for a prompt in a context of {context}; ask for fewer"
        )
    return head + ids[-room:], len(ids) - len(head) - room


def _turns(
    decoder: SpeculativeDecoder,
    prompt: Prompt,
    options: Mapping[str, Any],
    chat: Chat | None,
    num_turns: int,
    truncate: bool,
) -> Iterator[Encoded]:
    talk = _Talk(prompt, chat)
    for number, turn in enumerate(prompt.turns[:num_turns], 1):
        talk.ask(turn)
        try:
            ids, num_cut = _fit(decoder, talk.ids(decoder), options.get("max_new_tokens", 128), truncate)
            ids = list(decoder.prepare(ids, **options).request.prompt)
        except InputError as error:
            hint = ""
            if "model's context" in str(error):
                hint = ", or cut it in front with --truncate-prompts" + (", or ask for --turns 1" * (number > 1))
            raise type(error)(f"prompt {turn_id(prompt, number)}: {error}{hint}") from error
        yield Encoded(prompt, tuple(ids), number, num_cut)
        if number == num_turns:
            return
        if number <= len(prompt.answers):
            talk.answer(prompt.answers[number - 1])
        else:
            talk.answer(decoder.generate_plain(ids, **{**options, "exact": False}).text)


def encode_prompts(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any] | None = None,
    *,
    chat: Chat | bool | None = None,
    turns: int | None = None,
    truncate: bool = False,
    progress: Progress | None = None,
) -> list[Encoded]:
    """Token ids of every turn of every prompt, in order, for these generation options.

    A later turn stands behind the answers to the turns before it: those that the file records, else the plain loop's
    own, decoded here. So all methods decode the same texts. (In Spec-Bench each method's second turn contains its own
    first answer.) All first turns are checked before any is decoded. Without a chat template, turns and answers are
    put one behind the other, an empty line after each answer.

    `progress(done, total, id)` is called for every turn. Raises `InputError`, naming the prompt, for one that leaves
    nothing to generate (unless `truncate`), and for a chat template that is not there.

    Lossless: yes; nothing is decoded speculatively here.
    """
    options = dict(options or {})
    chat = Chat() if chat is True else chat or None
    if turns is not None and turns < 1:
        raise InputError(f"turns is a number of turns >= 1, not {turns}")
    counts = [len(prompt.turns) if turns is None else min(turns, len(prompt.turns)) for prompt in prompts]
    pending = [
        _turns(decoder, prompt, options, chat, count, truncate) for prompt, count in zip(prompts, counts, strict=True)
    ]
    made = [[next(one)] for one in pending]
    done, total = 0, sum(counts)
    for found, rest in zip(made, pending, strict=True):
        found.extend(rest)
        done += len(found)
        if progress is not None:
            progress(done, total, found[-1].id)
    return [one for found in made for one in found]


def describe_cuts(encoded: Sequence[Encoded]) -> str | None:
    """What `--truncate-prompts` did, in a line; None when it did nothing."""
    cut = [one for one in encoded if one.num_cut]
    if not cut:
        return None
    lost, whole = sum(one.num_cut for one in cut), sum(one.num_cut + len(one.ids) for one in cut)
    were = "was" if len(cut) == 1 else "were"
    return (
        f"{len(cut)} of {len(encoded)} prompts {were} cut in front to fit the context: "
        f"{lost} of {whole} tokens are gone, {lost / whole:.0%}"
    )
