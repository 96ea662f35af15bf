"""llama.cpp's command-line tools as a peer: the pair as GGUF files, the tools' own timing lines parsed.

A tool's process also loads the model; what counts is the time of prompt and text by its own clock. Plain text is timed
by llama-bench, which samples nothing; its ids come from one more, untimed run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from specdec.bench.peer_process import PeerError
from specdec.bench.rows import PLAIN, SPECULATIVE, Made, Method
from specdec.bench.synthetic import Pair, piece
from specdec.dtypes import dtype_name
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.bench.peers import Setting

ENGINE = "llama.cpp"
BENCH, COMPLETION, SPECULATION = TOOLS = "llama-bench", "llama-completion", "llama-speculative-simple"
_TIMEOUT = 600.0
# The tools write through a thread that the end of the process may overtake: output can lack its last lines.
_TRIES = 8
_NUMBER = r"([0-9.]+)"
_PIECE = re.compile(r"<t([0-9]{5})>")
_ENCODED = re.compile(rf"encoded\s+(\d+) tokens in\s+{_NUMBER} seconds")
_DECODED = re.compile(rf"decoded\s+(\d+) tokens in\s+{_NUMBER} seconds")
_ACCEPTED = re.compile(r"n_accept\s*=\s*(\d+)")

T = TypeVar("T")


class _Incomplete(PeerError):
    """The output lacks something that another run may well print."""


@dataclass(frozen=True)
class Printed:
    """`llama-speculative-simple`'s own figures. `num_tokens` new ones; `num_accepted` of them drafted."""

    prompt_seconds: float
    text_seconds: float
    num_tokens: int
    num_accepted: int


def check(folder: str) -> None:
    """Raise `InputError` when the tools or the package that writes their files are missing."""
    if not folder:
        raise InputError("--peer llama.cpp=FOLDER: name the folder that holds its tools, for example build/bin")
    missing = [name for name in TOOLS if _tool(Path(folder), name) is None]
    if missing:
        raise InputError(
            f"--peer llama.cpp={folder}: no {' and no '.join(missing)} there; build llama.cpp and name its build/bin"
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError("--peer llama.cpp writes GGUF files with the gguf package: pip install gguf")


def _tool(folder: Path, name: str) -> Path | None:
    found = [path for path in (folder / name, folder / f"{name}.exe", folder / "bin" / name) if path.is_file()]
    return found[0] if found else None


def parse_bench(text: str) -> float:
    """Seconds of `llama-bench -pg PROMPT,TEXT -r 1 -o json`. Raises `PeerError` when that is not what it is."""
    try:
        (test,) = json.loads(text[text.index("[") : text.rindex("]") + 1])
        return float(test["avg_ns"]) / 1e9
    except (ValueError, KeyError, TypeError) as error:
        raise _Incomplete(f"llama-bench printed no timing; the end of its output: {text[-300:]!r}") from error


def parse_speculative(text: str) -> Printed:
    """`llama-speculative-simple`'s lines. Raises `PeerError` when they are not there."""
    encoded, decoded, accepted = _ENCODED.search(text), _DECODED.search(text), _ACCEPTED.search(text)
    if encoded is None or decoded is None or accepted is None:
        raise _Incomplete(f"llama-speculative-simple printed no timing lines; the end of its output: {text[-300:]!r}")
    return Printed(float(encoded[2]), float(decoded[2]), int(decoded[1]), int(accepted[1]))


def parse_ids(text: str, prompt: Sequence[int], number: int) -> tuple[int, ...]:
    """The first `number` new ids of a tool's output, which begins with the prompt. Raises `PeerError` for others."""
    ids = [int(found) for found in _PIECE.findall(text)]
    if ids[: len(prompt)] != list(prompt) or len(ids) < len(prompt) + number:
        raise _Incomplete(f"llama.cpp printed {len(ids)} pieces, and not the prompt with {number} new ones behind it")
    return tuple(ids[len(prompt) : len(prompt) + number])


def _until_read(command: Sequence[str], read: Callable[[str, str], T]) -> T:
    """Run a tool until its output is whole."""
    for _ in range(_TRIES - 1):
        try:
            return read(*_call(command))
        except _Incomplete:
            continue
    return read(*_call(command))


def _call(command: Sequence[str]) -> tuple[str, str]:
    # A parent that waits for OpenMP threads of its own must not hand its settings on.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KMP_"))}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{Path(command[0]).name} took longer than {_TIMEOUT:.0f} s") from error
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode:
        last = (err.strip() or out.strip() or "nothing").splitlines()[-1]
        raise PeerError(f"{Path(command[0]).name} ended with status {done.returncode}: {last}")
    return out, err


def rows(pair: Pair, setting: Setting, folder: Path) -> list[Method]:
    """Plain, and with the draft model at each k; weights in the run's own dtype."""
    from specdec.bench.gguf_file import LAYOUTS, write_gguf

    files = {name: setting.folder / f"{name}.gguf" for name in ("target", "draft")}
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        setting.say(f"writing the {name} for llama.cpp")
        write_gguf(model, files[name], setting.weights)
    tools = {name: str(_tool(folder, name)) for name in TOOLS}
    kind = LAYOUTS[setting.weights] if setting.weights else dtype_name(setting.dtype)

    length, plain_ids = setting.max_new_tokens, dict[tuple[int, ...], tuple[int, ...]]()

    def command(tool: str, prompt: Sequence[int]) -> list[str]:
        text, room = "".join(map(piece, prompt)), 2 * (len(prompt) + length)
        common = ["-m", str(files["target"]), "-p", text, "-n", str(length), "-c", str(room)]
        return [tools[tool], *common, "--temp", "0", "-t", str(setting.threads), "--ignore-eos"]

    def plain(prompt: Sequence[int]) -> Made:
        key = tuple(prompt)
        if key not in plain_ids:
            ask = [*command(COMPLETION, prompt), "-no-cnv"]
            plain_ids[key] = _until_read(ask, lambda out, _: parse_ids(out, prompt, length))
        test = ["-p", "0", "-n", "0", "-pg", f"{len(prompt)},{length}", "-r", "1", "-o", "json"]
        run = [tools[BENCH], "-m", str(files["target"]), "-t", str(setting.threads), *test]
        return Made(plain_ids[key], length, _until_read(run, lambda out, _: parse_bench(out)))

    def speculative(prompt: Sequence[int], k: int) -> Made:
        drafting = ["-md", str(files["draft"]), "-td", str(setting.threads), "--spec-type", "draft-simple"]
        run = [*command(SPECULATION, prompt), *drafting, "--spec-draft-n-max", str(k)]
        tokens, printed = _until_read(
            run, lambda out, err: (parse_ids(out, prompt, length), parse_speculative(out + err))
        )
        # It may go beyond the asked number within its last round; its time is for all of them.
        share = length / printed.num_tokens
        steps = (printed.num_tokens - printed.num_accepted) * share
        return Made(
            tokens,
            max(round(steps), 1),
            printed.prompt_seconds + printed.text_seconds * share,
            printed.prompt_seconds,
        )

    made = [Method("llama.cpp", ENGINE, PLAIN, "llama.cpp", f"llama.cpp, {kind}", plain)]
    for k in setting.ks:
        made.append(
            Method(
                f"llama.cpp-draft-k{k}",
                ENGINE,
                SPECULATIVE,
                "llama.cpp",
                f"llama.cpp, {kind}, draft model, k={k}",
                lambda prompt, k=k: speculative(prompt, k),  # type: ignore[misc]
                drafter="model",
                k=k,
            )
        )
    return made
