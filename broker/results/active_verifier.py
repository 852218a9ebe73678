"""The verifier in use, which a reload replaces as a whole."""

from datetime import UTC, datetime

import structlog

from auth.signers import BundleVerifier

log = structlog.get_logger()

DAY_S = 86_400


class ActiveVerifier:
    """Whom results are believed from, at this moment: one trust root with one signer policy.

    Whoever begins something takes `verifier` once and ends with it: half of an old trust root and
    half of a new policy would be neither.
    """

    def __init__(self, verifier: BundleVerifier, stale_s: int) -> None:
        """Believe `verifier`, whose trust root is degraded `stale_s` after its newest key began."""
        self._stale_s = stale_s
        self.use(verifier)

    def use(self, verifier: BundleVerifier) -> None:
        """Believe `verifier` from now on. Entries of its signer policy that are ignored are told.

        An operator who believes that such an entry works widens another one when results are
        refused.
        """
        self.verifier = verifier
        for entry in verifier.ignored:
            log.warning("signers.entry_ignored", where=entry.where, why=entry.why)

    def root_age_s(self) -> float:
        """Seconds since the trust root's newest key came into use."""
        return self.verifier.trusted_root_age_s(datetime.now(UTC))

    def root_state(self) -> str:
        """Return "ok", or what to do about a trust root that is too old.

        Old is not wrong: what it knows still verifies. But bundles of a log that is newer than it
        are refused as `unverifiable`, and somebody's hours of work wait for a fresh file.
        """
        if (age_s := self.root_age_s()) <= self._stale_s:
            return "ok"
        return (
            f"degraded: its newest key is {age_s / DAY_S:.0f} days old: put a fresh"
            " trusted_root.json in its place and send SIGHUP; the built-in root comes with a new"
            " release of the sigstore package"
        )
