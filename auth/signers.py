"""Verify a Sigstore bundle over the exact bytes of a result: evidence of who signed, or a refusal.

Nothing here returns a boolean: `BundleVerifier.verify` returns `SignerEvidence` or raises one of
three refusals, whatever bytes come in. It is synchronous and stateless: threads may share it, and
pickled it is what it was made of, so that a worker process verifies by exactly the same.
"""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat import asn1
from cryptography.x509 import Certificate, ExtensionNotFound, ObjectIdentifier
from pydantic import ValidationError
from sigstore.errors import VerificationError
from sigstore.models import Bundle
from sigstore.verify import policy as certificate_policy
from sigstore_models.bundle.v1 import Bundle as BundleModel

from auth.errors import AuthError, PolicyRefused, SignatureInvalid, SignerNotAllowed
from auth.signer_policy import (
    OUTSIDERS,
    SELF_HOSTED,
    IgnoredEntry,
    Signer,
    SignerPolicy,
    check_signer,
    load_policy,
    source_of,
)
from auth.trust_root import RootFile, TrustRoot, printable, read_root
from config.json_text import misfits

__all__ = [
    "BundleVerifier",
    "Signer",
    "SignerEvidence",
    "SignerPolicy",
    "check_signer",
    "load_policy",
]

# sigstore's words for it, which a test of ours would see change.
_OTHER_BYTES = ("Bundle message digest mismatch", "Signature is invalid for input")
MAX_CHECKPOINT_SIGNATURES = 512  # public logs have one, and with witnesses some ten
GITHUB_HOSTED = "github-hosted"
# Real bundles have 9 KiB. The upload's own cap is a setting; this one holds whatever it is set to.
MAX_BUNDLE_BYTES = 1024 * 1024
MAX_DEPTH = 64  # of arrays and objects; real bundles have 7


@dataclass(frozen=True, slots=True)
class SignerEvidence:
    """The signer of a result and the time, each fact covered by a signature that was verified.

    `log_index` and `integrated_at` are the transparency log's; an entry without its promise (Rekor
    v2) has the index of its inclusion proof and the time of its timestamp authority. Of a runner
    key's envelope (auth/envelopes.py) only the key is known: `identity` is its fingerprint.
    """

    identity: str
    issuer: str | None
    log_index: int | None
    integrated_at: datetime | None


class BundleVerifier:
    """Verifies bundles against one trust root.

    `trusted_root` is a `trusted_root.json` (its path, or as it was read), None is Sigstore's
    production root as our sigstore package ships it; no network either way. `policy` is
    who may sign when a key has no signer.
    Raises `PolicyRefused` when the trust root cannot be used.
    """

    def __init__(self, trusted_root: Path | RootFile | None, policy: SignerPolicy) -> None:
        read = isinstance(trusted_root, RootFile)
        self._policy = policy
        self._root = TrustRoot(trusted_root if read else read_root(trusted_root))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._root.file, self._policy)

    @property
    def ignored(self) -> tuple[IgnoredEntry, ...]:
        """The entries of the signer policy that no certificate can match; tell of them."""
        return self._policy.ignored

    def trusted_root_age_s(self, now: datetime) -> float:
        """Seconds since the trust root's newest key came into use, for readyz and the metrics."""
        return self._root.age_s(now)

    def verify(self, result: bytes, bundle: bytes, expected: Signer | None) -> SignerEvidence:
        """Return the signer of exactly these bytes: `expected`, or else one of the policy.

        Raises `SignatureInvalid`, `SignerNotAllowed` or `Unverifiable`, and nothing else.
        """
        try:
            return self._verify(result, bundle, _AnyOf(self._allowed(expected)))
        except AuthError:
            raise
        except _WrongSigner as error:
            raise SignerNotAllowed(str(error)) from error
        except (KeyboardInterrupt, SystemExit):
            raise
        # Not only VerificationError: mutated bundles make the library raise ValueError, TypeError,
        # KeyError...; and a panic in its Rust parts is a BaseException of no public class.
        except BaseException as error:
            raise SignatureInvalid(
                f"The Sigstore bundle does not verify over the exact bytes of result.json (SHA-256 "
                f"{sha256(result).hexdigest()}): {printable(error)}"
            ) from error

    def _allowed(self, expected: Signer | None) -> tuple[Signer, ...]:
        if expected is None:
            return self._policy.signers
        try:
            check_signer(expected)
        except PolicyRefused as error:
            raise SignerNotAllowed(f"No bundle can match this runner key. {error}") from error
        # A key names its signer; how a workflow may have run is said by the policy's entry of it.
        named = (s for s in self._policy.signers if s.identity == expected.identity)
        allow = frozenset(way for s in named if s.issuer == expected.issuer for way in s.allow)
        return (replace(expected, allow=expected.allow | allow),)

    def _verify(self, result: bytes, raw: bytes, allowed: "_AnyOf") -> SignerEvidence:
        # 1. Read the bundle, within a size that no honest one reaches.
        model = _read(raw)
        _require_one_reading(raw, model)
        # 2. It is what `cosign sign-blob` writes: a signature of a message, by a certificate.
        _require_message_signature(model)
        _require_few_signatures(model)
        bundle = Bundle.from_json(raw)
        # 3. Our trust root knows the log, the CT log and the CA; otherwise nothing can be said
        #    about the signature, and the runner is told to try again rather than that it is bad.
        self._root.require(model, bundle.signing_certificate)
        # 4. Sigstore's own plan (verify/verifier.py): the certificate chain at the time of signing,
        #    its SCT, our policy, the log entry's inclusion and promise, and the signature and log
        #    entry's body over these exact bytes. The policy comes before the signature there, so a
        #    stranger's bad signature is told "not you", and the right signer's is told "invalid".
        try:
            self._root.verifier.verify_artifact(result, bundle, allowed)
        except VerificationError as error:
            if told := _in_words(error, model, bundle.signing_certificate):
                raise VerificationError(told) from error
            raise
        # 5. Only now are the bundle's words facts.
        signer = allowed.match(bundle.signing_certificate)
        log_index, integrated_at = _logged(model, bundle)
        return SignerEvidence(signer.identity, signer.issuer, log_index, integrated_at)


@lru_cache(maxsize=2)
def _rebuilt(file: RootFile, policy: SignerPolicy) -> BundleVerifier:
    """The verifier of a pickle. Kept, as a worker is handed the same one until the next reload."""
    return BundleVerifier(file, policy)


class _WrongSigner(VerificationError):
    """The certificate is good, but names none of the signers that are allowed."""


class _AnyOf:
    """Sigstore's `VerificationPolicy` protocol over exact signers; of none, nobody is allowed."""

    def __init__(self, signers: tuple[Signer, ...]) -> None:
        self._signers = signers

    def verify(self, cert: Certificate) -> None:
        self.match(cert)

    def match(self, cert: Certificate) -> Signer:
        refusals = []
        for signer in self._signers:
            try:
                _rule(signer).verify(cert)
            except VerificationError as error:
                refusals.append(f"{signer.identity} of {signer.issuer}: {printable(error)}")
            else:
                return signer
        raise _WrongSigner(
            "The bundle is signed, but by none of the signers that may sign this result. "
            + "; ".join(refusals[:5])
        )


def _rule(signer: Signer) -> certificate_policy.VerificationPolicy:
    # Not Identity(issuer=...): it skips the check when the issuer is an empty text.
    children: list[certificate_policy.VerificationPolicy] = [
        certificate_policy.OIDCIssuer(signer.issuer),
        certificate_policy.Identity(identity=signer.identity),
    ]
    if source := source_of(signer.identity):
        # A fork that calls our reusable workflow gets our identity and issuer; only these differ.
        children.append(certificate_policy.OIDCSourceRepositoryURI(source.repository_uri))
        children.append(certificate_policy.OIDCSourceRepositoryRef(source.ref))
        children.append(_RunAs(signer.allow))
    # A name that its owner gave up may be somebody else's by now; GitHub's ids are used once.
    if signer.owner_id is not None:
        children.append(certificate_policy.OIDCSourceRepositoryOwnerIdentifier(signer.owner_id))
    if signer.repository_id is not None:
        children.append(certificate_policy.OIDCSourceRepositoryIdentifier(signer.repository_id))
    return certificate_policy.AllOf(children)


class _RunAs:
    """Refuses a workflow that outsiders may start, or that a machine of somebody's own ran.

    GitHub writes both into every certificate; of one that does not say them, nothing is known.
    """

    def __init__(self, allow: frozenset[str]) -> None:
        self._allow = allow

    def verify(self, cert: Certificate) -> None:
        trigger = _extension(cert, certificate_policy.OIDCBuildTrigger.oid, "trigger")
        if trigger in OUTSIDERS - self._allow:
            raise VerificationError(
                f"the workflow was started by {trigger}, as anybody may: start it in another way,"
                f" or let its entry of the signer policy say `allow: [{trigger}]`"
            )
        machine = _extension(cert, certificate_policy.OIDCRunnerEnvironment.oid, "machine")
        if machine not in {GITHUB_HOSTED} | (self._allow & {SELF_HOSTED}):
            raise VerificationError(
                f"the workflow ran on a machine that is {machine}, not on one of GitHub's: run it"
                f" there, or let its entry of the signer policy say `allow: [{SELF_HOSTED}]`"
            )


def _extension(cert: Certificate, oid: ObjectIdentifier, what: str) -> str:
    try:
        extension = cert.extensions.get_extension_for_oid(oid).value
    except ExtensionNotFound:
        raise VerificationError(
            f"the certificate does not say the workflow's {what} ({oid.dotted_string})"
        ) from None
    return asn1.decode_der(str, extension.public_bytes())


def _read(raw: bytes) -> BundleModel:
    if len(raw) > MAX_BUNDLE_BYTES:
        raise SignatureInvalid(
            f"The Sigstore bundle has {len(raw)} bytes, {MAX_BUNDLE_BYTES} is the most"
        )
    try:
        return BundleModel.from_json(raw)
    except ValidationError as error:
        if _is_of_cosign_2(raw):
            raise SignatureInvalid(
                "The signature is in cosign 2's own form, not a Sigstore bundle: sign with"
                " `cosign sign-blob --new-bundle-format --bundle signature.sigstore.json`, or with"
                " cosign 3"
            ) from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(name) for name in first["loc"]) or "its text"
        problem = printable(f"{where}: {first['msg']}")
        raise SignatureInvalid(
            f"The signature is not a Sigstore bundle in JSON: {problem}"
        ) from error


def _is_of_cosign_2(raw: bytes) -> bool:
    """Return whether this is the bundle format of `cosign sign-blob --bundle` before version 3."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.keys() >= {"base64Signature", "cert"}


def _require_one_reading(raw: bytes, model: BundleModel) -> None:
    """Refuse a text that other verifiers could read differently: the text is what is kept.

    The library passes over letters that are no base64 and over zeros before a number, and takes
    the last member of a name. Written again, what it read must be what was sent.
    """
    try:
        misfit = next(misfits(raw.decode(), MAX_DEPTH), None)
    except (ValueError, RecursionError):
        raise SignatureInvalid(f"The Sigstore bundle is nested deeper than {MAX_DEPTH}") from None
    if misfit:
        place, why = misfit
        raise SignatureInvalid(
            f"In the Sigstore bundle, {printable(place)} {why}: send the file as cosign wrote it"
        )
    if json.loads(raw, object_pairs_hook=_members) != json.loads(model.to_json()):
        raise SignatureInvalid(
            "The Sigstore bundle can be read in more than one way (base64 that is not canonical, "
            "zeros before a number, names_in_snake_case): send the file as cosign wrote it"
        )


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A member that is null is one that is not there."""
    return {name: value for name, value in pairs if value is not None}


def _in_words(error: VerificationError, model: BundleModel, cert: Certificate) -> str | None:
    """Explain a refusal of the library with its fix; None where its own words are clear."""
    if isinstance(error, _WrongSigner):
        return None
    logged_at = model.verification_material.tlog_entries[0].integrated_time
    if logged_at:
        seen = datetime.fromtimestamp(logged_at, UTC)
        first, last = cert.not_valid_before_utc, cert.not_valid_after_utc
        if not first <= seen <= last:
            return (
                f"the certificate was not valid when the log saw the signature ({_minute(seen)}), "
                f"but from {_minute(first)} to {_minute(last)}: sign this file again"
            )
    if str(error) in _OTHER_BYTES:
        return "it is not what was signed: sign this very file again"
    return None


def _minute(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%MZ}"


def _require_message_signature(model: BundleModel) -> None:
    if model.verification_material.public_key is not None:
        raise SignatureInvalid(
            "The Sigstore bundle is signed with a managed key (verificationMaterial.publicKey); "
            "expected a certificate, which says who signed: sign with `cosign sign-blob`, keyless"
        )
    if model.dsse_envelope is not None:
        raise SignatureInvalid(
            "The Sigstore bundle holds a DSSE envelope (an attestation); expected messageSignature "
            "over result.json: sign with `cosign sign-blob`"
        )


def _require_few_signatures(model: BundleModel) -> None:
    """The library reads each; a log signs its checkpoint once, and a few witnesses beside it."""
    for entry in model.verification_material.tlog_entries:
        proof = entry.inclusion_proof
        note = proof.checkpoint.envelope if proof and proof.checkpoint else ""
        if (count := note.count("\n\u2014 ")) > MAX_CHECKPOINT_SIGNATURES:
            raise SignatureInvalid(
                f"The checkpoint of the log entry has {count} signatures, "
                f"{MAX_CHECKPOINT_SIGNATURES} is the most: send the file as cosign wrote it"
            )


def _logged(model: BundleModel, bundle: Bundle) -> tuple[int, datetime]:
    """The log index and time of a verified bundle, from the parts that a signature covers."""
    entry = model.verification_material.tlog_entries[0]
    if entry.inclusion_promise and entry.integrated_time:
        return entry.log_index, datetime.fromtimestamp(entry.integrated_time, UTC)
    # Rekor v2 promises nothing: the proof has the index, and one timestamp was found good. With
    # two we could not tell which.
    data = bundle.verification_material.timestamp_verification_data
    stamps = data.rfc3161_timestamps if data else []
    if len(stamps) != 1:
        raise SignatureInvalid(
            f"The Sigstore bundle has no inclusion promise and {len(stamps)} signed timestamps; "
            "expected exactly one"
        )
    return entry.inclusion_proof.log_index, stamps[0].tst_info.gen_time
