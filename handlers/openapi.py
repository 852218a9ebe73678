"""/openapi.yaml: the OpenAPI 3.1 document of the service.

`openapi.yaml` beside this file is written by hand; the schemas of request bodies are those that the
server checks by (`broker/documents/json_schemas/`), put in when the document is first asked for.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tornado.web import URLSpec

from broker.documents.schemas import FOLDER
from broker.services import Services
from handlers.health import PlainHandler

FILE = Path(__file__).with_name("openapi.yaml")


class OpenApiHandler(PlainHandler):
    """/openapi.yaml: what the addresses take and answer."""

    def get(self) -> None:
        """Answer the document."""
        self.set_header("Content-Type", "application/yaml")
        self.finish(text(self.services.version, self.services.settings.public_url))

    head = get


@cache
def text(version: str, url: str) -> str:
    """Return the document as YAML, for this version at this URL."""
    document = read()
    document["info"]["version"] = version
    document["servers"] = [{"url": url}]
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def read() -> dict[str, Any]:
    """Return the document with the schemas of all request bodies."""
    document = yaml.safe_load(FILE.read_text("utf-8"))
    schemas = document["components"]["schemas"]
    for path in sorted(FOLDER.glob("*.json")):
        name = f"request.{path.stem}"
        # A reference within a schema is one within the document now.
        own = path.read_text("utf-8").replace('"#/', f'"#/components/schemas/{name}/')
        schema = json.loads(own)
        schema.pop("$schema")
        schemas[name] = schema
    return document


def routes(services: Services) -> list[URLSpec]:
    """Return the address of this module."""
    return [URLSpec(r"/openapi\.yaml", OpenApiHandler, {"services": services})]
