"""Runners sign on and off; admins decide whose keys may.

The way of a registration: key on the allowlist, signature, audience, clock; then one transaction,
which holds the key against a revocation, records the nonce and the runner. The same request again
gets the same answer: its token is made again from what the nonce's row remembers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from auth.errors import BadSignature, InvalidKey
from auth.keys import RunnerKey, digest_of
from auth.tokens import LEEWAY, RunnerIdentity, Tokens
from broker.audit.log import Actor, record
from broker.concurrency.batching import Batcher
from broker.concurrency.ttl_cache import TTLCache
from broker.documents.times import parse_time
from broker.errors import (
    ClockSkew,
    InvalidRequest,
    KeyNotAllowed,
    KeyRevoked,
    NonceReused,
    UnknownQuantization,
    Violation,
)
from broker.jobs import quantizations
from broker.leases.lease_keys import LeaseKey, LeaseKeys
from broker.leases.matching import Capabilities
from broker.runners import declared_vram
from broker.runners.revocations import Revocations, Revoked
from config.settings import Settings
from db import models, run_queue, runner_keys, runners
from db.pool import Executor, retries


@dataclass(frozen=True, slots=True)
class SignOn:
    """A registration that was accepted."""

    created: bool
    runner_id: str
    fingerprint: str
    instance_id: UUID
    access_token: str
    capabilities: dict[str, Any]
    max_leases: int
    held: list[asyncpg.Record]


class Registry:
    """Signs runners on and off."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        settings: Settings,
        tokens: Tokens,
        revocations: Revocations,
        keys: LeaseKeys,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._tokens = tokens
        self._revocations = revocations
        self._keys = keys
        self._standings: TTLCache[str, asyncpg.Record] = TTLCache()
        # One look for all claims that wait together.
        self._batcher: Batcher[str, asyncpg.Record | None] = Batcher(self._look)
        self._quantizations: TTLCache[str, tuple[str, ...]] = TTLCache()

    @retries
    async def register(
        self, registration: dict[str, Any], sig: dict[str, str], address: str | None = None
    ) -> SignOn:
        """Sign a runner on, which asks from `address`.

        Raises InvalidRequest (the key), KeyNotAllowed, KeyRevoked, BadSignature, WrongAudience,
        ClockSkew, UnknownQuantization or NonceReused, in this order.
        """
        key = parse_key(registration["public_key"], "/registration/public_key")
        known = await self.known_quantizations()
        check_allowed(await runner_keys.find(self._pool, key.fingerprint))
        # Possession is proved before anything else is told: public keys are public.
        key.verify(registration, sig["sha256"], sig["signature"])
        if registration["audience"] != self._settings.public_url:
            raise BadSignature(
                f"It was signed for another server: sign it for {self._settings.public_url}."
            )
        self._check_clock(parse_time(registration["signed_at"], "/registration/signed_at"))
        declared = recognized(registration["capabilities"], known, "/registration")
        declared_vram.check(declared, "/registration")
        registration = {**registration, "capabilities": declared}
        async with self._pool.acquire() as connection, connection.transaction():
            # Once more, and locked like a claim's: a revocation that runs beside us is waited for,
            # and seen.
            allowed = check_allowed(await runner_keys.find_for_share(connection, key.fingerprint))
            nonce = await self._record(connection, registration, allowed["runner_id"], key, address)
        return await self._sign_on(registration, allowed, nonce)

    async def me(self, runner: RunnerIdentity) -> dict[str, Any]:
        """Return what we know of a runner: its standing, its leases, whether it is paused."""
        standing = await self._standing(runner.fingerprint)
        return {
            "runner_id": runner.runner_id,
            "key_fingerprint": runner.fingerprint,
            "capabilities": capped(standing["capabilities"], standing["capability_caps"]),
            "max_leases": standing["max_leases"] or self._settings.max_leases,
            "paused": standing["paused"],
            "pause_reason": standing["pause_reason"],
            "held_leases": await self.held(runner),
        }

    async def capabilities(
        self, runner: RunnerIdentity, declared: Mapping[str, Any] | None
    ) -> Capabilities:
        """Return what a runner may be given: what it declares now, or declared when it registered.

        An admin's cap wins over either. Raises UnknownQuantization.
        """
        standing = await self._standing(runner.fingerprint)
        if declared is None:
            declared = standing["capabilities"]
        else:
            declared = recognized(declared, await self.known_quantizations(), "")
            declared_vram.check(declared, "")
        effective = capped(declared, standing["capability_caps"])
        return Capabilities(int(effective["vram_gb"]), tuple(sorted(effective["quantizations"])))

    async def held(self, runner: RunnerIdentity) -> list[asyncpg.Record]:
        """Return the live leases of a runner, oldest first."""
        return await run_queue.held_by(self._pool, runner.runner_id)

    @retries
    async def sign_off(self, runner: RunnerIdentity, address: str | None) -> list[UUID]:
        """Revoke the token and hand back what this process holds; return these runs.

        The token first: what it claims beside us is either seen and handed back, or refused.
        """
        key, by = runner.fingerprint, Actor(f"runner:{runner.runner_id}", address)
        async with self._pool.acquire() as connection, connection.transaction():
            await runner_keys.revoke_token(connection, runner.jti, runner.dead_at, key)
            freed = await run_queue.hand_back_all(
                connection, key, runner.instance_id, "the runner signed off", by
            )
            await runners.sign_off(connection, runner.runner_id, runner.instance_id)
            await record(
                connection,
                by,
                "runner.sign_off",
                f"key:{key}",
                runner_id=runner.runner_id,
                jti=str(runner.jti),
            )
        self._keys.drop(LeaseKey(row["queue_id"], row["lease_seq"]) for row in freed)
        remaining = runner.dead_at - datetime.now(UTC)
        await self._revocations.write([Revoked(None, runner.jti, remaining)])
        return [row["run_id"] for row in freed]

    async def known_quantizations(self) -> tuple[str, ...]:
        """Return the quantizations of upstream's table, remembered for a second.

        No longer: one that is added to the table counts at once, in every process.
        """
        known = self._quantizations.get("table")
        if known is None:
            known = tuple((await models.lookups(self._pool))["quantization"])
            self._quantizations.put([("table", known)])
        return known

    async def _standing(self, fingerprint: str) -> asyncpg.Record:
        """Return a runner's row beside its key's, remembered for a second: claims come often."""
        remembered = self._standings.get(fingerprint)
        if remembered is not None:
            return remembered
        standing = await self._batcher.submit(fingerprint)
        if standing is None:
            raise KeyNotAllowed("This runner key has never registered here: register first.")
        self._standings.put([(fingerprint, standing)])
        return standing

    async def _look(self, fingerprints: Sequence[str]) -> list[asyncpg.Record | None]:
        rows = await runners.standings(self._pool, fingerprints)
        found = {row["fingerprint"]: row for row in rows}
        return [found.get(fingerprint) for fingerprint in fingerprints]

    def _check_clock(self, signed_at: datetime) -> None:
        skew_s = (signed_at - datetime.now(UTC)).total_seconds()
        if abs(skew_s) > self._settings.clock_skew_s:
            raise ClockSkew(skew_s)

    async def _record(
        self,
        connection: Executor,
        registration: dict[str, Any],
        runner_id: str,
        key: RunnerKey,
        address: str | None,
    ) -> runners.Nonce:
        """Write the nonce and the runner; return the nonce's row, the earlier one on a replay."""
        before = await runners.find(connection, runner_id)
        nonce = runners.Nonce(
            key.fingerprint,
            registration["nonce"],
            digest_of(registration),
            uuid4(),
            datetime.now(UTC).replace(microsecond=0),
            self._nonce_kept_until(),
            created=before is None,
            address=address,
        )
        if await runners.remember_nonce(connection, nonce):
            runner = _signed_on(registration, runner_id, key, address)
            await runners.upsert(connection, runner)
            if before is None or _differs(before, runner):
                await _record_sign_on(connection, runner, nonce.jti)
            self._standings.forget(key.fingerprint)
            return nonce
        seen = await runners.find_nonce(connection, key.fingerprint, nonce.nonce)
        if seen is None or seen.request_sha256 != nonce.request_sha256:
            raise NonceReused
        return seen

    def _nonce_kept_until(self) -> datetime:
        """When no process takes a signature or a token of now any more, whatever its clock.

        A nonce that were forgotten before would let the same request in as a new one; and admins
        see a living token by its row.
        """
        signature = timedelta(seconds=2 * self._settings.clock_skew_s) + 2 * LEEWAY
        return datetime.now(UTC) + max(signature, self._tokens.life)

    async def _sign_on(
        self, registration: dict[str, Any], allowed: asyncpg.Record, nonce: runners.Nonce
    ) -> SignOn:
        runner_id, instance_id = allowed["runner_id"], UUID(registration["instance_id"])
        return SignOn(
            nonce.created,
            runner_id,
            nonce.fingerprint,
            instance_id,
            self._tokens.mint(
                runner_id, nonce.fingerprint, instance_id, nonce.jti, nonce.issued_at
            ),
            capped(registration["capabilities"], allowed["capability_caps"]),
            allowed["max_leases"] or self._settings.max_leases,
            await run_queue.held_by(self._pool, runner_id),
        )


def check_allowed(key: asyncpg.Record | None) -> asyncpg.Record:
    """Return the allowlist's row; raise KeyNotAllowed or KeyRevoked unless it is good now."""
    if key is None:
        raise KeyNotAllowed
    not_after = key["not_after"]
    if key["revoked_at"] is not None or (not_after is not None and not_after <= datetime.now(UTC)):
        raise KeyRevoked
    return key


def recognized(capabilities: Mapping[str, Any], known: Sequence[str], at: str) -> dict[str, Any]:
    """Return the capabilities with the quantizations named as the table does: `Q4_K_M` is q4_k_m.

    Raises UnknownQuantization, with the known ones, if a runner declares others.
    """
    declared = capabilities["quantizations"]
    found = [quantizations.find(name, known) for name in declared]
    unknown = tuple(
        Violation(f"{at}/capabilities/quantizations/{i}", "is not a quantization we know")
        for i, name in enumerate(found)
        if name is None
    )
    if unknown:
        raise UnknownQuantization(f"Known quantizations: {', '.join(known)}.", unknown)
    return {**capabilities, "quantizations": list(dict.fromkeys(found))}


def capped(declared: Mapping[str, Any], caps: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the capabilities in effect: an admin's cap wins over a declared value."""
    effective = dict(declared)
    if caps and "vram_gb" in caps:
        effective["vram_gb"] = min(effective["vram_gb"], caps["vram_gb"])
    if caps and "quantizations" in caps:
        kept = [name for name in effective["quantizations"] if name in caps["quantizations"]]
        effective["quantizations"] = kept
    return effective


def parse_key(text: str, at: str) -> RunnerKey:
    """Read a public key of a request body; InvalidRequest points to where it stood."""
    try:
        return RunnerKey.parse(text)
    except InvalidKey as error:
        raise InvalidRequest(str(error), (Violation(at, str(error)),)) from None


def _differs(before: asyncpg.Record, now: runners.SignedOn) -> bool:
    """Return whether another process signs on, or from elsewhere, and not only for a new token."""
    known = (before["key_fingerprint"], before["instance_id"], before["address"])
    return known != (now.fingerprint, now.instance_id, now.address)


async def _record_sign_on(connection: Executor, runner: runners.SignedOn, jti: UUID) -> None:
    await record(
        connection,
        Actor(f"runner:{runner.runner_id}", runner.address),
        "runner.sign_on",
        f"key:{runner.fingerprint}",
        runner_id=runner.runner_id,
        instance_id=str(runner.instance_id),
        hostname=runner.hostname,
        jti=str(jti),
    )


def _signed_on(
    registration: dict[str, Any], runner_id: str, key: RunnerKey, address: str | None
) -> runners.SignedOn:
    return runners.SignedOn(
        runner_id=runner_id,
        public_key=key.text,
        hostname=registration["hostname"],
        process_id=_int(registration.get("process_id")),
        effective_user=registration.get("effective_user"),
        instance_id=UUID(registration["instance_id"]),
        capabilities=registration["capabilities"],
        version=registration.get("version"),
        fingerprint=key.fingerprint,
        address=address,
    )


def _int(value: float | None) -> int | None:
    # JSON Schema counts 4711.0 as an integer; the database driver does not.
    return None if value is None else int(value)
