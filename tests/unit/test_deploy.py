"""The files of deploy/ name settings that exist and give each secret so that it can be read."""

import re
from pathlib import Path

from config.settings import PREFIX, Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNIT = (DEPLOY / "bakeoff-queue@.service").read_text()
# What a server needs to know and nobody else may.
SECRETS = {"database_url", "redis_lease_url", "redis_token_url", "token_keys", "receipt_keys"}


def test_the_unit_names_settings_that_there_are() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    named = re.findall(rf"^Environment=({PREFIX}\w+)=", UNIT, re.MULTILINE)
    assert named
    assert {name.removesuffix("_FILE") for name in named} <= known


def test_the_unit_hands_each_secret_to_its_own_user() -> None:
    """A file of root that is named outright could not be read by the user of DynamicUser=."""
    assert "DynamicUser=yes" in UNIT
    loaded = dict(re.findall(r"^LoadCredential=(\w+):(\S+)$", UNIT, re.MULTILINE))
    given = re.findall(rf"^Environment={PREFIX}(\w+)_FILE=%d/(\w+)$", UNIT, re.MULTILINE)
    assert {name.lower(): credential for name, credential in given} == {n: n for n in SECRETS}
    assert loaded.keys() == SECRETS
    assert all(path.startswith("/etc/bakeoff-queue/secrets/") for path in loaded.values())
