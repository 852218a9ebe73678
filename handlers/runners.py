"""Runners sign on, ask who they are, and sign off."""

from typing import Any, ClassVar
from uuid import UUID

from tornado.web import URLSpec

from broker.runners.registration import SignOn
from broker.services import Services
from handlers.base import Handler
from handlers.runner_base import RunnerHandler

BUNDLE_SCHEMAS = ["bakeoff-results/v1"]
FAILURES = ["timeout", "infra_error", "load_failure", "oom", "unknown"]
DIRECTIVES = ["continue", "cancel", "drain"]


class RegisterHandler(Handler):
    """POST /api/runners/register: signed by the key it names, so it needs no token."""

    event: ClassVar[str] = "runner.register"

    async def post(self) -> None:
        """Sign a runner on: 201 the first time, 200 afterwards."""
        body = self.read_json("register")
        sign_on = await self.services.registry.register(
            body["registration"], body["sig"], self.client_address
        )
        self.facts |= {"runner_id": sign_on.runner_id, "key_fp": sign_on.fingerprint[:16]}
        self.answer(201 if sign_on.created else 200, self._sign_on(sign_on))

    def _sign_on(self, sign_on: SignOn) -> dict[str, Any]:
        settings = self.services.settings
        return {
            "runner_id": sign_on.runner_id,
            "access_token": sign_on.access_token,
            "token_type": "Bearer",
            "expires_in_s": settings.token_ttl_s,
            "renew_after_s": settings.token_ttl_s * 2 // 3,
            "heartbeat_interval_s": self.services.cadence.interval_s,
            "lease_ttl_s": self.services.cadence.ttl_s,
            "claim_wait_max_s": settings.claim_wait_max_s,
            "max_leases": sign_on.max_leases,
            "capabilities": sign_on.capabilities,
            "vocabularies": {
                "failure_codes": FAILURES,
                "directives": DIRECTIVES,
                "bundle_schema_versions": BUNDLE_SCHEMAS,
            },
            "held_leases": [held_lease(row, sign_on.instance_id) for row in sign_on.held],
        }


class MeHandler(RunnerHandler):
    """GET and DELETE /api/runners/me."""

    async def get(self) -> None:
        """Show the runner, its leases, and whether it is paused."""
        me = await self.services.registry.me(self.runner)
        held = [held_lease(row, self.runner.instance_id) for row in me.pop("held_leases")]
        self.answer(200, {**me, "held_leases": held})

    async def delete(self) -> None:
        """Sign off: release what this process holds and revoke its token."""
        self.services.liveness.forget(self.runner.runner_id, self.runner.instance_id)
        released = await self.services.registry.sign_off(self.runner, self.client_address)
        self.answer(200, {"runner_id": self.runner.runner_id, "released": released})


def held_lease(row: Any, instance_id: UUID) -> dict[str, Any]:
    """Return a live lease of a runner as its process `instance_id` sees it."""
    lease = {name: row[name] for name in ("run_id", "lease_id", "lease_expires_at")}
    return {
        **lease,
        "this_process": row["lease_instance"] == instance_id,
        "resume": f"/api/queue/{row['run_id']}/resume",
    }


def routes(services: Services) -> list[URLSpec]:
    """The addresses of this module."""
    given = {"services": services}
    return [
        URLSpec(r"/api/runners/register", RegisterHandler, given),
        URLSpec(r"/api/runners/me", MeHandler, given),
    ]
