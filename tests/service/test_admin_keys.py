"""The allowlist: whose keys are admitted, under which names, and what a revocation does."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import pytest
from nacl.signing import SigningKey

from config.settings import Settings
from sandbox.runner.identity import public_key_text
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.support.fleet import Fleet, code_of, open_fleet

MakeSettings = Callable[..., Settings]

# Small-order points (order 1, 2, 4, 8), some in spellings that are not canonical: under each one
# signature verifies for many messages. From the table in libsodium's ge25519_has_small_order().
SMALL_ORDER = (
    "0100000000000000000000000000000000000000000000000000000000000000",  # the identity
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # order 2
    "0000000000000000000000000000000000000000000000000000000000000000",  # order 4
    "0000000000000000000000000000000000000000000000000000000000000080",  # order 4
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",  # order 8
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",  # order 8
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",  # order 8
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",  # order 8
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # p + 1, the identity
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # p, order 4
    "0100000000000000000000000000000000000000000000000000000000000080",  # x = 0 with a sign
)
NO_POINT = "0200000000000000000000000000000000000000000000000000000000000000"
KEY = public_key_text(SigningKey(b"k" * 32))


def key_of(**changes: Any) -> dict[str, Any]:
    """Return an entry that fits, with `changes` to it."""
    return {"public_key": KEY, "runner_id": "runner-a", **changes}


def spelt(raw: bytes) -> str:
    """Return bytes in standard base64."""
    return base64.b64encode(raw).decode()


async def add(fleet: Fleet, **changes: Any) -> Any:
    """Ask for a key to be admitted."""
    return await fleet.admin("POST", "/runner-keys", json=key_of(**changes))


@pytest.mark.gen_test
async def test_a_key_is_admitted_once_listed_and_shown_the_same_again(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        signer = {"identity": "ci@bakeoff.test", "issuer": "https://issuer.bakeoff.test"}
        wanted = {
            "description": "the box under the desk",
            "not_after": "2999-01-01T00:00:00+01:00",
            "max_leases": 2.0,
            "capability_caps": {"vram_gb": 16, "quantizations": ["q8_0"]},
            "signer": signer,
            "signature_policy": "sigstore",
        }
        first, again = await add(fleet, **wanted), await add(fleet, **wanted)
        assert (first.status_code, again.status_code) == (201, 200), again.text
        listed = (await fleet.admin("GET", "/runner-keys")).json()["keys"]
        (shown,) = listed
        for answer in (first, again):
            body = {n: value for n, value in answer.json().items() if n != "server_time"}
            assert body == shown
        assert shown["not_after"] == "2998-12-31T23:00:00Z"
        assert (shown["max_leases"], shown["signer"]) == (2, signer)
        assert (shown["added_by"], shown["public_key"]) == ("test", KEY)
        audited = await fleet.pool.fetch("SELECT actor, action, runner_id FROM audit")
        assert [tuple(row) for row in audited] == [("admin:test", "runner_key.add", "runner-a")]


@pytest.mark.gen_test
async def test_a_key_has_one_spelling_and_is_a_usable_point(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    raw = base64.b64decode(KEY)
    body, sign = KEY[:-2], KEY[-2]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    bad = {
        "31 bytes": spelt(raw[:31]),
        "33 bytes": spelt(raw + b"\0"),
        "64 bytes": spelt(raw * 2),
        "nothing": spelt(b""),
        "a blank before": f" {KEY}",
        "a newline after": f"{KEY}\n",
        "a newline inside": f"{KEY[:20]}\n{KEY[20:]}",
        "no padding": KEY[:-1],
        "padding twice": f"{KEY}=",
        "the url-safe alphabet": spelt(b"\xff" * 32).replace("/", "_"),
        "other trailing bits": f"{body}{alphabet[alphabet.index(sign) ^ 1]}=",
        "hex": raw.hex(),
        "PEM": f"-----BEGIN PUBLIC KEY-----\n{KEY}\n-----END PUBLIC KEY-----",
        "ssh": f"ssh-ed25519 {spelt(b'ssh-ed25519' + raw)}",
        "full-width digits": KEY.replace(KEY[5], "\uff11"),
        "no point of the curve": spelt(bytes.fromhex(NO_POINT)),
        "all ones": spelt(b"\xff" * 32),
        **{f"small order {point}": spelt(bytes.fromhex(point)) for point in SMALL_ORDER},
    }
    async with open_fleet(make_settings(), sigstore) as fleet:
        for name, text in bad.items():
            answer = await add(fleet, public_key=text)
            assert code_of(answer) == (422, "invalid_request"), name
            assert answer.json()["errors"][0]["pointer"] == "/public_key", name
            assert len(text) < 20 or text not in answer.text, "input is never echoed"
        assert await fleet.pool.fetchval("SELECT count(*) FROM runner_keys") == 0
        assert (await add(fleet)).status_code == 201


@pytest.mark.gen_test
async def test_an_entry_that_does_not_fit_is_refused_with_a_pointer(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    caps, signer = "capability_caps", "signer"
    issuer = "https://issuer.bakeoff.test"
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/runner_id", {"runner_id": ""}),
        ("/runner_id", {"runner_id": "a b"}),
        ("/runner_id", {"runner_id": "runner-a\n"}),
        ("/runner_id", {"runner_id": "../runner"}),
        ("/runner_id", {"runner_id": "r" * 129}),
        ("/runner_id", {"runner_id": "r\u202eunner"}),
        ("/runner_id", {"runner_id": 7}),
        ("/description", {"description": "nul \u0000"}),
        ("/description", {"description": "x" * 1001}),
        ("/not_after", {"not_after": "tomorrow"}),
        ("/not_after", {"not_after": "2026-01-31T12:00:60Z"}),
        ("/not_after", {"not_after": "0000-01-01T00:00:00Z"}),
        ("/not_after", {"not_after": "2026-01-31T12:00:00"}),
        ("/not_after", {"not_after": "2026-02-30T12:00:00Z"}),
        ("/not_after", {"not_after": "0001-01-01T00:00:00+23:00"}),
        ("/max_leases", {"max_leases": 0}),
        ("/max_leases", {"max_leases": 65}),
        ("/max_leases", {"max_leases": 1.5}),
        ("/max_leases", {"max_leases": True}),
        ("/max_leases", {"max_leases": "2"}),
        ("/capability_caps/vram_gb", {caps: {"vram_gb": -1}}),
        ("/capability_caps/vram_gb", {caps: {"vram_gb": 10**300}}),
        ("/capability_caps/vram_gb", {caps: {"vram_gb": 24.5}}),
        ("/capability_caps/quantizations", {caps: {"quantizations": []}}),
        ("/capability_caps/ram", {caps: {"ram": 1}}),
        ("/signer", {signer: {"identity": "a@b.test"}}),
        ("/signer/issuer", {signer: {"identity": "a@b.test", "issuer": ""}}),
        ("/signer", {signer: {"identity": "repo:o/r:ref:refs/heads/main", "issuer": issuer}}),
        ("/signer", {signer: {"identity": "github-actions[bot]", "issuer": issuer}}),
        ("/signature_policy", {"signature_policy": "none"}),
        ("/colour", {"colour": "red"}),
    ]
    async with open_fleet(make_settings(), sigstore) as fleet:
        for at, changes in bad:
            answer = await add(fleet, **changes)
            assert code_of(answer) == (422, "invalid_request"), changes
            assert {error["pointer"] for error in answer.json()["errors"]} == {at}, changes
        assert await fleet.pool.fetchval("SELECT count(*) FROM runner_keys") == 0


@pytest.mark.gen_test
async def test_a_name_and_a_key_belong_together_until_the_key_is_revoked(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        other = public_key_text(SigningKey.generate())
        assert (await add(fleet)).status_code == 201
        assert code_of(await add(fleet, public_key=other)) == (409, "conflict")
        assert code_of(await add(fleet, runner_id="runner-b")) == (409, "conflict")
        assert code_of(await add(fleet, max_leases=3)) == (409, "conflict")
        fingerprint = (await fleet.admin("GET", "/runner-keys")).json()["keys"][0]["fingerprint"]
        await fleet.admin("DELETE", f"/runner-keys/{fingerprint}", json={"reason": "lost"})
        assert code_of(await add(fleet)) == (409, "conflict"), "a revoked key stays revoked"
        assert (await add(fleet, public_key=other)).status_code == 201


@pytest.mark.gen_test
async def test_of_two_keys_admitted_at_once_under_one_name_one_gets_it(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        keys = [public_key_text(SigningKey.generate()) for _ in range(4)]
        answers = await asyncio.gather(*(add(fleet, public_key=key) for key in keys))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
        same = await asyncio.gather(*(add(fleet, runner_id="b", public_key=KEY) for _ in range(4)))
        assert sorted(answer.status_code for answer in same) == [200, 200, 200, 201]


@pytest.mark.gen_test
async def test_a_revocation_frees_runs_names_results_and_is_final(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on(max_leases=2)
        done = await fleet.enqueue()
        assert (await runner.submit(await runner.take())).status_code == 201
        held = [await fleet.enqueue(), await fleet.enqueue()]
        jobs = [await runner.take(), await runner.take()]
        path = f"/runner-keys/{runner.fingerprint}"
        answer = await fleet.admin("DELETE", path, json={"reason": "stolen"})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert sorted(body["freed_runs"]) == sorted(held)
        assert body["results_to_review"] == [done]
        for job in jobs:
            row = await fleet.row(job["run_id"])
            assert (row["status"], row["lease_id"], row["claimed_by"]) == ("PENDING", None, None)
            assert row["attempt_count"] == 0
            (attempt,) = await fleet.ledger(job["run_id"])
            assert (attempt["how"], attempt["detail"]) == ("revoked", "stolen")
            assert code_of(await runner.submit(job)) == (403, "key_revoked")
            assert code_of(await runner.heartbeat(job)) == (403, "key_revoked")
        assert code_of(await runner.claim()) == (403, "key_revoked")
        assert code_of(await runner.register()) == (403, "key_revoked")
        again = (await fleet.admin("DELETE", path, json={"reason": "again"})).json()
        assert again["revoked_at"] == body["revoked_at"]
        assert (again["freed_runs"], again["results_to_review"]) == ([], [done])
        (key,) = (await fleet.admin("GET", "/runner-keys")).json()["keys"]
        assert key["revoked_reason"] == "stolen"
        audited = await fleet.pool.fetchrow(
            "SELECT * FROM audit WHERE action = 'runner_key.revoke' ORDER BY audit_id LIMIT 1"
        )
        assert audited is not None
        assert sorted(audited["detail"]["freed_runs"]) == sorted(held)


@pytest.mark.gen_test
async def test_a_revocation_needs_a_known_key_a_reason_and_json(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        path = f"/runner-keys/{runner.fingerprint}"
        unknown = await fleet.admin("DELETE", f"/runner-keys/{'0' * 64}", json={"reason": "x"})
        assert code_of(unknown) == (404, "not_found")
        capitals = f"/runner-keys/{runner.fingerprint.upper()}"
        assert code_of(await fleet.admin("DELETE", capitals, json={"reason": "x"}))[0] == 404
        for body in ({}, {"reason": ""}, {"reason": "x" * 1001}, {"reason": "\u0000"}, []):
            answer = await fleet.admin("DELETE", path, json=body)
            assert code_of(answer) == (422, "invalid_request"), body
        text = {"Content-Type": "text/plain"}
        plain = await fleet.admin("DELETE", path, content=b'{"reason": "x"}', headers=text)
        assert code_of(plain) == (415, "unsupported_media_type")
        typed = {"Content-Type": "application/json"}
        assert code_of(await fleet.admin("DELETE", path, headers=typed)) == (400, "empty_body")
        assert (await runner.claim()).status_code == 204, "the key is as good as before"


@pytest.mark.gen_test
async def test_a_token_that_is_none_of_ours_opens_nothing(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        token = fleet.admin_token
        bad = {
            "a runner's": f"Bearer {runner.token}".encode(),
            "another": b"Bearer " + token[:-1].encode() + (b"A" if token[-1] != "A" else b"B"),
            "not ASCII": "Bearer bqa_\u00e9\u00e8".encode(),
            "basic": b"Basic YWRtaW46YWRtaW4=",
            "only the scheme": b"Bearer",
            "a longer one": f"Bearer {token}=".encode(),
            "two in one": f"Bearer {token}, Bearer {token}".encode(),
        }
        for name, header in bad.items():
            answer = await fleet.http.get("/api/admin/queue", headers=[(b"Authorization", header)])
            assert answer.status_code == 401, name
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        twice = [("Authorization", f"Bearer {token}")] * 2
        assert (await fleet.http.get("/api/admin/queue", headers=twice)).status_code == 401
        assert code_of(await fleet.http.get("/api/admin/queue")) == (401, "missing_token")
        await fleet.pool.execute("UPDATE admin_tokens SET revoked_at = now()")
        assert code_of(await fleet.admin("GET", "/queue")) == (401, "invalid_token")
        await fleet.pool.execute("UPDATE admin_tokens SET revoked_at = NULL, expires_at = now()")
        assert code_of(await fleet.admin("GET", "/queue")) == (401, "invalid_token")
