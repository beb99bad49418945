"""The equations that the families of solvers solve, each on trees (for derivatives) and on rows (for iterations)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import gradient, pullback
from implicitdiff._closures.signature import name_of
from implicitdiff._implicit.checks import check_leaves, check_like
from implicitdiff._torch.modes import no_modes
from implicitdiff._torch.trees import Tree
from implicitdiff.projections._boxes import box
from implicitdiff.solvers._loop.bounds import Bound
from implicitdiff.solvers._loop.losses import Loss, relative_squares
from implicitdiff.solvers._loop.problem import BatchedProblem

Functions = Mapping[str, Callable[..., Tree]]
RowResidual = Callable[[BatchedProblem, Tensor], Tensor]
"""``residual(problem, x)``, shape ``(lanes, n)``."""
ProxResidual = Callable[[BatchedProblem, Tensor, Tensor], Tensor]
"""``prox_residual(problem, x, gradient)``, zero at a solution under constraints or with a penalty."""


class Equation(NamedTuple):
    """An equation ``residual(x) = 0`` with the user's functions.

    Attributes:
        functions: the user's functions by name, each as ``function(x, args, *more)``, with checks of the results.
        on_trees: ``on_trees(functions, x, args)``, the residual as a tree like ``x``.
        on_rows: ``on_rows(problem, x)``, the residual as rows.
    """

    functions: Functions
    on_trees: Callable[[Functions, Tree, tuple[Tree, ...]], Tree]
    on_rows: RowResidual


EquationOf = Callable[..., Equation]
"""``equation_of(*functions)`` makes the equation of the user's functions."""


@dataclass(frozen=True)
class Composite:
    """The residual ``prox_residual(problem, x, gradient(problem, x))`` on rows."""

    gradient: RowResidual
    prox_residual: ProxResidual

    def __call__(self, problem: BatchedProblem, x: Tensor) -> Tensor:
        return self.prox_residual(problem, x, self.gradient(problem, x))


def fixed_point_equation(fn: Callable[..., Tree]) -> Equation:
    """Return the equation ``x - fn(x, *args) = 0``."""
    # The order of the difference makes the Jacobian ``I - J``, positive definite for a symmetric contraction.
    return Equation(
        {"fn": returning_like_x(fn)},
        lambda functions, x, args: subtract(x, functions["fn"](x, args)),
        lambda problem, x: x - problem.fn(x),
    )


def root_equation(fn: Callable[..., Tree]) -> Equation:
    """Return the equation ``fn(x, *args) = 0``, as many equations as unknowns."""
    return Equation(
        {"fn": returning_like_x(fn)},
        lambda functions, x, args: functions["fn"](x, args),
        lambda problem, x: problem.fn(x),
    )


def stationary_equation(fn: Callable[..., Tensor]) -> Equation:
    """Return the equation ``grad fn(x, *args) = 0``."""
    return Equation(
        {"fn": returning_scalar(fn)},
        lambda functions, x, args: gradient(functions["fn"], x, args),
        _gradient_on_rows,
    )


def _gradient_on_rows(problem: BatchedProblem, x: Tensor) -> Tensor:
    value, grad = problem.fn.value_and_grad(x)
    return _where_finite(value[:, None], grad)


def _where_finite(value: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient, with nan in lanes with a value that is not finite."""
    # The gradient alone may be finite and zero: that of a sum with an infinite constant term, say.
    return torch.where(torch.isfinite(value).all(dim=-1, keepdim=True), gradient, torch.nan)


def least_squares_equation(fn: Callable[..., Tree]) -> Equation:
    """Return the equation ``J' r = 0`` for ``r = fn(x, *args)``, the gradient of ``|r|^2 / 2``."""

    def on_trees(functions: Functions, x: Tree, args: tuple[Tree, ...]) -> Tree:
        residuals, pull = pullback(functions["fn"], x, args)
        return pull(residuals)

    def on_rows(problem: BatchedProblem, x: Tensor) -> Tensor:
        residuals, pull = problem.fn.pull(x)
        return _where_finite(residuals, pull(residuals))

    return Equation({"fn": returning_tensors(fn)}, on_trees, on_rows)


def robust_equation(fn: Callable[..., Tree], loss: Loss, scale: float | Tensor) -> Equation:
    """Return the equation ``J' (rho'(z) r) = 0`` for ``r = fn(x, *args)``, ``z = (r / scale)^2``.

    The left side is the gradient of ``sum_i scale^2 rho(z_i) / 2``. The additional function "loss" returns, for every
    residual, the term of the sum, the weight ``rho'`` of the gradient, and the weight ``rho' + 2 z rho''`` of the
    Hessian.
    """
    checked = returning_tensors(fn)

    def weighted(r: Tensor) -> Tensor:
        return loss.first(relative_squares(r, scale)[0]) * r

    def losses(x: Tree, args: tuple[Tree, ...]) -> list[Tensor]:
        residuals = pytree.tensors(checked(x, args))
        squares, units = zip(*(relative_squares(r, scale) for r in residuals), strict=True)
        # Derivatives of ``s^2 rho(r^2 / s^2) / 2``: ``rho' r`` in ``r``, then ``rho' + 2 z rho''``.
        first = [loss.first(z) for z in squares]
        return [
            *(0.5 * unit**2 * loss.rho(z) for z, unit in zip(squares, units, strict=True)),
            *first,
            *(slope + 2 * z * loss.second(z) for z, slope in zip(squares, first, strict=True)),
        ]

    def on_trees(functions: Functions, x: Tree, args: tuple[Tree, ...]) -> Tree:
        residuals, pull = pullback(functions["fn"], x, args)
        # By the chain rule: the pullback of the cost's derivative in ``r``.
        return pull([weighted(r) for r in residuals])

    def on_rows(problem: BatchedProblem, x: Tensor) -> Tensor:
        residuals, pull = problem.fn.pull(x)
        _, first, _ = problem.function("loss")(x).chunk(3, dim=-1)
        return _where_finite(residuals, pull(first * residuals))

    return Equation({"fn": checked, "loss": losses}, on_trees, on_rows)


def proximal_equation(fn: Callable[..., Tree], prox: Callable[..., Tree]) -> Equation:
    """Return the equation ``x - prox(x - grad fn(x, *args), 1) = 0``."""
    checked = returning_like_x(prox)
    smooth = stationary_equation(fn)

    def on_trees(functions: Functions, x: Tree, args: tuple[Tree, ...]) -> Tree:
        ahead = subtract(x, smooth.on_trees(functions, x, args))
        return subtract(x, functions["prox"](ahead, args, 1.0))

    # For a convex penalty the solutions are the same for every step size > 0: points with ``-grad f`` in the
    # subdifferential of the penalty.
    def prox_residual(problem: BatchedProblem, x: Tensor, grad: Tensor) -> Tensor:
        return x - problem.function("prox")(x - grad, x.new_ones(x.shape[:1]))

    # The step size is 1 in the residual, and one number for each lane in an iteration.
    functions = {**smooth.functions, "prox": lambda v, args, stepsize=1.0: checked(v, (stepsize,))}
    return Equation(functions, on_trees, Composite(smooth.on_rows, prox_residual))


def projected_equation(fn: Callable[..., Tree], projection: Callable[..., Tree]) -> Equation:
    """Return the equation ``x - projection(x - grad fn(x, *args)) = 0``."""
    checked = returning_like_x(projection)
    smooth = proximal_equation(fn, projection)
    return smooth._replace(functions={**smooth.functions, "prox": lambda v, args, stepsize=1.0: checked(v, ())})


def boxed_equation(smooth: Equation, lower: Bound, upper: Bound) -> Equation:
    """Return the equation ``x - clip(x - g(x), lower, upper) = 0``, given the equation ``g(x) = 0`` of a gradient
    ``g``."""

    def on_trees(functions: Functions, x: Tree, args: tuple[Tree, ...]) -> Tree:
        return subtract(x, functions["box"](subtract(x, smooth.on_trees(functions, x, args)), args))

    def prox_residual(problem: BatchedProblem, x: Tensor, grad: Tensor) -> Tensor:
        ahead = x - grad
        clipped = problem.function("box")(ahead)
        # Inside the box return the gradient itself: ``x - (x - g)`` loses a gradient smaller than the rounding of
        # ``x``.
        return torch.where(clipped == ahead, grad, x - clipped)

    functions = {**smooth.functions, "box": lambda v, args: _into_box(v, lower, upper)}
    return Equation(functions, on_trees, Composite(smooth.on_rows, prox_residual))


def boxed_by(fn: Callable[..., Tree], smooth_of: EquationOf, limits: tuple[Bound, Bound]) -> Equation:
    """Return the `boxed_equation` of the equation ``smooth_of(fn)``; with the other arguments bound by
    `functools.partial` an `EquationOf` that pickles."""
    return boxed_equation(smooth_of(fn), *limits)


def _into_box(v: Tree, lower: Bound, upper: Bound) -> Tree:
    """Project the tensors of a tree onto the box; other leaves stay as they are."""
    _, structure = pytree.flatten(v)
    # `box` takes trees of tensors: None in the place of other leaves.
    tensors_alone = pytree.map_leaves(lambda leaf: leaf if isinstance(leaf, Tensor) else None, v)
    return structure.unflatten(pytree.tensors(box(tensors_alone, lower, upper)))


def subtract(a: Tree, b: Tree) -> Tree:
    """Return ``a - b``, tensor by tensor."""
    leaves, structure = pytree.flatten(a)
    return structure.unflatten([p - q for p, q in zip(leaves, structure.tensors_of(b), strict=True)])


def returning_like_x(fn: Callable[..., Tree]) -> Callable[..., Tree]:
    """Return ``checked(x, args)``, equal to ``fn(x, *args)``; raise unless the result is a tree like ``x``."""

    def checked(x: Tree, args: tuple[Tree, ...]) -> Tree:
        result = fn(x, *args)
        # Fast path for a single tensor: `check_like` flattens both trees.
        if not (isinstance(result, Tensor) and isinstance(x, Tensor) and _are_alike(result, x)):
            leaves, structure = pytree.flatten(x)
            check_like(f"{name_of(fn)}'s result", result, x, leaves, structure, "its first argument")
        return result

    return checked


def _are_alike(a: Tensor, b: Tensor) -> bool:
    # Outside of modes, since the handler of a mode takes longer than the question.
    with no_modes():
        return a.shape == b.shape and a.dtype == b.dtype


def returning_scalar(fn: Callable[..., Tensor]) -> Callable[..., Tree]:
    """Return ``checked(x, args)``, equal to ``fn(x, *args)``; raise ValueError unless the result is a single real
    number."""

    def checked(x: Tree, args: tuple[Tree, ...]) -> Tree:
        value = fn(x, *args)
        with no_modes():
            is_number = isinstance(value, Tensor) and value.shape == () and value.is_floating_point()
        if not is_number:
            hint = "; pass the objective itself, not its gradient" if pytree.tensors(value) else ""
            raise ValueError(
                f"{name_of(fn)} must return one real number, a floating-point tensor of shape (), got "
                f"{pytree.describe(value)}{hint}"
            )
        return value

    return checked


def returning_tensors(fn: Callable[..., Tree]) -> Callable[..., Tree]:
    """Return ``checked(x, args)``, equal to ``fn(x, *args)``; raise unless the result is a tree of tensors."""

    def checked(x: Tree, args: tuple[Tree, ...]) -> Tree:
        result = fn(x, *args)
        check_leaves(f"{name_of(fn)}'s result", pytree.tensors(result))
        return result

    return checked
