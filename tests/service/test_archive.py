"""The archive: what moves and what stays, and that nobody can tell from outside."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from bench.support import seeding
from broker.admin import archiver
from broker.admin.archiver import Archiver
from broker.admin.runs import QueueView
from config.settings import Settings
from db import archive
from db.migrate import migrate, roll_back
from db.pool import open_pool
from db.run_queue import RunFilter
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_adoption import columns, on
from tests.service.test_metrics import scrape
from tests.service.test_steering import audited, lapse, requeue
from tests.support.archived import DAY_S, aged, archive_once, archived, quiet_archiver, where
from tests.support.fleet import Fleet, Runner, code_of, open_fleet, quiet_sweep, run_of

MakeSettings = Callable[..., Settings]
WEEK = timedelta(days=7)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_sweep(monkeypatch)
    quiet_archiver(monkeypatch)


async def completed(fleet: Fleet, runner: Runner) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Let a runner complete a run; return the job and the bundle."""
    await fleet.enqueue()
    job = await runner.take()
    files = runner.bundle(job)
    assert (await runner.submit(job, files)).status_code == 201
    return job, files


async def failed(fleet: Fleet, runner: Runner) -> dict[str, Any]:
    """Let a runner fail a run for good; return the job."""
    await fleet.enqueue(max_attempts=1)
    job = await runner.take()
    assert (await runner.fail(job)).json()["status"] == "FAILED"
    return job


def timeless(answer: httpx.Response) -> dict[str, Any]:
    """Return what an answer says, but for the time it was given at."""
    assert answer.is_success, answer.text
    return {name: value for name, value in answer.json().items() if name != "server_time"}


async def move(connection: Any) -> int:
    """Run the archiver's statement in somebody's transaction; return how many runs it moved."""
    moved, _ = await archive.archive(connection, WEEK, 10, archive.START)
    return moved


@pytest.mark.gen_test
async def test_only_what_ended_long_enough_ago_is_archived_and_with_its_ledger(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        older, younger = [(await failed(fleet, runner))["run_id"] for _ in range(2)]
        await aged(fleet, older, seconds=7 * DAY_S + 1)
        await aged(fleet, younger, seconds=7 * DAY_S - 60)
        cancelled = await fleet.enqueue()
        await fleet.cancel(cancelled)
        await aged(fleet, cancelled, seconds=30 * DAY_S)
        pending = await fleet.enqueue()
        await fleet.pool.execute(
            "UPDATE run_queue SET created_at = created_at - interval '1 year' WHERE run_id = $1",
            pending,
        )
        row, ledger = await fleet.row(older), await fleet.ledger(older)
        assert await archive_once(fleet) == 2
        assert [await where(fleet, run_id) for run_id in (older, younger, cancelled, pending)] == [
            "archive", "queue", "archive", "queue",
        ]  # fmt: skip
        assert await fleet.pool.fetch("SELECT * FROM run_archive WHERE run_id = $1", older) == [row]
        kept = await fleet.pool.fetch("SELECT * FROM attempts_archive WHERE run_id = $1", older)
        assert (kept, await fleet.ledger(older)) == (ledger, [])
        assert len(ledger) == 1
        assert await archive_once(fleet) == 0


@pytest.mark.gen_test
async def test_a_live_run_stays_whatever_its_row_says(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_ids = [await fleet.enqueue() for _ in range(3)]
        await runner.take()
        await runner.heartbeat(await runner.take())
        # A run that lapsed keeps nothing of its end; no row of ours should look like this.
        await aged(fleet, *run_ids)
        statuses = {(await fleet.row(run_id))["status"] for run_id in run_ids}
        assert statuses == {"CLAIMED", "IN_PROGRESS", "PENDING"}
        assert await archive_once(fleet) == 0


@pytest.mark.gen_test
async def test_a_run_with_an_open_attempt_stays(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = (await failed(fleet, runner))["run_id"]
        await aged(fleet, run_id)
        await fleet.pool.execute(
            "UPDATE attempts SET ended_at = NULL, how = NULL WHERE run_id = $1", run_id
        )
        assert await archive_once(fleet) == 0
        await fleet.pool.execute(
            "UPDATE attempts SET ended_at = now(), how = 'failed' WHERE run_id = $1", run_id
        )
        assert await archive_once(fleet) == 1


@pytest.mark.gen_test
async def test_rows_of_bakeoffs_own_runner_stay(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        theirs = str(uuid.uuid4())
        await fleet.pool.execute(
            "INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES ($1, now(), 'x')", theirs
        )
        await fleet.pool.execute(
            "INSERT INTO run_queue (queue_id, run_id, status, completed_at)"
            " VALUES (gen_random_uuid(), $1, 'COMPLETE', '2020-01-01')",
            theirs,
        )
        assert await archive_once(fleet) == 0
        assert await where(fleet, theirs) == "queue"


@pytest.mark.gen_test
async def test_a_pass_takes_as_many_batches_as_there_are(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiver, "BATCH", 2)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runs = [await fleet.enqueue() for _ in range(5)]
        for run_id in runs:
            await fleet.cancel(run_id)
        await archived(fleet, *runs)
        assert await fleet.pool.fetchval("SELECT count(*) FROM run_archive_changes") == 1


@pytest.mark.gen_test
async def test_the_last_three_leases_of_a_runner_stay_where_the_sweep_counts_them(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(failing_runner_pause_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_ids = [(await failed(fleet, runner))["run_id"] for _ in range(4)]
        await fleet.pool.execute("UPDATE run_queue SET completed_at = '2020-01-01'")
        assert await archive_once(fleet) == 1
        assert [await where(fleet, run_id) for run_id in run_ids] == ["archive"] + 3 * ["queue"]


@pytest.mark.gen_test
async def test_lapses_of_last_week_still_pause_a_runner(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        for _ in range(2):
            run_id = await fleet.enqueue(max_attempts=1)
            await lapse(fleet, runner, run_id)
        await fleet.pool.execute("UPDATE run_queue SET completed_at = '2020-01-01'")
        await archive_once(fleet)
        await lapse(fleet, runner, await fleet.enqueue())
        assert code_of(await runner.claim()) == (403, "runner_paused")


@pytest.mark.gen_test
async def test_a_completed_run_that_is_archived_is_answered_as_before(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        job, files = await completed(fleet, runner)
        run_id = job["run_id"]
        await aged(fleet, run_id)

        async def seen() -> list[Any]:
            own = await runner.fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)
            shown = await fleet.admin("GET", f"/queue/{run_id}")
            listed = await fleet.admin("GET", "/queue")
            result = await fleet.admin("GET", f"/results/{run_id}")
            results = await fleet.admin("GET", "/results")
            replay = await runner.submit(job, files)
            assert replay.status_code == 200, replay.text
            changed = runner.bundle(job, resumed_from="elsewhere")
            queued = await fleet.admin("POST", "/queue", json={"runs": [run_of(run_id=run_id)]})
            refused = [
                await runner.submit(job, changed),
                await runner.heartbeat(job),
                await runner.release(job),
                await runner.fail(job),
                await other.submit(job, files),
                await other.heartbeat(job),
                await fleet.admin("POST", f"/queue/{run_id}/cancel", json={"reason": "x"}),
                await requeue(fleet, run_id),
            ]
            told = [timeless(answer) for answer in (own, shown, listed, replay, queued)]
            told += [timeless(answer) for answer in (result, results)]
            return told + [code_of(answer) for answer in refused]

        before = await seen()
        assert before[4]["runs"][0] == {
            "run_id": run_id, "queue_id": before[1]["queue_id"], "status": "COMPLETE",
            "created": False, "warnings": [],
        }  # fmt: skip
        assert before[7:9] == [(409, "already_complete"), (409, "run_finished")]
        assert before[0]["receipt"] == before[3]
        assert await archive_once(fleet) == 1
        assert await where(fleet, run_id) == "archive"
        assert await seen() == before
        assert await where(fleet, run_id) == "archive"
        assert (await runner.claim()).status_code == 204, "enqueued again, it is not queued again"


@pytest.mark.gen_test
async def test_a_runs_last_answer_is_given_again_from_the_archive(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        released = await fleet.enqueue()
        job = await runner.take()
        answer = await runner.release(job)
        await fleet.cancel(released)
        failing = await failed(fleet, runner)
        told = await runner.fail(failing)
        await archived(fleet, released, failing["run_id"])
        assert timeless(await runner.release(job)) == timeless(answer)
        assert timeless(await runner.fail(failing)) == timeless(told)
        again = await fleet.admin("POST", f"/queue/{released}/cancel", json={"reason": "x"})
        assert (again.status_code, again.json()["status"]) == (200, "CANCELLED")


@pytest.mark.gen_test
async def test_an_archived_run_that_is_requeued_is_back_with_its_history(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        before = await failed(fleet, runner)
        run_id = before["run_id"]
        await archived(fleet, run_id)
        async with fleet.rings() as heard:
            answer = await requeue(fleet, run_id)
            await heard.get()
        assert (answer.status_code, answer.json()["status"]) == (200, "PENDING")
        assert await where(fleet, run_id) == "queue"
        assert await fleet.pool.fetchval("SELECT count(*) FROM attempts_archive") == 0
        (told,) = await audited(fleet, "queue.requeue")
        assert str(told["run_id"]) == run_id
        job = await runner.take()
        assert (job["run_id"], job["attempt"]) == (run_id, 2)
        assert [attempt["how"] for attempt in job["previous_attempts"]] == ["failed"]
        assert code_of(await runner.submit(before)) == (409, "lease_lost")
        assert (await runner.submit(job)).status_code == 201
        await aged(fleet, run_id)
        await archive_once(fleet)
        shown = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        assert (shown["status"], len(shown["attempts"])) == ("COMPLETE", 2)


@pytest.mark.gen_test
async def test_an_archived_cancelled_run_comes_back_once_for_two_requeues(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id = await fleet.enqueue()
        await fleet.cancel(run_id)
        await archived(fleet, run_id)
        answers = await asyncio.gather(*(requeue(fleet, run_id) for _ in range(3)))
        assert {(a.status_code, a.json()["status"]) for a in answers} == {(200, "PENDING")}
        assert await where(fleet, run_id) == "queue"
        assert len(await audited(fleet, "queue.requeue")) == 1


@pytest.mark.gen_test
async def test_pages_go_through_queue_and_archive_in_one_order(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_ids = [await fleet.enqueue() for _ in range(7)]
        for run_id in run_ids[:6]:
            await fleet.cancel(run_id)

        async def paged(query: str) -> list[dict[str, Any]]:
            found, cursor = [], ""
            while cursor is not None:
                answer = await fleet.admin("GET", f"/queue?limit=2{query}{cursor}")
                page = answer.json()
                found += page["runs"]
                cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
            return found

        await aged(fleet, run_ids[0], run_ids[2], run_ids[3])
        before = await paged(""), await paged("&status=CANCELLED"), await paged("&status=PENDING")
        assert [run["run_id"] for run in before[0]] == run_ids
        assert await archive_once(fleet) == 3
        after = await paged(""), await paged("&status=CANCELLED"), await paged("&status=PENDING")
        assert after == before


@pytest.mark.gen_test
async def test_a_listing_of_few_among_many_archived_runs_reads_those_few(database: str) -> None:
    async with seeding.open_connection(database) as connection:
        models = await seeding.add_models(connection, "q8_0", 1, 1)
        await seeding.add_runs(connection, models, 3000)
        await connection.execute(
            "UPDATE run_queue SET completed_at = now() - interval '8 days',"
            " status = CASE WHEN queue_id IN (SELECT queue_id FROM run_queue LIMIT 3)"
            " THEN 'FAILED' ELSE 'COMPLETE' END"
        )
        assert (await archive.archive(connection, WEEK, 5000, archive.START))[0] == 3000
        await connection.execute("VACUUM (ANALYZE)")
    async with open_pool(database, 1) as pool:
        assert len((await QueueView(pool).page(RunFilter("FAILED"), None, 50)).runs) == 3
        await pool.execute("SELECT pg_stat_force_next_flush()")
        by_status = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = $1"
        assert await pool.fetchval(by_status, "run_archive_listed_by_status") == 1


@pytest.mark.gen_test
async def test_the_metrics_count_archived_runs_whatever_becomes_of_them(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(failing_runner_pause_s=0), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_ids = [(await failed(fleet, runner))["run_id"] for _ in range(3)]
        job, _ = await completed(fleet, runner)
        for _ in range(2):
            await fleet.enqueue()
        await runner.take()

        async def counted() -> dict[str, float]:
            seen = await scrape(fleet)
            statuses = ("PENDING", "CLAIMED", "IN_PROGRESS", "COMPLETE", "FAILED", "CANCELLED")
            return {status: seen.of("runs", status=status) for status in statuses}

        before = await counted()
        assert list(before.values()) == [1, 1, 0, 1, 3, 0]
        await archived(fleet, *run_ids, job["run_id"])
        assert await counted() == before
        await requeue(fleet, run_ids[0])
        assert await counted() == {**before, "PENDING": 2, "FAILED": 2}
        await fleet.pool.execute("DELETE FROM runs WHERE run_id = $1", run_ids[1])
        assert await counted() == {**before, "PENDING": 2, "FAILED": 1}
        await asyncio.gather(*(archive.fold_counts(fleet.pool) for _ in range(3)))
        assert await counted() == {**before, "PENDING": 2, "FAILED": 1}


@pytest.mark.gen_test
async def test_a_run_that_is_being_requeued_is_passed_over(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_id, other = await fleet.enqueue(), await fleet.enqueue()
        for each in (run_id, other):
            await fleet.cancel(each)
        await aged(fleet, run_id, other)
        async with fleet.transaction() as connection:
            await connection.execute(
                "UPDATE run_queue SET status = 'PENDING' WHERE run_id = $1", run_id
            )
            assert await archive_once(fleet) == 1
        assert [await where(fleet, each) for each in (run_id, other)] == ["queue", "archive"]


@pytest.mark.gen_test
async def test_a_requeue_that_waits_for_the_archiver_brings_the_run_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = (await failed(fleet, runner))["run_id"]
        await aged(fleet, run_id)
        async with fleet.transaction() as connection:
            assert await move(connection) == 1
            waiting = asyncio.create_task(requeue(fleet, run_id))
            await fleet.until_blocked()
        assert (await waiting).json()["status"] == "PENDING"
        assert await where(fleet, run_id) == "queue"
        assert len(await fleet.ledger(run_id)) == 1


@pytest.mark.gen_test
async def test_a_late_submit_is_answered_while_its_run_is_being_archived(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        job, files = await completed(fleet, runner)
        await aged(fleet, job["run_id"])
        async with fleet.transaction() as connection:
            assert await move(connection) == 1
            beside = await runner.submit(job, files)
        after = await runner.submit(job, files)
        assert [a.status_code for a in (beside, after)] == [200, 200]
        assert timeless(beside) == timeless(after)


@pytest.mark.gen_test
async def test_two_archivers_take_different_runs(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_ids = [await fleet.enqueue() for _ in range(3)]
        for run_id in run_ids:
            await fleet.cancel(run_id)
        await aged(fleet, *run_ids)
        async with fleet.transaction() as connection:
            assert (await archive.archive(connection, WEEK, 1, archive.START))[0] == 1
            assert await archive_once(fleet) == 2
        assert {await where(fleet, run_id) for run_id in run_ids} == {"archive"}


@pytest.mark.gen_test
async def test_the_archiver_outlives_a_database_that_is_away(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real `run`
    quiet_sweep(monkeypatch)
    monkeypatch.setattr(archiver, "INTERVAL_S", 0.0)
    passes = 0
    done = asyncio.Event()

    async def away(self: Archiver) -> int:
        nonlocal passes
        passes += 1
        if passes == 3:
            done.set()
        raise OSError("away")

    monkeypatch.setattr(Archiver, "run_once", away)
    async with open_fleet(make_settings(), sigstore), asyncio.timeout(10):
        await done.wait()


@pytest.mark.gen_test
async def test_the_archive_has_the_columns_of_its_tables_in_their_order(database: str) -> None:
    of = await on(database, columns)
    assert of["run_archive"] == of["run_queue"] == of["every_run"]
    assert of["attempts_archive"] == of["attempts"] == of["every_attempt"]
    types = await on(database, lambda connection: connection.fetch(TYPES))
    assert len(types) == 2 * (len(of["run_queue"].split()) + len(of["attempts"].split()))
    by_table: dict[str, list[tuple[str, str]]] = {}
    for row in types:
        by_table.setdefault(row["table_name"], []).append((row["name"], row["type"]))
    assert by_table["run_archive"] == by_table["run_queue"]
    assert by_table["attempts_archive"] == by_table["attempts"]


TYPES = """
SELECT attrelid::regclass::text AS table_name, attname::text AS name,
    format_type(atttypid, atttypmod) AS type
FROM pg_attribute
WHERE attnum > 0 AND NOT attisdropped AND attrelid = any(
    ARRAY['run_queue', 'run_archive', 'attempts', 'attempts_archive']::regclass []
)
ORDER BY 1, attnum
"""


@pytest.mark.gen_test
async def test_going_back_before_the_archive_loses_no_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    dsn = settings.database_url.get_secret_value()
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = (await failed(fleet, runner))["run_id"]
        await archived(fleet, run_id)
        row = await fleet.pool.fetchrow("SELECT * FROM run_archive")
        ledger = await fleet.pool.fetch("SELECT * FROM attempts_archive")
    await asyncio.to_thread(_roll_back_to_before_the_archive, dsn)
    async with open_pool(dsn, 1) as pool:
        back = await pool.fetchrow("SELECT * FROM run_queue WHERE run_id = $1", run_id)
        assert back is not None
        assert row is not None
        # What a later migration has added goes with it.
        assert dict(back) == {name: row[name] for name in back.keys()}  # noqa: SIM118 (a Record)
        assert await pool.fetch("SELECT * FROM attempts WHERE run_id = $1", run_id) == ledger
    await asyncio.to_thread(migrate, dsn)
    async with open_fleet(settings, sigstore) as fleet:
        assert await archive_once(fleet) == 1
        assert await where(fleet, run_id) == "archive"


def _roll_back_to_before_the_archive(dsn: str) -> None:
    """Roll back, newest first, until the archive is gone."""

    async def there(connection: asyncpg.Connection) -> bool:
        return await connection.fetchval("SELECT to_regclass('run_archive')") is not None

    while asyncio.run(on(dsn, there)):
        roll_back(dsn)
