"""Admins and accepted results: list, look at, hand out the stored bytes, moderate."""

import base64
import re
from typing import ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.admin.results import wanted_by
from broker.results.bundle import CAPS
from broker.services import Services
from handlers.admin_base import AdminHandler
from handlers.base import UUID_PATH

FILTERS = ("state", "runner_id", "key", "trust", "since")
FILE_PATH = f"({'|'.join(re.escape(name) for name in CAPS)})"


class ResultsHandler(AdminHandler):
    """GET /api/admin/results."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"GET": (*FILTERS, "cursor", "limit")}

    async def get(self) -> None:
        """List accepted results in the order of acceptance, a page at a time."""
        asked = self.asked
        page = await self.services.results.page(
            wanted_by(asked), asked.get("cursor"), self.page_size(asked)
        )
        self.link_next(asked, page.next_cursor)
        self.answer(200, {"results": page.results, "next_cursor": page.next_cursor})


class ResultHandler(AdminHandler):
    """GET /api/admin/results/{run_id}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self, run_id: str) -> None:
        """Show a result: submission, signer, key, files, receipt and the decisions about it."""
        result = await self.services.results.show(UUID(run_id))
        key = result["public_key"]
        shown = None if key is None else base64.b64encode(key).decode()
        self.answer(200, {**result, "public_key": shown})


class ResultRowsHandler(AdminHandler):
    """GET /api/admin/results/{run_id}/rows."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"GET": ("cursor", "limit")}

    async def get(self, run_id: str) -> None:
        """Show the rows that the leaderboard reads of a result, a page of its cells at a time."""
        asked = self.asked
        rows = await self.services.results.rows(
            UUID(run_id), asked.get("cursor"), self.page_size(asked)
        )
        self.link_next(asked, rows["next_cursor"])
        self.answer(200, rows)


class ResultFileHandler(AdminHandler):
    """GET /api/admin/results/{run_id}/files/{name}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self, run_id: str, name: str) -> None:
        """Send a file's bytes as they were received. A browser saves them and opens nothing."""
        file = await self.services.results.open_file(UUID(run_id), name)
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("Content-Disposition", f'attachment; filename="{name}"')
        self.set_header("Content-Length", file.size)
        async for piece in file.pieces:
            self.write(piece)
            await self.flush()  # wait for a slow line here, with one piece in memory
        await self.finish()


class ResultStateHandler(AdminHandler):
    """POST /api/admin/results/{run_id}/state."""

    scopes: ClassVar[dict[str, str]] = {"POST": "admin"}

    async def post(self, run_id: str) -> None:
        """Accept again, supersede, dispute or revoke a result."""
        body = self.read_json("result_state")
        done = await self.services.moderation.decide(
            self.admin, UUID(run_id), body["state"], body["reason"], body.get("former")
        )
        self.answer(
            200,
            {
                "run_id": run_id,
                "former": done.former,
                "state": done.state,
                "changed": done.changed_at is not None,
                "changed_at": done.changed_at,
            },
        )


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    at = rf"/api/admin/results/{UUID_PATH}"
    return [
        URLSpec(r"/api/admin/results", ResultsHandler, given),
        URLSpec(at, ResultHandler, given),
        URLSpec(f"{at}/rows", ResultRowsHandler, given),
        URLSpec(f"{at}/files/{FILE_PATH}", ResultFileHandler, given),
        URLSpec(f"{at}/state", ResultStateHandler, given),
    ]
