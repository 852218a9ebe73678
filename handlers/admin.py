"""Admins: the allowlist, and the queue from above. Each address names the scope it needs."""

import base64
from typing import Any, ClassVar
from urllib.parse import urlencode
from uuid import UUID

import asyncpg
from tornado.web import URLSpec

from broker.admin.runner_keys import Revocation
from broker.audit.log import Admin
from broker.documents.paging import read_whole
from broker.services import Services
from handlers.base import UUID_PATH, Handler, read_flag
from handlers.queue import idempotency_key

MIB = 1024 * 1024
FINGERPRINT_PATH = r"([0-9a-f]{64})"
PAGE_DEFAULT = "100"


class AdminHandler(Handler):
    """A request of an admin, whose token has the scope that its method needs."""

    max_body_bytes = MIB
    scopes: ClassVar[dict[str, str]] = {}
    admin: Admin

    async def authenticate(self) -> None:
        """Learn which admin sends this, and whether they may."""
        scope, token = self.scopes[self.request.method or ""], self.bearer_token()
        # An admin who works is not shut out by a flood from the same address.
        if not self.services.credentials.was_good(token):
            await self.throttle()
        self.admin = await self.services.credentials.admin(token, scope, self.client_address)

    def page_size(self, asked: dict[str, str]) -> int:
        """Return the query's limit. Raises InvalidRequest for what is no number."""
        return read_whole("/limit", asked.get("limit", PAGE_DEFAULT))

    def link_next(self, asked: dict[str, str], cursor: str | None) -> None:
        """Say where the next page is, by the same query, unless this was the last one."""
        if cursor is not None:
            query = urlencode({**asked, "cursor": cursor})
            self.set_header("Link", f'<{self.request.path}?{query}>; rel="next"')


class RunnerKeysHandler(AdminHandler):
    """GET and POST /api/admin/runner-keys."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read", "POST": "admin"}

    async def get(self) -> None:
        """List the allowlist, revoked keys included."""
        keys = await self.services.allowlist.list_all()
        self.answer(200, {"keys": [shown_key(row) for row in keys]})

    async def post(self) -> None:
        """Admit a key: 201, or 200 when this very entry is there."""
        row, created = await self.services.allowlist.add(self.admin, self.read_json("runner_key"))
        self.answer(201 if created else 200, shown_key(row))


class RunnerKeyHandler(AdminHandler):
    """DELETE /api/admin/runner-keys/{fingerprint}."""

    scopes: ClassVar[dict[str, str]] = {"DELETE": "admin"}

    async def check(self) -> None:
        """This DELETE has a body, and a media type to look at."""
        await super().check()
        self.check_media_type()

    async def delete(self, fingerprint: str) -> None:
        """Revoke a key at once, with its leases."""
        reason = self.read_json("revoke")["reason"]
        done: Revocation = await self.services.allowlist.revoke(self.admin, fingerprint, reason)
        self.answer(
            200,
            {
                "fingerprint": done.fingerprint,
                "revoked_at": done.revoked_at,
                "freed_runs": done.freed_runs,
                "results_to_review": done.results_to_review,
            },
        )


class QueueHandler(AdminHandler):
    """GET and POST /api/admin/queue."""

    max_body_bytes = 32 * MIB
    scopes: ClassVar[dict[str, str]] = {"GET": "read", "POST": "operate"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {
        "GET": ("status", "cursor", "limit"),
        "POST": ("dry_run",),
    }

    async def get(self) -> None:
        """List runs, oldest first, a page at a time."""
        asked = self.asked
        limit = self.page_size(asked)
        page = await self.services.queue.page(asked.get("status"), asked.get("cursor"), limit)
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


class RunHandler(AdminHandler):
    """GET /api/admin/queue/{run_id}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

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


def shown_key(row: asyncpg.Record) -> dict[str, Any]:
    """Return a row of the allowlist as admins see it."""
    signer = None
    if row["signer_identity"] is not None:
        signer = {"identity": row["signer_identity"], "issuer": row["signer_issuer"]}
    names = ("fingerprint", "runner_id", "description", "added_at", "added_by", "not_after",
             "max_leases", "capability_caps", "signature_policy", "revoked_at",
             "revoked_reason")  # fmt: skip
    return {
        **{name: row[name] for name in names},
        "public_key": base64.b64encode(row["public_key"]).decode(),
        "signer": signer,
    }


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/admin/runner-keys", RunnerKeysHandler, given),
        URLSpec(rf"/api/admin/runner-keys/{FINGERPRINT_PATH}", RunnerKeyHandler, given),
        URLSpec(r"/api/admin/queue", QueueHandler, given),
        URLSpec(r"/api/admin/queue/requeue", RequeueFailedHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}", RunHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}/cancel", CancelHandler, given),
        URLSpec(rf"/api/admin/queue/{UUID_PATH}/requeue", RequeueHandler, given),
    ]
