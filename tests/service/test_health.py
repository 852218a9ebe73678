"""Health: is the process up, and is it fit to serve?"""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from config.settings import Settings
from db.migrate import migrate
from sandbox.services import servers
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, open_fleet

MakeSettings = Callable[..., Settings]


async def ready(fleet: Fleet) -> tuple[int, dict[str, Any]]:
    """Return what /readyz says."""
    answer = await fleet.http.get("/readyz")
    assert answer.status_code == 200 or int(answer.headers["Retry-After"]) > 0
    return answer.status_code, answer.json()


async def until_ready(fleet: Fleet, status: int, **wanted: str) -> dict[str, Any]:
    """Wait until /readyz says so; connections that are gone are found out one by one."""
    async with asyncio.timeout(20):
        while True:
            said, checks = await ready(fleet)
            if said == status and all(checks[n].startswith(w) for n, w in wanted.items()):
                return checks
            await asyncio.sleep(0.01)


@pytest.mark.gen_test
async def test_a_process_that_lives_and_is_fit_says_so_to_anybody(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    with capture_logs() as logs:
        async with open_fleet(make_settings(), sigstore) as fleet:
            alive = await fleet.http.get("/healthz")
            assert (alive.status_code, alive.json()["status"]) == (200, "ok")
            checks = await until_ready(fleet, 200, listener="ok")
            assert (checks["status"], checks["postgres"], checks["redis"]) == ("ready", "ok", "ok")
            assert checks["trust_root_age_s"] >= 0
            assert checks["draining"] is False
    assert not [line for line in logs if line["event"] == "http.request"], "nobody logs the asking"


@pytest.mark.gen_test
async def test_health_may_be_asked_by_head_and_options(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        for path in ("/healthz", "/readyz"):
            head = await fleet.http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["Content-Length"]) > 0
            options = await fleet.http.options(path)
            assert (options.status_code, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")


@pytest.mark.gen_test
async def test_a_process_that_drains_is_alive_and_not_ready(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        fleet.services.health.drain()
        status, checks = await ready(fleet)
        assert (status, checks["status"], checks["draining"]) == (503, "unready", True)
        assert (await fleet.http.get("/healthz")).status_code == 200


@pytest.mark.gen_test
async def test_a_database_without_the_newest_migration_is_not_ready(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.pool.execute("DELETE FROM schema_migrations")
        status, checks = await ready(fleet)
        assert (status, checks["status"]) == (503, "unready")
        assert "bakeoff-queue db migrate" in checks["postgres"]
        await fleet.pool.execute("DROP TABLE schema_migrations")
        assert (await ready(fleet))[0] == 503


@pytest.mark.gen_test
async def test_redis_away_degrades_and_postgres_away_is_unready_until_they_are_back(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    with servers.postgres() as postgres, servers.redis() as redis:
        await asyncio.to_thread(migrate, postgres.dsn)
        settings = make_settings(
            database_url=postgres.dsn, redis_lease_url=redis.url(1), redis_token_url=redis.url(2)
        )
        async with open_fleet(settings, sigstore) as fleet:
            runner = await fleet.sign_on()
            redis.kill()
            checks = await until_ready(fleet, 200, redis="degraded", listener="degraded")
            assert checks["status"] == "ready"
            assert (await runner.claim()).status_code == 204, "Redis costs latency only"
            redis.restart()
            await until_ready(fleet, 200, redis="ok", listener="ok")
            postgres.kill()
            await until_ready(fleet, 503, postgres="unreachable")
            assert (await fleet.http.get("/healthz")).status_code == 200
            refused = await runner.claim()
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert int(refused.headers["Retry-After"]) > 0
            postgres.restart()
            await until_ready(fleet, 200, postgres="ok")
            assert (await runner.claim()).status_code == 204
