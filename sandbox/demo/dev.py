"""`bakeoff-queue dev`: the demo's services, staying up, with one server process and no runner."""

import json
import queue
import shlex
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from client.output import CommandFailed, note
from config.settings import Settings
from sandbox.services.children import ENDED, Event
from sandbox.services.process_supervisor import SandboxError
from sandbox.services.stack import (
    CATALOGUE,
    CATALOGUE_FILES,
    DemoRunner,
    Stack,
    admin_api,
    open_stack,
)

HOST = "127.0.0.1"
RUNNER = DemoRunner("demo-runner", 24)
SERVER = "server"
# What POST /api/admin/queue takes, at its shortest; it fits RUNNER.
ONE_RUN = json.dumps(
    {
        "runs": [
            {
                "model": {
                    "name": "Llama-3.2-1B-Instruct",
                    "parameter_count_b": 1.24,
                    "architecture": "Dense",
                    "quantization": "q8_0",
                    "file_format": "GGUF",
                    "sources": [
                        {
                            "source_type": "huggingface",
                            "url": "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
                        }
                    ],
                },
                "tasks": [
                    {
                        "id": "capital-australia",
                        "domain": "geography",
                        "user_prompt": "What is the capital of Australia?",
                        "expected": "Canberra",
                        "scorer": "contains",
                    }
                ],
                "prompts": [{"id": "plain", "system": "Answer in one sentence."}],
                "config": {},
            }
        ]
    }
)


class DevFailed(SandboxError):
    """The service cannot be had, or is gone; one line."""


def run_dev(settings: Settings, data: Path | None, port: int) -> None:
    """Serve on `port` until stopped; keep everything in `data`, or nothing.

    Only the sandbox_* of `settings` are used. Raises SandboxError or DatabaseUnready.
    """
    _check_free(port)
    url = f"http://{HOST}:{port}"
    ended: queue.SimpleQueue[Event] = queue.SimpleQueue()
    knobs = {"listen_address": HOST, "listen_port": port, "public_url": url, "drain_s": 2}
    with (
        open_stack(settings, data, (RUNNER,)) as stack,
        stack.server(SERVER, _relay(ended), knobs) as server,
    ):
        server.url()
        token = stack.admin_token()
        with admin_api(url, token) as api:
            try:
                stack.admit(api, RUNNER)
            except CommandFailed as refusal:  # with kept data, a revoked key stays revoked
                note(f"{RUNNER.name} is not on the allowlist: {refusal.line}")
        print("\n".join(_welcome(stack, url, token, data)), flush=True)
        code = ended.get().facts["code"]
        raise DevFailed(f"the server ended with exit code {code}: {server.child.last_words}")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DevFailed(
                f"cannot listen on {HOST}:{port}: {error.strerror}; choose another port with --port"
            ) from None


def _relay(ended: queue.SimpleQueue[Event]) -> Callable[[Event], None]:
    """Pass the server's log on to stderr: readable on a terminal, as it is elsewhere."""
    render = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else _as_json

    def tell(event: Event) -> None:
        if event.name == ENDED:
            ended.put(event)
        elif event.name:
            print(render(None, event.name, {"event": event.name, **event.facts}), file=sys.stderr)
        else:
            print(event.facts["text"], file=sys.stderr)

    return tell


def _as_json(_logger: object, _name: str, facts: Mapping[str, Any]) -> str:
    return json.dumps(facts)


def _welcome(stack: Stack, url: str, token: str, data: Path | None) -> list[str]:
    """Return the welcome text with commands that work from any folder."""
    program = str(Path(sys.executable).with_name("bakeoff-queue"))
    module, *options = stack.runner_command(RUNNER, url, url)
    runner = [sys.executable, "-P", "-m", module, *options]
    files = CATALOGUE_FILES
    beside = ["--tasks", files.tasks, "--floor-tasks", files.floor_tasks, "--models", files.models]
    add = [program, "queue", "add", f"{CATALOGUE}/config.yaml", *map(str, beside)]
    authorization = shlex.quote(f"Authorization: Bearer {token}")
    as_json = "-H 'Content-Type: application/json'"
    return [
        f"bakeoff-queue serves at {url}; Ctrl-C stops it",
        f"data are kept in {stack.kept}" if data else "data are gone then: --data DIR keeps them",
        "",
        "# for the commands below and all other commands",
        f"export BAKEOFF_QUEUE_URL={url}",
        f"export BAKEOFF_QUEUE_TOKEN={token}",
        f"export BAKEOFF_QUEUE_TRUSTED_ROOT={shlex.quote(str(stack.sigstore.trusted_root))}",
        "",
        "# look",
        f"curl -sS -H {authorization} {url}/api/admin/queue",
        f"psql {shlex.quote(stack.postgres.dsn)}",
        "",
        "# enqueue the demo's grid, then start a runner (its key is on the allowlist)",
        shlex.join(add),
        shlex.join(runner),
        "# or enqueue one run over HTTP (docs/api.md)",
        f"curl -sS -H {authorization} {as_json} {url}/api/admin/queue -d {shlex.quote(ONE_RUN)}",
        "",
        "# verify again all that was accepted, under the throwaway Sigstore's trust root",
        shlex.join([program, "results", "verify", "--since", "2000-01-01T00:00:00Z"]),
        "",
    ]
