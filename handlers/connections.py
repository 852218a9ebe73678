"""Connections: a client that is slow is waited for, one that is stuck or pretends is not.

A request's head has to come within `HEAD_S` of its first byte. Bodies and answers have to move on:
`FLOOR_BYTES` in each window of `WINDOW_S`, for as long as they take. A body that stands still is
answered (408) before its connection is closed. One patrol looks at all connections once a second,
so that no request pays for a timer of its own.
"""

import asyncio
import errno
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import structlog
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate
from tornado.iostream import IOStream
from tornado.web import Application

from broker.telemetry import Telemetry
from handlers.addresses import Proxies, client_of

HEAD_S = 10.0
IDLE_S = 75.0
# 512 bytes a second: a modem of 1995 is faster.
WINDOW_S = 30.0
FLOOR_BYTES = 512 * WINDOW_S
PATROL_S = 1.0
HEAD_MAX = 16 * 1024
# More than the largest bundle: the caps are the handlers' own, with answers that say so.
BODY_MAX = 64 * 1024 * 1024
# A client may go on sending for so long after an answer that came before its request's end: to
# close at once would reset the connection, and the answer would be lost with it.
LINGER_S = 2.0
LINGERING_MAX = 64
ACCEPTED_AT_ONCE = 32  # the connections that are there have their turn in between
REST_S = 0.2
LOOKED_AT = 256
TELL_EVERY_S = 60.0
TURNED_AWAY_FIX = (
    "raise LimitNOFILE or add processes; for one address that is many people's, raise"
    " BAKEOFF_QUEUE_CONNECTIONS_PER_ADDRESS"
)

log = structlog.get_logger()


class Request(Protocol):
    """Interface of a request's handler, as its connection sees it."""

    @property
    def doomed(self) -> bool:
        """Return whether the rest of its body changes nothing any more."""
        ...

    def give_up_body(self) -> None:
        """Answer now, as the body does not come."""
        ...


class Progress:
    """Progress of a transfer: enough bytes in each window."""

    def __init__(self, count: int, now: float) -> None:
        self._count, self._since = count, now

    def window_is_over(self, now: float) -> bool:
        """Return whether it is time to judge."""
        return now - self._since >= WINDOW_S

    def stalled(self, count: int, now: float) -> bool:
        """Return whether too little came in this window; begin the next one."""
        moved, self._count, self._since = count - self._count, count, now
        return moved < FLOOR_BYTES


class ClientStream(IOStream):
    """A client's connection, which counts what it carries."""

    def __init__(self, connection: socket.socket, client: str, **options: Any) -> None:
        """Carry a connection of `client`, which is how its address is counted."""
        super().__init__(connection, **options)
        self.client = client
        self.received = self.sent = 0
        self.lingers = False
        self._linger: Callable[[socket.socket], None] = socket.socket.close
        self.expect_head()

    def expect_head(self) -> None:
        """Wait for the next request."""
        self.request: Request | None = None
        self._received_before = self.received
        self._waits_since: float | None = None
        self._head_since: float | None = None
        self._body: Progress | None = None
        self._answer: Progress | None = None

    def use_linger(self, linger: Callable[[socket.socket], None]) -> None:
        """Give the socket to `linger`, where it must not be closed at once."""
        self._linger = linger

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Read, and count."""
        try:
            size = super().read_from_fd(buf)
        finally:
            del buf  # as Tornado does: a traceback that holds a memoryview locks its buffer
        self.received += size or 0
        return size

    def write_to_fd(self, data: memoryview) -> int:
        """Write, and count."""
        try:
            size = super().write_to_fd(data)
        finally:
            del data
        self.sent += size
        return size

    def close_fd(self) -> None:
        """Close the socket, once the client had the time to read the answer."""
        connection: socket.socket = self.socket
        self.socket = None  # type: ignore[assignment]
        if self.lingers:
            self._linger(connection)
        else:
            connection.close()

    def judge(self, now: float) -> str | None:
        """Cut what is stuck; return what stood still."""
        if self.writing():
            return self._judge_answer(now)
        self._answer = None
        if self.request is None:
            return self._judge_head(now)
        return self._judge_body(self.request, now) if self.reading() else None

    def _judge_head(self, now: float) -> str | None:
        if self.received == self._received_before:
            self._waits_since = now if self._waits_since is None else self._waits_since
            if now - self._waits_since >= IDLE_S:
                self.close()
            return None
        self._head_since = now if self._head_since is None else self._head_since
        if now - self._head_since < HEAD_S:
            return None
        self.close()
        return "head"

    def _judge_body(self, request: Request, now: float) -> str | None:
        self._body = self._body or Progress(self.received, now)
        if not self._body.window_is_over(now):
            return None
        if not self._body.stalled(self.received, now) and not request.doomed:
            return None
        request.give_up_body()
        return "body"

    def _judge_answer(self, now: float) -> str | None:
        self._answer = self._answer or Progress(self.sent, now)
        if not self._answer.window_is_over(now) or not self._answer.stalled(self.sent, now):
            return None
        self.lingers = False
        self.close()
        return "answer"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of connections, in all and of one client (0: any number), proxies excepted."""

    connections_max: int
    per_client: int
    proxies: Proxies


class Lingering:
    """Sockets that were answered while their clients still send: drained for a moment, then closed.

    Of too many at once, the oldest goes.
    """

    def __init__(self) -> None:
        self._sockets: dict[socket.socket, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        """The number of them."""
        return len(self._sockets)

    def take(self, connection: socket.socket) -> None:
        """Say that nothing more comes from us, and read what still comes from the client."""
        try:
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the client is gone
            connection.close()
            return
        if len(self._sockets) >= LINGERING_MAX:
            self._end(next(iter(self._sockets)))
        loop = asyncio.get_running_loop()
        self._sockets[connection] = loop.call_later(LINGER_S, self._end, connection)
        loop.add_reader(connection, self._drain, connection)

    def end_all(self) -> None:
        """Close all of them."""
        for connection in list(self._sockets):
            self._end(connection)

    def _drain(self, connection: socket.socket) -> None:
        try:
            if not connection.recv(64 * 1024):
                self._end(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        self._sockets.pop(connection).cancel()
        asyncio.get_running_loop().remove_reader(connection)
        connection.close()


class Server(HTTPServer):
    """The HTTP server with our limits; `patrol` is its background loop."""

    def initialize(  # type: ignore[override]
        self, app: Application, limits: Limits, telemetry: Telemetry
    ) -> None:
        """Serve `app`."""
        super().initialize(app, max_header_size=HEAD_MAX, max_body_size=BODY_MAX)
        self.conn_params.header_timeout = None  # the patrol's
        self._limits = limits
        self._telemetry = telemetry
        self._listening: list[socket.socket] = []
        self._resume: asyncio.TimerHandle | None = None
        # In the order in which they last became idle.
        self._streams: dict[ClientStream, None] = {}
        self._of_client: Counter[str] = Counter()
        self._lingering = Lingering()
        self._untold: Counter[str] = Counter()
        self._told_at = -TELL_EVERY_S

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections on listening sockets."""
        self._listening += sockets
        self._listen()

    def stop(self) -> None:
        """Accept no more."""
        self._listen_no_more()
        while self._listening:
            self._listening.pop().close()

    async def close_all_connections(self) -> None:
        """Close all connections, and wait for their handlers to notice."""
        await super().close_all_connections()
        self._lingering.end_all()

    def start_request(self, server_conn: Any, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Tornado's hook before each request of a connection."""
        stream: ClientStream = server_conn.stream
        stream.expect_head()
        if self._streams.pop(stream, stream) is None:  # it is the one that became idle last
            self._streams[stream] = None
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: Any) -> None:
        """Tornado's hook after the end of a connection."""
        super().on_close(server_conn)
        self._forget(server_conn.stream)

    async def patrol(self, succeeded: Callable[[], None]) -> None:
        """Cut the connections that are stuck, until cancelled."""
        now = last = time.monotonic()
        while True:
            await asyncio.sleep(PATROL_S)
            # While this process stood still (a suspended machine), its clients could not move on.
            now += min(time.monotonic() - last, 2 * PATROL_S)
            last = time.monotonic()
            self.look(now)
            succeeded()

    def look(self, now: float) -> None:
        """Cut the connections that are stuck; `now` is a time of the patrol's own clock."""
        cut = Counter(stream.judge(now) for stream in tuple(self._streams))
        for part in ("head", "body", "answer"):
            if cut[part]:
                log.info("http.stalled", part=part, connections=cut[part])
        if self._untold and now - self._told_at >= TELL_EVERY_S:
            log.warning("http.turned_away", **self._untold, fix=TURNED_AWAY_FIX)
            self._untold.clear()
            self._told_at = now

    @property
    def streams(self) -> frozenset[ClientStream]:
        """The connections that are open."""
        return frozenset(self._streams)

    def _listen(self) -> None:
        self._resume = None
        for listening in self._listening:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _listen_no_more(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening)

    def _rest(self, why: str) -> None:
        """Accept nothing for a moment: the next try would fail as well, at once and for ever."""
        self._tell(why)
        self._listen_no_more()
        self._resume = asyncio.get_running_loop().call_later(REST_S, self._listen)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if self._is_over() and not self._make_room():
                self._rest("waiting")
                return
            try:
                connection, address = listening.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:  # no descriptors, no memory, ...
                self._rest(errno.errorcode.get(error.errno or 0, "failed"))
                return
            self._accepted(connection, address)
        # More wait: they have their turn when the connections that are there had theirs.

    def _accepted(self, connection: socket.socket, address: Any) -> None:
        peer = address[0] if isinstance(address, tuple) else "unix"
        client = "" if self._limits.proxies.trusts(peer) else client_of(peer)
        most = self._limits.per_client
        if client and most and self._of_client[client] >= most:
            self._tell("too_many_of_one_address")
            connection.close()
            return
        connection.setblocking(False)
        stream = ClientStream(connection, client, max_buffer_size=self.max_buffer_size)
        stream.use_linger(self._lingering.take)
        self._streams[stream] = None
        self._of_client[client] += 1
        self.handle_stream(stream, address)
        if self._is_over():
            self._make_room()

    def _tell(self, reason: str) -> None:
        """Count it; the log is told by the patrol, a line a minute: there may be thousands."""
        self._telemetry.turned_away.labels(reason).inc()
        self._untold[reason] += 1

    def _is_over(self) -> bool:
        """Return whether there is one connection too many: room is made when it has come."""
        return len(self._streams) + len(self._lingering) > self._limits.connections_max

    def _forget(self, stream: ClientStream) -> None:
        if stream not in self._streams:
            return
        del self._streams[stream]
        self._of_client[stream.client] -= 1
        if not self._of_client[stream.client]:
            del self._of_client[stream.client]

    def _make_room(self) -> bool:
        """Close the connection that has been idle for longest, but not the newest one.

        Returns whether there was one.
        """
        for stream in tuple(islice(self._streams, min(LOOKED_AT, len(self._streams) - 1))):
            if stream.request is None:
                self._tell("closed_idle")
                self._forget(stream)
                stream.close()
                return True
            # It works, and is not looked at again before the others.
            del self._streams[stream]
            self._streams[stream] = None
        return False
