"""Strict YAML: mappings without doubled keys, values that JSON can say, text where text is meant.

PyYAML reads YAML 1.1: `no` is False, `12:30` is 750, `3.10` is 3.1 and `007` is 7, and of two
equal keys the last one counts. Each would change a setting or a job without a word. A member whose
name is in `text_members` must be text; every other scalar keeps the meaning that
`yaml.safe_load`, and so the harness, gives it. Dates stay text.
"""

import math
from collections.abc import Set
from typing import Any

import yaml

_PREFIX = "tag:yaml.org,2002:"
_TEXT, _MERGE, _DATE, _NULL = (_PREFIX + name for name in ("str", "merge", "timestamp", "null"))
_JSON = {_PREFIX + name for name in ("str", "null", "bool", "int", "float", "seq", "map")}
_ABSENT = {"", "~", "null"}  # the spellings of null that nobody means as a word


class YamlRefused(yaml.MarkedYAMLError):
    """YAML that two readers would read differently; `reason` quotes nothing of the file."""

    def __init__(self, problem: str, reason: str, node: yaml.Node) -> None:
        super().__init__(problem=problem, problem_mark=node.start_mark)
        self.reason = reason


def load(text: str, text_members: Set[str] = frozenset()) -> Any:
    """Return what a YAML document holds, as values that JSON can say.

    Raises yaml.YAMLError; a YamlRefused has the line and the fix. Raises RecursionError for a
    document that is nested too deeply.
    """
    loader = _Loader(text, text_members)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader that checks each node before it becomes a value."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the class attribute PyYAML looks for
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, text_members: Set[str]) -> None:
        super().__init__(text)
        self.text_members = text_members

    # Checked here and not in construct_mapping: by then `<<` has been merged, and a key that
    # overrides a merged one looks like a duplicate.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, value in node.value:
            if key.tag not in (_TEXT, _MERGE):
                problem = f"the key {key.value!s} is not text: put it in quotes"
                raise YamlRefused(problem, "a key is not text: put it in quotes", key)
            if key.value in seen:
                problem = f"the key {key.value} appears twice"
                raise YamlRefused(problem, "a key appears twice", key)
            seen.add(key.value)
            if key.value in self.text_members:
                _require_text(key.value, value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError):  # `0x_`, `!!bool maybe`, 5000 digits
            raise _no_json(node) from None
        if node.tag not in _JSON or (isinstance(value, float) and not math.isfinite(value)):
            raise _no_json(node)
        return value


def _require_text(member: str, node: yaml.Node) -> None:
    """Refuse each scalar below a text member that YAML reads as something else.

    Quoted text and `!!str` have the tag of text.
    """
    stack, seen = [node], set()
    while stack:
        node = stack.pop()
        if id(node) in seen:  # an alias, maybe of what holds it
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if node.tag == _TEXT or (node.tag == _NULL and node.value in _ABSENT):
                continue
            kind = node.tag.removeprefix(_PREFIX)
            problem = f"{member} must be text, and YAML reads {node.value} as {kind}: put it in"
            raise YamlRefused(f'{problem} quotes ("{node.value}")', "text is not in quotes", node)
        if isinstance(node, yaml.SequenceNode):
            stack += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            stack += [value for _, value in reversed(node.value)]


def _no_json(node: yaml.Node) -> YamlRefused:
    what = node.value[:60] if isinstance(node, yaml.ScalarNode) else node.tag
    return YamlRefused(f"holds what JSON cannot say: {what}", "a value that JSON cannot say", node)
