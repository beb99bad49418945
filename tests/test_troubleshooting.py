"""The page of messages lists what the library raises, and nothing else."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from tables import troubles, troubles_of_ranks, troubles_of_steps

import implicitdiff

TROUBLES = troubles.TROUBLES | troubles_of_steps.TROUBLES | troubles_of_ranks.TROUBLES
PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
SOURCE = Path(implicitdiff.__file__).parent
HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""In the place of a part of a message that is filled in."""

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not here")


class Row(NamedTuple):
    """A row of the page: a message with ``...`` for the parts that change, and the names of its exceptions."""

    message: str
    kinds: tuple[str, ...]

    def matches(self, text: str) -> bool:
        return bool(_pattern(self.message).fullmatch(text))


@cache
def _pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)


@cache
def rows() -> list[Row]:
    found = re.findall(r"^- `([^`]+)` `([A-Za-z, ]+)`\\$", PAGE.read_text(), re.MULTILINE)
    return [Row(message, tuple(kinds.split(", "))) for message, kinds in found]


@cache
def raised(name: str) -> BaseException:
    """Return what a program raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as caught:
            TROUBLES[name]()
    return caught.value


def matching(text: str) -> list[Row]:
    return [row for row in rows() if row.matches(text)]


@pytest.mark.parametrize("name", TROUBLES)
def test_a_message_has_one_row(name: str) -> None:
    error = raised(name)
    found = matching(str(error))
    assert len(found) == 1, f"{error!r} is matched by {found}"
    names = {kind.__name__ for kind in type(error).__mro__} - {"Exception", "BaseException", "object"}
    # A warning has the text of the exception in whose place it comes.
    names |= {name.replace("Warning", "Error") for name in names}
    assert names & set(found[0].kinds), f"{type(error)} is not among {found[0].kinds}"


@pytest.mark.parametrize("row", rows() if PAGE.exists() else [], ids=lambda row: row.message[:60])
def test_a_row_is_raised(row: Row) -> None:
    assert any(row.matches(str(raised(name))) for name in TROUBLES), "tests/tables/troubles.py has no program for it"


def test_a_row_names_all_of_its_exceptions() -> None:
    for row in rows():
        errors = [raised(name) for name in TROUBLES if row.matches(str(raised(name)))]
        seen = {kind.__name__ for error in errors for kind in type(error).__mro__}
        seen |= {name.replace("Warning", "Error") for name in seen}
        assert seen >= set(row.kinds), f"nothing raises {set(row.kinds) - seen} with {row.message}"


# --- messages of the source -------------------------------------------------------------------------------------------

# Literals of four words and more that are no message of their own, by a part of each, with the reason.
WITHOUT = {
    "item __bool__": "names of functions",
    "size dim ndimension": "the same",
    "reads the value of a tensor": "a cause in the message of CompileError",
    "{} runs Python code": "the same",
    "depends on how a tensor lies": "the same",
    "is not of torch": "the same",
    "writes to a tensor from outside": "the same",
    ", which no operation shows": "the same",
    HOLE + " lanes: ": "the repr of a state",
    "for a minimum pass the gradient": "a hint in a message with a row",
    "pass the objective itself": "the same",
    "raised on ranks " + HOLE: "a note",
    "the end of `together`": "a point that a rank comes to, in messages of RankError",
    "the first collective of a group": "the same",
    "the lengths of histories": "the same",
    "the numbers of lanes": "the same",
    "compiler ": "printed by python -m implicitdiff",
    "built for ": "printed by python -m implicitdiff",
    "files are a source tree": "printed by python -m implicitdiff",
    "hide the installed package": "printed by python -m implicitdiff",
    "not built in this source tree": "printed by python -m implicitdiff",
    "not built: switched off": "printed by python -m implicitdiff",
    "it has ": "a difference between two evaluations, in the messages of a function that has changed",
    "gradients are ": "the same",
    "in a function that it gives": "the same",
    "its operation ": "the same",
    "got an unexpected keyword": "the beginning of a message about a call",
    ": the right-hand side b": "a name in messages about unknowns",
    "the right-hand side": "the same",
    " applies " + HOLE: "the cause has a row",
    "applies " + HOLE + "; or": "the same",
    HOLE + " " + HOLE + "; for a base class": "the cause has a row",
    "give maxiter= to": "advice in the message of scipy_options",
    "give bounds= to": "the same",
    "the Jacobian is that of torch": "the same",
    "the condition that is differentiated": "the same",
    "it belongs to a loss": "the same",
    HOLE + " after " + HOLE + " iterations": "the figures of a search",
    "the result of solve=": "the same",
    "its right-hand side": "the same",
    "called with ": "a name in messages about argnums",
    "accept operators that are not square": "a hint in a message about the structure of a result",
    "raises for a result unlike b": "an assertion",
    "solves in its caller's frame": "an assertion",
    "is never batched": "an assertion",
    "the solution is always known": "an assertion",
    "a recording has no values": "an assertion",
    "refused at the call": "an assertion",
    "vmap: ": "the beginning of a message of torch",
    "Cannot access data pointer": "the same",
    "element 0 of tensors": "the same",
    "One of the differentiated": "the same",
    "The differentiated Tensor": "the same",
    "backward() called inside": "the same",
    "You tried to vmap": "the same",
    "don't yet support saved tensor": "the same",
    "In order to use an": "the same",
    "a shape that depends on": "a use of values, in the message of a solver under vmap",
    "or another reader of memory": "the same",
    "was expected where there is": "caught: the caller compares trees",
    "a tensor has another shape or dtype": "the same",
    "systems failed": "the figures of a linear solve",
    "a finite number": "a range, in messages about numbers",
    "an integer >= 1 or None": "the same",
    "at least 0 and less": "the same",
    "broadcasts to the shape": "the same",
    "a number or a tensor that": "the same",
    "a number, a tensor or a tree": "the same",
    "for which ": "the dtype in a message about two columns",
    " is not None": "a condition in a message about a leaf",
    "must be a tensor or None, got": "the end of a message with a row",
    "there is no compiled step": "a reason in the message of use_accelerated_op",
    "was not built for": "the same",
    "torch sees no CUDA": "the same",
    "grads, or what the update": "names in the message of a step in place",
    "gradients, state, hyper": "the same",
    "one with a memory of type": "the kind of a state that was given",
    " also moves parameters": "a reason in the message about sparse gradients",
    "neg abs sqrt": "names of operations",
    "runs in forward mode": "not shown: the function is evaluated each time instead",
    "the value of the function is not finite": "the same",
    "an operand is on another device": "logged: the replay goes on without a graph",
}


REFUSALS = ("NotRecordableError", "_refusal", "_note_refusal", "refuse_change")


def is_reason(node: ast.AST) -> bool:
    """True for a call that says why a step or a function is not recorded: a cause inside of another message."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "id", getattr(function, "attr", "")) in REFUSALS


def literals() -> Iterator[tuple[str, str]]:
    """Return the place and the text of the string literals of the source, without docstrings and reasons."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {id(p) for f in ast.walk(tree) if isinstance(f, ast.JoinedStr) for p in ast.walk(f) if p is not f}
        inside |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        reasons = {id(p) for call in ast.walk(tree) if is_reason(call) for p in ast.walk(call)}
        for node in ast.walk(tree):
            if id(node) in reasons:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else HOLE for v in node.values]
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node.value


def has_row(text: str) -> bool:
    """True if a row matches a message of the source, or if a clause of one is in the other."""
    clauses = _clauses(re.split(f"{HOLE}|; |: ", text))
    everything = "\n".join(row.message for row in rows())
    return (
        any(clause in everything for clause in clauses)
        or any(part in text for part in _row_clauses())
        or any(row.matches(text) for row in rows())
    )


@cache
def _row_clauses() -> set[str]:
    return {part for row in rows() for part in _clauses(row.message.split("..."))}


def _clauses(parts: list[str]) -> list[str]:
    # Shorter parts, such as ", but ", are in messages of every kind.
    return [part for part in (part.removeprefix(": ") for part in parts) if len(part) >= 12]


def test_every_message_of_the_source_has_a_row() -> None:
    missing, used = [], set()
    for place, text in literals():
        if len(re.findall(r"[a-z]{2,}", text)) < 4 or " " not in text:
            continue
        if not has_row(text):
            reasons = {part for part in WITHOUT if part in text}
            used |= reasons
            missing += [] if reasons else [f"{place}: {text}"]
    assert not missing, "\n".join(missing)
    assert used == set(WITHOUT)
