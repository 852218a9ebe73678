"""The throwaway Sigstore is real enough: sigstore's own verifier accepts what it signs."""

import json
import stat
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from sigstore.errors import VerificationError
from sigstore.models import Bundle, TrustedRoot
from sigstore.verify import Verifier, policy

from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore, WorkflowSubject

BLOB = b'{"run_id": "r1"}'
EMAIL = EmailSubject("runner@example.org")
WORKFLOW = WorkflowSubject("Rethunk-AI/bakeoff")


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> ThrowawaySigstore:
    return ThrowawaySigstore.create(tmp_path_factory.mktemp("sigstore"))


def verify(instance: ThrowawaySigstore, raw: bytes, rule: policy.VerificationPolicy) -> None:
    root = TrustedRoot.from_file(str(instance.trusted_root))
    Verifier(trusted_root=root).verify_artifact(BLOB, Bundle.from_json(raw), rule)


@pytest.mark.parametrize("subject", [EMAIL, WORKFLOW])
def test_sigstore_accepts_what_the_instance_signs(instance, subject):
    rule = policy.Identity(identity=subject.identity, issuer=subject.issuer)
    verify(instance, instance.sign(BLOB, subject), rule)


def test_another_process_can_sign_with_what_create_left_in_the_folder(instance):
    elsewhere = ThrowawaySigstore.load(instance.folder)
    rule = policy.Identity(identity=EMAIL.identity, issuer=EMAIL.issuer)
    verify(instance, elsewhere.sign(BLOB, EMAIL), rule)


def test_sigstore_refuses_what_another_instance_signed(instance, tmp_path):
    stranger = ThrowawaySigstore.create(tmp_path / "stranger")
    with pytest.raises(VerificationError):
        verify(instance, stranger.sign(BLOB, EMAIL), policy.UnsafeNoOp())


def test_a_workflow_certificate_names_issuer_repository_and_ref_as_fulcio_does(instance):
    raw = instance.sign(BLOB, WORKFLOW)
    rule = policy.AllOf(
        [
            policy.OIDCIssuer(WORKFLOW.issuer),
            policy.OIDCIssuerV2(WORKFLOW.issuer),
            policy.OIDCSourceRepositoryURI("https://github.com/Rethunk-AI/bakeoff"),
            policy.OIDCSourceRepositoryRef("refs/heads/main"),
        ]
    )
    verify(instance, raw, rule)


def test_a_fork_shares_the_identity_and_not_the_source_repository(instance):
    fork = WorkflowSubject("Rethunk-AI/bakeoff", source_repository="mallory/bakeoff")
    assert fork.identity == WORKFLOW.identity
    verify(
        instance,
        instance.sign(BLOB, fork),
        policy.OIDCSourceRepositoryURI("https://github.com/mallory/bakeoff"),
    )


def test_a_certificate_lives_ten_minutes(instance):
    bundle = json.loads(instance.sign(BLOB, EMAIL))
    der = b64decode(bundle["verificationMaterial"]["certificate"]["rawBytes"])
    certificate = x509.load_der_x509_certificate(der)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert life == timedelta(minutes=10)


def test_sigstore_refuses_a_signature_that_was_logged_after_the_certificate_expired(instance):
    issued = datetime.now(UTC) - timedelta(hours=1)
    late = instance.sign(BLOB, EMAIL, issued_at=issued, logged_at=issued + timedelta(minutes=11))
    with pytest.raises(VerificationError, match="not valid at validation time"):
        verify(instance, late, policy.Identity(identity=EMAIL.identity, issuer=EMAIL.issuer))


def test_private_keys_are_readable_by_their_owner_only(instance):
    keys = sorted(instance.folder.glob("*.key"))
    assert [key.name for key in keys] == ["ca.key", "ct.key", "log.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_an_instance_is_never_made_over_another(instance):
    before = instance.trusted_root.read_bytes()
    with pytest.raises(FileExistsError):
        ThrowawaySigstore.create(instance.folder)
    assert instance.trusted_root.read_bytes() == before


def test_the_server_side_never_imports_the_sandbox():
    for package in ("auth", "broker", "db", "handlers"):
        for module in (Path(__file__).parents[2] / package).rglob("*.py"):
            text = module.read_text()
            assert "import sandbox" not in text, module
            assert "from sandbox" not in text, module
