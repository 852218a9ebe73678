"""Receipts: what a runner is given for an accepted result, signed."""

from typing import Any

from auth.receipts import ReceiptKeys
from broker.audit.chain import AuditChain
from broker.documents.times import rfc3339
from db.submissions import Accepted


class Receipts:
    """Gives receipts in the name of `public_url`, our own.

    Below that address, `/.well-known/bakeoff-queue.json` has the keys to verify them with. Each has
    the head of the audit's chain: what was in the trail by then cannot be changed unseen.
    """

    def __init__(self, keys: ReceiptKeys, public_url: str, audit_chain: AuditChain) -> None:
        self._keys = keys
        self._public_url = public_url
        self._audit_chain = audit_chain

    def give(self, accepted: Accepted) -> dict[str, Any]:
        """Return the signed receipt of an accepted result, as JSON holds it.

        It is stored as it is: another key would sign it otherwise, and a submit that is sent again
        must get the same answer.
        """
        return self._keys.sign(
            {
                "run_id": str(accepted.run_id),
                "receipt_id": str(accepted.receipt_id),
                "result_sha256": accepted.result_sha256,
                "trust": accepted.trust,
                "accepted_at": rfc3339(accepted.accepted_at),
                "signer": {
                    "identity": accepted.signer_identity,
                    "issuer": accepted.signer_issuer,
                    "log_index": accepted.log_index,
                },
                "rows": {
                    "model_metrics": accepted.model_metrics,
                    "hardware_metrics": accepted.hardware_metrics,
                },
                "runner_id": accepted.runner_id,
                "key_fingerprint": accepted.fingerprint,
                "public_url": self._public_url,
                "audit": self._audit_chain.head,
            }
        )

    def published(self) -> dict[str, Any]:
        """Return what the well-known document says of us and of our keys."""
        return {"public_url": self._public_url, "keys": self._keys.published()}
