"""The runner's look at its receipt: does it prove that this result of this run was accepted?

A receipt is worth keeping because it proves that to others, later; one that does not verify now
never will.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from auth.errors import AuthError
from auth.receipts import verify_receipt


class ReceiptDoubtful(Exception):
    """The receipt would prove nothing; the message says why."""


def read_receipt(
    receipt: Mapping[str, Any], published: Mapping[str, Any], **expected: str
) -> dict[str, Any]:
    """Return what is signed of `receipt`. Raises ReceiptDoubtful.

    `published` is the server's well-known document; `expected` names members that must be as given.
    """
    try:
        keys = {key["kid"]: key["public_key"] for key in published["keys"]}
        signed = verify_receipt(receipt, keys)
    except (AuthError, LookupError, TypeError) as error:
        raise ReceiptDoubtful(f"{type(error).__name__}: {error}") from error
    for name, value in expected.items():
        if signed.get(name) != value:
            raise ReceiptDoubtful(f"it is signed for another {name}")
    return signed


def digest(result: bytes) -> str:
    """Return what a receipt calls a result: the SHA-256 of the exact bytes of result.json."""
    return hashlib.sha256(result).hexdigest()
