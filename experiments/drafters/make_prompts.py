"""The three kinds of prompts of this study, made of what the package ships and of the sentences below.

    python experiments/drafters/make_prompts.py

code: beginnings of Python source that the embedded pair never saw. edit: such a source, whole, and then its beginning
again: what follows stands in the prompt. prose: English sentences, which the embedded target saw in docstrings only.
"""

from __future__ import annotations

import json
from pathlib import Path

from specdec.bench.prompts import read_prompts

HERE = Path(__file__).parent
PER_KIND = 6
PROSE = (
    "The library reads a file line by line. Every line holds one record, and a record that cannot be read is skipped. "
    "When the end of the file is reached, the",
    "A queue keeps its elements in the order in which they were added. The first element that was added is the first "
    "that is removed. This makes it useful whenever",
    "To install the program, download the archive and unpack it into a folder of your choice. Then open a terminal in "
    "that folder and run the following command. If the command fails,",
    "There are two ways to compare a pair of values. The first one looks at their identity and the second one looks at "
    "their contents. In most cases you want the second one, because",
    "The server waits for a connection from a client. Once the connection is open, the client sends a request and the "
    "server returns a response. If the request is not valid, the server",
    "This chapter explains how errors are reported. An error has a type and a message. The type tells the program what "
    "to do, and the message tells the user what",
)


def main() -> None:
    code = read_prompts(None, PER_KIND)
    rows = [{"id": f"code/{p.id}", "category": "code", "text": p.text} for p in code]
    for p in code:
        lines = p.text.split("\n")
        again = "\n".join(lines[: max(1, len(lines) // 3)])
        text = f"{p.text}\n\n\n# The same again.\n\n{again}"
        rows.append({"id": f"edit/{p.id}", "category": "edit", "text": text})
    rows += [{"id": f"prose/{i}", "category": "prose", "text": text} for i, text in enumerate(PROSE)]
    with open(HERE / "prompts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
