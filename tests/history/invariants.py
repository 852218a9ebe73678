"""What was recorded, and what must hold of it: `recorder.sql` and `invariants.sql`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from uuid import UUID

import asyncpg

HERE = Path(__file__).parent
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
# These hold once a storm has settled; the others at every instant.
AT_REST = {"every_run_is_terminal"}
EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer that reached its sender: a row of client_log."""

    verb: str
    runner_id: str
    fingerprint: str
    request: str
    sent_at: datetime
    received_at: datetime
    status: int
    code: str | None = None
    claim_key: str | None = None
    run_id: UUID | None = None
    lease_id: UUID | None = None
    result_sha256: str | None = None
    receipt_sha256: str | None = None
    receipt_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Sent:
    """A request about a lease, answered or not: a row of client_sent."""

    verb: str
    runner_id: str
    lease_id: UUID
    result_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken, how often, and the first rows that show it."""

    invariant: str
    count: int
    evidence: tuple[str, ...]


def load() -> dict[str, str]:
    """Return the invariants' queries by name."""
    _, *parts = _NAME.split((HERE / "invariants.sql").read_text())
    return dict(zip(parts[::2], (body.strip() for body in parts[1::2]), strict=True))


async def install(connection: asyncpg.Connection) -> None:
    """Let a migrated database record its runs' transitions."""
    await connection.execute((HERE / "recorder.sql").read_text())


async def store_clients(
    connection: asyncpg.Connection, seen: Iterable[Seen], sent: Iterable[Sent]
) -> None:
    """Write what clients saw, and what they sent, beside the history."""
    names = [field.name for field in fields(Seen)]
    rows = [astuple(each) for each in seen]
    await connection.copy_records_to_table("client_log", records=rows, columns=names)
    await connection.copy_records_to_table("client_sent", records=[astuple(x) for x in sent])


async def store_faults(
    connection: asyncpg.Connection, faults: Sequence[tuple[str, datetime]]
) -> None:
    """Write when the faults came that some invariants must know of."""
    await connection.copy_records_to_table("fault_log", records=faults)


async def check(
    connection: asyncpg.Connection, *, max_leases: int, at_rest: bool
) -> list[Violation]:
    """Return what the records break. `max_leases`: the limit of keys without one of their own."""
    found = []
    for name, query in load().items():
        if name in AT_REST and not at_rest:
            continue
        rows = await connection.fetch(query, *([max_leases] if "$1" in query else []))
        if rows:
            evidence = tuple(
                ", ".join(f"{key}={value}" for key, value in row.items()) for row in rows[:EXAMPLES]
            )
            found.append(Violation(name, len(rows), evidence))
    return found
