"""Executing a job: every cell asked once, answered by an endpoint or by the built-in rules.

What goes wrong with one cell (no answer in time, no text in it) is a result of the model and
becomes a failed cell. What goes wrong with the machine (endpoint gone, model not loaded) raises
EndpointUnusable: that is a failure of the run, and no result at all.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from sandbox.runner import built_in_rules
from sandbox.runner.scorers import score
from sandbox.runner.wire import Job

DEFAULT_TIMEOUT_S = 120.0
# A model may emit them, but no strict JSON reader (nor PostgreSQL) takes NUL or half a surrogate
# pair: one such character would cost the whole run.
UNSENDABLE = re.compile(r"[\x00\ud800-\udfff]")


class EndpointUnusable(Exception):
    """The model's endpoint cannot be reached or refuses to answer."""


class CellFailed(Exception):
    """The model gave no usable answer to this one cell; `code` is one of the harness's."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to ask: a task under a system prompt. Floor tasks have no system prompt."""

    task: dict[str, Any]
    prompt_id: str
    system: str
    tier: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's text and its length in tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """An asked cell: the reply, or the failure; seconds by the wall; quality by the scorer."""

    cell: Cell
    seconds: float
    reply: Reply | None = None
    quality: float | None = None
    failure: CellFailed | None = None


class Executor(Protocol):
    """Whatever answers cells; `provenance` says in the result what it was."""

    @property
    def provenance(self) -> dict[str, str]: ...

    async def answer(self, job: Job, cell: Cell) -> Reply:
        """Return the reply. Raises CellFailed or EndpointUnusable."""
        ...


def cells_of(job: Job) -> Iterator[Cell]:
    """Each floor task once under the prompt id `floor`, as the harness does, then each pair."""
    for task in job.floor_tasks:
        yield Cell(task, "floor", "", "dumb_model")
    for task in job.tasks:
        for prompt in job.prompts:
            yield Cell(task, prompt["id"], prompt["system"], "main")


async def execute(job: Job, executor: Executor, done: Callable[[int], None]) -> list[Outcome]:
    """Ask every cell of the job, one after the other; call `done(count)` after each."""
    outcomes: list[Outcome] = []
    for cell in cells_of(job):
        outcomes.append(await _ask(job, executor, cell))
        done(len(outcomes))
    return outcomes


async def _ask(job: Job, executor: Executor, cell: Cell) -> Outcome:
    started = time.perf_counter()
    try:
        reply = await executor.answer(job, cell)
    except CellFailed as failure:
        return Outcome(cell, time.perf_counter() - started, failure=failure)
    quality = score(cell.task["scorer"], reply.text, cell.task.get("expected"))
    return Outcome(cell, time.perf_counter() - started, reply, quality)


@dataclass(frozen=True, slots=True)
class BuiltInRules:
    """Answers from built_in_rules, each after `seconds_per_cell` of pretended computing."""

    seconds_per_cell: float = 0.0

    @property
    def provenance(self) -> dict[str, str]:
        """The result must not look like a model's."""
        return {"kind": "built-in rules"}

    async def answer(self, job: Job, cell: Cell) -> Reply:
        """Return the rules' answer; tokens are counted as words."""
        await asyncio.sleep(self.seconds_per_cell)
        size = job.model.get("active_parameter_count_b") or job.model["parameter_count_b"]
        question = cell.task["user_prompt"]
        text = built_in_rules.respond(job.model["name"], size, cell.system, question)
        return Reply(text, len(f"{cell.system} {question}".split()), len(text.split()))


class OpenAIEndpoint:
    """Answers from an OpenAI-compatible server (llama.cpp, vLLM, Ollama ...)."""

    def __init__(self, http: httpx.AsyncClient, endpoint: str) -> None:
        self._http = http
        self.endpoint = endpoint.rstrip("/").removesuffix("/v1")

    @property
    def provenance(self) -> dict[str, str]:
        """Where the texts came from."""
        return {"kind": "openai-compatible", "endpoint": self.endpoint}

    async def answer(self, job: Job, cell: Cell) -> Reply:
        """POST the cell as a chat. Too late is a failed cell; unreachable is a failed run."""
        try:
            response = await self._http.post(
                f"{self.endpoint}/v1/chat/completions",
                json=_chat(job, cell),
                timeout=httpx.Timeout(10.0, read=_timeout_s(job)),
            )
        except httpx.ReadTimeout:
            raise CellFailed("timeout", f"no answer within {_timeout_s(job):g} s") from None
        except httpx.RequestError as error:
            raise EndpointUnusable(f"{type(error).__name__} at {self.endpoint}") from error
        if not response.is_success:
            raise EndpointUnusable(f"HTTP {response.status_code} from {self.endpoint}")
        return _reply(response)


def _chat(job: Job, cell: Cell) -> dict[str, Any]:
    system = [{"role": "system", "content": cell.system}] if cell.system else []
    model = job.config["models"][0]
    return {
        "model": model.get("alias") or model["id"],
        "messages": [*system, {"role": "user", "content": cell.task["user_prompt"]}],
        "temperature": 0,
        "seed": job.config.get("run", {}).get("seed", 0),
        "stream": False,
    }


def _timeout_s(job: Job) -> float:
    return float(job.config.get("run", {}).get("timeout_s") or DEFAULT_TIMEOUT_S)


def _reply(response: httpx.Response) -> Reply:
    try:
        body = response.json()
        text = body["choices"][0]["message"]["content"]
        usage = body.get("usage") or {}
        counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        raise CellFailed("malformed_output", "the answer is no chat completion") from None
    if not isinstance(text, str):
        raise CellFailed("malformed_output", "the answer has no text")
    return Reply(UNSENDABLE.sub("\N{REPLACEMENT CHARACTER}", text), *counts)
