"""llama.cpp's command-line tools as a peer: the pair as GGUF files, the tools' own timing lines parsed.

A tool's process also loads the model; what counts is the time of prompt and text by its own clock.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specdec.bench.rows import PLAIN, SPECULATIVE, Made, Method
from specdec.bench.synthetic import Pair, piece
from specdec.errors import InputError, SpecdecError

if TYPE_CHECKING:
    from specdec.bench.peers import Setting

ENGINE = "llama.cpp"
TOOLS = ("llama-completion", "llama-speculative-simple")
_TIMEOUT = 600.0
_NUMBER = r"([0-9.]+)"
_PIECE = re.compile(r"<t([0-9]{5})>")
_ENCODED = re.compile(rf"encoded\s+(\d+) tokens in\s+{_NUMBER} seconds")
_DECODED = re.compile(rf"decoded\s+(\d+) tokens in\s+{_NUMBER} seconds")
_ACCEPTED = re.compile(r"n_accept\s*=\s*(\d+)")
_PROMPT = re.compile(rf"prompt eval time\s*=\s*{_NUMBER} ms")
_EVAL = re.compile(rf"(?<!prompt )eval time\s*=\s*{_NUMBER} ms /\s*(\d+) runs")


class PeerError(SpecdecError, RuntimeError):
    """A peer's tool failed, or printed something else than what is known of it."""


@dataclass(frozen=True)
class Printed:
    """A tool's own figures. `num_tokens` new ones; `num_accepted` of them drafted."""

    prompt_seconds: float
    text_seconds: float
    num_tokens: int
    num_accepted: int = 0


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


def parse_plain(text: str) -> Printed:
    """`llama-completion`'s performance lines. Raises `PeerError` when they are not there."""
    prompt, text_line = _PROMPT.search(text), _EVAL.search(text)
    if prompt is None or text_line is None:
        raise PeerError(f"llama-completion printed no timing lines; the end of its output: {text[-300:]!r}")
    # The first new token comes out of the prompt's evaluation, so a text of n tokens has n - 1 runs.
    return Printed(float(prompt[1]) / 1e3, float(text_line[1]) / 1e3, int(text_line[2]) + 1)


def parse_speculative(text: str) -> Printed:
    """`llama-speculative-simple`'s lines. Raises `PeerError` when they are not there."""
    encoded, decoded, accepted = _ENCODED.search(text), _DECODED.search(text), _ACCEPTED.search(text)
    if encoded is None or decoded is None or accepted is None:
        raise PeerError(f"llama-speculative-simple printed no timing lines; the end of its output: {text[-300:]!r}")
    return Printed(float(encoded[2]), float(decoded[2]), int(decoded[1]), int(accepted[1]))


def parse_ids(text: str, prompt: Sequence[int]) -> list[int]:
    """The new ids in a tool's output, which begins with the prompt. Raises `PeerError` when it does not."""
    ids = [int(number) for number in _PIECE.findall(text)]
    if ids[: len(prompt)] != list(prompt):
        raise PeerError("llama.cpp's output does not begin with the prompt's pieces")
    return ids[len(prompt) :]


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
    from specdec.bench.gguf_file import write_gguf

    files = {name: setting.folder / f"{name}.gguf" for name in ("target", "draft")}
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        setting.say(f"writing the {name} for llama.cpp")
        write_gguf(model, files[name])
    tools = {name: str(_tool(folder, name)) for name in TOOLS}
    kind = str(setting.dtype).removeprefix("torch.")

    def command(tool: str, prompt: Sequence[int]) -> list[str]:
        text = "".join(map(piece, prompt))
        length = 2 * (len(prompt) + setting.max_new_tokens)
        common = ["-m", str(files["target"]), "-p", text, "-n", str(setting.max_new_tokens), "-c", str(length)]
        return [tools[tool], *common, "--temp", "0", "-t", str(setting.threads), "--ignore-eos"]

    def plain(prompt: Sequence[int]) -> Made:
        out, err = _call([*command(TOOLS[0], prompt), "-no-cnv"])
        printed = parse_plain(out + err)
        tokens = parse_ids(out, prompt)
        seconds = printed.prompt_seconds + printed.text_seconds
        return Made(tuple(tokens), len(tokens), seconds, printed.prompt_seconds)

    def speculative(prompt: Sequence[int], k: int) -> Made:
        drafting = ["-md", str(files["draft"]), "-td", str(setting.threads), "--spec-type", "draft-simple"]
        out, err = _call([*command(TOOLS[1], prompt), *drafting, "--spec-draft-n-max", str(k)])
        printed = parse_speculative(out + err)
        # It may go beyond the asked number within its last round; its time is for all of them.
        per_token = printed.text_seconds / max(printed.num_tokens, 1)
        tokens = parse_ids(out, prompt)[: setting.max_new_tokens]
        seconds = printed.prompt_seconds + per_token * len(tokens)
        steps = (printed.num_tokens - printed.num_accepted) * len(tokens) / max(printed.num_tokens, 1)
        return Made(tuple(tokens), max(round(steps), 1), seconds, printed.prompt_seconds)

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
