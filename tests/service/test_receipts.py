"""Receipts: anybody can verify them, nobody can change them, and a rotation keeps them."""

import base64
import hashlib
import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from nacl.exceptions import BadSignatureError
from pydantic import SecretStr

from auth.errors import BadSignature, InvalidKey
from auth.receipts import ReceiptKeys, verify_receipt
from config.settings import Settings
from db.migration_files import MIGRATIONS
from sandbox.runner.receipts import ReceiptDoubtful, digest, read_receipt
from sandbox.services.sigstore_instance import ThrowawaySigstore
from tests.service.test_cli_runners import operating
from tests.support.fleet import AUDIENCE, open_fleet

MakeSettings = Callable[..., Settings]
Verify = Callable[[dict[str, Any], dict[str, Any]], None]
WELL_KNOWN = "/.well-known/bakeoff-queue.json"
OLD, NEW = f"old:{'0d' * 32}", f"new:{'4e' * 32}"
KEYS = ReceiptKeys({"2026": b"s" * 32, "2025": b"t" * 32})
PUBLIC = {key["kid"]: key["public_key"] for key in KEYS.published()}
GIVEN = {
    "run_id": "6d1c7f0e-3b1a-4b62-9a43-6f2f3d1d0a01",
    "result_sha256": digest(b"{}"),
    "signer": {"identity": "é@x.example", "issuer": "https://issuer.example", "log_index": 2**53},
    "rows": {"model_metrics": 5, "hardware_metrics": 1},
    "public_url": "http://queue.test",
}


@pytest.fixture
def stranger_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verify:
    """What docs/runners.md tells a stranger to do, which knows nothing of our code."""
    guide = (Path(__file__).parents[2] / "docs/runners.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (program,) = (each for each in programs if "receipt.json" in each)
    (tmp_path / "verify.py").write_text(program)
    monkeypatch.chdir(tmp_path)

    def verify(receipt: dict[str, Any], published: dict[str, Any]) -> None:
        (tmp_path / "receipt.json").write_text(json.dumps(receipt))
        (tmp_path / "bakeoff-queue.json").write_text(json.dumps(published))
        runpy.run_path("verify.py")

    return verify


@pytest.mark.gen_test
async def test_a_stranger_can_verify_what_a_submit_answers(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, stranger_verifies: Verify
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        files = runner.bundle(job)
        answer = (await runner.submit(job, files)).json()
        published = (await fleet.http.get(WELL_KNOWN)).json()
        stranger_verifies(answer, published)
        with pytest.raises(BadSignatureError):
            stranger_verifies({**answer, "runner_id": "runner-b"}, published)
        assert answer["purpose"] == "receipt"
        assert answer["public_url"] == published["public_url"] == AUDIENCE
        assert answer["result_sha256"] == hashlib.sha256(files["result.json"]).hexdigest()
        assert (answer["runner_id"], answer["key_fingerprint"]) == ("runner-a", runner.fingerprint)
        row = await fleet.row(run_id)
        assert answer["accepted_at"] == row["completed_at"].isoformat().replace("+00:00", "Z")
        own = (await fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)).json()
        page = (await fleet.admin("GET", f"/queue/{run_id}")).json()
        assert own["receipt"] == page["receipt"]
        assert {**page["receipt"], "server_time": answer["server_time"]} == answer
        stranger_verifies(page["receipt"], published)


@pytest.mark.gen_test
async def test_after_a_rotation_a_receipt_is_the_same_and_still_verifies(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, stranger_verifies: Verify
) -> None:
    async with open_fleet(make_settings(receipt_keys=SecretStr(OLD)), sigstore) as fleet:
        runner = await fleet.sign_on()
        for _ in range(2):
            await fleet.enqueue()
        job = await runner.take()
        files = runner.bundle(job)
        first = (await runner.submit(job, files)).json()
    async with open_fleet(make_settings(receipt_keys=SecretStr(f"{NEW},{OLD}")), sigstore) as fleet:
        runner = runner.at(fleet)
        again = await runner.submit(job, files)
        assert again.status_code == 200
        assert {**again.json(), "server_time": first["server_time"]} == first
        published = (await fleet.http.get(WELL_KNOWN)).json()
        assert [key["kid"] for key in published["keys"]] == ["new", "old"]
        assert first["sig"]["kid"] == "old"
        stranger_verifies(again.json(), published)
        next_one = (await runner.submit(await runner.take())).json()
        assert next_one["sig"]["kid"] == "new"
        stranger_verifies(next_one, published)


@pytest.mark.gen_test
async def test_a_result_whose_receipt_cannot_be_signed_is_not_accepted(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ReceiptKeys, receipt: object) -> None:
        raise RuntimeError("no key")

    async with open_fleet(make_settings(), sigstore) as fleet:
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        with monkeypatch.context() as patch:
            patch.setattr(ReceiptKeys, "sign", broken)
            assert (await runner.submit(job)).status_code == 500
        assert (await fleet.row(run_id))["status"] == "CLAIMED"
        assert await fleet.pool.fetchval("SELECT count(*) FROM run_model_metrics") == 0
        assert (await runner.submit(job)).status_code == 201


@pytest.mark.gen_test
async def test_the_well_known_document_is_for_anybody_and_holds_no_seed(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(receipt_keys=SecretStr(NEW)), sigstore) as fleet:
        answer = await fleet.http.get(WELL_KNOWN)
        document = answer.json()
        assert document["keys"][0]["alg"] == "Ed25519"
        assert document["bundle_schema_versions"] == ["bakeoff-results/v1"]
        seed = bytes.fromhex("4e" * 32)
        assert base64.b64encode(seed).decode() not in answer.text
        assert "4e" * 32 not in answer.text
        head = await fleet.http.head(WELL_KNOWN)
        assert (head.status_code, head.content) == (200, b"")
        assert (await fleet.http.options(WELL_KNOWN)).headers["Allow"] == "GET, HEAD, OPTIONS"
        assert (await fleet.http.post(WELL_KNOWN)).status_code == 405
        version = (await fleet.http.get("/api/version")).json()
        assert version["name"] == "bakeoff-queue"
        assert version["version"].count(".") == 2


def test_a_result_from_before_receipts_were_signed_has_one_without_a_signature(
    database: str, io_loop: Any
) -> None:
    up = (MIGRATIONS / "20261124000001_receipts.sql").read_text().partition("-- migrate:down")[0]

    async def migrated() -> dict[str, Any]:
        connection = await asyncpg.connect(database)
        await connection.execute("ALTER TABLE submissions DROP COLUMN receipt")
        await connection.execute(
            "WITH run AS (INSERT INTO runs (run_id, submitted_at, publisher_id, run_status)"
            " VALUES (gen_random_uuid(), now(), 'r', 'complete') RETURNING run_id)"
            " INSERT INTO submissions (run_id, lease_seq, runner_id, key_fingerprint,"
            " result_sha256, signer_identity, signer_issuer, log_index, logged_at,"
            " model_metrics, hardware_metrics, accepted_at)"
            " SELECT run_id, 1, 'r', 'f', 'd', 'i', 's', 7, now(), 5, 1, '2026-01-31 12:00:00.5Z'"
            " FROM run"
        )
        await connection.execute(up)
        text = await connection.fetchval("SELECT receipt FROM submissions")
        await connection.close()
        return json.loads(text)

    receipt = io_loop.run_sync(migrated)
    assert receipt.pop("run_id")
    assert receipt.pop("receipt_id")
    assert receipt == {
        "result_sha256": "d",
        "accepted_at": "2026-01-31T12:00:00.500000Z",
        "signer": {"identity": "i", "issuer": "s", "log_index": 7},
        "rows": {"model_metrics": 5, "hardware_metrics": 1},
    }


# What verifies, and what does not


def test_what_is_signed_is_returned() -> None:
    receipt = KEYS.sign(GIVEN)
    assert verify_receipt({**receipt, "server_time": "now"}, PUBLIC) == {
        **GIVEN,
        "purpose": "receipt",
    }
    assert KEYS.sign(GIVEN) == receipt, "the same, whenever it is signed"


@pytest.mark.parametrize("name", [*GIVEN, "purpose"])
def test_a_receipt_with_a_changed_or_missing_member_is_refused(name: str) -> None:
    receipt = KEYS.sign(GIVEN)
    with pytest.raises(BadSignature):
        verify_receipt({**receipt, name: "other"}, PUBLIC)
    del receipt[name]
    with pytest.raises(BadSignature):
        verify_receipt(receipt, PUBLIC)


def test_a_receipt_with_one_member_more_is_refused() -> None:
    with pytest.raises(BadSignature):
        verify_receipt({**KEYS.sign(GIVEN), "prize": 1}, PUBLIC)


def changed(**sig: Any) -> dict[str, Any]:
    receipt = KEYS.sign(GIVEN)
    return {**receipt, "sig": {**receipt["sig"], **sig}}


def other_purpose() -> dict[str, Any]:
    """What the very key signed, for something that is no receipt."""
    return KEYS.sign(GIVEN, "something else")


@pytest.mark.parametrize(
    "receipt",
    [
        GIVEN,
        {**GIVEN, "sig": "text"},
        changed(signature=7),
        changed(signature="AAAA"),
        changed(signature=base64.b64encode(b"\0" * 64).decode()),
        changed(sha256="0" * 64),
        changed(kid="2027"),
        changed(kid="2025"),
        other_purpose(),
    ],
    ids=["unsigned", "no object", "no text", "short", "zeros", "digest", "unknown key",
         "another key", "another purpose"],
)  # fmt: skip
def test_a_signature_that_proves_nothing_is_refused(receipt: dict[str, Any]) -> None:
    with pytest.raises(BadSignature):
        verify_receipt(receipt, PUBLIC)


def test_a_published_key_under_which_anything_verifies_is_refused() -> None:
    identity_point = base64.b64encode(b"\1" + b"\0" * 31).decode()
    with pytest.raises(InvalidKey):
        verify_receipt(KEYS.sign(GIVEN), {"2026": identity_point})


# The runner's own look


def test_a_runner_takes_the_receipt_of_its_own_result_only() -> None:
    published = {"keys": KEYS.published()}
    receipt = KEYS.sign(GIVEN)
    expected = {"run_id": GIVEN["run_id"], "result_sha256": digest(b"{}")}
    assert read_receipt(receipt, published, **expected)["rows"] == GIVEN["rows"]
    with pytest.raises(ReceiptDoubtful, match="another result_sha256"):
        read_receipt(receipt, published, **{**expected, "result_sha256": digest(b"[]")})
    for broken in ({}, {"keys": [{}]}, {"keys": 7}, {"keys": [{"kid": "2026", "public_key": "?"}]}):
        with pytest.raises(ReceiptDoubtful):
            read_receipt(receipt, broken, **expected)
    with pytest.raises(ReceiptDoubtful):
        read_receipt({}, published)


# `bakeoff-queue receipts verify`


@pytest.mark.gen_test
async def test_the_command_line_verifies_a_receipt_against_a_server_or_a_kept_copy(
    make_settings: MakeSettings,
    sigstore: ThrowawaySigstore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def kept(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    async with operating(make_settings(), sigstore, monkeypatch, capsys) as (fleet, desk):
        runner = await fleet.sign_on()
        run_id = await fleet.enqueue()
        job = await runner.take()
        files = runner.bundle(job)
        answer = kept("answer.json", (await runner.submit(job, files)).content)
        monkeypatch.delenv("BAKEOFF_QUEUE_TOKEN")
        good = await desk("receipts", "verify", answer, "--json")
        assert (good.code, good.json["run_id"]) == (0, run_id)
        assert (await desk("receipts", "verify", answer)).err == ["the receipt is good"]
        own = await fleet.http.get(f"/api/queue/{run_id}", headers=runner.headers)
        result = kept("result.json", files["result.json"])
        within = await desk("receipts", "verify", kept("own.json", own.content), "--result", result)
        assert within.code == 0
        other = await desk("receipts", "verify", answer, "--result", answer)
        assert (other.code, "another result.json" in other.err[0]) == (1, True)

        published = (await fleet.http.get(WELL_KNOWN)).json()
        keys = kept("keys.json", json.dumps(published).encode())
        monkeypatch.setenv("BAKEOFF_QUEUE_URL", "http://127.0.0.1:1")
        assert (await desk("receipts", "verify", answer, "--keys", keys)).code == 0
        assert (await desk("receipts", "verify", answer)).code == 5
        foreign = kept("foreign.json", json.dumps({**published, "public_url": "http://x"}).encode())
        refused = await desk("receipts", "verify", answer, "--keys", foreign)
        assert (refused.code, "another server" in refused.err[0]) == (1, True)
        forged = json.dumps({**json.loads(answer.read_bytes()), "runner_id": "me"}).encode()
        refused = await desk("receipts", "verify", kept("forged.json", forged), "--keys", keys)
        assert refused.code == 1
        assert "proves nothing: The receipt, or its sig, was changed" in refused.err[0]
        assert (await desk("receipts", "verify", answer, "--keys", result)).code == 1
        for unreadable in (tmp_path / "none", kept("text", b"?"), kept("list", b"[]")):
            assert (await desk("receipts", "verify", unreadable, "--keys", keys)).code == 2
