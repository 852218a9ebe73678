"""SIGHUP: take up what changed in the settings' files, whole or not at all, while serving.

Read again are the trust root, the signer policy, the rings of token and receipt keys, and the log
level. All other settings hold from the start to the end of a process: it is restarted for them,
behind the balancer, which loses nothing.
"""

import asyncio
from collections.abc import Callable

import structlog

from auth.errors import PolicyRefused
from auth.receipts import ReceiptKeys
from auth.signers import BundleVerifier, load_policy
from auth.tokens import Tokens
from broker.admin.key_rings import KeyRings
from broker.results.active_verifier import ActiveVerifier
from config.logging import configure_logging
from config.settings import Settings, SettingsRefused

RELOADED = frozenset(
    {"trusted_root", "signers_file", "token_keys", "receipt_keys", "log_level", "log_format"}
)
ReadSettings = Callable[[], Settings]

log = structlog.get_logger()


class Reload:
    """`run_once()` reloads; `run()` does so whenever it is asked, until it is cancelled."""

    def __init__(
        self,
        settings: Settings,
        trusted: ActiveVerifier,
        tokens: Tokens,
        receipt_keys: ReceiptKeys,
        key_rings: KeyRings,
    ) -> None:
        self._key_rings = key_rings
        self._started_with = self._settings = settings
        self._trusted = trusted
        self._tokens = tokens
        self._receipt_keys = receipt_keys

    async def run(
        self, asked: asyncio.Event, read: ReadSettings, succeeded: Callable[[], None]
    ) -> None:
        """Reload whenever `asked` is set; `read` reads the settings as the start did.

        Asked during a reload, it reloads once more after it: the files may be newer.
        """
        while True:
            await asked.wait()
            asked.clear()
            if await self.run_once(read):
                succeeded()

    async def run_once(self, read: ReadSettings) -> bool:
        """Reload; return whether it was good. What is broken is told, and changes nothing."""
        try:
            # In a thread: a trust root is a file to read and certificates to parse.
            settings, verifier = await asyncio.to_thread(_read, read)
            await self._key_rings.hold(settings)
        except (SettingsRefused, PolicyRefused) as error:
            log.error("reload.refused", problem="; ".join(str(error).splitlines()))
            return False
        except Exception as error:  # whatever it is: the old settings are good, and serve on
            log.error("reload.refused", problem=f"{type(error).__name__}: {error}")
            return False
        self._take_up(settings, verifier)
        return True

    def _take_up(self, settings: Settings, verifier: BundleVerifier) -> None:
        """Without a pause in between: no request sees the half of it."""
        self._trusted.use(verifier)
        self._tokens.use(settings.token_ring)
        self._receipt_keys.use(settings.receipt_ring)
        log.info(
            "reload.done",
            trust_root_age_s=round(self._trusted.root_age_s()),
            needs_restart=_changed(self._started_with, settings),
        )
        before, self._settings = self._settings, settings
        # Last, or a quieter level would swallow the line above.
        if (settings.log_level, settings.log_format) != (before.log_level, before.log_format):
            configure_logging(settings.log_level, settings.log_format)


def _read(read: ReadSettings) -> tuple[Settings, BundleVerifier]:
    settings = read()
    if settings.missing_for_server:
        raise SettingsRefused("\n".join(settings.missing_for_server))
    return settings, BundleVerifier(settings.trusted_root, load_policy(settings.signers_file))


def _changed(before: Settings, now: Settings) -> list[str]:
    """The settings that differ, and that only a restart takes up."""
    names = Settings.model_fields.keys() - RELOADED
    return sorted(name for name in names if getattr(before, name) != getattr(now, name))
