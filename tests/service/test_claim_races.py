"""Claims that meet: sent twice, side by side, parked, hung up, or beside a revocation."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from structlog.testing import capture_logs

from broker.leases import notifications
from broker.leases.parked_claims import ParkedClaims
from config.settings import Settings
from db import run_queue, runner_keys
from db.audit import Actor
from db.run_queue import LeaseGuard
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import code_of, model_of, open_fleet, run_of

MakeSettings = Callable[..., Settings]
# A parked claim looks again after this: never, so that only the bell can wake it.
NEVER_S = 1000.0

Parked = asyncio.Queue[asyncio.Task[Any]]


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> Parked:
    """Each claim that parks puts its task here."""
    seen: Parked = asyncio.Queue()
    wait = ParkedClaims.wait

    async def spy(self: ParkedClaims, *arguments: Any) -> bool:
        task = asyncio.current_task()
        assert task is not None
        seen.put_nowait(task)
        return await wait(self, *arguments)

    monkeypatch.setattr(ParkedClaims, "wait", spy)
    return seen


@pytest.mark.gen_test
async def test_the_same_idempotency_key_gives_the_same_lease_while_it_lives(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(max_leases=2), await fleet.sign_on("runner-b")
        run_ids = [await fleet.enqueue(), await fleet.enqueue(), await fleet.enqueue()]
        first = (await runner.claim(key="k")).json()
        again = (await runner.claim(key="k")).json()
        assert again | {"server_time": ""} == first | {"server_time": ""}
        assert code_of(await runner.claim(key="k", wait_s=0)) == (409, "conflict")
        # Another runner's keys are its own.
        assert (await other.claim(key="k")).json()["run_id"] == run_ids[1]
        await runner.release(first)
        fresh = (await runner.claim(key="k", wait_s=0)).json()
        assert fresh["lease_id"] != first["lease_id"]
        assert len(await fleet.ledger(run_ids[0])) == 2


@pytest.mark.gen_test
async def test_a_runner_may_hold_as_many_leases_as_its_key_says(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        one, two = await fleet.sign_on(), await fleet.sign_on("runner-b", max_leases=2)
        for _ in range(5):
            await fleet.enqueue()
        held = [(await one.take())["run_id"]]
        refused = await one.claim()
        assert code_of(refused) == (409, "lease_limit")
        assert refused.json()["held_run_ids"] == held
        jobs = [await two.take(), await two.take()]
        assert code_of(await two.claim()) == (409, "lease_limit")
        await two.release(jobs[0])
        await two.take()  # the slot that came free, not one beyond the limit
        assert code_of(await two.claim()) == (409, "lease_limit")


@pytest.mark.gen_test
async def test_ten_identical_claims_at_once_are_one_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        runner = await fleet.sign_on()
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        senders = [runner, runner.at(second)] * 5
        answers = await asyncio.gather(*(sender.claim(key="k") for sender in senders))
        assert [answer.status_code for answer in answers] == [200] * 10
        assert len({answer.json()["lease_id"] for answer in answers}) == 1
        assert [(await fleet.row(run_id))["lease_seq"] for run_id in run_ids] == [1, 0]
        assert len(await fleet.ledger(run_ids[0])) == 1


@pytest.mark.gen_test
@pytest.mark.parametrize("processes", [1, 2])
async def test_two_claims_of_one_runner_at_once_are_one_lease_and_one_refusal(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, processes: int
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        runner = await fleet.sign_on()
        other = runner if processes == 1 else runner.at(second)
        for _ in range(2):
            await fleet.enqueue()
        answers = await asyncio.gather(runner.claim(), other.claim())
        (given,) = [answer.json() for answer in answers if answer.status_code == 200]
        (refused,) = [answer for answer in answers if answer.status_code != 200]
        assert code_of(refused) == (409, "lease_limit")
        assert refused.json()["held_run_ids"] == [given["run_id"]]


@pytest.mark.gen_test
async def test_twenty_runners_of_two_processes_share_ten_runs_one_each(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        runners = [await fleet.sign_on(f"runner-{i}") for i in range(20)]
        body = {"runs": [run_of() for _ in range(10)]}
        assert (await fleet.admin("POST", "/queue", json=body)).status_code == 201
        answers = await asyncio.gather(
            *((r if i % 2 else r.at(second)).claim() for i, r in enumerate(runners))
        )
        assert Counter(answer.status_code for answer in answers) == {200: 10, 204: 10}
        given = {answer.json()["run_id"] for answer in answers if answer.status_code == 200}
        assert len(given) == 10
        assert await fleet.pool.fetchval("SELECT count(*) FROM attempts") == 10
        assert await fleet.pool.fetchval("SELECT max(lease_seq) FROM run_queue") == 1


@pytest.mark.gen_test
async def test_runners_of_many_kinds_are_served_together_and_no_run_goes_to_two(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """One statement: each kind takes what fits it of what those before it have left."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        big = await fleet.enqueue(model=model_of(20), priority=300)
        small = [await fleet.enqueue() for _ in range(3)]
        other = await fleet.enqueue(model=model_of(1, "q4_k_m"), priority=1)
        asked = {"a": (24, "q8_0"), "b": (24, "q8_0"), "c": (80, "q8_0", "fp16"),
                 "d": (80, "fp16"), "e": (8, "q8_0", "q4_k_m"), "f": (8, "q4_k_m")}  # fmt: skip
        runners = {name: await fleet.sign_on(f"runner-{name}") for name in asked}
        claimants = [
            runners[name].claimant(name, vram_gb=vram_gb, quantizations=tuple(quantizations))
            for name, (vram_gb, *quantizations) in asked.items()
        ]  # fmt: skip
        rows = await run_queue.claim(
            fleet.pool, claimants, ttl=timedelta(seconds=300), max_leases=1, max_runtime_s=900
        )
        given = dict(
            zip(asked, (row["run_id"] and str(row["run_id"]) for row in rows), strict=True)
        )
    assert given == {"a": small[0], "b": small[1], "c": small[2], "d": big, "e": other, "f": None}
    assert not any(row["contended"] for row in rows)


@pytest.mark.gen_test
async def test_what_a_look_has_granted_is_handed_out_though_the_next_look_fails(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is committed: lost, it would lapse, and count against the run and its runner."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = [await fleet.sign_on(), await fleet.sign_on("runner-b")]
        claimants = [runner.claimant() for runner in runners]
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        claim, looks = run_queue.claim, iter([None, ConnectionResetError()])

        async def once(*arguments: Any, **options: Any) -> list[asyncpg.Record]:
            if error := next(looks):
                raise error
            return await claim(*arguments, **options)

        monkeypatch.setattr(run_queue, "claim", once)
        async with fleet.transaction() as connection:  # so that one of two runs is passed over
            await connection.execute(
                "SELECT FROM run_queue WHERE run_id = $1 FOR UPDATE", UUID(run_ids[0])
            )
            rows = await asyncio.gather(
                *(fleet.services.claims.claim(claimant, 0) for claimant in claimants)
            )
        assert [row and str(row["run_id"]) for row in rows] == [run_ids[1], None]


@pytest.mark.gen_test
async def test_claims_of_one_runner_are_told_apart_and_a_failure_is_that_ones_alone(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_id = await fleet.enqueue()
        await fleet.enqueue()
        claim, looks = run_queue.claim, iter([None, ConnectionResetError()])

        async def once(*arguments: Any, **options: Any) -> list[asyncpg.Record]:
            if error := next(looks):
                raise error
            return await claim(*arguments, **options)

        monkeypatch.setattr(run_queue, "claim", once)
        asked = [runner.claimant(key) for key in ("one", "two")]
        row, failure = await asyncio.gather(
            *(fleet.services.claims.claim(claimant, 0) for claimant in asked),
            return_exceptions=True,
        )
        assert isinstance(failure, ConnectionResetError)
        assert isinstance(row, asyncpg.Record)
        assert str(row["run_id"]) == run_id


@pytest.mark.gen_test
async def test_a_parked_claim_is_woken_by_what_another_process_enqueues(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    settings = make_settings(claim_recheck_s=NEVER_S)
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        runner = await fleet.sign_on()
        waiting = asyncio.create_task(runner.claim(wait_s=50))
        await parked.get()
        run_id = await second.enqueue()
        assert (await waiting).json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_parked_claim_is_woken_by_a_run_that_is_handed_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        holder, runner = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        job = await holder.take()
        waiting = asyncio.create_task(runner.claim(wait_s=50))
        await parked.get()
        await holder.release(job)
        assert (await waiting).json()["run_id"] == job["run_id"]


@pytest.mark.gen_test
async def test_a_parked_claim_looks_again_by_itself_for_runs_that_come_due(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=0.05), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(not_before="2999-01-01T00:00:00Z")
        waiting = asyncio.create_task(runner.claim(wait_s=50))
        await parked.get()
        await fleet.pool.execute("UPDATE run_queue SET retry_after = clock_timestamp()")
        assert (await waiting).json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_parked_claim_is_woken_after_the_bells_connection_was_lost(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    parked: Parked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifications, "RETRY_S", 0.01)
    rings: asyncio.Queue[None] = asyncio.Queue()
    notify = ParkedClaims.notify
    monkeypatch.setattr(
        ParkedClaims, "notify", lambda self: (notify(self), rings.put_nowait(None))[0]
    )
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        await rings.get()  # it listens
        runner = await fleet.sign_on()
        waiting = asyncio.create_task(runner.claim(wait_s=50))
        await parked.get()
        await fleet.cut_database()
        await rings.get()  # it listens again: what was enqueued meanwhile was not heard
        run_id = await fleet.enqueue()
        assert (await waiting).json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_the_run_of_a_parked_claim_that_is_refused_goes_to_the_next_in_line(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        first, second = await fleet.sign_on(), await fleet.sign_on("runner-b")
        waiting = []
        for runner in (first, second):
            waiting.append(asyncio.create_task(runner.claim(wait_s=50)))
            await parked.get()
        await fleet.pool.execute(
            "UPDATE runners SET paused_at = now() WHERE runner_id = 'runner-a'"
        )
        run_id = await fleet.enqueue()  # wakes the first, as there is one run
        assert code_of(await waiting[0]) == (403, "runner_paused")
        assert (await waiting[1]).json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_the_run_of_a_parked_claim_whose_runner_drains_goes_to_the_next_in_line(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        first, second = await fleet.sign_on(), await fleet.sign_on("runner-b")
        waiting = []
        for runner in (first, second):
            waiting.append(asyncio.create_task(runner.claim(wait_s=50)))
            await parked.get()
        await fleet.admin("POST", "/runners/runner-a/drain", json={})
        run_id = await fleet.enqueue()  # wakes the first, as there is one run
        assert (await waiting[0]).status_code == 204
        assert (await waiting[1]).json()["run_id"] == run_id


@pytest.mark.gen_test
async def test_a_draining_runner_is_not_parked_where_it_would_be_woken_before_others(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.admin("POST", "/runners/runner-a/drain", json={})
        await fleet.enqueue()
        assert (await runner.claim(wait_s=50)).status_code == 204


@pytest.mark.gen_test
async def test_a_parked_claim_whose_runner_hung_up_takes_no_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        gone, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        call = asyncio.create_task(gone.claim(wait_s=50))
        claiming = await parked.get()
        call.cancel()
        await asyncio.wait([claiming])
        assert claiming.cancelling()  # it did not wait until its time was up
        run_id = await fleet.enqueue()
        job = await other.take()
        assert (job["run_id"], job["attempt"]) == (run_id, 1)


@pytest.mark.gen_test
async def test_a_claim_whose_runner_hung_up_during_the_statement_is_undone(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        gone, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        async with fleet.rings() as rings:
            async with fleet.transaction() as connection:
                await connection.execute("UPDATE runner_keys SET description = 'locked'")
                call = asyncio.create_task(gone.claim())
                await fleet.until_blocked()
                call.cancel()
                await fleet.services.in_flight.wait_idle()
            await rings.get()
        (attempt,) = await fleet.ledger(run_id)
        assert (attempt["runner_id"], attempt["how"]) == ("runner-a", "released")
        job = await other.take()
        assert (job["run_id"], job["attempt"]) == (run_id, 2)
        assert (await fleet.row(run_id))["attempt_count"] == 0


@pytest.mark.gen_test
async def test_an_undo_leaves_a_lease_that_another_answer_has_delivered(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """P4: the lost answer was of one process, the same claim was answered by another one."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        claims = fleet.services.claims
        digest = hashlib.sha256(b"{}").hexdigest()

        async def claim(key: str) -> asyncpg.Record:
            row = await claims.claim(runner.claimant(key, digest), 0)
            assert row is not None
            return row

        lost = await claim("sent-again")
        again = await claim("sent-again")
        await claims.undo(lost)  # the lease was given again since
        await claims.undo(again)  # this answer only repeated an earlier one
        beaten = await claim("beaten-for")
        job = {"run_id": str(beaten["run_id"]), "lease_id": str(beaten["lease_id"])}
        assert (await runner.heartbeat(job)).status_code == 200
        await claims.undo(beaten)
        rows = [await fleet.row(run_id) for run_id in run_ids]
        assert [row["status"] for row in rows] == ["CLAIMED", "IN_PROGRESS"]


@pytest.mark.gen_test
async def test_a_claim_sent_again_beside_the_undo_of_the_first_gets_a_new_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = (await runner.claim(key="k")).json()
        async with fleet.transaction() as connection:
            guard = LeaseGuard(
                UUID(run_id),
                UUID(job["lease_id"]),
                runner.runner_id,
                runner.fingerprint,
                runner.instance_id,
            )
            assert await run_queue.release(connection, guard, "undelivered")
            claiming = asyncio.create_task(runner.claim(key="k"))
            await fleet.until_blocked()
        again = await claiming
        assert again.status_code == 200, again.text
        assert (again.json()["lease_id"] != job["lease_id"], again.json()["attempt"]) == (True, 2)


@pytest.mark.gen_test
async def test_an_undo_that_fails_is_told_to_the_log_and_the_lease_lapses(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = asyncio.Event()

    async def lost(*_: Any, **__: Any) -> None:
        tried.set()
        raise ConnectionResetError

    monkeypatch.setattr(run_queue, "release", lost)
    with capture_logs() as logs:
        async with open_fleet(make_settings(), sigstore) as fleet:
            gone = await fleet.sign_on()
            run_id = await fleet.enqueue()
            async with fleet.transaction() as connection:
                await connection.execute("UPDATE runner_keys SET description = 'locked'")
                call = asyncio.create_task(gone.claim())
                await fleet.until_blocked()
                call.cancel()
                await fleet.services.in_flight.wait_idle()
            await tried.wait()
            assert (await fleet.row(run_id))["status"] == "CLAIMED"
    (told,) = [line for line in logs if line["event"] == "claim.release_failed"]
    assert (told["run_id"], told["error"]) == (run_id, "ConnectionResetError")


@pytest.mark.gen_test
async def test_draining_answers_parked_claims_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    async with open_fleet(make_settings(claim_recheck_s=NEVER_S), sigstore) as fleet:
        runner = await fleet.sign_on()
        waiting = asyncio.create_task(runner.claim(wait_s=50))
        await parked.get()
        fleet.services.claims.drain()
        assert (await waiting).status_code == 204


@pytest.mark.gen_test
async def test_a_claim_waits_for_a_revocation_in_flight_and_is_then_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """P6: the claim's own snapshot still shows the key as good."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as connection:
            await runner_keys.revoke(connection, runner.fingerprint, "stolen")
            claiming = asyncio.create_task(runner.claim())
            await fleet.until_blocked()
        assert code_of(await claiming) == (403, "key_revoked")
        row = await fleet.row(run_id)
        assert (row["status"], row["lease_seq"]) == ("PENDING", 0)


@pytest.mark.gen_test
async def test_a_claim_sent_again_beside_a_revocation_does_not_get_the_dead_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        await runner.claim(key="k")
        async with fleet.transaction() as connection:
            await runner_keys.revoke(connection, runner.fingerprint, "stolen")
            await run_queue.end_leases_of_key(
                connection, runner.fingerprint, "stolen", Actor("test")
            )
            claiming = asyncio.create_task(runner.claim(key="k"))
            await fleet.until_blocked()
        assert code_of(await claiming) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_a_claim_sent_again_by_a_key_whose_time_is_over_does_not_get_its_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        assert (await runner.claim(key="k")).status_code == 200
        await fleet.pool.execute("UPDATE runner_keys SET not_after = clock_timestamp()")
        assert code_of(await runner.claim(key="k")) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_a_revocation_waits_for_a_claim_in_flight_and_ends_its_lease(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as connection:
            (claimed,) = await run_queue.claim(
                connection,
                [runner.claimant()],
                ttl=timedelta(seconds=300),
                max_leases=1,
                max_runtime_s=86_400,
            )
            assert str(claimed["run_id"]) == run_id
            revoking = asyncio.create_task(fleet.revoke(runner))
            await fleet.until_blocked()
        await revoking
        row = await fleet.row(run_id)
        assert (row["status"], row["lease_id"], row["attempt_count"]) == ("PENDING", None, 0)
        assert [attempt["how"] for attempt in await fleet.ledger(run_id)] == ["revoked"]


@pytest.mark.gen_test
async def test_a_run_that_another_claim_takes_at_this_moment_is_passed_over(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        first, second = await fleet.enqueue(), await fleet.enqueue()
        async with fleet.transaction() as connection:
            await connection.execute("SELECT FROM run_queue WHERE run_id = $1 FOR UPDATE", first)
            assert (await runner.take())["run_id"] == second


@pytest.mark.gen_test
async def test_a_claim_waits_for_a_sign_off_in_flight_and_is_then_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    """The claim's own snapshot still shows the token as good, and the process remembers it so."""
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        run_ids = [await fleet.enqueue(), await fleet.enqueue()]
        claimed = await runner.claim(key="k")
        assert claimed.status_code == 200
        async with fleet.transaction() as connection:
            claims = await fleet.services.credentials.runner(runner.token)
            await runner_keys.revoke_token(
                connection, claims.jti, claims.dead_at, claims.fingerprint
            )
            waiting = [asyncio.create_task(runner.claim(key=key)) for key in ("new", "k")]
            await fleet.until_blocked()
        for refused in waiting:
            assert code_of(await refused) == (401, "invalid_token")
        assert (await fleet.row(run_ids[1]))["lease_seq"] == 0


@pytest.mark.gen_test
async def test_a_sign_off_waits_for_a_claim_in_flight_and_hands_its_lease_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        async with fleet.transaction() as connection:
            (claimed,) = await run_queue.claim(
                connection,
                [runner.claimant()],
                ttl=timedelta(seconds=300),
                max_leases=1,
                max_runtime_s=86_400,
            )
            assert str(claimed["run_id"]) == run_id
            me = "/api/runners/me"
            leaving = asyncio.create_task(fleet.http.delete(me, headers=runner.headers))
            await fleet.until_blocked()
        assert (await leaving).json()["released"] == [run_id]
        row = await fleet.row(run_id)
        assert (row["status"], row["claimed_by"]) == ("PENDING", None)


@pytest.mark.gen_test
async def test_a_claim_that_waits_in_another_process_gets_nothing_after_its_runner_signed_off(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, parked: Parked
) -> None:
    settings = make_settings(claim_recheck_s=NEVER_S)
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as second:
        gone, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        waiting = []
        for runner in (gone, other):
            waiting.append(asyncio.create_task(runner.at(second).claim(wait_s=50)))
            await parked.get()
        await fleet.http.delete("/api/runners/me", headers=gone.headers)
        run_id = await fleet.enqueue()  # wakes the first, as there is one run
        assert code_of(await waiting[0]) == (401, "invalid_token")
        assert (await waiting[1]).json()["run_id"] == run_id
        assert [each["runner_id"] for each in await fleet.ledger(run_id)] == ["runner-b"]
