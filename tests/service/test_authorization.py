"""The authorization matrix: every route and method of the server against every credential.

The table is written by hand and not derived from the handlers: a route or method without a row in
`ROWS` fails, and so does a row without a route. To add an address, add its row: what it needs, a
body that takes effect, and on which run.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from nacl.signing import SigningKey

from auth import admin_tokens
from auth.tokens import Tokens
from config.settings import Settings
from db import admin
from sandbox.runner.identity import public_key_text
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.support.fleet import Fleet, Runner, code_of, open_fleet, quiet_sweep, run_of
from tests.support.raw_http import BOUNDARY, FORM_TYPE, form, head, line_to
from tests.support.routes import METHODS, served

MakeSettings = Callable[..., Settings]
Refusal = tuple[int, str]
ANYBODY, RUNNER = "anybody", "runner"  # or a scope of admin tokens
LEASE_LOST, NOT_FOUND = (409, "lease_lost"), (404, "not_found")
MISSING, INVALID, SCOPE = (401, "missing_token"), (401, "invalid_token"), (403, "scope_required")
LEASE = {"lease_id": "LEASE"}
WHY = {"reason": "matrix"}


@dataclass(frozen=True, slots=True)
class Row:
    """What an address needs, a body that takes effect, and the run that its path names.

    `foreign` is what another runner's token is answered where a path names a run; `open` is what
    everybody is answered where no credential is needed.
    """

    needs: str
    body: Any = None
    on: str = "leased"
    foreign: Refusal | None = None
    open: Refusal | int | None = None


ROWS: dict[tuple[str, str], Row] = {
    **{
        (method, path): Row(ANYBODY, open=status)
        for method, status in {"GET": 200, "HEAD": 200, "OPTIONS": 204}.items()
        for path in (
            "/healthz",
            "/readyz",
            "/metrics",
            "/errors",
            "/api/version",
            "/openapi.yaml",
            "/.well-known/bakeoff-queue.json",
        )
    },
    # Signed by the key that it names: a bearer token means nothing there.
    ("POST", "/api/runners/register"): Row(ANYBODY, {}, open=(422, "invalid_request")),
    ("GET", "/api/runners/me"): Row(RUNNER),
    ("DELETE", "/api/runners/me"): Row(RUNNER),
    ("POST", "/api/queue/claim"): Row(RUNNER, {}),
    ("POST", "/api/queue/heartbeats"): Row(RUNNER, {"heartbeats": [{"run_id": "RUN", **LEASE}]}),
    ("GET", "/api/queue/{run_id}"): Row(RUNNER, foreign=NOT_FOUND),
    ("POST", "/api/queue/{run_id}/heartbeat"): Row(RUNNER, LEASE, foreign=LEASE_LOST),
    ("POST", "/api/queue/{run_id}/submit"): Row(RUNNER, "BUNDLE", foreign=LEASE_LOST),
    ("POST", "/api/queue/{run_id}/release"): Row(RUNNER, {**LEASE, **WHY}, foreign=LEASE_LOST),
    ("POST", "/api/queue/{run_id}/fail"): Row(
        RUNNER, {**LEASE, "failure_code": "oom", "detail": "matrix"}, foreign=LEASE_LOST
    ),
    ("POST", "/api/queue/{run_id}/resume"): Row(RUNNER, {}, foreign=LEASE_LOST),
    ("GET", "/api/admin/runner-keys"): Row("read"),
    ("POST", "/api/admin/runner-keys"): Row("admin", {"public_key": "KEY", "runner_id": "new"}),
    ("DELETE", "/api/admin/runner-keys/{fingerprint}"): Row("admin", WHY),
    ("GET", "/api/admin/runners"): Row("read"),
    ("GET", "/api/admin/runners/{runner_id}"): Row("read"),
    ("POST", "/api/admin/runners/{runner_id}/pause"): Row("operate", WHY),
    ("POST", "/api/admin/runners/{runner_id}/resume"): Row("operate", {}),
    ("POST", "/api/admin/runners/{runner_id}/drain"): Row("operate", {}),
    ("GET", "/api/admin/runners/{runner_id}/tokens"): Row("read"),
    ("DELETE", "/api/admin/runners/{runner_id}/tokens/{jti}"): Row("admin", WHY),
    ("GET", "/api/admin/tokens"): Row("read"),
    ("POST", "/api/admin/tokens"): Row("admin", {"name": "NAME", "scopes": ["admin"]}),
    ("DELETE", "/api/admin/tokens/{token_id}"): Row("admin", WHY),
    ("GET", "/api/admin/audit"): Row("read"),
    ("GET", "/api/admin/audit/chain"): Row("read"),
    ("GET", "/api/admin/queue"): Row("read"),
    ("POST", "/api/admin/queue"): Row("operate", {"runs": ["RUN_OF"]}),
    ("GET", "/api/admin/queue/{run_id}"): Row("read"),
    ("PATCH", "/api/admin/queue/{run_id}"): Row("operate", {"priority": 7}, on="fresh"),
    ("POST", "/api/admin/queue/{run_id}/cancel"): Row("operate", WHY, on="pending"),
    ("POST", "/api/admin/queue/{run_id}/requeue"): Row("operate", WHY, on="cancelled"),
    ("GET", "/api/admin/queue/{run_id}/explain"): Row("read"),
    ("GET", "/api/admin/queue/pauses"): Row("read"),
    ("POST", "/api/admin/queue/pause"): Row("operate", WHY),
    ("POST", "/api/admin/queue/resume"): Row("operate", {}),
    ("POST", "/api/admin/queue/bulk"): Row(
        "operate", {"action": "cancel", "filter": {"text": "in no run"}, "expected": 0, **WHY}
    ),
    ("GET", "/api/admin/refusals"): Row("read"),
    ("GET", "/api/admin/runner-keys/{fingerprint}"): Row("read"),
    ("POST", "/api/admin/queue/requeue"): Row(
        "operate", {"failed_by": "nobody", "within_s": 1, **WHY}
    ),
    ("GET", "/api/admin/model-needs"): Row("read"),
    ("DELETE", "/api/admin/model-needs/{model_id}"): Row("operate", WHY),
    ("GET", "/api/admin/results"): Row("read"),
    ("GET", "/api/admin/results/{run_id}"): Row("read", on="done"),
    ("GET", "/api/admin/results/{run_id}/rows"): Row("read", on="done"),
    ("GET", "/api/admin/results/{run_id}/files/{name}"): Row("read", on="done"),
    ("POST", "/api/admin/results/{run_id}/state"): Row(
        "admin", {"state": "disputed", **WHY}, on="done"
    ),
}


@dataclass(frozen=True, slots=True)
class Credential:
    """Authorization headers: what runners' and admins' addresses say of them, None: welcome."""

    name: str
    sent: tuple[str, ...]
    at_runner: Refusal | None = INVALID
    at_admin: Refusal | None = INVALID
    scopes: frozenset[str] = frozenset()
    foreign: bool = False

    @property
    def headers(self) -> list[tuple[str, str]]:
        """What a request carries."""
        return [("Authorization", value) for value in self.sent]

    def expected(self, row: Row) -> Refusal | int | None:
        """Return what an address answers it; None where it is let in, and takes effect."""
        if row.needs == ANYBODY:
            return row.open
        if row.needs == RUNNER:
            return row.foreign if self.foreign else self.at_runner
        return SCOPE if self.at_admin is None and row.needs not in self.scopes else self.at_admin


def bearer(name: str, token: str, **said: Any) -> Credential:
    """Return the credential of one token."""
    return Credential(name, (f"Bearer {token}",), **said)


@dataclass
class Scene:
    """A server with two runners and something for every address to act on."""

    fleet: Fleet
    runner: Runner
    target: Runner  # of what admins do to runners and keys
    runs: dict[str, str]
    tokens: dict[str, str]  # an admin's token_id, a jti of the target's, and a model_id
    job: dict[str, Any]
    bundle: bytes = b""

    async def renew(self) -> None:
        """Let the runner have a token and a lease that no cell has touched."""
        await self.runner.register()
        await self.fleet.enqueue(priority=1)
        self.job = await self.runner.take()
        self.runs["leased"] = self.job["run_id"]
        lease = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="lease_id"\r\n\r\n'
        files = form(*self.runner.bundle(self.job).items())
        model_id = self.job["model"]["model_id"]
        self.tokens["model_id"] = model_id
        await self.fleet.pool.execute(
            "INSERT INTO learned_needs VALUES ($1, 3, $2, now()) ON CONFLICT DO NOTHING",
            model_id,
            self.job["run_id"],
        )
        self.bundle = lease.encode() + self.job["lease_id"].encode() + b"\r\n" + files

    async def send(self, method: str, path: str, by: Credential) -> httpx.Response:
        """Send a request that takes effect if it is let in."""
        row = ROWS.get((method, path), Row(ANYBODY))
        kind = FORM_TYPE if row.body == "BUNDLE" else "application/json"
        typed = [] if row.body is None else [("Content-Type", kind)]
        return await self.fleet.http.request(
            method, self.at(path, row), headers=[*by.headers, *typed], content=self.body(row)
        )

    def at(self, path: str, row: Row) -> str:
        """Return an address with ids that exist."""
        return path.format(
            run_id=self.runs[row.on],
            name="result.json",
            fingerprint=self.target.fingerprint,
            runner_id=self.target.runner_id,
            **self.tokens,
        )

    def body(self, row: Row) -> bytes | None:
        """Return a body that takes effect."""
        if row.body == "BUNDLE":
            return self.bundle
        return None if row.body is None else self._filled(row.body)

    def _filled(self, body: Any) -> bytes:
        values = {
            '"RUN_OF"': json.dumps(run_of()),
            '"NAME"': json.dumps(f"minted-{uuid4().hex}"),
            '"KEY"': json.dumps(public_key_text(SigningKey(b"m" * 32))),
            '"LEASE"': json.dumps(self.job["lease_id"]),
            '"RUN"': json.dumps(self.job["run_id"]),
        }
        text = json.dumps(body)
        for name, value in values.items():
            text = text.replace(name, value)
        return text.encode()

    async def state(self) -> dict[str, str]:
        """Return a digest of each table, but for what goes on in the background."""
        tables = await self.fleet.pool.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            " AND tablename NOT IN ('audit_chain', 'audit_unchained') ORDER BY tablename"
        )
        found = {}
        for (table,) in tables:
            row = "to_jsonb(t) - '{last_heartbeat,status}'::text[]" if table == "runners" else "t"
            found[table] = await self.fleet.pool.fetchval(
                "SELECT md5(string_agg(x, ',' ORDER BY x))"
                f" FROM (SELECT ({row})::text AS x FROM {table} AS t) AS r"
                " WHERE x NOT LIKE '%audit.head%'"
            )
        return found


@asynccontextmanager
async def staged(settings: Settings, sigstore: ThrowawaySigstore) -> AsyncIterator[Scene]:
    """Yield a scene with a run in every state that an address acts on."""
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=64)
        done = await fleet.enqueue()
        assert (await runner.submit(await runner.take())).status_code == 201
        cancelled = await fleet.enqueue()
        await fleet.cancel(cancelled)
        pending = await fleet.enqueue()
        target = await fleet.sign_on("target")
        fresh = await fleet.enqueue()
        runs = {"done": done, "cancelled": cancelled, "pending": pending, "fresh": fresh}
        wanted = {"name": "to-revoke", "scopes": ["read"]}
        minted = (await fleet.admin("POST", "/tokens", json=wanted)).json()
        given = (await fleet.admin("GET", "/runners/target/tokens")).json()["tokens"]
        tokens = {"token_id": minted["token_id"], "jti": given[0]["jti"]}
        scene = Scene(fleet, runner, target, runs, tokens, {})
        await scene.renew()
        yield scene


async def credentials(scene: Scene) -> list[Credential]:
    """Return every kind of credential: of nobody, of runners, of admins."""
    fleet, runner = scene.fleet, scene.runner
    revoked, gone = await fleet.sign_on("signed-off"), await fleet.sign_on("gone")
    await fleet.http.delete("/api/runners/me", headers=revoked.headers)
    await fleet.revoke(gone)
    settings = fleet.services.settings
    life = timedelta(seconds=settings.token_ttl_s)

    def minted(ring: dict[str, bytes], age: timedelta) -> str:
        at = datetime.now(UTC) - age
        return Tokens(ring, life).mint(runner.runner_id, runner.fingerprint, uuid4(), uuid4(), at)

    other = await fleet.sign_on("other")
    return [
        Credential("none", (), MISSING, MISSING),
        Credential("Basic", ("Basic cnVubmVyOmE=",), MISSING, MISSING),
        Credential("two tokens", (f"Bearer {runner.token}",) * 2, MISSING, MISSING),
        bearer("no token of ours", "x.y.z"),
        bearer("a runner's", runner.token, at_runner=None),
        bearer("another runner's", other.token, at_runner=None, foreign=True),
        bearer("a runner's, expired", minted(settings.token_ring, 2 * life),
               at_runner=(401, "token_expired")),
        bearer("a runner's, by another key", minted({"test": b"x" * 32}, timedelta(0))),
        bearer("a runner's, revoked", revoked.token),
        bearer("a revoked key's", gone.token, at_runner=(403, "key_revoked")),
        *[await _admin(fleet, scope, {scope}) for scope in admin_tokens.SCOPES],
        await _admin(fleet, "all scopes", set(admin_tokens.SCOPES)),
        await _dead_admin(fleet, "expired"),
        await _dead_admin(fleet, "revoked"),
    ]  # fmt: skip


async def _admin(fleet: Fleet, name: str, scopes: set[str]) -> Credential:
    token = await new_token(fleet.pool, name, scopes)
    return bearer(f"an admin's: {name}", token, at_admin=None, scopes=frozenset(scopes))


async def _dead_admin(fleet: Fleet, how: str) -> Credential:
    ended = datetime.now(UTC) - timedelta(seconds=1) if how == "expired" else None
    token = await new_token(fleet.pool, how, expires_at=ended)
    if how == "revoked":
        dead = next(row for row in await admin.list_tokens(fleet.pool) if row["name"] == how)
        await admin.revoke_token(fleet.pool, dead["token_id"], "test", "test")
    return bearer(f"an admin's, {how}", token)


def told(answer: httpx.Response) -> Refusal | int:
    """Return a refusal's status and code, another answer's status."""
    return answer.status_code if answer.is_success else code_of(answer)


@pytest.mark.gen_test
async def test_every_address_has_a_row_and_every_row_an_address(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert set(served(make_app(fleet.services))) == ROWS.keys()


@pytest.mark.gen_test(timeout=120)
async def test_every_credential_gets_what_the_matrix_says_and_a_refused_one_changes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with staged(make_settings(), sigstore) as scene:
        known = await credentials(scene)
        before = await scene.state()
        cells = [
            (method, path, by, expected)
            for (method, path), row in ROWS.items()
            for by in known
            if (expected := by.expected(row)) is not None
        ]
        wrong = [
            (method, path, by.name, said)
            for method, path, by, expected in cells
            if (said := told(await scene.send(method, path, by))) != expected
        ]
        assert wrong == []
        assert await scene.state() == before
        assert len(cells) > 400


@pytest.mark.gen_test(timeout=120)
async def test_a_credential_that_an_address_takes_is_let_in(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with staged(make_settings(), sigstore) as scene:
        wrong = []
        for by in await credentials(scene):
            for (method, path), row in ROWS.items():
                if by.foreign or by.expected(row) is not None:
                    continue
                if row.needs == RUNNER:
                    await scene.renew()
                    by = bearer("a runner's", scene.runner.token, at_runner=None)
                if row.on == "fresh":  # and not cancelled by the credential before
                    scene.runs["fresh"] = await scene.fleet.enqueue(priority=500)
                answer = await scene.send(method, path, by)
                if not answer.is_success:
                    wrong.append((method, path, by.name, answer.text))
        assert wrong == []


@pytest.mark.gen_test(timeout=120)
async def test_a_method_that_an_address_does_not_take_is_405_whoever_asks(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with staged(make_settings(), sigstore) as scene:
        known = await credentials(scene)
        before = await scene.state()
        wrong = []
        for path in {path for _, path in ROWS}:
            taken = {method for method, at in ROWS if at == path}
            for method in set(METHODS) - taken:
                for by in known:
                    answer = await scene.send(method, path, by)
                    allowed = set(answer.headers.get("Allow", "").split(", "))
                    if (answer.status_code, allowed) != (405, taken):
                        wrong.append((method, path, by.name, answer.status_code, allowed))
        assert wrong == []
        assert await scene.state() == before


@pytest.mark.gen_test(timeout=120)
async def test_an_admin_whose_token_is_revoked_while_their_body_arrives_changes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_sweep(monkeypatch)
    async with staged(make_settings(), sigstore) as scene:
        writes = [
            (method, path, row)
            for (method, path), row in ROWS.items()
            if row.needs in admin_tokens.SCOPES and row.body is not None
        ]
        assert len(writes) > 10
        for method, path, row in writes:
            token = await new_token(scene.fleet.pool, "revoked-midway")
            body = scene.body(row) or b""
            start = head(method, scene.at(path, row), f"Authorization: Bearer {token}",
                         "Content-Type: application/json", f"Content-Length: {len(body)}",
                         "Expect: 100-continue")  # fmt: skip
            async with line_to(scene.fleet.url) as line:
                await line.send(start)
                # The credential has been looked at when the server asks for the body.
                go_on = await line.answer()
                assert go_on is not None
                assert go_on.status_code == 100, path
                dead = (await admin.list_tokens(scene.fleet.pool))[-1]
                await admin.revoke_token(scene.fleet.pool, dead["token_id"], "test", "test")
                before = await scene.state()
                await line.send(body)
                answer = await line.answer()
            assert answer is not None
            assert code_of(answer) == INVALID, path
            assert await scene.state() == before, path
