"""Executing a job by the built-in rules, and by a real OpenAI-compatible endpoint."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tornado.httpserver
import tornado.testing
import tornado.web
import yaml

from broker.documents.schemas import load_schema
from broker.jobs.model_rows import model_id_of
from sandbox.runner import built_in_rules
from sandbox.runner.answers import (
    BuiltInRules,
    CellFailed,
    EndpointUnusable,
    OpenAIEndpoint,
    cells_of,
    execute,
)
from sandbox.runner.wire import Job
from tests.support.runner_stage import JOB

CATALOGUE = Path(built_in_rules.__file__).parents[1] / "catalogue"
HUGE_B = 1e9


def nothing(_: int) -> None:
    pass


class Chat(tornado.web.RequestHandler):
    """An OpenAI-compatible endpoint that says what the test put into `replies`."""

    def initialize(self, asked: list[dict], replies: list) -> None:
        self.asked, self.replies = asked, replies

    async def prepare(self) -> None:
        self.asked.append(json.loads(self.request.body))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply):
            await reply()
            reply = ""
        if isinstance(reply, int):
            self.set_status(reply)
            self.finish()
            return
        self.finish(reply if isinstance(reply, str) else json.dumps(reply))


class Endpoint:
    """The endpoint's address, what it was asked, and what it answers."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.replies: list = [completion("Oslo")]
        arguments = {"asked": self.asked, "replies": self.replies}
        app = tornado.web.Application([("/v1/chat/completions", Chat, arguments)])
        self.server = tornado.httpserver.HTTPServer(app)
        socket, port = tornado.testing.bind_unused_port()
        self.server.add_socket(socket)
        self.url = f"http://127.0.0.1:{port}"


def completion(text: object) -> dict:
    usage = {"prompt_tokens": 11, "completion_tokens": 3}
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


@pytest.fixture
def endpoint(io_loop) -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.stop()
    io_loop.run_sync(endpoint.server.close_all_connections)


def catalogue_job(model_id: str) -> Job:
    config = yaml.safe_load((CATALOGUE / "config.yaml").read_text())
    tasks: dict[str, Any] = {
        name: [json.loads(line) for line in (CATALOGUE / f"{name}.jsonl").read_text().splitlines()]
        for name in ("tasks", "floor_tasks")
    }
    model = json.loads((CATALOGUE / "models" / f"{model_id}.json").read_text())
    return replace(JOB, model=model, prompts=config["prompts"], **tasks)


def catalogue_models() -> list[str]:
    config = yaml.safe_load((CATALOGUE / "config.yaml").read_text())
    return [model["id"] for model in config["models"]]


def test_every_main_task_meets_every_prompt_and_a_floor_task_is_asked_once() -> None:
    cells = [(cell.task["id"], cell.prompt_id, cell.tier) for cell in cells_of(JOB)]
    assert cells == [
        ("floor", "floor", "dumb_model"),
        ("capital", "terse", "main"),
        ("capital", "kind", "main"),
        ("sum", "terse", "main"),
        ("sum", "kind", "main"),
    ]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 17 * 23 + 4?", "395"),
        ("What is (2 + 3) * 4?", "20"),
        ("What is 20 - 22?", "-2"),
        ("What is the capital of Norway?", "Oslo"),
        ('Reverse the word "lease".', "esael"),
        ('How many times does the letter "r" occur in "strawberry"?', "3"),
        ("Which number comes next: 3, 10, 17, 24?", "31"),
        ('Repeat exactly: "ready"', "ready"),
        ("What is the capital of Atlantis?", built_in_rules.UNKNOWN),
        ("What is 9 ** 9?", built_in_rules.UNKNOWN),
        ("What is 9999999999 * 9999999999?", built_in_rules.UNKNOWN),
        ("Why?", built_in_rules.UNKNOWN),
    ],
)
def test_the_rules_of_a_huge_model_answer_what_they_know(question: str, answer: str) -> None:
    assert built_in_rules.respond("Huge", HUGE_B, "", question) == answer


def test_small_models_err_more_often_and_always_in_the_same_places() -> None:
    questions = [f"What is {number} + 1?" for number in range(200)]

    def right(size_b: float) -> list[str]:
        texts = [built_in_rules.respond("M", size_b, "", question) for question in questions]
        return [text for number, text in enumerate(texts) if text == str(number + 1)]

    assert len(right(1)) < len(right(7)) < len(right(70)) <= len(right(HUGE_B)) == 200
    assert right(1) == right(1)


def test_a_prompt_that_asks_for_steps_gets_a_sentence() -> None:
    text = built_in_rules.respond("Huge", HUGE_B, "Work step by step.", "What is 1 + 1?")
    assert text.endswith("Answer: 2")
    assert len(text.split()) > 2


@pytest.mark.parametrize("model_id", catalogue_models())
@pytest.mark.gen_test
async def test_every_catalogue_model_can_be_asked_and_scored(model_id: str) -> None:
    outcomes = await execute(catalogue_job(model_id), BuiltInRules(), nothing)
    assert len(outcomes) == 12
    assert all(one.quality is not None and one.failure is None for one in outcomes)


@pytest.mark.gen_test
async def test_the_catalogue_tells_models_apart() -> None:
    means = set()
    for model_id in catalogue_models():
        outcomes = await execute(catalogue_job(model_id), BuiltInRules(), nothing)
        means.add(sum(one.quality or 0 for one in outcomes))
    assert len(means) >= 4


def test_the_catalogue_describes_each_of_its_models() -> None:
    stems = {path.stem for path in (CATALOGUE / "models").glob("*.json")}
    assert stems == set(catalogue_models())


@pytest.mark.parametrize("model_id", catalogue_models())
def test_the_catalogue_can_be_enqueued(model_id: str) -> None:
    config = yaml.safe_load((CATALOGUE / "config.yaml").read_text())
    job = catalogue_job(model_id)
    run = {
        "model": job.model,
        "tasks": job.tasks,
        "floor_tasks": job.floor_tasks,
        "prompts": job.prompts,
        "config": {**config, "models": [one for one in config["models"] if one["id"] == model_id]},
    }
    assert load_schema("enqueue").violations({"runs": [run]}) == ()


def test_no_two_models_of_the_catalogue_become_one_row() -> None:
    ids = {model_id_of(catalogue_job(model_id).model) for model_id in catalogue_models()}
    assert len(ids) == len(catalogue_models())


@pytest.mark.gen_test
async def test_progress_is_told_after_every_cell() -> None:
    seen: list[int] = []
    await execute(JOB, BuiltInRules(), seen.append)
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.gen_test
async def test_an_endpoint_is_asked_with_or_without_v1(endpoint: Endpoint, suffix: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        executor = OpenAIEndpoint(http, endpoint.url + suffix)
        outcomes = await execute(JOB, executor, nothing)
    assert executor.provenance == {"kind": "openai-compatible", "endpoint": endpoint.url}
    assert [one.quality for one in outcomes] == [0.0, 1.0, 1.0, 0.0, 0.0]
    reply = outcomes[1].reply
    assert reply is not None
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("Oslo", 11, 3)
    assert endpoint.asked[1] == {
        "model": "llama-70b",
        "messages": [
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": "What is the capital of Norway?"},
        ],
        "temperature": 0,
        "seed": 7,
        "stream": False,
    }
    assert [one["role"] for one in endpoint.asked[0]["messages"]] == ["user"]


@pytest.mark.parametrize("reply", ["no json", "[]", {"choices": []}, completion(None)])
@pytest.mark.gen_test
async def test_an_answer_without_text_is_a_failed_cell(endpoint: Endpoint, reply) -> None:
    endpoint.replies.insert(0, reply)
    async with httpx.AsyncClient(trust_env=False) as http:
        outcomes = await execute(JOB, OpenAIEndpoint(http, endpoint.url), nothing)
    assert [one.failure.code for one in outcomes if one.failure] == ["malformed_output"]
    assert outcomes[1].quality == 1.0


@pytest.mark.gen_test
async def test_an_answer_that_does_not_come_in_time_is_a_failed_cell(endpoint: Endpoint) -> None:
    asked_for_too_long = asyncio.Event()
    endpoint.replies.insert(0, asked_for_too_long.wait)
    job = replace(JOB, config={**JOB.config, "run": {"timeout_s": 0.05}})
    async with httpx.AsyncClient(trust_env=False) as http:
        executor = OpenAIEndpoint(http, endpoint.url)
        with pytest.raises(CellFailed) as caught:
            await executor.answer(job, next(cells_of(job)))
    asked_for_too_long.set()
    assert caught.value.code == "timeout"


@pytest.mark.parametrize("status", [404, 500])
@pytest.mark.gen_test
async def test_an_endpoint_that_refuses_is_a_failed_run(endpoint: Endpoint, status: int) -> None:
    endpoint.replies.insert(0, status)
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(EndpointUnusable, match=str(status)):
            await execute(JOB, OpenAIEndpoint(http, endpoint.url), nothing)


@pytest.mark.gen_test
async def test_an_endpoint_that_is_gone_is_a_failed_run(endpoint: Endpoint) -> None:
    endpoint.server.stop()
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(EndpointUnusable, match="ConnectError"):
            await execute(JOB, OpenAIEndpoint(http, endpoint.url), nothing)


@pytest.mark.gen_test
async def test_characters_that_strict_json_refuses_are_replaced(endpoint: Endpoint) -> None:
    endpoint.replies.insert(0, '{"choices": [{"message": {"content": "a\\u0000b\\ud800c"}}]}')
    async with httpx.AsyncClient(trust_env=False) as http:
        executor = OpenAIEndpoint(http, endpoint.url)
        reply = await executor.answer(JOB, next(cells_of(JOB)))
    assert reply.text == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
