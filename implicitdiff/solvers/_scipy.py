"""SciPy's solvers as a method: lane by lane, on the host, below every transform.

SciPy starts at an initial guess and returns where it stopped; whether it got there, and what the derivatives are, is
decided here, by the condition that a solution satisfies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import implicitdiff._pytree as pytree
from implicitdiff._operator import with_vectors
from implicitdiff.projections import box
from implicitdiff.solvers._condition import Condition, Parts, Pose, subtract
from implicitdiff.solvers._gap import Constrained, Gap, size
from implicitdiff.solvers._rows import Rows, any_lane, norm
from implicitdiff.solvers._solver import Maker, Method, Solver, make
from implicitdiff.solvers._status import Status

Array = NDArray[np.float64]
T = TypeVar("T")


class ScipyState(NamedTuple):
    """The state of `scipy_root`, `scipy_minimize` and `scipy_least_squares`; the first five fields are those of every
    solver.

    Attributes:
        iter_num: what SciPy's own budget counts: its iterations (``nit``), or evaluations where it has no other budget.
        error: of the optimality condition.
        target: what ``error`` has to reach.
        status: an `implicitdiff.solvers.Status`.
        history: the errors of a run that kept them, at the initial guess and where SciPy stopped, else empty.
        nfev: how often SciPy asked for the function's value.
    """

    iter_num: Tensor
    error: Tensor
    target: Tensor
    status: Tensor
    history: Tensor
    nfev: Tensor


class Lane:
    """The functions of one lane as SciPy calls them, from and to arrays of float64.

    Attributes:
        eps: the precision of the least precise leaf.
        x0: the initial guess.
        nfev: how many values SciPy has asked for.
        last: where it last asked for one.
        failure: the last exception of the user's function.
    """

    def __init__(self, rows: Rows, x: Tensor) -> None:
        self.fn, self.part, self.eps = rows.fn, rows.part, rows.eps
        self.like, self.x0 = x, _array(x)
        self.nfev, self.last = 0, self.x0
        self.failure: Exception | None = None
        self._at: tuple[Array, Callable[[Tensor], Tensor]] | None = None

    def residual(self, x: Array) -> Array:
        """The value of a function to vectors."""
        return self._value(x, self._call(self.fn, x))

    def jacobian(self, x: Array) -> Array:
        """Its matrix of derivatives."""
        return _array(self._call(self.fn.jacobian, x)[1])

    def objective(self, x: Array) -> float:
        """The value of a function to numbers."""
        return float(self._value(x, self._call(self.fn, x))[0])

    def objective_and_gradient(self, x: Array) -> tuple[float, Array]:
        """The same with its gradient."""
        value, gradient = self._call(self.fn.value_and_grad, x)
        return float(self._value(x, value[:, None])[0]), _array(gradient)

    def hessian_product(self, x: Array, v: Array) -> Array:
        """The Hessian times a vector."""
        return _array(self._call(self._hessian_at(x), v))

    def hessian(self, x: Array) -> Array:
        """The Hessian as a matrix."""
        products = with_vectors(self._hessian_at(x), self.fn.one_by_one)
        basis = torch.eye(len(x), dtype=self.like.dtype, device=self.like.device)
        return _array(products(basis[:, None])[None, :, 0])

    def bounds(self) -> tuple[Array, Array]:
        """The least and the greatest values of the unknowns, by projecting from beyond."""
        clip = self.part("box")
        return _array(clip(torch.full_like(self.like, -math.inf))), _array(clip(torch.full_like(self.like, math.inf)))

    def _hessian_at(self, x: Array) -> Callable[[Tensor], Tensor]:
        # SciPy asks for many products at one point.
        if self._at is None or not np.array_equal(x, self._at[0]):
            _, _, product = self._call(self.fn.hessian, x)
            self._at = x.copy(), product
        return self._at[1]

    def _call(self, fn: Callable[[Tensor], T], x: Array) -> T:
        # A copy: SciPy goes on writing to its array.
        point = torch.tensor(x, dtype=self.like.dtype, device=self.like.device)[None]
        try:
            return fn(point)
        except Exception as failure:
            self.failure = failure
            raise

    def _value(self, x: Array, value: Tensor) -> Array:
        self.nfev, self.last = self.nfev + 1, x.copy()
        return _array(value)


def _array(row: Tensor) -> Array:
    """The one row of a tensor."""
    return row[0].detach().to("cpu", torch.float64).numpy().copy()


class End(NamedTuple):
    """Where SciPy stopped, after how much of its budget, and whether it could not go on."""

    x: Array
    spent: int
    broken: bool


class Engine(NamedTuple):
    """A solver of SciPy's.

    Attributes:
        solve: ``solve(lane, aim, limit) -> OptimizeResult``; `aim` is an error to stop at.
        counts: which field of the result counts what ``limit`` limits; the evaluations if it has none of this name.
        gap: what is zero at a solution; not a number where the user's function is not.
        digits: default tolerances accept the precision to this power, where SciPy can do no more.
    """

    solve: Callable[[Lane, float, int], Any]
    counts: str
    gap: Gap
    digits: float = 2 / 3


def make_engine(name: str, pose: Pose, fn: Callable[..., Any], engine: Engine, options: dict[str, Any]) -> Solver:
    """A solver whose one iteration is all of SciPy's.

    Args:
        name: of the factory.
        pose: makes the condition of the user's function.
        fn: that.
        engine: what solves.
        options: see `implicitdiff.solvers`.
    """
    start, step = partial(_start, gap=engine.gap), partial(_step, engine=engine, budget=options.get("maxiter"))
    return make(name, pose, (fn,), Method(start, step, ScipyState, 10_000, engine.gap), options, kind=_EngineMaker)


class _EngineMaker(Maker):
    def update(self, params: Any, state: ScipyState, args: tuple[Any, ...]) -> tuple[Any, ScipyState]:
        """The whole search, ``(params, state)``."""
        # SciPy needs plain numbers, which the caller's frame may not have, but `run` gets.
        running = state.status == Status.RUNNING
        if not any_lane(running):
            return params, state
        old, structure = pytree.flatten((params, state))
        quiet = replace(self, options=replace(self.options, on_failure="ignore"))
        new = structure.tensors_of(quiet.run(params, args))
        kept: tuple[Any, ScipyState] = structure.unflatten(
            [torch.where(running, n, o) for n, o in zip(new, old, strict=True)]
        )
        return kept

    def _unrolled(self, *_: Any) -> tuple[Any, Any]:
        raise NotImplementedError(
            f"{self.name}: implicit_diff=False would differentiate the steps, and SciPy's are no operations of torch; "
            "leave it True, or take a solver that is written in torch"
        )


def _start(rows: Rows, x: Tensor, *, gap: Gap) -> ScipyState:
    header = rows.header(norm(gap(rows, x)), lambda: size(gap, rows, x))
    return ScipyState(**header, nfev=header["iter_num"])


def _step(rows: Rows, x: Tensor, state: ScipyState, *, engine: Engine, budget: int | None) -> tuple[Tensor, ScipyState]:
    new_x, spent, nfev, status = x.clone(), torch.ones_like(state.nfev), state.nfev.clone(), state.status.clone()
    limit = budget or max(1000, 200 * x.shape[1])
    for i in (state.status == Status.RUNNING).nonzero()[:, 0].tolist():
        lane = Lane(rows.lane(i), x[i : i + 1])
        end = _solve(engine, lane, float(state.target[i]), limit)
        new_x[i] = torch.from_numpy(end.x)
        spent[i], nfev[i], status[i] = end.spent, lane.nfev, _why(end, limit)
    error = norm(engine.gap(rows, new_x))
    # Where it has got there, or is not finite, the loop says so.
    target = torch.where(error > state.target, _accepted(rows, state, engine.digits), state.target)
    missed = torch.isfinite(error) & (error > target)
    status = torch.where(missed, status, state.status)
    # The loop adds one.
    iter_num = state.iter_num + spent - 1
    return new_x, state._replace(iter_num=iter_num, error=error, target=target, status=status, nfev=nfev)


def _accepted(rows: Rows, state: ScipyState, digits: float) -> Tensor:
    """The target where SciPy can do no more; what the user asked for is kept to."""
    if rows.atol is not None:
        return state.target
    given = state.error * (rows.rtol or 0.0)
    return torch.where(state.target > given, rows.eps ** (digits - 2 / 3) * state.target, state.target)


def _why(end: End, limit: int) -> Status:
    """The status of a search that has not reached its target."""
    if end.broken:
        return Status.DIVERGED
    return Status.BUDGET_SPENT if end.spent >= limit else Status.LINE_SEARCH_FAILED


_BREAKDOWNS = (ValueError, ArithmeticError, RuntimeError)


def _solve(engine: Engine, lane: Lane, aim: float, limit: int) -> End:
    try:
        with _without_warnings():
            result = engine.solve(lane, aim, limit)
    except Exception as error:
        # Beyond the initial guess SciPy no longer refuses its arguments: some methods raise where numbers are not
        # finite, or a matrix is singular.
        if lane.failure is None and isinstance(error, _BREAKDOWNS) and lane.nfev > 1:
            return End(lane.last, lane.nfev, broken=True)
        if lane.failure is None or lane.failure is error:
            raise
    if lane.failure is not None:
        # SciPy has put an exception of its own in the place of the user's, or none.
        raise lane.failure
    return End(np.array(result.x, dtype=np.float64), int(result.get(engine.counts, lane.nfev)), broken=False)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Run the body without SciPy's warnings of numbers that are not finite and of line searches that fail: what comes
    of these is seen by the condition."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="scipy")
        yield


def known(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient, not a number where the value that it belongs to is not finite."""
    return torch.where(torch.isfinite(value).all(dim=-1, keepdim=True), gradient, math.nan)


def boxed(condition: Condition, lower: Any, upper: Any) -> Condition:
    """``box(x - g(x)) = x``, for a condition that a gradient is zero, ``g(x) = 0``."""

    def optimality(parts: Parts, x: Any, args: tuple[Any, ...]) -> Any:
        ahead = subtract(x, condition.optimality(parts, x, args))
        return subtract(x, parts["box"](ahead, args))

    return Condition({**condition.parts, "box": lambda v, args: box(v, lower, upper)}, optimality)


def in_box(gradient: Gap) -> Constrained:
    """What a solution within bounds makes zero."""
    return Constrained(gradient, _out_of_box)


def _out_of_box(rows: Rows, x: Tensor, gradient: Tensor) -> Tensor:
    return x - rows.part("box")(x - gradient)


def limits_of(name: str, bounds: Any) -> tuple[Any, Any]:
    """The lower and upper bounds that a user gave, infinite where there is none."""
    if not (isinstance(bounds, (tuple, list)) and len(bounds) == 2):
        raise ValueError(
            f"{name}: bounds must be a pair (lower, upper) of numbers, tensors or trees like params, got "
            f"{pytree.describe(bounds)}"
        )
    lower, upper = bounds
    return _filled(lower, -math.inf), _filled(upper, math.inf)


def _filled(bound: Any, absent: float) -> Any:
    return pytree.map_leaves(lambda leaf: absent if leaf is None else leaf, bound)


def lookup(name: str, method: str, methods: Mapping[str, T]) -> T:
    """What a table says of a method, whose name may be in any case."""
    if not isinstance(method, str) or method.lower() not in methods:
        raise ValueError(f"{name}: method must be one of {', '.join(methods)}, got {method!r}")
    return methods[method.lower()]


def check_scipy_options(name: str, given: Mapping[str, Any] | None, refused: Mapping[str, str]) -> dict[str, Any]:
    """The options that a user gave for SciPy; `refused` says what to do instead of some."""
    options = dict(given or {})
    for option in sorted(options.keys() & refused.keys()):
        raise ValueError(f"{name}: scipy_options must not have {option!r}, got {options[option]!r}; {refused[option]}")
    return options
