"""Why a file of the settings cannot be read, in words of ours.

What the parsers say quotes the file, and a setting that names the wrong one may name the one that
holds the secrets: it would be on a terminal, in a log and in a ticket.
"""

import os

import yaml
from pydantic import ValidationError

from config.strict_yaml import YamlRefused

NO_TEXT = "it is not UTF-8 text"


def describe_read_error(error: Exception) -> str:
    """Return the reason and, where the parser tells it, the place; nothing that the file holds."""
    if isinstance(error, PermissionError):
        return (
            f"{error.strerror} for uid {os.geteuid()}, as which this process runs: make it readable"
            " for that user, or hand it over by systemd's LoadCredential="
        )
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return NO_TEXT
    if isinstance(error, YamlRefused) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.reason}"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"it is not YAML, from line {error.problem_mark.line + 1} on"
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "missing":  # the place is one that we look for, not one of the file's
            return f"it lacks {'.'.join(str(part) for part in first['loc'])}"
        return f"its content is of another kind ({first['type']})"
    return f"its content is of another kind ({type(error).__name__})"
