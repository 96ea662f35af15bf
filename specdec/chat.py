"""Chat templates: messages as the token ids that a chat model was trained to see."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.errors import InputError

# Variables that are filled in here; an option of such a name would be overwritten, or break the call.
_TAKEN = frozenset({"messages", "add_generation_prompt", "tokenize", "return_dict", "chat_template", "conversation"})


@dataclass(frozen=True)
class Chat:
    """How messages become ids. `template`: Jinja source in place of the tokenizer's own. `options`: variables that the
    template reads, such as `enable_thinking=False`; one that it does not mention is refused, as it would do nothing.
    """

    template: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self, tokenizer: Any) -> None:
        """Raises `InputError` where there is no template, or where it does not know an option."""
        if tokenizer is None:
            raise InputError("a text prompt needs a tokenizer; pass tokenizer=, or give token ids")
        source = self.template or getattr(tokenizer, "chat_template", None)
        if not source:
            raise InputError(
                "the tokenizer has no chat template: it is no chat model's, or the template was not saved with it. "
                "Give the prompt as a string (no --chat), or name a template (--chat-template FILE)"
            )
        text = "\n".join(map(str, source.values())) if isinstance(source, Mapping) else str(source)
        for name in self.options:
            if name in _TAKEN or not re.search(rf"\b{re.escape(name)}\b", text):
                raise InputError(f"the chat template reads no {name!r}, so --chat-option {name} would change nothing")

    def encode(self, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of the messages and of the opening of the answer. Raises `InputError`, also where the template refuses
        the messages (some know no system role).
        """
        self.check(tokenizer)
        from jinja2 import TemplateError

        try:
            made = tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.options,
            )
        except TemplateError as error:
            raise InputError(f"the chat template fails on these messages: {error}") from error
        return list(made["input_ids"])
