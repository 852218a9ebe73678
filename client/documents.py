"""YAML, JSON and JSON Lines files, read so that nothing in them is silently lost.

Doubled keys, and values of YAML where text is meant (`expected: no`), are refused with their line;
see config/strict_yaml.py. Every value that comes out can be said in JSON.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from broker.documents import strict_json
from broker.errors import InvalidJson
from client.output import CommandFailed, ExitCode
from config import strict_yaml

JSON_LINES = {".jsonl", ".ndjson"}
# The members that are text, of the harness's config, of tasks and prompts, of model descriptors
# and of runs in the admin API's form. All else means what the harness reads.
TEXT_MEMBERS = frozenset({
    "alias", "architecture", "batch_id", "cache_type_k", "cache_type_v", "description", "dir",
    "display_name", "domain", "domains", "expected", "file_format", "gguf", "homepage", "id",
    "image", "key_path", "mode", "model_hash", "model_id", "models_dir", "name",
    "predecessor_model_id", "quantization", "run_id", "runner_id", "scorer", "source_type",
    "system", "tier", "url", "user_prompt", "uuid", "version",
})  # fmt: skip


def read_document(path: Path) -> Any:
    """Return what the file holds; the suffix says how to read it, and YAML is the default.

    Raises CommandFailed, whose line names the file and the place in it.
    """
    text = _bytes(path)
    if path.suffix == ".json":
        return parse_json(text, str(path))
    if path.suffix in JSON_LINES:
        lines = enumerate(text.splitlines(), start=1)
        return [
            parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()
        ]
    return _yaml(text, path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandFailed(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: bytes, place: str, code: ExitCode = ExitCode.FAILURE) -> Any:
    """Return what strict JSON says. Raises CommandFailed, whose details are pointers into it."""
    try:
        return strict_json.parse(text)
    except InvalidJson as error:
        details = [f"{v.pointer or '(whole document)'}: {v.detail}" for v in error.violations]
        raise CommandFailed(f"{place}: {error}", code=code, details=details) from None


def _yaml(text: bytes, path: Path) -> Any:
    try:
        document = strict_yaml.load(text.decode(), TEXT_MEMBERS)
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
