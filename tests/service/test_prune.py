"""Prune: what is past its time goes, by each kind's own boundary, and no accepted result does."""

import json
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from broker.admin import prune as verb
from broker.admin.prune import Prune, Retention, retentions
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_adoption import columns, contents, on
from tests.service.test_archive import completed, failed, timeless
from tests.service.test_cli_service import run
from tests.service.test_metrics import scrape
from tests.service.test_steering import audited, requeue
from tests.support.archived import DAY_S, aged, archive_once, archived, quiet_archiver, where
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep, run_of

MakeSettings = Callable[..., Settings]
KINDS = ["failed_runs", "ledgers", "refusals", "answers", "nonces", "revoked_tokens"]
# What a number on the leaderboard rests on, and what is append-only.
NEVER = (
    "runs", "run_queue", "run_archive", "run_model_metrics", "run_hardware_metrics", "submissions",
    "submission_files", "models", "prompts", "tasks", "runner_keys", "runners", "audit",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet_sweep(monkeypatch)
    quiet_archiver(monkeypatch)


def kind_of(fleet: Fleet, name: str) -> Retention:
    """Return a kind with the retention of the fleet's settings."""
    return next(each for each in retentions(fleet.services.settings) if each.kind == name)


async def pruned(fleet: Fleet, name: str) -> int:
    """Delete a kind; return how many rows, which the look before says too."""
    pruning, of = Prune(fleet.pool), kind_of(fleet, name)
    found = await pruning.look(of)
    told: list[int] = []
    deleted = await pruning.delete(of, told.append)
    assert (found.rows, found.oldest is not None) == (deleted, deleted > 0)
    assert told[-1:] == [deleted][: len(told)]
    assert (await pruning.look(of)).rows == 0
    return deleted


async def archived_at(fleet: Fleet, run_id: str, seconds: float) -> None:
    """Archive a run, and let it have ended so long ago."""
    await aged(fleet, run_id, seconds=seconds)
    await archive_once(fleet)
    await fleet.pool.execute(
        "UPDATE attempts_archive SET ended_at = clock_timestamp() - $2 * interval '1 second'"
        " WHERE run_id = $1",
        run_id, seconds,
    )  # fmt: skip


async def count(fleet: Fleet, table: str) -> int:
    """Return how many rows a table has."""
    return await fleet.pool.fetchval(f"SELECT count(*) FROM {table}")


@pytest.mark.gen_test
async def test_failed_runs_go_when_they_are_archived_and_past_their_time(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    keep_s = 100 * DAY_S
    async with open_fleet(
        make_settings(keep_failed_s=keep_s, failing_runner_pause_s=0), sigstore
    ) as fleet:
        runner = await fleet.sign_on()
        older, younger, hot = [(await failed(fleet, runner))["run_id"] for _ in range(3)]
        cancelled = await fleet.enqueue()
        await fleet.cancel(cancelled)
        job, files = await completed(fleet, runner)
        await archived_at(fleet, older, keep_s + 1)
        await archived_at(fleet, cancelled, keep_s + 1)
        await archived_at(fleet, younger, keep_s - 60)
        await archived_at(fleet, job["run_id"], 10 * keep_s)
        await aged(fleet, hot, seconds=10 * keep_s)
        assert await pruned(fleet, "failed_runs") == 2
        ids = (older, cancelled, younger, hot, job["run_id"])
        assert [await where(fleet, run_id) for run_id in ids] == [
            "nowhere", "nowhere", "archive", "queue", "archive",
        ]  # fmt: skip
        assert await fleet.pool.fetchval(
            "SELECT count(*) FROM every_attempt WHERE run_id = $1", older
        ) == 0  # fmt: skip
        seen = await scrape(fleet)
        assert [seen.of("runs", status=s) for s in ("COMPLETE", "FAILED", "CANCELLED")] == [1, 2, 0]
        (told,) = await audited(fleet, "prune")
        assert (told["actor"], told["detail"]) == (
            "database:bakeoff", {"kind": "failed_runs", "rows": 2, "keep_s": keep_s},
        )  # fmt: skip
        # Forgotten, but its run_id is not free: an old request cannot queue it anew.
        assert code_of(await fleet.admin("GET", f"/queue/{older}")) == (404, "not_found")
        assert code_of(await requeue(fleet, older)) == (404, "not_found")
        again = await fleet.admin("POST", "/queue", json={"runs": [run_of(run_id=older)]})
        assert code_of(again) == (409, "conflict")
        assert (await runner.submit(job, files)).status_code == 200


@pytest.mark.gen_test
async def test_neither_a_complete_run_nor_one_with_a_submission_is_ever_pruned(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        job, _ = await completed(fleet, await fleet.sign_on())
        await archived_at(fleet, job["run_id"], 1000 * DAY_S)
        await fleet.pool.execute("UPDATE run_archive SET status = 'FAILED'")
        assert await pruned(fleet, "failed_runs") == 0
        await fleet.pool.execute("UPDATE run_archive SET status = 'COMPLETE'")
        await fleet.pool.execute("DELETE FROM submissions")
        assert await pruned(fleet, "failed_runs") == 0
        assert await where(fleet, job["run_id"]) == "archive"


@pytest.mark.gen_test
async def test_the_ledger_of_a_result_goes_and_its_runner_still_sees_the_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    keep_s = 400 * DAY_S
    settings = make_settings(keep_ledgers_s=keep_s, keep_failed_s=10 * keep_s)
    async with open_fleet(settings, sigstore) as fleet:
        runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
        older, files = await completed(fleet, runner)
        younger, _ = await completed(fleet, runner)
        failing = await failed(fleet, runner)
        await archived_at(fleet, older["run_id"], keep_s + 1)
        await archived_at(fleet, younger["run_id"], keep_s - 60)
        await archived_at(fleet, failing["run_id"], 2 * keep_s)
        # An attempt may have ended long before its run did.
        await fleet.pool.execute(
            "UPDATE attempts_archive SET ended_at = '2000-01-01' WHERE run_id = $1",
            younger["run_id"],
        )
        before = await fleet.http.get(f"/api/queue/{older['run_id']}", headers=runner.headers)
        assert await pruned(fleet, "ledgers") == 1
        assert await count(fleet, "attempts_archive") == 2
        after = await fleet.http.get(f"/api/queue/{older['run_id']}", headers=runner.headers)
        assert timeless(after) == {**timeless(before), "attempts": []}
        assert timeless(after)["receipt"] is not None
        theirs = await fleet.http.get(f"/api/queue/{older['run_id']}", headers=other.headers)
        assert code_of(theirs) == (404, "not_found")
        shown = await fleet.admin("GET", f"/queue/{older['run_id']}")
        assert (shown.json()["status"], shown.json()["claimed_by"]) == ("COMPLETE", "runner-a")
        assert (await runner.submit(older, files)).status_code == 200


@pytest.mark.gen_test
async def test_records_go_by_their_own_time_and_expired_ones_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(keep_refusals_s=50 * DAY_S, keep_answers_s=20 * DAY_S)
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        fingerprint = runner.fingerprint
        ages = "(VALUES ('50 days 1 s'::interval), ('50 days -60 s')) AS age (age)"
        await fleet.pool.execute(
            "INSERT INTO submission_refusals (refused_at, run_id, runner_id, key_fingerprint, code,"
            f" detail) SELECT now() - age, $1, 'runner-a', $2, 'x', 'x' FROM {ages}",
            run_id, fingerprint,
        )  # fmt: skip
        await fleet.pool.execute(
            "INSERT INTO idempotency_keys (actor, idempotency_key, request_sha256, answer,"
            " created_at) SELECT 'x', age::text, 'x', '{}', now() - age + interval '30 days'"
            f" FROM {ages}"
        )
        await fleet.pool.execute(
            "INSERT INTO registration_nonces (fingerprint, nonce, request_sha256, jti, issued_at,"
            " keep_until, created) SELECT $1, age::text, 'x', gen_random_uuid(), now(),"
            f" now() - age + interval '50 days', true FROM {ages}",
            fingerprint,
        )
        await fleet.pool.execute(
            "INSERT INTO revoked_tokens (jti, expires_at) SELECT gen_random_uuid(),"
            f" now() - age + interval '50 days' FROM {ages}"
        )
        tables = ("submission_refusals", "idempotency_keys", "registration_nonces",
                  "revoked_tokens")  # fmt: skip
        before = [await count(fleet, table) for table in tables]
        for kind in ("refusals", "answers", "nonces", "revoked_tokens"):
            assert await pruned(fleet, kind) == 1, kind
        assert [await count(fleet, table) for table in tables] == [n - 1 for n in before]
        assert len(await audited(fleet, "prune")) == 4


@pytest.mark.gen_test
async def test_pruning_everything_leaves_each_accepted_result_whole(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        (one, files), (two, _) = [await completed(fleet, runner) for _ in range(2)]
        await archived_at(fleet, one["run_id"], 9000 * DAY_S)
        await aged(fleet, two["run_id"], seconds=9000 * DAY_S)
        dsn = fleet.services.settings.database_url.get_secret_value()
        names = {table: of for table, of in (await on(dsn, columns)).items() if table in NEVER}
        assert len(names) == len(NEVER)
        before = await on(dsn, lambda connection: contents(connection, names))
        for each in retentions(fleet.services.settings):
            await Prune(fleet.pool).delete(
                Retention(each.kind, each.what, timedelta(0)), lambda _: None
            )
        after = await on(dsn, lambda connection: contents(connection, names))
        assert set(before.pop("audit")) < set(after.pop("audit")), "it is audited"
        assert after == before
        assert await count(fleet, "attempts_archive") == 0
        assert (await runner.submit(one, files)).status_code == 200


@pytest.mark.gen_test
async def test_what_another_prune_or_a_requeue_holds_is_passed_over(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "BATCH", 2)
    async with open_fleet(make_settings(), sigstore) as fleet:
        run_ids = [await fleet.enqueue() for _ in range(5)]
        for run_id in run_ids:
            await fleet.cancel(run_id)
        await archived(fleet, *run_ids)
        await fleet.pool.execute("UPDATE run_archive SET completed_at = '2000-01-01'")
        told: list[int] = []
        async with fleet.transaction() as connection:
            await connection.execute(
                "SELECT FROM run_archive WHERE run_id = $1 FOR UPDATE", run_ids[1]
            )
            deleted = await Prune(fleet.pool).delete(kind_of(fleet, "failed_runs"), told.append)
        assert (deleted, told) == (4, [2, 4])
        assert await where(fleet, run_ids[1]) == "archive"
        assert len(await audited(fleet, "prune")) == 2


@pytest.mark.gen_test
async def test_the_command_counts_and_only_deletes_when_it_is_told_to(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    told = {"database_url": settings.database_url.get_secret_value()}
    async with open_fleet(settings, sigstore) as fleet:
        empty = run("prune", **told)
        assert (empty.returncode, empty.stderr) == (0, "nothing is past its time\n")
        run_id = await fleet.enqueue()
        await fleet.cancel(run_id)
        await archived_at(fleet, run_id, 200 * DAY_S)
        asked = run("prune", **told)
        assert (asked.returncode, asked.stderr) == (
            6, "nothing was changed: this would delete 1 rows; add --yes to do it\n",
        )  # fmt: skip
        heading, first, *_ = asked.stdout.splitlines()
        assert heading.split() == ["kind", "what", "older", "than", "rows", "oldest"]
        assert first.split()[:8] == [
            "failed_runs", "FAILED", "and", "CANCELLED", "runs,", "archived", "180", "days",
        ]  # fmt: skip
        assert await where(fleet, run_id) == "archive"
        done = run("prune", "--yes", "--json", **told)
        assert done.returncode == 0
        assert done.stderr == "failed_runs: 1 of 1\ndeleted 1 rows\n"
        document: dict[str, Any] = json.loads(done.stdout)
        assert document["deleted"] is True
        assert [each["kind"] for each in document["kinds"]] == KINDS
        assert [each["rows"] for each in document["kinds"]] == [1, 0, 0, 0, 0, 0]
        assert await where(fleet, run_id) == "nowhere"


def test_a_database_that_is_away_is_one_line() -> None:
    away = f"postgres://localhost:1/{uuid.uuid4()}"
    refused = run("prune", "--yes", database_url=away)
    assert refused.returncode == 5
    assert len(refused.stderr.splitlines()) == 1
