"""The roles of the database: the service does its work, and can change nothing of the audit."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker.admin.archiver import Archiver
from broker.admin.prune import Prune, retentions
from cli.main import main
from config.settings import Settings
from db.migrate import migrate
from db.queries import SQL_FOLDER, load
from db.roles import OWNER, READER, SERVICE, make
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_authorization import ROWS, RUNNER, bearer, staged
from tests.support.fleet import open_fleet, quiet_sweep

MakeSettings = Callable[..., Settings]
_numbers = count(1)


def dsn_of(dsn: str, user: str) -> str:
    """Return the address of a database, for another user."""
    url = urlsplit(dsn)
    host = url.netloc.rpartition("@")[2]
    return urlunsplit(url._replace(netloc=f"{user}@{host}"))


@asynccontextmanager
async def member_of(dsn: str, role: str, options: str = "") -> AsyncIterator[str]:
    """Yield the address of a database for a login of its own that is a member of a role."""
    name = f"member_{next(_numbers)}_{asyncio.get_running_loop().time():.6f}".replace(".", "_")
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"CREATE ROLE {name} LOGIN {options} IN ROLE {role}")
        try:
            yield dsn_of(dsn, name)
        finally:
            await connection.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
    finally:
        await connection.close()


async def refused(dsn: str, statement: str) -> bool:
    """Return whether a statement is refused for want of a right."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError:
        return True
    finally:
        await connection.close()
    return False


@pytest.mark.gen_test(timeout=120)
async def test_the_service_does_all_its_work_as_its_role(
    database: str,
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every address of the authorization matrix that writes, and the loops behind them."""
    quiet_sweep(monkeypatch)
    await make(database)
    async with member_of(database, SERVICE) as dsn:
        settings = make_settings(database_url=SecretStr(dsn), archive_after_s=3600)
        async with staged(settings, sigstore) as scene:
            for (method, path), row in ROWS.items():
                by = bearer("an admin's", scene.fleet.admin_token)
                if row.needs == RUNNER:
                    await scene.renew()
                    by = bearer("a runner's", scene.runner.token)
                answer = await scene.send(method, path, by)
                assert answer.status_code < 500, (method, path, answer.text)
            await scene.renew()
            await scene.fleet.overdue(scene.job["run_id"])
            assert await scene.fleet.sweep() == 1
            await scene.fleet.pool.execute(
                "UPDATE run_queue SET completed_at = completed_at - interval '1 day'"
            )
            assert await Archiver(scene.fleet.pool, settings).run_once() > 0
            for kind in retentions(settings):
                await Prune(scene.fleet.pool).delete(kind, lambda _: None)


@pytest.mark.gen_test
async def test_no_statement_of_ours_lacks_a_right(database: str) -> None:
    await make(database)
    lacking = []
    async with member_of(database, SERVICE) as dsn:
        connection = await asyncpg.connect(dsn)
        try:
            for file in sorted(SQL_FOLDER.glob("*.sql")):
                owners = file.stem in ("roles", "migrations")
                statements = () if owners else load(file.stem).items()
                for name, statement in statements:
                    if await _lacks(connection, statement):
                        lacking.append(f"{file.stem}:{name}")
        finally:
            await connection.close()
    assert lacking == []


async def _lacks(connection: asyncpg.Connection, statement: str) -> bool:
    """Run a statement with nothing in its parameters, and roll it back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        prepared = await connection.prepare(statement)
        await prepared.fetch(*[None] * len(prepared.get_parameters()))
    except asyncpg.InsufficientPrivilegeError:
        return True
    except asyncpg.PostgresError:  # it is about the values
        return False
    finally:
        await transaction.rollback()
    return False


@pytest.mark.gen_test
async def test_the_service_changes_and_removes_nothing_of_the_audit_and_the_bundles(
    database: str,
) -> None:
    await make(database)
    async with member_of(database, SERVICE) as dsn:
        for table, column in (("audit", "actor"), ("audit_chain", "hash"),
                              ("submission_files", "name")):  # fmt: skip
            for statement in (
                f"UPDATE {table} SET {column} = {column}",
                f"DELETE FROM {table}",
                f"TRUNCATE {table}",
                f"DROP TABLE {table}",
                f"ALTER TABLE {table} DISABLE TRIGGER ALL",
                f"SELECT * FROM {table} FOR UPDATE",
            ):
                assert await refused(dsn, statement), statement
            assert not await refused(dsn, f"SELECT * FROM {table}")
        for statement in (
            f"SET ROLE {OWNER}",
            f"GRANT {OWNER} TO {SERVICE}",
            "CREATE TABLE mine (i int)",
            "UPDATE schema_migrations SET version = version",
            "TRUNCATE run_queue",
        ):
            assert await refused(dsn, statement), statement


@pytest.mark.gen_test
async def test_a_reader_reads_all_but_secrets_and_writes_nothing(database: str) -> None:
    await make(database)
    async with member_of(database, READER) as dsn:
        for secret in (
            "SELECT lease_id FROM run_queue",
            "SELECT * FROM attempts",
            "SELECT * FROM every_run",
            "SELECT * FROM admin_tokens",
            "SELECT * FROM ring_keys",
            "SELECT * FROM registration_nonces",
            "SELECT claim_key FROM run_archive",
            "UPDATE runs SET run_status = run_status",
            "INSERT INTO audit (actor, action) VALUES ('admin:else', 'x')",
            "DELETE FROM runs",
        ):
            assert await refused(dsn, secret), secret
        for told in (
            "SELECT run_id, status, claimed_by FROM run_queue",
            "SELECT runner_id, how FROM attempts",
            "SELECT * FROM audit JOIN audit_chain USING (audit_id)",
            "SELECT * FROM accepted_results",
            "SELECT * FROM run_model_metrics",
            "SELECT * FROM runner_keys",
        ):
            assert not await refused(dsn, told), told


@pytest.mark.gen_test
async def test_serve_warns_when_its_role_could_change_the_audit(
    database: str, make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    await make(database)
    async with member_of(database, SERVICE) as dsn:
        for address, warned in ((database, 1), (dsn, 0)):
            settings = make_settings(database_url=SecretStr(address))
            async with open_fleet(settings, sigstore) as fleet:
                with capture_logs() as logs:
                    await fleet.services.audit.check_role()
            told = [line for line in logs if line["event"] == "audit.can_be_changed"]
            assert len(told) == warned
            assert all(SERVICE in line["fix"] for line in told)


@pytest.mark.gen_test
async def test_an_owner_who_is_no_superuser_makes_the_roles_goes_on_and_migrates(
    empty_database: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with member_of(empty_database, "pg_monitor", "CREATEROLE") as owner:
        connection = await asyncpg.connect(empty_database)
        name = urlsplit(owner).username
        for role in (OWNER, SERVICE, READER):  # by this login, where it is the first one
            exists = await connection.fetchval("SELECT to_regrole($1) IS NOT NULL", role)
            if exists:
                await connection.execute(f"GRANT {role} TO {name} WITH ADMIN OPTION")
        await connection.execute(f"GRANT ALL ON SCHEMA public TO {name} WITH GRANT OPTION")
        await connection.close()
        await asyncio.to_thread(migrate, owner)
        monkeypatch.setenv("BAKEOFF_QUEUE_DATABASE_URL", owner)
        assert await asyncio.to_thread(main, ["db", "roles"]) == 6
        assert await asyncio.to_thread(main, ["db", "roles", "--yes"]) == 0
        assert SERVICE in capsys.readouterr().err
        await make(owner)  # again: nothing changes
        connection = await asyncpg.connect(owner)
        tables = "SELECT tableowner FROM pg_tables WHERE schemaname = 'public'"
        assert {row["tableowner"] for row in await connection.fetch(tables)} == {OWNER}
        await connection.execute("ALTER TABLE runs ADD COLUMN theirs text")
        await connection.execute("CREATE TABLE added_later (i int)")
        await connection.close()
        await asyncio.to_thread(migrate, owner)
        async with member_of(empty_database, SERVICE) as dsn:
            assert not await refused(dsn, "INSERT INTO added_later VALUES (1)")
            assert await refused(dsn, "DELETE FROM added_later")
    plain = dsn_of(empty_database, "nobody_there")
    monkeypatch.setenv("BAKEOFF_QUEUE_DATABASE_URL", plain)
    assert await asyncio.to_thread(main, ["db", "roles", "--yes"]) == 1
