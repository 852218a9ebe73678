"""One Redis node's bell: subscribe to its expired events, and prove again and again that it rings.

A subscription that is silent looks just like one that nobody rings: events may be switched off at
runtime, the node may hang or be demoted. So a key of ours is left to expire on the node right
after every (re)subscription and at every interval, and the node counts as heard only while its
event arrives.
"""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import redis.asyncio
import redis.exceptions
import structlog

from broker.concurrency.cancel import cancel
from broker.leases.lease_keys import PREFIX
from broker.leases.redis_topology import Topology

PROVE_EVERY_S = 30.0
# A FLUSHALL or an eviction may take the key before it expires: then it is tried once more.
SELF_TESTS = 3
SELF_TEST_S = 1.0
SELF_TEST_PX = 50
LISTEN_S = 30.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0

log = structlog.get_logger()


class NoEvents(Exception):
    """The node tells of no expired key."""


class ExpiryNode:
    """Listens to one node; reconnects for ever.

    `notify` is called when a lease key may have expired, `changed` whenever `heard` changed and
    whenever the node was lost.
    """

    def __init__(
        self,
        topology: Topology,
        address: str,
        notify: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._topology = topology
        self._address = address
        self._notify = notify
        self._changed = changed
        self._channel = f"__keyevent@{topology.database}__:expired"
        self._subscribed = asyncio.Event()
        self._probe_event = asyncio.Event()
        self._test_key = b""
        self._complaint = ""
        self._rang = False  # once, since this process began
        self.heard = False

    async def run(self) -> None:
        """Listen until cancelled."""
        backoff = BACKOFF_MIN_S
        while True:
            try:
                await self._listen()
            except Exception as error:  # for ever, whatever a Redis or its client comes up with
                self._complain(error)
            if self.heard:
                backoff = BACKOFF_MIN_S  # it worked until now: this loss is a new one
            self._mark(heard=False)
            await asyncio.sleep(backoff * random.uniform(0.8, 1.2))  # noqa: S311 (jitter)
            backoff = min(2 * backoff, BACKOFF_MAX_S)

    async def _listen(self) -> None:
        """Hear and prove until either fails; a client of its own finds whoever is primary now."""
        async with self._topology.connect(self._address) as client, client.pubsub() as pubsub:
            self._subscribed.clear()
            await pubsub.subscribe(self._channel)
            tasks = [asyncio.create_task(x) for x in (self._hear(pubsub), self._self_test(client))]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await cancel(*tasks)

    async def _hear(self, pubsub: redis.asyncio.client.PubSub) -> None:
        while True:
            message = await pubsub.get_message(timeout=LISTEN_S)
            if message is not None:
                self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            # redis-py may have reconnected by itself: whatever was proved is proved no longer, and
            # events may have been lost.
            self._mark(heard=False)
            self._subscribed.set()
            self._notify()
        elif message["type"] == "message" and message["data"] == self._test_key:
            self._probe_event.set()
        elif message["type"] == "message" and message["data"].startswith(PREFIX.encode()):
            self._notify()

    async def _self_test(self, client: redis.asyncio.Redis) -> None:
        """Prove the subscription when it is confirmed and at every interval. Raises NoEvents."""
        while True:
            try:
                async with asyncio.timeout(PROVE_EVERY_S):
                    await self._subscribed.wait()
            except TimeoutError:
                pass
            self._subscribed.clear()
            await self._prove_once(client)
            self._mark(heard=True)

    async def _prove_once(self, client: redis.asyncio.Redis) -> None:
        key = self._topology.self_test_key(self._address, PREFIX)
        self._test_key = key.encode()
        for _ in range(SELF_TESTS):
            self._probe_event.clear()
            await client.set(key, 1, px=SELF_TEST_PX)
            try:
                # Around the event alone: redis-py may swallow a timeout's cancellation.
                async with asyncio.timeout(SELF_TEST_S):
                    await self._probe_event.wait()
                    return
            except TimeoutError:
                continue
        raise NoEvents

    def _mark(self, *, heard: bool) -> None:
        if heard:
            self._complaint = ""
            self._rang = True
        self.heard = heard
        self._changed()

    def _complain(self, error: Exception) -> None:
        """Say what is wrong and how to mend it: once, not at every attempt."""
        complaint, facts = self._diagnose(error)
        if complaint != self._complaint:
            self._complaint = complaint
            log.warning(complaint, redis=self._address, channel=self._channel, **facts)

    def _diagnose(self, error: Exception) -> tuple[str, dict[str, str]]:
        until = "until then the sweep runs more often"
        if isinstance(error, NoEvents):
            # CONFIG SET alone is gone with the next restart of Redis.
            fix = (
                "redis-cli CONFIG SET notify-keyspace-events Ex, and the same line in redis.conf or"
                " CONFIG REWRITE, so that a restart keeps it (managed Redis: its parameter group)"
            )
            facts = {"fix": f"{fix}; {until}"}
            if self._rang:
                facts["cause"] = (
                    "it worked before: Redis was restarted without it in redis.conf, or somebody"
                    " switched it off"
                )
            return "listener.deaf", facts
        if isinstance(error, redis.exceptions.NoPermissionError):
            fix = f"redis-cli ACL SETUSER <user> '&{self._channel}' '~{PREFIX}*' +subscribe +set"
            return "listener.denied", {"error": str(error), "fix": f"{fix}; {until}"}
        return "listener.lost", {"error": type(error).__name__}
