"""requirements.txt: pins and hashes for every supported Python, whichever one resolved it.

pip installs it with --require-hashes, which refuses a dependency without a pin. A dependency may be
needed by one patch release of Python alone, so the markers are evaluated here as pip would there.
"""

import configparser
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parents[2]
# 3.11.2 is Debian 12's; some packages need more below 3.11.3.
PYTHONS = ("3.11.0", "3.11.2", "3.11.3", "3.12.0", "3.13.0", "3.14.0")
Pins = Mapping[NormalizedName, Requirement]
RequiresOf = Callable[[str, str], Iterable[str]]


def read_pins(text: str) -> Pins:
    """The pinned requirements by name, each without its hashes, which it must have."""
    pins: dict[NormalizedName, Requirement] = {}
    for entry in text.replace("\\\n", " ").splitlines():
        line, _, hashes = entry.partition("--hash=")
        if line.strip() and not line.lstrip().startswith("#"):
            assert hashes, f"{line} has no hash"
            pin = Requirement(line)
            pins[canonicalize_name(pin.name)] = pin
    return pins


def version_of(pin: Requirement) -> str:
    """The one version that a pin allows."""
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is no pin"
    return specifier.version


def environment(python: str) -> dict[str, str]:
    """The markers' variables of a CPython on Linux."""
    return {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "implementation_name": "cpython",
        "implementation_version": python,
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
    }


def unpinned(needed: Iterable[str], pins: Pins, requires_of: RequiresOf, python: str) -> list[str]:
    """The requirements, with those of what is pinned, that `python` needs and no pin satisfies."""
    here, wrong, seen = environment(python), [], set()
    todo = [(text, "") for text in needed]
    while todo:
        text, extra = todo.pop()
        if (text, extra) in seen:
            continue
        seen.add((text, extra))
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({**here, "extra": extra}):
            continue
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None or (pin.marker and not pin.marker.evaluate(here)):
            wrong.append(text)
        elif not wanted.specifier.contains(version_of(pin), prereleases=True):
            wrong.append(f"{text}, and {version_of(pin)} is pinned")
        else:
            of_it = requires_of(pin.name, version_of(pin))
            todo += [(each, extra) for each in of_it for extra in ("", *wanted.extras)]
    return wrong


def installed_requires(name: str, version: str) -> Iterable[str]:
    """What this very version requires; nothing where another one, or none, is installed."""
    try:
        found = distribution(name)
    except PackageNotFoundError:  # by a marker, for instance
        return ()
    return found.requires or () if found.version == version else ()


def direct() -> list[str]:
    """The service's own requirements."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].split()


@pytest.mark.parametrize("python", PYTHONS)
def test_every_supported_python_finds_a_pin_for_all_that_it_needs(python: str) -> None:
    pins = read_pins((ROOT / "requirements.txt").read_text())
    wrong = unpinned(direct(), pins, installed_requires, python)
    assert not wrong, "run `make requirements`"


@pytest.mark.parametrize("marker", ["", ' ; python_version >= "3.12"'])
def test_what_one_patch_release_alone_needs_is_found_missing(marker: str) -> None:
    pins = read_pins("a==1 --hash=sha256:0\n" + (f"b==1{marker} --hash=sha256:0" if marker else ""))
    requires = {"a": ['b>=1 ; python_full_version < "3.11.3"']}

    def missing(python: str) -> list[str]:
        return unpinned(["a"], pins, lambda name, _: requires.get(name, ()), python)

    assert missing("3.11.2") == requires["a"]
    assert missing("3.11.3") == []


def test_a_pin_of_a_version_that_is_not_allowed_is_found() -> None:
    pins = read_pins("a==1 --hash=sha256:0")
    assert unpinned(["a>1"], pins, lambda *_: (), "3.12.0") == ["a>1, and 1 is pinned"]
