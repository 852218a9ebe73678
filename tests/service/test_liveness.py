"""Who is alive: what `runners.status` and `last_heartbeat` say of the machines."""

from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from broker.runners import liveness
from broker.runners.liveness import Liveness
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, open_fleet

MakeSettings = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server writes nothing by itself: the test says when."""
    monkeypatch.setattr(liveness, "INTERVAL_S", 1_000_000)


async def state(fleet: Fleet, runner_id: str) -> asyncpg.Record:
    """Return a runner's row, with how long it was silent."""
    row = await fleet.pool.fetchrow(
        "SELECT *, clock_timestamp() - last_heartbeat AS silent_for FROM runners"
        " WHERE runner_id = $1",
        runner_id,
    )
    assert row is not None
    return row


async def silent(fleet: Fleet, runner_id: str, seconds: float) -> None:
    """Let a runner have been silent for so long."""
    await fleet.pool.execute(
        "UPDATE runners SET last_heartbeat = clock_timestamp() - $2 * interval '1 second'"
        " WHERE runner_id = $1",
        runner_id,
        seconds,
    )


@pytest.mark.gen_test
async def test_a_runner_that_is_heard_of_is_active_with_a_lease_and_idle_without(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        busy, idle = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        job = await busy.take()
        for name in ("runner-a", "runner-b"):
            await silent(fleet, name, 100)
        assert (await idle.claim()).status_code == 204  # finds nothing, and is a sign of life
        assert await fleet.services.liveness.run_once() == []
        rows = [await state(fleet, name) for name in ("runner-a", "runner-b")]
        assert [row["status"] for row in rows] == ["ACTIVE", "IDLE"]
        assert all(row["silent_for"] < timedelta(seconds=100) for row in rows)
        await busy.release(job)
        await fleet.services.liveness.run_once()
        assert (await state(fleet, "runner-a"))["status"] == "IDLE"


@pytest.mark.gen_test
async def test_nothing_is_written_of_a_runner_that_was_not_heard_of_since(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        heard, quiet = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await heard.claim()
        await quiet.claim()
        await fleet.services.liveness.run_once()
        for name in ("runner-a", "runner-b"):
            await silent(fleet, name, 100)
        await heard.claim()
        await fleet.services.liveness.run_once()
        assert (await state(fleet, "runner-a"))["silent_for"] < timedelta(seconds=100)
        assert (await state(fleet, "runner-b"))["silent_for"] >= timedelta(seconds=100)


@pytest.mark.gen_test
async def test_all_that_were_heard_of_are_written_in_one_batch(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        names = ["runner-c", "runner-a", "runner-b"]
        for name in names:
            await fleet.sign_on(name)
            await silent(fleet, name, 100)
        alive = Liveness(fleet.pool, fleet.services.settings)
        for name in names * 2:
            alive.saw(name, UUID(int=1))
        await fleet.pool.execute("CREATE TABLE batches (runners int)")
        await fleet.pool.execute(
            "CREATE FUNCTION count_batch() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN INSERT INTO batches SELECT count(*) FROM written; RETURN NULL; END'"
        )
        await fleet.pool.execute(
            "CREATE TRIGGER batch AFTER UPDATE ON runners REFERENCING NEW TABLE AS written"
            " FOR EACH STATEMENT EXECUTE FUNCTION count_batch()"
        )
        await alive.run_once()
        await alive.run_once()  # heard of nobody: only the look for the dead
        rows = await fleet.pool.fetch("SELECT runners FROM batches")
        assert [row["runners"] for row in rows] == [3, 0, 0]


@pytest.mark.gen_test
async def test_a_runner_that_was_silent_for_too_long_is_dead_until_it_is_heard_of_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(lease_ttl_s=300, claim_wait_max_s=50)  # so 650 s
    async with open_fleet(settings, sigstore) as fleet:
        runner, _ = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await silent(fleet, "runner-a", 651)
        await silent(fleet, "runner-b", 640)
        alive = Liveness(fleet.pool, settings)
        assert await alive.run_once() == ["runner-a"]
        assert await alive.run_once() == []
        assert (await state(fleet, "runner-a"))["status"] == "DEAD"
        assert (await state(fleet, "runner-b"))["status"] == "IDLE"
        shown = (await fleet.admin("GET", "/runners/runner-a")).json()
        assert shown["state"] == "stale"
        await runner.claim()
        await fleet.services.liveness.run_once()
        assert (await state(fleet, "runner-a"))["status"] == "IDLE"


@pytest.mark.gen_test
async def test_bakeoffs_own_runners_are_left_to_bakeoff(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.pool.execute(
            "INSERT INTO runners (runner_id, public_key, status, last_heartbeat)"
            " VALUES ('local', '', 'ACTIVE', '2000-01-01Z')"
        )
        before = await fleet.pool.fetchrow("SELECT * FROM runners")
        assert await Liveness(fleet.pool, fleet.services.settings).run_once() == []
        assert await fleet.pool.fetchrow("SELECT * FROM runners") == before
        assert (await fleet.admin("GET", "/runners")).json()["runners"] == []


@pytest.mark.gen_test
async def test_a_runner_that_signed_off_is_not_brought_back_by_its_own_goodbye(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await runner.claim()
        gone = await fleet.http.delete("/api/runners/me", headers=runner.headers)
        assert gone.status_code == 200
        await fleet.services.liveness.run_once()
        assert (await state(fleet, "runner-a"))["status"] == "DEAD"
