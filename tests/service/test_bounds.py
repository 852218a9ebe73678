"""What a runner can make grow by patience alone has a bound, and what is read of it has one too."""

import re
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from config.settings import Settings
from db import attempts, run_queue, runners, submissions
from sandbox.runner.identity import Identity
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import AUDIENCE, CAPABILITIES, Fleet, code_of, open_fleet

MakeSettings = Callable[..., Settings]
SQL = Path(__file__).parents[2] / "db/sql"
LEASES = 1_000

# Every table that a statement of ours adds rows to, and what keeps it from growing for ever.
BOUNDED = {
    # By what a runner sends, each with a test here or in tests/service/test_prune.py.
    "attempts": "LEASES_KEPT of a run, and failures and lapses, of which max_attempts end it",
    "registration_nonces": "NONCES_KEPT of a key, and none that is too old",
    "revoked_tokens": "one for each sign-off, until the token would have expired",
    "submission_refusals": "REFUSALS_KEPT of a runner; prune",
    "runners": "one for each name on the allowlist",
    "run_deferrals": "one for each runner and live run that it failed",
    # By a result that was verified, once for each run.
    **dict.fromkeys(
        ("submissions", "run_model_metrics", "run_hardware_metrics", "gpu_hardware",
         "system_gpu_link", "system_hardware", "system_software"),
        "one verified result for each run",
    ),
    # By admins, and by moving what is there.
    **dict.fromkeys(
        ("admin_tokens", "runner_keys", "creators", "models", "model_sources", "prompts", "tasks",
         "runs", "run_queue"),
        "an admin adds it",
    ),
    "idempotency_keys": "an admin adds it; prune",
    "learned_needs": "one for each model",
    "queue_pauses": "one for each model, and one for the queue",
    "ring_keys": "one for each key that an admin gave a ring; rings forget",
    "audit_chain": "one for each row of the audit",
    "audit": "kept for ever: what admins and the service did, each result, each lapse",
    **dict.fromkeys(("run_archive", "attempts_archive"), "moved from the queue; prune"),
    "run_archive_changes": "folded by the archiver",
    "schema_migrations": "one for each migration",
}  # fmt: skip


def test_every_table_that_grows_has_a_bound_that_is_written_down() -> None:
    added_to = set()
    for file in SQL.glob("*.sql"):
        added_to |= set(re.findall(r"INSERT INTO (\w+)", file.read_text("utf-8")))
    assert added_to == set(BOUNDED)


async def leased_often(fleet: Fleet, run_id: str, runner_id: str) -> None:
    """Let a run have been claimed and released so often that nobody wants to read it all."""
    await fleet.pool.execute(
        "INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at,"
        " ended_at, how, progress) SELECT $1, n, gen_random_uuid(), $2, 'x', now(), now(),"
        " 'released', jsonb_build_object('done', n) FROM generate_series(1, $3::int) AS n",
        UUID(run_id), runner_id, LEASES,
    )  # fmt: skip
    await fleet.pool.execute("UPDATE run_queue SET lease_seq = $1", LEASES)


@pytest.mark.gen_test
async def test_a_claim_tells_of_the_newest_attempts_however_many_there_were(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await leased_often(fleet, run_id, "runner-b")
        job = await runner.take()
        told = [attempt["progress"]["done"] for attempt in job["previous_attempts"]]
        assert told == list(range(LEASES - 19, LEASES + 1))
        assert job["attempt"] == LEASES + 1  # says how many there were


@pytest.mark.gen_test
async def test_a_runs_page_shows_the_newest_attempts_and_says_how_many_there_were(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        await leased_often(fleet, run_id, "runner-b")
        await runner.take()
        seen = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        told = [attempt["attempt"] for attempt in seen["attempts"]]
        assert told == list(range(LEASES + 2 - attempts.SHOWN_MAX, LEASES + 2))
        assert seen["lease_seq"] == LEASES + 1
        own = await fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)
        assert [attempt["attempt"] for attempt in own.json()["attempts"]] == [LEASES + 1]


@pytest.mark.gen_test
async def test_a_run_that_is_claimed_and_released_again_and_again_keeps_a_short_ledger(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_queue, "LEASES_KEPT", 3)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id, beside = await fleet.enqueue(max_attempts=9), await fleet.enqueue(priority=900)
        await runner.fail(await runner.take())
        await fleet.pool.execute("UPDATE run_queue SET retry_after = NULL, priority = 1")
        for _ in range(8):
            job = await runner.take()
            assert (await runner.release(job)).json()["status"] == "PENDING"
        ledger = [(each["lease_seq"], each["how"]) for each in await fleet.ledger(run_id)]
        assert ledger == [(1, "failed"), *((seq, "released") for seq in (7, 8, 9))]
        assert await fleet.ledger(beside) == []
        again = await runner.release(job)  # sent again, it is answered from the ledger
        assert (again.status_code, again.json()["status"]) == (200, "PENDING")


@pytest.mark.gen_test
async def test_a_key_that_registers_without_end_keeps_few_nonces(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "NONCES_KEPT", 3)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        identity = Identity(runner.key, AUDIENCE, "gpu-1.example", CAPABILITIES)
        sent = [identity.sign_registration() for _ in range(9)]
        tokens = []
        for body in sent:
            tokens.append((await runner.register(body)).json()["access_token"])
        kept = await fleet.pool.fetch("SELECT fingerprint FROM registration_nonces")
        counted = [row["fingerprint"] for row in kept]
        assert (counted.count(runner.fingerprint), counted.count(other.fingerprint)) == (4, 1)
        assert (await runner.register(sent[-1])).json()["access_token"] == tokens[-1]
        assert (await runner.register(sent[0])).json()["access_token"] not in tokens


@pytest.mark.gen_test
async def test_a_runner_whose_bundles_are_refused_without_end_keeps_few_records(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions, "REFUSALS_KEPT", 3)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        await fleet.enqueue()
        job, theirs = await runner.take(), await other.take()
        assert (await other.submit(theirs, {"notes.txt": b""})).status_code == 422
        for number in range(7):
            refused = await runner.submit(job, {f"notes-{number}.txt": b""})
            assert code_of(refused) == (422, "invalid_bundle")
        rows = await fleet.pool.fetch("SELECT runner_id FROM submission_refusals")
        counted = [row["runner_id"] for row in rows]
        assert (counted.count("runner-a"), counted.count("runner-b")) == (4, 1)
