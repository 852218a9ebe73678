"""Admin tokens, and the tokens of runners: minted, listed and revoked, each on the record."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest

from auth import admin_tokens
from config.settings import Settings
from db import admin
from db.migrate import migrate, roll_back, status
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_cli_runners import operating
from tests.support.fleet import Fleet, code_of, open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
MIGRATION = "20261127000060_admin_tokens"


async def mint(fleet: Fleet, name: str = "ops", **changes: Any) -> httpx.Response:
    """Ask for a token."""
    wanted = {"name": name, "scopes": ["read"], **changes}
    return await fleet.admin("POST", "/tokens", json=wanted)


async def revoke(fleet: Fleet, token_id: str, by: str | None = None) -> httpx.Response:
    """Revoke an admin token."""
    headers = {"Authorization": f"Bearer {by}"} if by else {}
    path, body = f"/tokens/{token_id}", {"reason": "left"}
    return await fleet.admin("DELETE", path, json=body, headers=headers)


async def read_as(fleet: Fleet, token: str) -> int:
    """Return what the queue's list answers a token."""
    headers = {"Authorization": f"Bearer {token}"}
    return (await fleet.admin("GET", "/queue", headers=headers)).status_code


@pytest.mark.gen_test
async def test_a_token_is_minted_shown_once_and_revoked_in_every_process_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as other:
        answer = await mint(fleet)
        assert answer.status_code == 201, answer.text
        minted = answer.json()
        life = datetime.fromisoformat(minted["expires_at"]) - datetime.now(UTC)
        assert timedelta(days=89) < life < timedelta(days=91)
        assert [await read_as(each, minted["token"]) for each in (fleet, other)] == [200, 200]
        listed = await fleet.admin("GET", "/tokens")
        assert minted["token"] not in listed.text
        shown = next(row for row in listed.json()["tokens"] if row["name"] == "ops")
        assert (shown["scopes"], shown["minted_by"]) == (["read"], "admin:test")

        first, again = [await revoke(fleet, minted["token_id"]) for _ in range(2)]
        assert (first.status_code, again.status_code) == (200, 200)
        assert first.json()["revoked_at"] == again.json()["revoked_at"]
        assert [await read_as(each, minted["token"]) for each in (fleet, other)] == [401, 401]
        audited = await fleet.pool.fetch(
            "SELECT actor, action, target, address, token_id, detail FROM audit ORDER BY audit_id"
        )
        assert [row["action"] for row in audited] == ["token.mint", "token.revoke"]
        for row in audited:
            assert (row["actor"], row["address"]) == ("admin:test", "127.0.0.1")
            assert row["target"] == f"token:{minted['token_id']}"
            assert row["token_id"] is not None
        assert audited[1]["detail"] == {"name": "ops", "reason": "left"}
        unknown = await revoke(fleet, "00000000-0000-4000-8000-000000000000")
        assert code_of(unknown) == (404, "not_found")


@pytest.mark.gen_test
async def test_a_name_belongs_to_one_living_token(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        answers = await asyncio.gather(*(mint(fleet) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
        (minted,) = (answer.json() for answer in answers if answer.status_code == 201)
        await revoke(fleet, minted["token_id"])
        assert (await mint(fleet)).status_code == 201


@pytest.mark.gen_test
async def test_a_token_that_does_not_fit_is_refused_with_a_pointer(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    far = (datetime.now(UTC) + timedelta(days=400)).isoformat()
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/name", {"name": ""}),
        ("/name", {"name": "a b"}),
        ("/name", {"name": "a\n"}),
        ("/name", {"name": "\u202eops"}),
        ("/name", {"name": "x" * 65}),
        ("/scopes", {"scopes": []}),
        ("/scopes/0", {"scopes": ["root"]}),
        ("/expires_at", {"expires_at": "2020-01-01T00:00:00Z"}),
        ("/expires_at", {"expires_at": far}),
        ("/expires_at", {"expires_at": "soon"}),
        ("/expires_at", {"expires_at": None}),
        ("/colour", {"colour": "red"}),
    ]
    async with open_fleet(make_settings(), sigstore) as fleet:
        for at, changes in bad:
            answer = await mint(fleet, **changes)
            assert code_of(answer) == (422, "invalid_request"), changes
            assert {error["pointer"] for error in answer.json()["errors"]} == {at}, changes
        assert await fleet.pool.fetchval("SELECT count(*) FROM admin_tokens") == 1


@pytest.mark.gen_test
async def test_a_token_gives_no_scope_that_it_has_not(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        only_admin = await new_token(fleet.pool, "only-admin", ["admin"])
        headers = {"Authorization": f"Bearer {only_admin}"}
        for scopes, status in ((["read"], 403), (["admin", "operate"], 403), (["admin"], 201)):
            wanted = {"name": f"of-{len(scopes)}-{status}", "scopes": scopes}
            answer = await fleet.admin("POST", "/tokens", json=wanted, headers=headers)
            assert answer.status_code == status, answer.text


@pytest.mark.gen_test
async def test_the_last_token_that_can_revoke_others_stays_also_of_two_at_once(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        mine = (await fleet.admin("GET", "/tokens")).json()["tokens"][0]["token_id"]
        await new_token(fleet.pool, "expired", expires_at=datetime.now(UTC))
        await new_token(fleet.pool, "reader", ["read"])
        refused = await revoke(fleet, mine)
        assert code_of(refused) == (409, "conflict")
        assert "mint another one first" in refused.json()["detail"]
        other = (await mint(fleet, "second", scopes=["admin"])).json()
        async with fleet.transaction() as transaction:
            await admin.lock_keepers(transaction)  # both wait here, and then go on together
            both = asyncio.gather(
                revoke(fleet, other["token_id"]), revoke(fleet, mine, by=other["token"])
            )
            await fleet.until_blocked(2)
        answers = await both
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        living = await fleet.pool.fetch(
            "SELECT name FROM admin_tokens WHERE revoked_at IS NULL AND 'admin' = any(scopes)"
            " AND coalesce(expires_at > now(), true)"
        )
        assert len(living) == 1


@pytest.mark.gen_test
async def test_a_token_may_revoke_itself(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        minted = (await mint(fleet, scopes=["admin", "read"])).json()
        assert (await revoke(fleet, minted["token_id"], by=minted["token"])).status_code == 200
        assert await read_as(fleet, minted["token"]) == 401


@pytest.mark.gen_test
async def test_one_token_of_a_runner_is_revoked_in_every_process_and_its_key_stays_good(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as other:
        runner = await fleet.sign_on()
        await fleet.enqueue()
        job = await runner.take()
        stolen = runner.at(other)
        assert (await stolen.heartbeat(job)).status_code == 200
        (given,) = (await fleet.admin("GET", "/runners/runner-a/tokens")).json()["tokens"]
        assert (given["revoked"], given["address"]) == (False, "127.0.0.1")
        assert given["key_fingerprint"] == runner.fingerprint
        path, why = f"/runners/runner-a/tokens/{given['jti']}", {"reason": "seen elsewhere"}
        for _ in range(2):
            assert (await fleet.admin("DELETE", path, json=why)).status_code == 200
        assert code_of(await runner.heartbeat(job)) == (401, "invalid_token")
        async with asyncio.timeout(5):  # the other process has remembered it for a second
            while (await stolen.heartbeat(job)).is_success:  # noqa: ASYNC110 (in Redis)
                await asyncio.sleep(0.02)
        assert (await runner.register()).status_code == 200
        assert (await runner.heartbeat(job)).status_code == 200, "its lease stays its own"
        listed = (await fleet.admin("GET", "/runners/runner-a/tokens")).json()["tokens"]
        assert [token["revoked"] for token in listed] == [False, True]
        rows = await fleet.pool.fetch("SELECT * FROM audit WHERE action = 'runner_token.revoke'")
        assert [(row["target"], row["runner_id"], row["detail"]) for row in rows] == [
            (f"runner-token:{given['jti']}", "runner-a", why)
        ]
        for unknown in ("/runners/runner-b/tokens/" + given["jti"], path[:-4] + "0000"):
            refused = await fleet.admin("DELETE", unknown, json=why)
            assert code_of(refused) == (404, "not_found")


@pytest.mark.gen_test
async def test_what_a_runner_waits_for_it_does_not_get_after_its_token_was_revoked(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        parked = asyncio.create_task(runner.claim(wait_s=30))
        async with asyncio.timeout(10):
            while len(fleet.services.claims.parked) == 0:  # noqa: ASYNC110 (there is no signal)
                await asyncio.sleep(0.01)
        await _revoke_tokens(fleet)
        run_id = await fleet.enqueue()
        assert code_of(await parked) == (401, "invalid_token")
        assert (await fleet.row(run_id))["status"] == "PENDING"

        await runner.register()
        job = await runner.take()
        files = runner.bundle(job)
        admitted = fleet.services.submissions.admit

        async def admit(*arguments: Any) -> Any:
            run = await admitted(*arguments)
            await _revoke_tokens(fleet)  # while the bundle is on its way
            return run

        monkeypatch.setattr(fleet.services.submissions, "admit", admit)
        assert code_of(await runner.submit(job, files)) == (401, "invalid_token")
        assert (await fleet.row(run_id))["status"] == "CLAIMED"


async def _revoke_tokens(fleet: Fleet) -> None:
    for token in (await fleet.admin("GET", "/runners/runner-a/tokens")).json()["tokens"]:
        path = f"/runners/runner-a/tokens/{token['jti']}"
        assert (await fleet.admin("DELETE", path, json={"reason": "test"})).status_code == 200


@pytest.mark.gen_test
async def test_the_command_line_mints_lists_and_revokes_over_the_api(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        done = await desk(
            "tokens", "mint", "--name", "ops", "--scope", "read", "--days", 1, "--json"
        )
        minted = done.json
        assert await read_as(fleet, minted["token"]) == 200
        assert minted["minted_by"] == "admin:test"
        again = await desk("tokens", "mint", "--name", "ops")
        assert (again.code, "has this name" in again.err[0]) == (4, True)
        assert "ops" in (await desk("tokens", "ls")).out
        by_id = ("tokens", "revoke", minted["token_id"], "--reason", "done")
        assert (await desk(*by_id)).code == 6
        assert (await desk(*by_id, "--yes")).err == ["revoked the token of ops"]
        assert await read_as(fleet, minted["token"]) == 401

        await fleet.sign_on()
        listed = (await desk("runners", "tokens", "runner-a", "--json")).json
        (token,) = listed["tokens"]
        wanted = ("runners", "revoke-token", "runner-a", token["jti"], "--reason", "stolen")
        assert (await desk(*wanted)).code == 6
        assert (await desk(*wanted, "--yes", "--json")).json["jti"] == token["jti"]
        assert "true" in (await desk("runners", "tokens", "runner-a")).out


@pytest.mark.gen_test
async def test_without_a_token_the_command_line_works_in_the_database_and_is_audited(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = make_settings()
    async with operating(settings, sigstore, monkeypatch, capsys) as (fleet, desk):
        monkeypatch.delenv("BAKEOFF_QUEUE_TOKEN")
        dsn = settings.database_url.get_secret_value()
        monkeypatch.setenv("BAKEOFF_QUEUE_DATABASE_URL", dsn)
        minted = (await desk("tokens", "mint", "--name", "first", "--json")).json
        assert await read_as(fleet, minted["token"]) == 200
        bad = await desk("tokens", "mint", "--name", "a b")
        assert (bad.code, bad.err[0].startswith("error: --name ")) == (2, True)
        assert (await desk("tokens", "mint", "--name", "first")).code == 4
        assert (await desk("tokens", "mint", "--name", "x", "--days", 400)).code == 2
        names = [row["name"] for row in (await desk("tokens", "ls", "--json")).json["tokens"]]
        assert names == ["test", "first"]
        revoking = ("tokens", "revoke", minted["token_id"], "--reason", "lost", "--yes")
        assert (await desk(*revoking)).code == 0
        assert await read_as(fleet, minted["token"]) == 401
        role = await fleet.pool.fetchval("SELECT session_user")
        actors = {row["actor"] for row in await fleet.pool.fetch("SELECT actor FROM audit")}
        assert actors == {f"database:{role}"}


def test_tokens_of_one_name_get_names_of_their_own_when_a_database_is_migrated(
    empty_database: str,
) -> None:
    migrate(empty_database)

    async def names(before: bool) -> list[str]:
        connection = await asyncpg.connect(empty_database)
        try:
            if before:
                for name in ("ops", "ops", "ci", "ops"):
                    _, digest = admin_tokens.make()
                    await connection.execute(
                        "INSERT INTO admin_tokens (token_sha256, name, scopes)"
                        " VALUES ($1, $2, '{read}')", digest, name,
                    )  # fmt: skip
            rows = await connection.fetch("SELECT name FROM admin_tokens ORDER BY created_at")
            return [row["name"] for row in rows]
        finally:
            await connection.close()

    while dict(status(empty_database))[MIGRATION]:
        roll_back(empty_database)
    assert asyncio.run(names(before=True)) == ["ops", "ops", "ci", "ops"]
    migrate(empty_database)
    after = asyncio.run(names(before=False))
    assert (len(set(after)), after.count("ops"), after.count("ci")) == (4, 1, 1)
