"""Submit: what becomes rows, what is refused and by which code, and who wins a race."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from broker.concurrency.workers import Workers
from broker.results.submissions import WRITING_MIN
from broker.results.verify import verify_files
from config.settings import Settings
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.support.fleet import SIGNER, Fleet, Runner, code_of, open_fleet, run_of
from tests.support.result_factory import failed_record, manifest_for, result_for

MakeSettings = Callable[..., Settings]
pytestmark = pytest.mark.usefixtures("patient_locks")
Job = dict[str, Any]
BYTE_ORDER_MARK = "The text begins with a byte order mark: save it as UTF-8 without BOM."
STRANGER = EmailSubject("stranger@bakeoff.test", "https://issuer.bakeoff.test")
WRITTEN = (
    "submissions", "submission_files", "run_model_metrics", "run_hardware_metrics",
    "system_hardware", "system_software", "gpu_hardware", "system_gpu_link",
)  # fmt: skip


@asynccontextmanager
async def claimed(
    settings: Settings, sigstore: ThrowawaySigstore, **run: Any
) -> AsyncIterator[tuple[Fleet, Runner, Job]]:
    """Yield a fleet, a runner of it, and the job that it holds."""
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        await fleet.enqueue(**run)
        yield fleet, runner, await runner.take()


def signed(fleet: Fleet, result: dict[str, Any], signer: EmailSubject = SIGNER) -> dict[str, bytes]:
    """Return the bundle of a result."""
    return signed_text(fleet, json.dumps(result).encode(), result, signer)


def signed_text(
    fleet: Fleet, text: bytes, result: dict[str, Any], signer: EmailSubject = SIGNER
) -> dict[str, bytes]:
    """Return a bundle whose result.json is `text`, and all else as for `result`."""
    files = {
        "result.json": text,
        "summary.md": b"# Summary\n",
        "signature.sigstore.json": fleet.sigstore.sign(text, signer),
    }
    return listed(result, files)


def listed(result: dict[str, Any], files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files with a manifest of them, over what it replaces."""
    named = {name: content for name, content in files.items() if name != "manifest.json"}
    return {**named, "manifest.json": json.dumps(manifest_for(result, named)).encode()}


async def counts(fleet: Fleet) -> dict[str, int]:
    """Return how many rows an accepted result has written."""
    return {name: await fleet.pool.fetchval(f"SELECT count(*) FROM {name}") for name in WRITTEN}


async def refusals(fleet: Fleet) -> list[str]:
    """Return the codes of the recorded refusals, oldest first."""
    rows = await fleet.pool.fetch("SELECT code FROM submission_refusals ORDER BY refusal_id")
    return [row["code"] for row in rows]


async def assert_still_mine(fleet: Fleet, runner: Runner, job: Job) -> None:
    """The lease lives on, and nothing of the bundle was written."""
    assert not any((await counts(fleet)).values())
    beat = await runner.heartbeat(job)
    assert beat.status_code == 200, beat.text
    run = await fleet.pool.fetchrow("SELECT * FROM runs WHERE run_id = $1", job["run_id"])
    assert run is not None
    assert (run["run_status"], run["publisher_id"]) == ("incomplete", "bakeoff-queue")


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """Return the files without one."""
    return {each: content for each, content in files.items() if each != name}


# Refusals: the code, the lease kept, nothing written, and the refusal on record


MISREAD = {"a score that is NaN": "/records/0/quality_heuristic", "a member named twice": "/run_id"}


def broken_bundles(fleet: Fleet, job: Job) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Every way in which a bundle is refused after it arrived: name -> code, files."""
    result = result_for(job["run_id"], job)
    good = signed(fleet, result)
    records = result["records"]
    foreign = [{**records[0], "task_id": "not-of-the-job"}, *records[1:]]
    nan = [{**records[0], "quality_heuristic": "NAN"}, *records[1:]]
    text = json.dumps({**result, "records": nan}).replace('"NAN"', "NaN").encode()
    other = {**result, "run_id": "00000000-0000-4000-8000-000000000000"}
    envelope = json.loads(good["signature.sigstore.json"])
    del envelope["messageSignature"]
    envelope["dsseEnvelope"] = {"payload": "e30=", "payloadType": "a/b", "signatures": []}
    dsse = {**good, "signature.sigstore.json": json.dumps(envelope).encode()}
    tampered = {**good, "result.json": good["result.json"].replace(b'"seed": 7', b'"seed": 8')}
    twin = {**good, "result.json": json.dumps(result, indent=1).encode()}
    doubled = b'{"run_id": "x",' + good["result.json"][1:]
    hash_of = {**result, "provenance": {**result["provenance"], "config_hash": "0" * 16}}
    return {
        "no signature": ("invalid_bundle", without(good, "signature.sigstore.json")),
        "no manifest": ("invalid_bundle", without(good, "manifest.json")),
        "no result": ("invalid_bundle", without(good, "result.json")),
        "no summary": ("invalid_bundle", without(good, "summary.md")),
        "a file the manifest lacks": ("invalid_bundle", {**good, "dashboard.html": b"<p>"}),
        "a manifest that is not JSON": ("invalid_bundle", {**good, "manifest.json": b"{"}),
        "changed after the manifest": ("digest_mismatch", {**good, "summary.md": b"other"}),
        "tampered result": ("signature_invalid", listed(result, tampered)),
        "same JSON in other bytes": ("signature_invalid", listed(result, twin)),
        "an empty signature": (
            "signature_invalid", listed(result, {**good, "signature.sigstore.json": b""})
        ),
        "a DSSE envelope": ("signature_invalid", listed(result, dsse)),
        "signed by a stranger": ("signer_not_allowed", signed(fleet, result, STRANGER)),
        "another run's bundle": ("run_mismatch", signed(fleet, other)),
        "another run's result": (
            "run_mismatch", listed(result, signed_text(fleet, json.dumps(other).encode(), other))
        ),
        "a record outside the job": (
            "run_mismatch", signed(fleet, {**result, "records": foreign})
        ),
        "the same cell twice": (
            "run_mismatch", signed(fleet, {**result, "records": [*records, records[0]]})
        ),
        "a cell missing": ("run_mismatch", signed(fleet, {**result, "records": records[1:]})),
        "another config": ("run_mismatch", signed(fleet, hash_of)),
        "a score that is NaN": ("invalid_bundle", signed_text(fleet, text, result)),
        "a member named twice": ("invalid_bundle", signed_text(fleet, doubled, result)),
        "a version that is no text": (
            "invalid_bundle",
            signed(fleet, {**result, "provenance": {**result["provenance"], "runner_version": 1}}),
        ),
    }  # fmt: skip


@pytest.mark.gen_test
async def test_a_bad_bundle_is_refused_by_its_code_and_costs_nothing_but_a_record(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        recorded = []
        for name, (code, files) in broken_bundles(fleet, job).items():
            answer = await runner.submit(job, files)
            assert code_of(answer) == (422, code), name
            if name in MISREAD:
                assert [error["pointer"] for error in answer.json()["errors"]] == [MISREAD[name]]
            recorded.append(code)
            assert await refusals(fleet) == recorded, name
        await assert_still_mine(fleet, runner, job)
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_a_result_that_does_not_fit_is_told_a_pointer_per_violation(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        records = result_for(job["run_id"], job)["records"]
        records[3]["quality_heuristic"] = "high"
        del records[4]["tier"]
        answer = await runner.submit(job, runner.bundle(job, records=records, tasks=4))
        assert code_of(answer) == (422, "invalid_bundle")
        pointers = {error["pointer"] for error in answer.json()["errors"]}
        assert pointers == {"/tasks", "/records/3/quality_heuristic", "/records/4"}
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_a_bundle_that_contradicts_its_job_or_itself_is_refused_and_says_which_file(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        result = result_for(job["run_id"], job)
        good = signed(fleet, result)
        other = {**result, "run_id": "00000000-0000-4000-8000-000000000000"}
        expected = [{**job["tasks"][0], "expected": "anything"}, *job["tasks"][1:]]
        failed = listed({**result, "run_status": "failed"}, good)
        with_mark = b"\xef\xbb\xbf" + good["result.json"]
        for code, detail, pointer, files in (
            ("run_mismatch", "manifest.json is of another run.", "/run_id", listed(other, good)),
            ("run_mismatch", "result.json is of another run.", "/run_id",
             listed(result, signed_text(fleet, json.dumps(other).encode(), other))),
            ("run_mismatch", "result.json is not of the job.", "/tasks/0/expected",
             signed(fleet, {**result, "tasks": expected})),
            ("invalid_bundle", "manifest.json contradicts result.json.", "/run_status", failed),
            ("invalid_bundle", f"result.json: {BYTE_ORDER_MARK}", None,
             signed_text(fleet, with_mark, result)),
        ):  # fmt: skip
            answer = await runner.submit(job, files)
            assert code_of(answer) == (422, code), answer.text
            assert answer.json()["detail"] == detail
            told = [error["pointer"] for error in answer.json().get("errors", ())]
            assert told == ([pointer] if pointer else []), answer.text
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_at_most_fifty_violations_are_told(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (_, runner, job):
        answer = await runner.submit(job, runner.bundle(job, records=[{}] * 51))
        assert code_of(answer) == (422, "invalid_bundle")
        assert len(answer.json()["errors"]) == 50
        # So many that naming each says nothing are only counted.
        answer = await runner.submit(job, runner.bundle(job, records=[{}] * 1000))
        assert code_of(answer) == (422, "run_mismatch")
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/records"]


# Who may submit


@pytest.mark.gen_test
async def test_a_key_bound_to_a_signer_takes_that_one_and_no_other_of_the_policy(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    bound = {"identity": STRANGER.identity, "issuer": STRANGER.issuer}
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(signer=bound)
        await fleet.enqueue()
        job = await runner.take()
        assert job["expected_signer"] == bound
        result = result_for(job["run_id"], job)
        by_policy = await runner.submit(job, signed(fleet, result, SIGNER))
        assert code_of(by_policy) == (422, "signer_not_allowed")
        accepted = await runner.submit(job, signed(fleet, result, STRANGER))
        assert accepted.status_code == 201, accepted.text
        assert accepted.json()["signer"]["identity"] == STRANGER.identity


@pytest.mark.gen_test
async def test_another_runners_run_is_a_lost_lease_whatever_lease_id_is_shown(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        other = await fleet.sign_on("runner-b")
        assert code_of(await other.submit(job)) == (409, "lease_lost")
        await assert_still_mine(fleet, runner, job)
        assert (await runner.submit(job)).status_code == 201
        assert code_of(await other.submit(job)) == (409, "already_complete")


@pytest.mark.gen_test
async def test_a_wrong_lease_id_is_a_lost_lease_and_the_right_one_lives_on(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        wrong = await runner.submit(job, lease_id="00000000-0000-4000-8000-000000000000")
        assert code_of(wrong) == (409, "lease_lost")
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_a_run_that_is_not_queued_is_not_found(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (_, runner, job):
        unknown = {**job, "run_id": "00000000-0000-4000-8000-000000000000"}
        assert code_of(await runner.submit(unknown)) == (404, "not_found")


@pytest.mark.gen_test
async def test_a_submit_without_a_good_token_is_401(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        good, runner.token = runner.token, "none"
        assert code_of(await runner.submit(job)) == (401, "invalid_token")
        runner.token = good[:-2]
        assert code_of(await runner.submit(job)) == (401, "invalid_token")
        runner.token = fleet.admin_token
        assert code_of(await runner.submit(job)) == (401, "invalid_token")


@pytest.mark.gen_test
async def test_a_revoked_key_cannot_submit_nor_see_its_receipt_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        await fleet.revoke(runner)
        assert code_of(await runner.submit(job)) == (403, "key_revoked")
        assert not any((await counts(fleet)).values())


@pytest.mark.gen_test
async def test_a_key_whose_time_is_over_cannot_submit(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        await fleet.pool.execute("UPDATE runner_keys SET not_after = now() - interval '1 second'")
        assert code_of(await runner.submit(job)) == (403, "key_revoked")
        assert not any((await counts(fleet)).values())


@pytest.mark.gen_test
async def test_a_revocation_between_verify_and_commit_wins(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        async with fleet.transaction() as beside:
            # The row is held, so the verified result waits at the fence while the key is revoked.
            await beside.execute("SELECT FROM run_queue FOR UPDATE")
            submitting = asyncio.create_task(runner.submit(job))
            await fleet.until_blocked()
            await beside.execute("UPDATE runner_keys SET revoked_at = clock_timestamp()")
            await beside.execute(
                "UPDATE run_queue SET status = 'PENDING', lease_id = NULL, lease_key = NULL,"
                " lease_expires_at = NULL, lease_slot = NULL, claim_key = NULL, claimed_by = NULL"
            )
        assert code_of(await submitting) == (403, "key_revoked")
        assert not any((await counts(fleet)).values())
        assert (await fleet.row(job["run_id"]))["status"] == "PENDING"


@pytest.mark.gen_test
async def test_a_key_revoked_beside_the_submit_is_refused_by_the_fence_itself(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        # Only the key says no here: the run's row is as the submit wants it.
        await fleet.services.credentials.runner(runner.token)
        async with fleet.transaction() as beside:
            await beside.execute("LOCK TABLE run_queue IN EXCLUSIVE MODE")
            submitting = asyncio.create_task(runner.submit(job))
            await fleet.until_blocked()
            await fleet.pool.execute("UPDATE runner_keys SET revoked_at = clock_timestamp()")
        assert code_of(await submitting) == (403, "key_revoked")
        assert not any((await counts(fleet)).values())


# When a submit still counts


@pytest.mark.gen_test
async def test_a_result_that_is_late_counts_while_nobody_has_claimed_the_run_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(sweep_interval_s=0.05), sigstore) as (fleet, runner, job):
        await lapse(fleet, job)
        accepted = await runner.submit(job)
        assert accepted.status_code == 201, accepted.text
        assert (await fleet.row(job["run_id"]))["status"] == "COMPLETE"


@pytest.mark.gen_test
async def test_a_result_that_is_late_is_lost_once_another_has_claimed_the_run(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(sweep_interval_s=0.05), sigstore) as (fleet, runner, job):
        await lapse(fleet, job)
        other = await fleet.sign_on("runner-b")
        theirs = await other.take()
        assert theirs["run_id"] == job["run_id"]
        assert code_of(await runner.submit(job)) == (409, "lease_lost")
        assert code_of(await runner.submit(theirs)) == (409, "lease_lost")
        await assert_still_mine(fleet, other, theirs)


@pytest.mark.gen_test
async def test_an_old_lease_is_lost_when_the_same_runner_has_claimed_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(sweep_interval_s=0.05), sigstore) as (fleet, runner, job):
        await lapse(fleet, job)
        again = await runner.take()
        assert again["run_id"] == job["run_id"]
        assert code_of(await runner.submit(job)) == (409, "lease_lost")
        assert (await runner.submit(again)).status_code == 201


@pytest.mark.gen_test
async def test_a_re_claim_between_verify_and_commit_wins(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM run_queue FOR UPDATE")
            submitting = asyncio.create_task(runner.submit(job))
            await fleet.until_blocked()
            await beside.execute(
                "UPDATE run_queue SET lease_id = gen_random_uuid(), lease_seq = lease_seq + 1,"
                " claimed_by = 'runner-b'"
            )
        assert code_of(await submitting) == (409, "lease_lost")
        assert not any((await counts(fleet)).values())


@pytest.mark.parametrize("end", ["cancelled", "failed"])
@pytest.mark.gen_test
async def test_a_run_that_ended_without_a_result_takes_none(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, end: str
) -> None:
    async with claimed(make_settings(), sigstore, max_attempts=1) as (fleet, runner, job):
        if end == "failed":
            assert (await runner.fail(job)).json()["status"] == "FAILED"
        else:
            assert (await runner.release(job)).status_code == 200
            await fleet.cancel(job["run_id"])
        assert code_of(await runner.submit(job)) == (409, "run_finished")
        assert not any((await counts(fleet)).values())


async def lapse(fleet: Fleet, job: Job) -> None:
    """Let a lease be overdue, and wait until the sweep has ended it."""
    await fleet.overdue(job["run_id"])
    async with asyncio.timeout(20):
        while (await fleet.row(job["run_id"]))["status"] != "PENDING":  # noqa: ASYNC110 (in SQL)
            await asyncio.sleep(0.01)


# The same again


@pytest.mark.gen_test
async def test_the_same_result_again_is_answered_with_the_same_receipt(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        files = runner.bundle(job)
        first, written = await runner.submit(job, files), await counts(fleet)
        again = await runner.submit(job, files)
        assert (first.status_code, again.status_code) == (201, 200)
        assert receipt_of(again) == receipt_of(first)
        assert await counts(fleet) == written
        resigned = runner.bundle(job)  # the same result.json under another signature
        assert receipt_of(await runner.submit(job, resigned)) == receipt_of(first)


@pytest.mark.gen_test
async def test_another_result_of_a_complete_run_is_already_complete(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        assert (await runner.submit(job)).status_code == 201
        written = await counts(fleet)
        other = await runner.submit(job, runner.bundle(job, timestamp="2025-11-23T13:00:00Z"))
        assert code_of(other) == (409, "already_complete")
        assert await counts(fleet) == written


@pytest.mark.gen_test
async def test_of_two_identical_submits_at_once_one_writes_and_both_get_the_receipt(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        files = runner.bundle(job)
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM run_queue FOR UPDATE")
            both = [asyncio.create_task(runner.submit(job, files)) for _ in range(2)]
            await fleet.until_blocked(2)
        answers = await asyncio.gather(*both)
        assert sorted(answer.status_code for answer in answers) == [200, 201]
        assert receipt_of(answers[0]) == receipt_of(answers[1])
        assert (await counts(fleet))["submissions"] == 1
        assert (await counts(fleet))["run_model_metrics"] == 5


@pytest.mark.gen_test
async def test_of_two_different_submits_at_once_the_second_is_already_complete(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        bundles = [runner.bundle(job, timestamp=f"2025-11-23T1{n}:00:00Z") for n in range(2)]
        async with fleet.transaction() as beside:
            await beside.execute("SELECT FROM run_queue FOR UPDATE")
            both = [asyncio.create_task(runner.submit(job, files)) for files in bundles]
            await fleet.until_blocked(2)
        codes = sorted(answer.status_code for answer in await asyncio.gather(*both))
        assert codes == [201, 409]
        assert (await counts(fleet))["submissions"] == 1


def receipt_of(answer: httpx.Response) -> dict[str, Any]:
    """Return what an accepted submit answered, but for the time of the answer."""
    assert answer.is_success, answer.text
    return {name: value for name, value in answer.json().items() if name != "server_time"}


# validate_only


@pytest.mark.gen_test
async def test_validate_only_says_what_a_submit_would_and_changes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        before = dict(await fleet.row(job["run_id"]))
        files, query = runner.bundle(job), "?validate_only=1"
        answer = await runner.submit(job, files, query=query)
        assert answer.status_code == 200, answer.text
        digest = hashlib.sha256(files["result.json"]).hexdigest()
        assert (answer.json()["valid"], answer.json()["result_sha256"]) == (True, digest)
        bad = await runner.submit(job, without(files, "summary.md"), query=query)
        assert code_of(bad) == (422, "invalid_bundle")
        unknown = await runner.submit(job, {**files, "evil.sh": b""}, query=query)
        assert code_of(unknown) == (422, "invalid_bundle")
        lost = await runner.submit(
            job, files, query=query, lease_id="00000000-0000-4000-8000-000000000000"
        )
        assert code_of(lost) == (409, "lease_lost")
        assert dict(await fleet.row(job["run_id"])) == before
        assert await refusals(fleet) == []
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_a_validate_only_that_is_not_understood_is_no_submit_in_earnest(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        for query in ("true", "", "1&validate_only=0", "yes"):
            answer = await runner.submit(job, query=f"?validate_only={query}")
            assert code_of(answer) == (422, "invalid_request"), query
        misspelt = await runner.submit(job, query="?validateonly=1")
        assert code_of(misspelt) == (422, "invalid_request")
        await assert_still_mine(fleet, runner, job)


# Bounds


@pytest.mark.gen_test
async def test_more_bundles_than_may_be_verified_are_told_to_come_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    call = Workers.call

    async def held_up(self: Workers, *arguments: Any, **files: Any) -> Any:
        if arguments[0] is verify_files:  # and not an enqueue
            begun.set()
            await gate.wait()
        return await call(self, *arguments, **files)

    monkeypatch.setattr(Workers, "call", held_up)
    async with claimed(make_settings(verify_max=1), sigstore) as (fleet, runner, job):
        first = asyncio.create_task(runner.submit(job))
        await begun.wait()
        answer = await runner.submit(job)
        assert code_of(answer) == (503, "busy")
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["retryable"] is True
        beat = await runner.heartbeat(job)
        assert beat.status_code == 200, "a heartbeat does not wait behind a verification"
        gate.set()
        assert (await first).status_code == 201
        assert await refusals(fleet) == []
        assert (await runner.submit(job)).status_code == 200


@pytest.mark.gen_test
async def test_only_so_many_results_are_written_at_once_that_heartbeats_go_on(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified, all_verified = 0, asyncio.Event()
    call = Workers.call

    async def counted(self: Workers, *arguments: Any, **files: Any) -> Any:
        nonlocal verified
        outcome = await call(self, *arguments, **files)
        verified += arguments[0] is verify_files
        if verified == 4:
            all_verified.set()
        return outcome

    monkeypatch.setattr(Workers, "call", counted)
    async with open_fleet(make_settings(workers=1), sigstore) as fleet:
        runners = [await fleet.sign_on(f"runner-{n}") for n in range(4)]
        await fleet.admin("POST", "/queue", json={"runs": [run_of() for _ in runners]})
        jobs = [await runner.take() for runner in runners]
        async with fleet.transaction() as beside:
            await beside.execute("LOCK TABLE run_hardware_metrics")
            pairs = zip(runners, jobs, strict=True)
            submits = [asyncio.create_task(runner.submit(job)) for runner, job in pairs]
            await all_verified.wait()
            for _ in range(20):  # long enough for the others to be at the lock as well
                await fleet.admin("GET", "/queue")
            assert await fleet.blocked() == WRITING_MIN
        answers = await asyncio.gather(*submits)
        assert [answer.status_code for answer in answers] == [201] * 4


# What is written


@pytest.mark.gen_test
async def test_the_bytes_that_were_sent_are_stored(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        result = result_for(job["run_id"], job)
        text = json.dumps(result, indent=3, ensure_ascii=False).encode() + b"\r\n \n"
        files = signed_text(fleet, text, result)
        files = listed(result, {**files, "dashboard.html": bytes(range(256)) * 3})
        answer = await runner.submit(job, files)
        assert answer.status_code == 201, answer.text
        rows = await fleet.pool.fetch("SELECT * FROM submission_files")
        assert {row["name"]: row["content"] for row in rows} == files
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        assert {row["name"]: row["sha256"] for row in rows} == digests
        assert answer.json()["result_sha256"] == digests["result.json"]


@pytest.mark.gen_test
async def test_the_metrics_follow_upstreams_rules(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        records = result_for(job["run_id"], job)["records"]
        model = records[0]["model_id"]
        records[1]["quality_heuristic"] = 0.25
        records[2] = failed_record(job["tasks"][1], "plain", model, "timeout")
        records[3]["quality_heuristic"] = None
        records[3]["peak_vram_mb"] = 1999.6
        judged = {"task_id": "capital", "prompt_id": "terse", "model_id": model, "judge_score": 4}
        answer = await runner.submit(job, runner.bundle(job, records=records, judgements=[judged]))
        assert answer.status_code == 201, answer.text
        assert answer.json()["rows"] == {"model_metrics": 5, "hardware_metrics": 1}
        assert await cells(fleet) == {
            "sum/plain": (1.0, True, None, 0.27),
            "sum/terse": (0.25, False, None, 0.27),
            "capital/plain": (None, None, "timeout", None),
            "capital/terse": (0.75, False, None, 0.27),
            "echo/floor": (1.0, True, None, 0.27),
        }
        hardware = await fleet.pool.fetchrow(
            "SELECT * FROM run_hardware_metrics JOIN gpu_hardware USING (gpu_hardware_id)"
            " JOIN system_hardware USING (system_hardware_id)"
            " JOIN system_software USING (system_software_id)"
            " JOIN system_gpu_link USING (system_hardware_id, gpu_hardware_id)"
        )
        assert hardware is not None
        assert (hardware["peak_vram_mb"], hardware["power_limit_w"]) == (2000, 450.0)
        assert (hardware["gpu_model"], hardware["vram_mb"]) == ("NVIDIA GeForce RTX 4090", 24564)
        assert (hardware["cpu_cores"], hardware["ram_gb"], hardware["os_name"]) == (
            16,
            64,
            "Ubuntu",
        )
        # 60 tokens/s by 0.27 GFLOP each, of three cells that answered
        assert (hardware["driver_version"], hardware["measured_tflops"]) == (None, 0.0162)


async def cells(fleet: Fleet) -> dict[str, tuple[Any, ...]]:
    """Return the metrics by cell."""
    rows = await fleet.pool.fetch("SELECT * FROM run_model_metrics JOIN prompts USING (prompt_id)")
    return {
        row["file_path"].removeprefix("bakeoff-queue/"): (
            row["score"], row["pass_fail"], row["failure_reason"], row["gflops_per_token"]
        )
        for row in rows
    }  # fmt: skip


@pytest.mark.gen_test
async def test_an_accepted_result_closes_the_run_in_every_table(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        await runner.heartbeat(job)
        answer = await runner.submit(job)
        receipt, run_id = answer.json(), job["run_id"]
        run = await fleet.pool.fetchrow("SELECT * FROM runs WHERE run_id = $1", run_id)
        assert run is not None
        assert (run["run_status"], run["publisher_id"], run["runner_id"]) == (
            "complete", "runner-a", "runner-a",
        )  # fmt: skip
        assert run["prompt_git_hash"] == "0123456789abcdef"
        row = await fleet.row(run_id)
        assert (row["status"], row["result_sha256"]) == ("COMPLETE", receipt["result_sha256"])
        assert (row["lease_id"], row["lease_expires_at"], row["lease_slot"]) == (None, None, None)
        assert run["submitted_at"] == row["completed_at"]
        (attempt,) = await fleet.ledger(run_id)
        assert (attempt["how"], attempt["ended_at"]) == ("completed", row["completed_at"])
        submission = await fleet.pool.fetchrow("SELECT * FROM submissions")
        assert submission is not None
        assert (submission["trust"], submission["state"]) == ("sigstore", "accepted")
        assert submission["key_fingerprint"] == runner.fingerprint
        assert str(submission["receipt_id"]) == receipt["receipt_id"]
        audited = await fleet.pool.fetchrow("SELECT * FROM audit WHERE action = 'submit.accept'")
        assert audited is not None
        assert (audited["actor"], str(audited["run_id"])) == ("runner:runner-a", run_id)
        own = await fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)
        assert own.json()["receipt"] == receipt_of(answer)
        assert code_of(await runner.heartbeat(job)) == (409, "run_finished")


@pytest.mark.gen_test
async def test_an_incomplete_result_is_accepted_as_incomplete(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        records = result_for(job["run_id"], job)["records"][:2]
        files = runner.bundle(job, records=records, run_status="incomplete", hardware=None)
        assert (await runner.submit(job, files)).json()["rows"]["model_metrics"] == 2
        status = await fleet.pool.fetchval("SELECT run_status FROM runs")
        assert status == "incomplete"


@pytest.mark.gen_test
async def test_submits_at_once_from_the_same_machine_share_one_row_of_each_part(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runners = [await fleet.sign_on(f"runner-{n}") for n in range(4)]
        await fleet.admin("POST", "/queue", json={"runs": [run_of() for _ in runners]})
        jobs = [await runner.take() for runner in runners]
        async with fleet.transaction() as beside:
            await beside.execute("LOCK TABLE run_hardware_metrics, system_hardware")
            pairs = zip(runners, jobs, strict=True)
            submits = [asyncio.create_task(runner.submit(job)) for runner, job in pairs]
            await fleet.until_blocked(2)
        answers = await asyncio.gather(*submits)
        assert [answer.status_code for answer in answers] == [201] * 4
        written = await counts(fleet)
        parts = ("system_hardware", "system_software", "gpu_hardware", "system_gpu_link")
        assert {name: written[name] for name in parts} == dict.fromkeys(parts, 1)
        assert written["run_hardware_metrics"] == 4


@pytest.mark.gen_test
async def test_a_job_with_numbers_that_the_database_spells_otherwise_can_be_submitted(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    task = {"id": "big", "user_prompt": "How many?", "scorer": "exact"}
    tasks = [
        {**task, "id": f"n{n}", "domain": "math", "expected": expected}
        for n, expected in enumerate([1e22, -0.0, 1e300, 10**40, 1.5e-9, 24.0, [1e16]])
    ]
    run = {"tasks": tasks, "config": {"models": [{"id": "m"}], "limits": [1e22, -0.0, 2**70, 0.1]}}
    async with claimed(make_settings(), sigstore, **run) as (_, runner, job):
        answer = await runner.submit(job)
        assert answer.status_code == 201, answer.text
