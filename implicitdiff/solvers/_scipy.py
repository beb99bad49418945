"""SciPy's solvers as an iterative method: lane by lane, on the host, below every transform.

SciPy returns a point for an initial guess. The optimality condition, evaluated here, decides whether the search has
converged, and gives the derivatives.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import implicitdiff._torch.decisions as _decisions
import implicitdiff._torch.trees as pytree
from implicitdiff._implicit.operators import with_vectors
from implicitdiff._torch.trees import P, Tree, X
from implicitdiff.solvers._loop.equations import EquationOf
from implicitdiff.solvers._loop.measures import precision
from implicitdiff.solvers._loop.method import IterativeMethod, Start
from implicitdiff.solvers._loop.options import SolverOptions
from implicitdiff.solvers._loop.problem import BatchedProblem, any_lane, row_norm
from implicitdiff.solvers._loop.solver import Solver, SolverImpl, make_solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._loop.status import Status

Array = NDArray[np.float64]
T = TypeVar("T")


class ScipyMemory(NamedTuple):
    """The memory of `scipy_root`, `scipy_minimize` and `scipy_least_squares`.

    Attributes:
        nfev: the number of evaluations by SciPy.
        code: SciPy's status; 0 before the search.
        message: SciPy's message, as bytes of UTF-8 padded with zeros, ``(256,)``; ``text`` is the string.
    """

    nfev: Tensor
    code: Tensor
    message: Tensor

    @property
    def text(self) -> str:
        """SciPy's message for a single lane."""
        return bytes(self.message.tolist()).rstrip(b"\0").decode(errors="replace")


class LaneFunctions:
    """The functions of a single lane in the form that SciPy calls, from and to float64 arrays.

    Attributes:
        eps: machine epsilon of the least precise leaf.
        x0: the initial guess.
        nfev: the number of evaluations so far.
        last: the point of the last evaluation.
        failure: the last exception of the user's function, or None.
    """

    def __init__(self, problem: BatchedProblem, x: Tensor) -> None:
        self.fn, self.function, self.eps = problem.fn, problem.function, problem.eps
        self.like, self.x0 = x, _to_array(x)
        self.nfev, self.last = 0, self.x0
        self.failure: Exception | None = None
        self._at: tuple[Array, Callable[[Tensor], Tensor]] | None = None

    def residual(self, x: Array) -> Array:
        """Return the value of a vector-valued function."""
        return self._value(x, self._call(self.fn, x))

    def jacobian(self, x: Array) -> Array:
        """Return the Jacobian of a vector-valued function."""
        return _to_array(self._call(self.fn.jacobian, x)[1])

    def objective(self, x: Array) -> float:
        """Return the value of a real-valued function."""
        return float(self._value(x, self._call(self.fn, x))[0])

    def objective_and_gradient(self, x: Array) -> tuple[float, Array]:
        """Return the value and the gradient of a real-valued function."""
        value, gradient = self._call(self.fn.value_and_grad, x)
        return float(self._value(x, value[:, None])[0]), _to_array(gradient)

    def hessian_product(self, x: Array, v: Array) -> Array:
        """Return the product of the Hessian with a vector."""
        return _to_array(self._call(self._hessian_at(x), v))

    def hessian(self, x: Array) -> Array:
        """Return the Hessian as a matrix."""
        # ``basis[:, None]`` is ``(n, 1, n)``, ``n`` unit vectors of a single lane; `_to_array` takes ``(1, n, n)``.
        products = with_vectors(self._hessian_at(x), self.fn.one_by_one)
        basis = torch.eye(len(x), dtype=self.like.dtype, device=self.like.device)
        return _to_array(products(basis[:, None])[None, :, 0])

    def bounds(self) -> tuple[Array, Array]:
        """Return the lower and upper bounds, as projections of infinite points."""
        clip = self.function("box")
        return _to_array(clip(torch.full_like(self.like, -math.inf))), _to_array(
            clip(torch.full_like(self.like, math.inf))
        )

    def _hessian_at(self, x: Array) -> Callable[[Tensor], Tensor]:
        # Keep the last linearisation: SciPy asks for many products at the same point.
        if self._at is None or not np.array_equal(x, self._at[0]):
            _, _, product = self._call(self.fn.hessian, x)
            self._at = x.copy(), product
        return self._at[1]

    def _call(self, fn: Callable[[Tensor], T], x: Array) -> T:
        # Copy, because SciPy reuses its array.
        point = torch.tensor(x, dtype=self.like.dtype, device=self.like.device)[None]
        try:
            return fn(point)
        except Exception as failure:
            self.failure = failure
            raise

    def _value(self, x: Array, value: Tensor) -> Array:
        self.nfev, self.last = self.nfev + 1, x.copy()
        return _to_array(value)


def _to_array(row: Tensor) -> Array:
    """Return a tensor's single row as a float64 array."""
    # Processes of a distributed run take the leader's numbers, so that SciPy decides alike in all of them.
    (row,) = _decisions.of_leader([row[0].detach()])
    # A copy, because `numpy` shares memory, and SciPy may overwrite its arrays.
    return row.to("cpu", torch.float64).numpy().copy()


class SearchEnd(NamedTuple):
    """The end of SciPy's search.

    Attributes:
        x: the last point.
        spent: the part of the budget that was used.
        why: this library's status, if the error exceeds the target.
        code: SciPy's status.
        message: SciPy's message.
    """

    x: Array
    spent: int
    why: Status
    code: int
    message: str


class ScipyEngine(NamedTuple):
    """A solver of SciPy.

    Attributes:
        solve: ``solve(lane, aim, limit) -> OptimizeResult``; `aim` is the error at which to stop.
        counts: the field of the result that ``limit`` bounds; the number of evaluations for a result without the field.
        digits: power of eps that default tolerances accept after SciPy has stopped early.
    """

    solve: Callable[[LaneFunctions, float, int], Any]
    counts: str
    digits: float = 2 / 3


def make_scipy_solver(
    name: str, equation_of: EquationOf, fn: Callable[..., Tree], engine: ScipyEngine, options: SolverOptions
) -> Solver[X, P, ScipyMemory]:
    """Make a solver with a single iteration, the whole of SciPy's search.

    Args:
        name: the factory's name.
        equation_of: makes the equation of the user's function.
        fn: the user's function.
        engine: SciPy's solver.
        options: see `implicitdiff.solvers`.
    """
    rtol, atol, maxiter = options.get("rtol"), options.get("atol"), options.get("maxiter")
    step = partial(_step, engine=engine, rtol=rtol, atol=atol, budget=maxiter)
    return make_solver(
        name, equation_of, (fn,), IterativeMethod(_start, step, ScipyMemory, 10_000), options, impl=_ScipyImpl
    )


class _ScipyImpl(SolverImpl):
    """The functions of a solver whose steps are SciPy's."""

    def update(
        self, params: Tree, state: State[ScipyMemory], args: tuple[Tree, ...]
    ) -> tuple[Tree, State[ScipyMemory]]:
        """Run the whole search.

        Args:
            params: the unknowns.
            state: the state that belongs to `params`.
            args: the arguments of the user's function after the first, by position or keyword.

        Returns:
            ``(params, state)``: the solution, a tree like `params`, and a `State`.
        """
        # SciPy needs plain numbers. Tensors of the caller's frame may be batched or tracked, and `run` strips both.
        running = state.status == Status.RUNNING
        if not any_lane(running):
            return params, state
        old, structure = pytree.flatten((params, state))
        quiet = replace(self, options=replace(self.options, on_failure="ignore"))
        new = structure.tensors_of(quiet.run(params, args))
        kept: tuple[Tree, State[ScipyMemory]] = structure.unflatten(
            [torch.where(running, n, o) for n, o in zip(new, old, strict=True)]
        )
        return kept

    def _unrolled(self, *_: object) -> NoReturn:
        raise NotImplementedError(
            f"{self.name}: implicit_diff=False differentiates the steps, but SciPy's steps are not torch operations; "
            "leave implicit_diff at True, or use a solver of this library without scipy in its name"
        )


def _start(problem: BatchedProblem, x: Tensor) -> Start[ScipyMemory]:
    error = row_norm(problem.residual(problem, x))
    zeros = torch.zeros_like(error, dtype=torch.int64)
    message = torch.zeros((len(x), _LONGEST), dtype=torch.uint8, device=x.device)
    return Start(error, ScipyMemory(nfev=zeros, code=zeros, message=message))


def _step(
    problem: BatchedProblem,
    x: Tensor,
    state: State[ScipyMemory],
    *,
    engine: ScipyEngine,
    rtol: float | None,
    atol: float | None,
    budget: int | None,
) -> tuple[Tensor, State[ScipyMemory]]:
    # Lane by lane: SciPy's solvers take a single problem. The rows are plain tensors below all transforms, so writes in
    # place are safe.
    new_x, spent, status = x.clone(), torch.ones_like(state.status), state.status.clone()
    nfev, code, message = (t.clone() for t in state.memory)
    limit = budget or max(1000, 200 * x.shape[1])
    for i in (state.status == Status.RUNNING).nonzero()[:, 0].tolist():
        lane = LaneFunctions(problem.lane(i), x[i : i + 1])
        end = _run_scipy(engine, lane, float(state.target[i]), limit)
        new_x[i] = torch.from_numpy(end.x)
        spent[i], nfev[i], status[i], code[i] = end.spent, lane.nfev, end.why, end.code
        message[i] = _as_bytes(end.message)
    # SciPy's flag of success is ignored: the optimality condition at the last point decides.
    error = row_norm(problem.residual(problem, new_x))
    # The loop itself sets the status of lanes that have converged or are not finite.
    accepted = _accepted(state, rtol, atol, problem.eps, engine.digits)
    target = torch.where(error > state.target, accepted, state.target)
    missed = torch.isfinite(error) & (error > target)
    # The loop will add 1.
    iter_num = state.iter_num + spent - 1
    return new_x, state._replace(
        iter_num=iter_num,
        error=error,
        target=target,
        status=torch.where(missed, status, state.status),
        memory=ScipyMemory(nfev, code, message),
    )


_LONGEST = 256
"""Length in bytes to which SciPy's messages are cut."""


def _as_bytes(message: str) -> Tensor:
    return torch.tensor(list(message.encode()[:_LONGEST].ljust(_LONGEST, b"\0")), dtype=torch.uint8)


def _accepted(state: State[ScipyMemory], rtol: float | None, atol: float | None, eps: float, digits: float) -> Tensor:
    """Return the target after SciPy has stopped early; a user's tolerance stays in force."""
    if atol is not None:
        return state.target
    # A target above ``rtol |F(x0)|`` comes from the default ``p |J x|``, and may be relaxed to ``eps^digits``.
    given = state.error * (rtol or 0.0)
    return torch.where(state.target > given, eps**digits / precision(eps) * state.target, state.target)


_BUDGET = re.compile("max|limit", re.IGNORECASE)
"""Pattern of SciPy's messages about a spent budget; no other message matches."""
_BREAKDOWNS = (ValueError, ArithmeticError, RuntimeError)


def _run_scipy(engine: ScipyEngine, lane: LaneFunctions, aim: float, limit: int) -> SearchEnd:
    """Run SciPy's search of one lane; the user's exceptions are raised, SciPy's numerical failures become a status."""
    try:
        with _without_warnings():
            result = engine.solve(lane, aim, limit)
    except Exception as error:
        # SciPy checks its arguments at the initial guess. Later exceptions are numerical: some methods raise for values
        # that are not finite, or for singular matrices.
        if lane.failure is None and isinstance(error, _BREAKDOWNS) and lane.nfev > 1:
            return SearchEnd(lane.last, lane.nfev, Status.DIVERGED, code=-1, message=str(error))
        if lane.failure is None or lane.failure is error:
            raise
    if lane.failure is not None:
        # SciPy has replaced the user's exception by another, or returned as if nothing had happened.
        raise lane.failure
    spent = int(result.get(engine.counts, lane.nfev))
    point, message = np.array(result.x, dtype=np.float64), str(result.get("message", ""))
    # Some methods stop at a limit of their own and tell in the message only.
    is_spent = spent >= limit or _BUDGET.search(message)
    why = Status.BUDGET_SPENT if is_spent else Status.LINE_SEARCH_FAILED
    return SearchEnd(point, spent, why, int(result.get("status", 0)), message)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress SciPy's warnings of values that are not finite and of failed line searches; the optimality condition
    shows both."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="scipy")
        yield


def lookup(name: str, method: str, methods: Mapping[str, T]) -> T:
    """Return the table's entry for a method, with the name in any case; raise ValueError for an unknown name."""
    if not isinstance(method, str) or method.lower() not in methods:
        raise ValueError(f"{name}: method must be one of {', '.join(methods)}, got {method!r}")
    return methods[method.lower()]


def check_scipy_options(name: str, given: Mapping[str, object] | None, refused: Mapping[str, str]) -> dict[str, object]:
    """Return the user's options for SciPy; raise ValueError for a name in `refused`, with advice from `refused`."""
    options = dict(given or {})
    for option in sorted(options.keys() & refused.keys()):
        raise ValueError(f"{name}: scipy_options must not have {option!r}, got {options[option]!r}; {refused[option]}")
    return options
