"""OpenTelemetry: a span per request, SQL statement and Redis command, sent by OTLP over HTTP.

The packages are the extra `otel`; where to send, how much to sample and what to call this process
are OpenTelemetry's own environment variables (https://opentelemetry.io/docs/specs/otel/protocol/exporter/).
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

SERVICE_NAME = "bakeoff-queue"
INSTALL = "pip install 'bakeoff-queue[otel]'"
# Asked every few seconds by balancers and scrapers; no person looks for their traces.
UNTRACED = "healthz,readyz,metrics"
# A claim's statement has 10 kB of text, and its first line tells which one it is.
ATTRIBUTE_LENGTH = 256
# For the last spans, at the end: a collector that is away must not keep the process.
FLUSH_S = 2


def is_installed() -> bool:
    """Return whether the packages of the extra `otel` are there."""
    return find_spec("opentelemetry") is not None and all(
        find_spec(f"opentelemetry.{name}") is not None
        for name in ("sdk", "exporter", "instrumentation")
    )


@contextmanager
def open_tracing(version: str) -> Iterator[None]:
    """Trace this process until the context ends; it must begin before the first handler is made.

    A caller's `traceparent` (W3C Trace Context) is the parent of the request's span, and the span's
    trace_id stands in the request's log line. Statements' parameters are never recorded.
    """
    # The instrumentation reads it when it is imported, and knows no other way.
    os.environ.setdefault("OTEL_PYTHON_TORNADO_EXCLUDED_URLS", UNTRACED)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.instrumentation.tornado import TornadoInstrumentor
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": SERVICE_NAME, "service.version": version}).merge(
            OTELResourceDetector().detect()
        ),
        span_limits=SpanLimits(max_span_attribute_length=ATTRIBUTE_LENGTH),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    instrumentors = (TornadoInstrumentor(), AsyncPGInstrumentor(), RedisInstrumentor())
    instrumentors[0].instrument(tracer_provider=provider, server_request_hook=_name_request)
    for instrumentor in instrumentors[1:]:
        instrumentor.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()
        flush = threading.Thread(target=provider.shutdown, daemon=True)
        flush.start()
        flush.join(FLUSH_S)
        exporter.shutdown()


def _name_request(span: Any, handler: Any) -> None:
    """Let a request's log line and its span name each other."""
    context = span.get_span_context()
    handler.facts["trace_id"] = f"{context.trace_id:032x}"
    span.set_attribute("bakeoff.request_id", handler.request_id)
