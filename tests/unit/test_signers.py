"""Who signed a result: evidence for the right signer, one of three refusals for all else."""

import json
import random
import secrets
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from auth.errors import PolicyRefused, SignatureInvalid, SignerNotAllowed, Unverifiable
from auth.signers import (
    MAX_BUNDLE_BYTES,
    MAX_CHECKPOINT_SIGNATURES,
    BundleVerifier,
    Signer,
    SignerEvidence,
    SignerPolicy,
    load_policy,
)
from sandbox.services.sigstore_ca import new_authority
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore, WorkflowSubject

ROOT = Path(__file__).parents[2]
RESULT = b'{"run_id": "r1", "records": []}'
REFUSALS = (SignatureInvalid, SignerNotAllowed, Unverifiable)

EMAIL = EmailSubject("runner@example.org")
EMAIL_SIGNER = Signer(EMAIL.identity, EMAIL.issuer)
WORKFLOW = WorkflowSubject("Rethunk-AI/bakeoff")
WORKFLOW_SIGNER = Signer(WORKFLOW.identity, WORKFLOW.issuer)
FORK = WorkflowSubject("Rethunk-AI/bakeoff", source_repository="mallory/bakeoff")


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> ThrowawaySigstore:
    return ThrowawaySigstore.create(tmp_path_factory.mktemp("sigstore"))


@pytest.fixture(scope="module")
def verifier(instance: ThrowawaySigstore) -> BundleVerifier:
    return BundleVerifier(instance.trusted_root, load_policy(ROOT / "config" / "signers.yaml"))


@pytest.fixture(scope="module")
def good(instance: ThrowawaySigstore) -> bytes:
    return instance.sign(RESULT, EMAIL)


def edited(raw: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    bundle = json.loads(raw)
    edit(bundle)
    return json.dumps(bundle).encode()


def entry(bundle: dict[str, Any]) -> dict[str, Any]:
    return bundle["verificationMaterial"]["tlogEntries"][0]


def flipped(text: str) -> str:
    """The same base64 with one bit of its last byte changed."""
    data = b64decode(text)
    return b64encode(data[:-1] + bytes([data[-1] ^ 1])).decode()


# Good ones


def test_the_expected_email_signer_is_evidence(verifier, instance):
    logged = datetime.now(UTC).replace(microsecond=0)
    raw = instance.sign(RESULT, EMAIL, issued_at=logged - timedelta(minutes=1), logged_at=logged)
    evidence = verifier.verify(RESULT, raw, EMAIL_SIGNER)
    assert (evidence.identity, evidence.issuer) == (EMAIL.identity, EMAIL.issuer)
    assert evidence.integrated_at == logged
    assert evidence.log_index == int(entry(json.loads(raw))["logIndex"])


@pytest.mark.parametrize("expected", [WORKFLOW_SIGNER, None], ids=["per key", "policy file"])
def test_a_workflow_of_the_trusted_repository_is_evidence(verifier, instance, expected):
    evidence = verifier.verify(RESULT, instance.sign(RESULT, WORKFLOW), expected)
    assert evidence.identity == (
        "https://github.com/Rethunk-AI/bakeoff/.github/workflows/package-results.yml@refs/heads/main"
    )
    assert evidence.issuer == "https://token.actions.githubusercontent.com"


def test_evidence_names_the_signer_of_the_policy_that_signed(instance):
    policy = SignerPolicy((WORKFLOW_SIGNER, EMAIL_SIGNER))
    verifier = BundleVerifier(instance.trusted_root, policy)
    for subject in (WORKFLOW, EMAIL):
        evidence = verifier.verify(RESULT, instance.sign(RESULT, subject), None)
        assert (evidence.identity, evidence.issuer) == (subject.identity, subject.issuer)


def test_worker_threads_share_a_verifier(verifier, good):
    def verify(number: int) -> str:
        result = RESULT if number % 2 else RESULT + b" "
        try:
            return verifier.verify(result, good, EMAIL_SIGNER).identity
        except SignatureInvalid:
            return "refused"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(verify, range(80)))
    assert answers == ["refused", EMAIL.identity] * 40


# Not the signer


@pytest.mark.parametrize("expected", [WORKFLOW_SIGNER, None], ids=["per key", "policy file"])
@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(replace(WORKFLOW, issuer="https://issuer.example"), id="wrong issuer"),
        pytest.param(replace(WORKFLOW, ref="refs/heads/evil"), id="wrong ref"),
        pytest.param(replace(WORKFLOW, workflow=".github/workflows/x.yml"), id="wrong workflow"),
        pytest.param(replace(WORKFLOW, repository="mallory/bakeoff"), id="wrong repository"),
        pytest.param(FORK, id="fork that calls the trusted workflow"),
        pytest.param(replace(WORKFLOW, source_ref="refs/heads/x"), id="another ref of the caller"),
        pytest.param(EMAIL, id="somebody else"),
    ],
)
def test_another_workflow_signer_is_not_allowed(verifier, instance, subject, expected):
    with pytest.raises(SignerNotAllowed, match=r"package-results\.yml@refs/heads/main"):
        verifier.verify(RESULT, instance.sign(RESULT, subject), expected)


@pytest.mark.parametrize(
    "expected",
    [
        Signer("other@example.org", EMAIL.issuer),
        Signer("Runner@example.org", EMAIL.issuer),
        Signer("runner@example.org.evil.example", EMAIL.issuer),
        Signer("runner@example.or", EMAIL.issuer),
        Signer(EMAIL.identity, "https://issuer.example"),
        Signer(EMAIL.identity, EMAIL.issuer + "/x"),
    ],
)
def test_identity_and_issuer_are_compared_whole(verifier, good, expected):
    with pytest.raises(SignerNotAllowed, match=expected.identity):
        verifier.verify(RESULT, good, expected)


@pytest.mark.parametrize(
    "expected",
    [Signer(EMAIL.identity, ""), Signer(r".*@example\.org", EMAIL.issuer)],
    ids=["no issuer", "pattern"],
)
def test_a_signer_that_no_admin_could_have_added_matches_nothing(verifier, good, expected):
    with pytest.raises(SignerNotAllowed, match="No bundle can match this runner key"):
        verifier.verify(RESULT, good, expected)


def test_a_bundle_of_cosign_2_is_told_how_to_be_one(verifier):
    """Before version 3, `cosign sign-blob --bundle` wrote a form of its own."""
    own = {"base64Signature": "MEUC", "cert": "LS0t", "rekorBundle": {"Payload": {}}}
    with pytest.raises(SignatureInvalid, match=r"cosign 2's own form.* --new-bundle-format"):
        verifier.verify(RESULT, json.dumps(own).encode(), EMAIL_SIGNER)


@pytest.mark.parametrize(
    ("owner_id", "repository_id"),
    [("7", "43"), ("8", "42"), (None, "42"), ("7", None), (None, None), ("42", "7")],
)
def test_a_repository_of_the_same_name_with_other_ids_is_not_allowed(
    instance, owner_id: str | None, repository_id: str | None
):
    """Names can be had by others once their owner gives them up."""
    signer = replace(WORKFLOW_SIGNER, owner_id="7", repository_id="42")
    verifier = BundleVerifier(instance.trusted_root, SignerPolicy((signer,)))
    same = replace(WORKFLOW, owner_id="7", repository_id="42")
    assert verifier.verify(RESULT, instance.sign(RESULT, same), None).identity == signer.identity
    other = replace(WORKFLOW, owner_id=owner_id, repository_id=repository_id)
    with pytest.raises(SignerNotAllowed):
        verifier.verify(RESULT, instance.sign(RESULT, other), None)


@pytest.mark.parametrize("name", ["owner_id", "repository_id"])
def test_an_id_that_is_empty_is_still_compared(instance, name: str):
    subject = replace(WORKFLOW, owner_id="7", repository_id="42")
    ids: dict[str, Any] = {"owner_id": "7", "repository_id": "42", name: ""}
    signer = replace(WORKFLOW_SIGNER, **ids)
    verifier = BundleVerifier(instance.trusted_root, SignerPolicy((signer,)))
    with pytest.raises(SignerNotAllowed):
        verifier.verify(RESULT, instance.sign(RESULT, subject), None)


def test_a_key_with_a_signer_of_its_own_does_not_fall_back_to_the_policy(verifier, instance):
    with pytest.raises(SignerNotAllowed):
        verifier.verify(RESULT, instance.sign(RESULT, WORKFLOW), EMAIL_SIGNER)


def test_a_strangers_signature_over_other_bytes_is_told_that_it_is_a_stranger(verifier, instance):
    with pytest.raises(SignerNotAllowed):
        verifier.verify(RESULT, instance.sign(b"other", WORKFLOW), EMAIL_SIGNER)


def test_what_a_certificate_says_is_never_echoed_at_length(verifier, instance):
    long = EmailSubject("x" * 3000 + "@example.org", issuer="https://" + "y" * 3000)
    with pytest.raises(SignerNotAllowed) as refusal:
        verifier.verify(RESULT, instance.sign(RESULT, long), EMAIL_SIGNER)
    assert len(str(refusal.value)) < 600


# Not a signature over these bytes


@pytest.mark.parametrize(
    "result",
    [RESULT + b"\n", RESULT[:-1], b"", json.dumps(json.loads(RESULT), indent=1).encode()],
    ids=["appended", "cut", "empty", "re-serialised"],
)
@pytest.mark.parametrize("with_digest", [True, False])
def test_the_right_signer_of_other_bytes_is_invalid(verifier, good, result, with_digest):
    raw = (
        good if with_digest else edited(good, lambda b: b["messageSignature"].pop("messageDigest"))
    )
    with pytest.raises(SignatureInvalid, match="exact bytes"):
        verifier.verify(result, raw, EMAIL_SIGNER)


def tampered_body(bundle: dict[str, Any]) -> None:
    body = json.loads(b64decode(entry(bundle)["canonicalizedBody"]))
    body["spec"]["data"]["hash"]["value"] = "0" * 64
    entry(bundle)["canonicalizedBody"] = b64encode(json.dumps(body).encode()).decode()


def tampered_checkpoint_root(bundle: dict[str, Any]) -> None:
    checkpoint = entry(bundle)["inclusionProof"]["checkpoint"]
    checkpoint["envelope"] = checkpoint["envelope"].replace("\n4\n", "\n5\n", 1)


def tampered_checkpoint_signature(bundle: dict[str, Any]) -> None:
    checkpoint = entry(bundle)["inclusionProof"]["checkpoint"]
    text, _, signature = checkpoint["envelope"].rstrip("\n").rpartition(" ")
    checkpoint["envelope"] = f"{text} {flipped(signature)}\n"


def tampered_promise(bundle: dict[str, Any]) -> None:
    promise = entry(bundle)["inclusionPromise"]
    promise["signedEntryTimestamp"] = flipped(promise["signedEntryTimestamp"])


def tampered_time(bundle: dict[str, Any]) -> None:
    entry(bundle)["integratedTime"] = str(int(entry(bundle)["integratedTime"]) + 1)


def tampered_index(bundle: dict[str, Any]) -> None:
    entry(bundle)["logIndex"] = str(int(entry(bundle)["logIndex"]) + 1)


def tampered_proof(bundle: dict[str, Any]) -> None:
    hashes = entry(bundle)["inclusionProof"]["hashes"]
    hashes[0] = flipped(hashes[0])


def tampered_signature(bundle: dict[str, Any]) -> None:
    message = bundle["messageSignature"]
    message["signature"] = flipped(message["signature"])


def tampered_certificate(bundle: dict[str, Any]) -> None:
    certificate = bundle["verificationMaterial"]["certificate"]
    certificate["rawBytes"] = flipped(certificate["rawBytes"])


def no_promise(bundle: dict[str, Any]) -> None:
    del entry(bundle)["inclusionPromise"]


def no_proof(bundle: dict[str, Any]) -> None:
    del entry(bundle)["inclusionProof"]


def no_log_entry(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["tlogEntries"] = []


def two_log_entries(bundle: dict[str, Any]) -> None:
    bundle["verificationMaterial"]["tlogEntries"] *= 2


def time_beyond_all_calendars(bundle: dict[str, Any]) -> None:
    entry(bundle)["integratedTime"] = str(2**64 - 1)


def thousands_of_checkpoint_signatures(bundle: dict[str, Any]) -> None:
    checkpoint = entry(bundle)["inclusionProof"]["checkpoint"]
    checkpoint["envelope"] += "\u2014 someone AAAAAAAAAAA=\n" * 20_000


@pytest.mark.parametrize("before", [True, False])
def test_a_checkpoint_with_thousands_of_signatures_is_refused_unread(
    verifier, good, before: bool, monkeypatch: pytest.MonkeyPatch
):
    def sign(count: int) -> bytes:
        def edit(bundle: dict[str, Any]) -> None:
            checkpoint = entry(bundle)["inclusionProof"]["checkpoint"]
            note, _, signature = checkpoint["envelope"].partition("\n\n")
            more = "\u2014 someone AAAAAAAAAAA=\n" * count
            both = more + signature if before else signature + more
            checkpoint["envelope"] = f"{note}\n\n{both}"

        return edited(good, edit)

    assert verifier.verify(RESULT, sign(MAX_CHECKPOINT_SIGNATURES - 1), EMAIL_SIGNER)

    def unread(*_: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("sigstore._internal.rekor.checkpoint.SignedNote.from_text", unread)
    for count in (MAX_CHECKPOINT_SIGNATURES, 6000):
        with pytest.raises(SignatureInvalid, match=f"has {count + 1} signatures, 512 is the most"):
            verifier.verify(RESULT, sign(count), EMAIL_SIGNER)


@pytest.mark.parametrize(
    "edit",
    [
        tampered_body,
        tampered_checkpoint_root,
        tampered_checkpoint_signature,
        tampered_promise,
        tampered_time,
        tampered_index,
        tampered_proof,
        tampered_signature,
        tampered_certificate,
        no_promise,
        no_proof,
        no_log_entry,
        two_log_entries,
        time_beyond_all_calendars,
        thousands_of_checkpoint_signatures,
    ],
)
def test_a_tampered_bundle_is_invalid(verifier, good, edit):
    with pytest.raises(SignatureInvalid):
        verifier.verify(RESULT, edited(good, edit), EMAIL_SIGNER)


def test_other_bytes_than_the_signed_ones_are_told_so(verifier, good):
    with pytest.raises(SignatureInvalid, match="it is not what was signed: sign this very file ag"):
        verifier.verify(RESULT + b" ", good, EMAIL_SIGNER)
    digest = b64encode(sha256(RESULT + b" ").digest()).decode()
    message = {"algorithm": "SHA2_256", "digest": digest}
    claimed = edited(good, lambda b: b["messageSignature"].update(messageDigest=message))
    with pytest.raises(SignatureInvalid, match="it is not what was signed: sign this very file ag"):
        verifier.verify(RESULT + b" ", claimed, EMAIL_SIGNER)


def test_a_member_that_a_bundle_names_twice_is_told(verifier, good):
    twice = good.replace(b'{"mediaType":', b'{"mediaType": 1, "mediaType":', 1)
    told = "/mediaType is named twice: send the file as cosign wrote it"
    with pytest.raises(SignatureInvalid, match=told):
        verifier.verify(RESULT, twice, EMAIL_SIGNER)


def test_the_log_entry_of_another_signature_is_invalid(verifier, instance, good):
    other = entry(json.loads(instance.sign(b"other", EMAIL)))
    swapped = edited(good, lambda b: b["verificationMaterial"].__setitem__("tlogEntries", [other]))
    with pytest.raises(SignatureInvalid):
        verifier.verify(RESULT, swapped, EMAIL_SIGNER)


@pytest.mark.parametrize("minutes", [-1, 11], ids=["before it began", "after it expired"])
def test_a_signature_logged_outside_the_certificates_life_is_invalid(verifier, instance, minutes):
    issued = datetime.now(UTC) - timedelta(hours=1)
    logged = issued + timedelta(minutes=minutes)
    raw = instance.sign(RESULT, EMAIL, issued_at=issued, logged_at=logged)
    with pytest.raises(SignatureInvalid, match=r"not valid when the log saw .*: sign this file ag"):
        verifier.verify(RESULT, raw, EMAIL_SIGNER)


def test_a_signature_of_last_month_is_as_good_as_todays(verifier, instance):
    issued = datetime.now(UTC) - timedelta(days=30)
    assert verifier.verify(RESULT, instance.sign(RESULT, EMAIL, issued_at=issued), EMAIL_SIGNER)


# Not in our trust root


def test_a_bundle_of_another_instance_is_unverifiable(verifier, tmp_path):
    stranger = ThrowawaySigstore.create(tmp_path / "stranger")
    with pytest.raises(Unverifiable, match="trust root"):
        verifier.verify(RESULT, stranger.sign(RESULT, EMAIL), EMAIL_SIGNER)


def newer_log(instance: ThrowawaySigstore) -> ThrowawaySigstore:
    return replace(instance, log_key=ec.generate_private_key(ec.SECP256R1()))


def newer_ct_log(instance: ThrowawaySigstore) -> ThrowawaySigstore:
    key = ec.generate_private_key(ec.SECP256R1())
    return replace(instance, authority=replace(instance.authority, ct_key=key))


def newer_ca_of_the_same_name(instance: ThrowawaySigstore) -> ThrowawaySigstore:
    authority, _ = new_authority()
    return replace(instance, authority=replace(authority, ct_key=instance.authority.ct_key))


@pytest.mark.parametrize(
    ("newer", "what"),
    [
        (newer_log, "bundle's transparency log"),
        (newer_ct_log, "certificate transparency log"),
        (newer_ca_of_the_same_name, "certificate authority"),
    ],
)
def test_a_key_newer_than_our_trust_root_is_unverifiable(verifier, instance, newer, what):
    with pytest.raises(Unverifiable, match=what):
        verifier.verify(RESULT, newer(instance).sign(RESULT, EMAIL), EMAIL_SIGNER)


# Not a bundle


def managed_key(bundle: dict[str, Any]) -> None:
    del bundle["verificationMaterial"]["certificate"]
    bundle["verificationMaterial"]["publicKey"] = {"hint": "our-key"}


def attestation(bundle: dict[str, Any]) -> None:
    del bundle["messageSignature"]
    bundle["dsseEnvelope"] = {
        "payload": b64encode(b"{}").decode(),
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [{"sig": b64encode(b"signature").decode()}],
    }


@pytest.mark.parametrize(
    ("edit", "detail"),
    [(managed_key, "managed key.*expected a certificate"), (attestation, "DSSE.*messageSignature")],
)
def test_another_kind_of_bundle_is_told_what_was_expected(verifier, good, edit, detail):
    with pytest.raises(SignatureInvalid, match=detail):
        verifier.verify(RESULT, edited(good, edit), EMAIL_SIGNER)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"not JSON",
        b"\x00\xff" * 1000,
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b'{"mediaType":' * 20_000,
        b"1" * 10_000,
        b"x" * 20_000_000,
        b"x" * 900_000,
        b'{"mediaType": "' + b"\x1b[2J\xc3\xa9" * 9 + b'"}',
    ],
    ids=lambda raw: f"{raw[:12]!r} of {len(raw)}",
)
def test_what_is_no_bundle_is_invalid_and_hardly_echoed(verifier, raw):
    with pytest.raises(SignatureInvalid) as refusal:
        verifier.verify(RESULT, raw, EMAIL_SIGNER)
    assert str(refusal.value).isascii()
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["\x1b[2J\u202egood", "x" * 100_000])
def test_a_member_that_no_bundle_has_is_invalid_and_hardly_echoed(verifier, good, name):
    with pytest.raises(SignatureInvalid) as refusal:
        verifier.verify(RESULT, edited(good, lambda b: b.update({name: 1})), EMAIL_SIGNER)
    assert str(refusal.value).isascii()
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 400


def test_a_bundle_is_not_read_beyond_a_size_that_no_honest_one_has(verifier, good):
    verifier.verify(RESULT, good.ljust(MAX_BUNDLE_BYTES), EMAIL_SIGNER)
    with pytest.raises(SignatureInvalid, match="1048577 bytes"):
        verifier.verify(RESULT, good.ljust(MAX_BUNDLE_BYTES + 1), EMAIL_SIGNER)


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    at, size = rng.randrange(len(raw)), rng.randrange(1, 40)
    return rng.choice(
        [
            raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :],
            raw[:at] + raw[at + size :],
            raw[:at],
            raw[:at] + rng.randbytes(size) + raw[at:],
            raw[:at] + raw[at : at + size] + raw[at:],
        ]
    )


STRANGE: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**400, [], [[]], {}, {"keyId": ""}),
    *("", " ", "\x00", "é", "0", "-1", "1" * 5000, "18446744073709551616", "=", "AAA", "AAAA"),
    *("0.0.1", "0.0.2", "dsse", "2024-01-01T00:00:00Z"),
]


def mutated_json(rng: random.Random, raw: bytes) -> bytes:
    """A random member replaced, removed, copied from elsewhere, or with a bit flipped."""
    bundle = json.loads(raw)
    places = list(members(bundle))
    holder, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            holder[key] = rng.choice(STRANGE)
        case 1:
            del holder[key]
        case 2:
            elsewhere, other = rng.choice(places)
            holder[key] = json.loads(json.dumps(elsewhere[other]))
        case _:
            holder[key] = flipped_anywhere(rng, holder[key])
    return json.dumps(bundle).encode()


def flipped_anywhere(rng: random.Random, value: Any) -> Any:
    try:
        data = bytearray(b64decode(value, validate=True))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    except (ValueError, TypeError):
        return [value]
    return b64encode(data).decode()


def members(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in pairs:
        yield value, key
        if isinstance(member, dict | list):
            yield from members(member)


def outcome(verifier: BundleVerifier, raw: bytes) -> SignerEvidence | str:
    """The evidence, or the refusal's text; any other exception fails the test."""
    try:
        return verifier.verify(RESULT, raw, EMAIL_SIGNER)
    except REFUSALS as refusal:
        return str(refusal)


def test_mutated_bundles_are_refused_or_are_the_same_evidence(verifier, good):
    """Some mutations change nothing that is signed (white space, base64's stray characters)."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when this fails)
    rng = random.Random(seed)  # noqa: S311 (no secret)
    raws = [(mutated_bytes if n % 2 else mutated_json)(rng, good) for n in range(300)]
    outcomes = [outcome(verifier, raw) for raw in raws]
    refusals = [text for text in outcomes if isinstance(text, str)]
    assert {it for it in outcomes if not isinstance(it, str)} <= {outcome(verifier, good)}
    assert len(refusals) > 200
    assert all(text.isprintable() and len(text) < 800 for text in refusals)


def test_no_mutated_result_is_accepted(verifier, good):
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when this fails)
    rng = random.Random(seed)  # noqa: S311 (no secret)
    results = {mutated_bytes(rng, RESULT) for _ in range(100)} - {RESULT}
    for result in results:
        with pytest.raises(SignatureInvalid):
            verifier.verify(result, good, EMAIL_SIGNER)


# The trust root


OFFLINE = """
import sys
def refuse(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event.startswith("socket.") or event == "os.mkdir" or writes:
        raise PermissionError(f"{event} {args}")
from datetime import UTC, datetime
from pathlib import Path
from auth.errors import Unverifiable
from auth.signers import BundleVerifier, Signer, load_policy
sys.addaudithook(refuse)
verifier = BundleVerifier(None, load_policy(Path("config/signers.yaml")))
assert verifier.trusted_root_age_s(datetime.now(UTC)) >= 0
try:
    verifier.verify(b"", sys.stdin.buffer.read(), None)
except Unverifiable as refusal:
    print(refusal)
"""


def test_the_production_root_loads_without_network_or_a_home(good):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        input=good,
        env={"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"},
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"transparency log" in done.stdout


def test_the_trust_roots_age_is_that_of_its_newest_key_and_not_of_its_file(instance, tmp_path):
    """A copy, or a new installation, makes no root newer."""
    root = json.loads(instance.trusted_root.read_bytes())
    newest = datetime(2025, 7, 4, tzinfo=UTC)
    for age, life in enumerate(valid_for(root)):
        life["start"] = (newest - timedelta(days=age)).isoformat()
    path = tmp_path / "trusted_root.json"
    path.write_text(json.dumps(root))
    verifier = BundleVerifier(path, SignerPolicy((EMAIL_SIGNER,)))
    assert verifier.trusted_root_age_s(newest + timedelta(hours=2)) == 7200
    assert verifier.trusted_root_age_s(newest - timedelta(hours=2)) == 0


@pytest.mark.parametrize("newer", range(3))
def test_each_log_and_authority_of_a_trust_root_counts_for_its_age(instance, tmp_path, newer):
    root = json.loads(instance.trusted_root.read_bytes())
    now = datetime.now(UTC)
    found = list(valid_for(root))
    assert len(found) == 3
    found[newer]["start"] = (now - timedelta(seconds=60)).isoformat()
    path = tmp_path / "trusted_root.json"
    path.write_text(json.dumps(root))
    verifier = BundleVerifier(path, SignerPolicy((EMAIL_SIGNER,)))
    assert verifier.trusted_root_age_s(now) == 60


def valid_for(root):
    """Yield the time range of each log's key and each authority of a trusted_root.json."""
    for name in ("tlogs", "ctlogs", "certificateAuthorities", "timestampAuthorities"):
        for one in root.get(name, ()):
            yield one.get("publicKey", one)["validFor"]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[" * 10_000, b"\xff"])
def test_a_trust_root_that_cannot_be_used_is_refused_at_start(tmp_path, content):
    path = tmp_path / "trusted_root.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyRefused, match=r"trusted_root\.json"):
        BundleVerifier(path, SignerPolicy((EMAIL_SIGNER,)))


@pytest.mark.parametrize(
    "content", ["k1:S3CRET", '"S3CRET"', '{"S3CRET": "S3CRET"}', '{"tlogs": "S3CRET"}']
)
def test_a_file_that_is_no_trust_root_is_not_quoted(tmp_path, content):
    path = tmp_path / "token-keys"
    path.write_text(content)
    with pytest.raises(PolicyRefused) as refused:
        BundleVerifier(path, SignerPolicy((EMAIL_SIGNER,)))
    assert "S3CRET" not in str(refused.value)
