"""Chat template right and wrong: what does it do to acceptance, and would anybody notice?

    python experiments/studies/chat_template.py          makes a chat pair first: about ten minutes on a quiet core

No small chat model ships with this project, so one is made (`chat_pair.py`): the embedded pair is taught to answer in
the format of `chat_template.jinja`, in steps and in an order that are fixed. It is then asked held-out questions in
that format and in wrong ones; then target and draft are given different ones, as happens where a template is taken
from each model's own folder. Four drafted tokens a round; texts end where the model ends them.

Beside acceptance stands what the target says of the true answers, in nats per token: how much the format matters to the
text itself. The embedded pair as it ships is asked too, for the one mark that its own format has, the token that opens
a document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import chat_pair
import study
from chat_pair import TEMPLATE, Dialogue
from specdec.drafters import ModelDrafter

from specdec.chat import Chat
from specdec.drafter import Request
from specdec.policy import Fixed

K, NUM_QUESTIONS = 4, 24
STEPS = (120, 160)
# Another family's format: its marks are no tokens of this tokenizer, as when a template is copied from elsewhere.
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
UNOPENED = TEMPLATE.split("{% if add_generation_prompt %}")[0]
RIGHT = "right"
Ids = Callable[[Dialogue], list[int]]


def formats(tokenizer: Any) -> dict[str, Ids]:
    """Ways to put a question, the right one first."""

    def through(template: str) -> Ids:
        return lambda one: Chat(template).encode(tokenizer, one.messages)

    def twice(one: Dialogue) -> list[int]:
        inner = tokenizer.apply_chat_template(
            one.messages, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
        )
        return Chat(TEMPLATE).encode(tokenizer, [{"role": "user", "content": inner}])

    right = through(TEMPLATE)
    return {
        RIGHT: right,
        "no template": lambda one: list(tokenizer(one.question)["input_ids"]),
        "no opening of the answer": through(UNOPENED),
        "applied twice": twice,
        "another model's (ChatML)": through(CHATML),
        "first token missing": lambda one: right(one)[1:],
        "first token twice": lambda one: [tokenizer.bos_token_id, *right(one)],
    }


class OtherPrompt(ModelDrafter):
    """Drafts behind another prompt than the target's: `reads` gives it for every prompt of the target."""

    def __init__(self, model: Any, reads: Mapping[tuple[int, ...], Sequence[int]]):
        super().__init__(model)
        self.reads = reads

    def start(self, request: Request) -> Any:
        return super().start(replace(request, prompt=tuple(self.reads[request.prompt])))


def accepted(args: argparse.Namespace, target: Any, tokenizer: Any, draft: Any, asked: Any, read: Any) -> dict:
    """Acceptance, greedy and at temperature 1, when the target is given `asked` and the draft `read`."""
    drafter = OtherPrompt(draft, {tuple(a): b for a, b in zip(asked, read, strict=True)})
    found = {}
    # The ratio rule draws a draft's tokens by themselves: noise in common is keyed by positions, which differ here.
    for name, temperature, verifier in (("greedy", 0.0, "coupled"), ("sampled", 1.0, "ratio")):
        decoder = study.decoder(target, tokenizer, drafter, Fixed(K), verifier=verifier, prefix_cache=0)
        made = study.texts(decoder.generate, asked, max_new_tokens=args.max_new_tokens, temperature=temperature)
        found[name] = {**study.acceptance(made), "ended": sum(text.finish_reason == "eos" for text in made)}
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    target, draft, tokenizer = study.embedded()
    say = study.console.print
    taught, taught_draft = chat_pair.chat_pair(target, draft, tokenizer, tuple(args.steps), args.models, say)
    held_out = [one for one in chat_pair.dialogues() if one.held_out]
    questions = held_out[:: max(1, len(held_out) // NUM_QUESTIONS)][: args.limit or NUM_QUESTIONS]
    answers = [tokenizer(one.answer, add_special_tokens=False)["input_ids"] for one in questions]
    ways = {name: [way(one) for one in questions] for name, way in formats(tokenizer).items()}
    rows, kept = [], study.Rows(args, "chat_template")

    def row(which: str, p_way: str, q_way: str, p: Any, q: Any, asked: Any, read: Any, true: Any) -> dict[str, Any]:
        made = {"pair": which, "target": p_way, "draft": q_way, **accepted(args, p, tokenizer, q, asked, read)}
        return {**made, "answer_loss": chat_pair.answer_loss(p, asked, true) if true is not None else None}

    def add(which: str, p_way: str, q_way: str, *given: Any) -> None:
        name = f"{which}, {args.steps[0]} + {args.steps[1]} steps: {p_way} / {q_way}"
        rows.append(kept.get(name, row, which, p_way, q_way, *given))

    for name, asked in ways.items():
        add("both taught", name, name, taught, taught_draft, asked, asked, answers)
    for p_way, q_way in ((RIGHT, "no template"), (RIGHT, "another model's (ChatML)"), ("no template", RIGHT)):
        add("both taught", p_way, q_way, taught, taught_draft, ways[p_way], ways[q_way], answers)
    add("target taught, draft not", RIGHT, RIGHT, taught, draft, ways[RIGHT], ways[RIGHT], answers)
    add("neither taught", RIGHT, RIGHT, target, draft, ways[RIGHT], ways[RIGHT], answers)
    opened = [tokenizer(prompt.text)["input_ids"] for prompt in study.prompts(args.limit)]
    for name, asked in {
        "first token there": opened,
        "first token missing": [ids[1:] for ids in opened],
        "first token twice": [[ids[0], *ids] for ids in opened],
    }.items():
        add("as shipped, source code", name, name, target, draft, asked, asked, None)
    add("as shipped, source code", "first token there", "first token missing", target, draft, opened,
        [ids[1:] for ids in opened], None)  # fmt: skip
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    header = [
        "pair",
        "target is given",
        "draft is given",
        "tokens per round, greedy",
        "tokens per round, temperature 1",
    ]
    header += ["texts that end", "nats per token of the true answer"]
    lines = []
    for row in rows:
        rates = [study.pair_text(row[name]["tokens_per_round"]) for name in ("greedy", "sampled")]
        loss = "" if row["answer_loss"] is None else f"{row['answer_loss']:.3f}"
        q_way = "the same" if row["draft"] == row["target"] else row["draft"]
        lines.append([row["pair"], row["target"], q_way, *rates, row["greedy"]["ended"], loss])
    return study.table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--steps", type=int, nargs=2, default=STEPS, metavar=("TARGET", "DRAFT"), help=f"of teaching (default: {STEPS})"
    )
    parser.add_argument(
        "--models", type=Path, default=Path("runs/chat_pair"), metavar="FOLDER", help="the chat pair is kept there"
    )
    args = study.arguments(__doc__, parser, tokens=64)
    rows = measure(args)
    study.publish(args, "chat_template", "Chat template right and wrong", page(rows))


if __name__ == "__main__":
    main()
