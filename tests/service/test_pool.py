"""The pool: waits that end, lost races that are run again, and what is told when nothing helps."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import httpx
import pytest

from config.settings import Settings
from db import pool as pools
from db.pool import LOST, TRIES, DatabaseUnready, check_migrated, open_pool, retried
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


async def lose_updates_of_runners(fleet: Fleet, times: int, sqlstate: str = "40P01") -> None:
    """Let the first so many changes of a runner's row end as a deadlock's victim does."""
    await fleet.pool.execute("CREATE SEQUENCE tries")  # what it counts outlives a rollback
    await fleet.pool.execute(
        "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('tries') <= {times} THEN RAISE 'lost' USING ERRCODE = '{sqlstate}'; END IF;"
        " RETURN NEW; END $$"
    )
    await fleet.pool.execute(
        "CREATE TRIGGER lose BEFORE UPDATE ON runners FOR EACH ROW EXECUTE FUNCTION lose()"
    )


async def pause(fleet: Fleet) -> httpx.Response:
    """Change a runner's row, in a transaction of two statements."""
    return await fleet.admin("POST", "/runners/runner-a/pause", json={"reason": "x"})


def check_unavailable(answer: httpx.Response) -> None:
    """Check that a refusal says: not now, come again."""
    assert code_of(answer) == (503, "unavailable")
    assert answer.json()["retryable"] is True
    assert int(answer.headers["Retry-After"]) > 0


@pytest.mark.gen_test
async def test_a_pool_whose_connections_are_all_busy_lets_nobody_wait_for_ever(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "ACQUIRE_S", 0.05)
    async with open_pool(database, 1) as pool:
        async with pool.acquire():
            with pytest.raises(TimeoutError):
                await pool.fetchval("SELECT 1")
            with pytest.raises(TimeoutError):
                async with pool.acquire():
                    pass
        assert await pool.fetchval("SELECT 1") == 1


@pytest.mark.gen_test
async def test_a_request_that_gets_no_connection_is_told_to_come_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(database_pool_max=2), sigstore) as fleet:
        async with fleet.transaction() as connection:
            await connection.execute("LOCK TABLE run_queue")
            stuck = [asyncio.create_task(fleet.admin("GET", "/queue")) for _ in range(2)]
            await fleet.until_blocked(2)
            monkeypatch.setattr(pools, "ACQUIRE_S", 0.05)
            check_unavailable(await fleet.admin("GET", "/runners"))
        assert [(await task).status_code for task in stuck] == [200, 200]
        assert (await fleet.admin("GET", "/runners")).status_code == 200


@pytest.mark.gen_test
async def test_of_two_transactions_in_a_deadlock_the_loser_is_run_again_and_both_succeed(
    database: str,
) -> None:
    async with open_pool(database, 3) as pool:
        await pool.execute("CREATE TABLE t AS SELECT id, '' AS by FROM generate_series(1, 2) id")
        both_hold_one = asyncio.Barrier(2)
        begun: list[str] = []

        async def work(name: str, *order: int) -> None:
            async with pool.acquire() as connection, connection.transaction():
                begun.append(name)
                await connection.execute("SET LOCAL deadlock_timeout = '10ms'")
                for id_ in order:
                    await connection.execute("UPDATE t SET by = by || $1 WHERE id = $2", name, id_)
                    if id_ == order[0] and begun.count(name) == 1:
                        await both_hold_one.wait()

        await asyncio.gather(retried(work, "a", 1, 2), retried(work, "b", 2, 1))
        assert len(begun) == 3
        values = [row["by"] for row in await pool.fetch("SELECT by FROM t")]
        assert [sorted(value) for value in values] == [["a", "b"], ["a", "b"]]


@pytest.mark.gen_test
async def test_a_single_statement_that_loses_a_deadlock_is_sent_again(database: str) -> None:
    async with open_pool(database, 4) as pool:
        await pool.execute("CREATE TABLE t AS SELECT id, '' AS by FROM generate_series(1, 2) id")
        async with pool.acquire() as gate, pool.acquire() as other:
            await gate.execute("SELECT pg_advisory_lock(1)")
            transaction = other.transaction()
            await transaction.start()
            # Who looks for a deadlock loses it: the other one does not look.
            await other.execute("SET LOCAL deadlock_timeout = '1min'")
            await other.execute("SET LOCAL lock_timeout = 0")
            await other.execute("UPDATE t SET by = by || 'o' WHERE id = 1")
            loser = asyncio.create_task(
                pool.execute(
                    "DO $$ BEGIN"
                    " UPDATE t SET by = by || 'l' WHERE id = 2; PERFORM pg_advisory_xact_lock(1);"
                    " UPDATE t SET by = by || 'l' WHERE id = 1; END $$"
                )
            )
            await _until_waiting(gate, 1)
            winner = asyncio.create_task(other.execute("UPDATE t SET by = by || 'o' WHERE id = 2"))
            await _until_waiting(gate, 2)
            await gate.execute("SELECT pg_advisory_unlock(1)")
            await winner
            await transaction.commit()
            await loser
        rows = await pool.fetch("SELECT by FROM t ORDER BY id")
        assert [row["by"] for row in rows] == ["ol", "ol"]


@pytest.mark.gen_test
async def test_a_transaction_that_meets_a_table_migrated_meanwhile_is_run_again(
    database: str,
) -> None:
    """A migration is additive, so servers run on through it; SELECT * has one more column then."""
    async with open_pool(database, 1) as pool:
        await pool.execute("CREATE TABLE t AS SELECT 1 AS id")

        async def work() -> asyncpg.Record | None:
            async with pool.acquire() as connection, connection.transaction():
                return await connection.fetchrow("SELECT * FROM t")

        assert await retried(work) == (1,)
        await pool.execute("ALTER TABLE t ADD COLUMN more int")
        assert await retried(work) == (1, None)


async def _until_waiting(connection: asyncpg.pool.PoolConnectionProxy, statements: int) -> None:
    async with asyncio.timeout(10):
        while statements > await connection.fetchval(  # noqa: ASYNC110 (there is no signal)
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.005)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("sqlstate", "error", "tries"),
    [
        ("40P01", asyncpg.DeadlockDetectedError, TRIES),
        ("40001", asyncpg.SerializationError, TRIES),
        ("23505", asyncpg.UniqueViolationError, 1),
        ("55P03", asyncpg.LockNotAvailableError, 1),
    ],
)
async def test_a_statement_is_tried_three_times_for_a_lost_race_and_once_for_all_else(
    database: str, sqlstate: str, error: type[Exception], tries: int
) -> None:
    async with open_pool(database, 1) as pool:
        await pool.execute("CREATE SEQUENCE tries")
        lose = (
            "DO $$ BEGIN PERFORM nextval('tries');"
            f" RAISE 'lost' USING ERRCODE = '{sqlstate}'; END $$"
        )
        verbs = (pool.execute, pool.fetch, pool.fetchrow, pool.fetchval)
        for count, verb in enumerate(verbs, start=1):
            with pytest.raises(error):
                await verb(lose)
            assert await pool.fetchval("SELECT last_value FROM tries") == count * tries


@pytest.mark.gen_test
async def test_a_verb_that_loses_twice_is_carried_out_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        await lose_updates_of_runners(fleet, TRIES - 1)
        assert (await pause(fleet)).status_code == 200
        audited = "SELECT count(*) FROM audit WHERE action = 'runner.pause'"
        assert await fleet.pool.fetchval(audited) == 1


@pytest.mark.gen_test
@pytest.mark.parametrize("sqlstate", ["40P01", "40001"])
async def test_a_verb_that_loses_three_times_is_told_as_unavailable(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    sqlstate: str,
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        await lose_updates_of_runners(fleet, TRIES, sqlstate)
        check_unavailable(await pause(fleet))
        assert await fleet.pool.fetchval("SELECT last_value FROM tries") == TRIES
        assert (await pause(fleet)).status_code == 200


@pytest.mark.gen_test
async def test_a_database_that_takes_no_changes_is_unavailable_until_it_takes_them(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        for _ in range(2):
            await fleet.enqueue()
        job = await runner.take()
        name = await fleet.pool.fetchval("SELECT current_database()")
        fence = f"ALTER DATABASE {name} SET default_transaction_read_only = on"
        async with fleet.pool.acquire() as mine:
            await mine.execute(fence)
            await mine.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            for answer in (
                await runner.register(),
                await runner.claim(),
                await runner.heartbeat(job),
                await runner.release(job),
                await runner.fail(job),
                await runner.submit(job),
                await pause(fleet),
                await fleet.admin("GET", "/queue"),
            ):
                check_unavailable(answer)
            await mine.execute(fence.replace("SET", "RESET").partition(" =")[0])
        assert (await runner.heartbeat(job)).status_code == 200


@pytest.mark.parametrize("error", LOST)
@pytest.mark.gen_test
async def test_a_database_that_is_lost_during_the_start_is_told_in_one_line(
    database: str, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    async def lost(*_: object) -> bool:
        raise error("cut off")

    async with open_pool(database, 1) as pool:
        monkeypatch.setattr(pools, "missing_migration", lost)
        with pytest.raises(DatabaseUnready, match=r"^PostgreSQL cannot be used: cut off; check"):
            await check_migrated(pool, "20261123000002")


@pytest.mark.gen_test
async def test_a_connection_with_an_open_transaction_is_closed_and_nobody_complains(
    database: str,
) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
    async with open_pool(database, 1) as pool:
        async with pool.acquire() as connection:
            before = connection.get_server_pid()
            await connection.execute("BEGIN")  # and its rollback never gets through
        async with pool.acquire() as connection:
            assert connection.get_server_pid() != before
    assert complaints == []
