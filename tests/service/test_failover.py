"""Failover: of several PostgreSQL servers the one that takes changes is used, also tomorrow."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg
import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args
from pydantic import SecretStr

from broker.leases import notifications
from config.settings import Settings
from config.urls import check_url, hosts_of, without_hosts
from db import pool as pools
from db.migrate import migrate, status
from db.pool import DatabaseUnready, Primary, ReadOnly, open_pool, replication_risk
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import open_services
from tests.support.fleet import Fleet, Runner, open_fleet
from tests.support.standby import Pair, on, replicated

MakeSettings = Callable[..., Settings]
WRITE = "CREATE TABLE IF NOT EXISTS written (id int)"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary and its standby, migrated through an address that names the standby first."""
    with replicated() as pair:
        migrate(pair.named_in_turn)
        yield pair


async def beat(runner: Runner, job: dict, stop: asyncio.Event, answers: Counter[int]) -> None:
    """Send heartbeats one after the other and count their statuses."""
    while not stop.is_set():
        answers[(await runner.heartbeat(job)).status_code] += 1


async def until_ready(fleet: Fleet, status_code: int) -> str:
    """Wait until /readyz answers so; return what it says of PostgreSQL."""
    async with asyncio.timeout(20):
        while True:
            answer = await fleet.http.get("/readyz")
            if answer.status_code == status_code:
                return answer.json()["postgres"]
            await asyncio.sleep(0.01)


@pytest.mark.gen_test(timeout=120)
async def test_a_failover_that_leaves_sessions_on_the_old_primary_loses_no_lease(
    pair: Pair,
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notifications, "PROVE_EVERY_S", 0.05)
    settings = make_settings(database_url=SecretStr(pair.dsn), claim_recheck_s=1000)
    async with open_fleet(settings, sigstore) as fleet:
        runner, parked = await fleet.sign_on(), await fleet.sign_on("runner-b")
        await fleet.enqueue()
        job = await runner.take()
        stop, answers = asyncio.Event(), Counter[int]()
        beats = asyncio.create_task(beat(runner, job, stop, answers))
        await pair.fail_over()
        await until_ready(fleet, 200)
        stop.set()
        await beats
        assert (await runner.heartbeat(job)).status_code == 200
        assert answers[200] > 0
        assert set(answers) <= {200, 503}
        # Who waits for a run hears of it on the new primary: nothing else would wake this claim.
        claim = asyncio.create_task(parked.claim(wait_s=30))
        async with asyncio.timeout(20):
            while not claim.done():  # there is no signal that it listens there
                await fleet.enqueue()
                await asyncio.sleep(0.1)
        assert (await claim).status_code == 200
        assert (await runner.submit(job)).status_code == 201
    left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'bakeoff-queue'"
    assert await on(pair.first, left) == 0


@pytest.mark.gen_test
async def test_a_database_that_became_read_only_is_not_ready_until_it_takes_changes_again(
    pair: Pair, make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(database_url=SecretStr(pair.dsn)), sigstore) as fleet:
        await until_ready(fleet, 200)
        await pair.fence()
        assert "read-only" in await until_ready(fleet, 503)
        assert (await fleet.http.get("/healthz")).status_code == 200
        await on(pair.first, "ALTER SYSTEM RESET default_transaction_read_only")
        await on(pair.first, "SELECT pg_reload_conf()")
        await until_ready(fleet, 200)


@pytest.mark.gen_test
async def test_a_standby_is_no_database_to_start_on(
    pair: Pair, make_settings: MakeSettings
) -> None:
    settings = make_settings(database_url=SecretStr(pair.second.dsn))
    with pytest.raises(DatabaseUnready, match="every server of the address is read-only"):
        async with open_services(settings):
            pytest.fail("it started")


@pytest.mark.gen_test
async def test_what_an_asynchronous_failover_could_lose_is_told_at_the_start(pair: Pair) -> None:
    async with open_pool(pair.dsn, 1) as pool:
        assert "set synchronous_standby_names" in str(await replication_risk(pool))
    await on(pair.first, "ALTER SYSTEM SET synchronous_standby_names = '*'")
    await on(pair.first, "SELECT pg_reload_conf()")
    async with open_pool(pair.dsn, 1) as pool:
        assert await replication_risk(pool) is None
    await on(pair.first, "ALTER SYSTEM SET synchronous_commit = local")
    await on(pair.first, "SELECT pg_reload_conf()")
    async with open_pool(pair.dsn, 1) as pool:
        assert "synchronous_commit is local" in str(await replication_risk(pool))


def test_every_migration_finds_the_primary(pair: Pair) -> None:
    assert {applied for _, applied in status(pair.dsn)} == {True}
    assert status(pair.named_in_turn) == status(pair.dsn)


@pytest.mark.gen_test
async def test_a_host_that_hangs_leaves_time_for_the_next_which_is_asked_first_from_then_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "HOST_S", 0.5)
    await pair.fail_over()
    primary = Primary(pair.dsn)
    pair.first._leash.ask("pause")
    try:
        for _ in range(2):
            connection = await primary.connect(timeout=5)
            await connection.execute(WRITE)
            connection.terminate()
            # A second wait for the first host would not fit into this.
            monkeypatch.setattr(pools, "HOST_S", 60)
    finally:
        pair.first._leash.ask("resume")


@pytest.mark.gen_test
async def test_of_a_server_that_is_fenced_no_session_is_kept(pair: Pair) -> None:
    async with open_pool(pair.first.dsn, 3) as pool:
        async with pool.acquire() as one, pool.acquire() as two:
            pids = {await each.fetchval("SELECT pg_backend_pid()") for each in (one, two)}
        await pair.fence()
        with pytest.raises(ReadOnly):
            await pool.execute(WRITE)
        assert pool.get_idle_size() <= 1, "the one that has not been asked since"
        await on(pair.first, "ALTER SYSTEM RESET default_transaction_read_only")
        await on(pair.first, "SELECT pg_reload_conf()")
        async with pool.acquire() as one, pool.acquire() as two:
            fresh = {await each.fetchval("SELECT pg_backend_pid()") for each in (one, two)}
    assert not pids & fresh


@pytest.mark.gen_test
async def test_a_session_that_does_not_answer_is_not_kept(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "COMMAND_S", 0.1)
    async with open_pool(database, 1) as pool:
        pid = await pool.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(TimeoutError):
            await pool.fetchval("SELECT pg_sleep(60)")
        assert pool.get_size() == 0
        assert await pool.fetchval("SELECT pg_backend_pid()") != pid


NAMED = {
    "postgres://h/x": [("h", 5432)],
    "postgres://u:p@h:6000/x": [("h", 6000)],
    # No Python's urllib, and so no driver, reads this as it stands since 3.11.4.
    "postgres://u@a,b:6000,[::1]:7000/x": [("a", 5432), ("b", 6000), ("::1", 7000)],
    "postgres://u@[::1]:7000,a/x": [("::1", 7000), ("a", 5432)],
    "postgres://u@[::1],[::2]:7000/x": [("::1", 5432), ("::2", 7000)],
    "postgres://u@[fe80::1%25eth0]/x": [("fe80::1%eth0", 5432)],
    "postgres://u@%2Frun%2Fpg/x": ["/run/pg/.s.PGSQL.5432"],
    "postgres://u@/x?host=/run/a,/run/b&port=6000,7000": [
        "/run/a/.s.PGSQL.6000", "/run/b/.s.PGSQL.7000",
    ],
    "postgres://u@/x?host=/run/a&port=6000": ["/run/a/.s.PGSQL.6000"],
    "postgres://u@/x?host=a,b&port=6000": [("a", 6000), ("b", 6000)],
    "postgres://u@/x?host=%2Frun%2Fa": ["/run/a/.s.PGSQL.5432"],
}  # fmt: skip


@pytest.mark.parametrize("dsn", NAMED)
def test_each_host_is_asked_for_by_itself(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver, which is given the address without its hosts."""
    monkeypatch.delenv("PGPORT", raising=False)
    names = ("host", "port", "user", "password", "passfile", "database", "ssl", "service",
             "servicefile", "direct_tls", "server_settings", "target_session_attrs", "krbsrvname",
             "gsslib")  # fmt: skip
    nothing = dict.fromkeys(names)
    bare = without_hosts(check_url(dsn, "postgres"))

    def read(dsn: str, **given: object) -> tuple[list[Any], Any]:
        return _parse_connect_dsn_and_args(dsn=dsn, **nothing | given)

    reads = [read(bare, host=name, port=port) for name, port in hosts_of(dsn)]
    assert [address for addresses, _ in reads for address in addresses] == NAMED[dsn]
    assert {(parameters.user, parameters.database) for _, parameters in reads} == {
        (reads[0][1].user, "x")
    }
    try:
        whole, _ = read(dsn)
    except ValueError as error:
        assert "IPv6" in str(error)  # noqa: PT017 (only of newer Pythons)
    else:
        assert whole == NAMED[dsn]


@pytest.mark.parametrize("option", ["port=6000,7000", "host=c"])
def test_hosts_that_are_named_twice_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match="in one way only"):
        check_url(f"postgres://u@a,b/x?{option}", "postgres")


@pytest.mark.parametrize("dsn", ["postgres://", "postgres:///x", "postgres://u@/x"])
def test_an_address_without_a_host_is_left_to_the_driver(dsn: str) -> None:
    assert hosts_of(dsn) == []


def test_what_no_server_can_be_is_told(database: str) -> None:
    fenced = f"{database}&default_transaction_read_only=on"

    async def connect() -> asyncpg.Connection:
        return await Primary(fenced).connect(timeout=5)

    with pytest.raises(ReadOnly, match="promote one, or name all hosts"):
        asyncio.run(connect())
