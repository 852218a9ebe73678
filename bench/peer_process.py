"""A queue at its own speed, in a process of its own: no HTTP, the library called as its docs say.

    python -m bench.peer_process procrastinate|pgqueuer DSN seed JOBS
    python -m bench.peer_process procrastinate|pgqueuer|broker DSN fetch WORKERS SECONDS

`broker` is our own without HTTP and credentials: `Claims.claim`, each time for another of the
runners that have signed on; it takes the settings of the environment. The last line of `fetch` is
JSON: jobs fetched, and the seconds it took.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg

from bench.support.seeding import JOB, OFFER
from config.logging import configure_logging
from config.settings import load_settings
from db.run_queue import Claimant
from server import open_services

SLICE = 20_000
Fetch = Callable[[int], Awaitable[bool]]


@asynccontextmanager
async def procrastinate_fetch(dsn: str, workers: int) -> AsyncIterator[Fetch]:
    """Yield `JobManager.fetch_job` for a worker's number, over one connection per worker."""
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=dsn, min_size=workers, max_size=workers))
    async with app.open_async():
        ids = [await app.job_manager.register_worker() for _ in range(workers)]

        async def fetch(number: int) -> bool:
            return await app.job_manager.fetch_job(None, ids[number]) is not None

        yield fetch


async def seed_procrastinate(dsn: str, jobs: int) -> None:
    """Install its schema and defer jobs."""
    from procrastinate import App, PsycopgConnector

    app = App(connector=PsycopgConnector(conninfo=dsn))
    task = app.task(name="run", pass_context=False)(_never)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for begin in range(0, jobs, SLICE):
            entries: list[Any] = [{"job": JOB}] * min(SLICE, jobs - begin)
            await task.batch_defer_async(*entries)


@asynccontextmanager
async def pgqueuer_fetch(dsn: str, workers: int) -> AsyncIterator[Fetch]:
    """Yield `Queries.dequeue(batch_size=1)`, over a pool with a connection per worker."""
    from pgqueuer.db import AsyncpgPoolDriver
    from pgqueuer.queries import EntrypointExecutionParameter, Queries
    from pgqueuer.types import QueueEntrypoint, QueueManagerId

    async with asyncpg.create_pool(dsn, min_size=workers, max_size=workers) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))
        wanted = {QueueEntrypoint("run"): EntrypointExecutionParameter(0)}
        managers = [QueueManagerId(uuid4()) for _ in range(workers)]

        async def fetch(number: int) -> bool:
            jobs = await queries.dequeue(
                batch_size=1,
                entrypoints=wanted,
                queue_manager_id=managers[number],
                global_concurrency_limit=None,
                heartbeat_timeout=timedelta(seconds=300),
            )
            return bool(jobs)

        yield fetch


async def seed_pgqueuer(dsn: str, jobs: int) -> None:
    """Install its schema and enqueue jobs."""
    from pgqueuer.db import AsyncpgPoolDriver
    from pgqueuer.queries import Queries

    payload: bytes | None = json.dumps(JOB).encode()
    async with asyncpg.create_pool(dsn, min_size=1, max_size=1, command_timeout=120) as pool:
        queries = Queries(AsyncpgPoolDriver(pool))
        await queries.install()
        for begin in range(0, jobs, SLICE):
            count = min(SLICE, jobs - begin)
            await queries.enqueue(["run"] * count, [payload] * count, [0] * count)


@asynccontextmanager
async def broker_fetch(dsn: str, _workers: int) -> AsyncIterator[Fetch]:
    """Yield `Claims.claim`, as the HTTP handler calls it, for one runner after the other."""
    settings = load_settings()
    configure_logging("error", "json")
    async with open_services(settings) as services:
        connection = await asyncpg.connect(dsn)
        runners = iter(await connection.fetch("SELECT runner_id, fingerprint FROM runner_keys"))
        await connection.close()

        async def fetch(_number: int) -> bool:
            runner = next(runners)
            claimant = Claimant(
                runner["runner_id"],
                runner["fingerprint"],
                uuid4(),
                uuid4(),
                str(uuid4()),
                "digest",
                OFFER,
            )
            return await services.claims.claim(claimant, 0) is not None

        yield fetch


FETCH = {"procrastinate": procrastinate_fetch, "pgqueuer": pgqueuer_fetch, "broker": broker_fetch}
SEED = {"procrastinate": seed_procrastinate, "pgqueuer": seed_pgqueuer}


async def seed(name: str, dsn: str, jobs: int) -> None:
    """Fill a peer's queue, and give its planner the statistics."""
    await SEED[name](dsn, jobs)
    connection = await asyncpg.connect(dsn)
    await connection.execute("VACUUM (ANALYZE)", timeout=120)
    await connection.close()


async def fetch_all(name: str, dsn: str, workers: int, seconds: float) -> dict[str, float]:
    """Let the workers fetch for so long, each one job after the other."""
    async with FETCH[name](dsn, workers) as fetch:
        fetched = 0

        async def work(number: int, until: float) -> None:
            nonlocal fetched
            while time.perf_counter() < until:
                if not await fetch(number):
                    raise RuntimeError(f"{name}: the queue ran empty")
                fetched += 1

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(work(number, began + seconds))
        return {"jobs": fetched, "seconds": time.perf_counter() - began}


async def _never(job: object) -> None:
    """A job's task: nothing here runs one."""


def main() -> None:
    """Seed or fetch."""
    # It warns of an App made in the main module, where workers could not find its tasks.
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    name, dsn, verb, *numbers = sys.argv[1:]
    if verb == "seed":
        asyncio.run(seed(name, dsn, int(numbers[0])))
    else:
        print(json.dumps(asyncio.run(fetch_all(name, dsn, int(numbers[0]), float(numbers[1])))))


if __name__ == "__main__":
    main()
