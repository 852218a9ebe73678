"""Enqueue: runs enter the queue, up to a thousand in one transaction, all or none.

The way of an enqueue: a worker process checks every run first, so that all that is wrong is told at
once, and makes rows of it (enqueue_request.py); then one transaction writes models, tasks, prompts,
`runs` and `run_queue` rows, and its commit wakes the claims that wait. This process does not read
the body: whatever its size, heartbeats do not wait for it. The same run_id with the same content,
or the same Idempotency-Key with the same body, is answered with what is there.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from broker.audit.log import Admin, record
from broker.concurrency.workers import WorkerLost, Workers
from broker.documents.strict_json import MAX_VIOLATIONS
from broker.errors import Conflict, InvalidRequest, Unavailable, Violation
from broker.jobs.enqueue_request import Prepared, prepare
from config.settings import Settings
from db import admin, models, run_queue, submissions, tasks
from db.models import NewModel
from db.pool import Executor, retries
from db.run_queue import QueuedRun

# Bodies that are read at once, each of up to 32 MiB. Two, so that a small one passes a large one.
AT_ONCE = 2


class Enqueue:
    """Adds runs to the queue."""

    def __init__(self, pool: asyncpg.Pool, settings: Settings, workers: Workers) -> None:
        self._pool = pool
        self._settings = settings
        self._workers = workers
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def add(
        self, by: Admin, body: bytes, idempotency_key: str | None
    ) -> list[dict[str, Any]]:
        """Add the runs of a body; return {run_id, queue_id, status, created, warnings} of each.

        Raises InvalidJson, DuplicateKey, InvalidRequest or UnknownQuantization with every
        violation, Conflict, or Unavailable when the worker is lost.
        """
        prepared = await self._prepare(body)
        return await self._add(by, prepared, idempotency_key)

    async def check(self, body: bytes) -> list[dict[str, Any]]:
        """Do all that `add` does, and undo it; return {created, warnings} of each run.

        Raises what `add` raises. Ids that are made on the way are not told: none of them lasts.
        """
        answer = await self._try(await self._prepare(body))
        return [{name: run[name] for name in ("created", "warnings")} for run in answer]

    @retries
    async def _try(self, prepared: Prepared) -> list[dict[str, Any]]:
        async with self._pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                return await self._write(connection, prepared)
            finally:
                await transaction.rollback()

    async def _prepare(self, body: bytes) -> Prepared:
        lookups = await models.lookups(self._pool)
        try:
            async with self._turns:
                return await self._workers.call(prepare, body, lookups, self._settings.max_attempts)
        except WorkerLost as error:
            raise Unavailable(
                "The process that read this body was lost: send it again in a few seconds, or in"
                " several requests."
            ) from error

    @retries
    async def _add(
        self, by: Admin, prepared: Prepared, idempotency_key: str | None
    ) -> list[dict[str, Any]]:
        async with self._pool.acquire() as connection, connection.transaction():
            if idempotency_key is not None:
                before = await _answered(connection, by, idempotency_key, prepared.request_sha256)
                if before is not None:
                    return before
            answer = await self._write(connection, prepared)
            new = [run["run_id"] for run in answer if run["created"]]
            await record(connection, by.actor, "queue.add", runs=len(answer), run_ids=new)
            if idempotency_key is not None:
                await admin.remember_answer(
                    connection, by.actor.name, idempotency_key, prepared.request_sha256, answer
                )
        return answer

    async def _write(self, connection: Executor, prepared: Prepared) -> list[dict[str, Any]]:
        await _write_models(connection, prepared)
        for text in prepared.tasks:
            await tasks.add_tasks(connection, text)
        for text in prepared.prompts:
            await tasks.add_prompts(connection, text)
        run_ids = [each.row.run_id for each in prepared.runs]
        # In one order, as the models below; and added before we look: where the same runs are being
        # enqueued beside us, this waits for them, and then finds them there.
        new = await submissions.add_runs(connection, sorted(run_ids))
        old = [each.row for each in prepared.runs if each.row.run_id not in new]
        if old:
            _refuse_conflicts(old, await run_queue.compared(connection, old))
        await run_queue.enqueue(
            connection, [each.row for each in prepared.runs if each.row.run_id in new]
        )
        rows = {row["run_id"]: row for row in await run_queue.enqueued(connection, run_ids)}
        earlier = await run_queue.same_config(
            connection, sorted({each.row.config_hash for each in prepared.runs}), run_ids
        )
        return [
            {
                "run_id": str(each.row.run_id),
                "queue_id": str(rows[each.row.run_id]["queue_id"]),
                "status": rows[each.row.run_id]["status"],
                "created": each.row.run_id in new,
                "warnings": [*each.warnings, *_again(earlier.get(each.row.config_hash))],
            }
            for each in prepared.runs
        ]


async def _answered(
    connection: Executor, by: Admin, key: str, request_sha256: str
) -> list[dict[str, Any]] | None:
    """Return what this key was answered before, once no request of the same key is in flight."""
    await admin.lock_answer(connection, by.actor.name, key)
    before = await admin.find_answer(connection, by.actor.name, key)
    if before is None:
        return None
    if before["request_sha256"] != request_sha256:
        raise Conflict("This Idempotency-Key was used with another body: draw a new one.")
    return before["answer"]


async def _write_models(connection: Executor, prepared: Prepared) -> None:
    await models.add_creators(connection, prepared.creators)
    await models.add(connection, prepared.models)
    named = [model for each in prepared.runs for model in each.models]
    found = await models.known(
        connection,
        list({model_id for _, model_id, _ in named}),
        list({new.model_hash for _, _, new in named if new and new.model_hash}),
    )
    known = {row["model_id"]: row for row in found}
    hashes = {row["model_hash"]: row["model_id"] for row in found}
    wrong = tuple(
        violation
        for at, model_id, new in named
        for violation in _check_known(at, new, known.get(model_id), hashes)
    )
    if wrong:
        raise InvalidRequest(None, wrong[:MAX_VIOLATIONS])
    # Only now: a model whose hash another row has was not added, and has no row to belong to.
    for text in prepared.sources:
        await models.add_sources(connection, text)


def _again(earlier: asyncpg.Record | None) -> list[str]:
    """Say that a config is in the queue already: to enqueue it twice is seldom meant."""
    if earlier is None:
        return []
    batch = f" of batch {earlier['batch_id']}" if earlier["batch_id"] else ""
    at = f"{earlier['created_at']:%Y-%m-%dT%H:%M:%SZ}"
    return [f"the same config was enqueued at {at} as run {earlier['run_id']}{batch}"]


def _check_known(
    at: str, new: NewModel | None, model: asyncpg.Record | None, hashes: Mapping[str, UUID]
) -> list[Violation]:
    """A model that is there already must be one that a claim can fit."""
    if model is None and new is not None:  # not added: another row has its hash, which is unique
        detail = f"is that of {hashes.get(str(new.model_hash))}: name that model by its model_id"
        return [Violation(f"{at}/model_hash", detail)]
    if model is None:
        return [Violation(f"{at}/model_id", "is not a model we know: send its descriptor")]
    if new is not None and new.quantization_id != model["quantization_id"]:
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


def _refuse_conflicts(old: Sequence[QueuedRun], differs: Mapping[UUID, Sequence[str]]) -> None:
    """A run_id that exists must be the same run; a run that somebody else wrote stays theirs."""
    for run in old:
        if run.run_id not in differs:
            raise Conflict(
                f"The run {run.run_id} exists, and this queue did not make it, or has forgotten it:"
                " draw a new run_id."
            )
        if differs[run.run_id]:
            raise Conflict(
                f"The run {run.run_id} is queued with another {', '.join(differs[run.run_id])}:"
                " draw a new run_id, or send the run as it was."
            )
