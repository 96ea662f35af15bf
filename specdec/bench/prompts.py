"""Prompts and sets of prompts: the built-in one, and files in the layouts of well-known benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.prompt_files import records
from specdec.bench.specbench_tasks import is_spec_bench, task_of
from specdec.errors import InputError

BUILT_IN = Path(__file__).with_name("prompts.jsonl")
BUILT_IN_NAME = "built-in"
# Where a row's text may stand: our own, many projects', Spec-Bench's, GSM8K's.
_KEYS = ("text", "prompt", "turns", "question")
_CONVERSATIONS = ("messages", "conversations")
_IDS = ("id", "question_id", "task_id")
_USER, _ASSISTANT, _SYSTEM = ("user", "human"), ("assistant", "gpt", "chatgpt", "bing", "bard"), ("system", "developer")
# Sets that are not shipped: people will type their names.
_ELSEWHERE = {
    "spec-bench": "https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl",
    "mt-bench": "https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl",
    "humaneval": "https://github.com/openai/human-eval, data/HumanEval.jsonl.gz",
    "gsm8k": "https://github.com/openai/grade-school-math, grade_school_math/data/test.jsonl",
}


@dataclass(frozen=True)
class Prompt:
    """One question. `text` is its first turn; `turns` are all that the user says, in order (at least `text`).

    `answers`: recorded ones to the first turns, where the file has them; `system`: what a conversation opens with.
    """

    id: str
    text: str
    category: str = ""
    turns: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        if not self.turns:
            object.__setattr__(self, "turns", (self.text,))

    @property
    def document(self) -> str:
        """Everything that was said, as one text."""
        said = [self.system]
        for number, turn in enumerate(self.turns):
            said += [turn, *self.answers[number : number + 1]]
        return "\n\n".join(part for part in said if part)


def turn_id(prompt: Prompt, turn: int) -> str:
    """`81` for a first turn, `81.2` for the second."""
    return prompt.id if turn == 1 else f"{prompt.id}.{turn}"


@dataclass(frozen=True)
class PromptSet:
    """Prompts, what they are called, the layout that was recognised, and what people should know about the reading."""

    name: str
    layout: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()


def _content(value: Any, where: str) -> str:
    """A message's text; parts as chat interfaces write them are put together."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f"{where}: a message's content is text, or parts with text; images and tools are not read")
    return "".join(part["text"] for part in parts)


def _conversation(row: Mapping[str, Any], messages: Any, identity: str, where: str) -> Prompt | None:
    """User turns and the answers between them; None when the user says nothing.

    What an assistant says before the user is dropped: it answers something that the file does not hold.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{where}: a conversation is a list of messages like {{'role': 'user', 'content': '…'}}")
    system, turns, answers = "", list[str](), list[str]()
    for message in messages:
        role = str(message.get("role", message.get("from", ""))).lower()
        text = _content(message.get("content", message.get("value")), where)
        if role in _SYSTEM and not turns:
            system = f"{system}\n\n{text}" if system else text
        elif role in _USER:
            if text and len(turns) > len(answers):
                turns[-1] += f"\n\n{text}"
            elif text:
                turns.append(text)
        elif role in _ASSISTANT:
            if len(turns) > len(answers):
                answers.append(text)
            elif turns:
                answers[-1] += f"\n\n{text}"
        else:
            known = ", ".join((*_USER, *_ASSISTANT, "system (at the beginning)"))
            raise InputError(f"{where}: a message of role {role!r}; these are read: {known}")
    if not turns:
        return None
    return Prompt(identity, turns[0], str(row.get("category", "")), tuple(turns), tuple(answers), system)


def _prompt(row: Any, where: str, number: int) -> tuple[str, Prompt | None]:
    """The layout of a record, and its prompt."""
    if isinstance(row, str) and row:
        return "text", Prompt(str(number), row)
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row is an object or a string, not {type(row).__name__}")
    identity = next((str(row[key]) for key in _IDS if key in row), str(number))
    for key in _CONVERSATIONS:
        if key in row:
            return key, _conversation(row, row[key], identity, where)
    for key in _KEYS:
        value = row.get(key)
        turns = tuple(value) if isinstance(value, list) and value else (value,)
        if all(isinstance(turn, str) and turn for turn in turns):
            category = str(row.get("category", ""))
            return _layout(key, row), Prompt(identity, turns[0], category, turns)
    raise InputError(f"{where}: no text under any of {', '.join(_KEYS)}; the row has {', '.join(row) or 'nothing'}")


def _layout(key: str, row: Mapping[str, Any]) -> str:
    if key == "question" and "####" in str(row.get("answer", "")):
        return "gsm8k"
    if key == "prompt" and "entry_point" in row:
        return "humaneval"
    return key


def _source(name: str | Path | None) -> Path:
    if name is None or str(name) == BUILT_IN_NAME:
        return BUILT_IN
    path = Path(name)
    if not path.exists() and str(name).lower() in _ELSEWHERE:
        raise InputError(
            f"{name} does not ship with specdec; get the file ({_ELSEWHERE[str(name).lower()]}) and give its path"
        )
    if not path.exists() and path.name == str(name) and not path.suffix:
        raise InputError(
            f"cannot read prompts from {name}: no such file, and the only set of a name here is {BUILT_IN_NAME}"
        )
    return path


def _first_of_each(
    prompts: Iterable[Prompt], limit: int | None, per_category: int | None, group: Callable[[str], str]
) -> list[Prompt]:
    taken, found = dict[str, int](), list[Prompt]()
    for prompt in prompts:
        which = group(prompt.category)
        if per_category is None or taken.get(which, 0) < per_category:
            taken[which] = taken.get(which, 0) + 1
            found.append(prompt)
        if limit is not None and len(found) == limit:
            break
    return found


def read_prompt_set(
    name: str | Path | None = None, limit: int | None = None, limit_per_category: int | None = None
) -> PromptSet:
    """Prompts of a file, or the built-in held-out ones (`None`, "built-in"): beginnings of Python source.

    JSON lines, a JSON array, or either in gzip, one record a prompt: `text`, `prompt` (HumanEval), `turns`
    (Spec-Bench, MT-Bench), `question` (GSM8K), `messages` or `conversations` (chats, ShareGPT). Any other text: one
    prompt per line, empty lines skipped. `limit`: the first so many; `limit_per_category`: the first so many of each
    category, where all of MT-Bench is one category of Spec-Bench; both: whatever is met first.

    Raises `InputError` for a file that cannot be read or holds nothing; it names the line.
    """
    for what, value in (("limit", limit), ("limit_per_category", limit_per_category)):
        if value is not None and value < 1:
            raise InputError(f"{what} is a number of prompts >= 1, not {value}")
    source, layouts, silent = _source(name), list[str](), list[str]()

    def parsed() -> Iterable[Prompt]:
        for number, (where, row) in enumerate(records(source), 1):
            layout, prompt = _prompt(row, where, number)
            if prompt is None:
                silent.append(where)
                continue
            layouts.append(layout)
            yield prompt

    # What a file is shows in all its rows, and rows beyond a plain limit need not even be valid.
    prompts: Iterable[Prompt] = parsed() if limit_per_category is None else list(parsed())
    spec_bench = not isinstance(prompts, Sequence) or is_spec_bench(prompt.category for prompt in prompts)
    found = _first_of_each(prompts, limit, limit_per_category, task_of if spec_bench else str)
    if not found:
        raise InputError(f"{source} holds no prompts")
    notes = []
    if silent:
        rows = "row is" if len(silent) == 1 else "rows are"
        notes.append(f"{len(silent)} {rows} left out, where no user says anything: {silent[0]}, …")
    layout = layouts[0] if len(set(layouts)) == 1 else "mixed"
    if layout == "turns":
        layout = "spec-bench" if is_spec_bench(prompt.category for prompt in found) else "mt-bench"
    return PromptSet(BUILT_IN_NAME if source == BUILT_IN else source.name, layout, tuple(found), tuple(notes))


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """The prompts of `read_prompt_set`, alone."""
    return list(read_prompt_set(path, limit).prompts)
