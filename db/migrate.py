"""Migrations: dbmate over `db/migrations`, which also adopts a database bakeoff made earlier."""

import asyncio
import subprocess
import sys
from pathlib import Path

import asyncpg

from db.pool import LOST, DatabaseUnready, describe

MIGRATIONS = Path(__file__).with_name("migrations")


def newest_version() -> str:
    """Return the version of the newest migration that this code expects."""
    return max(path.name.partition("_")[0] for path in MIGRATIONS.glob("*.sql"))


def run_dbmate(dsn: str, *command: str) -> str:
    """Run one dbmate command against `dsn` and return what it printed.

    Raises DatabaseUnready with dbmate's last line when it fails.
    """
    # The wheel puts the program beside the interpreter.
    program = Path(sys.executable).with_name("dbmate")
    done = subprocess.run(
        [program, "--env-file", "", "--url", with_sslmode(dsn), "--migrations-dir", MIGRATIONS,
         "--no-dump-schema", "--migrations-table", "schema_migrations", *command],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["dbmate failed"]
        raise DatabaseUnready(f"migrations: {lines[-1]}")
    return done.stdout


def with_sslmode(dsn: str) -> str:
    """Return `dsn` with libpq's default `sslmode=prefer` spelled as dbmate's driver takes it.

    Go's driver insists on TLS where libpq only prefers it; a DSN that says what it wants is kept.
    """
    if "sslmode=" in dsn:
        return dsn
    return f"{dsn}{'&' if '?' in dsn else '?'}sslmode=prefer"


def migrate(dsn: str) -> str:
    """Bring the database at `dsn` to the newest version; safe to run from several processes.

    Waits 10 s for the server to come up. Raises DatabaseUnready. Not for use in an event loop.
    """
    run_dbmate(dsn, "--wait-timeout", "10s", "wait")
    return asyncio.run(_migrate(dsn))


async def _migrate(dsn: str) -> str:
    """Run dbmate under a lock of ours, as it has none: of two at once, one would fail."""
    try:
        connection = await asyncpg.connect(dsn, timeout=10)
    except (*LOST, ValueError) as error:
        raise DatabaseUnready(f"migrations: {describe(error)}") from None
    try:
        await connection.execute("SELECT pg_advisory_lock(hashtext('bakeoff_queue.migrate'))")
        return await asyncio.to_thread(run_dbmate, dsn, "migrate")
    finally:
        await connection.close()  # and with it the lock
