"""bakeoff's Ed25519 envelope over a result, for a machine without an OIDC identity.

The scheme is bakeoff's signing module's (see auth/keys.py): it covers the canonical JSON of the
result, not its bytes, and neither `runner_id` nor `signed_at` of the envelope. So the key alone
says who signed; when is not known, and no transparency log has seen it.
"""

from collections.abc import Mapping
from typing import Any

from auth.errors import BadSignature, SignatureInvalid, SignerNotAllowed
from auth.keys import RunnerKey
from auth.signers import SignerEvidence


def verify_envelope(
    result: Any, sig: Mapping[str, Any], key: RunnerKey, runner_id: str
) -> SignerEvidence:
    """Return the evidence that `key` signed this result, a parsed JSON document.

    `sig` is the envelope's member of that name, of the schema envelope.json. Raises
    SignerNotAllowed when it names another runner, and SignatureInvalid when it does not verify.
    """
    if sig["runner_id"] != runner_id:
        raise SignerNotAllowed(
            f"The envelope's sig.runner_id is not {runner_id}, whose lease this is."
        )
    try:
        key.verify(result, sig["sha256"], sig["signature"])
    except BadSignature as error:
        raise SignatureInvalid(
            f"The Ed25519 envelope does not verify over result.json under the runner key "
            f"{key.fingerprint}: {error}"
        ) from None
    return SignerEvidence(f"ed25519:{key.fingerprint}", None, None, None)
