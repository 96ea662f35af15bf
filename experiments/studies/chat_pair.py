"""A chat pair to study templates with: the embedded pair, taught to answer in one chat format.

A question asks for a function by its name, arguments and the first line of its docstring; the answer is the function,
as the standard library has it. The target learns the answers, then the draft learns what the target says of them. The
embedded pair itself has seen neither questions nor markers of turns.

Shape suffixes: B dialogues of a step, L tokens, V vocabulary.
"""

from __future__ import annotations

import ast
import copy
import functools
import math
import random
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.chat import Chat
from specdec.train import stdlib

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
MAX_TOKENS, BATCH, SEED = 160, 8, 0
_MIN_STATEMENTS, _MAX_CHARS = 2, 480  # the docstring is a statement


@dataclass(frozen=True)
class Dialogue:
    question: str
    answer: str
    held_out: bool

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]


def _functions(source: str) -> Iterator[tuple[str, str]]:
    """Question and answer for every documented function that is neither trivial nor long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own tests hold odd escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < _MIN_STATEMENTS:
            continue
        says = (ast.get_docstring(node) or "").strip()
        text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if not says or len(text) > _MAX_CHARS:
            continue
        line = says.splitlines()[0]
        yield f"Write {node.name}({ast.unparse(node.args)}): {line}", textwrap.dedent(text).rstrip() + "\n"


@functools.cache
def dialogues() -> list[Dialogue]:
    """All of the standard library, each question once; held out by file, as the embedded pair's training text."""
    found: dict[str, Dialogue] = {}
    for document in stdlib.documents():
        for question, answer in _functions(document.text):
            found.setdefault(question, Dialogue(question, answer, document.held_out))
    return list(found.values())


def row(dialogue: Dialogue, tokenizer: Any, chat: Chat) -> tuple[list[int], int]:
    """Ids of question, answer and end of text; and where the answer begins."""
    prompt = chat.encode(tokenizer, dialogue.messages)
    answer = tokenizer(dialogue.answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _batch(rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Tokens `[B, L]` (int64) and, one place to the left, which of them are to be predicted `[B, L - 1]` (bool)."""
    length = max(len(ids) for ids, _ in rows)
    tokens_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    mask_BL = torch.zeros(len(rows), length - 1, dtype=torch.bool)
    for i, (ids, start) in enumerate(rows):
        tokens_BL[i, : len(ids)] = torch.tensor(ids)
        mask_BL[i, start - 1 : len(ids) - 1] = True
    return tokens_BL, mask_BL


def _rate(step: int, steps: int, peak: float) -> float:
    warm = max(1, steps // 10)
    return peak * ((step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def _teach(model: Any, rows: Sequence[tuple[list[int], int]], steps: int, peak: float, teacher: Any, say: Any) -> Any:
    """Fine-tune a copy: on the answers, or where there is a teacher on its probabilities of them (forward KL)."""
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=peak, weight_decay=0.0)
    draw = random.Random(SEED)
    for step in range(steps):
        tokens_BL, mask_BL = _batch(draw.sample(rows, BATCH))
        logits_NV = student(input_ids=tokens_BL, use_cache=False).logits[:, :-1][mask_BL]
        if teacher is None:
            loss = torch.nn.functional.cross_entropy(logits_NV, tokens_BL[:, 1:][mask_BL])
        else:
            with torch.no_grad():
                p_NV = teacher(input_ids=tokens_BL, use_cache=False).logits[:, :-1][mask_BL].softmax(-1)
            loss = torch.nn.functional.cross_entropy(logits_NV, p_NV)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, peak)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            say(f"step {step + 1}/{steps}, loss {loss.item():.3f}")
    return student.eval().requires_grad_(False)


def chat_pair(
    target: Any, draft: Any, tokenizer: Any, steps: tuple[int, int], folder: Path, say: Any
) -> tuple[Any, Any]:
    """The taught target and draft; from `folder` if it holds those of these steps, else made and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    chat = Chat(TEMPLATE)
    rows = [row(one, tokenizer, chat) for one in dialogues() if not one.held_out]
    rows = [one for one in rows if len(one[0]) <= MAX_TOKENS]
    taught: list[Any] = []
    for name, model, number, peak in (("target", target, steps[0], 2e-4), ("draft", draft, steps[1], 1e-3)):
        path = folder / f"{name}-{number}.safetensors"
        if path.exists():
            made = copy.deepcopy(model)
            made.load_state_dict(load_file(path), strict=False)
        else:
            say(f"teaching the {name} on {len(rows)} dialogues")
            made = _teach(model, rows, number, peak, taught[0] if taught else None, say)
            state = {key: value for key, value in made.state_dict().items() if key != "lm_head.weight"}
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        taught.append(made)
    return taught[0], taught[1]


@torch.no_grad()
def answer_loss(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Nats per token of known answers behind prompts."""
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens_1L = torch.tensor([[*prompt, *answer]])
        logits_LV = model(input_ids=tokens_1L, use_cache=False).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits_LV, tokens_1L[0, len(prompt) :], reduction="sum").item()
        count += len(answer)
    return total / count
