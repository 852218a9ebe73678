"""Enqueue: runs enter the queue, up to a thousand in one transaction, all or none.

The way of an enqueue: every run is checked first, so that all that is wrong is told at once; then
one transaction writes models, tasks, prompts, `runs` and `run_queue` rows, and its commit wakes the
claims that wait. The same run_id with the same content, or the same Idempotency-Key with the same
body, is answered with what is there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from auth.keys import digest_of
from broker import model_descriptors, task_rows
from broker.credentials import Admin
from broker.errors import Conflict, InvalidRequest, UnknownQuantization, Violation
from broker.jobs import MAX_CELLS, as_stored
from broker.model_descriptors import Lookups, ModelRows
from broker.strict_json import MAX_VIOLATIONS
from broker.times import parse_time
from config.settings import Settings
from db import admin, models, run_queue, submissions, tasks
from db.pool import Executor, retries
from db.run_queue import QueuedRun

DEFAULT_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that passed every check that needs no transaction."""

    row: QueuedRun
    model: ModelRows | None
    at: str


class Enqueue:
    """Adds runs to the queue."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings) -> None:
        self._pool = pool
        self._settings = settings

    @retries
    async def add(
        self, by: Admin, runs: Sequence[Mapping[str, Any]], idempotency_key: str | None
    ) -> list[dict[str, Any]]:
        """Add runs that fit the schema; return {run_id, queue_id, status, created} of each.

        Raises InvalidRequest or UnknownQuantization with every violation, or Conflict.
        """
        request_sha256 = digest_of(runs)
        lookups = await models.lookups(self._pool)
        prepared = self._prepare(runs, lookups)
        async with self._pool.acquire() as connection, connection.transaction():
            if idempotency_key is not None:
                before = await _answered(connection, by, idempotency_key, request_sha256)
                if before is not None:
                    return before
            answer = await self._write(connection, prepared)
            await admin.audit(connection, by.actor, "queue.add", runs=len(answer))
            if idempotency_key is not None:
                await admin.remember_answer(
                    connection, by.actor, idempotency_key, request_sha256, answer
                )
        return answer

    def _prepare(self, runs: Sequence[Mapping[str, Any]], lookups: Lookups) -> list[Prepared]:
        wrong = _twice([run.get("run_id") for run in runs], "/runs", "run_id")
        wrong += [v for i, run in enumerate(runs) for v in _check(run, lookups, f"/runs/{i}")]
        if any(violation.pointer.endswith("/quantization") for violation in wrong):
            raise UnknownQuantization(None, tuple(wrong[:MAX_VIOLATIONS]))
        if wrong:
            raise InvalidRequest(None, tuple(wrong[:MAX_VIOLATIONS]))
        return [self._prepare_run(run, lookups, f"/runs/{i}") for i, run in enumerate(runs)]

    def _prepare_run(self, run: Mapping[str, Any], lookups: Lookups, at: str) -> Prepared:
        described = None if "model_id" in run["model"] else model_descriptors.rows(
            run["model"], lookups
        )  # fmt: skip
        run_id = UUID(run["run_id"]) if "run_id" in run else uuid4()
        job = _job(run, run_id)
        not_before = run.get("not_before")
        row = QueuedRun(
            run_id=run_id,
            model_id=described.model.model_id if described else UUID(run["model"]["model_id"]),
            job=job,
            config_hash=job["config_hash"],
            priority=int(run.get("priority", DEFAULT_PRIORITY)),
            not_before=parse_time(not_before, f"{at}/not_before") if not_before else None,
            max_attempts=int(run.get("max_attempts", self._settings.max_attempts)),
            max_runtime_s=int(run["max_runtime_s"]) if "max_runtime_s" in run else None,
            batch_id=UUID(run["batch_id"]) if "batch_id" in run else None,
        )
        return Prepared(row, described, at)

    async def _write(
        self, connection: Executor, prepared: Sequence[Prepared]
    ) -> list[dict[str, Any]]:
        await _write_models(connection, prepared)
        await _write_tasks(connection, prepared)
        run_ids = [each.row.run_id for each in prepared]
        # In one order, as the models below; and added before we look: where the same runs are being
        # enqueued beside us, this waits for them, and then finds them there.
        new = await submissions.add_runs(connection, sorted(run_ids))
        there = {row["run_id"]: row for row in await run_queue.enqueued(connection, run_ids)}
        _refuse_conflicts(prepared, there, new)
        await run_queue.enqueue(
            connection, [each.row for each in prepared if each.row.run_id in new]
        )
        rows = {row["run_id"]: row for row in await run_queue.enqueued(connection, run_ids)}
        return [
            {
                "run_id": str(run_id),
                "queue_id": str(rows[run_id]["queue_id"]),
                "status": rows[run_id]["status"],
                "created": run_id in new,
            }
            for run_id in run_ids
        ]


async def _answered(
    connection: Executor, by: Admin, key: str, request_sha256: str
) -> list[dict[str, Any]] | None:
    """Return what this key was answered before, once no request of the same key is in flight."""
    await admin.lock_answer(connection, by.actor, key)
    before = await admin.find_answer(connection, by.actor, key)
    if before is None:
        return None
    if before["request_sha256"] != request_sha256:
        raise Conflict("This Idempotency-Key was used with another body: draw a new one.")
    return before["answer"]


def _check(run: Mapping[str, Any], lookups: Lookups, at: str) -> list[Violation]:
    wrong = []
    if "model_id" not in run["model"]:
        wrong += model_descriptors.check(run["model"], lookups, f"{at}/model")
    wrong += _twice([task["id"] for task in run["tasks"]], f"{at}/tasks")
    wrong += _twice([task["id"] for task in run.get("floor_tasks", ())], f"{at}/floor_tasks")
    wrong += _twice([prompt["id"] for prompt in run["prompts"]], f"{at}/prompts")
    # What no result can hold is refused before a runner computes it.
    if len(run["tasks"]) * len(run["prompts"]) + len(run.get("floor_tasks", ())) > MAX_CELLS:
        wrong.append(Violation(f"{at}/tasks", f"a run has at most {MAX_CELLS} cells"))
    return wrong


def _twice(ids: Sequence[str | None], at: str, member: str = "id") -> list[Violation]:
    """What is named by its id must be there once: two could not be told apart in a result."""
    first = {each: i for i, each in reversed(list(enumerate(ids)))}
    return [
        Violation(f"{at}/{i}/{member}", f"is the {member} of {at}/{first[each]} too")
        for i, each in enumerate(ids)
        if each is not None and first[each] != i
    ]


def _job(run: Mapping[str, Any], run_id: UUID) -> dict[str, Any]:
    """Return the job as it will be handed out.

    The harness writes config.run.name into its result, so that is the run_id.
    """
    config = as_stored(run["config"])
    config["run"] = {**config.get("run", {}), "name": str(run_id)}
    config.setdefault("models", [{"id": run["model"].get("name", run["model"].get("model_id"))}])
    job = {
        "tasks": [{**task, "tier": "main"} for task in run["tasks"]],
        "floor_tasks": [{**task, "tier": "dumb_model"} for task in run.get("floor_tasks", ())],
        "prompts": run["prompts"],
        "config": config,
        "config_hash": digest_of(config),
    }
    return as_stored(job)


async def _write_models(connection: Executor, prepared: Sequence[Prepared]) -> None:
    by_id = {each.row.model_id: each.model for each in prepared if each.model}
    # In one order in every transaction, or two enqueues of the same models could deadlock.
    described = [by_id[model_id] for model_id in sorted(by_id)]
    creators = {m.creator.creator_id: m.creator for m in described if m.creator}
    await models.add_creators(connection, [creators[key] for key in sorted(creators)])
    await models.add(connection, [m.model for m in described])
    await models.add_sources(connection, [s for m in described for s in m.sources])
    known = await models.known(connection, [each.row.model_id for each in prepared])
    wrong = tuple(
        violation
        for each in prepared
        for violation in _check_known(each, known.get(each.row.model_id))
    )
    if wrong:
        raise InvalidRequest(None, wrong[:MAX_VIOLATIONS])


def _check_known(run: Prepared, model: asyncpg.Record | None) -> list[Violation]:
    """A model that is there already must be one that a claim can fit."""
    at = f"{run.at}/model"
    if model is None:
        return [Violation(f"{at}/model_id", "is not a model we know: send its descriptor")]
    if run.model is not None and run.model.model.quantization_id != model["quantization_id"]:
        # Upstream's provisional id knows no quantization: the files of one repository would be
        # one model, and a run would be handed out by the VRAM need of another one.
        detail = (
            f"has the id of {model['name']} in another quantization: give its model_hash, or a"
            " model_source_size and the url of this very file"
        )
        return [Violation(at, detail)]
    if model["quantization_id"] is None:
        return [Violation(at, f"{model['name']} has no quantization in the database")]
    if model["parameters_b"] is None:
        return [Violation(at, f"{model['name']} has no parameter count in the database")]
    return []


async def _write_tasks(connection: Executor, prepared: Sequence[Prepared]) -> None:
    cells = [cell for each in prepared for cell in task_rows.cells(each.row.job)]
    by_task = {cell.task.natural_key_hash: cell.task for cell in cells}
    by_prompt = {cell.prompt.content_sha256: cell.prompt for cell in cells}
    # In one order, as above.
    await tasks.add_tasks(connection, [by_task[key] for key in sorted(by_task)])
    await tasks.add_prompts(connection, [by_prompt[key] for key in sorted(by_prompt)])


def _refuse_conflicts(
    prepared: Sequence[Prepared], there: Mapping[UUID, asyncpg.Record], new: set[UUID]
) -> None:
    """A run_id that exists must be the same run; a run that somebody else wrote stays theirs."""
    for each in prepared:
        run_id = each.row.run_id
        before = there.get(run_id)
        if run_id in new:
            continue
        if before is None:
            raise Conflict(
                f"The run {run_id} exists, and this queue did not make it, or has forgotten it:"
                " draw a new run_id."
            )
        if before["job"] != each.row.job or before["model_id"] != each.row.model_id:
            raise Conflict(f"The run {run_id} is queued with another job or model.")
