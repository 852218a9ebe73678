"""An admin token for demo, dev, tests and benchmarks: put into the database, and never expiring."""

from collections.abc import Iterable
from datetime import datetime

from auth import admin_tokens
from db import admin
from db.pool import Executor


async def new_token(
    pool: Executor,
    name: str,
    scopes: Iterable[str] = admin_tokens.SCOPES,
    expires_at: datetime | None = None,
) -> str:
    """Make a token called `name`, or nearly so where another living one has the name."""
    token, digest = admin_tokens.make()
    for each in (name, f"{name}-{digest.hex()[:8]}"):
        if await admin.add_token(pool, digest, each, sorted(scopes), expires_at, "sandbox"):
            break
    return token
