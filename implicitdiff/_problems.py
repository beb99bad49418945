"""One call for each kind of problem: a root, a fixed point, a minimum, least squares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from implicitdiff._torch.trees import Tree, X
from implicitdiff.solvers._loop.options import SolverOptions
from implicitdiff.solvers._loop.report import Callback
from implicitdiff.solvers._loop.solver import Solver
from implicitdiff.solvers._loop.state import State
from implicitdiff.solvers._steps.dogleg import DoglegMemory
from implicitdiff.solvers.anderson import AndersonMemory, anderson
from implicitdiff.solvers.dogleg_root import dogleg_root
from implicitdiff.solvers.lbfgs import LbfgsMemory, lbfgs
from implicitdiff.solvers.levenberg_marquardt import LevenbergMarquardtMemory, levenberg_marquardt


class RunOptions(TypedDict, total=False):
    """The options of ``solver.run``."""

    implicit_diff: bool
    checkpoint_every: int | None
    keep_history: bool
    verbose: bool
    callback: Callback | None


class SearchOptions(SolverOptions, RunOptions):
    """The options of every factory and of ``solver.run``."""


@overload
def root(
    residual_fn: Callable[..., X], init: X, *args: Any, **options: Unpack[SearchOptions]
) -> tuple[X, State[DoglegMemory]]: ...
@overload
def root(
    residual_fn: Callable[..., X],
    init: X,
    *args: Any,
    solver: Callable[..., Solver[Any, ..., Any]],
    **options: Any,
) -> tuple[X, State[Any]]: ...
def root(
    residual_fn: Callable[..., Tree],
    init: Tree,
    *args: Tree,
    solver: Callable[..., Solver[Any, ..., Any]] = dogleg_root,
    **options: Any,
) -> tuple[Tree, State[Any]]:
    """Solve ``F(x, *args) = 0``; the solution has the implicit derivatives in ``args``, see `custom_root`.

    ``root(F, init, *args)`` is ``dogleg_root(F).run(init, *args)``.

    Args:
        residual_fn: ``F(x, *args)``, a tree like ``x``.
        init: the initial guess, a tree of tensors; its gradient is zero.
        args: the other arguments of ``F``.
        solver: a factory of `implicitdiff.solvers` for roots, such as `newton` or `broyden_root`.
        options: options of the factory (``rtol``, ``atol``, ``maxiter``, ..., see `implicitdiff.solvers.SolverOptions`)
            and of ``run`` (``implicit_diff``, ``checkpoint_every``, ``keep_history``, ``verbose``, ``callback``).

    Returns:
        ``(x, state)``: the solution, and its `implicitdiff.solvers.State`.

    Raises:
        ConvergenceError: the search failed, with the default ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from implicitdiff import root
        >>> x, state = root(lambda x, a: x**3 - a, torch.tensor(1.0), torch.tensor(8.0))
        >>> x
        tensor(2.)
    """
    return _run("root", solver, residual_fn, init, args, options)


@overload
def fixed_point(
    fixed_point_fn: Callable[..., X], init: X, *args: Any, **options: Unpack[SearchOptions]
) -> tuple[X, State[AndersonMemory]]: ...
@overload
def fixed_point(
    fixed_point_fn: Callable[..., X],
    init: X,
    *args: Any,
    solver: Callable[..., Solver[Any, ..., Any]],
    **options: Any,
) -> tuple[X, State[Any]]: ...
def fixed_point(
    fixed_point_fn: Callable[..., Tree],
    init: Tree,
    *args: Tree,
    solver: Callable[..., Solver[Any, ..., Any]] = anderson,
    **options: Any,
) -> tuple[Tree, State[Any]]:
    """Solve ``f(x, *args) = x``; the solution has the implicit derivatives in ``args``, see `custom_fixed_point`.

    ``fixed_point(f, init, *args)`` is ``anderson(f).run(init, *args)``.

    Args:
        fixed_point_fn: ``f(x, *args)``, a tree like ``x``.
        init: see `root`.
        args: see `root`.
        solver: a factory of `implicitdiff.solvers` for fixed points, such as `fixed_point_iteration` or `broyden`.
        options: see `root`.

    Returns:
        ``(x, state)``, as of `root`.

    Raises:
        ConvergenceError: the search failed, with the default ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from implicitdiff import fixed_point
        >>> babylonian = lambda x, a: (x + a / x) / 2  # the fixed point is the square root of a
        >>> x, state = fixed_point(babylonian, torch.tensor(1.0), torch.tensor(9.0))
        >>> x
        tensor(3.)
    """
    return _run("fixed_point", solver, fixed_point_fn, init, args, options)


@overload
def minimize(
    objective_fn: Callable[..., Tensor], init: X, *args: Any, **options: Unpack[SearchOptions]
) -> tuple[X, State[LbfgsMemory]]: ...
@overload
def minimize(
    objective_fn: Callable[..., Tensor],
    init: X,
    *args: Any,
    solver: Callable[..., Solver[Any, ..., Any]],
    **options: Any,
) -> tuple[X, State[Any]]: ...
def minimize(
    objective_fn: Callable[..., Tensor],
    init: Tree,
    *args: Tree,
    solver: Callable[..., Solver[Any, ..., Any]] = lbfgs,
    **options: Any,
) -> tuple[Tree, State[Any]]:
    """Solve ``min_x f(x, *args)``; the solution has the implicit derivatives in ``args`` of ``grad f(x, *args) = 0``.

    ``minimize(f, init, *args)`` is ``lbfgs(f).run(init, *args)``.

    Args:
        objective_fn: ``f(x, *args)``, a real number.
        init: see `root`.
        args: see `root`.
        solver: a factory of `implicitdiff.solvers` for minima, such as `newton_cg`; ``solver=lbfgs_b`` takes
            ``bounds=(lower, upper)`` among the options.
        options: see `root`.

    Returns:
        ``(x, state)``, as of `root`.

    Raises:
        ConvergenceError: the search failed, with the default ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from implicitdiff import minimize
        >>> x, state = minimize(lambda x, a: ((x - a) ** 2).sum(), torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> x, bool(state.converged)
        (tensor([1., 2.]), True)
    """
    return _run("minimize", solver, objective_fn, init, args, options)


@overload
def least_squares(
    residual_fn: Callable[..., Tree], init: X, *args: Any, **options: Unpack[SearchOptions]
) -> tuple[X, State[LevenbergMarquardtMemory]]: ...
@overload
def least_squares(
    residual_fn: Callable[..., Tree],
    init: X,
    *args: Any,
    solver: Callable[..., Solver[Any, ..., Any]],
    **options: Any,
) -> tuple[X, State[Any]]: ...
def least_squares(
    residual_fn: Callable[..., Tree],
    init: Tree,
    *args: Tree,
    solver: Callable[..., Solver[Any, ..., Any]] = levenberg_marquardt,
    **options: Any,
) -> tuple[Tree, State[Any]]:
    """Solve ``min_x |r(x, *args)|^2 / 2``; the solution has the implicit derivatives in ``args`` of ``J'r = 0``.

    ``least_squares(r, init, *args)`` is ``levenberg_marquardt(r).run(init, *args)``.

    Args:
        residual_fn: ``r(x, *args)``, a tree of tensors.
        init: see `root`.
        args: see `root`.
        solver: a factory of `implicitdiff.solvers` for least squares, such as `gauss_newton` or `dogleg`.
        options: see `root`; with the default solver also ``solver=levenberg_marquardt, bounds=..., loss=...``.

    Returns:
        ``(x, state)``, as of `root`.

    Raises:
        ConvergenceError: the search failed, with the default ``on_failure="raise"``.

    Example:
        >>> import torch
        >>> from implicitdiff import least_squares
        >>> t, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.5])
        >>> x, state = least_squares(lambda x, y: x[0] * torch.exp(-x[1] * t) - y, torch.ones(2), y)
        >>> x
        tensor([2.0000, 0.6931])
    """
    return _run("least_squares", solver, residual_fn, init, args, options)


def _run(
    name: str,
    factory: Callable[..., Solver[Any, ..., Any]],
    fn: Callable[..., Tree],
    init: Tree,
    args: tuple[Tree, ...],
    options: dict[str, Any],
) -> tuple[Tree, State[Any]]:
    # Options of `run` go to `run`, all others to the factory.
    of_run = {name: options.pop(name) for name in RunOptions.__annotations__ if name in options}
    # One refusal for two mistakes: `factory` is no function, or its result is no solver.
    made = factory(fn, **options) if callable(factory) else None
    if not isinstance(made, Solver):
        raise TypeError(f"{name}: solver must be a factory of implicitdiff.solvers, such as newton, got {factory!r}")
    return made.run(init, *args, **of_run)
