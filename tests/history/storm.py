"""One storm, from an empty database to its verdict.

The way of a storm: a database of its own with the recorder in it; servers, runners, an admin and
faults until the time is over (or a mutant has shown itself); then calm: faults heal, nobody plays
tricks, and what is left must become terminal; then the invariants, in SQL.
"""

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import redis.asyncio

from db.pool import LOST, open_pool
from sandbox.services import servers
from sandbox.services.admin_token import new_token
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.history import invariants, server_logs
from tests.history.admins import Admin
from tests.history.faults import Faults
from tests.history.invariants import Violation
from tests.history.network import Network
from tests.history.plans import SETTINGS, Plan
from tests.history.runners import SIGNER, Runner
from tests.history.server_group import ServerGroup

LOOK_S = 1.0
PROGRESS_S = 5.0
# Replayed, it would only cost time: the same entry is answered with the row that is there.
UNREPLAYED = ("admit", "enqueue")
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class World:
    """What storms share: private servers, a Sigstore, and a folder that is gone at the end."""

    postgres: servers.Postgres
    redis: servers.Redis
    sigstore: ThrowawaySigstore
    scratch: Path


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a storm came to."""

    runs: int
    states: Counter[str]
    faults: Counter[str]
    deaths: Counter[str]
    violations: list[Violation]
    seconds: float
    lapse_lags_s: tuple[float, ...]
    starts_s: list[float]
    errors: str


class Storm:
    """A storm under way."""

    def __init__(self, world: World, plan: Plan, seed: str, tell: Tell) -> None:
        self._world = world
        self._plan = plan
        self._seed = seed
        self._tell = tell
        self._database = f"storm {seed}"
        self._dsn = world.postgres.database_dsn(self._database)
        self._calm = asyncio.Event()
        self._states: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        # The kill mode ends by its count of deaths, not by the clock.
        self.enough: Callable[[ServerGroup], bool] | None = None
        self.armed: Callable[[random.Random], list[str]] | None = None

    def rng(self, who: str) -> random.Random:
        """The randomness of one actor."""
        return random.Random(f"{self._seed}/{who}")  # noqa: S311 (repeatable on purpose)

    async def run(self) -> Verdict:
        """Storm, settle, judge."""
        token = await self._prepare()
        if self._plan.redis_gone:
            await asyncio.to_thread(self._world.redis.kill)
        try:
            return await self._run(token)
        finally:
            if self._plan.redis_gone:
                await asyncio.to_thread(self._world.redis.restart)

    async def _run(self, token: str) -> Verdict:
        with tempfile.TemporaryDirectory(dir=self._world.scratch) as folder:
            group = self._group(Path(folder))
            faults = self._faults(group)
            self._struck = faults.struck
            network = Network(lambda: [slot.port for slot in group.slots], self._counts)
            people = self._people(network, token)
            async with group.open(self._plan.servers):
                async with self._at_work(people, network):
                    await self._storm(faults, group, network)
                    await self._settle(group)
                await network.settle()
            return await self._judge(people, network, faults, group)

    def _group(self, folder: Path) -> ServerGroup:
        signers = folder / "signers.yaml"
        signers.write_text(
            "schema_version: bakeoff-results-signers/v1\ntrusted_identities:\n"
            f"- {{identity: {SIGNER.email}, issuer: {SIGNER.issuer}}}\n"
        )
        settings = {
            **SETTINGS,
            "database_url": self._dsn,
            "redis_lease_url": self._world.redis.url(1),
            "redis_token_url": self._world.redis.url(2),
            "trusted_root": str(self._world.sigstore.trusted_root),
            "signers_file": str(signers),
            "max_leases": self._plan.max_leases,
            "retry_backoff_s": self.rng("settings").choice((0, 1)),
        }
        rng = self.rng("servers")
        group = ServerGroup(
            folder,
            settings,
            mutant=self._plan.mutant,
            struck=lambda point, stall_s: self._struck(point, stall_s),
            rng=rng,
            restart_s=self._plan.restart_s,
        )
        if self.armed is not None:
            armed, points = self.armed, self.rng("points")
            group.armed = lambda: [] if self._calm.is_set() else armed(points)
        return group

    def _faults(self, group: ServerGroup) -> Faults:
        world = self._world
        return Faults(
            self._plan, self.rng("faults"), group, world.postgres, world.redis, self._dsn,
            self._counts,
        )  # fmt: skip

    def _people(self, network: Network, token: str) -> Admin:
        admin = Admin(
            token, self.rng("admin"), self._plan, network, self._calm,
            pending=lambda: self._states["PENDING"],
        )  # fmt: skip
        twos = round(self._plan.two_leases * self._plan.runners)
        for number in range(self._plan.runners):
            name = f"runner-{number}"
            runner = Runner(
                name, self.rng(name), self._plan, network, self._world.sigstore, admin.admit,
                self._calm, leases=2 if number < twos else 1,
            )  # fmt: skip
            admin.runners.append(runner)
        return admin

    @asynccontextmanager
    async def _at_work(self, admin: Admin, network: Network) -> AsyncIterator[None]:
        """Let everybody live; an actor that fails ends the storm."""
        async with asyncio.TaskGroup() as group:
            lives = [runner.live() for runner in admin.runners]
            lives += [admin.live(), self._replay(network), self._watch()]
            tasks = [group.create_task(life) for life in lives]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()

    async def _storm(self, faults: Faults, group: ServerGroup, network: Network) -> None:
        injecting = asyncio.create_task(faults.live(self._calm))
        try:
            until = time.monotonic() + self._plan.seconds
            while time.monotonic() < until and not await self._is_enough(group, network):
                await asyncio.sleep(LOOK_S if self.enough is None else 0.1)
                if injecting.done():
                    await injecting
            self._calm.set()
            await injecting
        finally:
            self._calm.set()
            injecting.cancel()
            await asyncio.wait([injecting])

    async def _is_enough(self, group: ServerGroup, network: Network) -> bool:
        """A mutant's storm ends when the mutant was caught; the kill mode's, by its count."""
        if self.enough is not None:
            return self.enough(group)
        if self._plan.mutant is None:
            return False
        found = {violation.invariant for violation in await self._violations(network)}
        return bool(found & set(self._plan.expected))

    async def _violations(self, network: Network) -> list[Violation]:
        """Look at a storm under way, in a transaction that leaves no trace."""
        with contextlib.suppress(*LOST):
            async with self._connected() as connection:
                transaction = connection.transaction()
                await transaction.start()
                await invariants.store_clients(connection, network.seen, network.about_leases)
                found = await invariants.check(
                    connection, max_leases=self._plan.max_leases, at_rest=False
                )
                await transaction.rollback()
                return found
        return []

    async def _settle(self, group: ServerGroup) -> None:
        """Wait until every run is terminal, at most as long as the plan allows."""
        if self._plan.mutant is not None:
            return
        await group.ready()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._plan.settle_s):
                while not await self._is_settled():  # noqa: ASYNC110 (it is a query)
                    await asyncio.sleep(0.2)

    async def _is_settled(self) -> bool:
        with contextlib.suppress(*LOST):
            await self._count()
            return not sum(self._states[s] for s in ("PENDING", "CLAIMED", "IN_PROGRESS"))
        return False

    async def _replay(self, network: Network) -> None:
        """Send old bytes again, until it is calm."""
        rng = self.rng("replay")
        while not self._calm.is_set():
            await asyncio.sleep(rng.uniform(*self._plan.replay_every_s))
            old = [request for request in network.sent if request.verb not in UNREPLAYED]
            if old:
                await network.replay(rng.choice(old), rng)

    async def _watch(self) -> None:
        """Count the runs, for the admin and for whoever looks on."""
        told = time.monotonic()
        while True:
            with contextlib.suppress(*LOST):
                await self._count()
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self._tell(self._progress())
            await asyncio.sleep(0.25)

    def _progress(self) -> str:
        states = " ".join(f"{state}={n}" for state, n in sorted(self._states.items()))
        phase = "calm" if self._calm.is_set() else "storm"
        seconds = time.monotonic() - self._started
        return f"{seconds:5.0f} s {phase}  {states}  faults={sum(self._counts.values())}"

    async def _count(self) -> None:
        async with self._connected() as connection:
            rows = await connection.fetch(
                "SELECT status, count(*) AS n FROM run_queue WHERE job IS NOT NULL GROUP BY status"
            )
        self._states = Counter({row["status"]: row["n"] for row in rows})

    async def _prepare(self) -> str:
        """Make the storm's database and return its admin's token."""
        async with redis.asyncio.from_url(self._world.redis.url(0)) as client:
            await client.flushall()
        template = await asyncpg.connect(self._world.postgres.database_dsn("postgres"))
        await template.execute(f'CREATE DATABASE "{self._database}" TEMPLATE bakeoff')
        await template.close()
        async with self._connected() as connection:
            await invariants.install(connection)
        async with open_pool(self._dsn, 1) as pool:
            return await new_token(pool, "storm")

    async def _judge(
        self, people: Admin, network: Network, faults: Faults, group: ServerGroup
    ) -> Verdict:
        async with self._connected() as connection:
            await invariants.store_clients(connection, network.seen, network.about_leases)
            await invariants.store_faults(connection, faults.log)
            violations = await invariants.check(
                connection,
                max_leases=self._plan.max_leases,
                at_rest=self._plan.mutant is None,
            )
            errors = group.errors
            if self._plan.mutant is None:
                violations += server_logs.violations(errors)
            runs = await connection.fetch("SELECT FROM run_queue WHERE job IS NOT NULL")
            lags = await connection.fetch(
                "SELECT extract(epoch FROM h.at - h.old_deadline)::float AS lag FROM history AS h"
                " INNER JOIN attempts AS a ON h.run_id = a.run_id AND h.old_seq = a.lease_seq"
                " WHERE a.how = 'lapsed' AND h.old_status IN ('CLAIMED', 'IN_PROGRESS')"
                " AND h.new_status IN ('PENDING', 'FAILED') ORDER BY lag"
            )
        return Verdict(
            len(runs), self._states, self._counts, group.deaths, violations,
            time.monotonic() - self._started, tuple(row["lag"] for row in lags), group.starts_s,
            errors,
        )  # fmt: skip

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection]:
        async with AsyncExitStack() as stack:
            connection = await asyncpg.connect(self._dsn, timeout=3, command_timeout=30)
            stack.push_async_callback(connection.close, timeout=3)
            yield connection
