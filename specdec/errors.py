"""Every error that a user can meet. Each message says what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.generation import Generation


class SpecdecError(Exception):
    """Base of all errors raised by specdec.

    `generations`: when several prompts were given and one failed, what there is of each text, in order.
    """

    generations: Sequence[Generation] = ()


class InputError(SpecdecError, ValueError):
    """An argument is out of range, or arguments do not fit together."""


class UnknownPluginError(InputError):
    """No plugin of that name is installed."""


class IncompatiblePairError(InputError):
    """Target and draft, or drafter and verifier, cannot work together."""


class UnsupportedModelError(InputError):
    """The model's cache cannot be rewound, or its weights cannot be read safely."""


class MemoryBudgetError(InputError):
    """The caches of a text, or the work on a model's weights, do not fit into the memory that there is."""


class DrafterError(SpecdecError, RuntimeError):
    """A drafter raised, or returned a malformed proposal, in the middle of a text."""


class DrafterWarning(UserWarning):
    """A drafter failed; the text was finished by plain decoding."""


class NonFiniteLogitsError(SpecdecError, ArithmeticError):
    """The target produced NaN or infinite logits.

    `position` is the absolute position that could not be decided; `tokens` and `text` hold what was emitted before.
    """

    def __init__(self, position: int, tokens: Sequence[int], text: str = ""):
        super().__init__(
            f"the target's logits for position {position} are NaN or infinite; {len(tokens)} tokens were emitted "
            "before it and are in this exception's `tokens`. Try dtype='float32', or check the weights."
        )
        self.position = position
        self.tokens = list(tokens)
        self.text = text


class PolicyWarning(UserWarning):
    """A policy was made for other models or another machine."""


class BackendWarning(UserWarning):
    """A backend could not be used as asked; the stock step does the work."""
