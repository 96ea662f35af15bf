"""Write the built-in prompts: beginnings from held-out standard-library files, and hand-written ones.

    python experiments/embedded_pair/make_prompts.py

Held-out files are never trained on (see `specdec.train.stdlib`); the hand-written prompts stand here and nowhere else.
"""

# ruff: noqa: E501  (prompts read better unbroken)

from __future__ import annotations

import json
from pathlib import Path

from specdec.train import stdlib

OUT = Path(__file__).parents[2] / "specdec" / "bench" / "prompts.jsonl"

# (category, file, first words of the first line, number of lines)
HELD_OUT = [
    ("function", "functools.py", "def total_ordering(cls):", 8),
    ("function", "functools.py", "def update_wrapper(wrapper,", 12),
    ("class", "unittest/suite.py", "class BaseTestSuite(object):", 12),
    ("class", "multiprocessing/connection.py", "class Listener(object):", 10),
    ("class", "idlelib/squeezer.py", "class Squeezer:", 9),
    ("docstring", "asyncio/events.py", "def get_running_loop():", 4),
    ("class", "test/test_fractions.py", "class DummyRational(", 10),
    ("test", "test/test_weakset.py", "class TestWeakSet(", 10),
]

HAND_WRITTEN = [
    (
        "function",
        'def moving_average(values, window):\n    """Return the average of every window of values."""\n'
        "    if window < 1:\n        raise ValueError('window must be positive')\n    result = []\n",
    ),
    ("function", "def parse_header(line):\n    name, sep, value = line.partition(':')\n    if not sep:\n"),
    (
        "class",
        "class Inventory:\n    def __init__(self, items=None):\n        self._items = dict(items or {})\n\n"
        "    def add(self, name, count=1):\n        self._items[name] = self._items.get(name, 0) + count\n\n    def remove(",
    ),
    (
        "class",
        "class LineReader:\n    def __init__(self, stream, encoding='utf-8'):\n        self.stream = stream\n"
        "        self.encoding = encoding\n        self.closed = False\n\n    def close(self):\n",
    ),
    (
        "docstring",
        'def open_archive(path, mode="r", password=None):\n    """Open the archive at path.\n\n'
        "    The mode may be 'r' to read an existing file or 'w' to",
    ),
    (
        "test",
        "import unittest\n\nclass QueueTests(unittest.TestCase):\n    def setUp(self):\n        self.queue = Queue()\n\n"
        "    def test_empty(self):\n        self.assertTrue(self.queue.empty())\n\n    def test_put(self):\n",
    ),
    (
        "edit",
        "def area(shape):\n    width = shape['width']\n    height = shape['height']\n    return width * height\n\n"
        "def perimeter(shape):\n    width = shape['width']\n    height = shape['height']\n    return 2 * (width + height)\n\n"
        "def diagonal(shape):\n",
    ),
    (
        "edit",
        "    def get_name(self):\n        return self._name\n\n    def set_name(self, name):\n        self._name = name\n\n"
        "    def get_title(self):\n        return self._title\n\n    def set_title(self, title):\n",
    ),
]


def excerpt(path: Path, first: str, count: int) -> str:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    return "".join(lines[start : start + count])


def without_break(text: str) -> str:
    """A line break and the indentation after it are one token: a prompt that ends on a bare break would promise that
    the next line is not indented."""
    return text.rstrip("\n")


def main() -> None:
    root = stdlib.root()
    rows = []
    for category, name, first, count in HELD_OUT:
        assert stdlib.is_held_out(name), name
        rows.append(
            {
                "id": f"stdlib/{name}:{first.split('(')[0].split()[-1].rstrip(':')}",
                "category": category,
                "text": without_break(excerpt(root / name, first, count)),
            }
        )
    for number, (category, text) in enumerate(HAND_WRITTEN, 1):
        rows.append({"id": f"written/{number}", "category": category, "text": without_break(text)})
    OUT.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts in {OUT}")


if __name__ == "__main__":
    main()
