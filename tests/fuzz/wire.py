"""HTTP by hand: requests as mutated bytes, over a connection that is kept while it is sound."""

import asyncio
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One connection at a time to the server; a new one when the last one cannot be used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def exchange(self, request: bytes, *, last: bool, patience_s: float) -> Answer | None:
        """Send a request and return its answer; None if the server hung up without one.

        `last`: what follows on this connection is not to be trusted, and nothing more can be sent.
        Raises TimeoutError when nothing comes for so long.
        """
        kept = self._writer is not None
        answer = await self._once(request, last, patience_s)
        if answer is None and kept:  # the server may have closed it just before
            answer = await self._once(request, last, patience_s)
        return answer

    async def _once(self, request: bytes, last: bool, patience_s: float) -> Answer | None:
        reader, writer = await self._connection()
        writer.write(request)
        try:
            async with asyncio.timeout(patience_s):
                answer = await _read(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.hang_up()
            return None
        except TimeoutError:
            self.hang_up()
            raise
        if last or answer.headers.get("connection", "").lower() == "close":
            self.hang_up()
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self._reader, self._writer


async def _read(reader: asyncio.StreamReader) -> Answer:
    start = await reader.readuntil(b"\r\n\r\n")
    first, *lines = start.decode("latin-1").strip().split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    status = int(first.split(" ")[1])
    if status == 100:
        return await _read(reader)
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Answer(status, headers, body)
