"""The files of deploy/ name settings that exist and give each secret so that it can be read."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from broker.telemetry import WATCHED, Telemetry
from config.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
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


ALERTS = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
PANELS = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [
    target["expr"] for panel in PANELS for target in panel["targets"]
]


def names_of_metrics() -> set[str]:
    """Return the name of each sample family that a process exposes."""
    telemetry = Telemetry("test")
    telemetry.watch(**{name: lambda: 0.0 for name in WATCHED})
    telemetry.watch_pool(lambda: 0, lambda: 0)
    telemetry.watch_dropped_lines(lambda: 0)
    families = text_string_to_metric_families(telemetry.exposition().decode())
    endings = ("", "_total", "_bucket", "_count", "_sum")
    return {family.name + ending for family in families for ending in endings}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_metrics_that_a_process_exposes(expression: str) -> None:
    named = set(re.findall(r"\b(bakeoff_queue_\w+|process_\w+)", expression))
    assert named <= names_of_metrics()
    assert named or expression.startswith("up")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_its_entry_in_the_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/runbook.md"
    headings = re.findall(r"^### (.+)$", RUNBOOK, re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def settings_named(text: str) -> set[str]:
    return {name.removesuffix("_FILE") for name in re.findall(rf"{PREFIX}\w+", text)}


@pytest.mark.parametrize(
    "path", sorted(DEPLOY.glob("**/*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY))
)
def test_a_yaml_file_can_be_read_and_names_settings_that_there_are(path: Path) -> None:
    text = path.read_text()
    assert [*yaml.safe_load_all(text)]
    assert settings_named(text) <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_compose_gives_both_processes_all_that_a_server_needs() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name in ("one", "two"):
        given = {key.removesuffix("_FILE").removeprefix(PREFIX).lower()
                 for key in services[name]["environment"]}  # fmt: skip
        assert given >= {*SECRETS, "public_url"}
        assert services[name]["read_only"] is True
    redis = (DEPLOY / "redis.conf").read_text()
    assert re.search(r"^notify-keyspace-events Ex$", redis, re.MULTILINE)


# Each by its own tool, where the machine has it.
TOOLS = {
    "promtool": ("check", "rules", "alerts.yaml"),
    "haproxy": ("-c", "-f", "haproxy.cfg"),
    "kubectl": ("kustomize", "kubernetes"),
    "systemd-analyze": ("verify",),  # of a copy, whose program is there
}


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if shutil.which(tool)] or ["none"])
def test_a_tool_finds_its_file_good(tool: str, tmp_path: Path) -> None:
    unit = tmp_path / "bakeoff-queue@.service"
    unit.write_text(re.sub(r"/opt/bakeoff-queue/bin/bakeoff-queue", sys.executable, UNIT))
    if tool in TOOLS:
        beside = [str(unit)] if tool == "systemd-analyze" else []
        done = subprocess.run(
            [tool, *TOOLS[tool], *beside], cwd=DEPLOY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
