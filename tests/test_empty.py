"""No lanes, no unknowns, and trees with None and strings: every solver and every derivative gives what torch gives for
a function of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tables.solvers as searches
import torch
from checks.compiled import needs_cpu
from tables.linear_solvers import SOLVERS
from tables.optimizers import ROWS as OPTIMIZERS
from tables.solvers import SEARCHES
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitdiff.projections as projections
import implicitdiff.prox as prox
from implicitdiff import custom_fixed_point, custom_root, root_jvp, root_vjp, unroll
from implicitdiff.linear_solve import solve_cg
from implicitdiff.solvers import KKTSolution, make_kkt_optimality_fn, qp

F64 = torch.float64
Solution = Callable[[Tensor], Tensor]

# --- what a solution is asked for, of vectors of 3 in no lanes, and of vectors of 0 -----------------------------------


def summed(solution: Solution) -> Solution:
    return lambda t: solution(t).sum()


def by_autograd(solution: Solution, theta: Tensor, scale: bool = False) -> Tensor:
    s = torch.ones(() if scale else theta.shape, dtype=F64, requires_grad=True)
    return torch.autograd.grad(solution(theta * s).sum(), s)[0]


NO_LANES = torch.zeros(0, 3, dtype=F64)
WITHOUT_LANES: dict[str, Callable[[Solution], Any]] = {
    "forward": lambda f: vmap(f)(NO_LANES),
    "inner vmap": lambda f: vmap(vmap(f))(torch.zeros(2, 0, 3, dtype=F64)),
    "outer vmap": lambda f: vmap(vmap(f))(torch.zeros(0, 2, 3, dtype=F64)),
    "vmap of grad": lambda f: vmap(grad(summed(f)))(NO_LANES),
    "grad of vmap": lambda f: grad(summed(vmap(f)))(NO_LANES),
    "grad, shared": lambda f: grad(lambda s: vmap(lambda t: f(t + s))(NO_LANES).sum())(torch.ones(3, dtype=F64)),
    "backward": lambda f: by_autograd(vmap(f), NO_LANES),
    "jvp": lambda f: jvp(vmap(f), (NO_LANES,), (NO_LANES,)),
    "jacrev": lambda f: jacrev(vmap(f))(NO_LANES),
    "vmap of jacrev": lambda f: vmap(jacrev(f))(NO_LANES),
    "vmap of jacfwd": lambda f: vmap(jacfwd(f))(NO_LANES),
    "vmap of hessian": lambda f: vmap(hessian(summed(f)))(NO_LANES),
    "vmap of grad of grad": lambda f: vmap(grad(summed(grad(summed(f)))))(NO_LANES),
}
NOTHING = torch.zeros(0, dtype=F64)
WITHOUT_UNKNOWNS: dict[str, Callable[[Solution], Any]] = {
    "forward": lambda f: f(NOTHING),
    "vmap": lambda f: vmap(f)(torch.zeros(2, 0, dtype=F64)),
    "no lanes either": lambda f: vmap(f)(torch.zeros(0, 0, dtype=F64)),
    "grad": lambda f: grad(summed(f))(NOTHING),
    "backward": lambda f: by_autograd(f, NOTHING),
    "backward, to a number": lambda f: by_autograd(f, NOTHING, scale=True),
    "jvp": lambda f: jvp(f, (NOTHING,), (NOTHING,)),
    "jacrev": lambda f: jacrev(f)(NOTHING),
    "jacfwd": lambda f: jacfwd(f)(NOTHING),
    "hessian": lambda f: hessian(summed(f))(NOTHING),
    "hessian, of a number": lambda f: hessian(lambda s: f(NOTHING * s).sum())(torch.ones((), dtype=F64)),
    "grad of grad": lambda f: grad(summed(grad(summed(f))))(NOTHING),
    "vmap of grad": lambda f: vmap(grad(summed(f)))(torch.zeros(2, 0, dtype=F64)),
}

# --- solutions of vectors of any size ---------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "fixed point": (lambda x, t: t / (1 + x**2),),
    "root": (lambda x, t: x**3 + x - t,),
    "root of each entry": (lambda x, t: x**3 + x - t,),
    "minimum": (lambda x, t: (x**4 / 4 + x**2 / 2 - t * x).sum(),),
    "least squares": (lambda x, t: torch.stack([x - t, x**2 / 2**0.5]),),
    "least squares in a box": (lambda x, t: x - t,),
    "least squares with outliers": (lambda x, t: torch.stack([x - t, x**2 / 2**0.5]),),
    "box by bounds": (lambda x, t: (x**4 / 4 + x**2 / 2 - t * x).sum(),),
    "box": (lambda x, t: (x**2 / 2 - t * x).sum(), lambda v: projections.box(v, -5.0, 0.1)),
    "lasso": (lambda x, t: (x**2 / 2 - t * x).sum(), lambda v, s: prox.lasso(v, s, strength=0.25)),
    "simplex": (lambda x, t: (x**2 / 2 - t * x).sum(), projections.simplex),
}


def searched(row: searches.Row, implicit_diff: bool) -> Solution:
    solver = row.solver(*FUNCTIONS[row.family.name][: len(row.family.functions)])
    return lambda t: solver.run(0.25 + 0.0 * t, t, implicit_diff=implicit_diff)[0]


def program(t: Tensor) -> Tensor:
    eye, n = torch.eye(t.shape[0], dtype=F64), min(1, t.shape[0])
    row = torch.ones(n, t.shape[0], dtype=F64), torch.ones(n, dtype=F64)
    return qp().run(None, eye, t, *row, eye, torch.ones_like(t))[0].primal


def kkt_point(t: Tensor) -> Tensor:
    condition = make_kkt_optimality_fn(lambda x, t: (x**2 / 2 - t * x).sum(), ineq_fn=lambda x: x - 100)
    solve = custom_root(condition)(lambda init, params_obj: KKTSolution(params_obj.clone(), None, 0.0 * params_obj))
    return solve(None, t).primal  # type: ignore[no-any-return]


def cubic(x: Tensor, t: Tensor) -> Tensor:
    return x**3 + x - t


def copied(init: Any, t: Tensor) -> Tensor:
    return t.clone()


def optimized(transformation: Any, t: Tensor) -> Tensor:
    params = {"a": torch.ones_like(t), "b": torch.ones(2, dtype=F64)}
    init, update = transformation
    state = init(params)
    for _ in range(2):
        updates, state = update({"a": t * params["a"], "b": params["b"]}, state, params)
        params = {k: params[k] + updates[k] for k in params}
    return params["a"]


SOLUTIONS: dict[str, Solution] = {
    **{row.name: searched(row, True) for row in SEARCHES},
    **{f"{row.name}, unrolled": searched(row, False) for row in SEARCHES if row.unrolls},
    **{f"solve_{row.name}": partial(row.factory(), lambda v: 1.5 * v) for row in SOLVERS},
    **{
        f"solve_{row.name}, own matrix": lambda t, row=row: row.factory()(
            lambda v: v * (1.25 + (t * t).sum(0, keepdim=True)), torch.ones_like(t)
        )
        for row in SOLVERS
    },
    **{
        f"solve_{row.name}, beside another leaf": lambda t, row=row: row.factory()(
            lambda v: (v[0], v[1]), (t, torch.ones(2, dtype=F64))
        )[0]
        for row in SOLVERS
    },
    "preconditioned": lambda t: solve_cg(preconditioner=lambda v: v, init=torch.zeros_like(t))(lambda v: v, t),
    "qp": program,
    "kkt": kkt_point,
    "custom_root": partial(custom_root(cubic)(copied), None),
    "custom_root, captured": lambda t: custom_root(lambda x: cubic(x, t))(lambda init: t.clone())(None),
    "custom_root, own solve": partial(custom_root(cubic, solve=lambda matvec, b: b)(copied), None),
    "custom_root, checked": partial(custom_root(lambda x, t: x - t, check=1e-3)(copied), None),
    "custom_root, beside another leaf": lambda t: custom_root(lambda x, t: (cubic(x[0], t), x[1] - 1))(
        lambda init, t: (t.clone(), torch.ones(2, dtype=F64))
    )(None, t)[0],
    "custom_fixed_point": partial(custom_fixed_point(lambda x, t: t / (1 + x**2))(copied), None),
    "root_vjp": lambda t: root_vjp(cubic, t, (t,), t)[0],
    "root_jvp": lambda t: root_jvp(cubic, t, (t,), (t,)),
    "unroll": lambda t: unroll(lambda x, t: x - 0.1 * (x - t), 4)(torch.zeros_like(t), t),
    "unroll, checkpoints": lambda t: unroll(lambda x, t: x - 0.1 * (x - t), 4, 2)(torch.zeros_like(t), t),
}


PROJECTIONS: dict[str, Solution] = {
    "box": lambda t: projections.box(t, -1.0, 1.0),
    "non_negative": projections.non_negative,
    "simplex": projections.simplex,
    "l1_ball": projections.l1_ball,
    "l2_ball": projections.l2_ball,
    "linf_ball": projections.linf_ball,
    "l1_sphere": projections.l1_sphere,
    "l2_sphere": projections.l2_sphere,
    "sparse_simplex": lambda t: projections.sparse_simplex(t, 2),
    "box_section": lambda t: projections.box_section(t, -1.0, 1.0, 1.0, 0.5),
    "isotonic": projections.isotonic,
    "polyhedron": lambda t: projections.polyhedron(t, None, None, torch.eye(len(t), dtype=F64), 1.0),
    "transport": lambda t: projections.transport(t[None], float(len(t)), 1.0)[0],
    "hyperplane": lambda t: projections.hyperplane(t, torch.ones_like(t), 1.0),
    "halfspace": lambda t: projections.halfspace(t, torch.ones_like(t), 1.0),
    "affine_set": lambda t: projections.affine_set(t, torch.ones(min(1, t.shape[0]), t.shape[0], dtype=F64), 1.0),
    "lasso": prox.lasso,
    "ridge": prox.ridge,
    "non_negative_lasso": prox.non_negative_lasso,
    "non_negative_ridge": prox.non_negative_ridge,
    "elastic_net": prox.elastic_net,
    "group_lasso": prox.group_lasso,
}
# No vector without entries has the sum 1, and none is normal to a plane.
NEEDS_ENTRIES = [name for name in SOLUTIONS | PROJECTIONS if "simplex" in name or "sphere" in name] + [
    "hyperplane",
    "halfspace",
    "box_section",
]


def check(solution: Solution, asked: dict[str, Callable[[Solution], Any]]) -> None:
    for name, ask in asked.items():
        torch.testing.assert_close(
            ask(solution), ask(lambda t: t**3 + t), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", SOLUTIONS | PROJECTIONS)
def test_no_lanes_are_solved_for_as_torch_maps_them(name):
    check((SOLUTIONS | PROJECTIONS)[name], WITHOUT_LANES)


@pytest.mark.parametrize("name", [name for name in SOLUTIONS | PROJECTIONS if name not in NEEDS_ENTRIES])
def test_no_unknowns_are_solved_for_as_torch_maps_them(name):
    check((SOLUTIONS | PROJECTIONS)[name], WITHOUT_UNKNOWNS)


@pytest.mark.parametrize("name", NEEDS_ENTRIES)
def test_what_needs_an_entry_says_so(name):
    with pytest.raises(ValueError, match="must"):
        (SOLUTIONS | PROJECTIONS)[name](NOTHING)


@pytest.mark.parametrize("options", [{}, pytest.param({"use_accelerated_op": True}, marks=needs_cpu)], ids=str)
@pytest.mark.parametrize("factory", {row.factory: None for row in OPTIMIZERS}, ids=lambda f: f.__name__)
def test_optimizers_step_where_there_is_nothing(factory, options):
    solution = partial(optimized, factory(lr=0.1, **options))
    check(solution, WITHOUT_LANES)
    check(solution, WITHOUT_UNKNOWNS)


# --- None and strings beside the unknowns -----------------------------------------------------------------------------

THETA = torch.stack([searches.THETA, 1.5 * searches.THETA])


def dressed(x: Tensor) -> dict[str, Any]:
    return {"none": None, "x": x, "name": "a string", "nested": [None, (None,)]}


def in_a_tree(row: searches.Row) -> tuple[Callable[..., Any], ...]:
    """The functions of a row's family, of trees in which the unknowns are one leaf."""
    first, *others = row.family.functions
    on_trees = {
        "minimum": lambda p, t: first(p["x"], t),
        "least squares": lambda p, t: [None, first(p["x"], t)],
    }
    smooth = row.family.name in ("box", "box by bounds", "lasso", "simplex")
    function = on_trees.get("minimum" if smooth else row.family.name, lambda p, t: dressed(first(p["x"], t)))
    return function, *(lambda p, *more, other=other: dressed(other(p["x"], *more)) for other in others)


def searched_in_a_tree(row: searches.Row, how: str) -> Solution:
    solver = row.solver(*in_a_tree(row))

    def solution(t: Tensor) -> Tensor:
        start = dressed(row.family.start(t))
        if how == "optimality_fn":
            return solver.optimality_fn(start, t)["x"]
        if how != "update":
            return solver.run(start, t)[0]["x"]
        return solver.update(start, solver.init(start, t), t)[0]["x"]

    return solution


def bare(row: searches.Row, how: str) -> Solution:
    """The same without a tree."""
    solver = row.solver()

    def solution(t: Tensor) -> Tensor:
        start = row.family.start(t)
        if how == "optimality_fn":
            return solver.optimality_fn(start, t)
        if how != "update":
            return solver.run(start, t)[0]
        return solver.update(start, solver.init(start, t), t)[0]

    return solution


def of_linear(row: Any) -> tuple[Solution, Solution]:
    matrix, solve = row.matrix(3), row.factory()
    return (
        lambda t: solve(lambda v: dressed(matrix @ v["x"]), dressed(torch.sin(t)))["x"],
        lambda t: solve(lambda v: matrix @ v, torch.sin(t)),
    )


def in_tuple(t: Tensor) -> tuple[Tensor, None, str]:
    return t, None, "a string"


HOWS = ("implicit", "update", "optimality_fn")
TREES: dict[str, tuple[Solution, Solution]] = {
    **{
        f"{row.name}, {how}": (searched_in_a_tree(row, how), bare(row, how))
        for row in SEARCHES
        for how in HOWS
        if row.unrolls or how in ("implicit", "optimality_fn")
    },
    **{f"solve_{row.name}": of_linear(row) for row in SOLVERS},
    "preconditioned": (
        lambda t: solve_cg(preconditioner=lambda v: v, init=dressed(0.5 * t))(
            lambda v: dressed(2 * v["x"]), dressed(torch.sin(t))
        )["x"],
        lambda t: torch.sin(t) / 2,
    ),
    "custom_root": (
        lambda t: custom_root(lambda x, t: in_tuple(x[0] - t["a"] ** 2))(lambda init, t: in_tuple(t["a"] ** 2))(
            in_tuple(t), {"a": t, "b": None, "c": "a string"}
        )[0],
        torch.square,
    ),
    "custom_root, own solve": (
        lambda t: custom_root(lambda x, t: in_tuple(x[0] - t**2), solve=lambda matvec, b: matvec(b))(
            lambda init, t: in_tuple(t**2)
        )(None, t)[0],
        torch.square,
    ),
    "custom_fixed_point": (
        lambda t: custom_fixed_point(lambda x, t: in_tuple((x[0] + t**2) / 2))(lambda init, t: in_tuple(t**2))(None, t)[
            0
        ],
        torch.square,
    ),
    "root_vjp": (
        lambda t: root_vjp(lambda x, t: in_tuple(2 * x[0] - t), in_tuple(t / 2), (t,), in_tuple(t))[0],
        lambda t: t / 2,
    ),
    "root_jvp": (
        lambda t: root_jvp(lambda x, t: in_tuple(2 * x[0] - t), in_tuple(t / 2), (t,), (t,))[0],
        lambda t: t / 2,
    ),
    "unroll": (lambda t: unroll(lambda x, t: in_tuple(x[0] * t), 2, 1)(in_tuple(t), t)[0], lambda t: t**3),
    "kkt": (
        lambda t: custom_root(
            make_kkt_optimality_fn(lambda x, t: ((x[0] - t**2) ** 2).sum(), lambda x: [None, x[0][:1]])
        )(lambda init, params_obj: KKTSolution(in_tuple(params_obj**2 * NOT_FIRST), [None, 2 * params_obj[:1] ** 2]))(
            None, t
        ).primal[0],
        lambda t: t**2 * NOT_FIRST,
    ),
}
NOT_FIRST = torch.tensor([0.0, 1.0, 1.0], dtype=F64)
DERIVATIVES: dict[str, Callable[[Solution], Any]] = {
    "vmap": lambda f: vmap(f)(THETA),
    "jacrev": lambda f: jacrev(f)(THETA[0]),
    "jacfwd": lambda f: jacfwd(f)(THETA[0]),
    "hessian": lambda f: hessian(summed(f))(THETA[0]),
    "backward": lambda f: by_autograd(f, THETA[0]),
}


@pytest.mark.parametrize("name", TREES)
def test_none_and_strings_may_stand_beside_the_unknowns(name):
    solution, reference = TREES[name]
    for how, ask in DERIVATIVES.items():
        torch.testing.assert_close(
            ask(solution), ask(reference), rtol=1e-7, atol=1e-9, msg=lambda text, how=how: f"{how}: {text}"
        )
