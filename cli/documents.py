"""YAML, JSON and JSON Lines files, read so that nothing in them is silently lost.

YAML keeps the last of two equal keys, reads `on:` as the key True and a date as an object; each
would change a job without a word, so the first two are refused with their line and dates stay
text. Every value that comes out can be said in JSON.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from broker import strict_json
from broker.errors import InvalidJson
from cli.output import CommandFailed

JSON_LINES = {".jsonl", ".ndjson"}
_TEXT, _MERGE, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "timestamp"))


def read_document(path: Path) -> Any:
    """Return what the file holds; the suffix says how to read it, and YAML is the default.

    Raises CommandFailed, whose line names the file and the place in it.
    """
    text = _bytes(path)
    if path.suffix == ".json":
        return _json(text, str(path))
    if path.suffix in JSON_LINES:
        lines = enumerate(text.splitlines(), start=1)
        return [_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    return _yaml(text, path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be read: {error.strerror}") from None


def _json(text: bytes, place: str) -> Any:
    try:
        return strict_json.parse(text)
    except InvalidJson as error:
        raise CommandFailed(f"{place}: {error}") from None


def _yaml(text: bytes, path: Path) -> Any:
    try:
        document = yaml.load(text.decode(), _Loader)  # noqa: S506 - a subclass of SafeLoader
        return json.loads(json.dumps(document, allow_nan=False))
    except UnicodeDecodeError as error:
        raise CommandFailed(f"{path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise CommandFailed(_place(error, path)) from None
    except (TypeError, ValueError) as error:
        raise CommandFailed(f"{path}: holds what JSON cannot say: {error}") from None
    except RecursionError:
        raise CommandFailed(f"{path}: nested too deeply") from None


def _place(error: yaml.YAMLError, path: Path) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{path}, line {error.problem_mark.line + 1}: {error.problem}"
    return f"{path}: {error}"


class _Loader(yaml.SafeLoader):
    """SafeLoader without dates and without the mappings that JSON would read otherwise."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the class attribute PyYAML looks for
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    # Checked here and not in construct_mapping: by then `<<` has been merged, and a key that
    # overrides a merged one looks like a duplicate.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag not in (_TEXT, _MERGE):
                raise _refused(f"the key {key.value!s} is not text: put it in quotes", key)
            if key.value in seen:
                raise _refused(f"the key {key.value} appears twice", key)
            seen.add(key.value)
        return node


def _refused(problem: str, key: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
