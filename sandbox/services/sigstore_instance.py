"""A throwaway Sigstore: signs blobs into bundles that sigstore's own verifier accepts, offline.

For tests, the demo and `dev` mode, which go through the real verification with a trust root of
their own. It vouches for whatever it is asked to: the server never imports it.
"""

import json
import os
import secrets
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from sandbox.services.sigstore_ca import (
    Authority,
    EmailSubject,
    Subject,
    WorkflowSubject,
    key_id,
    new_authority,
    spki,
)

__all__ = ["EmailSubject", "ThrowawaySigstore", "WorkflowSubject"]

_TRUSTED_ROOT = "trusted_root.json"
_ORIGIN = "throwaway.rekor.invalid"


@dataclass(frozen=True, slots=True)
class ThrowawaySigstore:
    """A CA, a CT log and a transparency log (Rekor v1) of which only one folder knows."""

    folder: Path
    authority: Authority
    log_key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, folder: Path) -> "ThrowawaySigstore":
        """Make a new instance: its `trusted_root.json` and private keys (0600) go into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        authority, root = new_authority()
        instance = cls(folder, authority, ec.generate_private_key(ec.SECP256R1()))
        for name, key in instance._keys().items():
            _write_key(folder / name, key)
        instance.trusted_root.write_text(json.dumps(instance._trusted_root(root), indent=2))
        return instance

    @classmethod
    def load(cls, folder: Path) -> "ThrowawaySigstore":
        """The instance that `create` left in `folder`, for another process to sign with."""
        root = json.loads((folder / _TRUSTED_ROOT).read_text())
        chain = root["certificateAuthorities"][0]["certChain"]["certificates"]
        certificate = x509.load_der_x509_certificate(b64decode(chain[0]["rawBytes"]))
        key, ct_key, log_key = (
            _read_key(folder / name) for name in ("ca.key", "ct.key", "log.key")
        )
        return cls(folder, Authority(certificate, key, ct_key), log_key)

    @property
    def trusted_root(self) -> Path:
        """The file that a verifier of this instance's bundles is given."""
        return self.folder / _TRUSTED_ROOT

    def sign(
        self,
        blob: bytes,
        subject: Subject,
        *,
        issued_at: datetime | None = None,
        logged_at: datetime | None = None,
    ) -> bytes:
        """A bundle (v0.3, JSON) over `blob`, signed by `subject` with a key made for this once.

        The certificate is good for ten minutes from `issued_at` (default: a minute ago); the log
        says it saw the signature at `logged_at` (default: a minute after the issue).
        """
        issued_at = issued_at or datetime.now(UTC) - timedelta(minutes=1)
        logged_at = logged_at or issued_at + timedelta(minutes=1)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.authority.issue(key.public_key(), subject, issued_at)
        signature = key.sign(blob, ec.ECDSA(SHA256()))
        digest = sha256(blob).digest()
        body = _hashedrekord(certificate, signature, digest)
        bundle = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _b64(certificate.public_bytes(Encoding.DER))},
                "tlogEntries": [self._log_entry(body, int(logged_at.timestamp()))],
            },
            "messageSignature": {
                "messageDigest": {"algorithm": "SHA2_256", "digest": _b64(digest)},
                "signature": _b64(signature),
            },
        }
        return json.dumps(bundle).encode()

    def _keys(self) -> dict[str, ec.EllipticCurvePrivateKey]:
        return {
            "ca.key": self.authority.key,
            "ct.key": self.authority.ct_key,
            "log.key": self.log_key,
        }

    def _log_entry(self, body: bytes, at: int) -> dict[str, Any]:
        """The entry as a log would answer it: the third of four leaves of a tree made for it."""
        first, second, fourth = (sha256(secrets.token_bytes(32)).digest() for _ in range(3))
        left = _node(first, second)
        root = _node(left, _node(_leaf(body), fourth))
        # A log counts over all its trees: its index differs from the one within this tree's proof.
        index = secrets.randbelow(2**40)
        return {
            "logIndex": str(index),
            "logId": {"keyId": _b64(key_id(self.log_key))},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.1"},
            "integratedTime": str(at),
            "inclusionPromise": {"signedEntryTimestamp": _b64(self._promise(body, at, index))},
            "inclusionProof": {
                "logIndex": "2",
                "rootHash": _b64(root),
                "treeSize": "4",
                "hashes": [_b64(fourth), _b64(left)],
                "checkpoint": {"envelope": self._checkpoint(4, root)},
            },
            "canonicalizedBody": _b64(body),
        }

    def _promise(self, body: bytes, at: int, index: int) -> bytes:
        """Rekor's signed entry timestamp: a signature over the entry's canonical JSON."""
        entry = {
            "body": _b64(body),
            "integratedTime": at,
            "logID": key_id(self.log_key).hex(),
            "logIndex": index,
        }
        return self._log_signature(_canonical(entry))

    def _checkpoint(self, size: int, root: bytes) -> str:
        """A signed note (https://github.com/C2SP/C2SP/blob/main/tlog-checkpoint.md)."""
        note = f"{_ORIGIN}\n{size}\n{_b64(root)}\n"
        signature = key_id(self.log_key)[:4] + self._log_signature(note.encode())
        return f"{note}\n\u2014 {_ORIGIN} {_b64(signature)}\n"

    def _log_signature(self, data: bytes) -> bytes:
        return self.log_key.sign(data, ec.ECDSA(SHA256()))

    def _trusted_root(self, root: x509.Certificate) -> dict[str, Any]:
        since = {"start": root.not_valid_before_utc.isoformat()}
        chain = (self.authority.certificate, root)
        authority = {
            "subject": {"organization": "bakeoff-queue sandbox", "commonName": "throwaway"},
            "uri": "https://throwaway.fulcio.invalid",
            "certChain": {
                "certificates": [{"rawBytes": _b64(c.public_bytes(Encoding.DER))} for c in chain]
            },
            "validFor": since,
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [_log(f"https://{_ORIGIN}", self.log_key, since)],
            "certificateAuthorities": [authority],
            "ctlogs": [_log("https://throwaway.ct.invalid", self.authority.ct_key, since)],
        }


def _log(url: str, key: ec.EllipticCurvePrivateKey, since: dict[str, str]) -> dict[str, Any]:
    return {
        "baseUrl": url,
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": _b64(spki(key)),
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": since,
        },
        "logId": {"keyId": _b64(key_id(key))},
    }


def _hashedrekord(certificate: x509.Certificate, signature: bytes, digest: bytes) -> bytes:
    """Return Rekor's entry of a signed blob: its digest, the signature and the certificate."""
    pem = certificate.public_bytes(Encoding.PEM)
    spec = {
        "data": {"hash": {"algorithm": "sha256", "value": digest.hex()}},
        "signature": {"content": _b64(signature), "publicKey": {"content": _b64(pem)}},
    }
    return _canonical({"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec})


def _canonical(value: object) -> bytes:
    # Of ASCII texts and small integers, this is RFC 8785.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _leaf(body: bytes) -> bytes:
    return sha256(b"\x00" + body).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Private from its first byte on: O_EXCL, and the mode before the contents.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey), f"{path} is not one of our keys"
    return key


def _b64(data: bytes) -> str:
    return b64encode(data).decode()
