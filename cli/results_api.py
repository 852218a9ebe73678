"""Requests of the `results` commands to the admin API."""

from collections.abc import Iterator, Mapping
from typing import Any

from client.admin_api import AdminClient
from client.output import moment

RESULTS = "/api/admin/results"
EVERYTHING = 1_000_000


def listed(admin: AdminClient, **filters: Any) -> Iterator[dict[str, Any]]:
    """Yield all results that fit, in the order of acceptance."""
    for page in admin.pages(RESULTS, EVERYTHING, **filters):
        yield from page["results"]


def accepted_since(admin: AdminClient, since: str, **filters: Any) -> list[str]:
    """Return the run_ids of results accepted at `since` (RFC 3339) or later, in any state."""
    at = moment("--since", since)
    return [result["run_id"] for result in listed(admin, since=at, **filters)]


def download(admin: AdminClient, record: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a result (its page in the admin API) by name, as they were received."""
    for file in record["files"]:
        path = f"{RESULTS}/{record['run_id']}/files/{file['name']}"
        yield file["name"], admin.download(path)
