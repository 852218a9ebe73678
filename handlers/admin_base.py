"""Base of the admin endpoints: the bearer token, the scope that each method needs, and pages."""

from typing import ClassVar
from urllib.parse import urlencode

from broker.audit.log import Admin
from broker.documents.paging import read_whole
from handlers.base import Handler

MIB = 1024 * 1024
PAGE_DEFAULT = "100"


class AdminHandler(Handler):
    """A request of an admin, whose token has the scope that its method needs."""

    max_body_bytes = MIB
    scopes: ClassVar[dict[str, str]] = {}
    admin: Admin
    event: ClassVar[str] = "admin.request"

    async def authenticate(self) -> None:
        """Learn which admin sends this, and whether they may."""
        scope, token = self.scopes[self.request.method or ""], self.bearer_token()
        # An admin who works is not shut out by a flood from the same address.
        if not self.services.credentials.was_good(token):
            await self.throttle()
        self.admin = await self.services.credentials.admin(token, scope, self.client_address)
        self.facts["actor"] = self.admin.actor.name

    def page_size(self, asked: dict[str, str]) -> int:
        """Return the query's limit. Raises InvalidRequest for what is no number."""
        return read_whole("/limit", asked.get("limit", PAGE_DEFAULT))

    def link_next(self, asked: dict[str, str], cursor: str | None) -> None:
        """Say where the next page is, by the same query, unless this was the last one."""
        if cursor is not None:
            query = urlencode({**asked, "cursor": cursor})
            self.set_header("Link", f'<{self.request.path}?{query}>; rel="next"')
