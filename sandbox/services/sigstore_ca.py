"""The certificate half of a throwaway Sigstore: a CA, its CT log, and code-signing certificates.

What Fulcio writes into a certificate: https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md.
"""

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

LEAF_LIFE = timedelta(minutes=10)
GITHUB_ISSUER = "https://token.actions.githubusercontent.com"

_FULCIO = "1.3.6.1.4.1.57264.1."
_ISSUER, _ISSUER_V2, _MACHINE, _SOURCE_REPOSITORY = (
    x509.ObjectIdentifier(_FULCIO + leaf) for leaf in ("1", "8", "11", "12")
)
_SOURCE_REF, _REPOSITORY_ID, _OWNER_ID, _TRIGGER = (
    x509.ObjectIdentifier(_FULCIO + leaf) for leaf in ("14", "15", "17", "20")
)
# TLS registry numbers (RFC 5246 7.4.1.4.1), as an SCT names its algorithm.
_SHA256_ECDSA = bytes((4, 3))


@dataclass(frozen=True, slots=True)
class EmailSubject:
    """Somebody who signed in with an e-mail address."""

    email: str
    issuer: str = "https://accounts.google.com"

    @property
    def identity(self) -> str:
        return self.email

    def name(self) -> x509.GeneralName:
        return x509.RFC822Name(self.email)

    def extensions(self) -> list[x509.UnrecognizedExtension]:
        return _issuer_extensions(self.issuer)


@dataclass(frozen=True, slots=True)
class WorkflowSubject:
    """A GitHub workflow; a fork that calls it shares its identity, not the source repository.

    `trigger` is the event that started it, `machine` the environment of its runner (github-hosted
    or self-hosted); a certificate that lacks one of them has None.
    """

    repository: str
    workflow: str = ".github/workflows/package-results.yml"
    ref: str = "refs/heads/main"
    issuer: str = GITHUB_ISSUER
    source_repository: str | None = None
    source_ref: str | None = None
    owner_id: str | None = None
    repository_id: str | None = None
    trigger: str | None = "push"
    machine: str | None = "github-hosted"

    @property
    def identity(self) -> str:
        return f"https://github.com/{self.repository}/{self.workflow}@{self.ref}"

    def name(self) -> x509.GeneralName:
        return x509.UniformResourceIdentifier(self.identity)

    def extensions(self) -> list[x509.UnrecognizedExtension]:
        repository = f"https://github.com/{self.source_repository or self.repository}"
        return [
            *_issuer_extensions(self.issuer),
            x509.UnrecognizedExtension(_SOURCE_REPOSITORY, asn1.encode_der(repository)),
            x509.UnrecognizedExtension(_SOURCE_REF, asn1.encode_der(self.source_ref or self.ref)),
            *(
                x509.UnrecognizedExtension(oid, asn1.encode_der(value))
                for oid, value in (
                    (_REPOSITORY_ID, self.repository_id),
                    (_OWNER_ID, self.owner_id),
                    (_TRIGGER, self.trigger),
                    (_MACHINE, self.machine),
                )
                if value is not None
            ),
        ]


Subject = EmailSubject | WorkflowSubject


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA that can issue: its certificate and key, and the CT log that sees what it issues."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    ct_key: ec.EllipticCurvePrivateKey

    def issue(
        self, public_key: ec.EllipticCurvePublicKey, subject: Subject, not_before: datetime
    ) -> x509.Certificate:
        """A certificate for `subject`, good for ten minutes, with an embedded SCT (RFC 6962)."""
        builder = self._leaf(public_key, subject, not_before)
        # The SCT signs the certificate without the SCT's extension, which is then added last: what
        # is left when a verifier takes it out again is, byte for byte, what was signed.
        precertificate = builder.sign(self.key, SHA256())
        timestamp = self._sct(precertificate.tbs_certificate_bytes, not_before)
        scts = x509.UnrecognizedExtension(
            ExtensionOID.PRECERT_SIGNED_CERTIFICATE_TIMESTAMPS, asn1.encode_der(timestamp)
        )
        return builder.add_extension(scts, critical=False).sign(self.key, SHA256())

    def _leaf(
        self, public_key: ec.EllipticCurvePublicKey, subject: Subject, not_before: datetime
    ) -> x509.CertificateBuilder:
        issuer_key = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        builder = (
            x509.CertificateBuilder(
                issuer_name=self.certificate.subject, subject_name=x509.Name([])
            )
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_before + LEAF_LIFE)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key.value),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([subject.name()]), critical=True)
        )
        for extension in subject.extensions():
            builder = builder.add_extension(extension, critical=False)
        return builder

    def _sct(self, tbs: bytes, at: datetime) -> bytes:
        """A list of one SignedCertificateTimestamp over a precertificate (RFC 6962 3.2 and 3.3)."""
        version, certificate_timestamp, precert_entry, no_extensions = 0, 0, 1, 0
        milliseconds = int(at.timestamp() * 1000)
        signed = (
            struct.pack("!BBQH", version, certificate_timestamp, milliseconds, precert_entry)
            + key_id(self.key)
            + len(tbs).to_bytes(3, "big")
            + tbs
            + struct.pack("!H", no_extensions)
        )
        signature = self.ct_key.sign(signed, ec.ECDSA(SHA256()))
        timestamp = (
            struct.pack("!B32sQH", version, key_id(self.ct_key), milliseconds, no_extensions)
            + _SHA256_ECDSA
            + _with_length(signature)
        )
        return _with_length(_with_length(timestamp))


def new_authority() -> tuple[Authority, x509.Certificate]:
    """An intermediate CA that can issue, and the root above it, whose key is forgotten here."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _ca(_name("throwaway-root"), root_key.public_key(), _name("throwaway-root"), root_key, 1)
    certificate = _ca(
        _name("throwaway-intermediate"), key.public_key(), root.subject, root_key, path_length=0
    )
    return Authority(certificate, key, ec.generate_private_key(ec.SECP256R1())), root


def key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SHA-256 of the public key's SPKI, which is how logs are known (RFC 6962 3.2)."""
    return sha256(spki(key)).digest()


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _ca(
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    path_length: int,
) -> x509.Certificate:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(issuer_name=issuer, subject_name=subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=365))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .sign(issuer_key, SHA256())
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "bakeoff-queue sandbox"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_extensions(issuer: str) -> list[x509.UnrecognizedExtension]:
    return [
        x509.UnrecognizedExtension(_ISSUER, issuer.encode()),
        x509.UnrecognizedExtension(_ISSUER_V2, asn1.encode_der(issuer)),
    ]


def _with_length(data: bytes) -> bytes:
    return struct.pack("!H", len(data)) + data
