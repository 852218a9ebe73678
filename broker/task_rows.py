"""Tasks and prompts of a job become upstream's rows, deterministic by their content.

The same cell of two runs is the same row, whoever enqueued it and when.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from auth.keys import canonical_json
from db.tasks import NewPrompt, NewTask

FLOOR_PROMPT = "floor"


@dataclass(frozen=True, slots=True)
class Cell:
    """A (task, prompt) pair of a job, with its rows."""

    task_id: str
    prompt_id: str
    task: NewTask
    prompt: NewPrompt


def cells(job: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield every cell of a job: tasks by prompts, and each floor task once."""
    for task in job["tasks"]:
        row = _task(task, None)
        for prompt in job["prompts"]:
            yield _cell(task, row, prompt["id"], prompt["system"])
    for task in job["floor_tasks"]:
        yield _cell(task, _task(task, "dumb_model"), FLOOR_PROMPT, "")


def _task(task: Mapping[str, Any], category: str | None) -> NewTask:
    content = {name: value for name, value in task.items() if name != "tier"}
    digest = hashlib.sha256(f"bakeoff-queue/{task['id']}".encode() + canonical_json(content))
    return NewTask(task["id"], category, task["user_prompt"], digest.hexdigest())


def _cell(task: Mapping[str, Any], row: NewTask, prompt_id: str, system: str) -> Cell:
    # Both texts, and the task they belong to: two tasks may ask the same words of a model and
    # score the answers differently.
    texts = canonical_json([row.natural_key_hash, prompt_id, system, task["user_prompt"]])
    prompt = NewPrompt(
        row.natural_key_hash,
        f"bakeoff-queue/{task['id']}/{prompt_id}",
        hashlib.sha256(texts).hexdigest(),
        len(system.encode()) + len(task["user_prompt"].encode()),
    )
    return Cell(task["id"], prompt_id, row, prompt)
