"""Other engines on the same weights: what `--peer` names. Each gives rows for the same interleaved schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from specdec.bench.peer_process import PeerProcess
from specdec.bench.rows import Method
from specdec.bench.synthetic import Pair
from specdec.errors import InputError

OPENVINO, LLAMA_CPP = "openvino", "llama.cpp"
#: By our formats, weights of as many bits that all peers know; what they multiply them with is their choice.
WEIGHTS = {"int8": "int8", "int4": "int4", "int4-a8": "int4"}


@dataclass(frozen=True)
class Setting:
    """What all peers are run with. `folder` is scratch space that lasts as long as the run, as `stack` does."""

    dtype: torch.dtype
    threads: int
    ks: tuple[int, ...]
    max_new_tokens: int
    folder: Path
    say: Callable[[str], None]
    stack: ExitStack
    weights: str | None = None  # a value of WEIGHTS: rounded by each peer in its own way, target's and draft's

    def started(self, process: PeerProcess) -> PeerProcess:
        """`process`, which ends with the run."""
        return self.stack.enter_context(process)


def check(peers: Sequence[str], device_type: str, dtype: torch.dtype) -> None:
    """Raise `InputError`, saying what to install or to change, before any model is made."""
    for peer in peers:
        name, _, where = peer.partition("=")
        if name == OPENVINO and not where:
            from specdec.bench import peer_openvino

            peer_openvino.check()
        elif name == LLAMA_CPP:
            from specdec.bench import peer_llama_cpp

            peer_llama_cpp.check(where)
        else:
            raise InputError(f"--peer {peer}: there are {OPENVINO} and {LLAMA_CPP}=FOLDER_WITH_ITS_TOOLS")
        if device_type != "cpu":
            raise InputError(f"--peer {peer}: peers are compared on the CPU; add --device cpu, or leave --peer out")
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"--peer {peer}: peers run in float32 or bfloat16; use --dtype fp32 or --dtype bf16")


def open_peer(peer: str, pair: Pair, setting: Setting) -> list[Method]:
    """The rows of one peer: its plain mode first, then its speculative one with each k."""
    name, _, where = peer.partition("=")
    if name == OPENVINO:
        from specdec.bench import peer_openvino

        return peer_openvino.rows(pair, setting)
    from specdec.bench import peer_llama_cpp

    return peer_llama_cpp.rows(pair, setting, Path(where))
