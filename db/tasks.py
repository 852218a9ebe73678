"""Upstream's tasks and prompts: deterministic rows, so the same cell of two runs is one row."""

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


async def add_tasks(connection: Executor, tasks: str) -> None:
    """Get-or-create tasks by natural key: a JSON array of objects with the members of NewTask."""
    await connection.execute(SQL["add_tasks"], tasks)


async def add_prompts(connection: Executor, prompts: str) -> None:
    """Get-or-create prompts, whose tasks are there already: a JSON array, as of NewPrompt."""
    await connection.execute(SQL["add_prompts"], prompts)
