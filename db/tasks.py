"""Upstream's tasks and prompts: deterministic rows, so the same cell of two runs is one row."""

from collections.abc import Sequence
from dataclasses import dataclass

from db.pool import Executor
from db.queries import load

SQL = load("tasks")


@dataclass(frozen=True, slots=True)
class NewTask:
    """A row of `tasks`; `category` is the name of a task category or None."""

    name: str
    category: str | None
    description: str
    natural_key_hash: str


@dataclass(frozen=True, slots=True)
class NewPrompt:
    """A row of `prompts`: one variant of one task."""

    task_key: str
    file_path: str
    content_sha256: str
    content_length_bytes: int


async def add_tasks(connection: Executor, tasks: Sequence[NewTask]) -> None:
    """Get-or-create tasks by natural key."""
    await connection.execute(
        SQL["add_tasks"],
        [t.name for t in tasks],
        [t.category for t in tasks],
        [t.description for t in tasks],
        [t.natural_key_hash for t in tasks],
    )


async def add_prompts(connection: Executor, prompts: Sequence[NewPrompt]) -> None:
    """Get-or-create prompts; their tasks are there already."""
    await connection.execute(
        SQL["add_prompts"],
        [p.task_key for p in prompts],
        [p.file_path for p in prompts],
        [p.content_sha256 for p in prompts],
        [p.content_length_bytes for p in prompts],
    )
