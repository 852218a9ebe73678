"""`bakeoff-queue doctor`: a line for each thing that the service stands on, with its fix."""

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

from cli.settings import read_settings
from client.output import AsJson, CommandFailed, print_json, print_table

if TYPE_CHECKING:
    from broker.doctor import Finding

COLUMNS = ("check", "state", "detail", "what to do")


def doctor(as_json: AsJson = False) -> None:
    """Check settings, PostgreSQL, Redis, trust root, secrets and addresses; exit 1 for a failure.

    It works from the settings, beside the server: run it where `serve` runs.
    """
    from broker.doctor import worst

    findings = asyncio.run(_examine())
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        print_table(COLUMNS, ((f.check, f.state, f.detail, f.fix) for f in findings))
    if worst(findings) == "failure":
        failed = sum(finding.state == "failure" for finding in findings)
        raise CommandFailed(f"{failed} check(s) failed")


async def _examine() -> "list[Finding]":
    from broker.doctor import examine

    return [finding async for finding in examine(read_settings())]
