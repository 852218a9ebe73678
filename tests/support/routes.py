"""The addresses of the application, in the spelling of the documentation."""

from collections.abc import Iterator

from tornado.web import Application, RequestHandler

from handlers.admin_keys import FINGERPRINT_PATH
from handlers.admin_results import FILE_PATH
from handlers.admin_runners import RUNNER_PATH
from handlers.base import UUID_PATH

# Each pattern of a path, and its name in docs/api.md and docs/runners.md.
PLACES = {
    UUID_PATH: "{run_id}",
    FINGERPRINT_PATH: "{fingerprint}",
    FILE_PATH: "{name}",
    RUNNER_PATH: "{runner_id}",
}
# Ids of one shape, by what they are ids of.
IDS = {
    "/api/admin/tokens/{run_id}": "/api/admin/tokens/{token_id}",
    "/api/admin/model-needs/{run_id}": "/api/admin/model-needs/{model_id}",
    "/api/admin/runners/{runner_id}/tokens/{run_id}": (
        "/api/admin/runners/{runner_id}/tokens/{jti}"
    ),
}
METHODS = RequestHandler.SUPPORTED_METHODS
RUN = "00000000-0000-4000-8000-000000000000"
# What a path may be asked with: of nothing that is there.
FILLED = {
    **dict.fromkeys(("run_id", "token_id", "jti", "model_id"), RUN),
    "fingerprint": "0" * 64,
    "name": "result.json",
    "runner_id": "runner-a",
}


def served(app: Application) -> Iterator[tuple[str, str]]:
    """Yield method and path of everything that the application answers."""
    for rule in app.wildcard_router.rules:
        path = rule.matcher.regex.pattern.removesuffix("$").replace("\\", "")  # type: ignore[attr-defined]
        for pattern, name in PLACES.items():
            path = path.replace(pattern.replace("\\", ""), name)
        path = IDS.get(path, path)
        for method in METHODS:
            if getattr(rule.target, method.lower()) is not RequestHandler._unimplemented_method:
                yield method, path


def addresses(app: Application) -> list[str]:
    """Return an address for every path that the application answers."""
    return [path.format_map(FILLED) for path in dict.fromkeys(path for _, path in served(app))]
