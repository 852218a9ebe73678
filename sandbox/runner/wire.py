"""Wire format between a runner and the server, and how its answers are read.

Only a problem document with one of the server's codes is a refusal. A bare 404 or 5xx, a proxy's
HTML page, a reset connection say nothing about the lease.
"""

import json
import random
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from httpx import codes

ANSWER_S = 15.0


class Problem(Exception):
    """The server refused, by one of its codes (RFC 9457 problem document)."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.code: str = document["code"]
        self.detail: str = str(document.get("detail", ""))
        self.errors: list[Any] = document.get("errors") or []
        super().__init__(f"{status} {self.code}: {self.detail}")


class Unanswered(Exception):
    """The message got no answer from the server itself: send it again."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Message:
    """One request, as bytes that stay the same however often it is sent."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    answer_s: float = ANSWER_S

    @classmethod
    def of_json(cls, path: str, body: dict[str, Any], *, answer_s: float = ANSWER_S) -> Self:
        """Return a POST of `body` as JSON."""
        return cls(
            "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}, answer_s
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of the server: its status, its JSON object ({} for a 204), its Retry-After."""

    status: int
    body: dict[str, Any]
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between sendings: doubling, with full jitter so that a fleet does not march."""

    first_s: float = 0.5
    longest_s: float = 30.0

    def wait_s(self, attempt: int, asked_s: float | None) -> float:
        """Return the jittered doubling, not less than the server's Retry-After, within bounds."""
        jittered = random.uniform(0, self.first_s * 2 ** min(attempt, 16))  # noqa: S311
        return min(max(jittered, asked_s or 0.0), self.longest_s)


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed run: its lease, and the payload exactly as it was handed out."""

    run_id: str
    lease_id: str
    heartbeat_interval_s: float
    model: dict[str, Any]
    tasks: list[dict[str, Any]]
    floor_tasks: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    config: dict[str, Any]
    attempt: int = 1

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> Self:
        """Read the body of a claim that gave a run."""
        names = ("run_id", "lease_id", "heartbeat_interval_s", "model", "tasks", "prompts")
        return cls(
            **{name: body[name] for name in names},
            floor_tasks=body.get("floor_tasks") or [],
            config=body["config"],
            attempt=body.get("attempt", 1),
        )

    @property
    def model_ref(self) -> str:
        """The `model_id` of a result's records: the harness's id, not our UUID."""
        return self.config["models"][0]["id"]


@dataclass(frozen=True, slots=True)
class Offer:
    """Outcome of a claim: a job, or none with the reasons (when asked) and a pause."""

    job: Job | None
    reasons: list[dict[str, Any]] = field(default_factory=list)
    retry_after_s: float = 0.0


def read_answer(response: httpx.Response) -> Answer:
    """Tell the server's answers from what proxies say. Raises Problem or Unanswered.

    408, 429 and 5xx are "not now" even with a code: the lease may be as good as ever.
    """
    retry_after_s = _seconds(response.headers.get("Retry-After"))
    if response.status_code == codes.NO_CONTENT:
        return Answer(204, {}, retry_after_s)
    if response.is_success:
        document = _json_object(response, "application/json")
        if document is not None:
            return Answer(response.status_code, document, retry_after_s)
    problem = _json_object(response, "application/problem+json")
    if problem is None or not isinstance(problem.get("code"), str):
        raise Unanswered(f"HTTP {response.status_code} without a code of ours", retry_after_s)
    not_now = (codes.REQUEST_TIMEOUT, codes.TOO_MANY_REQUESTS)
    if response.is_server_error or response.status_code in not_now:
        raise Unanswered(f"HTTP {response.status_code} {problem['code']}", retry_after_s)
    raise Problem(response.status_code, problem)


def _json_object(response: httpx.Response, media: str) -> dict[str, Any] | None:
    """The body when it is a JSON object of that media type; a proxy's login page is not."""
    if response.headers.get("Content-Type", "").partition(";")[0].strip() != media:
        return None
    try:
        value = response.json()
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; the date form, which our server never sends, is ignored."""
    return float(text) if text and text.isascii() and text.isdigit() else None
