"""No version with a known hole fits, and the threat model names tests that there are."""

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
# The first version without the hole.
MENDED = {
    "tornado": ("6.5.7", "denial of service by multipart and headers (CVE-2025-47287 and later)"),
    "pynacl": ("1.6.2", "points outside of the main subgroup are taken (CVE-2025-69277)"),
    "orjson": ("3.11.6", "unbounded recursion in dumps (CVE-2025-67221)"),
    "pyjwt": ("2.13.0", "a public JWK is taken as an HMAC secret (CVE-2026-48526)"),
    "python-multipart": ("0.0.30", "name*= overrides the name that others read (CVE-2026-53537)"),
    "pyyaml": ("5.4", "arbitrary code by full_load (CVE-2020-14343)"),
    "redis": ("4.5.5", "answers of a cancelled command go to the next (CVE-2023-28859)"),
    "sigstore": ("4.2.0", "OIDC state is not compared (CVE-2026-24408)"),
}


def _required() -> dict[str, Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    return {each.name: each for each in map(Requirement, filter(None, lines))}


@pytest.mark.parametrize("name", MENDED)
def test_no_version_with_a_known_hole_fits(name: str) -> None:
    mended, hole = MENDED[name]
    floors = [
        Version(each.version) for each in _required()[name].specifier if each.operator == ">="
    ]
    assert floors, f"{name} has no floor"
    assert max(floors) >= Version(mended), f"{name} below {mended}: {hole}"


@pytest.mark.parametrize("name", MENDED)
def test_no_pinned_version_has_a_known_hole(name: str) -> None:
    pins = re.findall(
        rf"^{name}==([^ ;\\]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    )
    assert pins
    assert all(Version(pin) >= Version(MENDED[name][0]) for pin in pins)


def test_every_test_that_the_threat_model_names_is_there() -> None:
    page = (ROOT / "docs/threat-model.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 30
    for file, name in named:
        (path,) = (ROOT / "tests").glob(f"*/{file}")
        text = path.read_text()
        assert not name or f"def {name}(" in text, (file, name)


def test_every_threat_has_a_control_and_a_test() -> None:
    page = (ROOT / "docs/threat-model.md").read_text()
    table = page.partition("## Threats")[2].partition("## Not defended")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for asset, attack, control, test, _ in rows:
        assert all(cell.strip() for cell in (asset, attack, control)), asset
        assert re.search(r"`(test_\w+\.py|make \w+|ruff)", test), asset
