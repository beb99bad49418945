"""The Jacobi preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Tree


def jacobi_preconditioner(matvec: Callable[[Tree], Tree], like: Tree) -> Callable[[Tree], Tree]:
    """Make the preconditioner ``r -> r / diag(A)`` from the products with ``A``.

    Costs ``n`` products for ``n`` elements of `like` over all leaves, so share it between many solves. Elements with a
    zero on the diagonal are not scaled. Every function ``r -> M^-1 r`` over trees like ``b`` can be a preconditioner.

    Args:
        matvec: the operator, a function over trees like `like`.
        like: a tree of tensors with shapes, dtypes and devices of the right-hand side.

    Returns:
        A function over trees like `like`, with a detached diagonal: a preconditioner does not move the solution.

    Example:
        >>> import torch
        >>> from implicitdiff.linear_solve import jacobi_preconditioner, solve_cg
        >>> A = torch.tensor([[100.0, 1.0], [1.0, 1.0]])
        >>> M = jacobi_preconditioner(lambda v: A @ v, torch.zeros(2))
        >>> M(torch.ones(2))
        tensor([0.0100, 1.0000])
        >>> solve_cg(preconditioner=M)(lambda v: A @ v, torch.tensor([101.0, 2.0])).round(decimals=4)
        tensor([1., 1.])
    """
    leaves, structure = pytree.flatten(like)

    def entries(i: int) -> torch.Tensor:
        def entry(unit: torch.Tensor) -> torch.Tensor:
            # e' A e for a unit vector e of leaf i.
            v = [torch.zeros_like(t) for t in leaves]
            v[i] = unit.reshape(leaves[i].shape)
            return (structure.tensors_of(matvec(structure.unflatten(v)))[i].reshape(-1) * unit).sum()

        # torch.func.vmap raises for a batch of size 0.
        n = leaves[i].numel()
        if n == 0:
            return leaves[i]
        # All products of a leaf in one batch: `matvec` runs once.
        return torch.func.vmap(entry)(torch.eye(n, dtype=leaves[i].dtype, device=leaves[i].device)).reshape(
            leaves[i].shape
        )

    diagonal = [entries(i).detach() for i in range(len(leaves))]
    # The diagonal is detached, so the masked ``1 / 0`` meets no derivative.
    inverse = [torch.where(d == 0, 1.0, 1.0 / d) for d in diagonal]
    return partial(_times_diagonal, structure.unflatten(inverse))


def _times_diagonal(factors: Tree, r: Tree) -> Tree:
    leaves, structure = pytree.flatten(factors)
    return structure.unflatten([t * d for t, d in zip(structure.tensors_of(r), leaves, strict=True)])
