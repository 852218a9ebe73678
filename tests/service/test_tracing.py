"""OpenTelemetry: a real server process, and a collector that takes what its exporter sends."""

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.service import test_cli_service
from tests.service.test_cli_service import run, serving

settings = test_cli_service.settings
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Takes traces by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Take)
        self.batches: queue.Queue[bytes] = queue.Queue()

    def spans(self) -> list[Span]:
        """Return what has arrived, batch by batch, once the process that sent it has ended."""
        found = []
        while not self.batches.empty():
            request = ExportTraceServiceRequest.FromString(self.batches.get())
            found += [
                span
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        return found


class Take(BaseHTTPRequestHandler):
    """Keeps a batch as it came."""

    server: Collector

    def do_POST(self) -> None:
        """Keep the body."""
        assert self.path == "/v1/traces"
        self.server.batches.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, where OpenTelemetry's own variables say."""
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        yield server
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_of_its_callers_trace_with_its_statements_below(
    settings, collector: Collector
) -> None:
    secret = json.loads(run("tokens", "mint", "--name", "ops", "--json", **settings).stdout)[
        "token"
    ]
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "Authorization": f"Bearer {secret}"}
    with serving({**settings, "tracing": "true"}) as (process, port):
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/healthz", headers=sent, trust_env=False).status_code == 200
        listed = httpx.get(f"{url}/api/admin/queue", headers=sent, trust_env=False)
        alone = httpx.get(f"{url}/nowhere", trust_env=False)
        process.terminate()
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr]
        assert process.wait(30) == 0
    assert (listed.status_code, alone.status_code) == (200, 404)
    spans = collector.spans()
    by_id = {span.span_id: span for span in spans}
    servers = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    ours, other = sorted(servers, key=lambda span: span.trace_id.hex() != TRACE)
    assert (ours.trace_id.hex(), ours.parent_span_id.hex()) == (TRACE, PARENT)
    below = [span for span in spans if span.parent_span_id == ours.span_id]
    assert {value_of(span, "db.system") for span in below} >= {"postgresql"}
    assert all(len(value_of(span, "db.statement")) <= 256 for span in below)
    assert other.parent_span_id not in by_id

    by_request = {line["request_id"]: line for line in lines if line.get("trace_id")}
    for span, answer in ((ours, listed), (other, alone)):
        request_id = answer.headers["X-Request-Id"]
        assert value_of(span, "bakeoff.request_id") == request_id
        assert by_request[request_id]["trace_id"] == span.trace_id.hex()
    assert secret not in str(spans)


def test_a_collector_that_is_away_delays_neither_answers_nor_the_end(
    settings, collector: Collector
) -> None:
    collector.shutdown()
    collector.server_close()
    with serving({**settings, "tracing": "true", "drain_notice_s": 0}) as (process, port):
        assert httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/nowhere", trust_env=False).status_code == 404
        process.terminate()
        assert process.stderr is not None
        process.stderr.read()
        assert process.wait(15) == 0


def test_without_the_packages_the_start_is_refused_with_the_fix(
    settings, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an environment without the extra has: no package of that name.
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for command in (("serve",), ("config", "check")):
        done = run(*command, **{**settings, "tracing": "true"})
        assert done.returncode != 0
        assert "pip install 'bakeoff-queue[otel]'" in done.stdout + done.stderr


def value_of(span: Span, name: str) -> str:
    """Return an attribute's text; empty without it."""
    return next((each.value.string_value for each in span.attributes if each.key == name), "")
