"""The audit trail: what leaves a row, and that no row can be changed without being caught."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from broker.audit import chain as audit_chain
from broker.audit.chain import AuditChain
from config.settings import Settings
from db import audit
from db.audit import SYSTEM
from sandbox.runner.identity import Identity
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_cli_runners import Desk, operating
from tests.support.cli_admin import Outcome
from tests.support.fleet import (
    AUDIENCE,
    CAPABILITIES,
    Fleet,
    Runner,
    code_of,
    open_fleet,
    quiet_sweep,
)

MakeSettings = Callable[..., Settings]
WHY = {"reason": "because"}


async def chained(fleet: Fleet) -> AuditChain:
    """Chain what is there now, and return who did it."""
    services = fleet.services
    chain = AuditChain(fleet.pool, services.receipts._keys, services.settings.public_url)
    async with asyncio.timeout(10):
        while await chain.look():  # the server's own loop may be at it: then until it has done
            await chain.run_once()
    await chain.run_once()
    return chain


def quiet_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the servers' own chains wait for ever: the test says when one runs."""

    async def never(self: AuditChain, succeeded: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(AuditChain, "run", never)


async def rows_of(fleet: Fleet, action: str) -> list[dict[str, Any]]:
    """Return the trail's rows of an action as the API shows them, oldest first."""
    answer = await fleet.admin("GET", f"/audit?action={action}")
    assert answer.status_code == 200, answer.text
    return answer.json()["rows"][::-1]


# What leaves a row


@pytest.mark.gen_test
async def test_every_lease_that_is_taken_from_somebody_leaves_a_row(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=8)
        jobs = []
        for _ in range(5):
            await fleet.enqueue()
            jobs.append(await runner.take())
        by_release, by_failure, by_lapse, freed, kept = jobs
        for job in (by_release, by_failure, by_lapse):
            await fleet.cancel(job["run_id"], "wrong prompt")
        assert (await runner.release(by_release)).is_success
        assert (await runner.fail(by_failure)).is_success
        await fleet.overdue(by_lapse["run_id"])
        assert await fleet.sweep() == 1
        assert (await runner.release(freed)).is_success, "given back, and not taken"
        await fleet.revoke(runner, "stolen")

        cancels = await rows_of(fleet, "lease.cancel")
        assert [(row["run_id"], row["runner_id"], row["detail"]) for row in cancels] == [
            (job["run_id"], "runner-a", {"lease_seq": 1, "reason": "wrong prompt"})
            for job in (by_release, by_failure)
        ]
        (lapse,) = await rows_of(fleet, "lease.lapse")
        assert (lapse["target"], lapse["detail"]["status"]) == (
            f"run:{by_lapse['run_id']}", "CANCELLED",
        )  # fmt: skip
        (revoked,) = await rows_of(fleet, "lease.revoke")
        assert (revoked["run_id"], revoked["runner_id"]) == (kept["run_id"], "runner-a")
        assert (revoked["actor"], revoked["address"]) == ("admin:test", "127.0.0.1")
        assert revoked["detail"] == {"lease_seq": 1, "reason": "stolen"}
        (key,) = await rows_of(fleet, "runner_key.revoke")
        assert (key["target"], key["token_id"]) == (
            f"key:{runner.fingerprint}", revoked["token_id"],
        )  # fmt: skip


@pytest.mark.gen_test
async def test_every_action_of_an_admin_leaves_a_row_with_actor_target_address_and_reason(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driven by the authorization matrix: an address that writes and leaves no row is caught."""
    from tests.service.test_authorization import ROWS, bearer, staged

    quiet_sweep(monkeypatch)
    quiet_chain(monkeypatch)
    async with staged(make_settings(), sigstore) as scene:
        fleet = scene.fleet
        admin = bearer("an admin's", fleet.admin_token)
        for (method, path), row in ROWS.items():
            if row.needs not in ("operate", "admin"):
                continue
            before = await fleet.pool.fetchval("SELECT max(audit_id) FROM audit")
            answer = await scene.send(method, path, admin)
            assert answer.is_success, (method, path, answer.text)
            new = await fleet.pool.fetch("SELECT * FROM audit WHERE audit_id > $1", before)
            assert new, (method, path)
            for each in new:
                assert (each["actor"], each["address"]) == ("admin:test", "127.0.0.1"), path
                assert each["token_id"] is not None, path
                wanted = row.body.get("reason")
                assert wanted is None or each["detail"]["reason"] == wanted, path
            assert any(each["target"] or "run_ids" in each["detail"] for each in new), path


@pytest.mark.gen_test
async def test_a_sign_on_by_another_process_or_from_elsewhere_leaves_a_row_and_a_renewal_none(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        process = Identity(runner.key, AUDIENCE, "gpu-1.example", CAPABILITIES)
        for _ in range(3):  # the second and the third are renewals
            assert (await runner.register(process.sign_registration())).is_success
        (first,) = await rows_of(fleet, "runner.sign_on")
        assert (first["actor"], first["address"]) == ("runner:runner-a", "127.0.0.1")
        assert first["target"] == f"key:{runner.fingerprint}"
        tokens = (await fleet.admin("GET", "/runners/runner-a/tokens")).json()["tokens"]
        assert first["detail"]["jti"] in [token["jti"] for token in tokens]
        await fleet.pool.execute("UPDATE runners SET address = '192.0.2.1'")
        assert (await runner.register(process.sign_registration())).is_success
        assert len(await rows_of(fleet, "runner.sign_on")) == 2, "it moved"
        assert (await runner.register()).is_success
        assert len(await rows_of(fleet, "runner.sign_on")) == 3, "it was started again"
        headers = runner.headers
        assert (await fleet.http.delete("/api/runners/me", headers=headers)).status_code == 200
        (off,) = await rows_of(fleet, "runner.sign_off")
        assert (off["actor"], off["runner_id"]) == ("runner:runner-a", "runner-a")
        assert code_of(await fleet.admin("GET", "/audit?colour=red")) == (422, "invalid_request")


# Reading


@pytest.mark.gen_test
async def test_the_trail_is_read_newest_first_by_pages_and_filters(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.sign_on()
        await fleet.sign_on("runner-b")
        run_id = await fleet.enqueue()
        await fleet.cancel(run_id)
        await chained(fleet)
        everything = (await fleet.admin("GET", "/audit?limit=1000")).json()["rows"]
        ids = [row["audit_id"] for row in everything]
        assert ids == sorted(ids, reverse=True)
        assert all(row["hash"] for row in everything if row["action"] != "audit.head")
        paged, cursor = [], ""
        while True:
            page = (await fleet.admin("GET", f"/audit?limit=2{cursor}")).json()
            paged += [row["audit_id"] for row in page["rows"]]
            if not page["next_cursor"]:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert [i for i in paged if i in ids] == ids
        for query, actions in (
            (f"run_id={run_id}", {"queue.cancel"}),
            ("runner_id=runner-b", {"runner_key.add", "runner.sign_on"}),
            ("actor=runner:runner-a", {"runner.sign_on"}),
            ("actor=admin:test&action=queue.add", {"queue.add"}),
            ("actor=nobody", set()),
        ):
            rows = (await fleet.admin("GET", f"/audit?{query}")).json()["rows"]
            assert {row["action"] for row in rows} == actions, query
        for bad in ("run_id=X", f"run_id={run_id.upper()}", "cursor=MTo5", "cursor=!", "limit=0",
                    "actor=%00", "limit=1001"):  # fmt: skip
            refused = await fleet.admin("GET", f"/audit?{bad}")
            assert code_of(refused) == (422, "invalid_request"), bad
        for bad in ("after=-1", "after=1e3", "cursor=MQ==", "run_id=x"):
            refused = await fleet.admin("GET", f"/audit/chain?{bad}")
            assert code_of(refused) == (422, "invalid_request"), bad


# The chain


@pytest.mark.gen_test
async def test_two_processes_that_write_at_the_same_time_give_one_chain(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(audit_chain, "BATCH", 7)
    monkeypatch.setattr(audit_chain, "INTERVAL_S", 0.01)
    settings = make_settings()
    async with (
        operating(settings, sigstore, monkeypatch, capsys) as (fleet, desk),
        open_fleet(settings, sigstore) as other,
    ):
        for each in (fleet, other):
            await asyncio.gather(
                *(each.admin("POST", "/queue", json={"runs": []}) for _ in range(2))
            )

        async def write(into: Fleet, number: int) -> None:
            async with into.pool.acquire() as connection, connection.transaction():
                await audit.record(connection, SYSTEM, "test", f"run:{number}", number=number)
                await asyncio.sleep(number % 3 / 100)  # commits in another order than numbered

        await asyncio.gather(
            *(write(into, number) for number in range(60) for into in (fleet, other))
        )
        await chained(fleet)
        entries = await fleet.pool.fetch("SELECT seq, audit_id FROM audit_chain ORDER BY seq")
        assert [row["seq"] for row in entries] == list(range(1, len(entries) + 1))
        unchained = "SELECT FROM audit LEFT JOIN audit_chain USING (audit_id) WHERE seq IS NULL"
        assert await fleet.pool.fetch(f"{unchained} AND action = 'test'") == []
        assert await fleet.pool.fetchval("SELECT count(*) FROM audit_unchained") == 0
        verified = await desk("audit", "verify", "--json")
        assert (verified.code, verified.json["problems"]) == (0, [])
        assert verified.json["entries"] >= 120


@pytest.mark.gen_test
async def test_nobody_waits_for_the_chain_nor_for_another_who_writes_a_row(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a batch is chained and not committed, claims, beats, submits and admins go on."""
    quiet_chain(monkeypatch)
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        reached, go = asyncio.Event(), asyncio.Event()
        write = audit.chain

        async def write_and_wait(*arguments: Any) -> None:
            await write(*arguments)
            reached.set()
            await go.wait()

        monkeypatch.setattr(audit, "chain", write_and_wait)
        chaining = asyncio.create_task(chained(fleet))
        await reached.wait()
        async with fleet.transaction() as other:
            await audit.record(other, SYSTEM, "test", None)
            await fleet.enqueue()
            cancelled = await fleet.enqueue()
            job = await runner.take()
            await fleet.cancel(cancelled)
            assert (await runner.heartbeat(job)).is_success
            assert (await runner.submit(job)).status_code == 201
        assert not chaining.done()
        go.set()
        await chaining
        assert await fleet.pool.fetchval("SELECT count(*) FROM audit_unchained") == 0


@pytest.mark.gen_test
async def test_the_head_is_signed_each_hour_into_the_log_and_the_trail_by_one_process(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_chain(monkeypatch)
    settings = make_settings()
    async with open_fleet(settings, sigstore) as fleet, open_fleet(settings, sigstore) as other:
        await fleet.sign_on()
        with capture_logs() as logs:
            await chained(fleet)
            await chained(other)
            await fleet.pool.execute("UPDATE audit SET at = at - interval '61 minutes'")
            await chained(other)
        heads = await rows_of(fleet, "audit.head")
        assert len(heads) == 2
        told = [line for line in logs if line["event"] == "audit.head"]
        assert [line["hash"] for line in told] == [row["detail"]["hash"] for row in heads]
        assert heads[0]["detail"]["seq"] < heads[1]["detail"]["seq"]


# Tampering


class Trail:
    """A trail that was chained, the witnesses that are kept of it, and who verifies it."""

    def __init__(self, fleet: Fleet, desk: Desk, folder: Path) -> None:
        self.fleet, self.desk, self.folder = fleet, desk, folder
        self.receipt: dict[str, Any] = {}

    async def change(self, *statements: str) -> None:
        """Change what is stored, as whoever owns the database can."""
        for statement in statements:
            await self.fleet.pool.execute(statement)

    async def verify(self, *options: object) -> Outcome:
        """Verify the chain."""
        return await self.desk("audit", "verify", *options)

    def witness(self, name: str = "receipt.json", **changes: Any) -> Path:
        """Write the runner's receipt into a file."""
        path = self.folder / name
        path.write_text(json.dumps({**self.receipt, **changes}))
        return path


@asynccontextmanager
async def kept_trail(
    settings: Settings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
) -> AsyncIterator[Trail]:
    """Yield a trail of some twenty entries, with a receipt that was given behind the twelfth."""
    quiet_chain(monkeypatch)
    async with operating(settings, sigstore, monkeypatch, capsys) as (fleet, desk):
        trail = Trail(fleet, desk, folder)
        runner = await fleet.sign_on()
        for number in range(8):
            await audit.record(fleet.pool, SYSTEM, "test", None, number=number)
        await chained(fleet)
        trail.receipt = await _receipt(fleet, runner)
        for number in range(8, 16):
            await audit.record(fleet.pool, SYSTEM, "test", None, number=number)
        await chained(fleet)
        assert (await trail.verify("--witness", trail.witness())).code == 0
        yield trail


async def _receipt(fleet: Fleet, runner: Runner) -> dict[str, Any]:
    own = fleet.services.receipts._audit_chain
    await own.look()
    await fleet.enqueue()
    answer = await runner.submit(await runner.take())
    assert answer.status_code == 201, answer.text
    receipt = answer.json()
    assert receipt["audit"] == own.head
    assert receipt["audit"]["seq"] > 8
    return receipt


OF = "(SELECT audit_id FROM audit_chain WHERE seq = 5)"
TAMPERED = {
    "a detail was changed": (
        [f"UPDATE audit SET detail = '{{\"number\": 99}}' WHERE audit_id = {OF}"],
        r"entry 5: row \d+ is not what was chained",
    ),
    "an actor was changed": (
        [f"UPDATE audit SET actor = 'admin:else' WHERE audit_id = {OF}"],
        "entry 5: row",
    ),
    "a time was changed": (
        [f"UPDATE audit SET at = at + interval '1 second' WHERE audit_id = {OF}"],
        "entry 5: row",
    ),
    "a row was deleted": ([f"DELETE FROM audit WHERE audit_id = {OF}"], r"row \d+ is gone"),
    "a row and its entry were deleted": (
        [f"DELETE FROM audit WHERE audit_id = {OF}", "DELETE FROM audit_chain WHERE seq = 5"],
        "entries 5 to 5 are gone",
    ),
    "and the entries behind it were moved up": (
        [
            f"DELETE FROM audit WHERE audit_id = {OF}",
            "DELETE FROM audit_chain WHERE seq = 5",
            "UPDATE audit_chain SET seq = -seq WHERE seq > 5",
            "UPDATE audit_chain SET seq = -seq - 1 WHERE seq < 0",
        ],
        "entry 5: row",
    ),
    "a row was put in past the chain": (
        [
            "ALTER TABLE audit DISABLE TRIGGER ALL",
            "INSERT INTO audit (at, actor, action) VALUES (now() - interval '1 hour', 'x', 'y')",
            "ALTER TABLE audit ENABLE TRIGGER ALL",
        ],
        r"row \d+ is in no entry of the chain",
    ),
    "two entries were exchanged": (
        [
            "UPDATE audit_chain SET seq = seq - 11 WHERE seq IN (5, 6)",
            "UPDATE audit_chain SET seq = -seq WHERE seq < 0",
        ],
        "entry 5: row",
    ),
    "the rows of two entries were exchanged": (
        [
            "UPDATE audit AS a SET detail = o.detail FROM audit AS o, audit_chain AS c,"  # noqa: ISC004
            " audit_chain AS d WHERE a.audit_id = c.audit_id AND o.audit_id = d.audit_id"
            " AND (c.seq, d.seq) IN ((5, 6), (6, 5))",
        ],
        "entry 5: row",
    ),
    "an entry's hash was changed": (
        ["UPDATE audit_chain SET hash = sha256('x') WHERE seq = 5"],
        "entry 5: row",
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
@pytest.mark.gen_test
async def test_what_was_changed_in_the_trail_is_named(
    case: str,
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    statements, told = TAMPERED[case]
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        await trail.change(*statements)
        done = await trail.verify()
        assert done.code == 1
        assert done.err[0] == "error: the audit trail is not the one that was written"
        assert any(re.search(told, line) for line in done.err), done.err


@pytest.mark.gen_test
async def test_a_row_that_is_written_later_than_it_says_is_named(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        await trail.change(
            "INSERT INTO audit (at, actor, action) VALUES (now() - interval '1 hour', 'x', 'y')"
        )
        await chained(trail.fleet)
        done = await trail.verify()
        assert done.code == 1
        assert "it was written later than it says" in done.err[1]


@pytest.mark.gen_test
async def test_a_tail_that_was_cut_off_is_caught_by_a_receipt(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        seen = trail.receipt["audit"]["seq"]
        await trail.change(
            f"DELETE FROM audit WHERE audit_id IN"
            f" (SELECT audit_id FROM audit_chain WHERE seq >= {seen})",
            "DELETE FROM audit WHERE audit_id NOT IN (SELECT audit_id FROM audit_chain)",
            f"DELETE FROM audit_chain WHERE seq >= {seen}",
        )
        done = await trail.verify("--witness", trail.witness())
        assert done.code == 1
        assert f"the chain ends at entry {seen - 1}, and " in " ".join(done.err)
        assert f"has seen entry {seen}" in " ".join(done.err)


@pytest.mark.gen_test
async def test_a_chain_that_was_calculated_anew_is_caught_by_a_receipt_and_by_its_signed_heads(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        await trail.change(
            f"UPDATE audit SET detail = '{{\"number\": 99}}' WHERE audit_id = {OF}",
            "DELETE FROM audit_chain",
            "INSERT INTO audit_unchained SELECT audit_id FROM audit ON CONFLICT DO NOTHING",
        )
        await chained(trail.fleet)
        told = " ".join((await trail.verify()).err)
        assert "is not the one whose hash was signed at" in told
        assert "is not what was chained" not in told, "it fits together"
        seen = trail.receipt["audit"]["seq"]
        done = await trail.verify("--witness", trail.witness())
        assert f"entry {seen} is not the one that {trail.folder}/receipt.json" in " ".join(done.err)
        await trail.change("DELETE FROM audit WHERE action = 'audit.head'",
                           "DELETE FROM audit_chain", "DELETE FROM audit_unchained",
                           "INSERT INTO audit_unchained SELECT audit_id FROM audit")  # fmt: skip
        monkeypatch.setattr(AuditChain, "_sign_hourly", _nothing)
        await chained(trail.fleet)
        assert "heads were removed" in " ".join((await trail.verify()).err)


async def _nothing(_: AuditChain) -> None:
    """The attacker has no receipt key."""


@pytest.mark.gen_test
async def test_a_verification_begins_at_a_witness_and_takes_no_forged_one(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        fleet, seen = trail.fleet, trail.receipt["audit"]["seq"]
        whole = (await trail.verify("--json")).json
        part = (await trail.verify("--since", trail.witness(), "--json")).json
        assert whole["entries"] == part["entries"] + seen
        assert whole["head"] == part["head"]
        # A head as the log has it, with the log's own members, is a witness too.
        (head, *_) = await rows_of(fleet, "audit.head")
        line = tmp_path / "line.json"
        line.write_text(json.dumps({**head["detail"], "event": "audit.head", "level": "info"}))
        assert (await trail.verify("--witness", line)).code == 0
        forged = trail.witness("forged.json", audit={"seq": seen, "hash": "0" * 64})
        done = await trail.verify("--witness", forged)
        assert (done.code, "is no witness" in done.err[0]) == (1, True)
        older = trail.witness("older.json")
        older.write_text(json.dumps(_signed_without_head(fleet, trail.receipt)))
        done = await trail.verify("--witness", older)
        assert (done.code, "before there was a chain" in done.err[0]) == (2, True)
        kept = tmp_path / "keys.json"
        kept.write_text((await fleet.http.get("/.well-known/bakeoff-queue.json")).text)
        assert (await trail.verify("--keys", kept)).code == 0
        tailed = await trail.desk("audit", "tail", "-n", 3, "--action", "test")
        assert len(tailed.out.splitlines()) == 4


def _signed_without_head(fleet: Fleet, receipt: dict[str, Any]) -> dict[str, Any]:
    unsigned = {name: value for name, value in receipt.items()
                if name not in ("audit", "sig", "server_time")}  # fmt: skip
    return fleet.services.receipts._keys.sign(unsigned)


@pytest.mark.gen_test
async def test_a_row_that_goes_before_it_is_chained_is_chained_as_gone(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    async with kept_trail(make_settings(), sigstore, monkeypatch, capsys, tmp_path) as trail:
        await audit.record(trail.fleet.pool, SYSTEM, "test", None, number=99)
        await trail.change("DELETE FROM audit WHERE detail = '{\"number\": 99}'")
        await chained(trail.fleet)
        done = await trail.verify()
        assert (done.code, "is gone" in done.err[1]) == (1, True)


@pytest.mark.gen_test
async def test_a_database_that_is_away_stops_no_chain(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_chain, "INTERVAL_S", 0.01)
    async with open_fleet(make_settings(), sigstore) as fleet:
        broken = asyncio.Event()
        look = AuditChain.look

        async def fail_once(self: AuditChain) -> bool:
            if not broken.is_set():
                broken.set()
                raise asyncpg.ConnectionDoesNotExistError("away")
            return await look(self)

        monkeypatch.setattr(AuditChain, "look", fail_once)
        await fleet.sign_on()
        await broken.wait()
        async with asyncio.timeout(10):
            while await fleet.pool.fetchval("SELECT count(*) FROM audit_chain") == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
