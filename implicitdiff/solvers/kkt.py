"""The Karush-Kuhn-Tucker conditions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

import implicitdiff._torch.trees as pytree
from implicitdiff._closures.evaluation import gradient
from implicitdiff._closures.signature import name_of
from implicitdiff._implicit.checks import check_like
from implicitdiff._torch.trees import Leaves, Tree


class KKTSolution(NamedTuple):
    """A point with its multipliers.

    Attributes:
        primal: the minimiser, a tree.
        dual_eq: the multipliers of the equalities, a tree like ``eq_fn(primal)``. Without equalities None, or empty
            tensors, which unlike None can leave a vmap.
        dual_ineq: the multipliers of the inequalities, nonnegative at a solution, a tree like ``ineq_fn(primal)``;
            likewise.
    """

    primal: Tree
    dual_eq: Tree = None
    dual_ineq: Tree = None


def make_kkt_optimality_fn(
    objective_fn: Callable[..., Tensor],
    eq_fn: Callable[..., Tree] | None = None,
    ineq_fn: Callable[..., Tree] | None = None,
) -> Callable[..., KKTSolution]:
    r"""Make the optimality conditions of a constrained problem, for `implicitdiff.custom_root`.

    A minimiser of ``f(x)`` subject to ``h(x) = 0`` and ``g(x) <= 0`` has, with multipliers ``nu`` and ``lambda``::

        grad f(x) + (dh/dx)' nu + (dg/dx)' lambda = 0,    h(x) = 0,    lambda g(x) = 0,

    The inequalities ``g(x) <= 0`` and ``lambda >= 0`` are the solver's responsibility. Applied to any solver that
    returns a `KKTSolution`, `custom_root` gives the primal and the multipliers their derivatives. The equations
    determine the derivatives if the active constraints are linearly independent with nonzero multipliers, and the
    Lagrangian is strictly convex on their tangent space. Otherwise the Jacobian is singular and raises
    `LinearSolveError`; ``custom_root(..., solve=solve_lstsq())`` gives the derivative of least norm instead.

    Args:
        objective_fn: ``f(x, params_obj)``, one real number; x is a tree of real tensors.
        eq_fn: ``h(x, params_eq)``, a tree of tensors, or None.
        ineq_fn: ``g(x, params_ineq)``, a tree of tensors, or None.

    Returns:
        ``optimality_fn(params, params_obj=None, params_eq=None, params_ineq=None)``, a `KKTSolution` like its first
        argument, zero at a solution. Parameters of None are omitted from the call, so functions of ``x`` alone, with
        captured parameters, are allowed.

    Raises:
        TypeError: a function is not callable.
        ValueError: when called: multipliers without constraints, constraints without multipliers, or multipliers that
            are not a tree like the constraints.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2nd ed., section 12.3; Blondel et al., "Efficient and Modular
        Implicit Differentiation", NeurIPS 2022, section 2.2.

    Example:
        >>> import torch
        >>> from implicitdiff import custom_root
        >>> from implicitdiff.solvers import KKTSolution, make_kkt_optimality_fn
        >>> optimality_fn = make_kkt_optimality_fn(lambda x, c: ((x - c) ** 2).sum(), ineq_fn=lambda x: x.sum() - 1)
        >>> @custom_root(optimality_fn)
        ... def nearest(init, params_obj):  # in the half space sum(x) <= 1
        ...     excess = (params_obj.sum() - 1).clamp(min=0) / params_obj.numel()
        ...     return KKTSolution(params_obj - excess, dual_ineq=2 * excess)
        >>> torch.func.jacrev(lambda c: nearest(None, c).primal)(torch.tensor([1.0, 2.0]))
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    for name, fn in {"objective_fn": objective_fn, "eq_fn": eq_fn, "ineq_fn": ineq_fn}.items():
        if not callable(fn) and (fn is not None or name == "objective_fn"):
            raise TypeError(f"make_kkt_optimality_fn: {name} must be a function of (x, params), got {fn!r}")
    return partial(_optimality, objective_fn, eq_fn, ineq_fn)


def _optimality(
    objective_fn: Callable[..., Tensor],
    eq_fn: Callable[..., Tree] | None,
    ineq_fn: Callable[..., Tree] | None,
    params: KKTSolution,
    params_obj: Tree = None,
    params_eq: Tree = None,
    params_ineq: Tree = None,
) -> KKTSolution:
    primal, dual_eq, dual_ineq = params
    h = _constraint(eq_fn, primal, params_eq, dual_eq, "dual_eq")
    g = _constraint(ineq_fn, primal, params_ineq, dual_ineq, "dual_ineq")

    # ``f(x) + nu'h(x) + lambda'g(x)`` with fixed multipliers: a single gradient gives the first condition.
    def lagrangian(x: Tree) -> Tensor:
        value: Tensor = _call_with_params(objective_fn, x, params_obj)
        for term in _inner_products(dual_eq, eq_fn, x, params_eq) + _inner_products(dual_ineq, ineq_fn, x, params_ineq):
            value = value + term
        return value

    leaves, structure = pytree.flatten(g)
    # ``lambda_i g_i(x) = 0`` for each constraint. A row has the derivative ``g_i dlambda_i + lambda_i dg_i = 0``. An
    # inactive constraint gives ``dlambda_i = 0``, a multiplier ``lambda_i > 0`` gives ``dg_i = 0``, and
    # ``g_i = lambda_i = 0`` makes the system singular.
    complementarity = [d * v for d, v in zip(structure.tensors_of(dual_ineq), leaves, strict=True)]
    return KKTSolution(gradient(lagrangian, primal), h, structure.unflatten(complementarity))


def _call_with_params(fn: Callable[..., Tree], x: Tree, params: Tree) -> Tree:
    return fn(x) if params is None else fn(x, params)


def _constraint(fn: Callable[..., Tree] | None, x: Tree, params: Tree, dual: Tree, name: str) -> Tree:
    """Return the values of a constraint function after a comparison with the multipliers."""
    # Empty tensors are the multipliers of absent constraints, see `KKTSolution`.
    if fn is None and not any(t.numel() for t in pytree.tensors(dual)):
        return dual
    if fn is None or dual is None:
        what = "must be None without a function of constraints" if fn is None else "must not be None"
        raise ValueError(f"make_kkt_optimality_fn: {name} {what}, got {pytree.describe(dual)}")
    # Compare with the multipliers: another structure would pair wrong entries.
    values = _call_with_params(fn, x, params)
    leaves, structure = pytree.flatten(dual)
    check_like(f"make_kkt_optimality_fn: {name_of(fn)}'s result", values, dual, leaves, structure, name)
    return values


def _inner_products(dual: Tree, fn: Callable[..., Tree] | None, x: Tree, params: Tree) -> Leaves:
    """Return the terms of the inner product ``dual' fn(x)``, one for each leaf."""
    if fn is None:
        return []
    leaves, structure = pytree.flatten(_call_with_params(fn, x, params))
    return [(d * v).sum() for d, v in zip(structure.tensors_of(dual), leaves, strict=True)]
