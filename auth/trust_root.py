"""The trust root: which logs and CAs are believed, and telling "never heard of it" from "bad".

A private instance's `trusted_root.json`, or Sigstore's production root as our sigstore package
ships it; no network either way.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from cryptography.x509 import (
    AuthorityKeyIdentifier,
    Certificate,
    ExtensionNotFound,
    Name,
    PrecertificateSignedCertificateTimestamps,
    SubjectKeyIdentifier,
)
from sigstore.models import TrustedRoot
from sigstore.verify import Verifier
from sigstore_models.bundle.v1 import Bundle as BundleModel
from sigstore_models.trustroot.v1 import TransparencyLogInstance
from sigstore_models.trustroot.v1 import TrustedRoot as TrustedRootModel

from auth.errors import PolicyRefused, Unverifiable
from config.read_errors import describe_read_error

_PRODUCTION = "https://tuf-repo-cdn.sigstore.dev"


@dataclass(frozen=True, slots=True)
class RootFile:
    """A `trusted_root.json` as it was read, so that another process can believe the same one."""

    name: str
    text: bytes


class TrustRoot:
    """A trust root with the `verifier` that believes it. Threads may share it.

    Raises `PolicyRefused` when its `file` cannot be used.
    """

    def __init__(self, file: RootFile) -> None:
        self.file = file
        try:
            model = TrustedRootModel.from_json(file.text)
            root = TrustedRoot(model)
            self.verifier = Verifier(trusted_root=root)
            self._logs, self._ct_logs = _ids(model.tlogs), _ids(model.ctlogs)
            self._authorities = frozenset(map(_name_and_key_id, root.get_fulcio_certs()))
            self._newest = max(_starts(model))
        except Exception as error:
            raise _unusable(file.name, error) from error

    def age_s(self, now: datetime) -> float:
        """Seconds since its newest key or certificate authority came into use.

        Not since the file was written: a copy, or a new installation, makes no root newer.
        """
        return max(0.0, (now - self._newest).total_seconds())

    def require(self, model: BundleModel, cert: Certificate) -> None:
        """Raise `Unverifiable` unless the bundle's log, CA and CT log are in this root.

        The library takes a log id as a hint, and tries every key it has for one it does not know:
        that ends in "invalid", and in a runner that throws away a good result.
        """
        for entry in model.verification_material.tlog_entries:
            if entry.log_id.key_id not in self._logs:
                raise _unknown("transparency log", entry.log_id.key_id.hex())
        # By key id as well: a CA's next key usually keeps its name.
        issuer = cert.extensions.get_extension_for_class(AuthorityKeyIdentifier).value
        if (cert.issuer, issuer.key_identifier) not in self._authorities:
            raise _unknown("certificate authority", cert.issuer.rfc4514_string())
        timestamps = cert.extensions.get_extension_for_class(
            PrecertificateSignedCertificateTimestamps
        )
        for timestamp in timestamps.value:
            if timestamp.log_id not in self._ct_logs:
                raise _unknown("certificate transparency log", timestamp.log_id.hex())


def read_root(path: Path | None) -> RootFile:
    """Read a `trusted_root.json`; None is Sigstore's production root. Raises `PolicyRefused`."""
    name = str(path or "of Sigstore")
    try:
        with _root_file(path) as file:
            return RootFile(name, file.read_bytes())
    except OSError as error:
        raise _unusable(name, error) from error


def printable(text: object) -> str:
    """Return one printable line, of at most 200 characters, of text from outside."""
    line = " ".join(str(text).split()) or type(text).__name__
    return "".join(char if " " <= char <= "~" else "?" for char in line[:200])


def _ids(logs: list[TransparencyLogInstance]) -> frozenset[bytes]:
    # A log goes by the id its root declares: Rekor v2's is not the key's SHA-256 of RFC 6962.
    declared = (name.key_id for log in logs for name in (log.log_id, log.checkpoint_key_id) if name)
    return frozenset(declared)


def _starts(model: TrustedRootModel) -> Iterator[datetime]:
    """When each log's key and each authority came into use, as far as the root says so."""
    logs = [log.public_key for log in (*model.tlogs, *model.ctlogs)]
    for one in (*logs, *model.certificate_authorities, *model.timestamp_authorities):
        if one.valid_for:
            start = one.valid_for.start
            yield start if start.tzinfo else start.replace(tzinfo=UTC)


def _name_and_key_id(authority: Certificate) -> tuple[Name, bytes]:
    try:
        key = authority.extensions.get_extension_for_class(SubjectKeyIdentifier).value
    except ExtensionNotFound:
        key = SubjectKeyIdentifier.from_public_key(authority.public_key())
    return authority.subject, key.digest


def _unusable(name: str, error: Exception) -> PolicyRefused:
    return PolicyRefused(f"The trust root {name} cannot be used: {describe_read_error(error)}")


def _unknown(what: str, name: str) -> Unverifiable:
    return Unverifiable(
        f"The bundle's {what} ({printable(name)}) is not in the trust root in use here, which may "
        "be older than the bundle"
    )


@contextmanager
def _root_file(path: Path | None) -> Generator[Path]:
    """The trust root as a file on disk.

    `ClientTrustConfig.production(offline=True)` is not used: it needs a writable folder below
    $HOME, and takes whatever a cache there holds, unverified, for the root of all trust. The
    package's own copy is as trusted as the package; a test tells when a new release moves it.
    """
    if path is not None:
        yield path
        return
    store = resources.files("sigstore._store") / quote(_PRODUCTION, safe="")
    with resources.as_file(store / "trusted_root.json") as embedded:
        yield embedded
