"""Key rings: a kid is one key in every process and for ever, and processes have the same rings."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from datetime import timedelta

import asyncpg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from broker.admin.key_rings import LATELY, KeyRings
from cli.main import main
from client.output import ExitCode
from config.settings import PREFIX, Settings, SettingsRefused
from db.pool import DatabaseUnready, open_pool
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import ServerRefused, open_services
from tests.support.fleet import Fleet, open_fleet

MakeSettings = Callable[..., Settings]
OLD, NEW = "0a" * 32, "0b" * 32  # good for either ring
RINGS = ("token_keys", "receipt_keys")


def ring(*keys: str) -> SecretStr:
    return SecretStr(",".join(keys))


async def known(pool: asyncpg.Pool, name: str) -> list[str]:
    """The kids of a ring that the database knows."""
    rows = await pool.fetch("SELECT kid FROM ring_keys WHERE ring = $1 ORDER BY kid", name)
    return [row["kid"] for row in rows]


async def compared(fleet: Fleet) -> str:
    """Compare a process's rings with the others' now; return what /readyz says of them."""
    await fleet.services.health._key_rings.run_once()
    answer = await fleet.http.get("/readyz")
    assert answer.status_code == 200, "a ring that differs takes no process out"
    return answer.json()["key_rings"]


async def noted_before(fleet: Fleet, column: str, ago: timedelta) -> None:
    await fleet.pool.execute(f"UPDATE ring_keys SET {column} = now() - $1::interval", ago)


@pytest.mark.gen_test
@pytest.mark.parametrize("name", RINGS)
async def test_another_key_under_an_old_kid_stops_the_start_with_ring_kid_and_fix(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, name: str
) -> None:
    async with open_fleet(make_settings(**{name: ring(f"k1:{OLD}")}), sigstore) as fleet:
        for wrong in (ring(f"k1:{NEW}"), ring(f"k2:{NEW}", f"k1:{NEW}")):
            with pytest.raises(ServerRefused) as refused:
                async with open_services(make_settings(**{name: wrong})):
                    pytest.fail("it started")
            told = str(refused.value)
            assert told.startswith(f"{PREFIX}{name.upper()}: the kid k1 is another key here")
            assert "give the new key a new kid" in told
            assert NEW not in told
            assert "\n" not in told
            assert await known(fleet.pool, name) == ["k1"], "a refused ring leaves nothing"
        async with open_services(make_settings(**{name: ring(f"k2:{NEW}", f"k1:{OLD}")})):
            assert await known(fleet.pool, name) == ["k1", "k2"]


@pytest.mark.gen_test
async def test_of_two_processes_that_start_at_once_one_sees_the_others_key(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(token_keys=ring(f"k1:{OLD}"))
    async with open_pool(settings.database_url.get_secret_value(), 3) as pool:
        async with pool.acquire() as first:
            transaction = first.transaction()
            await transaction.start()
            await first.execute(
                "INSERT INTO ring_keys (ring, kid, fingerprint) VALUES ('token_keys', 'k1', 'x')"
            )
            second = asyncio.create_task(KeyRings(pool).hold(settings))
            waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
            async with asyncio.timeout(20):
                while not await pool.fetchval(waiting):
                    assert not second.done()
            await transaction.commit()
        with pytest.raises(SettingsRefused, match="the kid k1 is another key here"):
            await second


@pytest.mark.gen_test
@pytest.mark.parametrize("name", RINGS)
async def test_at_a_reload_another_key_under_an_old_kid_changes_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, name: str
) -> None:
    settings = make_settings(**{name: ring(f"k1:{OLD}")})
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on()
        published = fleet.services.receipts.published()
        wrong = make_settings(**{name: ring(f"k1:{NEW}")})
        with capture_logs() as logs:
            assert not await fleet.services.reload.run_once(lambda: wrong)
        (line,) = [line for line in logs if line["event"] == "reload.refused"]
        assert "the kid k1 is another key here" in line["problem"]
        assert fleet.services.receipts.published() == published
        assert (await runner.claim()).status_code == 204


@pytest.mark.gen_test
@pytest.mark.parametrize("name", RINGS)
async def test_a_process_that_lacks_a_key_another_one_signs_with_says_so_until_it_has_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, name: str
) -> None:
    settings = make_settings(**{name: ring(f"k1:{OLD}")})
    both = make_settings(**{name: ring(f"k2:{NEW}", f"k1:{OLD}")})
    async with open_fleet(settings, sigstore) as fleet:
        assert await compared(fleet) == "ok"
        behind = make_settings(**{name: ring(f"k1:{OLD}", f"k2:{NEW}")})
        async with open_fleet(behind, sigstore) as other:
            assert await compared(fleet) == "ok", "a key behind the first one signs nothing yet"
            assert await other.services.reload.run_once(lambda: both)
            with capture_logs() as logs:
                for _ in range(2):
                    said = await compared(fleet)
                assert await compared(other) == "ok"
        assert said.startswith(f"degraded: {PREFIX}{name.upper()} lacks the kid k2")
        assert "give all processes the same ring" in said
        told = [line for line in logs if line["event"] == "key_rings.differ"]
        assert len(told) == 1, "it is told when it changes"
        assert await fleet.services.reload.run_once(lambda: both)
        assert await compared(fleet) == "ok"


@pytest.mark.gen_test
async def test_a_key_that_nobody_signs_with_any_more_is_not_missed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(token_keys=ring(f"k1:{OLD}"))
    async with open_fleet(settings, sigstore) as fleet:
        only_new = make_settings(token_keys=ring(f"k2:{NEW}"))
        assert await fleet.services.reload.run_once(lambda: only_new)
        assert "lacks the kid k1" in await compared(fleet)
        await noted_before(fleet, "signed_at", LATELY)
        assert await compared(fleet) == "ok"


@pytest.mark.gen_test
async def test_a_kid_that_was_freed_and_given_to_another_key_is_told(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        await fleet.pool.execute("UPDATE ring_keys SET fingerprint = 'x' WHERE ring = 'token_keys'")
        said = await compared(fleet)
        assert said.startswith(f"degraded: {PREFIX}TOKEN_KEYS: the kid test is another key here")


@pytest.mark.gen_test
async def test_a_fingerprint_tells_neither_the_key_nor_that_two_are_equal(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    settings = make_settings(
        token_keys=ring(f"k1:{OLD}", f"k2:{OLD}"), receipt_keys=ring(f"k1:{OLD}")
    )
    async with open_fleet(settings, sigstore) as fleet:
        rows = await fleet.pool.fetch("SELECT fingerprint FROM ring_keys")
        prints = {row["fingerprint"] for row in rows}
        assert len(prints) == 3
        plain = {hashlib.sha256(key).hexdigest() for key in (OLD.encode(), bytes.fromhex(OLD))}
        assert not prints & (plain | {OLD})


@pytest.mark.gen_test
async def test_a_database_that_is_away_is_told_of_and_compared_with_again(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    async with open_pool(settings.database_url.get_secret_value(), 2) as pool:
        rings = KeyRings(pool)
        await rings.hold(settings)
    with pytest.raises(DatabaseUnready, match="PostgreSQL cannot be used"):
        await rings.hold(settings)
    told = asyncio.Event()
    with capture_logs() as logs:
        comparing = asyncio.create_task(rings.run(told.set))
        async with asyncio.timeout(20):
            while not logs:
                await asyncio.wait({comparing}, timeout=0)
        assert not comparing.done()
        assert not told.is_set()
        comparing.cancel()
    assert [line["event"] for line in logs] == ["key_rings.not_compared"]


@pytest.mark.gen_test
async def test_a_kid_is_freed_once_no_process_has_it_and_may_be_another_key_then(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = make_settings(token_keys=ring(f"k1:{OLD}"))
    monkeypatch.setenv(f"{PREFIX}DATABASE_URL", settings.database_url.get_secret_value())

    async def rings(*words: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, ["rings", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    forget = ("forget", "token_keys", "k1", "--reason", "lost")
    async with open_fleet(settings, sigstore) as fleet:
        code, out, _ = await rings("ls", "--json")
        assert code == ExitCode.OK
        listed = [(key["ring"], key["kid"]) for key in json.loads(out)["keys"]]
        assert listed == [("receipt_keys", "test"), ("token_keys", "k1")]
        assert "k1" in (await rings("ls"))[1]
        code, _, err = await rings(*forget)
        assert (code, "--yes" in err) == (ExitCode.UNCONFIRMED, True)
        code, _, err = await rings(*forget, "--yes")
        assert (code, "take it out of all rings" in err) == (ExitCode.CONFLICT, True)
        assert (await rings("forget", "token_keys", "k9", "--reason", "x", "--yes"))[0] == (
            ExitCode.NOT_FOUND
        )
        await noted_before(fleet, "held_at", LATELY)
        assert (await rings(*forget, "--yes"))[0] == ExitCode.OK
        (row,) = await fleet.pool.fetch("SELECT * FROM audit WHERE action = 'ring.forget'")
        assert row["target"] == "ring:token_keys/k1"
        assert row["detail"]["reason"] == "lost"
        async with open_services(make_settings(token_keys=ring(f"k1:{NEW}"))):
            assert await known(fleet.pool, "token_keys") == ["k1"]
