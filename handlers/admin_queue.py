"""Admin endpoints of the queue: enqueue, list, show, cancel and requeue runs."""

from typing import ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.admin.runs import FILTERS, read_filter
from broker.documents.paging import bad_query
from broker.services import Services
from handlers.admin_base import MIB, AdminHandler
from handlers.base import UUID_PATH, read_flag
from handlers.queue import idempotency_key


class QueueHandler(AdminHandler):
    """GET and POST /api/admin/queue."""

    max_body_bytes = 32 * MIB
    scopes: ClassVar[dict[str, str]] = {"GET": "read", "POST": "operate"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {
        "GET": (*FILTERS, "order", "cursor", "limit"),
        "POST": ("dry_run",),
    }

    async def get(self) -> None:
        """List runs, oldest first or newest first, a page at a time."""
        asked = self.asked
        order = asked.get("order", "oldest")
        if order not in ("oldest", "newest"):
            raise bad_query("/order", "must be oldest or newest")
        page = await self.services.queue.page(
            read_filter(asked),
            asked.get("cursor"),
            self.page_size(asked),
            newest_first=order == "newest",
        )
        self.link_next(asked, page.next_cursor)
        self.answer(200, {"runs": page.runs, "next_cursor": page.next_cursor})

    async def post(self) -> None:
        """Add runs, all or none; with dry_run=1, check everything and add none."""
        dry_run = read_flag("dry_run", self.asked.get("dry_run", "0"))
        body, key = self.read_body(), idempotency_key(self)
        if dry_run:
            checked = await self.services.enqueue.check(body)
            self.answer(200, {"runs": checked, "dry_run": True})
        else:
            self.answer(201, {"runs": await self.services.enqueue.add(self.admin, body, key)})


class BulkHandler(AdminHandler):
    """POST /api/admin/queue/bulk."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self) -> None:
        """Count the runs that fit a filter or, with the count expected, change them."""
        self.answer(200, await self.services.queue.change_many(self.admin, self.read_json("bulk")))


class QueuePausesHandler(AdminHandler):
    """GET /api/admin/queue/pauses."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self) -> None:
        """List the pauses that hold now."""
        self.answer(200, {"pauses": await self.services.pauses.in_force()})


class QueuePauseHandler(AdminHandler):
    """POST /api/admin/queue/pause."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self) -> None:
        """Pause the queue, or one model; runs that are leased go on."""
        body = self.read_json("queue_pause")
        pauses = await self.services.pauses.pause(
            self.admin, body.get("model"), body["reason"], body.get("until")
        )
        self.answer(200, {"pauses": pauses})


class QueueResumeHandler(AdminHandler):
    """POST /api/admin/queue/resume."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self) -> None:
        """End the pause of the queue, or of one model."""
        body = self.read_json("queue_resume")
        pauses = await self.services.pauses.resume(
            self.admin, body.get("model"), body.get("reason")
        )
        self.answer(200, {"pauses": pauses})


class ExplainHandler(AdminHandler):
    """GET /api/admin/queue/{run_id}/explain."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self, run_id: str) -> None:
        """Say why a run is not running, by ordered checks."""
        self.answer(200, await self.services.explain.run(UUID(run_id)))


class RunHandler(AdminHandler):
    """GET and PATCH /api/admin/queue/{run_id}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read", "PATCH": "operate"}

    async def patch(self, run_id: str) -> None:
        """Set the priority or the earliest start of a PENDING run."""
        changed = await self.services.queue.change(
            self.admin, UUID(run_id), self.read_json("run_change")
        )
        self.answer(200, changed)

    async def get(self, run_id: str) -> None:
        """Show a run with its job, its ledger and its receipt."""
        run = await self.services.queue.run(UUID(run_id))
        job = await self.services.queue.job(UUID(run_id))
        self.answer(200, run, members=f'{{"job": {job}}}')


class CancelHandler(AdminHandler):
    """POST /api/admin/queue/{run_id}/cancel."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self, run_id: str) -> None:
        """Cancel a run, or ask the runner that works on it to stop."""
        reason = self.read_json("cancel")["reason"]
        status = await self.services.queue.cancel(self.admin, UUID(run_id), reason)
        cancelled = status == "CANCELLED"
        self.answer(
            200 if cancelled else 202,
            {"run_id": run_id, "status": status, "cancel_requested": not cancelled},
        )


class RequeueHandler(AdminHandler):
    """POST /api/admin/queue/{run_id}/requeue."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self, run_id: str) -> None:
        """Put a run that has no whole result back into the queue."""
        reason = self.read_json("requeue")["reason"]
        self.answer(200, await self.services.queue.requeue(self.admin, UUID(run_id), reason))


class RequeueFailedHandler(AdminHandler):
    """POST /api/admin/queue/requeue."""

    scopes: ClassVar[dict[str, str]] = {"POST": "operate"}

    async def post(self) -> None:
        """Undo what the failures of one runner did to runs."""
        body = self.read_json("requeue_failed")
        done = await self.services.queue.requeue_failed_by(
            self.admin, body["failed_by"], int(body["within_s"]), body["reason"]
        )
        self.answer(200, {"requeued": done})


def routes(services: Services) -> list[URLSpec]:
    """Return the addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/admin/queue", QueueHandler, given),
        URLSpec(r"/api/admin/queue/requeue", RequeueFailedHandler, given),
        URLSpec(r"/api/admin/queue/bulk", BulkHandler, given),
        URLSpec(r"/api/admin/queue/pauses", QueuePausesHandler, given),
        URLSpec(r"/api/admin/queue/pause", QueuePauseHandler, given),
        URLSpec(r"/api/admin/queue/resume", QueueResumeHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}/explain", ExplainHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}", RunHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}/cancel", CancelHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}/requeue", RequeueHandler, given),
    ]
