"""One record per text, in the shape that vLLM's servers answer with (`--per-request-spec-decode-metrics detailed`).

The names and their meanings are vLLM's (docs.vllm.ai, "Per-Request Acceptance Metrics"), so that what reads its answers
reads these: only rounds that drafted are steps; `acceptance_histogram[n]` is how many steps accepted n drafted
tokens, with `num_spec_tokens + 1` entries; no count includes the target's own token of a round, but
`mean_acceptance_length`, which is 1 + accepted / steps, does. Of trees, `num_draft_tokens` counts all nodes, and
`num_spec_tokens` is the depth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.generation import Generation


def metrics(accepted: Sequence[int], drafted: Sequence[int], num_spec_tokens: int) -> dict[str, Any]:
    """`metrics.speculative_decoding` of one text. `accepted`, `drafted`: by round; rounds without a draft are no steps.

    `num_spec_tokens`: the longest draft of a round that was possible; more if more was accepted. A text without any
    draft has a mean acceptance length of 1.
    """
    steps = [(a, d) for a, d in zip(accepted, drafted, strict=True) if d]
    taken, proposed = [a for a, _ in steps], [d for _, d in steps]
    longest = max([num_spec_tokens, *taken])
    return {
        "mean_acceptance_length": 1 + (sum(taken) / len(steps) if steps else 0.0),
        "draft_acceptance_rate": sum(taken) / sum(proposed) if steps else 0.0,
        "acceptance_histogram": [taken.count(n) for n in range(longest + 1)],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": sum(taken),
        "num_draft_tokens": sum(proposed),
        "num_spec_tokens": longest,
        "per_step_accepted": taken,
        "per_step_drafted": proposed,
    }


def _record(name: str, num_prompt: int, num_new: int, found: dict[str, Any], **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
    return {"id": name, "usage": usage, "metrics": {"speculative_decoding": found}, **more}


def of_generation(generation: Generation, name: str = "") -> dict[str, Any]:
    """The record of a text that `decoder.generate` made; `finish_reason` is ours."""
    rounds = generation.trace.rounds
    found = metrics(
        [r.num_accepted for r in rounds],
        [r.num_nodes for r in rounds],
        max((r.depth_proposed for r in rounds), default=0),
    )
    reason = generation.finish_reason
    return _record(name, len(generation.prompt), len(generation.tokens), found, finish_reason=reason)


def _num_spec_tokens(setting: Mapping[str, Any], rounds: Mapping[str, Sequence[int]]) -> int:
    """What the setting allows; where a policy decides, the most that it drafted in this text."""
    if setting.get("k"):
        return int(setting["k"])
    if setting.get("tree"):
        return len(setting["tree"])
    # Nodes of a tree are more than its depth; the depth that was decided about is what is known of it.
    is_tree = "tree" in str(setting.get("policy"))
    return max(rounds["evaluated" if is_tree else "nodes"], default=0)


def of_document(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A record for every prompt of every finished cell; `specdec` says which setting, and whether the text is plain
    decoding's. Raises `InputError` for rows that do not list their rounds."""
    for cell in document["cells"]:
        if cell["status"] != "done":
            continue
        for row in cell["rows"]:
            rounds = row.get("rounds")
            if rounds is None:
                raise InputError(
                    f"prompt {row.get('id')!r} does not list its rounds: make the store with specdec sweep"
                )
            found = metrics(rounds["accepted"], rounds["nodes"], _num_spec_tokens(cell["setting"], rounds))
            ours = {"cell": cell.get("key"), "category": row.get("category"), "identical": row.get("identical")}
            yield _record(
                str(row["id"]),
                row["num_prompt_tokens"],
                row["num_tokens"],
                found,
                model=cell["setting"].get("target"),
                specdec={**ours, "setting": cell["setting"]},
            )


def write(records: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """One JSON object per line; returns how many."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)
