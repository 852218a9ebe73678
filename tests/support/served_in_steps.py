"""A server in an event loop of its own, for tests that are not coroutines."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, open_fleet


@contextmanager
def serving(
    loop: asyncio.Runner, configured: Settings, sigstore: ThrowawaySigstore
) -> Iterator[Fleet]:
    """Serve in `loop`, which moves only while a step waits for something."""

    async def serve(opened: asyncio.Future[Fleet], done: asyncio.Event) -> None:
        async with open_fleet(configured, sigstore) as fleet:
            opened.set_result(fleet)
            await done.wait()

    async def start() -> tuple[asyncio.Task[None], asyncio.Future[Fleet], asyncio.Event]:
        opened, done = asyncio.get_running_loop().create_future(), asyncio.Event()
        task = asyncio.create_task(serve(opened, done))
        await asyncio.wait([task, opened], return_when=asyncio.FIRST_COMPLETED)
        return task, opened, done

    async def stop(task: asyncio.Task[None], done: asyncio.Event) -> None:
        done.set()
        await task

    task, opened, done = loop.run(start())
    try:
        yield opened.result()
    finally:
        loop.run(stop(task, done))
