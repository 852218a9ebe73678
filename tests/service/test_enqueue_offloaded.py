"""An enqueue's body is read in a worker: whatever its size, nothing waits behind it."""

import asyncio
import json
import os
import random
import signal
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from auth.keys import canonical_json, digest_of
from broker.documents import strict_json
from broker.documents.schemas import load_schema
from broker.errors import InvalidRequest
from broker.jobs import enqueue_request, task_rows
from broker.jobs.enqueue_request import MAX_CELLS_TOGETHER, TEXT_LENGTH, TEXT_ROWS
from config.settings import Settings
from db import models, run_queue, tasks
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_admin_queue import counts, post
from tests.service.test_workers import one_worker
from tests.support.fleet import SMALL, code_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]


def tasks_of(count: int, tag: str = "") -> list[dict[str, Any]]:
    """Return so many tasks."""
    return [{"id": f"t{tag}{n}", "user_prompt": f"é{n}", "scorer": "exact"} for n in range(count)]


def prompts_of(count: int) -> list[dict[str, Any]]:
    """Return so many prompts."""
    return [{"id": f"p{n}", "system": f"s{n}"} for n in range(count)]


def sources_of(name: int) -> dict[str, Any]:
    """Return a model with 32 sources of its own."""
    urls = [f"https://x.example/{name}/{n}" for n in range(32)]
    return {**SMALL, "sources": [{"source_type": "direct_url", "url": url} for url in urls]}


@pytest.mark.gen_test
async def test_heartbeats_go_on_while_an_enqueue_is_read(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, runner, lent, pid):
        await fleet.enqueue()
        assert await lent.lent.get() == pid
        job = await runner.take()
        os.kill(pid, signal.SIGSTOP)
        adding = asyncio.create_task(post(fleet, run_of(), run_of()))
        assert await lent.lent.get() == pid
        for _ in range(3):
            assert (await runner.heartbeat(job)).status_code == 200
        assert not adding.done()
        os.kill(pid, signal.SIGCONT)
        assert (await adding).status_code == 201


@pytest.mark.gen_test
async def test_the_server_reads_neither_the_body_nor_a_job(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any, **__: Any) -> None:
        raise AssertionError("the server does a worker's work")

    async with open_fleet(make_settings(), sigstore) as fleet:
        for module, name in (
            (strict_json, "parse"),
            (load_schema("enqueue"), "read"),
            (enqueue_request, "digest_of"),
            (enqueue_request, "as_stored"),
            (task_rows, "cells"),
        ):
            monkeypatch.setattr(module, name, here)
        run = run_of(run_id=str(uuid.uuid4()))
        for created in (True, False):
            answer = await post(fleet, run, key=f"key-{created}")
            assert answer.status_code == 201, answer.text
            assert answer.json()["runs"][0]["created"] is created


@pytest.mark.gen_test
async def test_rows_and_jobs_go_to_the_database_in_pieces_of_text(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, list[Any]] = {}
    for module, verb in ((models, "add_sources"), (tasks, "add_tasks"), (tasks, "add_prompts")):
        monkeypatch.setattr(module, verb, _noted(getattr(module, verb), sent))
    monkeypatch.setattr(run_queue, "PIECE_LENGTH", 1)
    many = [run_of(model=sources_of(n), tasks=tasks_of(50), prompts=prompts_of(60))
            for n in range(70)]  # fmt: skip
    async with open_fleet(make_settings(), sigstore) as fleet:
        answer = await post(fleet, *many)
        assert answer.status_code == 201, answer.text
        # Two pieces, not two a run: what the runs share is written once.
        assert {verb: len(texts) for verb, texts in sent.items()} == {
            "add_sources": 2, "add_tasks": 1, "add_prompts": 2,
        }  # fmt: skip
        for text in (text for texts in sent.values() for text in texts):
            assert len(json.loads(text)) <= TEXT_ROWS
            assert len(text) <= TEXT_LENGTH + 1000
        written = await counts(fleet)
        assert (written["runs"], written["run_queue"], written["models"]) == (70, 70, 70)
        assert (written["model_sources"], written["tasks"]) == (70 * 32, 51)
        assert written["prompts"] == 50 * 60 + 1
        # Each run was a statement of its own, and they still are in the order they were given.
        order = await fleet.pool.fetch("SELECT run_id, created_at FROM run_queue ORDER BY 2")
        assert [str(row[0]) for row in order] == [run["run_id"] for run in answer.json()["runs"]]
        assert len({row[1] for row in order}) == 70


def _noted(verb: Callable[..., Any], sent: dict[str, list[Any]]) -> Callable[..., Any]:
    """Keep what a verb of the database is given."""

    async def noted(connection: Any, given: Any) -> None:
        sent.setdefault(verb.__name__, []).append(given)
        await verb(connection, given)

    return noted


@pytest.mark.gen_test
async def test_what_is_sent_again_is_compared_run_by_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_queue, "PIECE_LENGTH", 1)
    runs = [run_of(run_id=str(uuid.uuid4()), config={"n": 1}) for _ in range(3)]
    other_model = {**SMALL, "model_hash": "ab" * 32}  # of the same name: the job is the same
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert (await post(fleet, *runs)).status_code == 201
        again = (await post(fleet, *runs, run_of())).json()["runs"]
        assert [run["created"] for run in again] == [False, False, False, True]
        before = await counts(fleet)
        for changes in ({"config": {"n": True}}, {"config": {"n": 2}}, {"model": other_model}):
            answer = await post(fleet, run_of(), *runs[:2], {**runs[2], **changes})
            assert code_of(answer) == (409, "conflict"), changes
            assert runs[2]["run_id"] in answer.json()["detail"]
            assert await counts(fleet) == before


@pytest.mark.gen_test
async def test_a_job_is_shown_but_not_read(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    config = {"models": [{"id": "m"}], "n": [2**70, 1e22, 0.1, "é\u2028"]}
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue(config=config)
        row = await run_queue.find(fleet.pool, uuid.UUID(run_id))
        assert row is not None
        assert "job" not in row.keys()  # noqa: SIM118 (of a record, `in` asks for the values)
        assert isinstance(await run_queue.job_of(fleet.pool, uuid.UUID(run_id)), str)
        shown = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        assert shown["job"]["config"]["n"] == config["n"]
        assert shown["server_time"].endswith("Z")


@pytest.mark.gen_test
async def test_a_worker_that_dies_at_an_enqueue_costs_a_503_and_nothing_is_added(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with one_worker(make_settings(), sigstore) as (fleet, _, lent, pid):
        before = await counts(fleet)
        os.kill(pid, signal.SIGSTOP)
        adding = asyncio.create_task(post(fleet, run_of(), key="once"))
        assert await lent.lent.get() == pid
        os.kill(pid, signal.SIGKILL)
        answer = await adding
        assert code_of(answer) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert await counts(fleet) == before
        assert (await post(fleet, run_of(), key="once")).status_code == 201


def test_different_cells_are_counted_over_all_runs_and_shared_ones_once() -> None:
    runs = [run_of(tasks=tasks_of(1000, str(n)), prompts=prompts_of(99), floor_tasks=tasks_of(1000))
            for n in range(2)]  # fmt: skip
    assert sum(enqueue_request._count(run) for run in runs) == MAX_CELLS_TOGETHER
    assert enqueue_request._different([*runs, *runs]) == runs
    with pytest.raises(InvalidRequest) as refused:
        enqueue_request._different([*runs, *runs, run_of()])
    (violation,) = refused.value.violations
    assert violation.pointer == "/runs/4/tasks"
    assert "in several requests" in violation.detail


def test_a_cell_is_named_by_the_canonical_json_of_its_texts() -> None:
    seed = random.randrange(2**32)  # noqa: S311 (no secret)
    print(f"seed {seed}")  # noqa: T201 (shown when it fails)
    draw = random.Random(seed)  # noqa: S311 (no secret)

    def text() -> str:
        return "".join(draw.choice('a"\\/\n\t,[]é\u2028😀\x7f') for _ in range(draw.randrange(9)))

    task = {"id": text(), "user_prompt": text(), "scorer": "exact"}
    prompts = [{"id": text(), "system": text()} for _ in range(20)]
    job = {"tasks": [task], "floor_tasks": [task], "prompts": prompts}
    asked = [*prompts, {"id": "floor", "system": ""}]
    for cell, prompt in zip(task_rows.cells(job), asked, strict=True):
        texts = [cell.task.natural_key_hash, prompt["id"], prompt["system"], task["user_prompt"]]
        assert cell.prompt.content_sha256 == digest_of(texts), canonical_json(texts)
        length = len((prompt["system"] + task["user_prompt"]).encode())
        assert cell.prompt.content_length_bytes == length
