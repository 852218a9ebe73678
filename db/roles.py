"""Roles of the database: owner, service and reader. The service can change nothing of the audit."""

import asyncpg

from db.pool import LOST, DatabaseUnready, Executor, describe
from db.queries import load

SQL = load("roles")
OWNER, SERVICE, READER = "bakeoff_queue_owner", "bakeoff_queue_service", "bakeoff_queue_reader"


async def make(dsn: str) -> None:
    """Make the roles and give them their rights; again to renew them. Raises DatabaseUnready."""
    try:
        connection = await asyncpg.connect(dsn, timeout=10)
    except (*LOST, ValueError) as error:
        raise DatabaseUnready(f"roles: {describe(error)}") from None
    try:
        async with connection.transaction():
            await connection.execute(SQL["make"])
            await _give(connection)
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseUnready(
            f"roles: {describe(error)}; connect as a superuser, or as the tables' owner with"
            " CREATEROLE"
        ) from None
    finally:
        await connection.close()


async def renew(connection: asyncpg.Connection) -> None:
    """Give the roles what a migration has added, in a database that has them."""
    if await connection.fetchval(SQL["are_made"]):
        async with connection.transaction():
            await _give(connection)


async def can_change_the_audit(pool: Executor) -> bool:
    """Return whether our role may change or remove rows of the audit trail."""
    return bool(await pool.fetchval(SQL["can_change_the_audit"]))


async def _give(connection: asyncpg.Connection) -> None:
    await connection.execute(SQL["give"])
    await connection.execute(SQL["grant"])
