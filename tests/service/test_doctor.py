"""doctor: each thing that the service stands on, broken one by one, is found with its fix."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import redis

from sandbox.services import servers
from tests.service.test_cli_service import run, serving, settings

__all__ = ["settings"]
RING = f"test:{'k' * 32}"
GOOD = ("settings", "PostgreSQL", "migrations", "connections", "replication",
        "key rings", "notifications", "spool", "clock of PostgreSQL")  # fmt: skip


def findings(**given: Any) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the doctor's findings by check, and its exit code."""
    done = run("doctor", "--json", **given)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["findings"]
    return {each["check"]: each for each in found}, done.returncode


def of(found: dict[str, dict[str, Any]], beginning: str, end: str = "") -> dict[str, Any]:
    """Return the one finding whose name begins and ends so."""
    (one,) = (f for name, f in found.items() if name.startswith(beginning) and name.endswith(end))
    return one


def test_a_good_service_has_no_failure(settings) -> None:
    with serving(settings) as (_, port):
        found, code = findings(**settings, public_url=f"http://127.0.0.1:{port}")
    failed = [name for name, each in found.items() if each["state"] == "failure"]
    # It answers, and was started for another address.
    assert (failed, code) == (["public URL"], 1), found
    assert "says it is" in found["public URL"]["detail"]
    assert {check: found[check]["state"] for check in GOOD} == dict.fromkeys(GOOD, "ok")


def test_what_is_wrong_in_the_settings_is_named(settings, tmp_path: Path) -> None:
    secret = tmp_path / "keys"
    secret.write_text(RING)
    secret.chmod(0o644)
    wrong = {**settings, "receipt_keys": "", "signers_file": tmp_path / "none.yaml"}
    del wrong["token_keys"]
    found, code = findings(**wrong, token_keys_file=secret)
    assert code == 1
    assert "RECEIPT_KEYS" in found["settings"]["detail"]
    assert found["secret files"]["fix"] == f"chmod 600 {secret}"
    assert found["signer policy"]["state"] == "failure"
    secret.chmod(0o600)
    found, _ = findings(**wrong, token_keys_file=secret)
    assert found["secret files"]["state"] == "ok"
    unknown = run("doctor", **settings, lease_ttl=3)
    assert (unknown.returncode, "LEASE_TTL_S" in unknown.stderr) == (2, True)


def test_a_database_that_is_away_read_only_or_not_migrated_is_told(
    settings, empty_database: str
) -> None:
    away = {**settings, "database_url": "postgres://127.0.0.1:1/x"}
    found, code = findings(**away)
    assert (found["PostgreSQL"]["state"], code) == ("failure", 1)
    table = run("doctor", **away)
    assert (table.returncode, "DATABASE_URL" in table.stdout) == (1, True)
    found, _ = findings(**{**settings, "database_url": empty_database})
    assert found["migrations"]["fix"] == "bakeoff-queue db migrate"
    dsn = settings["database_url"]
    read_only = "SELECT format('ALTER DATABASE %I SET default_transaction_read_only = on', "

    async def fence() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute(await connection.fetchval(f"{read_only}current_database())"))
        await connection.close()

    asyncio.run(fence())
    found, _ = findings(**settings)
    assert "read-only" in found["PostgreSQL"]["detail"]


def test_another_key_under_an_old_kid_is_told(settings) -> None:
    findings(**settings)
    found, _ = findings(**{**settings, "token_keys": f"test:{'z' * 32}"})
    assert found["key rings"]["state"] == "failure"
    assert "rings ls" in found["key rings"]["fix"]


def test_a_redis_that_is_deaf_evicts_or_is_away_is_told(settings) -> None:
    with servers.redis() as server, redis.Redis.from_url(server.url(0)) as client:
        there = {**settings, "redis_lease_url": server.url(0), "redis_token_url": server.url(1)}
        client.config_set("notify-keyspace-events", "")
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        found, code = findings(**there)
        assert code == 1
        assert "redis.conf" in of(found, "Redis (lease keys)", "events")["fix"]
        assert of(found, "Redis (lease keys)", "eviction")["state"] == "warning"
        client.config_set("notify-keyspace-events", "AKE")
        found, _ = findings(**there)
        assert of(found, "Redis (lease keys)", "events")["state"] != "failure"
    found, _ = findings(**there)
    assert "PostgreSQL decides" in of(found, "Redis (lease keys)")["detail"]
