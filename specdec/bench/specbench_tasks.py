"""Spec-Bench's six tasks (Xia et al. 2024, arXiv:2401.07851) and the categories of its questions."""

from __future__ import annotations

from collections.abc import Iterable

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
# The name of a task in the file, and the head of its column. MT-Bench's eight categories are one task.
COLUMNS = {
    "mt_bench": "Multi-turn",
    "translation": "Translation",
    "summarization": "Summarization",
    "qa": "QA",
    "math_reasoning": "Math",
    "rag": "RAG",
}


def task_of(category: str) -> str:
    """The task that a category belongs to; a category of another set is its own."""
    return "mt_bench" if category in MT_BENCH else category


def is_spec_bench(categories: Iterable[str]) -> bool:
    """Whether these are Spec-Bench's: its tasks alone, and one of those that MT-Bench does not have."""
    tasks = {task_of(category) for category in categories}
    return tasks <= set(COLUMNS) and bool(tasks - {"mt_bench"})
