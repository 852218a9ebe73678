"""Registration: who may sign on, by what proof, and what a runner is told."""

import asyncio
import base64
import hashlib
import json
import secrets
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from nacl.signing import SigningKey

from auth.keys import canonical_json
from auth.tokens import LEEWAY
from config.settings import Settings
from db import runner_keys
from sandbox.runner.identity import public_key_text
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import AUDIENCE, CAPABILITIES, Runner, code_of, open_fleet

MakeSettings = Callable[..., Settings]
# The order of the group: S + L verifies where S is not checked to be below it.
L = 2**252 + 27742317777372353535851937790883648493


def registration_of(runner: Runner, **changes: Any) -> dict[str, Any]:
    """Return what a runner signs, with changes; None removes a member."""
    registration = {
        "purpose": "register",
        "audience": AUDIENCE,
        "public_key": public_key_text(runner.key),
        "hostname": "gpu-1.example",
        "instance_id": str(runner.instance_id),
        "capabilities": CAPABILITIES,
        "signed_at": datetime.now(UTC).isoformat(),
        "nonce": secrets.token_hex(16),
        **changes,
    }
    return {name: value for name, value in registration.items() if value is not None}


def signature_of(registration: dict[str, Any], key: SigningKey) -> tuple[str, bytes]:
    """Return the digest and the raw signature of bakeoff's scheme."""
    digest = hashlib.sha256(canonical_json(registration)).digest()
    return digest.hex(), key.sign(digest).signature


def body_of(registration: dict[str, Any], sha256: str, signature: bytes) -> bytes:
    """Return a request body."""
    sig = {"sha256": sha256, "signature": base64.b64encode(signature).decode()}
    return json.dumps({"registration": registration, "sig": sig}).encode()


def signed(runner: Runner, **changes: Any) -> bytes:
    """Return the body of a well signed registration."""
    registration = registration_of(runner, **changes)
    return body_of(registration, *signature_of(registration, runner.key))


def in_s(seconds: float) -> str:
    """Return the time in so many seconds, RFC 3339."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.gen_test
async def test_a_runner_is_told_everything_it_needs(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit(max_leases=3)
        first = await runner.register(signed(runner, process_id=4711, effective_user="bench"))
        assert first.status_code == 201
        body = first.json()
        for name in ("access_token", "server_time"):
            assert body.pop(name)
        assert body == {
            "runner_id": "runner-a",
            "token_type": "Bearer",
            "expires_in_s": 900,
            "renew_after_s": 600,
            "heartbeat_interval_s": 30,
            "lease_ttl_s": 300,
            "claim_wait_max_s": 50,
            "max_leases": 3,
            "capabilities": CAPABILITIES,
            "vocabularies": {
                "failure_codes": ["timeout", "infra_error", "load_failure", "oom", "unknown"],
                "directives": ["continue", "cancel", "drain"],
                "bundle_schema_versions": ["bakeoff-results/v1"],
            },
            "held_leases": [],
        }
        row = await fleet.pool.fetchrow("SELECT * FROM runners")
        assert row is not None
        assert (row["runner_id"], row["hostname"]) == ("runner-a", "gpu-1.example")
        assert (row["process_id"], row["effective_user"]) == (4711, "bench")
        assert (row["public_key"], row["status"]) == (public_key_text(runner.key), "IDLE")
        # Afterwards 200, and a token of its own.
        again = await runner.register()
        assert again.status_code == 200
        assert again.json()["access_token"] != first.json()["access_token"]


@pytest.mark.gen_test
async def test_the_same_request_again_is_answered_the_same(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        body = signed(runner)
        answers = [
            *await asyncio.gather(runner.register(body), runner.register(body)),
            await runner.register(body),
        ]
        said = [{**answer.json(), "server_time": ""} for answer in answers]
        assert said[0] == said[1] == said[2]
        assert [answer.status_code for answer in answers] == [201, 201, 201]
        assert await fleet.pool.fetchval("SELECT count(*) FROM registration_nonces") == 1


@pytest.mark.gen_test
async def test_a_nonce_serves_one_registration(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner, other = await fleet.admit(), await fleet.admit("runner-b")
        nonce = secrets.token_hex(16)
        assert (await runner.register(signed(runner, nonce=nonce))).status_code == 201
        reused = await runner.register(signed(runner, nonce=nonce, hostname="gpu-2"))
        assert code_of(reused) == (409, "nonce_reused")
        hostname = "SELECT hostname FROM runners WHERE runner_id = 'runner-a'"
        assert await fleet.pool.fetchval(hostname) == "gpu-1.example"
        # Nonces of two keys have nothing to do with each other.
        assert (await other.register(signed(other, nonce=nonce))).status_code == 201


@pytest.mark.gen_test
async def test_a_nonce_is_kept_as_long_as_its_signature_may_be_replayed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        await runner.register(signed(runner, signed_at=in_s(299)))
        kept = "SELECT keep_until - now() FROM registration_nonces"
        # As long as any machine takes the signature, whatever its clock.
        assert await fleet.pool.fetchval(kept) > timedelta(seconds=598) + 2 * LEEWAY
        await fleet.pool.execute("UPDATE registration_nonces SET keep_until = now()")
        await runner.register()
        assert await fleet.pool.fetchval("SELECT count(*) FROM registration_nonces") == 1


@pytest.mark.gen_test
async def test_a_clock_may_be_five_minutes_off_and_is_told_by_how_much_it_is_more(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        for skew_s in (-290, 290):
            answer = await runner.register(signed(runner, signed_at=in_s(skew_s)))
            assert answer.is_success
        for skew_s in (-310, 310, -600, 600):
            answer = await runner.register(signed(runner, signed_at=in_s(skew_s)))
            assert code_of(answer) == (401, "clock_skew")
            assert abs(answer.json()["skew_s"] - skew_s) <= 5
            assert answer.json()["server_time"].endswith("Z")
            assert ("ahead of" if skew_s > 0 else "behind") in answer.json()["detail"]


@pytest.mark.gen_test
async def test_no_signature_but_the_keys_own_over_these_words_proves_anything(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        good = registration_of(runner)
        digest, signature = signature_of(good, runner.key)
        malleated = (int.from_bytes(signature[32:], "little") + L).to_bytes(32, "little")
        other = {**good, "hostname": "gpu-2"}
        forged = {
            "another body": body_of(other, digest, signature),
            "another body, its digest": body_of(
                other, signature_of(other, runner.key)[0], signature
            ),
            "another key": body_of(good, *signature_of(good, SigningKey.generate())),
            "S + L": body_of(good, digest, signature[:32] + malleated),
            "63 bytes": body_of(good, digest, signature[:63]),
            "65 bytes": body_of(good, digest, signature + b"\0"),
            "another server": signed(runner, audience="https://queue.elsewhere"),
            "the same server, spelled otherwise": signed(runner, audience=AUDIENCE + "/"),
        }
        for name, body in forged.items():
            answer = await runner.register(body)
            assert code_of(answer) == (401, "bad_signature"), name
        for table in ("runners", "registration_nonces"):
            assert await fleet.pool.fetchval(f"SELECT count(*) FROM {table}") == 0
        assert (await runner.register(body_of(good, digest, signature))).status_code == 201


@pytest.mark.gen_test
async def test_only_keys_that_are_good_now_may_sign_on(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        stranger = Runner(fleet, "runner-z")
        assert code_of(await stranger.register()) == (403, "key_not_allowed")
        revoked = await fleet.admit("runner-b")
        body = signed(revoked)
        assert (await revoked.register(body)).status_code == 201
        await fleet.revoke(revoked)
        assert code_of(await revoked.register()) == (403, "key_revoked")
        # Neither is a registration from before the revocation answered again.
        assert code_of(await revoked.register(body)) == (403, "key_revoked")
        over = await fleet.admit("runner-c", not_after=in_s(-1))
        assert code_of(await over.register()) == (403, "key_revoked")
        until = await fleet.admit("runner-d", not_after=in_s(1000))
        assert (await until.register()).status_code == 201


@pytest.mark.gen_test
async def test_a_registration_waits_for_a_revocation_in_flight_and_is_then_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        async with fleet.transaction() as connection:
            await runner_keys.revoke(connection, runner.fingerprint, "stolen")
            registering = asyncio.create_task(runner.register())
            await fleet.until_blocked()
        assert code_of(await registering) == (403, "key_revoked")


@pytest.mark.gen_test
async def test_a_second_process_of_a_runner_hears_what_the_first_one_holds(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        first = await fleet.sign_on()
        await fleet.enqueue()
        job = await first.take()
        second = Runner(fleet, "runner-a", first.key)
        answer = await second.register(signed(second))
        held = [
            {
                **{name: job[name] for name in ("run_id", "lease_id", "lease_expires_at")},
                "this_process": False,
                "resume": f"/api/queue/{job['run_id']}/resume",
            }
        ]
        assert answer.json()["held_leases"] == held
        me = await fleet.http.get("/api/runners/me", headers=second.headers)
        assert me.json()["held_leases"] == held
        assert (await second.heartbeat(job)).status_code == 200
        assert (await second.release(job)).json()["status"] == "PENDING"


@pytest.mark.gen_test
async def test_a_name_goes_on_with_a_new_key_and_not_with_the_revoked_ones_token(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        old = await fleet.sign_on()
        await fleet.revoke(old)
        new = await fleet.admit()
        assert (await new.register()).status_code == 200
        await fleet.enqueue()
        assert code_of(await old.claim()) == (403, "key_revoked")
        await new.take()


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "a purpose of its own": ("/registration/purpose", {"purpose": "submit"}),
    "an unknown member": ("/registration/gpu", {"gpu": 1}),
    "a host name with a space": ("/registration/hostname", {"hostname": "gpu 1"}),
    "a host name that ends in a newline": ("/registration/hostname", {"hostname": "gpu\n"}),
    "a host name of 254": ("/registration/hostname", {"hostname": "a" * 254}),
    "right-to-left marks": ("/registration/version", {"version": "1.0\u202e"}),
    "VRAM as text": (
        "/registration/capabilities/vram_gb",
        {"capabilities": {**CAPABILITIES, "vram_gb": "24"}},
    ),
    "half a GB": (
        "/registration/capabilities/vram_gb",
        {"capabilities": {**CAPABILITIES, "vram_gb": 24.5}},
    ),
    "VRAM that is true": (
        "/registration/capabilities/vram_gb",
        {"capabilities": {**CAPABILITIES, "vram_gb": True}},
    ),
    "negative VRAM": (
        "/registration/capabilities/vram_gb",
        {"capabilities": {**CAPABILITIES, "vram_gb": -1}},
    ),
    "VRAM beyond all": (
        "/registration/capabilities/vram_gb",
        {"capabilities": {**CAPABILITIES, "vram_gb": 10**300}},
    ),
    "an instance in upper case": (
        "/registration/instance_id",
        {"instance_id": str(uuid.uuid4()).upper()},
    ),
    "a time without an offset": ("/registration/signed_at", {"signed_at": "2026-01-01T00:00:00"}),
    "a leap second": ("/registration/signed_at", {"signed_at": "2026-06-30T23:59:60Z"}),
    "a short nonce": ("/registration/nonce", {"nonce": "a" * 15}),
    "a process id that no row takes": ("/registration/process_id", {"process_id": 2**31}),
    "an identity point for a key": (
        "/registration/public_key",
        {"public_key": base64.b64encode((1).to_bytes(32, "little")).decode()},
    ),
    "a key with a newline": (
        "/registration/public_key",
        {"public_key": public_key_text(SigningKey(b"k" * 32)) + "\n"},
    ),
}


@pytest.mark.gen_test
async def test_what_does_not_fit_the_contract_is_told_where(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.admit()
        for name, (pointer, changes) in BAD.items():
            answer = await runner.register(signed(runner, **changes))
            assert code_of(answer) == (422, "invalid_request"), (name, answer.text)
            assert [each["pointer"] for each in answer.json()["errors"]] == [pointer], name
        unknown = {**CAPABILITIES, "quantizations": ["q8_0", "q9_9"]}
        answer = await runner.register(signed(runner, capabilities=unknown))
        assert code_of(answer) == (422, "unknown_quantization")
        assert "q4_k_m" in answer.json()["detail"]
        pointer = "/registration/capabilities/quantizations/1"
        assert answer.json()["errors"][0]["pointer"] == pointer
        assert await fleet.pool.fetchval("SELECT count(*) FROM runners") == 0
        whole = {**CAPABILITIES, "vram_gb": 24.0}  # JSON Schema's integer, and the contract's
        answer = await runner.register(signed(runner, capabilities=whole, process_id=7.0))
        assert answer.status_code == 201
        await fleet.enqueue()
        await runner.take()
