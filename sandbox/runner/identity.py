"""Identity of a runner: its Ed25519 key file, and the registration signed by it."""

import base64
import hashlib
import os
import secrets
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nacl.signing import SigningKey

from auth.keys import canonical_json

VERSION = "demo-runner/0.1.0"


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a registering process: the Ed25519 key, the server, the capabilities."""

    key: SigningKey
    audience: str
    hostname: str
    capabilities: dict[str, Any]
    instance_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def sign_registration(self) -> bytes:
        """Return a registration body with a fresh nonce, signed by bakeoff's Ed25519 scheme."""
        registration = {
            "purpose": "register",
            "audience": self.audience,
            "public_key": public_key_text(self.key),
            "hostname": self.hostname,
            "process_id": os.getpid(),
            "instance_id": self.instance_id,
            "capabilities": self.capabilities,
            "version": VERSION,
            "signed_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "nonce": secrets.token_hex(16),
        }
        digest = hashlib.sha256(canonical_json(registration)).digest()
        signature = base64.b64encode(self.key.sign(digest).signature).decode()
        sig = {"sha256": digest.hex(), "signature": signature}
        return canonical_json({"registration": registration, "sig": sig})


def load_key(path: Path) -> SigningKey:
    """Read the runner key at `path` (base64 of a 32-byte seed), or make one, mode 0600.

    Raises ValueError when the file holds something else.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return SigningKey(base64.b64decode(path.read_text().strip(), validate=True))
    key = SigningKey.generate()
    with os.fdopen(descriptor, "w") as file:
        file.write(base64.b64encode(bytes(key)).decode() + "\n")
    return key


def public_key_text(key: SigningKey) -> str:
    """The public key as it travels: standard base64 of 32 bytes."""
    return base64.b64encode(bytes(key.verify_key)).decode()
