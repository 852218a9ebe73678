"""Admins and models: what was learned of the VRAM that a model needs."""

from typing import ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.services import Services
from handlers.admin_base import AdminHandler
from handlers.base import UUID_PATH


class NeedsHandler(AdminHandler):
    """GET /api/admin/model-needs."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self) -> None:
        """List the models whose need was learned from failures."""
        self.answer(200, {"models": await self.services.model_needs.list()})


class NeedHandler(AdminHandler):
    """DELETE /api/admin/model-needs/{model_id}."""

    scopes: ClassVar[dict[str, str]] = {"DELETE": "operate"}

    async def delete(self, model_id: str) -> None:
        """Forget what was learned: the rule counts again."""
        body = self.read_json("revoke")
        await self.services.model_needs.forget(self.admin, UUID(model_id), body["reason"])
        self.answer(200, {"model_id": model_id})


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/admin/model-needs", NeedsHandler, given),
        URLSpec(rf"/api/admin/model-needs/{UUID_PATH}", NeedHandler, given),
    ]
