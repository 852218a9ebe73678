"""`bakeoff-queue serve` and `healthcheck`: one process from the settings, and is it up?"""

import httpx

from cli.settings import read_settings
from client.output import CommandFailed, ExitCode

HEALTH_TIMEOUT_S = 5


def serve() -> None:
    """Serve from the settings until SIGTERM or Ctrl-C, then finish what is in flight."""
    import asyncio

    import server
    from auth.errors import PolicyRefused
    from config.logging import configure_logging
    from db.pool import DatabaseUnready, NotMigrated

    settings = read_settings()
    configure_logging(settings.log_level, settings.log_format)
    try:
        asyncio.run(server.serve(settings))
    except (server.ServerRefused, server.ServerLost, PolicyRefused, NotMigrated) as error:
        raise CommandFailed(str(error)) from None
    except DatabaseUnready as error:
        raise CommandFailed(str(error), code=ExitCode.UNREACHABLE) from None


def healthcheck() -> None:
    """Ask the process on this machine whether it answers; for Docker's HEALTHCHECK."""
    url = f"{read_settings().local_url}/healthz"
    try:
        httpx.get(url, timeout=HEALTH_TIMEOUT_S, trust_env=False).raise_for_status()
    except httpx.HTTPError as error:
        raise CommandFailed(
            f"{url} does not answer: {error}; is `bakeoff-queue serve` running?",
            code=ExitCode.UNREACHABLE,
        ) from None
