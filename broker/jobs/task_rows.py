"""Tasks and prompts of a job become upstream's rows, deterministic by their content.

The same cell of two runs is the same row, whoever enqueued it and when.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

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


@dataclass(frozen=True, slots=True)
class _Words:
    """A prompt: its id, the canonical JSON of its id and text, and the text's length."""

    prompt_id: str
    canonical: bytes
    length_bytes: int

    @classmethod
    def of(cls, prompt_id: str, system: str) -> Self:
        """Take a prompt of a job."""
        return cls(prompt_id, canonical_json([prompt_id, system])[1:-1], len(system.encode()))


def cells(job: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield every cell of a job: tasks by prompts, and each floor task once."""
    prompts = [_Words.of(prompt["id"], prompt["system"]) for prompt in job["prompts"]]
    for task in job["tasks"]:
        row, asked = _task(task, None), canonical_json(task["user_prompt"])
        for words in prompts:
            yield _cell(task, row, asked, words)
    floor = _Words.of(FLOOR_PROMPT, "")
    for task in job["floor_tasks"]:
        yield _cell(task, _task(task, "dumb_model"), canonical_json(task["user_prompt"]), floor)


def _task(task: Mapping[str, Any], category: str | None) -> NewTask:
    content = {name: value for name, value in task.items() if name != "tier"}
    digest = hashlib.sha256(f"bakeoff-queue/{task['id']}".encode() + canonical_json(content))
    return NewTask(task["id"], category, task["user_prompt"], digest.hexdigest())


def _cell(task: Mapping[str, Any], row: NewTask, asked: bytes, words: _Words) -> Cell:
    # Both texts, and the task they belong to: two tasks may ask the same words of a model and
    # score the answers differently. It is the canonical JSON of [the task's hash, the prompt's id,
    # system, user_prompt], put together from parts that are written once, not once a cell.
    texts = b'["%b",%b,%b]' % (row.natural_key_hash.encode(), words.canonical, asked)
    prompt = NewPrompt(
        row.natural_key_hash,
        f"bakeoff-queue/{task['id']}/{words.prompt_id}",
        hashlib.sha256(texts).hexdigest(),
        words.length_bytes + len(task["user_prompt"].encode()),
    )
    return Cell(task["id"], words.prompt_id, row, prompt)
