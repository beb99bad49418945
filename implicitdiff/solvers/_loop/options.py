"""The options of every solver, and checks of options."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any, Literal, TypedDict, cast

from implicitdiff._calls import FactoryT, shows_call
from implicitdiff._closures.signature import name_of
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff.linear_solve._outcome import OnFailure, check_on_failure

Compile = Literal["auto", "off", "always"]


class SolverOptions(TypedDict, total=False):
    """The keyword arguments of every factory of `implicitdiff.solvers`.

    To pass them on from a function of yours, annotate it by ``**options: Unpack[SolverOptions]``.

    Attributes:
        rtol: relative tolerance: the target of the error is ``rtol |F(x0)|``. None: see `implicitdiff.solvers`.
        atol: absolute tolerance of the error, in the units of ``F``. None: see `implicitdiff.solvers`.
        maxiter: budget of iterations; reaching the budget is no failure. None: a large limit; reaching it is a failure.
        check_every: number of iterations between two tests of the status; more than 1 saves synchronisations on a GPU.
        solve: linear solver of the implicit derivative, see `implicitdiff.custom_root`. None:
            `implicitdiff.linear_solve.solve_auto`.
        compile: ``"auto"`` to run the loop in compiled code if possible, else as a list of operations; ``"off"`` to run
            the loop in Python; ``"always"`` to raise a `implicitdiff.CompileError` if the loop cannot be compiled.
            Results differ in their last digits.
        on_failure: ``"raise"`` a `implicitdiff.ConvergenceError` if a lane fails, ``"warn"``, or ``"ignore"``.
    """

    rtol: float | None
    atol: float | None
    maxiter: int | None
    check_every: int
    solve: Solve | None
    compile: Compile
    on_failure: OnFailure


@dataclass(frozen=True)
class Options:
    """The options of every solver with their defaults; `SolverOptions` describes each."""

    rtol: float | None = None
    atol: float | None = None
    maxiter: int | None = None
    check_every: int = 1
    solve: Solve | None = None
    compile: Compile = "auto"
    on_failure: OnFailure = "raise"

    def check(self, name: str) -> None:
        """Raise ValueError or TypeError for options out of their range."""
        for option, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None:
                check_number(name, option, value, "a finite number >= 0 or None", lambda v: 0 <= v < math.inf)
        if self.maxiter is not None:
            check_count(name, "maxiter", self.maxiter, "an integer >= 1 or None")
        check_count(name, "check_every", self.check_every)
        if self.solve is not None and not _takes_two(self.solve):
            raise TypeError(
                f"{name}: solve must be a function solve(matvec, b), such as linear_solve.solve_gmres(), with its "
                f"parentheses, got {name_of(self.solve)}"
            )
        if self.compile not in ("auto", "off", "always"):
            raise ValueError(f'{name}: compile must be "auto", "off" or "always", got {self.compile!r}')
        check_on_failure(name, self.on_failure)


def _takes_two(fn: Callable[..., object]) -> bool:
    try:
        # Catches a factory without parentheses, ``solve=solve_gmres``.
        inspect.signature(fn).bind(None, None)
    except ValueError:  # some builtins have no signature
        return True
    except TypeError:
        return False
    return True


def check_count(name: str, option: str, value: object, wanted: str = "an integer >= 1") -> None:
    """Raise ValueError if an option is no integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: {option} must be {wanted}, got {value!r}")


def check_number(name: str, option: str, value: object, wanted: str, holds: Callable[[float], bool]) -> None:
    """Raise ValueError if an option is no number, or `holds` is false for the number; `wanted` describes the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ValueError(f"{name}: {option} must be {wanted}, got {value!r}")


def options_of(name: str, given: SolverOptions) -> Options:
    """Return the checked options from keyword arguments."""
    options = Options(**given)
    options.check(name)
    return options


def solver_factory(factory: FactoryT) -> FactoryT:
    """Decorate a factory: its help lists the options of every solver, and its solvers show their call."""
    parameters = [p for p in inspect.signature(factory).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    common = [Parameter(option.name, Parameter.KEYWORD_ONLY, default=option.default) for option in fields(Options)]
    signature = Signature([*parameters, *common])

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if unknown := next((name for name in kwargs if name not in signature.parameters), None):
            close = difflib.get_close_matches(unknown, signature.parameters, n=1)
            raise TypeError(
                f"{factory.__name__}: unknown option {unknown!r}{f', did you mean {close[0]}?' if close else ''}; the "
                f"arguments are {', '.join(signature.parameters)}"
            )
        return factory(*args, **kwargs)

    made.__signature__ = signature  # type: ignore[attr-defined]
    decorated = shows_call(made)
    if factory.__doc__ and SolverOptions.__doc__:  # None under ``python -OO``
        listed = SolverOptions.__doc__.partition("Attributes:\n")[2].rstrip()
        # The list goes behind the entry `options:`, up to a blank line or the next entry.
        decorated.__doc__ = re.sub(r"(?m)(^ +options: (?:.|\n(?! *\n| *\w+:))*)", rf"\1\n{listed}", factory.__doc__)
    return cast(FactoryT, decorated)
