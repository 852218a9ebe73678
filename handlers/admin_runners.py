"""Admins and the fleet: list runners, pause, resume and drain one."""

import re
from typing import ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.documents.paging import bad_query
from broker.services import Services
from handlers.admin_base import AdminHandler
from handlers.base import UUID_PATH

RUNNER_PATH = r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})"


class RunnersHandler(AdminHandler):
    """GET /api/admin/runners."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"GET": ("cursor", "limit")}

    async def get(self) -> None:
        """List the runners that have registered, by name, a page at a time."""
        asked = self.asked
        page = await self.services.runner_admin.page(asked.get("cursor"), self.page_size(asked))
        self.link_next(asked, page.next_cursor)
        self.answer(200, {"runners": page.runners, "next_cursor": page.next_cursor})


class RunnerHandler(AdminHandler):
    """GET /api/admin/runners/{id}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self, runner_id: str) -> None:
        """Show one runner."""
        self.answer(200, await self.services.runner_admin.show(runner_id))


class PauseHandler(AdminHandler):
    """POST /api/admin/runners/{id}/pause."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self, runner_id: str) -> None:
        """Give a runner nothing new; what it holds it may finish."""
        body = self.read_json("pause")
        paused = await self.services.runner_admin.pause(
            self.admin, runner_id, body["reason"], body.get("until")
        )
        self.answer(200, paused)


class ResumeHandler(AdminHandler):
    """POST /api/admin/runners/{id}/resume."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self, runner_id: str) -> None:
        """Undo a pause or a drain."""
        reason = self.read_json("steer").get("reason")
        self.answer(200, await self.services.runner_admin.resume(self.admin, runner_id, reason))


class DrainHandler(AdminHandler):
    """POST /api/admin/runners/{id}/drain."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self, runner_id: str) -> None:
        """Tell a runner, with its next heartbeat, to finish what it holds and stop."""
        reason = self.read_json("steer").get("reason")
        self.answer(200, await self.services.runner_admin.drain(self.admin, runner_id, reason))


class RefusalsHandler(AdminHandler):
    """GET /api/admin/refusals."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {
        "GET": ("run_id", "runner_id", "cursor", "limit")
    }

    async def get(self) -> None:
        """List refused submits, the newest first, a page at a time."""
        asked = self.asked
        run_id, runner_id = asked.get("run_id"), asked.get("runner_id")
        if run_id is not None and not re.fullmatch(UUID_PATH, run_id):
            raise bad_query("/run_id", "must be a UUID in lower case, with its hyphens")
        if runner_id is not None and not re.fullmatch(RUNNER_PATH, runner_id):
            raise bad_query("/runner_id", "must be letters, digits, dot, underscore and hyphen")
        refusals, cursor = await self.services.runner_admin.refusals(
            UUID(run_id) if run_id else None, runner_id, asked.get("cursor"), self.page_size(asked)
        )
        self.link_next(asked, cursor)
        self.answer(200, {"refusals": refusals, "next_cursor": cursor})


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    at = rf"/api/admin/runners/{RUNNER_PATH}"
    return [
        URLSpec(r"/api/admin/runners", RunnersHandler, given),
        URLSpec(r"/api/admin/refusals", RefusalsHandler, given),
        URLSpec(at, RunnerHandler, given),
        URLSpec(f"{at}/pause", PauseHandler, given),
        URLSpec(f"{at}/resume", ResumeHandler, given),
        URLSpec(f"{at}/drain", DrainHandler, given),
    ]
