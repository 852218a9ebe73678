"""The lease keys gather for a while behind the answers: no life is added, and none is forgotten."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self
from uuid import uuid4

import pytest
import redis.asyncio

from broker.leases import lease_keys
from broker.leases.lease_keys import GRACE, LeaseKey, LeaseKeys
from config.settings import Settings
from server import open_services

MakeSettings = Callable[..., Settings]
# Keys would gather for so long: for ever, so that only a flush writes them.
NEVER_S = 1000.0


class Clock:
    """Stands where lease_keys.py has the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return the time that the test has set."""
        return self.now


class Recorder:
    """A client and its pipeline: keeps the commands."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def pipeline(self, *, transaction: bool) -> Self:
        """Return itself."""
        assert not transaction
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def execute_command(self, *command: Any) -> None:
        """Keep a command."""
        self.commands.append(command)

    async def execute(self) -> None:
        """Send nothing."""


class BodyFailed(Exception):
    """What a server's body raised."""


@pytest.fixture(autouse=True)
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let keys gather until they are flushed."""
    monkeypatch.setattr(lease_keys, "GATHER_S", NEVER_S)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the lease keys read."""
    clock = Clock()
    monkeypatch.setattr(lease_keys, "time", clock)
    return clock


@pytest.mark.gen_test
async def test_a_key_does_not_live_longer_for_the_time_that_it_gathered(clock: Clock) -> None:
    client = Recorder()
    keys = LeaseKeys(client)
    early = LeaseKey(uuid4(), 1, timedelta(seconds=60))
    late = LeaseKey(uuid4(), 1, timedelta(seconds=60))
    keys.put([early])
    clock.now += 20
    keys.put([late])
    clock.now += 10
    await keys.flush()
    grace = GRACE // timedelta(milliseconds=1)
    assert client.commands == [
        ("SET", early.name, 1, "PX", 30_000 + grace),
        ("SET", late.name, 1, "PX", 50_000 + grace),
    ]


@pytest.mark.gen_test
async def test_a_key_whose_lease_lapsed_while_it_gathered_still_rings(clock: Clock) -> None:
    """Redis refuses a life of 0 ms, or less: the key would not be there to expire."""
    client = Recorder()
    keys = LeaseKeys(client)
    lapsed = LeaseKey(uuid4(), 1, timedelta(seconds=1))
    keys.put([lapsed])
    clock.now += 2
    await keys.flush()
    assert client.commands == [("SET", lapsed.name, 1, "PX", 1)]


@pytest.mark.gen_test
async def test_a_server_whose_body_raises_writes_the_keys_that_gathered(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    lease = LeaseKey(uuid4(), 1, timedelta(seconds=60))

    async def serve() -> None:
        async with open_services(settings) as services:
            services.heartbeats._keys.put([lease])
            raise BodyFailed

    with pytest.raises(BodyFailed):
        await serve()
    async with redis.asyncio.from_url(settings.redis_lease_url) as client:
        assert await client.exists(lease.name)
