"""Writing a model folder whole or not at all: shards of safetensors, their index, and what stands beside them."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from specdec.quant.source import COMPANIONS, INDEX
from specdec.train.provenance import write_json


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place when all went well and goes away when not.

    What stood at `out` is replaced only then.
    """
    aside, old = (out.resolve().parent / f".{out.name}.{secrets.token_hex(4)}.{what}" for what in ("partial", "old"))
    aside.mkdir()
    try:
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
        if old.exists():
            shutil.rmtree(old)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
        if old.exists() and not out.exists():
            old.rename(out)


class ShardWriter:
    """Tensors in the order they are given; a file is written whenever `max_bytes` would be passed."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._names: list[list[str]] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = self.total = 0

    def make_room(self, num_bytes: int) -> None:
        """Write what is held if that many bytes more would not fit: before they are made, rather than after."""
        if self._held and self._held_bytes + num_bytes > self.max_bytes:
            self._flush()

    def add(self, name: str, tensor: Tensor) -> None:
        self.make_room(tensor.nbytes)
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes
        self.total += tensor.nbytes

    def close(self) -> None:
        """Write the rest, name the files by their number, and write the index where there are several."""
        if self._held or not self._names:
            self._flush()
        count = len(self._names)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            files = ["model.safetensors"]
        for i, file in enumerate(files):
            # safetensors gives files to their owner alone; they are as readable as all else here.
            self._part(i).chmod(self.folder.stat().st_mode & 0o666)
            self._part(i).rename(self.folder / file)
        if count > 1:
            table = {name: file for names, file in zip(self._names, files, strict=True) for name in names}
            content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(table.items()))}
            write_json(self.folder / INDEX, content)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}"

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._names)), metadata={"format": "pt"})
        self._names.append(list(self._held))
        self._held, self._held_bytes = {}, 0


def copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, generation settings, licence: whatever belongs to the model and is no weight."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and not (out / path.name).exists():
                shutil.copyfile(path, out / path.name)


def write_config(source: Path, out: Path, recipe: dict[str, Any], untie: bool) -> None:
    """The source's `config.json`, with what the weights are stored as; `untie`: the head no longer shares weights."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "specdec", "recipe": recipe}
    if untie:
        config["tie_word_embeddings"] = False
        for name, inner in config.items():
            if isinstance(inner, dict) and (name == "text_config" or "tie_word_embeddings" in inner):
                inner["tie_word_embeddings"] = False
    write_json(out / "config.json", config)
