"""The history checker, checked: it sees violations made by hand; and a minute of the real thing."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from db import run_queue
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.history import check, failpoints, invariants, mutants, runners, server_logs
from tests.history.faults import Faults
from tests.history.invariants import Seen, Sent
from tests.history.plans import FAULTS, HABITS, SETTINGS, SHAPES
from tests.history.server_process import make_settings
from tests.support.fleet import Fleet, Runner, open_fleet

SEED = "make-test"
SECONDS = 20.0
DATABASE = "history_story"

# The story below has a run of each kind; a case breaks one thing about one of them.
DONE = "run_id = (SELECT run_id FROM run_queue WHERE status = 'COMPLETE')"
LIVE = "run_id = (SELECT run_id FROM run_queue WHERE status = 'IN_PROGRESS')"
LAPSED = "run_id = (SELECT run_id FROM run_queue WHERE status = 'PENDING' AND lease_seq = 1)"
FRESH = "run_id = (SELECT run_id FROM run_queue WHERE status = 'PENDING' AND lease_seq = 0)"
ENDED = "lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL, claim_digest = NULL"
CLAIM_FRESH = f"""
UPDATE run_queue AS q SET
    status = 'CLAIMED', lease_seq = 1, lease_id = gen_random_uuid(), claimed_by = k.runner_id,
    lease_key = k.fingerprint, lease_slot = 2, lease_expires_at = clock_timestamp() + '1 hour'
FROM runner_keys AS k WHERE k.runner_id = 'runner-b' AND {FRESH};
INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at)
SELECT run_id, lease_seq, lease_id, claimed_by, lease_key, clock_timestamp()
FROM run_queue WHERE status = 'CLAIMED';
"""
SEEN_AGAIN = """
INSERT INTO client_log (
    verb, runner_id, fingerprint, request, sent_at, received_at, status, code, claim_key, run_id,
    lease_id, result_sha256
)
SELECT
    verb, runner_id, fingerprint, 'again', clock_timestamp(), clock_timestamp() + '1 second',
    {status}, {code}, claim_key, run_id, {lease}, {digest}
FROM client_log WHERE {which}
"""


def seen_again(which: str, **changes: str) -> str:
    """SQL that adds to the log what a client might have seen, later than everything."""
    same = {"status": "status", "code": "code", "lease": "lease_id", "digest": "result_sha256"}
    return SEEN_AGAIN.format(which=which, **{**same, **changes})


VIOLATIONS = [
    ("a_claim_raises_the_fence_by_one", f"UPDATE run_queue SET lease_seq = 2 WHERE {LIVE}"),
    (
        "a_claim_raises_the_fence_by_one",
        f"UPDATE run_queue SET lease_id = gen_random_uuid() WHERE {LIVE}",
    ),
    ("only_legal_edges", f"UPDATE run_queue SET status = 'PENDING' WHERE {DONE}"),
    ("only_legal_edges", f"UPDATE run_queue SET status = 'FAILED' WHERE {FRESH}"),
    (
        "no_live_lease_is_flipped_early",
        f"UPDATE run_queue SET status = 'PENDING', {ENDED} WHERE {LIVE}",
    ),
    (
        "no_live_lease_is_flipped_early",
        (
            f"UPDATE attempts SET how = 'lapsed', ended_at = clock_timestamp() WHERE {LIVE};"
            f"UPDATE run_queue SET status = 'PENDING', {ENDED} WHERE {LIVE}"
        ),
    ),
    ("a_result_belongs_to_the_lease_that_completed", "UPDATE submissions SET lease_seq = 2"),
    (
        "a_result_belongs_to_the_lease_that_completed",
        "UPDATE submissions SET runner_id = 'runner-b'",
    ),
    (
        "a_result_belongs_to_the_lease_that_completed",
        "UPDATE client_log SET lease_id = gen_random_uuid() WHERE verb = 'submit'",
    ),
    ("one_result_per_run", "DELETE FROM submissions"),
    ("one_result_per_run", "DELETE FROM run_model_metrics"),
    ("one_result_per_run", "UPDATE submission_files SET content = 'x' WHERE name = 'result.json'"),
    ("an_acknowledged_submit_is_durable", "DELETE FROM submissions"),
    (
        "an_acknowledged_submit_is_durable",
        "UPDATE submissions SET receipt_id = gen_random_uuid()",
    ),
    (
        "one_created_receipt_per_run",
        seen_again("verb = 'submit'", status="200", digest="'other'"),
    ),
    ("leases_of_a_runner_stay_within_its_limit", CLAIM_FRESH),
    (
        "no_mutation_after_a_revocation",
        (
            "UPDATE runner_keys SET revoked_at = clock_timestamp() WHERE runner_id = 'runner-b';"
            "SET CONSTRAINTS ALL IMMEDIATE;"
            f"UPDATE run_queue SET last_heartbeat = clock_timestamp() WHERE {LIVE}"
        ),
    ),
    (
        "no_success_after_a_revocation_was_answered",
        "INSERT INTO client_log (verb, runner_id, fingerprint, request, sent_at, received_at,"
        " status) SELECT 'revoke', runner_id, fingerprint, 'r', sent_at, received_at, 200"
        " FROM client_log WHERE verb = 'heartbeat';" + seen_again("verb = 'heartbeat'"),
    ),
    ("every_claim_is_in_the_ledger", f"DELETE FROM attempts WHERE {LAPSED}"),
    ("every_claim_is_in_the_ledger", f"UPDATE attempts SET runner_id = 'x' WHERE {LIVE}"),
    (
        "every_ended_lease_is_in_the_ledger",
        f"UPDATE attempts SET how = 'lapsed', ended_at = clock_timestamp() WHERE {LIVE}",
    ),
    (
        "every_ended_lease_is_in_the_ledger",
        f"UPDATE attempts SET how = NULL, ended_at = NULL WHERE {LAPSED}",
    ),
    ("lapses_and_results_are_audited", "DELETE FROM audit WHERE action = 'lease.lapse'"),
    ("lapses_and_results_are_audited", "DELETE FROM audit WHERE action = 'submit.accept'"),
    (
        "a_retried_claim_shows_the_same_lease",
        CLAIM_FRESH
        + seen_again(
            f"verb = 'claim' AND {LIVE}",
            lease="(SELECT lease_id FROM run_queue WHERE status = 'CLAIMED')",
        ),
    ),
    (
        "a_retried_claim_is_not_refused_its_own_lease",
        seen_again(f"verb = 'claim' AND {LIVE}", status="409", code="'lease_limit'", lease="NULL"),
    ),
    (
        "a_lease_is_told_to_its_holder_only",
        "UPDATE client_log SET runner_id = 'runner-z' WHERE verb = 'claim'",
    ),
    ("an_answered_heartbeat_renewed_the_lease", seen_again("verb = 'heartbeat'")),
    (
        "a_lease_ends_by_a_request_that_names_it",
        "UPDATE client_sent SET lease_id = gen_random_uuid() WHERE verb = 'submit'",
    ),
    (
        "a_lease_ends_by_a_request_that_names_it",
        f"UPDATE attempts SET how = 'failed', ended_at = clock_timestamp() WHERE {LIVE}",
    ),
    (
        "an_answered_handback_ended_its_own_lease",
        "UPDATE client_log SET verb = 'release' WHERE verb = 'heartbeat'",
    ),
    (
        "an_answered_handback_ended_its_own_lease",
        "UPDATE client_log SET verb = 'fail', status = 200 WHERE verb = 'submit'",
    ),
    (
        "an_acknowledged_enqueue_is_durable",
        (
            "UPDATE client_log SET verb = 'enqueue', status = 201, run_id = gen_random_uuid()"
            " WHERE verb = 'heartbeat'"
        ),
    ),
    ("no_internal_errors", "UPDATE client_log SET status = 500 WHERE verb = 'heartbeat'"),
]


@pytest.fixture(scope="module")
def story(
    postgres: servers.Postgres,
    redis_server: servers.Redis,
    sigstore: ThrowawaySigstore,
    signers_file: Path,
) -> str:
    """The DSN of a recorded database: one run COMPLETE, one live, one lapsed, one untouched."""
    dsn = postgres.database_dsn(DATABASE)
    settings = make_settings(
        {
            **SETTINGS,
            "lease_ttl_s": 300,
            "listen_port": 0,
            "database_url": dsn,
            "redis_lease_url": redis_server.url(1),
            "redis_token_url": redis_server.url(2),
            "trusted_root": str(sigstore.trusted_root),
            "signers_file": str(signers_file),
        }
    )

    async def tell() -> None:
        connection = await asyncpg.connect(postgres.database_dsn("postgres"))
        await connection.execute(f"CREATE DATABASE {DATABASE} TEMPLATE bakeoff")
        await connection.close()
        recorded = await asyncpg.connect(dsn)
        await invariants.install(recorded)
        async with open_fleet(settings, sigstore) as fleet:
            await invariants.store_clients(recorded, *await _tell_story(fleet))
        await recorded.close()

    asyncio.run(tell())
    return dsn


async def _tell_story(fleet: Fleet) -> tuple[list[Seen], list[Sent]]:
    one, two, three = [await fleet.sign_on(name) for name in ("runner-a", "runner-b", "runner-c")]
    for _ in range(4):
        await fleet.enqueue()
    seen: list[Seen] = []
    lapsing = await _noted(seen, three, "claim", three.claim(key="c"))
    done = await _noted(seen, one, "claim", one.claim(key="a"))
    await _noted(seen, one, "submit", one.submit(done), done)
    live = await _noted(seen, two, "claim", two.claim(key="b"))
    await _noted(seen, two, "heartbeat", two.heartbeat(live), live)
    await fleet.overdue(lapsing["run_id"])
    # The service's own sweep may have been quicker.
    await run_queue.lapse(fleet.pool, 10)
    sent = [
        Sent(each.verb, each.runner_id, each.lease_id, each.result_sha256)
        for each in seen
        if each.lease_id is not None and each.verb != "claim"
    ]
    return seen, sent


async def _noted(
    seen: list[Seen], runner: Runner, verb: str, call: Any, job: dict[str, Any] | None = None
) -> dict[str, Any]:
    sent_at = datetime.now(UTC)
    answer = await call
    body = answer.json()
    seen.append(
        Seen(
            verb,
            runner.runner_id,
            runner.fingerprint,
            verb,
            sent_at,
            datetime.now(UTC),
            answer.status_code,
            claim_key=runner.runner_id if verb == "claim" else None,
            run_id=UUID((job or body)["run_id"]),
            lease_id=UUID((job or body)["lease_id"]),
            result_sha256=body.get("result_sha256"),
            receipt_sha256=body.get("result_sha256"),
            receipt_id=UUID(body["receipt_id"]) if "receipt_id" in body else None,
        )
    )
    return body


def broken(dsn: str, statements: str, *, at_rest: bool = False) -> set[str]:
    """Return the invariants that do not hold once `statements` have run; nothing of them stays."""

    async def look() -> set[str]:
        connection = await asyncpg.connect(dsn)
        await connection.execute("BEGIN")
        await connection.execute(statements)
        found = await invariants.check(connection, max_leases=1, at_rest=at_rest)
        await connection.execute("ROLLBACK")
        await connection.close()
        return {violation.invariant for violation in found}

    return asyncio.run(look())


def test_a_sound_story_breaks_no_invariant(story: str) -> None:
    assert broken(story, "SELECT 1") == set()


@pytest.mark.parametrize(("invariant", "statements"), VIOLATIONS)
def test_a_violation_made_by_hand_is_seen(story: str, invariant: str, statements: str) -> None:
    assert invariant in broken(story, statements)


def test_runs_that_are_not_terminal_are_seen_at_rest(story: str) -> None:
    assert broken(story, "SELECT 1", at_rest=True) == {"every_run_is_terminal"}


def test_every_invariant_has_a_violation_made_by_hand() -> None:
    assert {name for name, _ in VIOLATIONS} | invariants.AT_REST == set(invariants.load())


def test_every_name_in_a_plan_is_one_that_exists() -> None:
    assert all(hasattr(runners.Runner, f"_{habit}") for habit in HABITS)
    assert all(hasattr(Faults, f"_{kind}") for kind in FAULTS)
    assert set(SHAPES) == set(mutants.MUTANTS)
    for plan in SHAPES.values():
        assert set(plan.expected) <= set(invariants.load())
        assert set(plan.stall_points) <= set(failpoints.POINTS)


def test_a_background_task_that_died_is_seen_in_the_log_and_an_alarm_is_none() -> None:
    died = '{"event": "Task exception was never retrieved", "exception": "Traceback\\nKeyError"}'
    alarms = '{"event": "sweep.held"}\n{"event": "http.failed", "exception": "Traceback"}'
    (violation,) = server_logs.violations(f"{died}\n{alarms}\n")
    assert violation.count == 1
    assert "KeyError" in violation.evidence[0]
    assert server_logs.violations(alarms) == []


@pytest.fixture(scope="module")
def world() -> Iterator[check.World]:
    """Servers of the storms' own: their PostgreSQL and Redis are killed now and then."""
    with check.open_world() as world:
        yield world


def test_half_a_minute_of_every_fault_breaks_no_promise(world: check.World) -> None:
    verdict = asyncio.run(check.run_sound(world, SEED, SECONDS))
    assert verdict.violations == []
    assert verdict.states["COMPLETE"] > 0
    assert verdict.deaths.total() > 0


def test_each_mutant_is_caught(world: check.World) -> None:
    proof = asyncio.run(check.run_mutants(world, SEED, control=False))
    assert proof.caught == len(mutants.MUTANTS)
