"""The OpenAPI document: valid, and equal to what the server serves.

What the answers look like is checked at each answer of the tests' clients: `support/traffic.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from openapi_spec_validator import OpenAPIV31SpecValidator

from broker.documents.schemas import FOLDER
from config.settings import Settings
from handlers import openapi
from sandbox.services.sigstore_instance import ThrowawaySigstore
from server import make_app
from tests.support import traffic
from tests.support.fleet import AUDIENCE, open_fleet
from tests.support.routes import served
from tests.support.traffic import NotDescribed

MakeSettings = Callable[..., Settings]
# Of bundles: files of a submit, not bodies of requests.
OF_BUNDLES = {"envelope", "manifest", "result", "result_legacy"}


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, item in openapi.read()["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(openapi.read()).validate()


@pytest.mark.gen_test
async def test_the_document_has_every_address_and_method_of_the_server_and_no_other(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        assert set(operations()) == set(served(make_app(fleet.services)))
        answer = await fleet.http.get("/openapi.yaml")
        assert answer.headers["Content-Type"] == "application/yaml"
        document = yaml.safe_load(answer.text)
        assert document["info"]["version"] == fleet.services.version
        assert document["servers"] == [{"url": AUDIENCE}]


def test_every_schema_that_the_server_checks_a_body_by_is_that_of_a_request() -> None:
    used = {
        body["schema"]["$ref"].rpartition(".")[2]
        for operation in operations().values()
        for body in operation.get("requestBody", {}).get("content", {}).values()
        if "$ref" in body["schema"]
    }
    assert used == {path.stem for path in FOLDER.glob("*.json")} - OF_BUNDLES


@pytest.mark.gen_test
async def test_scopes_and_parameters_are_those_of_the_handlers(
    make_settings: MakeSettings, sigstore: ThrowawaySigstore
) -> None:
    async with open_fleet(make_settings(), sigstore) as fleet:
        rules = make_app(fleet.services).wildcard_router.rules
        handlers = {rule.matcher.regex.pattern: rule.target for rule in rules}  # type: ignore[attr-defined]
    described = operations()
    assert handlers
    scopes = {s for h in handlers.values() for s in getattr(h, "scopes", {}).values()}
    assert {
        scope
        for operation in described.values()
        for need in operation["security"]
        for scope in need.get("adminToken", ())
    } == scopes
    names = {name for h in handlers.values() for each in h.parameters.values() for name in each}
    assert {
        parameter["name"]
        for operation in described.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    } == names


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "application/json", b'{"status": 7, "server_time": "2026-01-01T00:00:00Z"}'),
        (200, "text/plain", b"ok"),
        (418, "application/json", b"{}"),
        (200, "application/problem+json", b"{}"),
    ],
)
def test_an_answer_that_is_not_as_described_is_noticed(status: int, kind: str, body: bytes) -> None:
    with pytest.raises(NotDescribed):
        traffic.check("GET", "/healthz", status, kind, body)


def test_an_answer_as_described_passes() -> None:
    body = b'{"status": "ok", "server_time": "2026-01-01T00:00:00Z"}'
    traffic.check("GET", "/healthz", 200, "application/json", body)
