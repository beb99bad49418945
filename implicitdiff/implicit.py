"""Decorators for the implicit derivatives of any solver, and products with the Jacobian of a solution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import one_derivative
from implicitdiff._closures.signature import Matcher, name_of
from implicitdiff._implicit.checks import check_like
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff._implicit.root import ResidualForm, fixed_point_form, root_at, root_form
from implicitdiff._implicit.solver_body import UserSolver, detached, run_solver
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, P, Tree, UserFunction, X
from implicitdiff._torch.values import refuse_valueless
from implicitdiff.errors import NotARootError
from implicitdiff.linear_solve.auto import solve_auto

__all__ = ["custom_fixed_point", "custom_root", "root_jvp", "root_vjp"]


def __dir__() -> list[str]:
    return __all__


Aux = TypeVar("Aux")


@overload
def custom_root(
    optimality_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    has_aux: Literal[False] = False,
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[Callable[P, X]], Callable[P, X]]: ...
@overload
def custom_root(
    optimality_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    *,
    has_aux: Literal[True],
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[Callable[P, tuple[X, Aux]]], Callable[P, tuple[X, Aux]]]: ...
def custom_root(
    optimality_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[UserSolver], UserSolver]:
    r"""Decorate a solver of ``optimality_fn(x, *args, **kwargs) = 0`` so that its solution has the derivatives that
    the equation implies.

    With ``A = dF/dx`` at the solution ``x*(theta)`` of ``F(x, theta) = 0``, the implicit function theorem gives::

        dx*/dtheta = -A^-1 dF/dtheta.

    The solver ``solver(init, *args, **kwargs) -> sol`` (or ``(sol, aux)``) runs once, on detached values and with
    gradients off, and may do anything: torch.autograd under ``enable_grad``, SciPy, host control flow, in-place
    updates of its own copies and of the initial guess, which is a copy. The iterations are not recorded, so memory does
    not grow with their number. Under `torch.func.vmap` the solver runs once, on batched values.
    If the solver receives neither batched values nor captured tensors of a running transform, the solver runs as
    outside of torch.func, and may use operations that torch.func cannot transform (in forward mode such a solver is
    started twice). Gradients that `Tensor.backward` in the solver accumulates into captured leaves are removed.

    Differentiable are all floating-point and complex tensors in the arguments after the first, by position or
    keyword, in pytrees of any nesting, and every tensor that ``optimality_fn`` captures: in a closure, a partial, a
    method's ``self``, a module's parameters. The initial guess has zero gradient. The decorated solver composes with
    grad, vjp, jvp, jacrev, jacfwd, hessian and vmap of torch.func in any nesting and to any order, and with
    torch.autograd; under `torch.compile` the decorated solver runs eagerly.

    Args:
        optimality_fn: ``F(x, *args, **kwargs)``, returning a tree like ``sol``; e.g. ``torch.func.grad(objective)``.
            ``F`` is evaluated more than once and batched, so ``F`` must be deterministic and free of side effects. For
            a first derivative by ``backward()``, ``F`` may use all that autograd can differentiate. For higher
            derivatives and under transforms, ``F`` must consist of operations that torch.func can transform. Variables
            that ``F`` looks up keep their values from the call to the derivative; an ``F`` that has changed since the
            call raises. Arguments are matched with the solver's by name, and by position if the names differ.
        argnums: the differentiable arguments of the solver, counted from the initial guess, number 0, which is never
            differentiable; None: all others. Captured tensors of ``optimality_fn`` are always differentiable.
        has_aux: whether the solver returns ``(sol, aux)``; ``aux`` comes back detached.
        solve: solves the linear systems with ``A`` and its adjoint: a factory's result from
            `implicitdiff.linear_solve`, or any ``solve(matvec, b)`` over trees. None: exact for few unknowns, a
            Krylov method beyond (`implicitdiff.linear_solve.solve_auto`).
        check: the largest Euclidean norm of the residual ``F(sol)`` that counts as zero, in the units of ``F``, lane by
            lane; None: no check. The derivatives are right only if ``sol`` is a solution.

    Returns:
        A decorator of solvers.

    Raises:
        TypeError: on a call, if the solver and ``optimality_fn`` do not take the same arguments, or if the solution
            contains objects other than tensors, None and strings.
        ValueError: when decorating, if `argnums` names an argument that the solver does not have; on a call, if the
            result of ``optimality_fn`` is not a tree like the solution, or differs from one evaluation to the next.
        RuntimeError: in a derivative, if ``optimality_fn`` has changed since the call.
        TransformError: under a transform, if torch.func cannot transform ``optimality_fn`` or, batched, the solver.
        NotARootError: on a call, if the residual exceeds ``check``.
        LinearSolveError: in a derivative, if the linear solve fails.

    Reference:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, section 2.1.

    Example:
        >>> import torch
        >>> from implicitdiff import custom_root
        >>> @custom_root(lambda x, theta: x**3 - theta)
        ... def cube_root(init, theta):
        ...     x = init
        ...     for _ in range(50):
        ...         x = x - (x**3 - theta) / (3 * x**2)
        ...     return x
        >>> torch.func.grad(cube_root, argnums=1)(torch.tensor(1.0), torch.tensor(8.0))  # 1 / (3 x^2) = 1 / 12
        tensor(0.0833)
    """
    return _decorator("custom_root", optimality_fn, root_form, argnums, has_aux, solve, check)


@overload
def custom_fixed_point(
    fixed_point_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    has_aux: Literal[False] = False,
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[Callable[P, X]], Callable[P, X]]: ...
@overload
def custom_fixed_point(
    fixed_point_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    *,
    has_aux: Literal[True],
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[Callable[P, tuple[X, Aux]]], Callable[P, tuple[X, Aux]]]: ...
def custom_fixed_point(
    fixed_point_fn: UserFunction,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solve: Solve | None = None,
    check: float | None = None,
) -> Callable[[UserSolver], UserSolver]:
    r"""Decorate a solver of ``fixed_point_fn(x, *args, **kwargs) = x`` so that its solution has the derivatives that
    the equation implies.

    Equivalent to `custom_root` of ``x - fixed_point_fn(x, *args, **kwargs)``. With ``J = df/dx`` at the fixed point
    ``x*(theta)``::

        dx*/dtheta = (I - J)^-1 df/dtheta.

    Any method may find the fixed point, a contraction or not, as long as ``I - J`` is non-singular.

    Args:
        fixed_point_fn: ``f(x, *args, **kwargs)``, returning a tree like ``x``.
        argnums: see `custom_root`.
        has_aux: see `custom_root`.
        solve: see `custom_root`; the operator is ``I - J``.
        check: see `custom_root`; the residual is ``x - f(x)``.

    Returns:
        A decorator of solvers.

    Raises:
        TypeError, ValueError, NotARootError, LinearSolveError: as `custom_root` does.

    Reference:
        Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022, section 2.2.

    Example:
        >>> import torch
        >>> from implicitdiff import custom_fixed_point
        >>> @custom_fixed_point(lambda x, theta: torch.cos(x) + theta)
        ... def solve(init, theta):
        ...     x = init
        ...     for _ in range(100):
        ...         x = torch.cos(x) + theta
        ...     return x
        >>> torch.func.grad(solve, argnums=1)(torch.tensor(1.0), torch.tensor(0.0))  # 1 / (1 + sin x)
        tensor(0.5975)
    """
    return _decorator("custom_fixed_point", fixed_point_fn, fixed_point_form, argnums, has_aux, solve, check)


def _decorator(
    maker: str,
    fn: UserFunction,
    form: ResidualForm,
    argnums: int | Sequence[int] | None,
    has_aux: bool,
    solve: Solve | None,
    check: float | None,
) -> Callable[[UserSolver], UserSolver]:
    if not callable(fn):
        raise TypeError(f"{maker}: the first argument must be a function of (x, *args), got {type(fn).__name__}")
    if solve is not None and not callable(solve):
        raise TypeError(f"{maker}: solve must be a function solve(matvec, b), got {type(solve).__name__}")
    if check is not None and not check >= 0:
        raise ValueError(f"{maker}: check must be a tolerance >= 0 or None, got {check!r}")
    chosen = _checked_argnums(maker, argnums)
    decoration = _Decoration(f"{maker}: {name_of(fn)}", fn, form, chosen, has_aux, solve or solve_auto(), check)

    def decorate(solver: UserSolver, *args: object, **kwargs: object) -> UserSolver:
        # ``@custom_root`` without an equation takes the solver for ``F``; a call of the decorated name arrives here.
        if args or kwargs or not callable(solver):
            raise TypeError(
                f"{decoration.name}: the decorator takes the solver, a function: write @{maker}(F) above the solver, "
                "where F is the equation"
            )
        matcher = Matcher(solver, fn)
        _check_argnums(f"{maker}: {name_of(solver)}", chosen, matcher.positions)

        @functools.wraps(solver)
        def solution(*args: Any, **kwargs: Any) -> Tree:
            return _solution_of_call(decoration, matcher, solver, args, kwargs)

        return solution

    return decorate


class _Decoration(NamedTuple):
    """The arguments of a decorator."""

    name: str
    fn: UserFunction
    form: ResidualForm
    chosen: frozenset[int] | None
    has_aux: bool
    solve: Solve
    check: float | None


@_compile.outside_compile
@_modes.one_operation
def _solution_of_call(
    decoration: _Decoration, matcher: Matcher, solver: UserSolver, args: tuple[Tree, ...], kwargs: dict[str, Tree]
) -> Tree:
    """Run the solver below all derivatives, and return its solution with the implicit derivatives."""
    bound = matcher.bind(args, kwargs)
    given, keywords = bound.args, bound.kwargs
    # Asked again at each call: a solver with ``*args`` has no fixed number of arguments when it is decorated.
    _check_argnums(
        f"{decoration.name}, called with {1 + len(given)} positional arguments", decoration.chosen, 1 + len(given)
    )
    sol, aux, derived = run_solver(solver, bound, decoration.has_aux)
    # After the solver, which receives the arguments as they are; detaching affects derivatives only.
    if decoration.chosen is not None:
        given = tuple(a if i in decoration.chosen else detached(a) for i, a in enumerate(given, start=1))
        keywords = detached(keywords)
    root = root_at(
        decoration.name, decoration.fn, decoration.form, decoration.solve, sol, *bound.to_condition(given, keywords)
    )
    root.refuse_solver_caches(derived)
    if decoration.check is not None:
        # The residual of the evaluation that `root_at` made, so the check costs no further evaluation.
        _check_residual(decoration.name, decoration.check, root.residual)
    result = root.attached()
    return (result, aux) if decoration.has_aux else result


def _checked_argnums(maker: str, argnums: int | Sequence[int] | None) -> frozenset[int] | None:
    if argnums is None:
        return None
    chosen = [argnums] if isinstance(argnums, int) else list(argnums)
    if wrong := [i for i in chosen if type(i) is not int or i < 1]:
        raise ValueError(
            f"{maker}: argnums must be integers >= 1 (number 0 is the initial guess, whose gradient is zero), got "
            f"{wrong[0]!r}"
        )
    return frozenset(chosen)


def _check_argnums(name: str, chosen: frozenset[int] | None, positions: float) -> None:
    """Raise if `chosen` exceeds the number of the solver's positional arguments."""
    if chosen and max(chosen) >= positions:
        raise ValueError(
            f"{name}: argnums names argument {max(chosen)}, but the last positional argument of the solver is number "
            f"{positions - 1} (number 0 is the initial guess)"
        )


def _check_residual(name: str, check: float, residual: Leaves) -> None:
    # Squares of a float32 residual may overflow, but not in float64.
    norm = torch.stack([r.abs().to(torch.float64).square().sum() for r in residual]).sum().sqrt()
    # Under vmap the norm is a wrapper; the plain tensor inside has the norms of all lanes.
    lanes = _levels.base(norm).reshape(-1)
    # Not `lanes > check`: a residual of NaN has to fail.
    failed = ~(lanes <= check)
    if bool(failed.any()):
        worst = float(lanes[failed].nan_to_num(nan=torch.inf).max())
        raise NotARootError(
            f"{name}: the solver returned a point that is not a solution: the norm of the residual is {worst:.3e}, "
            f"above check={check:.3e}, in {int(failed.sum())} of {lanes.numel()} lanes; continue the solver to a "
            "smaller residual, check that it solves the equation of the decorator, or increase check",
            residual=worst,
            check=check,
            failed=int(failed.sum()),
            total=lanes.numel(),
        )


@_modes.one_operation
def root_vjp(
    optimality_fn: UserFunction, sol: Tree, args: tuple[Tree, ...], cotangent: Tree, solve: Solve | None = None
) -> tuple[Tree, ...]:
    r"""The vector-Jacobian product of a root: ``theta_bar = -(dF/dtheta)^H u`` with ``A^H u = cotangent``, ``A =
    dF/dx``, at a given solution.

    For a solution that is already known; use `custom_root` for a solver. The result is differentiable in `sol`, `args`
    and `cotangent` as independent variables, and composes with every transform of torch.func.

    Args:
        optimality_fn: ``F(x, *args)``, as in `custom_root`.
        sol: the ``x`` with ``F(x, *args) = 0``, a pytree.
        args: the other arguments of ``F``, a tuple of pytrees.
        cotangent: a tree like `sol`.
        solve: as in `custom_root`.

    Returns:
        A tuple of trees like `args`, with None for leaves other than floating-point and complex tensors.

    Raises:
        ValueError: if `cotangent`, or the result of ``F``, is not a tree like `sol`.
        LinearSolveError: if the linear solve fails.

    Example:
        >>> import torch
        >>> from implicitdiff import root_vjp
        >>> root_vjp(lambda x, theta: x**3 - theta, torch.tensor(2.0), (torch.tensor(8.0),), torch.tensor(1.0))
        (tensor(0.0833),)
    """
    refuse_valueless("root_vjp", pytree.tensors((sol, args)))
    args = _as_tuple("root_vjp", "args", args)
    root = root_at(
        f"root_vjp: {name_of(optimality_fn)}", optimality_fn, root_form, solve or solve_auto(), sol, args, {}
    )
    check_like("root_vjp: cotangent", cotangent, sol, root.x, root.structure, "sol")
    given, structure = pytree.flatten(args)
    # `root.theta` begins with the tensors of `args`, and captured tensors follow: positions in `args` count for both.
    wanted = [i for i, t in enumerate(given) if is_continuous(t)]
    x_bar = root.structure.tensors_of(cotangent)
    problem = root.problem()
    with one_derivative():
        grads = problem.vjp(root.x, root.theta, x_bar, wanted) if wanted else {}
    return tuple(structure.fill(grads))


@_modes.one_operation
def root_jvp(
    optimality_fn: UserFunction,
    sol: Tree,
    args: tuple[Tree, ...],
    tangents: tuple[Tree, ...],
    solve: Solve | None = None,
) -> Tree:
    r"""The Jacobian-vector product of a root: the ``t`` with ``A t = -(dF/dtheta) tangents``, ``A = dF/dx``, at a
    given solution.

    For a solution that is already known; use `custom_root` for a solver. The result is differentiable, as for
    `root_vjp`.

    Args:
        optimality_fn: ``F(x, *args)``, as in `custom_root`.
        sol: the ``x`` with ``F(x, *args) = 0``, a pytree.
        args: the other arguments of ``F``, a tuple of pytrees.
        tangents: a tuple of trees like `args`; None for a tensor, or for a whole argument, means zero.
        solve: as in `custom_root`.

    Returns:
        A tree like `sol`.

    Raises:
        ValueError: if `tangents` do not match `args`, or if the result of ``F`` is not a tree like `sol`.
        LinearSolveError: if the linear solve fails.

    Example:
        >>> import torch
        >>> from implicitdiff import root_jvp
        >>> root_jvp(lambda x, theta: x**3 - theta, torch.tensor(2.0), (torch.tensor(8.0),), (torch.tensor(1.0),))
        tensor(0.0833)
    """
    args = _as_tuple("root_jvp", "args", args)
    given = _tangents(args, _as_tuple("root_jvp", "tangents", tangents))
    refuse_valueless("root_jvp", pytree.tensors((sol, args)))
    root = root_at(
        f"root_jvp: {name_of(optimality_fn)}", optimality_fn, root_form, solve or solve_auto(), sol, args, {}
    )
    if not given:
        return root.structure.unflatten([torch.zeros_like(t) for t in root.x])
    problem = root.problem()
    with one_derivative():
        return root.structure.unflatten(problem.jvp(root.x, root.theta, given))


def _tangents(args: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> dict[int, torch.Tensor]:
    """Return the tangents by position among the tensors of `args`; raise if the trees do not match."""
    if len(tangents) != len(args):
        raise ValueError(
            f"root_jvp: tangents must be a tuple like args, of length {len(args)}, got length {len(tangents)}"
        )
    given: dict[int, torch.Tensor] = {}
    first = 0  # the position of the argument's first tensor among all tensors
    for i, (arg, tangent) in enumerate(zip(args, tangents, strict=True)):
        leaves, structure = pytree.flatten(arg)
        try:
            found = {} if tangent is None else structure.positions_of(tangent)
            if any((t.shape, t.dtype) != (leaves[k].shape, leaves[k].dtype) for k, t in found.items()):
                raise ValueError("a tensor has another shape or dtype")
        except ValueError:
            raise ValueError(
                f"root_jvp: tangents[{i}] must be a tree like args[{i}] or None: "
                f"expected {pytree.describe(arg)}, got {pytree.describe(tangent)}"
            ) from None
        given |= {first + k: t for k, t in found.items()}
        first += len(leaves)
    return given


def _as_tuple(maker: str, what: str, value: object) -> tuple[Tree, ...]:
    if not isinstance(value, tuple):
        raise TypeError(
            f"{maker}: {what} must be a tuple, one entry for each argument after the first, got {type(value).__name__}"
        )
    return value
