"""Right sides, exact inverses and transforms for the tests of linear solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as torch_pytree

from implicitdiff.errors import LinearSolveError
from implicitdiff.linear_solve import LinearSolver
from tables.linear_solvers import CONDITION, F64, SOLVERS, Row, accepts

BY_NAME = {row.name: row for row in SOLVERS}


def rows(*options: str, iterative: bool | None = None) -> pytest.MarkDecorator:
    chosen = [r for r in SOLVERS if iterative in (None, r.iterative) and accepts(r, *options)]
    return pytest.mark.parametrize("row", chosen, ids=str)


def tolerance(row: Row, dtype: torch.dtype = F64, condition: float = CONDITION) -> float:
    """Of the relative error, which is at most the condition times the relative residual."""
    eps = torch.finfo(dtype).eps
    return condition * (eps ** (2 / 3) if row.iterative else 100 * eps)


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float(torch.linalg.vector_norm(x - reference) / torch.linalg.vector_norm(reference))


def times(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: a @ v


class Counted:
    """A function that counts its calls."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, v):
        self.calls += 1
        return self.fn(v)


LOOK = 4
"""A solver runs a function that it is given once to see what it captures, and three times to see that it is linear."""
CHECK = 1
"""It computes the true residual in the end."""

LANES = pytest.mark.parametrize("lanes", [1, 3])


def solve_beside(lanes: int, solver: LinearSolver, matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """The solution alone, or that of the first of several lanes, for which an iteration has another arithmetic."""
    if lanes == 1:
        return solver(matvec, b)
    return vmap(lambda b: solver(matvec, b))(torch.stack([b.roll(i) for i in range(lanes)]))[0]


TREE_SHAPES = {"scalar": (), "matrix": (2, 3), "vector": (4,), "nothing": (0, 2), "one": (1,)}
TREE_SIZE = 12


def tree_of(row: Tensor, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    parts = row.split([int(np.prod(s)) for s in TREE_SHAPES.values()])
    return {k: p.reshape(s).to(dtypes[k]) for (k, s), p in zip(TREE_SHAPES.items(), parts, strict=True)}


def row_of(tree: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tree[k].reshape(-1).to(dtype) for k in TREE_SHAPES])


def on_trees(a: Tensor, dtypes: dict[str, torch.dtype]) -> Callable:
    return lambda v: tree_of(a @ row_of(v, a.dtype), dtypes)


def distinct(k: int, n: int) -> Tensor:
    return torch.linspace(1.0, CONDITION, k, dtype=F64).repeat(n // k + 1)[:n]


def cubed(f: Callable) -> Callable:
    return lambda theta, b: (f(theta, b) ** 3).sum()


def along(f: Callable) -> Callable:
    """On a curve through the parameters."""
    return lambda s, theta, b: cubed(f)(theta + s * theta.sin(), b + s * b.cos())


def lanes(t: Tensor, count: int = 2) -> Tensor:
    return torch.stack([t * (1 - 0.3 * i) for i in range(count)])


ARGS = (0, 1)
TRANSFORMS = {
    "value": lambda f, th, b: f(th, b),
    "grad": lambda f, th, b: grad(cubed(f), ARGS)(th, b),
    "jacrev": lambda f, th, b: jacrev(f, ARGS)(th, b),
    "jacfwd": lambda f, th, b: jacfwd(f, ARGS)(th, b),
    "jvp": lambda f, th, b: jvp(f, (th, b), (th.sin(), b.cos())),
    "hessian": lambda f, th, b: hessian(cubed(f), ARGS)(th, b),
    "jacrev of jacrev": lambda f, th, b: jacrev(jacrev(f, ARGS), ARGS)(th, b),
    "jacfwd of jacrev": lambda f, th, b: jacfwd(jacrev(f, ARGS), ARGS)(th, b),
    "jacrev of jacfwd": lambda f, th, b: jacrev(jacfwd(f, ARGS), ARGS)(th, b),
    "jacfwd of jacfwd": lambda f, th, b: jacfwd(jacfwd(f, ARGS), ARGS)(th, b),
    "three times reverse": lambda f, th, b: grad(grad(grad(along(f))))(th[0, 0] / 9, th, b),
    "three times forward": lambda f, th, b: jacfwd(jacfwd(jacfwd(along(f))))(th[0, 0] / 9, th, b),
    "grad of jvp": lambda f, th, b: grad(lambda th: jvp(f, (th, b), (th.sin(), b))[1].sum())(th),
    "vmap": lambda f, th, b: vmap(f)(lanes(th), lanes(b)),
    "vmap over b": lambda f, th, b: vmap(f, (None, 0))(th, lanes(b)),
    "vmap over the matrix": lambda f, th, b: vmap(f, (0, None))(lanes(th), b),
    "vmap of vmap": lambda f, th, b: vmap(vmap(f, (None, 0)), (0, None))(lanes(th), lanes(b, 3)),
    "vmap of vmap, the other way": lambda f, th, b: vmap(vmap(f, (0, None)), (None, 0))(lanes(th), lanes(b, 3)),
    "vmap along other dimensions": lambda f, th, b: vmap(f, (2, 1), 1)(lanes(th).movedim(0, 2), lanes(b).T),
    "vmap of grad": lambda f, th, b: vmap(grad(cubed(f), ARGS))(lanes(th), lanes(b)),
    "vmap of hessian": lambda f, th, b: vmap(hessian(cubed(f), ARGS))(lanes(th), lanes(b)),
    "vmap of jvp": lambda f, th, b: vmap(lambda t: jvp(f, (th, b), (t, b)))(lanes(th)),
    "jvp of vmap": lambda f, th, b: jvp(vmap(f, (None, 0)), (th, lanes(b)), (th.sin(), lanes(b).cos())),
    "grad of vmap": lambda f, th, b: grad(lambda *p: (vmap(f)(*p) ** 3).sum(), ARGS)(lanes(th), lanes(b)),
    "hessian of vmap of vmap": lambda f, th, b: hessian(
        lambda *p: (vmap(vmap(f, (None, 0)), (0, None))(*p) ** 3).sum(), ARGS
    )(lanes(th), lanes(b)),
}


def assert_same(result, reference, allowed: float) -> None:
    """Two trees are equal to `allowed`, relative to the size of each leaf."""
    for x, y in zip(torch_pytree.tree_leaves(result), torch_pytree.tree_leaves(reference), strict=True):
        assert x.shape == y.shape
        assert float((x - y).abs().max()) <= allowed * (float(y.abs().max()) + 1e-12)


DERIVATIVE = 1e-8
"""Three differentiations, each a solve with a residual of 4e-11, of matrices whose condition is 10."""

NAN = float("nan")
ONES = torch.ones(3, dtype=F64)


def failure_of(call: Callable) -> LinearSolveError:
    with pytest.raises(LinearSolveError) as caught:
        call()
    return caught.value


def name_of(factory: Callable) -> str:
    return factory.func.__name__ if isinstance(factory, functools.partial) else factory.__name__


WRONG_RESULTS = {
    "shape": lambda v: v[:2],
    "dtype": lambda v: v.float(),
    "structure": lambda v: (v,),
    "None": lambda v: None,
    "number": lambda v: 1.0,
}


def user_matrix(theta: Tensor) -> Tensor:
    return 2 * torch.eye(3, dtype=theta.dtype) + theta @ theta.mT


def condition(x: Tensor, theta: Tensor, b: Tensor) -> Tensor:
    return user_matrix(theta) @ x + 0.1 * x**3 - b
