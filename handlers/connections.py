"""Connections: a client that is slow is waited for, one that is stuck or pretends is not.

A request's head has to come within `HEAD_S` of its first byte. Bodies and answers have to move on:
`FLOOR_BYTES` in each window of `WINDOW_S`, for as long as they take. A body that stands still is
answered (408) before its connection is closed. One patrol looks at all connections once a second,
so that no request pays for a timer of its own.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import structlog
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate
from tornado.iostream import IOStream
from tornado.netutil import add_accept_handler
from tornado.web import Application

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

log = structlog.get_logger()


class Request(Protocol):
    """What answers a request, as its connection sees it."""

    @property
    def doomed(self) -> bool:
        """Whether the rest of its body changes nothing any more."""
        ...

    def give_up_body(self) -> None:
        """Answer now, as the body does not come."""
        ...


class Progress:
    """Whether bytes move: enough of them in each window."""

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

    def __init__(self, connection: socket.socket, **options: Any) -> None:
        super().__init__(connection, **options)
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


class Lingering:
    """Sockets that were answered while their clients still send: drained for a moment, then closed.

    Of too many at once, the oldest goes.
    """

    def __init__(self) -> None:
        self._sockets: dict[socket.socket, asyncio.TimerHandle] = {}

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

    def initialize(self, app: Application) -> None:  # type: ignore[override]
        """Serve `app`."""
        super().initialize(app, max_header_size=HEAD_MAX, max_body_size=BODY_MAX)
        self.conn_params.header_timeout = None  # the patrol's
        self._listening: dict[socket.socket, Callable[[], None]] = {}
        self._streams: set[ClientStream] = set()
        self._lingering = Lingering()

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept connections on listening sockets."""
        for listening in sockets:
            self._listening[listening] = add_accept_handler(listening, self._accepted)

    def stop(self) -> None:
        """Accept no more."""
        while self._listening:
            listening, remove = self._listening.popitem()
            remove()
            listening.close()

    async def close_all_connections(self) -> None:
        """Close all connections, and wait for their handlers to notice."""
        await super().close_all_connections()
        self._lingering.end_all()

    def start_request(self, server_conn: Any, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Tornado's hook before each request of a connection."""
        server_conn.stream.expect_head()
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: Any) -> None:
        """Tornado's hook after the end of a connection."""
        super().on_close(server_conn)
        self._streams.discard(server_conn.stream)

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

    @property
    def streams(self) -> frozenset[ClientStream]:
        """The connections that are open."""
        return frozenset(self._streams)

    def _accepted(self, connection: socket.socket, address: Any) -> None:
        stream = ClientStream(connection, max_buffer_size=self.max_buffer_size)
        stream.use_linger(self._lingering.take)
        self._streams.add(stream)
        self.handle_stream(stream, address)
