"""HTTP by hand: bytes on a socket, and multipart bodies that no library would write."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx

BOUNDARY = "bakeoff"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
ANSWER_S = 20

Part = tuple[str, bytes]


class Line:
    """One connection, on which a test writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Write, and wait until it is on its way."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, method: str = "GET") -> httpx.Response | None:
        """Read one answer; None when the server hung up without one. A HEAD's has no body."""
        async with asyncio.timeout(ANSWER_S):
            try:
                start = await self._reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return None
            first, *lines = start.decode("latin-1").strip().split("\r\n")
            pairs = (line.split(":", 1) for line in lines)
            headers = httpx.Headers([(name, value.strip()) for name, value in pairs])
            length = 0 if method == "HEAD" else int(headers.get("content-length", 0))
            body = await self._reader.readexactly(length)
            return httpx.Response(int(first.split(" ")[1]), headers=headers, content=body)


@asynccontextmanager
async def line_to(url: str, host: str | None = None) -> AsyncIterator[Line]:
    """Yield a connection to a server, from an address of this machine if it matters."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(
        address.hostname, address.port, local_addr=(host, 0) if host else None
    )
    try:
        yield Line(reader, writer)
    finally:
        writer.close()


async def exchange(url: str, request: bytes) -> httpx.Response | None:
    """Send one request as it is and return the answer."""
    async with line_to(url) as line:
        await line.send(request)
        return await line.answer()


def head(method: str, path: str, *headers: str) -> bytes:
    """A request up to its body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: queue.test", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def form(*parts: Part, end: bool = True) -> bytes:
    """A multipart body; not `end` leaves the last boundary out."""
    body = b"".join(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        .encode() + content + b"\r\n"
        for name, content in parts
    )  # fmt: skip
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")
