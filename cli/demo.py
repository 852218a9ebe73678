"""`bakeoff-queue demo`: watch the whole thing work, on private services, and clean up."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cli.settings import read_settings
from client.output import CommandFailed, note


def demo() -> None:
    """Watch runs go from PENDING to COMPLETE on private servers; leaves nothing behind."""
    from sandbox.demo.demo import run_demo
    from sandbox.demo.report import print_report
    from sandbox.demo.view import open_view
    from sandbox.services.stopping import Stopped, stoppable

    settings = read_settings()
    try:
        with in_one_line(), stoppable():
            with open_view() as view:
                report = run_demo(settings, view)
            print_report(report)
            print(json.dumps(report.summary), flush=True)
    except Stopped as stop:
        note(f"demo stopped ({stop}): nothing is left running")
        raise typer.Exit(stop.exit_code) from None
    if report.problem:
        raise CommandFailed(f"the demo did not go as it should: {report.problem}")


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turn what keeps private services from starting into a CommandFailed."""
    from db.pool import DatabaseUnready
    from sandbox.services.process_supervisor import SandboxError

    try:
        yield
    except (SandboxError, DatabaseUnready) as error:
        line, *details = str(error).splitlines()
        raise CommandFailed(line, details=details) from None
