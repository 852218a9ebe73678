"""A stand-in for a language model: a few rules that answer the demo's questions.

There is no model behind this. So that a demo's table has something to tell, the rules *err on
purpose*: deterministically, by a hash of model, question and prompt, and the more often the
smaller the model's name and parameter count say it is. The numbers say nothing about the real
models; the result's provenance names the executor "built-in rules" for that reason.
"""

import ast
import hashlib
import itertools
import operator
import re
from collections.abc import Callable

CAPITALS = {
    "australia": "Canberra",
    "brazil": "Brasilia",
    "canada": "Ottawa",
    "france": "Paris",
    "germany": "Berlin",
    "italy": "Rome",
    "japan": "Tokyo",
    "kenya": "Nairobi",
    "norway": "Oslo",
    "turkey": "Ankara",
}
DIGITS_MAX = 9
UNKNOWN = "I do not know."
OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def respond(model: str, active_parameter_count_b: float, system: str, question: str) -> str:
    """Return the answer of a model of this name and size (in 10^9 active parameters).

    A system prompt that asks for steps makes the answer longer and errors rarer, as it does with
    real models.
    """
    stepwise = "step" in system.casefold()
    answer = next((found for rule in RULES if (found := rule(question)) is not None), UNKNOWN)
    error_rate = (0.6 if stepwise else 1.0) * 0.9 / (1.0 + active_parameter_count_b) ** 0.6
    if _chance(model, system, question) < error_rate:
        answer = _slip(answer)
    return f"Let me go through it step by step.\nAnswer: {answer}" if stepwise else answer


def arithmetic(question: str) -> str | None:
    """`What is 17 * 23 + 4?`: whole numbers with + - * and parentheses."""
    found = re.search(r"[\d(][\d\s()*+-]*[*+-][\d\s()*+-]*[\d)]", question)
    if found is None or len(max(re.findall(r"\d+", found[0]), key=len)) > DIGITS_MAX:
        return None
    try:
        return str(_value(ast.parse(found[0].strip(), mode="eval").body))
    except (SyntaxError, ValueError):
        return None


def capital(question: str) -> str | None:
    """`What is the capital of Norway?`"""
    found = re.search(r"capital of (\w+)", question, re.IGNORECASE)
    return CAPITALS.get(found[1].casefold()) if found else None


def reversal(question: str) -> str | None:
    """`Reverse the word "lease".`"""
    found = re.search(r"reverse[^\"]*\"([^\"]+)\"", question, re.IGNORECASE)
    return found[1][::-1] if found else None


def letter_count(question: str) -> str | None:
    """`How many times does the letter "r" occur in "strawberry"?`"""
    found = re.search(r"letter \"(\w)\"[^\"]*\"([^\"]+)\"", question, re.IGNORECASE)
    return str(found[2].casefold().count(found[1].casefold())) if found else None


def sequence(question: str) -> str | None:
    """`Which number comes next: 3, 7, 11, 15?`: constant steps only."""
    numbers = [int(one) for one in re.findall(r"-?\d+(?=,|\?)", question)]
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    return str(numbers[-1] + steps.pop()) if len(numbers) > 2 and len(steps) == 1 else None


def repetition(question: str) -> str | None:
    """`Repeat exactly: "ready"`"""
    found = re.search(r"repeat[^\"]*\"([^\"]+)\"", question, re.IGNORECASE)
    return found[1] if found else None


RULES = (capital, reversal, letter_count, sequence, repetition, arithmetic)


def _value(node: ast.expr) -> int:
    """Evaluate sums, differences and products of whole numbers; nothing else is run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and (apply := OPERATORS.get(type(node.op))):
        return apply(_value(node.left), _value(node.right))
    raise ValueError("not arithmetic of whole numbers")


def _chance(*parts: str) -> float:
    """A number in [0, 1) that is the same on every machine, unlike Python's own hash()."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _slip(answer: str) -> str:
    """A plausible mistake: a number off by one, a name or word with its last letter lost."""
    if re.fullmatch(r"-?\d+", answer):
        return str(int(answer) + 1)
    return UNKNOWN if answer in CAPITALS.values() else answer[:-1]
