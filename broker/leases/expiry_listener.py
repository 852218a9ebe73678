"""The bell: expired lease keys, heard at every Redis node that may expire one, bring the sweep.

It never takes the process down, and it is healthy only while every primary has proved itself: the
sweep runs more often otherwise. The primaries are looked up again periodically and after a loss,
because a failover or a resharding may have changed them.
"""

import asyncio
from collections.abc import Callable

import structlog

from broker.concurrency.cancel import cancel
from broker.leases.expiry_node import ExpiryNode
from broker.leases.redis_topology import Topology
from broker.leases.sweep import Sweep

LOOK_S = 30.0
LOOK_DEGRADED_S = 5.0

log = structlog.get_logger()


class ExpiryListener:
    """Rings the sweep on expired lease keys, with one `ExpiryNode` per primary.

    Of the events `healthy` and `degraded`, exactly one is set.
    """

    def __init__(
        self, topology: Topology, sweep: Sweep, degraded: Callable[[], None] = lambda: None
    ) -> None:
        """Listen to the primaries of `topology`; call `degraded` each time events may be missed."""
        self._topology = topology
        self._sweep = sweep
        self._count_gap = degraded
        self._nodes: dict[str, tuple[ExpiryNode, asyncio.Task[None]]] = {}
        self._known: bool | None = None  # who the primaries are; None: not asked yet
        self._lost = asyncio.Event()
        self.healthy = asyncio.Event()
        self.degraded = asyncio.Event()
        self.degraded.set()

    async def run(self, succeeded: Callable[[], None]) -> None:
        """Listen until cancelled."""
        try:
            while True:
                await self._look()
                if self._known:
                    succeeded()
                await self._wait()
        finally:
            await cancel(*(task for _, task in self._nodes.values()))

    async def _look(self) -> None:
        """Listen to whoever is a primary now, and to nobody else."""
        try:
            primaries = await self._topology.primaries()
        except Exception as error:  # for ever, whatever a Redis or its client comes up with
            if self._known is not False:  # said once, not at every attempt
                log.warning("listener.no_primaries", error=type(error).__name__, detail=str(error))
            self._known = False
        else:
            self._known = True
            await self._follow(set(primaries))
        self._judge()

    async def _follow(self, primaries: set[str]) -> None:
        for address in [a for a, (_, task) in self._nodes.items() if task.done()]:
            log.error("listener.node_ended", redis=address, problem=_why(self._nodes[address][1]))
            del self._nodes[address]
        for address in primaries - self._nodes.keys():
            node = ExpiryNode(self._topology, address, self._sweep.notify, self._node_changed)
            task = asyncio.create_task(node.run())
            # One that ended hears nothing, whatever it said: it is replaced at the next look.
            task.add_done_callback(lambda _: self._judge())
            self._nodes[address] = (node, task)
        gone = [self._nodes.pop(address) for address in self._nodes.keys() - primaries]
        await cancel(*(task for _, task in gone))

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(LOOK_S if self.healthy.is_set() else LOOK_DEGRADED_S):
                await self._lost.wait()
        except TimeoutError:
            pass
        self._lost.clear()

    def _node_changed(self) -> None:
        self._judge()
        if not self.healthy.is_set():
            self._lost.set()  # a failover? A node calls no more often than its backoff allows

    def _judge(self) -> None:
        nodes = self._nodes.values()
        heard = all(node.heard and not task.done() for node, task in nodes)
        healthy = bool(self._known and nodes) and heard
        if healthy != self.healthy.is_set():
            log.info("listener.healthy" if healthy else "listener.degraded", nodes=len(nodes))
            if not healthy:
                self._count_gap()
        self._sweep.degraded = not healthy
        _put(self.healthy, healthy)
        _put(self.degraded, not healthy)


def _why(task: asyncio.Task[None]) -> str:
    """Return why a node that listens for ever does so no longer."""
    error = None if task.cancelled() else task.exception()
    return f"{type(error).__name__}: {error}" if error else "it ended"


def _put(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()
