"""`bakeoff-queue db`: migrations of the settings' database."""

import typer

from cli.output import AsJson, CommandFailed, ExitCode, note, print_json
from cli.settings import in_database, read_settings

app = typer.Typer(help="The database: migrate it, or see whether it is.", no_args_is_help=True)


@app.command()
def migrate() -> None:
    """Bring the database to the newest version; it may hold bakeoff's tables already."""
    from db.migrate import migrate as migrate_database
    from db.migrate import newest_version
    from db.pool import DatabaseUnready

    settings = read_settings()
    try:
        printed = migrate_database(settings.database_url.get_secret_value())
    except DatabaseUnready as error:
        raise CommandFailed(str(error), code=ExitCode.UNREACHABLE) from None
    for line in printed.splitlines():
        note(line)
    note(f"the database is at version {newest_version()}")


@app.command()
def status() -> None:
    """List the migrations, applied and pending."""
    from db.migrate import run_dbmate
    from db.pool import DatabaseUnready

    settings = read_settings()
    try:
        print(run_dbmate(settings.database_url.get_secret_value(), "status"), end="")
    except DatabaseUnready as error:
        raise CommandFailed(str(error), code=ExitCode.UNREACHABLE) from None


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Exit 0 if the database has every migration this version needs, 1 with the fix if not."""
    from db.migrate import newest_version
    from db.pool import check_migrated

    newest = newest_version()
    in_database(lambda pool: check_migrated(pool, newest))
    print_json({"version": newest}) if as_json else print(f"at version {newest}")
