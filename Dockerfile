# One process of the service: `docker run -p 8400:8400 --env-file queue.env bakeoff-queue`.
# Non-root, and at home on a read-only file system with a tmpfs at /tmp (uploads pass through it).
FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements.txt .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --require-hashes -r requirements.txt
COPY . .
RUN /venv/bin/pip install --no-cache-dir --no-deps .

FROM python:3.13-slim
RUN useradd --system --no-create-home --uid 10001 queue
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    BAKEOFF_QUEUE_LISTEN_ADDRESS=0.0.0.0
USER 10001
EXPOSE 8400
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s CMD ["bakeoff-queue", "healthcheck"]
ENTRYPOINT ["bakeoff-queue"]
CMD ["serve"]
