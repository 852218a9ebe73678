"""Admins and tokens: those of admins, and those that runners were given."""

from typing import ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.services import Services
from handlers.admin_base import AdminHandler
from handlers.admin_runners import RUNNER_PATH
from handlers.base import UUID_PATH


class TokensHandler(AdminHandler):
    """GET and POST /api/admin/tokens."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read", "POST": "admin"}

    async def get(self) -> None:
        """List the admin tokens, revoked ones included."""
        self.answer(200, {"tokens": await self.services.tokens.list_all()})

    async def post(self) -> None:
        """Mint a token: the one answer that has its secret."""
        minted = await self.services.tokens.mint(self.admin, self.read_json("admin_token"))
        self.answer(201, minted)


class _RevokingHandler(AdminHandler):
    """A DELETE that says why, in a body."""

    async def check(self) -> None:
        """This DELETE has a body, and a media type to look at."""
        await super().check()
        self.check_media_type()


class TokenHandler(_RevokingHandler):
    """DELETE /api/admin/tokens/{token_id}."""

    scopes: ClassVar[dict[str, str]] = {"DELETE": "admin"}

    async def delete(self, token_id: str) -> None:
        """Revoke an admin token at once, in every process."""
        reason = self.read_json("revoke")["reason"]
        self.answer(200, await self.services.tokens.revoke(self.admin, UUID(token_id), reason))


class RunnerTokensHandler(AdminHandler):
    """GET /api/admin/runners/{id}/tokens."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read"}

    async def get(self, runner_id: str) -> None:
        """List the tokens of a runner that have not expired, by their jti."""
        tokens = await self.services.runner_tokens.list_living(runner_id)
        self.answer(200, {"runner_id": runner_id, "tokens": tokens})


class RunnerTokenHandler(_RevokingHandler):
    """DELETE /api/admin/runners/{id}/tokens/{jti}."""

    scopes: ClassVar[dict[str, str]] = {"DELETE": "admin"}

    async def delete(self, runner_id: str, jti: str) -> None:
        """Revoke one token of a runner: its key stays good, and its leases stay its own."""
        reason = self.read_json("revoke")["reason"]
        revoked = await self.services.runner_tokens.revoke(self.admin, runner_id, UUID(jti), reason)
        self.answer(200, revoked)


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    of_runner = rf"/api/admin/runners/{RUNNER_PATH}/tokens"
    return [
        URLSpec(r"/api/admin/tokens", TokensHandler, given),
        URLSpec(rf"/api/admin/tokens/{UUID_PATH}", TokenHandler, given),
        URLSpec(of_runner, RunnerTokensHandler, given),
        URLSpec(rf"{of_runner}/{UUID_PATH}", RunnerTokenHandler, given),
    ]
