"""The audit's hash chain: how a row is hashed, and what a run of entries proves.

Entry n holds SHA-256(hash of entry n - 1, canonical JSON of `{seq, ...row}`); 32 zero bytes stand
before the first. With the hash of one entry, from a signed receipt for instance, anybody can tell
whether a row up to it was changed, removed, added or moved.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from auth.keys import canonical_json

GENESIS = bytes(32)
HEAD_PURPOSE = "audit-head"
# A row is chained within seconds of being written. One that is not was put there past the service.
CHAINED_WITHIN = timedelta(seconds=60)
RECENT = 10_000  # entries; a signed head is of one that came seconds before


def entry_hash(previous: bytes, seq: int, row: Mapping[str, Any] | None) -> bytes:
    """Return the hash of entry `seq`, whose row is as the API shows it; None: it was gone."""
    return hashlib.sha256(previous + canonical_json({**(row or {}), "seq": seq})).digest()


@dataclass(frozen=True, slots=True)
class Witness:
    """A head of the chain that somebody else keeps: in a receipt, or a line of the log."""

    seq: int
    hash: str
    source: str


@dataclass
class ChainCheck:
    """Follows a chain entry by entry, from its start or from a head that is trusted."""

    witnesses: Iterable[Witness] = ()
    seq: int = 0
    hash: bytes = GENESIS
    problems: list[str] = field(default_factory=list)
    _latest: datetime | None = None
    _recent: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = {(each.seq, each.hash, each.source) for each in self.witnesses}

    def entry(self, entry: Mapping[str, Any]) -> None:
        """Take the next entry `{seq, audit_id, hash, row}` of the chain, in its order."""
        seq, row = entry["seq"], entry["row"]
        if seq != self.seq + 1:
            self.problems.append(f"entries {self.seq + 1} to {seq - 1} are gone")
        # After a gap there is nothing to calculate with: the entry before is not known.
        elif entry_hash(self.hash, seq, row).hex() != entry["hash"]:
            self.problems.append(f"entry {seq}: row {entry['audit_id']} is not what was chained")
        if row is None:
            self.problems.append(f"entry {seq}: row {entry['audit_id']} is gone")
        else:
            self._check_time(seq, datetime.fromisoformat(row["at"]))
        # From what is recorded, so that each changed row is named, and not all that follow it.
        self.seq, self.hash = seq, bytes.fromhex(entry["hash"])
        self._recent[seq] = entry["hash"]
        self._recent.pop(seq - RECENT, None)
        self._compare()

    def head(self, signed: Mapping[str, Any]) -> None:
        """Take a signed head that stands in the trail: it is of an entry a little before."""
        recorded = self._recent.get(signed["seq"])
        if recorded is not None and recorded != signed["hash"]:
            self.problems.append(
                f"entry {signed['seq']} is not the one whose hash was signed at {signed['at']}"
            )

    def unchained(self, row: Mapping[str, Any], now: datetime) -> None:
        """Take a row that is in no entry."""
        if now - datetime.fromisoformat(row["at"]) > CHAINED_WITHIN:
            self.problems.append(f"row {row['audit_id']} is in no entry of the chain")

    def end(self) -> list[str]:
        """Return all problems, once the last entry was taken."""
        late = [
            f"the chain ends at entry {self.seq}, and {source} has seen entry {seq}"
            for seq, _, source in sorted(self._waiting)
        ]
        return self.problems + late

    def _check_time(self, seq: int, at: datetime) -> None:
        if self._latest is not None and self._latest - at > CHAINED_WITHIN:
            self.problems.append(
                f"entry {seq}: its row says {at:%Y-%m-%dT%H:%M:%SZ}, and stands behind one of"
                f" {self._latest:%Y-%m-%dT%H:%M:%SZ}: it was written later than it says"
            )
        self._latest = at if self._latest is None else max(at, self._latest)

    def _compare(self) -> None:
        for each in [each for each in self._waiting if each[0] <= self.seq]:
            self._waiting.discard(each)
            seq, digest, source = each
            if (seq, digest) != (self.seq, self.hash.hex()):
                self.problems.append(f"entry {seq} is not the one that {source} has seen")
