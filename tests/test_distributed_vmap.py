"""`distributed.vmap` is `torch.func.vmap` with its lanes on several ranks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from checks.ranks import Raised, is_usable, outcome
from checks.tensors import close, draw, number, vector
from checks.traffic import counted
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.func import grad, jacfwd, jacrev, jvp

import implicitdiff as idf
import implicitdiff.distributed as dist
from implicitdiff import ConvergenceError, ConvergenceWarning, custom_root, solvers

Vmap = Callable[..., Callable[..., Any]]
TASKS = {"37": 37, "of two ranks one has none": 1}
META = {"center": draw(1, 4), "penalty": vector(0.1, -0.2, 0.3, 0.0)}


def data_of(tasks: int) -> tuple[Tensor, ...]:
    """Inputs and outputs to learn from, and others to score."""
    return draw(2, 37, 6, 4)[:tasks], draw(3, 37, 6)[:tasks], draw(4, 37, 3, 4)[:tasks], draw(5, 37, 3)[:tasks]


def ridge(w: Tensor, meta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return ((x @ w - y) ** 2).sum() / 2 + (meta["penalty"].exp() * (w - meta["center"]) ** 2).sum() / 2


def score(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((x @ w - y) ** 2).mean()


def by_lbfgs(meta: dict[str, Tensor], x: Tensor, y: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    solver = solvers.lbfgs(ridge, rtol=1e-13, atol=1e-13)
    return score(solver.run(meta["center"], meta, x, y)[0], others, targets)


@custom_root(grad(ridge))
def exact(_: None, meta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.solve(
        x.mT @ x + torch.diag(meta["penalty"].exp()), x.mT @ y + meta["penalty"].exp() * meta["center"]
    )


def by_custom_root(meta: dict[str, Tensor], x: Tensor, y: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    return score(exact(None, meta, x, y), others, targets)


def by_adam(meta: dict[str, Tensor], x: Tensor, y: Tensor, others: Tensor, targets: Tensor) -> Tensor:
    optimizer = idf.adam(0.05, eps_root=1e-8)

    def step(carry: Any) -> Any:
        w, state = carry
        updates, state = optimizer.update(grad(ridge)(w, meta, x, y), state)
        return idf.apply_updates(w, updates), state

    w, _ = idf.unroll(step, 4)((meta["center"], optimizer.init(meta["center"])))
    return score(w, others, targets)


TASK = {"lbfgs": by_lbfgs, "custom_root": by_custom_root, "adam": by_adam}


def mean_loss(vmap: Vmap, task: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda meta, *data: vmap(task, in_dims=(None, 0, 0, 0, 0))(meta, *data).mean()


def captured_loss(vmap: Vmap, task: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda meta, *data: vmap(lambda *one: task(meta, *one))(*data).mean()


def after_backward(loss: Callable[..., Tensor], data: tuple[Tensor, ...]) -> Any:
    meta = {name: t.clone().requires_grad_() for name, t in META.items()}
    loss(meta, *data).backward()
    return {name: t.grad for name, t in meta.items()}


DERIVATIVES: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "value": lambda loss, data: loss(META, *data),
    "grad": lambda loss, data: grad(loss)(META, *data),
    "of the data": lambda loss, data: grad(loss, argnums=(1, 4))(META, *data),
    "Hessian times vector": lambda loss, data: jvp(lambda m: grad(loss)(m, *data), (META,), (META,))[1],
    "jacfwd": lambda loss, data: jacfwd(lambda p: loss({**META, "penalty": p}, *data))(META["penalty"]),
    "backward()": after_backward,
}


def derived(vmap: Vmap, make: Any, task: str, tasks: int, derivative: str) -> Any:
    return DERIVATIVES[derivative](make(vmap, TASK[task]), data_of(tasks))


def derived_by_ranks(*case: Any) -> Any:
    return derived(dist.vmap, *case)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("make", [mean_loss, captured_loss])
@pytest.mark.parametrize("task", TASK)
def test_tasks_over_ranks_are_those_of_one_process(on_ranks, task: str, make, tasks: str, derivative: str) -> None:
    case = make, task, TASKS[tasks], derivative
    expected = derived(torch.func.vmap, *case)
    for found in on_ranks(2, derived_by_ranks, *case):
        close(found, expected)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_more_ranks_than_tasks_and_other_numbers(on_ranks, tasks: int) -> None:
    case = mean_loss, "custom_root", tasks, "grad"
    expected = derived(torch.func.vmap, *case)
    for found in on_ranks(4, derived_by_ranks, *case):
        close(found, expected)


# --- the lanes of arguments and results -------------------------------------------------------------------------------

NESTED = {"a": (draw(6, 2, 5), {"b": draw(7, 5, 3, 2)}), "scale": number(2.0)}


def of_nested(tree: Any, x: Tensor) -> Any:
    a, more = tree["a"]
    return {"first": a.sum() * x, "second": (more["b"] * tree["scale"], x.sum())}


PLACES: dict[str, Callable[[Vmap], Any]] = {
    "in_dims of nested trees": lambda vmap: vmap(of_nested, in_dims=({"a": (1, {"b": 0}), "scale": None}, -1))(
        NESTED, draw(8, 3, 5)
    ),
    "negative in_dims": lambda vmap: vmap(torch.mul, in_dims=(-1, -2))(draw(8, 3, 5), draw(9, 5, 3)),
    "out_dims of a tree": lambda vmap: vmap(
        lambda x: {"a": x, "b": (x.outer(x), x.sum())}, out_dims={"a": 1, "b": (-1, 0)}
    )(draw(8, 5, 3)),
    "negative out_dims": lambda vmap: vmap(lambda x: x.outer(x), out_dims=-2)(draw(8, 5, 3)),
    "chunk_size": lambda vmap: vmap(lambda x: x.outer(x), chunk_size=2)(draw(8, 7, 3)),
    "integers and booleans": lambda vmap: vmap(lambda x, k: (x > 0, k + 1, (x.sum() > 0)), in_dims=(0, 0))(
        draw(8, 5, 3), torch.arange(5)
    ),
    "complex numbers": lambda vmap: vmap(lambda z: (z.conj(), z.abs(), z * 1j))(draw(8, 5, 3, dtype=torch.complex128)),
    "single precision": lambda vmap: vmap(lambda x: x.sin())(draw(8, 5, 3, dtype=torch.float32)),
    "not contiguous": lambda vmap: vmap(lambda x: x.T @ x, in_dims=2)(draw(8, 3, 2, 5).transpose(0, 1)),
    "a vmap around it": lambda vmap: torch.vmap(lambda s: vmap(lambda x: (s * x).sin())(draw_outside))(draw(7, 3)),
    "a vmap inside": lambda vmap: vmap(lambda x: torch.vmap(lambda s: (s * x).sin())(draw_outside[:, 0]))(draw(7, 5)),
    "grad inside": lambda vmap: vmap(jacrev(lambda x: (x.sin() ** 2).sum()), out_dims=1)(draw(8, 5, 3)),
    "an argument that is no tensor": lambda vmap: vmap(lambda x, power: x**power, in_dims=(0, None))(draw(8, 5), 3),
    "a result that is shared": lambda vmap: vmap(lambda x: (x, torch.ones(2)))(draw(8, 5)),
}
draw_outside = draw(10, 5, 2)


def placed_by_ranks(name: str) -> Any:
    return PLACES[name](dist.vmap)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", PLACES)
def test_the_dimensions_of_lanes_are_those_of_torch(on_ranks, name: str, size: int) -> None:
    expected = PLACES[name](torch.func.vmap)
    for found in on_ranks(size, placed_by_ranks, name):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def own_counts() -> tuple[int, ...]:
    """How many of five lanes each rank holds."""
    return {2: (3, 2), 4: (1, 1, 2, 1)}[c10d.get_world_size()]


def own_lanes(whole: Tensor, dim: int = 0) -> Tensor:
    return whole.split(own_counts(), dim)[c10d.get_rank()]


W, X, K = draw(1, 3), draw(8, 5, 3), draw(9, 3, 5)
ORDER = torch.arange(1.0, 6.0, dtype=torch.float64)


def lane(w: Tensor, x: Tensor, k: Tensor) -> Tensor:
    return (w * x).sin() * k + w.sum()


def of_lanes(values: Tensor) -> Tensor:
    """A number that tells one lane from another."""
    return ORDER @ values.cos().sum(1) + values.prod(0).sum()


def over_own_lanes() -> dict[str, Any]:
    x, k = own_lanes(X), own_lanes(K, 1)

    def loss(w: Tensor, x: Tensor, k: Tensor) -> Tensor:
        return of_lanes(dist.vmap(lane, in_dims=(None, Shard(0), Shard(1)))(w, x, k))

    gradients = grad(loss, argnums=(0, 1, 2))(W, x, k)
    return {
        "value": dist.vmap(lane, in_dims=(None, Shard(0), Shard(-1)))(W, x, k),
        "of all lanes": dist.vmap(lane, in_dims=(None, Shard(0), 1))(W, x, K),
        "gradient": gradients[0],
        "own gradients": gradients[1:],
        "gradient, some of all lanes": grad(lambda k: of_lanes(dist.vmap(lane, in_dims=(None, Shard(0), 1))(W, x, k)))(
            K
        ),
        "kept": dist.vmap(lane, in_dims=(None, Shard(0), Shard(1)), out_dims=Shard(1))(W, x, k),
        "gradient, kept": grad(
            lambda w: dist.psum(
                dist.vmap(lane, in_dims=(None, Shard(0), Shard(1)), out_dims=Shard(0))(w, x, k).cos().sum()
            )
        )(W),
        "Hessian": jacfwd(grad(loss))(W, x, k),
        "counts": own_counts(),
    }


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_may_hold_its_own_lanes(on_ranks, size: int) -> None:
    def loss(w: Tensor, x: Tensor, k: Tensor) -> Tensor:
        return of_lanes(torch.vmap(lane, in_dims=(None, 0, 1))(w, x, k))

    values = torch.vmap(lane, in_dims=(None, 0, 1))(W, X, K)
    of_w, of_x, of_k = grad(loss, argnums=(0, 1, 2))(W, X, K)
    for rank, found in enumerate(on_ranks(size, over_own_lanes)):
        counts = found["counts"]
        close(found["value"], values)
        close(found["of all lanes"], values)
        close(found["gradient"], of_w)
        close(found["own gradients"], (of_x.split(counts)[rank], of_k.split(counts, 1)[rank]))
        close(found["gradient, some of all lanes"], of_k)
        close(found["kept"], values.split(counts)[rank].T)
        close(found["gradient, kept"], grad(lambda w: torch.vmap(lane, in_dims=(None, 0, 1))(w, X, K).cos().sum())(W))
        close(found["Hessian"], jacfwd(grad(loss))(W, X, K))


# --- searches in lanes ------------------------------------------------------------------------------------------------

ROOTS = vector(1.0, 4.0, -1.0, 9.0, 2.0, -5.0, 3.0)


def root_of(c: Tensor, **options: Any) -> Any:
    """The square root. For a negative number the iterates are chaotic, so that a last bit decides them: eagerly, since
    what a process has compiled depends on its earlier searches."""
    keep = options.pop("keep_history", False)
    solver = solvers.newton(lambda x, c: x**2 - c, compile="off", **options)
    return solver.run(torch.ones_like(c), c, keep_history=keep)


def seen_warnings(fn: Callable[[], Any]) -> tuple[Any, set[tuple[type, str]]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = fn()
    return result, {(w.category, str(w.message)) for w in seen}


def details(fn: Callable[[], Any]) -> dict[str, Any]:
    """What a `ConvergenceError` says."""
    try:
        fn()
    except ConvergenceError as error:
        return {**vars(error), "text": str(error)}
    return {}


def facts(error: dict[str, Any]) -> dict[str, Any]:
    return {name: error[name] for name in ("solver", "status", "iterations", "lanes", "total", "target", "text")}


STATES: dict[str, dict[str, Any]] = {
    "ignore": {"on_failure": "ignore"},
    "histories": {"on_failure": "ignore", "keep_history": True},
    "a budget": {"on_failure": "ignore", "maxiter": 3},
    "a budget, histories": {"on_failure": "ignore", "maxiter": 3, "keep_history": True},
}


def state_of(vmap: Vmap, name: str) -> Any:
    x, state = vmap(lambda c: root_of(c, **STATES[name]))(ROOTS)
    return x, {field: getattr(state, field) for field in ("status", "iter_num", "error", "history")}


def state_by_ranks(name: str) -> Any:
    return state_of(dist.vmap, name)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", STATES)
def test_states_of_all_lanes_come_from_all_ranks(on_ranks, name: str, size: int) -> None:
    expected = state_of(torch.func.vmap, name)
    for found in on_ranks(size, state_by_ranks, name):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


FAILING: dict[str, Callable[[Vmap], Any]] = {
    "some lanes": lambda vmap: vmap(root_of)(ROOTS),
    "one lane": lambda vmap: vmap(root_of)(ROOTS.abs().index_fill(0, torch.tensor(5), -2.0)),
    "a vmap inside": lambda vmap: vmap(lambda c: torch.vmap(lambda s: root_of(c + s))(vector(0.0, 3.0)))(ROOTS),
    "a vmap around it": lambda vmap: torch.vmap(lambda s: vmap(lambda c: root_of(c + s))(ROOTS))(vector(0.0, 3.0)),
    "unrolled": lambda vmap: vmap(
        lambda c: solvers.newton(lambda x, c: x**2 - c).run(torch.ones_like(c), c, implicit_diff=False)
    )(ROOTS),
    "a gradient": lambda vmap: grad(lambda c: vmap(lambda c: root_of(c)[0])(c).sum())(ROOTS),
}


def failed_by_ranks(name: str) -> Any:
    error = details(lambda: FAILING[name](dist.vmap))
    return error, is_usable()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", FAILING)
def test_lanes_that_fail_are_named_as_in_one_process(on_ranks, name: str, size: int) -> None:
    expected = facts(details(lambda: FAILING[name](torch.func.vmap)))
    for found, usable in on_ranks(size, failed_by_ranks, name):
        assert facts(found) == expected
        assert usable


def warned_by_ranks() -> Any:
    (x, state), seen = seen_warnings(lambda: dist.vmap(lambda c: root_of(c, on_failure="warn"))(ROOTS))
    return x, state.status, seen


def test_a_warning_names_the_lanes_among_all(on_ranks) -> None:
    (x, state), seen = seen_warnings(lambda: torch.vmap(lambda c: root_of(c, on_failure="warn"))(ROOTS))
    (category, text), *_ = seen
    assert category is ConvergenceWarning and "lanes 2, 5: 2 of 7" in text
    for found_x, status, found in on_ranks(2, warned_by_ranks):
        torch.testing.assert_close(found_x, x, equal_nan=True)
        assert torch.equal(status, state.status)
        assert all(kind is ConvergenceWarning and " of 7" in text for kind, text in found)


# --- arguments that are refused ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "too large a dimension": (lambda: dist.vmap(torch.sin, in_dims=2)(X), ValueError, "in_dims has 2 for a tensor"),
    "no tensor": (lambda: dist.vmap(torch.mul, in_dims=(0, 0))(X, 2.0), ValueError, "in_dims has 0 for 2.0"),
    "another structure": (lambda: dist.vmap(torch.mul, in_dims=(0, 0, 0))(X, X), ValueError, "for 2 arguments"),
    "nothing mapped": (lambda: dist.vmap(torch.sin, in_dims=None)(X), ValueError, "one number of lanes"),
    "two numbers of lanes": (lambda: dist.vmap(torch.mul)(X, X[:4]), ValueError, r"\[4, 5\]"),
    "no lanes": (lambda: dist.vmap(torch.sin)(X[:0]), ValueError, "a lane at least"),
    "no own lanes": (lambda: dist.vmap(torch.sin, Shard(0))(X[: c10d.get_rank()]), ValueError, r"\[0, 1\]"),
    "own lanes and others": (
        lambda: dist.vmap(torch.mul, (Shard(0), 0))(own_lanes(X), X[:4]),
        ValueError,
        "5 lanes of their own, and 4",
    ),
    "out_dims of None": (lambda: dist.vmap(torch.sin, out_dims=None)(X), ValueError, "must not have None"),
    "out_dims of another structure": (
        lambda: dist.vmap(torch.sin, out_dims=(0, 0))(X),
        ValueError,
        "do not fit the result",
    ),
    "random numbers": (lambda: dist.vmap(lambda x: x + torch.rand(3))(X), RuntimeError, "andom"),
    "a result that is no tensor": (lambda: dist.vmap(lambda x: 1.0)(X), ValueError, "must only return Tensors"),
    "other arguments": (
        lambda: dist.vmap(torch.mul, (0, None))(X, X[0] + c10d.get_rank()),
        dist.RankError,
        "the same on all ranks",
    ),
    "other numbers of lanes": (lambda: dist.vmap(torch.sin)(X[: 3 + c10d.get_rank()]), dist.RankError, "on all ranks"),
    "other mapped values": (lambda: dist.vmap(torch.sin)(X * (1 + c10d.get_rank())), dist.RankError, "on all ranks"),
    "another captured tensor": (
        lambda: grad(lambda w: dist.vmap(lambda x: (w * x).sum())(X).sum())(W + c10d.get_rank()),
        dist.RankError,
        "on all ranks",
    ),
}


def refused(name: str) -> Any:
    return outcome(REFUSED[name][0]), is_usable()


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_on_all_ranks(on_ranks, name: str) -> None:
    _, kind, text = REFUSED[name]
    for error, usable in on_ranks(2, refused, name):
        assert isinstance(error, Raised), error
        assert issubclass(error.type, kind), error
        assert re.search(text, error.text), error
        assert usable


# --- cost -------------------------------------------------------------------------------------------------------------


def cost_of_a_gradient(tasks: int) -> Any:
    data = data_of(tasks)
    counted(lambda: dist.psum(number(1.0)))  # The first collective of a group asks for the machines.
    return counted(lambda: grad(mean_loss(dist.vmap, by_custom_root))(META, *data))[1:]


@pytest.mark.parametrize("tasks", [2, 8])
def test_the_number_of_collectives_does_not_depend_on_the_tasks(on_ranks, tasks: int) -> None:
    """Three headers: before the arguments, before the results are gathered, and at the end. One sum of the gradient of
    all shared tensors."""
    for calls, sent in on_ranks(2, cost_of_a_gradient, tasks):
        assert calls == {"all_reduce": 4, "all_gather": 1}
        shared = 8 * sum(t.numel() for t in META.values())
        assert sent == {"all_reduce": 3 * 24 + shared, "all_gather": 8 * tasks // 2}
