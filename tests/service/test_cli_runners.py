"""`runners` and `queue requeue` against a real server."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from nacl.signing import SigningKey
from structlog.testing import capture_logs

from client import admin_api
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.cli_admin import Outcome, Shell
from tests.support.fleet import Fleet, model_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]


class Desk:
    """An admin at a terminal: commands run in a thread, as the server needs this one."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def __call__(self, *arguments: object) -> Outcome:
        return await asyncio.to_thread(self._shell, *arguments)


@asynccontextmanager
async def operating(
    settings: Settings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> AsyncIterator[tuple[Fleet, Desk]]:
    """Yield a fleet and a desk whose commands reach it."""
    quiet_sweep(monkeypatch)
    # The server in this process logs to the very stdout that is a command's answer.
    with capture_logs():
        async with open_fleet(settings, sigstore) as fleet:
            monkeypatch.setenv("BAKEOFF_QUEUE_URL", fleet.url)
            monkeypatch.setenv("BAKEOFF_QUEUE_TOKEN", fleet.admin_token)
            monkeypatch.setenv("BAKEOFF_QUEUE_SIGNERS_FILE", str(settings.signers_file))
            yield fleet, Desk(Shell(capsys))


@pytest.mark.gen_test
async def test_ls_shows_each_runner_with_its_state_and_what_it_works_on(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        nobody = await desk("runners", "ls")
        assert (nobody.code, len(nobody.out.splitlines())) == (0, 1)
        runner, _ = await fleet.sign_on(), await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        await runner.take()
        listed = await desk("runners", "ls")
        assert (listed.code, listed.err) == (0, [])
        heading, busy, idle = listed.out.splitlines()
        assert heading.split()[:2] == ["runner_id", "state"]
        assert busy.split()[:2] == ["runner-a", "busy"]
        assert busy.split()[3:] == ["24", "q4_k_m,", "q8_0", run_id]
        assert idle.split()[:2] == ["runner-b", "idle"]
        runners = (await desk("runners", "ls", "--json")).json["runners"]
        assert [runner["current_runs"] for runner in runners] == [[run_id], []]


@pytest.mark.gen_test
async def test_ls_shows_all_runners_however_many_pages_they_take(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"runner-{letter}" for letter in "abcde"]
    monkeypatch.setattr(admin_api, "PAGE", 2)
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        for name in names:
            await fleet.sign_on(name)
        listed = await desk("runners", "ls")
        assert (listed.code, listed.err) == (0, [])
        assert [line.split()[0] for line in listed.out.splitlines()] == ["runner_id", *names]
        told = (await desk("runners", "ls", "--json")).json
        assert list(told) == ["runners"]  # one document, with nothing left to ask for
        assert [runner["runner_id"] for runner in told["runners"]] == names


@pytest.mark.gen_test
async def test_show_lists_the_members_and_says_when_there_is_no_such_runner(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        printed = (await desk("runners", "show", "runner-a")).out
        assert ["state", "idle"] in [line.split() for line in printed.splitlines()]
        shown = (await desk("runners", "show", "runner-a", "--json")).json
        assert shown["key_fingerprint"] == runner.fingerprint
        missing = await desk("runners", "show", "runner-x")
        assert (missing.code, missing.out) == (3, "")
        assert "runner-x" in missing.err[0]


@pytest.mark.gen_test
@pytest.mark.parametrize("command", [("pause", "--reason", "it smells"), ("drain",)])
async def test_pause_and_drain_without_yes_change_nothing_and_say_what_they_would(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    verb, *options = command
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        await fleet.enqueue()
        await runner.take()
        told = await desk("runners", verb, "runner-a", *options)
        assert (told.code, told.out) == (6, "")
        [line] = told.err
        assert f"would {verb} 1 runner, runner-a (busy, 1 run(s) in work); add --yes" in line
        assert (await fleet.admin("GET", "/runners/runner-a")).json()["state"] == "busy"
        assert (await desk("runners", verb, "runner-x", *options)).code == 3


@pytest.mark.gen_test
async def test_pause_drain_and_resume_do_what_they_say(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        await fleet.enqueue()
        command = ("runners", "pause", "runner-a", "--yes")
        assert (await desk(*command)).code == 2  # a reason belongs to it
        reason = ("--reason", "it smells", "--json")
        mistyped = await desk(*command, *reason, "--until", "tomorrow")
        assert (mistyped.code, "--until tomorrow" in mistyped.err[0]) == (2, True)
        paused = await desk(*command, *reason, "--until", "2999-12-31T00:00:00+01:00")
        assert (paused.json["state"], paused.json["pause_reason"]) == ("paused", "it smells")
        assert paused.json["paused_until"] == "2999-12-30T23:00:00Z"
        assert (await runner.claim()).status_code == 403
        resumed = await desk("runners", "resume", "runner-a")
        assert ["state", "idle"] in [line.split() for line in resumed.out.splitlines()]
        drained = await desk("runners", "drain", "runner-a", "--yes", "--json")
        assert drained.json["state"] == "draining"
        assert (await runner.claim()).status_code == 204
        assert (await desk("runners", "resume", "runner-a")).code == 0
        assert (await runner.claim()).status_code == 200
        assert (await desk("runners", "resume", "runner-x")).code == 3


@pytest.mark.gen_test
async def test_learned_needs_are_listed_and_forgotten(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        await fleet.enqueue(model=model_of(16, "q8_0"))
        await runner.fail(await runner.take(), "oom")
        [model] = (await desk("models", "needs", "--json")).json["models"]
        assert (model["rule_gb"], model["need_gb"]) == (20, 25)
        assert model["model_id"] in (await desk("models", "needs")).out
        command = ("models", "forget-need", model["model_id"], "--reason", "a browser had the card")
        assert (await desk(*command)).code == 6
        assert (await desk(*command, "--yes")).code == 0
        assert (await desk("models", "needs", "--json")).json["models"] == []


@pytest.mark.gen_test
async def test_requeue_asks_for_yes_and_puts_a_run_back(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue(max_attempts=1)
        command = ("queue", "requeue", run_id, "--reason", "new driver")
        await runner.fail(await runner.take())
        told = await desk(*command)
        assert (told.code, told.out) == (6, "")
        [line] = told.err
        assert not line.startswith("error")
        assert f"would requeue 1 run, {run_id} (SmolLM2-1.7B-Instruct, FAILED)" in line
        assert "add --yes" in line
        assert (await fleet.row(run_id))["status"] == "FAILED"
        assert (await desk("queue", "requeue", run_id, "--yes")).code == 2  # no reason
        done = await desk(*command, "--yes", "--json")
        assert (done.code, done.json["status"]) == (0, "PENDING")
        audited = "SELECT detail FROM audit WHERE action = 'queue.requeue'"
        assert (await fleet.pool.fetchval(audited))["reason"] == "new driver"
        await runner.take()
        busy = await desk(*command, "--yes")
        assert busy.code == 4
        assert "[conflict, 409" in busy.err[0]


@pytest.mark.gen_test
async def test_keys_add_says_who_may_sign_for_a_key_without_a_signer(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signer = ("--signer-identity", "a@b.test", "--signer-issuer", "https://issuer.test")
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (_, desk):
        for options, told in (
            ((), True),
            (("--json",), True),
            (signer, False),
            (("--signature-policy", "runner-key"), False),
        ):
            key = base64.b64encode(bytes(SigningKey.generate().verify_key)).decode()
            name = f"gpu-{len(options)}-{told}"
            done = await desk("keys", "add", key, "--runner-id", name, *options)
            assert done.code == 0
            assert ("no signer of its own" in " ".join(done.err)) is told, options
            assert not told or "--signature-policy runner-key" in done.err[0]
