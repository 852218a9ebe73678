"""Old runs for the tests of the archive and of prune."""

import asyncio

import pytest

from broker.admin.archiver import Archiver
from tests.support.fleet import Fleet

DAY_S = 86_400
FILL_LEDGER = """
WITH filler AS (
    INSERT INTO runs (run_id, submitted_at, publisher_id) VALUES (gen_random_uuid(), now(), 'test')
    RETURNING run_id
)
INSERT INTO attempts (run_id, lease_seq, lease_id, runner_id, key_fingerprint, claimed_at, ended_at,
    how)
SELECT f.run_id, n + row_number() OVER (), gen_random_uuid(), r.runner_id, '', now(), now(),
    'released'
FROM filler AS f CROSS JOIN generate_series(1, 3) AS n
CROSS JOIN (SELECT DISTINCT runner_id FROM attempts WHERE run_id = any($1::uuid [])) AS r
"""


def quiet_archiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the servers' own archivers wait for ever: the test says when one runs."""

    async def never(self: Archiver, beat: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Archiver, "run", never)


async def aged(fleet: Fleet, *run_ids: str, seconds: float = 8 * DAY_S) -> None:
    """Let runs have ended so long ago, and their runners have had three leases since."""
    await fleet.pool.execute(FILL_LEDGER, run_ids)
    await fleet.pool.execute(
        "UPDATE run_queue SET completed_at = clock_timestamp() - $2 * interval '1 second'"
        " WHERE run_id = any($1::uuid [])",
        run_ids, seconds,
    )  # fmt: skip


async def archive_once(fleet: Fleet) -> int:
    """Let one pass of an archiver run; return how many runs it moved."""
    return await Archiver(fleet.pool, fleet.services.settings).run_once()


async def archived(fleet: Fleet, *run_ids: str) -> None:
    """Let these runs, which ended, be old and archived."""
    await aged(fleet, *run_ids)
    assert await archive_once(fleet) == len(run_ids)


async def where(fleet: Fleet, run_id: str) -> str:
    """Return `queue`, `archive`, `both` or `nowhere`: where a run's row is."""
    found = [
        name
        for name, table in (("queue", "run_queue"), ("archive", "run_archive"))
        if await fleet.pool.fetchval(f"SELECT count(*) FROM {table} WHERE run_id = $1", run_id)
    ]
    return found[0] if len(found) == 1 else ("both" if found else "nowhere")
