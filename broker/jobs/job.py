"""The job of a run: what was handed out, and the cells a result of it may fill."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple, Self

from auth.keys import digest_of
from broker.errors import InvalidRequest, Violation

MAX_CELLS = 100_000  # as many records as schemas/result.json allows
FLOOR = "floor"  # upstream's prompt_id of every floor cell
MAIN_TIER = "main"
FLOOR_TIER = "dumb_model"


class Cell(NamedTuple):
    """One answer to be given: a task under a prompt; `tier` is main or dumb_model."""

    task_id: str
    prompt_id: str
    tier: str


@dataclass(frozen=True, slots=True)
class Job:
    """A run's payload; `model_ref` is the id its records carry as model_id."""

    run_id: str
    model_ref: str
    tasks: tuple[dict[str, Any], ...]
    floor_tasks: tuple[dict[str, Any], ...]
    prompts: tuple[dict[str, Any], ...]
    config: dict[str, Any]

    @classmethod
    def from_payload(cls, run_id: str, payload: dict[str, Any]) -> Self:
        """The job as stored in run_queue.job.

        Raises InvalidRequest for more cells than a result can hold records: enqueue a job
        through here, and no runner computes what could never be submitted.
        """
        job = cls(
            run_id=run_id,
            model_ref=payload["config"]["models"][0]["id"],
            tasks=tuple(payload["tasks"]),
            floor_tasks=tuple(payload.get("floor_tasks") or ()),
            prompts=tuple(payload["prompts"]),
            config=payload["config"],
        )
        if job.cell_count > MAX_CELLS:
            raise InvalidRequest(
                violations=(Violation("/tasks", f"a run has at most {MAX_CELLS} cells"),)
            )
        return job

    @property
    def cell_count(self) -> int:
        """The number of cells."""
        return len(self.tasks) * len(self.prompts) + len(self.floor_tasks)

    def cells(self) -> Iterator[Cell]:
        """Every cell a result may fill, in the job's order."""
        yield from self.main_cells()
        for task in self.floor_tasks:
            yield Cell(task["id"], FLOOR, FLOOR_TIER)

    def main_cells(self) -> Iterator[Cell]:
        """Every cell a complete result fills: a resumed run repeats no failed floor cell."""
        for task in self.tasks:
            for prompt in self.prompts:
                yield Cell(task["id"], prompt["id"], MAIN_TIER)

    def scorers(self) -> dict[tuple[str, str], str]:
        """The scorer of each (task_id, tier): the job's, not what the result says of it."""
        return {(task["id"], MAIN_TIER): task["scorer"] for task in self.tasks} | {
            (task["id"], FLOOR_TIER): task["scorer"] for task in self.floor_tasks
        }


def harness_hash(config: dict[str, Any]) -> str:
    """Return what the harness writes as `config_hash` of a config: 16 hex digits.

    Of the config that it ran, with the paths of its own machine: two machines that run one job
    write two hashes (upstream: json.dumps with sort_keys and Python's other defaults).
    """
    text = json.dumps(config, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def comparable_hash(config: Mapping[str, Any]) -> str:
    """Return SHA-256 over the canonical JSON of a config without `run.name`, 64 hex digits.

    Every run has a name of its own; all else of the config is the same where two runs may be
    compared.
    """
    run = config.get("run")
    if isinstance(run, dict):
        unnamed = {name: value for name, value in run.items() if name != "name"}
        config = {**config, "run": unnamed}
    return digest_of(config)


def as_stored(value: Any) -> Any:
    """Return a JSON value as PostgreSQL's jsonb gives it back: floats that it keeps otherwise.

    jsonb holds decimals, so 1e22 comes back as an integer and -0.0 as 0.0. A hash over the value
    as it was sent would not be the hash of what is handed out and, later, submitted against.
    """
    if isinstance(value, dict):
        return {name: as_stored(child) for name, child in value.items()}
    if isinstance(value, list):
        return [as_stored(child) for child in value]
    if isinstance(value, float):
        text = repr(value)
        # Only an exponent is spelled out. A body of 32 MiB may hold six million others.
        return (json.loads(format(Decimal(text), "f")) if "e" in text else value) + 0
    return value
