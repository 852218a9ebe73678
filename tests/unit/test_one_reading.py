"""The rule that a Sigstore bundle has one reading refuses none that an honest client wrote.

Real bundles are in tests/assets/sigstore; they sign attestations, so what refuses them comes after
the rule. The forms in which clients write a message's signature are put over a bundle of the
throwaway instance, and verified whole. What fuzzing found is refused in tests/unit/test_signers.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auth.errors import SignatureInvalid
from auth.signers import BundleVerifier, Signer, load_policy
from sandbox.services.sigstore_instance import EmailSubject, ThrowawaySigstore

ROOT = Path(__file__).parents[2]
REAL = sorted((ROOT / "tests/assets/sigstore").glob("*.sigstore"))
POLICY = load_policy(ROOT / "config/signers.yaml")
RESULT = b'{"run_id": "r1", "records": []}'
EMAIL = EmailSubject("runner@example.org")
SIGNER = Signer(EMAIL.identity, EMAIL.issuer)
OLD_TYPE = "application/vnd.dev.sigstore.bundle+json;version="

Json = dict[str, Any]


def material(bundle: Json) -> Json:
    return bundle["verificationMaterial"]


def chain(bundle: Json, version: str) -> None:
    certificates = [material(bundle).pop("certificate")]
    material(bundle)["x509CertificateChain"] = {"certificates": certificates}
    bundle["mediaType"] = OLD_TYPE + version


def python_form(bundle: Json) -> str:
    material(bundle)["timestampVerificationData"] = {}
    return json.dumps(bundle, indent=4)


def python_1_form(bundle: Json) -> str:
    chain(bundle, "0.1")
    return json.dumps(bundle)


def go_form(bundle: Json) -> str:
    """Cosign's too: the dash of a checkpoint as it is, and a space after colons in some builds."""
    return json.dumps(bundle, ensure_ascii=False, separators=(",", ": "))


def go_chain_form(bundle: Json) -> str:
    chain(bundle, "0.2")
    return json.dumps(bundle, ensure_ascii=False, separators=(",", ":"))


def js_form(bundle: Json) -> str:
    bundle["mediaType"] = OLD_TYPE + "0.3"
    material(bundle)["timestampVerificationData"] = {"rfc3161Timestamps": []}
    return json.dumps(bundle, ensure_ascii=False, separators=(",", ":"))


def other_order(bundle: Json) -> str:
    return json.dumps(bundle, sort_keys=True) + "\n"


def nulls(bundle: Json) -> str:
    """Clients whose serializer writes each member of the type."""
    material(bundle).update(publicKey=None, x509CertificateChain=None)
    material(bundle)["timestampVerificationData"] = None
    return json.dumps(bundle | {"dsseEnvelope": None})


@pytest.fixture(scope="module")
def good(sigstore: ThrowawaySigstore) -> bytes:
    return sigstore.sign(RESULT, EMAIL)


@pytest.mark.parametrize("real", REAL, ids=lambda path: path.name)
def test_a_real_bundle_is_refused_for_what_it_signs_and_not_for_how_it_is_written(
    real: Path,
) -> None:
    with pytest.raises(SignatureInvalid, match="holds a DSSE envelope"):
        BundleVerifier(None, POLICY).verify(RESULT, real.read_bytes(), None)


def test_there_are_real_bundles() -> None:
    assert len(REAL) == 2


@pytest.mark.parametrize(
    "form",
    [python_form, python_1_form, go_form, go_chain_form, js_form, other_order, nulls],
    ids=lambda form: form.__name__,
)
def test_a_bundle_verifies_in_the_form_of_each_client(
    form: Callable[[Json], str], good: bytes, sigstore: ThrowawaySigstore
) -> None:
    raw = form(json.loads(good)).encode()
    assert raw != good
    evidence = BundleVerifier(sigstore.trusted_root, POLICY).verify(RESULT, raw, SIGNER)
    assert (evidence.identity, evidence.issuer) == (SIGNER.identity, SIGNER.issuer)


@pytest.mark.parametrize("real", REAL, ids=lambda path: path.name)
def test_a_real_bundle_with_a_second_reading_is_refused_for_that(real: Path) -> None:
    text = real.read_text("utf-8").replace('"logIndex": "', '"logIndex": "0', 1)
    with pytest.raises(SignatureInvalid, match="more than one way"):
        BundleVerifier(None, POLICY).verify(RESULT, text.encode(), None)
