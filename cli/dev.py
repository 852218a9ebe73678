"""`bakeoff-queue dev`: the demo's services, staying up to be played with."""

from pathlib import Path
from typing import Annotated

import typer

from cli.demo import in_one_line
from cli.settings import read_settings
from client.output import note


def dev(
    data: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Keep the data here, over restarts.", metavar="DIR"),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8400,
) -> None:
    """Serve from private servers until Ctrl-C; prints the URL, an admin token and a curl line."""
    from sandbox.demo.dev import run_dev
    from sandbox.services.stopping import Stopped, stoppable

    settings = read_settings()
    try:
        with in_one_line(), stoppable():
            run_dev(settings, data, port)
    except Stopped:
        note(f"stopped; the data are in {data}" if data else "stopped; nothing is left")
