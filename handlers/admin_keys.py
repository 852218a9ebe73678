"""Admin endpoints of the allowlist: list, add and revoke runner keys."""

import base64
from typing import Any, ClassVar

import asyncpg
from tornado.web import URLSpec

from broker.admin.runner_keys import Revocation
from broker.services import Services
from handlers.admin_base import AdminHandler

FINGERPRINT_PATH = r"([0-9a-f]{64})"


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
    """GET and DELETE /api/admin/runner-keys/{fingerprint}."""

    scopes: ClassVar[dict[str, str]] = {"GET": "read", "DELETE": "admin"}

    async def check(self) -> None:
        """Check the media type of a DELETE too: it has a body."""
        await super().check()
        if self.request.method == "DELETE":
            self.check_media_type()

    async def get(self, fingerprint: str) -> None:
        """Show a key of the allowlist."""
        self.answer(200, shown_key(await self.services.allowlist.show(fingerprint)))

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
    """Return the addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/admin/runner-keys", RunnerKeysHandler, given),
        URLSpec(rf"/api/admin/runner-keys/{FINGERPRINT_PATH}", RunnerKeyHandler, given),
    ]
