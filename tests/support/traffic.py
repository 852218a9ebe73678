"""Traffic: each answer of the tests' servers is held against the OpenAPI document."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from handlers import openapi

PLACE = re.compile(r"\{(\w+)\}")


class NotDescribed(AssertionError):
    """An answer is not what the OpenAPI document says of it."""


@cache
def document() -> dict[str, Any]:
    """Return the document with its request schemas."""
    return openapi.read()


@cache
def operations() -> list[tuple[re.Pattern[str], str, dict[str, Any]]]:
    """Return each path as a pattern, the longest first: a fixed segment before a place."""
    paths = sorted(document()["paths"], key=lambda path: (PLACE.sub("", path), path), reverse=True)
    return [(re.compile(PLACE.sub(r"[^/]+", path)), path, document()["paths"][path])
            for path in paths]  # fmt: skip


@cache
def validator(pointer: str) -> Draft202012Validator:
    """Return the validator of the schema at a place of the document."""
    resource = Resource.from_contents(document(), default_specification=DRAFT202012)
    registry = Registry().with_resource("urn:openapi", resource)
    return Draft202012Validator({"$ref": f"urn:openapi#{pointer}"}, registry=registry)


def check(method: str, path: str, status: int, kind: str, body: bytes) -> None:
    """Raise NotDescribed unless the document describes this answer."""
    found = [(name, item) for shape, name, item in operations() if shape.fullmatch(path)]
    if kind == "application/problem+json" and method != "HEAD":
        _fits("/components/schemas/Problem", body, f"{method} {path} {status}")
    if not found:
        return
    # A fixed path wins over one with a place, as the server's routes do.
    name, item = min(found, key=lambda each: each[0].count("{"))
    operation = item.get(method.lower())
    if operation is None:
        if status not in (404, 405, 413, 401, 403, 429, 400, 503):
            raise NotDescribed(f"{method} {name} is not in the document, and answers {status}")
        return
    answer = operation["responses"].get(str(status))
    if answer is None:
        if kind == "application/problem+json" and "default" in operation["responses"]:
            return
        raise NotDescribed(f"{method} {name}: no answer {status} in the document")
    content = answer.get("content", {})
    if kind not in content and (body or content) and method != "HEAD":
        raise NotDescribed(f"{method} {name} {status}: {kind!r} is not in the document")
    if kind == "application/json" and method != "HEAD":
        at = ["paths", name, method.lower(), "responses", str(status), "content", kind, "schema"]
        _fits("".join("/" + each.replace("~", "~0").replace("/", "~1") for each in at), body,
              f"{method} {name} {status}")  # fmt: skip


def _fits(pointer: str, body: bytes, what: str) -> None:
    for error in _errors(pointer, body):
        raise NotDescribed(f"{what}: {error}")


def _errors(pointer: str, body: bytes) -> Iterator[str]:
    for error in validator(_quoted(pointer)).iter_errors(json.loads(body)):
        yield f"{error.json_path}: {error.message[:300]}"


def _quoted(pointer: str) -> str:
    return pointer.replace("{", "%7B").replace("}", "%7D").replace("+", "%2B")


async def hold(response: httpx.Response) -> None:
    """Check an answer of the tests' client (an httpx event hook)."""
    body = await response.aread()
    kind = response.headers.get("Content-Type", "").partition(";")[0]
    request = response.request
    check(request.method, request.url.path, response.status_code, kind, body)
