"""Admins and the audit trail: who did what, and the hash chain that holds it together."""

from typing import ClassVar

from tornado.web import URLSpec

from broker.audit.log import FILTERS
from broker.services import Services
from handlers.admin_base import AdminHandler


class AuditHandler(AdminHandler):
    """GET /api/admin/audit."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"GET": (*FILTERS, "cursor", "limit")}

    async def get(self) -> None:
        """List the trail, newest first, a page at a time."""
        asked = self.asked
        page = await self.services.audit.page(asked, asked.get("cursor"), self.page_size(asked))
        self.link_next(asked, page.next_cursor)
        self.answer(200, {"rows": page.rows, "next_cursor": page.next_cursor})


class AuditChainHandler(AdminHandler):
    """GET /api/admin/audit/chain."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}
    parameters: ClassVar[dict[str, tuple[str, ...]]] = {"GET": ("after", "cursor", "limit")}

    async def get(self) -> None:
        """List the entries of the chain in their order, a page at a time: what to verify it by."""
        asked = self.asked
        page = await self.services.audit.chain(
            asked.get("after"), asked.get("cursor"), self.page_size(asked)
        )
        self.link_next(asked, page.next_cursor)
        self.answer(
            200,
            {
                "entries": page.entries,
                "unchained": page.unchained,
                "next_cursor": page.next_cursor,
            },
        )


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/admin/audit", AuditHandler, given),
        URLSpec(r"/api/admin/audit/chain", AuditChainHandler, given),
    ]
