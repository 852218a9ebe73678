"""The allowlist: admins admit runner keys, and revoke them at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from auth.errors import PolicyRefused
from auth.signers import Signer, check_signer
from auth.tokens import Tokens
from broker.audit.log import Admin, record
from broker.documents.times import parse_time
from broker.errors import Conflict, InvalidRequest, NotFound, Violation
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.runners.registration import parse_key
from broker.runners.revocations import Revocations, Revoked
from db import run_queue, runner_keys, submissions
from db.pool import retries


@dataclass(frozen=True, slots=True)
class Revocation:
    """The effect of a revocation: the runs it freed, the results that may need a review."""

    fingerprint: str
    revoked_at: datetime
    freed_runs: list[UUID]
    results_to_review: list[UUID]


class Allowlist:
    """The allowlist of runner keys."""

    def __init__(
        self, pool: asyncpg.Pool, tokens: Tokens, revocations: Revocations, keys: LeaseKeys
    ) -> None:
        self._pool = pool
        self._tokens = tokens
        self._revocations = revocations
        self._keys = keys

    async def list_all(self) -> list[asyncpg.Record]:
        """Return every key, oldest first, revoked ones included."""
        return await runner_keys.list_all(self._pool)

    async def show(self, fingerprint: str) -> asyncpg.Record:
        """Return a key's row. Raises NotFound."""
        row = await runner_keys.find(self._pool, fingerprint)
        if row is None:
            raise NotFound(f"There is no key {fingerprint} on the allowlist.")
        return row

    @retries
    async def add(self, by: Admin, wanted: Mapping[str, Any]) -> tuple[asyncpg.Record, bool]:
        """Admit a key; return its row and whether it is new.

        The very same entry sent again is answered with the row that is there. Raises
        InvalidRequest (key or signer) or Conflict.
        """
        key = _new_key(by, wanted)
        async with self._pool.acquire() as connection, connection.transaction():
            row = await runner_keys.add(connection, key)
            if row is not None:
                await record(
                    connection,
                    by.actor,
                    "runner_key.add",
                    f"key:{key.fingerprint}",
                    runner_id=key.runner_id,
                    fingerprint=key.fingerprint,
                )
                return row, True
            there = await runner_keys.find(connection, key.fingerprint)
        if there is None:
            raise Conflict(f"{key.runner_id} has another good key: revoke that one first.")
        if there["revoked_at"] is not None:
            raise Conflict("This key has been revoked, and a revoked key stays so: make a new one.")
        if not _same(there, key):
            raise Conflict(f"This key is on the allowlist already, as {there['runner_id']}.")
        return there, False

    @retries
    async def revoke(self, by: Admin, fingerprint: str, reason: str) -> Revocation:
        """Revoke a key, end its leases and write the audit row, in one transaction.

        Raises NotFound. Revoking again answers what the first time did, but for the runs freed.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            key = await runner_keys.revoke(connection, fingerprint, reason)
            # A statement of its own, after the key's row is locked: its snapshot shows the claims
            # that held the row's lock before us.
            freed = await run_queue.end_leases_of_key(connection, fingerprint, reason, by.actor)
            key = key or await runner_keys.find(connection, fingerprint)
            if key is None:
                raise NotFound("There is no such key on the allowlist.")
            await record(
                connection,
                by.actor,
                "runner_key.revoke",
                f"key:{fingerprint}",
                runner_id=key["runner_id"],
                fingerprint=fingerprint,
                reason=reason,
                freed_runs=[str(row["run_id"]) for row in freed],
            )
        self._keys.drop(LeaseKey(row["queue_id"], row["lease_seq"]) for row in freed)
        await self._revocations.write([Revoked(fingerprint, None, self._tokens.life)])
        # Behind the commit: from there on there are no more, and claims have waited long enough.
        to_review = await submissions.accepted_of_key(self._pool, fingerprint)
        runs = [row["run_id"] for row in freed]
        return Revocation(fingerprint, key["revoked_at"], runs, to_review)


def _new_key(by: Admin, wanted: Mapping[str, Any]) -> runner_keys.NewKey:
    key = parse_key(wanted["public_key"], "/public_key")
    signer = wanted.get("signer")
    policy = wanted.get("signature_policy", "sigstore")
    if signer is not None:
        _check_signer(Signer(signer["identity"], signer["issuer"]), policy)
    not_after = wanted.get("not_after")
    return runner_keys.NewKey(
        fingerprint=key.fingerprint,
        public_key=key.raw,
        runner_id=wanted["runner_id"],
        description=wanted.get("description"),
        added_by=by.name,
        not_after=parse_time(not_after, "/not_after") if not_after else None,
        max_leases=int(wanted["max_leases"]) if "max_leases" in wanted else None,
        capability_caps=wanted.get("capability_caps"),
        signer_identity=signer["identity"] if signer else None,
        signer_issuer=signer["issuer"] if signer else None,
        signature_policy=policy,
    )


def _check_signer(signer: Signer, policy: str) -> None:
    if policy != "sigstore":
        detail = f"means nothing with signature_policy {policy}: leave it out"
        raise InvalidRequest(f"/signer {detail}.", (Violation("/signer", detail),))
    try:
        check_signer(signer)
    except PolicyRefused as error:
        raise InvalidRequest(str(error), (Violation("/signer", str(error)),)) from None


def _same(row: asyncpg.Record, key: runner_keys.NewKey) -> bool:
    """Return whether a row is what `key` asks for (who added it, and when, aside)."""
    names = set(key.__slots__) - {"added_by"}
    return all(row[name] == getattr(key, name) for name in names)
