"""`bakeoff-queue db`: migrations of the settings' database."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cli.settings import in_database, read_settings
from client.output import AsJson, CommandFailed, ExitCode, Yes, needs_yes, note, print_json

app = typer.Typer(help="The database: migrate it, or see whether it is.", no_args_is_help=True)

WaitS = Annotated[
    float, typer.Option("--wait-s", min=1, help="How long to wait for locks that others hold.")
]
WorkS = Annotated[float, typer.Option("--work-s", min=1, help="How long one statement may work.")]


@app.command()
def migrate(wait_s: WaitS = 600, work_s: WorkS = 3600) -> None:
    """Bring the database to the newest version; it may hold bakeoff's tables already."""
    from db.migrate import Limits
    from db.migrate import migrate as migrate_database
    from db.migration_files import newest_version

    _told(migrate_database, note, Limits(wait_s, work_s))
    note(f"the database is at version {newest_version()}")


@app.command()
def rollback(yes: Yes = False, wait_s: WaitS = 600, work_s: WorkS = 3600) -> None:
    """Undo the newest migration. What it added is lost, with what was written there since."""
    from db.migrate import Limits, roll_back
    from db.migrate import status as status_of

    applied = [name for name, is_applied in _told(status_of) if is_applied]
    if not applied:
        note("no migration is applied")
        return
    if not yes:
        raise needs_yes(f"undo migration {applied[-1]}, and lose what was written to its tables")
    _told(roll_back, note, Limits(wait_s, work_s))


@app.command()
def status(as_json: AsJson = False) -> None:
    """List the migrations, applied and pending."""
    from db.migrate import status as status_of

    migrations = _told(status_of)
    if as_json:
        print_json({"migrations": [{"name": n, "applied": done} for n, done in migrations]})
        return
    for name, done in migrations:
        print(f"[{'X' if done else ' '}] {name}")
    pending = sum(not done for _, done in migrations)
    print(f"\nApplied: {len(migrations) - pending}\nPending: {pending}")


@app.command()
def roles(yes: Yes = False) -> None:
    """Make the roles owner, service and reader, and give each its rights; again after changes."""
    from db.pool import DatabaseUnready
    from db.roles import OWNER, READER, SERVICE, make

    settings = read_settings()
    if not yes:
        raise needs_yes(f"give the queue's tables to {OWNER}, and rights on them to {SERVICE} and"
                        f" {READER}")  # fmt: skip
    try:
        asyncio.run(make(settings.database_url.get_secret_value()))
    except DatabaseUnready as error:
        raise CommandFailed(str(error)) from None
    note(f"{OWNER} owns the tables: migrate as a member of it")
    note(f"{SERVICE} serves, and can change nothing of the audit trail: serve as a member of it")
    note(f"{READER} reads all but secrets")


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Exit 0 if the database has every migration this version needs, 1 with the fix if not."""
    from db.migration_files import newest_version
    from db.pool import check_migrated

    newest = newest_version()
    in_database(lambda pool: check_migrated(pool, newest))
    print_json({"version": newest}) if as_json else print(f"at version {newest}")


def _told(work: Callable[..., Any], *arguments: Any) -> Any:
    """Work on the settings' database, past a pooler. Raises CommandFailed."""
    from db.migrate import MigrationFailed
    from db.pool import DatabaseUnready

    settings = read_settings()
    dsn = settings.database_listen_url or settings.database_url
    try:
        return work(dsn.get_secret_value(), *arguments)
    except MigrationFailed as error:
        raise CommandFailed(str(error)) from None
    except DatabaseUnready as error:
        raise CommandFailed(str(error), code=ExitCode.UNREACHABLE) from None
