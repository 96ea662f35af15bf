"""The drafter's contract: start, propose, observe. A drafter proposes; it never touches the sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from specdec.chance import Chance
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.backend import Backend
from specdec.runtime.features import Features
from specdec.runtime.session import Session, Steps, run
from specdec.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """What is being decoded: known before the first round, the same for every round."""

    prompt: tuple[int, ...]
    sampling: Sampling
    draw: Draw  # how the verifier wants tokens drawn
    vocab_size: int  # the target's
    max_length: int  # prompt and text together never get longer
    eos_ids: frozenset[int] = frozenset()
    features: Features | None = None  # the target's hidden states, for a drafter that names some in `hidden`
    target: Session | None = None  # what verifies, for a drafter that works on its slots (`shares_target`)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a proposal."""

    proposal: Proposal
    path: tuple[int, ...]  # accepted nodes, from the root down
    tokens: tuple[int, ...]  # emitted: the accepted ones, then the target's own
    logits: Tensor  # the target's raw logits [N + 1, V], root first
    broken: bool = False  # the next position has no finite logits: the target's own token is missing

    @property
    def num_accepted(self) -> int:
        return len(self.path)

    @property
    def num_evaluated(self) -> int:
        """Depths at which acceptance was decided: accepted ones, and the one where it ended on a rejection."""
        last = self.path[-1] if self.path else -1
        return len(self.path) + bool(self.proposal.tree.children(last))


@dataclass(frozen=True, eq=False)
class BuildContext:
    """What a drafter named by the user is built from: `source` is a folder or hub id of weights, when one was given.

    `target_source`: where the target was loaded from, if it was. What `quantize` asks for is honoured by drafters that
    say so (`quantizes`), and refused for all others.
    """

    target: Any
    tokenizer: Any = None
    source: str | None = None
    device: Any = None
    dtype: Any = None
    backend: str | None = None  # how its own models should run; None: the best that there is
    target_source: str | None = None
    kv_cache: str | None = None  # how the target stores keys and values; its own models do so too where they can
    quantize: Any = None  # a recipe, or the name of one or of a format, for the weights of its own models
    trust_remote_code: bool = False  # whether code that comes with its own models may run


class Memory(Enum):
    """What proposals depend on, chance aside. It decides what a recorded trace tells of other settings."""

    ROUNDS = "rounds"  # earlier rounds too: nothing is promised
    TEXT = "text"  # the committed text alone, and a chain begins as a longer one of the same text does
    #: As `TEXT`, and a node's children are those that the root would have if the path to the node were text.
    PATH = "path"
    #: As `TEXT`, and the nodes of one depth all choose from the same row.
    DEPTH = "depth"


#: How a session that holds a prompt gets its keys and values.
Prefill = Callable[[Session], Steps[None]]


class Drafter(ABC):
    """Proposes tokens. `State` is whatever `start` returns: all that changes during a text lives there.

    Calling `propose` twice from one state gives the same proposal (with a `chance` in the same state).
    """

    #: How this drafter can draw its nodes, in no order; the verifier chooses.
    draws: ClassVar[frozenset[Draw]] = frozenset({Draw.POINT})
    #: Whether it can branch.
    trees: ClassVar[bool] = False
    #: Whether its trees are well-formed by construction. Looking at every drafted token, which is done otherwise,
    #: waits for the device that drew them.
    trusted: ClassVar[bool] = False
    #: Hidden states of the target that it reads in `request.features`, by their index in `transformers`'
    #: `hidden_states`: 0 the embeddings, i the input of layer i, the number of layers the last, after the final norm.
    hidden: tuple[int, ...] = ()
    #: What its proposals depend on, see `Memory`.
    memory: ClassVar[Memory] = Memory.ROUNDS
    #: Whether `build` loads a whole model, whose weights are then stored as `context.quantize` says.
    quantizes: ClassVar[bool] = False
    #: Whether it drafts on the target's own slots, see `target_backend`.
    shares_target: ClassVar[bool] = False

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        """Make the drafter for `--drafter NAME`; plugins that load weights or need the tokenizer override this."""
        return cls(**options)

    @classmethod
    def recognises(cls, config: Mapping[str, Any], folder: Path) -> bool:
        """Whether a folder with this `config.json` holds weights for this drafter, in a layout that others publish.

        A folder that says so itself (`"specdec_drafter": NAME`) is not asked about.
        """
        return False

    @property
    def name(self) -> str:
        """Shown in reports and as the origin of tokens."""
        return type(self).__name__

    @abstractmethod
    def start(self, request: Request) -> Any:
        """The state before the first round: prompt seen, nothing proposed."""

    @abstractmethod
    def propose(self, state: Any, plan: Plan, chance: Chance) -> Proposal:
        """At most `plan.depth` tokens deep; fewer, or none, whenever the drafter has nothing better."""

    @abstractmethod
    def observe(self, state: Any, outcome: Outcome) -> Any:
        """The state after a round."""

    def target_backend(self, backend: Backend, model: Any) -> Backend:
        """What the target runs on with this drafter: `backend`, opened on the target `model`, or one made of it.

        Plain decoding of the same decoder runs on it too. Given its own result, it returns that.
        """
        return backend

    def warmup(self) -> None:
        """Do now what would otherwise be done once it pays, such as compiling a draft model's step."""
        return None

    def sessions(self, state: Any) -> Sequence[Session]:
        """Sessions held by the state. The loop prefills those of a new state, from an earlier prompt where it can."""
        return ()

    def bytes_for(self, length: int) -> int:
        """Bytes of keys and values that a text of `length` tokens takes in the sessions of this drafter."""
        return 0

    def starting(self, request: Request, prefill: Prefill = Session.prefilling) -> Steps[Any]:
        """`start`, then the prefill of its sessions, asking for its steps."""
        state = self.start(request)
        for session in self.sessions(state):
            yield from prefill(session)
        return state

    def proposing(self, state: Any, plan: Plan, chance: Chance) -> Steps[Proposal]:
        """`propose` as the loop calls it. A drafter that runs a model derives from `ModelRunner` and writes this."""
        yield from ()
        return self.propose(state, plan, chance)


class ModelRunner(Drafter):
    """A drafter that asks for its model's steps (`rows = yield from session.forwarding(tree)`) and is sent the answers.

    So the steps of many texts can be answered together; `propose` answers its own at once.
    """

    def propose(self, state: Any, plan: Plan, chance: Chance) -> Proposal:
        return run(self.proposing(state, plan, chance))

    @abstractmethod
    def proposing(self, state: Any, plan: Plan, chance: Chance) -> Steps[Proposal]: ...


class WrappedDrafter(ModelRunner):
    """`inner`, with something done before or after what it does: override that, the rest is passed on."""

    def __init__(self, inner: Drafter):
        self.inner = inner
        self.hidden = inner.hidden
        self.draws, self.trees, self.trusted = inner.draws, inner.trees, inner.trusted  # type: ignore[misc]
        self.shares_target, self.memory = inner.shares_target, inner.memory  # type: ignore[misc]

    @property
    def name(self) -> str:
        return self.inner.name

    def target_backend(self, backend: Backend, model: Any) -> Backend:
        return self.inner.target_backend(backend, model)

    def warmup(self) -> None:
        self.inner.warmup()

    def start(self, request: Request) -> Any:
        return self.inner.start(request)

    def starting(self, request: Request, prefill: Prefill = Session.prefilling) -> Steps[Any]:
        return (yield from self.inner.starting(request, prefill))

    def proposing(self, state: Any, plan: Plan, chance: Chance) -> Steps[Proposal]:
        return (yield from self.inner.proposing(state, plan, chance))

    def observe(self, state: Any, outcome: Outcome) -> Any:
        return self.inner.observe(state, outcome)

    def sessions(self, state: Any) -> Sequence[Session]:
        return self.inner.sessions(state)

    def bytes_for(self, length: int) -> int:
        return self.inner.bytes_for(length)
