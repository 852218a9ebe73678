"""Worker processes that stop in the middle of a verification, until a test lets them go on.

Python reads `sitecustomize` from PYTHONPATH, which a server hands on to its workers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

PATCH = """
import sys
if "broker.concurrency.worker_main" in sys.orig_argv:
    import os, socket
    from broker.results import verify as steps
    verify = steps.verify
    def held(handed, upload):
        with socket.create_connection(("127.0.0.1", {port})) as line:
            line.sendall(b"%d\\n" % os.getpid())
            line.recv(1)
        return verify(handed, upload)
    steps.verify = held
"""


class Held:
    """Hears of verifications as they begin."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )
        self._writer: asyncio.StreamWriter | None = None

    async def begun(self) -> int:
        """Wait until a verification has begun, and return its worker's process id."""
        async with asyncio.timeout(30):
            reader, self._writer = await self._lines.get()
            return int(await reader.readline())

    def go_on(self) -> None:
        """Let the one that was heard of last go on."""
        assert self._writer is not None
        self._writer.close()

    async def close(self) -> None:
        """Let all go on. A worker that was ended meanwhile has hung up."""
        while not self._lines.empty():
            self._lines.get_nowait()[1].close()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A worker connects."""
        self._lines.put_nowait((reader, writer))


@asynccontextmanager
async def held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Held]:
    """Hold the workers of servers that are started within."""
    heard = Held()
    async with await asyncio.start_server(heard.hear, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        (folder / "sitecustomize.py").write_text(PATCH.format(port=port))
        with monkeypatch.context() as patched:
            patched.setenv("PYTHONPATH", str(folder))
            try:
                yield heard
            finally:
                await heard.close()
