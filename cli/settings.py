"""Settings and database for the commands that work beside the server, not through its API.

What is heavy to import is imported when it is needed: `bakeoff-queue queue ls` needs none of it.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from client.output import CommandFailed, ExitCode

if TYPE_CHECKING:
    from broker.audit.log import Admin
    from config.settings import Settings

Result = TypeVar("Result")


def read_settings() -> "Settings":
    """Return the settings. Raises CommandFailed (exit 2) with a line for each thing wrong."""
    from config.settings import SettingsRefused, load_settings

    try:
        return load_settings()
    except SettingsRefused as error:
        first, *others = str(error).splitlines()
        raise CommandFailed(first, code=ExitCode.USAGE, details=others) from None


def in_database(work: Callable[[Any], Awaitable[Result]]) -> Result:
    """Run `work` on a pool of the settings' database. Raises CommandFailed when it is away."""
    import asyncpg

    from db.pool import DatabaseUnready, NotMigrated, describe, open_pool

    dsn = read_settings().database_url.get_secret_value()

    async def run() -> Result:
        async with open_pool(dsn, 1) as pool:
            return await work(pool)

    try:
        return asyncio.run(run())
    except NotMigrated as error:
        raise CommandFailed(str(error)) from None
    except DatabaseUnready as error:
        raise CommandFailed(str(error), code=ExitCode.UNREACHABLE) from None
    except asyncpg.UndefinedTableError:
        raise CommandFailed(
            "the database has not been migrated: run `bakeoff-queue db migrate`"
        ) from None
    except (OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError) as error:
        # Lost in the middle of the work, or (TimeoutError is an OSError) no answer in time.
        raise CommandFailed(
            f"PostgreSQL was lost: {describe(error)}", code=ExitCode.UNREACHABLE
        ) from None


def as_database_admin(work: "Callable[[Any, Admin], Awaitable[Any]]") -> Any:
    """Run `work` on a pool of the settings' database, as whoever may write there.

    Times and ids come back as JSON has them. Raises CommandFailed, also for what `work` refuses.
    """
    from auth import admin_tokens
    from auth.errors import AuthError
    from broker.audit.log import Admin
    from broker.errors import BrokerError
    from db.audit import database_actor

    async def run(pool: Any) -> Any:
        actor = await database_actor(pool)
        return await work(pool, Admin(actor.name, admin_tokens.SCOPES, actor))

    try:
        return _plain(in_database(run))
    except (BrokerError, AuthError) as error:
        codes = {"NotFound": ExitCode.NOT_FOUND, "Conflict": ExitCode.CONFLICT}
        code = codes.get(type(error).__name__, ExitCode.FAILURE)
        raise CommandFailed(str(error), code=code) from None


def _plain(value: Any) -> Any:
    """Return what JSON has for times and ids, wherever they are."""
    if isinstance(value, dict):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value
