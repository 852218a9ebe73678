"""SIGHUP: new files are taken up whole or not at all, and no request in flight notices."""

import asyncio
import json
import re
import signal
import subprocess
import threading
from collections.abc import Callable, MutableMapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker.concurrency.workers import Workers
from broker.results.verify import verify_files
from config.settings import CONFIG_VARIABLE, NO_RECEIPT_KEYS, Settings, SettingsRefused
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore
from tests.service.test_submit import claimed, signed
from tests.service.test_two_processes import Server, reaching, started, url_of
from tests.support.fleet import SIGNER, code_of, open_fleet
from tests.support.held_verification import held
from tests.support.raw_http import FORM_TYPE, form, head, line_to
from tests.support.result_factory import result_for

MakeSettings = Callable[..., Settings]
NEWCOMER = EmailSubject("newcomer@bakeoff.test", SIGNER.issuer)
DAY_S = 86_400
NOT_ALLOWED = (422, "signer_not_allowed")


def policy(path: Path, *signers: EmailSubject) -> Path:
    """Write a signer policy that trusts these."""
    entries = [f"- {{identity: '{each.email}', issuer: {each.issuer}}}\n" for each in signers]
    path.write_text(
        "schema_version: bakeoff-results-signers/v1\ntrusted_identities:\n" + "".join(entries)
    )
    return path


# In this process: what is taken up, and that it is all or nothing


@pytest.mark.gen_test
async def test_a_verification_that_has_begun_ends_with_the_verifier_it_began_with(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(signers_file=policy(tmp_path / "signers.yaml", SIGNER))
    begun, go_on = asyncio.Event(), asyncio.Event()
    call = Workers.call

    async def held_up(self: Workers, *arguments: Any, **files: Any) -> Any:
        if arguments[0] is verify_files:  # and not an enqueue
            begun.set()
            await go_on.wait()
        return await call(self, *arguments, **files)

    monkeypatch.setattr(Workers, "call", held_up)
    async with claimed(settings, sigstore) as (fleet, runner, job):
        submit = asyncio.create_task(runner.submit(job))
        await begun.wait()
        policy(settings.signers_file, NEWCOMER)
        assert await fleet.services.reload.run_once(lambda: settings)
        assert not submit.done()
        go_on.set()
        assert (await submit).status_code == 201
        await fleet.enqueue()
        assert code_of(await runner.submit(await runner.take())) == NOT_ALLOWED


@pytest.mark.gen_test
async def test_new_keys_are_signed_with_and_the_old_ones_verified_while_they_are_listed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    old, new = f"old:{'o' * 32}", f"new:{'n' * 32}"
    settings = make_settings(token_keys=SecretStr(old))
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        seeds = SecretStr(f"next:{'cd' * 32}")
        both = make_settings(token_keys=SecretStr(f"{new},{old}"), receipt_keys=seeds)
        assert await fleet.services.reload.run_once(lambda: both)
        assert (await runner.claim()).status_code == 204
        later = await fleet.sign_on("runner-b")
        await fleet.enqueue()
        receipt = (await later.submit(await later.take())).json()
        assert receipt["sig"]["kid"] == "next"
        published = (await fleet.http.get("/.well-known/bakeoff-queue.json")).json()
        assert [key["kid"] for key in published["keys"]] == ["next"]
        only_new = make_settings(token_keys=SecretStr(new))
        assert await fleet.services.reload.run_once(lambda: only_new)
        assert code_of(await runner.claim()) == (401, "invalid_token")
        assert (await later.claim()).status_code == 204


@pytest.mark.gen_test
async def test_a_bundle_of_a_log_we_did_not_know_verifies_once_the_fresh_root_is_loaded(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, tmp_path: Path
) -> None:
    newer = ThrowawaySigstore.create(tmp_path / "newer")
    root = tmp_path / "trusted_root.json"
    root.write_bytes(sigstore.trusted_root.read_bytes())
    settings = make_settings(trusted_root=root)
    async with claimed(settings, sigstore) as (fleet, runner, job):
        fleet.sigstore = newer
        refused = await runner.submit(job)
        assert code_of(refused) == (422, "unverifiable")
        assert "ask this server's operator to refresh it" in refused.json()["detail"]
        root.write_bytes(newer.trusted_root.read_bytes())
        assert await fleet.services.reload.run_once(lambda: settings)
        assert (await runner.submit(job)).status_code == 201


def refused(_: Settings, __: Path) -> Settings:
    raise SettingsRefused("LEASE_TTL: no such setting\nURL: no such setting")


def broken_policy(settings: Settings, folder: Path) -> Settings:
    path = policy(folder / "broken.yaml", EmailSubject("github-actions[bot]", SIGNER.issuer))
    return settings.model_copy(update={"signers_file": path})


def broken_root(settings: Settings, folder: Path) -> Settings:
    path = folder / "broken-root.json"
    path.write_text("{}")
    return settings.model_copy(update={"trusted_root": path})


def gone_root(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(update={"trusted_root": folder / "gone.json"})


def no_keys(settings: Settings, _: Path) -> Settings:
    return settings.model_copy(update={"receipt_keys": SecretStr("")})


def crash(_: Settings, __: Path) -> Settings:
    raise MemoryError("none left")


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (refused, "LEASE_TTL: no such setting; URL: no such setting"),
        (broken_policy, "github-actions[bot]"),
        (broken_root, "broken-root.json"),
        (gone_root, "gone.json"),
        (no_keys, NO_RECEIPT_KEYS),
        (crash, "MemoryError: none left"),
    ],
)
async def test_what_is_broken_is_named_in_one_line_and_all_stays_as_it_was(
    broken: Callable[[Settings, Path], Settings],
    named: str,
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    tmp_path: Path,
) -> None:
    settings = make_settings(signers_file=policy(tmp_path / "signers.yaml", SIGNER))
    async with claimed(settings, sigstore) as (fleet, runner, job):
        published = fleet.services.receipts.published()
        # The good half of a reload that is broken elsewhere: it must not be taken up either.
        changed = make_settings(
            signers_file=policy(tmp_path / "next.yaml", NEWCOMER),
            token_keys=SecretStr(f"other:{'o' * 32}"),
            receipt_keys=SecretStr(f"other:{'0f' * 32}"),
        )
        with capture_logs() as logs:
            done = await fleet.services.reload.run_once(lambda: broken(changed, tmp_path))
        assert not done
        (line,) = [line for line in logs if line["event"].startswith("reload.")]
        assert (line["event"], line["log_level"]) == ("reload.refused", "error")
        assert named in line["problem"]
        assert "\n" not in line["problem"]
        assert fleet.services.receipts.published() == published
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_what_only_a_restart_takes_up_is_named_until_then(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet:
        changed = make_settings(lease_ttl_s=100, max_leases=2)
        with capture_logs() as logs:
            for read in (changed, changed, settings):
                assert await fleet.services.reload.run_once(lambda read=read: read)
    told = [line["needs_restart"] for line in logs if line["event"] == "reload.done"]
    assert told == [["lease_ttl_s", "max_leases"], ["lease_ttl_s", "max_leases"], []]


@pytest.mark.gen_test
async def test_an_entry_that_can_never_match_is_told_at_the_start_and_at_each_reload(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, tmp_path: Path
) -> None:
    account = EmailSubject("github-actions[bot]", SIGNER.issuer)
    settings = make_settings(signers_file=policy(tmp_path / "signers.yaml", SIGNER, account))
    with capture_logs() as logs:
        async with claimed(settings, sigstore) as (fleet, runner, job):
            assert ignored(logs) == ["trusted_identities[1]"]
            policy(settings.signers_file, account, SIGNER)
            assert await fleet.services.reload.run_once(lambda: settings)
            assert ignored(logs) == ["trusted_identities[1]", "trusted_identities[0]"]
            assert (await runner.submit(job)).status_code == 201


def ignored(logs: Sequence[MutableMapping[str, Any]]) -> list[str]:
    """Return the place of each entry that a warning was logged of."""
    told = [line for line in logs if line["event"] == "signers.entry_ignored"]
    assert {line["log_level"] for line in told} <= {"warning"}
    return [line["where"] for line in told]


@pytest.mark.gen_test
async def test_an_old_trust_root_degrades_readiness_until_a_fresh_one_is_loaded(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, tmp_path: Path
) -> None:
    root = tmp_path / "trusted_root.json"
    text = sigstore.trusted_root.read_text()

    def begun(days: int) -> str:
        """Return the trust root with keys that came into use so many days ago."""
        start = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        return re.sub(r'"start": "[^"]+"', f'"start": "{start}"', text)

    root.write_text(begun(31))
    settings = make_settings(trusted_root=root, trusted_root_stale_s=30 * DAY_S)
    async with open_fleet(settings, sigstore) as fleet:
        answer = await fleet.http.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
        assert answer.json()["trust_root"].startswith("degraded: its newest key is 31 days old")
        assert answer.json()["trust_root_age_s"] >= 31 * DAY_S
        root.write_text(begun(29))
        assert "degraded" in (await fleet.http.get("/readyz")).json()["trust_root"], "not read yet"
        assert await fleet.services.reload.run_once(lambda: settings)
        assert (await fleet.http.get("/readyz")).json()["trust_root"] == "ok"


# A real process and a real signal


class Log:
    """What a process writes to stderr, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.events: list[dict[str, Any]] = []
        self._more = threading.Condition()
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    async def until(self, name: str, count: int = 1) -> dict[str, Any]:
        """Return the `count`-th event of this name, once it is there."""

        def there() -> list[dict[str, Any]]:
            return [event for event in self.events if event["event"] == name][count - 1 :]

        def wait() -> dict[str, Any]:
            with self._more:
                assert self._more.wait_for(there, 30), f"no {name} in {self.events}"
                return there()[0]

        return await asyncio.to_thread(wait)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            with self._more:
                self.events.append(json.loads(line))
                self._more.notify_all()


@pytest.mark.gen_test
async def test_at_sighup_requests_in_flight_go_on_and_new_files_count(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signers, config = tmp_path / "signers.yaml", tmp_path / "config.yaml"
    config.write_text("queue: {log_level: info}")
    settings = make_settings(signers_file=policy(signers, SIGNER))
    monkeypatch.setenv(CONFIG_VARIABLE, str(config))  # of the server: after ours are made
    with started(settings) as process:
        server = Server(process, url_of(process))
        log = Log(process)
        async with reaching(settings, sigstore, server) as (fleet,):
            runner, other = await fleet.sign_on(), await fleet.sign_on("runner-b")
            await fleet.enqueue()
            job = await runner.take()
            files = signed(fleet, result_for(job["run_id"], job), NEWCOMER)
            assert code_of(await runner.submit(job, files)) == NOT_ALLOWED

            # Two requests in flight: a claim that waits, and a bundle of which one half is sent.
            parked = asyncio.create_task(other.claim(wait_s=50))
            body = form(("lease_id", job["lease_id"].encode()), *files.items())
            async with line_to(server.url) as line:
                await line.send(
                    head(
                        "POST", f"/api/queue/{job['run_id']}/submit",
                        f"Authorization: Bearer {runner.token}", f"Content-Type: {FORM_TYPE}",
                        f"Content-Length: {len(body)}",
                    )
                    + body[: len(body) // 2]
                )  # fmt: skip
                await until_in_flight(fleet.http, 3)  # and the one that asks
                policy(signers, SIGNER, NEWCOMER)
                process.send_signal(signal.SIGHUP)
                await log.until("reload.done")
                await line.send(body[len(body) // 2 :])
                answer = await line.answer()
            assert answer is not None
            assert answer.status_code == 201, "a signer that was not allowed is accepted now"
            await fleet.enqueue()
            next_job = (await parked).json()

            # A broken file is told, and the one before it still counts.
            signers.write_text("schema_version: other/v1\n")
            process.send_signal(signal.SIGHUP)
            told = await log.until("reload.refused")
            assert str(signers) in told["problem"]
            files = signed(fleet, result_for(next_job["run_id"], next_job), NEWCOMER)
            assert (await other.submit(next_job, files)).status_code == 201

            # The log level, by the settings' file: quieter from here on.
            policy(signers, SIGNER)
            config.write_text("queue: {log_level: warning}")
            process.send_signal(signal.SIGHUP)
            await log.until("reload.done", 2)
            assert (await other.claim()).status_code == 204
            config.write_text("queue: {log_level: loud}")
            process.send_signal(signal.SIGHUP)
            assert "LOG_LEVEL" in (await log.until("reload.refused", 2))["problem"]
            assert log.events[-2]["event"] == "reload.done"


@pytest.mark.gen_test
async def test_at_sighup_a_worker_at_its_work_ends_with_the_policy_it_began_with(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = make_settings(signers_file=policy(tmp_path / "signers.yaml", SIGNER), workers=1)
    async with held(tmp_path, monkeypatch) as verifications:
        with started(settings) as process:
            server = Server(process, url_of(process))
            log = Log(process)
            async with reaching(settings, sigstore, server) as (fleet,):
                runner = await fleet.sign_on()
                await fleet.enqueue()
                submit = asyncio.create_task(runner.submit(await runner.take()))
                worker = await verifications.begun()
                policy(settings.signers_file, NEWCOMER)
                process.send_signal(signal.SIGHUP)
                await log.until("reload.done")
                assert not submit.done()
                verifications.go_on()
                assert (await submit).status_code == 201

                # The same process verifies by the new policy, without a word of the reload.
                await fleet.enqueue()
                job = await runner.take()
                for signer, status in ((SIGNER, 422), (NEWCOMER, 201)):
                    files = signed(fleet, result_for(job["run_id"], job), signer)
                    submit = asyncio.create_task(runner.submit(job, files))
                    assert await verifications.begun() == worker
                    verifications.go_on()
                    assert (await submit).status_code == status


async def until_in_flight(http: httpx.AsyncClient, count: int) -> None:
    """Wait until a process answers so many requests at once."""
    async with asyncio.timeout(20):
        while f"bakeoff_queue_http_in_flight {count}.0" not in (await http.get("/metrics")).text:
            pass  # each look is a request that waits for its answer
