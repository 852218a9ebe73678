"""The guard of each statement that touches a lease: every part of it counts by itself.

Over HTTP one part often hides another (a wrong runner rarely knows the lease_id), so these ask the
statements themselves.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from config.settings import Settings
from db import run_queue
from db.run_queue import Beat, Capabilities, Claimant, LeaseGuard
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
Verb = Callable[[Any, LeaseGuard], Awaitable[Any]]
TTL = timedelta(seconds=300)
OFFER = Capabilities(24, ("q8_0",))


async def beat(connection: Any, guard: LeaseGuard) -> list[asyncpg.Record]:
    one = Beat(
        guard.run_id, guard.lease_id, guard.runner_id, guard.fingerprint, guard.instance_id, None
    )
    return await run_queue.beat(connection, [one], ttl=TTL, max_runtime_s=86_400)


async def release(connection: Any, guard: LeaseGuard) -> asyncpg.Record | None:
    return await run_queue.release(connection, guard, "test")


async def fail(connection: Any, guard: LeaseGuard) -> asyncpg.Record | None:
    return await run_queue.fail(
        connection,
        guard,
        failure_code="oom",
        detail="test",
        backoff_s=300,
        retry_after_s=0,
    )


async def complete(connection: Any, guard: LeaseGuard) -> asyncpg.Record | None:
    return await run_queue.complete(connection, guard, "0" * 64)


VERBS: dict[str, Verb] = {"beat": beat, "release": release, "fail": fail, "complete": complete}


@asynccontextmanager
async def holding(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> AsyncIterator[tuple[Fleet, LeaseGuard]]:
    """Yield a fleet with one live lease, and all that its holder shows."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        ids = uuid.UUID(job["run_id"]), uuid.UUID(job["lease_id"])
        yield fleet, LeaseGuard(*ids, runner.runner_id, runner.fingerprint, runner.instance_id)


async def taking(fleet: Fleet, guard: LeaseGuard, change: str = "SELECT") -> set[str]:
    """Return which statements take the guard once `change` has been made; all is rolled back."""
    taken = set()
    for name, verb in VERBS.items():
        async with fleet.pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(change)
            if await verb(connection, guard):
                taken.add(name)
            await transaction.rollback()
    return taken


@pytest.mark.gen_test
async def test_the_run_the_secret_the_holder_and_the_key_must_all_be_right(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with holding(make_settings, sigstore) as (fleet, guard):
        other = await fleet.sign_on("runner-b")
        second = uuid.UUID(await fleet.enqueue())
        assert await taking(fleet, guard) == set(VERBS)
        for wrong in (
            replace(guard, run_id=second),
            replace(guard, lease_id=uuid.uuid4()),
            replace(guard, runner_id="runner-b", fingerprint=other.fingerprint),
            replace(guard, fingerprint="0" * 64),
        ):
            assert await taking(fleet, wrong) == set(), wrong


@pytest.mark.gen_test
async def test_the_key_must_be_good_at_this_moment(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with holding(make_settings, sigstore) as (fleet, guard):
        revoked = "UPDATE runner_keys SET revoked_at = now()"
        assert await taking(fleet, guard, revoked) == set()
        # A key whose time is over may still hand back what it holds: that helps everybody else.
        over = "UPDATE runner_keys SET not_after = now()"
        assert await taking(fleet, guard, over) == {"release", "fail"}
        good = "UPDATE runner_keys SET not_after = now() + interval '1 hour'"
        assert await taking(fleet, guard, good) == set(VERBS)


@pytest.mark.gen_test
async def test_the_run_must_be_live_or_lapsed_for_its_result(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with holding(make_settings, sigstore) as (fleet, guard):
        ended = (
            "UPDATE run_queue SET lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL,"
            " status = "
        )
        assert await taking(fleet, guard, "UPDATE run_queue SET status = 'IN_PROGRESS'") == set(
            VERBS
        )
        assert await taking(fleet, guard, f"{ended} 'PENDING'") == {"complete"}
        for status in ("COMPLETE", "FAILED", "CANCELLED"):
            assert await taking(fleet, guard, f"{ended} '{status}'") == set(), status


@pytest.mark.gen_test
async def test_rows_of_bakeoffs_own_local_runner_are_never_touched(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with holding(make_settings, sigstore) as (fleet, guard):
        theirs = replace(guard, run_id=uuid.uuid4(), lease_id=uuid.uuid4())
        await fleet.pool.execute(
            "INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES ($1, now(), 'bakeoff')",
            theirs.run_id,
        )
        await fleet.pool.execute(
            "INSERT INTO run_queue (queue_id, run_id, status, claimed_by, lease_id)"
            " VALUES (gen_random_uuid(), $1, 'IN_PROGRESS', 'runner-a', $2)",
            theirs.run_id,
            theirs.lease_id,
        )
        assert await taking(fleet, theirs) == set()


@pytest.mark.gen_test
async def test_each_end_closes_the_ledgers_row_of_its_own_lease_only(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with holding(make_settings, sigstore) as (fleet, guard):
        other = await fleet.sign_on("runner-b")
        beside = await fleet.enqueue()
        await other.take()
        # Alive, it would be given what the first runner failed.
        await fleet.pool.execute("UPDATE runners SET status = 'DEAD' WHERE runner_id = 'runner-b'")
        hows = ("failed", "released", "failed", "lapsed", "completed")
        for number, how in enumerate(hows, start=1):
            # The other run's lease has the same number.
            await fleet.pool.execute(
                "UPDATE attempts SET lease_seq = $1 WHERE run_id = $2", number, beside
            )
            before = await fleet.ledger(str(guard.run_id))
            await end(fleet, guard, how)
            after = await fleet.ledger(str(guard.run_id))
            assert after[:-1] == before[:-1]
            assert (before[-1]["how"], after[-1]["how"]) == (None, how)
            assert [each["how"] for each in await fleet.ledger(beside)] == [None]
            if how != "completed":
                guard = await claimed_again(fleet, guard)


async def end(fleet: Fleet, guard: LeaseGuard, how: str) -> None:
    """Let a lease end in one of the ways there are."""
    if how == "lapsed":
        await fleet.overdue(str(guard.run_id))
        assert await fleet.sweep() == 1
        return
    verb = {"released": release, "failed": fail, "completed": complete}[how]
    async with fleet.transaction() as connection:
        assert await verb(connection, guard)


async def claimed_again(fleet: Fleet, guard: LeaseGuard) -> LeaseGuard:
    """Claim the run once more for the same runner; return the new lease's guard."""
    await fleet.pool.execute("UPDATE run_queue SET retry_after = NULL")
    token, key = uuid.uuid4(), str(uuid.uuid4())
    claimant = Claimant(
        guard.runner_id, guard.fingerprint, guard.instance_id, token, key, "digest", OFFER
    )
    (row,) = await run_queue.claim(
        fleet.pool, [claimant], ttl=TTL,
        max_leases=1, max_runtime_s=86_400,
    )  # fmt: skip
    return replace(guard, lease_id=row["lease_id"])


@pytest.mark.gen_test
async def test_a_run_that_was_claimed_while_this_claim_waited_is_not_claimed_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """The waiting claim's snapshot still shows the run as PENDING."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        first, second = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        async with fleet.transaction() as connection:
            await connection.execute("UPDATE runner_keys SET description = 'locked'")
            (row,) = await run_queue.claim(
                connection, [first.claimant()],
                ttl=TTL, max_leases=1, max_runtime_s=86_400,
            )  # fmt: skip
            waiting = asyncio.create_task(second.claim())
            await fleet.until_blocked()
        assert (await waiting).status_code == 204
        after = await fleet.row(run_id)
        assert (after["claimed_by"], after["lease_id"]) == ("runner-a", row["lease_id"])


@pytest.mark.gen_test
async def test_a_run_that_failed_while_a_claim_waited_keeps_its_time(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """The waiting claim's snapshot still shows the run as one that may be claimed."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as connection:
            await connection.execute("UPDATE runner_keys SET description = 'locked'")
            waiting = asyncio.create_task(runner.claim())
            await fleet.until_blocked()
            await connection.execute("UPDATE run_queue SET retry_after = now() + interval '1 hour'")
        assert (await waiting).status_code == 204
        assert (await fleet.row(run_id))["lease_seq"] == 0


@pytest.mark.gen_test
async def test_a_revocation_forgets_the_secrets_of_lapsed_leases_and_leaves_their_record(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(max_leases=2), await fleet.sign_on("runner-b")
        lapsed, live, theirs = [await fleet.enqueue() for _ in range(3)]
        late = await runner.take()
        await runner.take()
        await other.take()
        await fleet.overdue(lapsed)
        await fleet.sweep()
        await fleet.revoke(runner)
        for run_id, hows in ((lapsed, ["lapsed"]), (live, ["revoked"]), (theirs, [None])):
            assert [attempt["how"] for attempt in await fleet.ledger(run_id)] == hows
        for run_id in (lapsed, live):
            row = await fleet.row(run_id)
            assert (row["status"], row["lease_id"], row["lease_key"]) == ("PENDING", None, None)
        assert (await fleet.row(theirs))["status"] == "CLAIMED"
        assert code_of(await runner.submit(late)) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_two_claims_of_one_key_cannot_both_be_committed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """P4: their slots differ, because another lease ended between the two."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        for _ in range(3):
            await fleet.enqueue()
        first = await runner.take()
        digest = hashlib.sha256(b"{}").hexdigest()
        async with fleet.transaction() as beside:
            (row,) = await run_queue.claim(
                beside,
                [runner.claimant(digest=digest)],
                ttl=TTL,
                max_leases=1,
                max_runtime_s=86_400,
            )
            assert (await runner.release(first)).status_code == 200
            claiming = asyncio.create_task(runner.claim(key="k"))
            await fleet.until_blocked()
        assert (await claiming).json()["lease_id"] == str(row["lease_id"])


@pytest.mark.gen_test
async def test_the_loser_of_a_race_for_a_lease_slot_looks_again_and_is_at_the_limit(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """`max_leases` holds in two processes: the second sees the slot free, and must not take it."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        async with fleet.transaction() as beside:
            (row,) = await run_queue.claim(
                beside,
                [runner.claimant()],
                ttl=TTL,
                max_leases=1,
                max_runtime_s=86_400,
            )
            assert str(row["run_id"]) == run_ids[0]
            claiming = asyncio.create_task(runner.claim())
            await fleet.until_blocked()
        refused = await claiming
        assert code_of(refused) == (409, "lease_limit")
        assert refused.json()["held_run_ids"] == run_ids[:1]
        assert (await fleet.row(run_ids[1]))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_a_run_that_another_holds_for_a_moment_is_not_said_to_be_none(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """204 would send the runner away for half a minute."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM run_queue WHERE run_id = $1 FOR UPDATE", run_id)
            assert code_of(await runner.claim()) == (503, "busy")
        assert (await runner.take())["run_id"] == run_id
