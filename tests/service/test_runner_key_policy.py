"""signature_policy runner-key: results signed with bakeoff's Ed25519 envelope by the runner key."""

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from nacl.signing import SigningKey

from auth.keys import canonical_json
from config.settings import Settings
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_submit import assert_still_mine, counts
from tests.support.fleet import Fleet, Runner, code_of, open_fleet
from tests.support.result_factory import digests, manifest_for, result_for

MakeSettings = Callable[..., Settings]
Job = dict[str, Any]
ENVELOPE = "signature.ed25519.json"


@asynccontextmanager
async def claimed(
    settings: Settings, sigstore: ThrowawaySigstore, policy: str = "runner-key"
) -> AsyncIterator[tuple[Fleet, Runner, Job]]:
    """Yield a fleet, a runner whose key has this policy, and the job that it holds."""
    async with open_fleet(settings, sigstore) as fleet:
        runner = await fleet.sign_on(signature_policy=policy)
        await fleet.enqueue()
        yield fleet, runner, await runner.take()


def signed(value: Any, key: SigningKey, runner_id: str = "runner-a", **changes: Any) -> bytes:
    """Return bakeoff's envelope over a value, without the value."""
    digest = hashlib.sha256(canonical_json(value)).digest()
    sig = {
        "sha256": digest.hex(),
        "signature": base64.b64encode(key.sign(digest).signature).decode(),
        "runner_id": runner_id,
        "signed_at": "2026-11-24T12:00:00Z",
        **changes,
    }
    return json.dumps({"sig": {name: of for name, of in sig.items() if of is not None}}).encode()


def bundle(result: dict[str, Any], envelope: bytes, text: bytes | None = None) -> dict[str, bytes]:
    """Return a bundle with the manifest that belongs to it."""
    files = {
        "result.json": json.dumps(result).encode() if text is None else text,
        "summary.md": b"# Summary\n",
        ENVELOPE: envelope,
    }
    manifest = manifest_for(result, files)
    manifest["signature"] |= {"kind": "ed25519-envelope", "path": ENVELOPE}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.gen_test
async def test_a_result_signed_by_the_runner_key_is_accepted_and_says_so(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        assert (job["signature_policy"], job["expected_signer"]) == ("runner-key", None)
        result = result_for(job["run_id"], job)
        files = bundle(result, signed(result, runner.key))
        tried = await runner.submit(job, files, query="?validate_only=1")
        assert tried.status_code == 200, tried.text
        answer = await runner.submit(job, files)
        assert answer.status_code == 201, answer.text
        receipt = answer.json()
        assert receipt["trust"] == "runner-key"
        assert receipt["signer"] == {
            "identity": f"ed25519:{runner.fingerprint}", "issuer": None, "log_index": None,
        }  # fmt: skip
        again = await runner.submit(job, files)
        assert (again.status_code, again.json()["receipt_id"]) == (200, receipt["receipt_id"])
        row = await fleet.pool.fetchrow("SELECT * FROM submissions")
        assert row is not None
        assert (row["trust"], row["logged_at"]) == ("runner-key", None)
        stored = await fleet.pool.fetch("SELECT name, content FROM submission_files")
        assert {each["name"]: each["content"] for each in stored} == files
        assert (await counts(fleet))["run_model_metrics"] == 5


@pytest.mark.gen_test
async def test_the_same_document_in_other_bytes_is_signed_too_and_kept_as_it_came(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        result = result_for(job["run_id"], job)
        text = json.dumps(result, indent=4, sort_keys=True).encode()
        answer = await runner.submit(job, bundle(result, signed(result, runner.key), text))
        assert answer.status_code == 201, answer.text
        assert answer.json()["result_sha256"] == hashlib.sha256(text).hexdigest()
        kept = "SELECT content FROM submission_files WHERE name = 'result.json'"
        assert await fleet.pool.fetchval(kept) == text


def refused(runner: Runner, job: Job) -> dict[str, tuple[str, str, dict[str, bytes]]]:
    """Every way in which an envelope is refused: name -> code, a word of the answer, files."""
    key = runner.key
    result = result_for(job["run_id"], job)
    other = result_for(job["run_id"], job, timestamp="2020-01-01T00:00:00Z")
    good = signed(result, key)
    sig = json.loads(good)["sig"]
    text = json.dumps(result).encode()
    twice = text.replace(
        b'"run_status": "complete"', b'"run_status": "x", "run_status": "complete"'
    )
    short = base64.b64encode(base64.b64decode(sig["signature"])[:63]).decode()
    whole = json.dumps({"result": result, "sig": sig}).encode()
    wrong = "signature_invalid"
    return {
        "another key": (wrong, "", bundle(result, signed(result, SigningKey.generate()))),
        "a changed result": (wrong, "SHA-256", bundle(other, good)),
        "a changed result, and its digest": (
            wrong, "", bundle(other, signed(result, key, sha256=digest_of(other)))
        ),
        "another's name": (
            "signer_not_allowed", "runner_id", bundle(result, signed(result, key, "runner-b"))
        ),
        "a signature in hex": (
            wrong, "96 bytes", bundle(result, signed(result, key, signature="ab" * 64))
        ),
        "63 bytes of it": (wrong, "63", bundle(result, signed(result, key, signature=short))),
        "no signature": (
            "invalid_bundle", "signature", bundle(result, signed(result, key, signature=None))
        ),
        "another algorithm": (
            "invalid_bundle", "alg", bundle(result, signed(result, key, alg="none"))
        ),
        "the result in it": ("invalid_bundle", "result", bundle(result, whole)),
        "an envelope that is not JSON": ("invalid_bundle", ENVELOPE, bundle(result, b"{")),
        "an envelope that is a list": ("invalid_bundle", ENVELOPE, bundle(result, b"[]")),
        "a member named twice": ("invalid_bundle", "run_status", bundle(result, good, twice)),
        "the bytes of it signed, not the document": (
            wrong, "", bundle(result, signed(text.decode(), key))
        ),
    }  # fmt: skip


def digest_of(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


@pytest.mark.gen_test(timeout=30)
async def test_an_envelope_is_refused_by_what_is_wrong_with_it_and_the_lease_kept(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        for name, (code, word, files) in refused(runner, job).items():
            answer = await runner.submit(job, files)
            assert code_of(answer) == (422, code), (name, answer.text)
            assert word in answer.text, (name, answer.text)
            await assert_still_mine(fleet, runner, job)


@pytest.mark.parametrize(
    ("policy", "wrong"), [("sigstore", ENVELOPE), ("runner-key", "signature.sigstore.json")]
)
@pytest.mark.gen_test
async def test_each_policy_refuses_the_other_kind_of_signature_by_name(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, policy: str, wrong: str
) -> None:
    async with claimed(make_settings(), sigstore, policy) as (fleet, runner, job):
        assert job["signature_policy"] == policy
        result = result_for(job["run_id"], job)
        by_key = bundle(result, signed(result, runner.key))
        alone = by_key if policy == "sigstore" else runner.bundle(job)
        both = {**runner.bundle(job), ENVELOPE: by_key[ENVELOPE]}
        for files in (alone, both):
            answer = await runner.submit(job, files)
            assert code_of(answer) == (422, "invalid_bundle")
            told = [error["detail"] for error in answer.json()["errors"]]
            assert any(line.startswith(f"{wrong} is not how this") for line in told), told
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_a_manifest_that_names_the_other_kind_is_refused(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with claimed(make_settings(), sigstore) as (fleet, runner, job):
        result = result_for(job["run_id"], job)
        files = bundle(result, signed(result, runner.key))
        manifest = manifest_for(result, {n: c for n, c in files.items() if n != "manifest.json"})
        assert manifest["files"].keys() == digests(files).keys() - {"manifest.json"}
        answer = await runner.submit(job, {**files, "manifest.json": json.dumps(manifest).encode()})
        assert code_of(answer) == (422, "invalid_bundle")
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/signature/path"]
        await assert_still_mine(fleet, runner, job)


@pytest.mark.gen_test
async def test_a_signer_and_runner_key_exclude_each_other(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    signer = {"identity": "ci@bakeoff.test", "issuer": "https://issuer.bakeoff.test"}
    async with open_fleet(make_settings(), sigstore) as fleet:
        wanted = {
            "public_key": base64.b64encode(bytes(SigningKey.generate().verify_key)).decode(),
            "runner_id": "runner-a",
            "signature_policy": "runner-key",
        }
        answer = await fleet.admin("POST", "/runner-keys", json={**wanted, "signer": signer})
        assert code_of(answer) == (422, "invalid_request")
        assert [error["pointer"] for error in answer.json()["errors"]] == ["/signer"]
        added = await fleet.admin("POST", "/runner-keys", json=wanted)
        assert (added.status_code, added.json()["signature_policy"]) == (201, "runner-key")
        # The database holds it, too: whoever writes there by hand is told.
        with pytest.raises(asyncpg.CheckViolationError):
            await fleet.pool.execute(
                "UPDATE runner_keys SET signer_identity = 'a@b.test', signer_issuer = 'https://i.test'"
            )
        other = await fleet.admin(
            "POST", "/runner-keys", json={**wanted, "signature_policy": "sigstore"}
        )
        assert code_of(other) == (409, "conflict")
