"""Imports point one way: cli -> server -> handlers -> broker -> {auth, db} -> config."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "config": set(),
    "auth": {"config"},
    "db": {"config"},
    "broker": {"auth", "db", "config"},
    "handlers": {"broker", "auth", "db", "config"},
    "server": {"handlers", "broker", "auth", "db", "config"},
    "client": {"broker", "auth", "db", "config"},
    "sandbox": {"client", "broker", "auth", "db", "config"},
    "cli": {"client", "sandbox", "server", "handlers", "broker", "auth", "db", "config"},
}
# Inside `broker/`: what a folder, or a module beside the folders, may import of the others. Each is
# allowed what the ones below it are allowed.
BROKER_ORDER = [
    {"services"},
    {"admin", "health", "reload", "doctor"},
    {"results", "runners"},
    {"leases", "jobs"},
    {"audit", "concurrency"},
    {"documents", "telemetry", "in_flight"},
    {"errors"},
]
# Beside the order: health and reload look at what an admin's rings are.
BROKER_BESIDE = {("health", "admin"), ("reload", "admin"), ("doctor", "admin")}
# Only these commands start private servers; the rest of the command line runs without a sandbox.
SANDBOX_COMMANDS = {"cli/demo.py", "cli/dev.py"}
# HTTP is the handlers' and the server's; the clients speak it from the outside.
TORNADO = {"handlers", "server"}


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


MODULES = sorted(
    path
    for layer in MAY_IMPORT
    for path in [*ROOT.glob(f"{layer}.py"), *ROOT.glob(f"{layer}/**/*.py")]
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    layer = name.partition("/")[0].removesuffix(".py")
    allowed = MAY_IMPORT[layer] | {layer} | ({"sandbox"} if name in SANDBOX_COMMANDS else set())
    assert imported(path) & MAY_IMPORT.keys() <= allowed
    assert layer in TORNADO or "tornado" not in imported(path)


def broker_imports(path: Path) -> set[tuple[str, str]]:
    """Each room of `broker/` that a module of it imports, beside its own."""
    rooms = {room for level in BROKER_ORDER for room in level}
    mine = path.relative_to(ROOT / "broker").parts[0].removesuffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("broker"):
            continue
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {(mine, name.split(".")[1]) for name in names} - {(mine, mine)}
    assert {room for pair in found for room in pair} <= rooms, f"{path}: a room without a place"
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.is_relative_to(ROOT / "broker") and path.stat().st_size],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_module_of_the_broker_imports_only_what_lies_below_its_room(path: Path) -> None:
    level = {room: number for number, rooms in enumerate(BROKER_ORDER) for room in rooms}
    upward = {
        (mine, other)
        for mine, other in broker_imports(path)
        if level[other] <= level[mine] and (mine, other) not in BROKER_BESIDE
    }
    assert upward == set()


def test_only_the_settings_read_the_environment() -> None:
    """The sandbox's children are given an environment, and tracing sets a default of a library's:
    different things."""
    readers = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if not path.is_relative_to(ROOT / "sandbox")
        and any(text in path.read_text() for text in ("os.environ", "os.getenv"))
    }
    assert readers == {"config/settings.py", "config/tracing.py"}
