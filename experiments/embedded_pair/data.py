"""The training text of the embedded pair: the Python standard library's own source.

Every machine with Python has it. Files are split by a hash of their path, so that the held-out set is the same on
every machine with the same Python version; the prompts that the commands use come from held-out files only.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
HELD_OUT_PERCENT = 3
# Tables rather than code: they would teach the model to count in hexadecimal.
SKIPPED = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "idlelib/Icons", "test/encoded_modules")
MAX_BYTES = 200_000
# Identifiers keep their underscores and a leading space; a line break takes its indentation with it.
PATTERN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"


def stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if not any(part in relative for part in SKIPPED) and 200 < path.stat().st_size < MAX_BYTES:
            files.append(path)
    return files


def is_held_out(path: Path) -> bool:
    relative = path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix()
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def texts(held_out: bool) -> Iterator[tuple[Path, str]]:
    for path in stdlib_files():
        if is_held_out(path) == held_out:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a test fixture in another encoding


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in texts(held_out=False)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode_split(tokenizer: PreTrainedTokenizerFast, held_out: bool, seed: int = 0) -> np.ndarray:
    """All files of one split in a fixed random order, each opened by end-of-text; int32, 1-D."""
    documents = [text for _, text in texts(held_out)]
    np.random.default_rng(seed).shuffle(documents)
    rows = tokenizer(documents)["input_ids"]
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]
