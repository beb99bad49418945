"""Wherever a local function holds a tensor, its derivative is that of the sum over all ranks; and what is refused."""

from __future__ import annotations

import collections
import contextvars
import functools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from checks.derivatives import by_backward
from checks.ranks import Raised, is_usable, outcome
from checks.tensors import draw, vector
from checks.traffic import Traffic, counted
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.func import functional_call, grad, hessian, jvp, vmap

import implicitdiff.distributed as dist
from implicitdiff import solvers
from implicitdiff.distributed import psum, psum_of, pvary

X = draw(1, 4, 3)
W = vector(0.3, -0.2, 0.5)
NAME = "".join(["weig", "hts"])
KEPT = contextvars.ContextVar[Tensor]("KEPT")
GLOBAL: dict[str, Tensor] = {}
NET = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()


class Model:
    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @property
    def doubled(self) -> Tensor:
        return 2 * self.weights

    def loss(self, x: Tensor) -> Tensor:
        return self(x) + self.doubled.sum()

    def __call__(self, x: Tensor) -> Tensor:
        return (x @ self.weights).sin().sum()


def of(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).sin().sum()


def by_generator(w: Tensor) -> Callable[[Tensor], Tensor]:
    def each() -> Any:
        yield w
        yield w.exp()

    return lambda x: sum(of(x, v) for v in each())


def by_context_variable(w: Tensor) -> Callable[[Tensor], Tensor]:
    KEPT.set(w)
    return lambda x: of(x, KEPT.get())


def by_global(w: Tensor) -> Callable[[Tensor], Tensor]:
    GLOBAL["w"] = w
    return lambda x: of(x, GLOBAL["w"])


def by_default(w: Tensor) -> Callable[[Tensor], Tensor]:
    def local(x: Tensor, v: Tensor = w) -> Tensor:
        return of(x, v)

    return local


def by_reference(w: Tensor) -> Callable[[Tensor], Tensor]:
    reference = weakref.ref(w)
    return lambda x: of(x, reference())


def by_module(w: Tensor) -> Callable[[Tensor], Tensor]:
    parameters = {"0.weight": torch.stack([w, w.sin()]), "0.bias": w[:2]}
    return lambda x: functional_call(NET, parameters, (x,)).sum()


def by_object(make: Callable[[Tensor], Any], use: Callable[[Any, Tensor], Tensor]) -> Any:
    def local_of(w: Tensor) -> Callable[[Tensor], Tensor]:
        held = make(w)
        return lambda x: use(held, x)

    return local_of


# A function of the rows of a rank, made from a tensor that it holds.
HOLDERS: dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "cell": lambda w: lambda x: of(x, w),
    "view and base": lambda w: (lambda v: lambda x: of(x[:, :2], v) + of(x, w))(w[:2]),
    "partial": lambda w: functools.partial(of, w=w),
    "default": by_default,
    "object": lambda w: Model(w),
    "method": lambda w: Model(w).loss,
    "property": by_object(Model, lambda m, x: of(x, m.doubled)),
    "attrgetter": by_object(Model, lambda m, x: of(x, operator.attrgetter("weights")(m))),
    "computed name": by_object(lambda w: types.SimpleNamespace(weights=w), lambda m, x: of(x, getattr(m, NAME))),
    "normal distribution": by_object(lambda w: Normal(w, 1.0), lambda d, x: d.log_prob(x).sum()),
    "distribution of distributions": by_object(
        lambda w: Independent(Normal(w, w.exp()), 1), lambda d, x: d.log_prob(x).sum()
    ),
    "multivariate normal": by_object(
        lambda w: MultivariateNormal(w, torch.diag(w.exp()), validate_args=False), lambda d, x: d.log_prob(x).sum()
    ),
    "list": by_object(lambda w: [[torch.zeros(1)] * 9, [w]], lambda held, x: of(x, held[1][0])),
    "long list": by_object(lambda w: [*[torch.zeros(1)] * 5000, w], lambda held, x: of(x, held[-1])),
    "chain map": by_object(lambda w: collections.ChainMap({"w": w}), lambda held, x: of(x, held["w"])),
    "read-only mapping": by_object(lambda w: types.MappingProxyType({"w": w}), lambda held, x: of(x, held["w"])),
    "weak reference": by_reference,
    "generator": by_generator,
    "context variable": by_context_variable,
    "global": by_global,
    "module": by_module,
    "vmap inside": lambda w: lambda x: vmap(lambda row: (row @ w).sin())(x).sum(),
    "grad inside": lambda w: lambda x: grad(lambda v: of(x, v * w))(torch.ones_like(w)).sum(),
}


def mine() -> Tensor:
    return X[c10d.get_rank() :: c10d.get_world_size()]


def spread_sum(name: str, w: Tensor) -> Tensor:
    return psum_of(HOLDERS[name](w))(mine())


def spread_lanes(name: str, w: Tensor) -> Tensor:
    local = HOLDERS[name](w)
    return dist.vmap(lambda row: local(row[None]))(X).sum()


def in_one_process(name: str, w: Tensor) -> Tensor:
    if name in OF_RANKS:
        return sum(HOLDERS[name](w)(X[rank::2]) for rank in range(2))
    return HOLDERS[name](w)(X)


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "grad": lambda f: grad(f)(W),
    "jvp": lambda f: jvp(f, (W,), (W.cos(),))[1],
    "backward()": lambda f: by_backward(f, W),
    "hessian": lambda f: hessian(f)(W),
    "vmap of grad": lambda f: vmap(grad(f))(torch.stack([W, 2 * W])),
}


def derived(spread: Callable[[str, Tensor], Tensor], name: str, derivative: str) -> Any:
    return outcome(lambda: DERIVATIVES[derivative](lambda w: spread(name, w)))


# The value of these is no sum over lanes.
OF_RANKS = ("method", "grad inside")
SPREAD = [(spread, name) for spread in (spread_sum, spread_lanes) for name in HOLDERS]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(("spread", "name"), [row for row in SPREAD if row[0] is spread_sum or row[1] not in OF_RANKS])
def test_the_derivative_in_a_tensor_that_a_function_holds(on_ranks, spread, name: str, derivative: str) -> None:
    expected = DERIVATIVES[derivative](lambda w: in_one_process(name, w))
    for found in on_ranks(2, derived, spread, name, derivative):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- collectives in a local function ----------------------------------------------------------------------------------


def by_psum(w: Tensor) -> Tensor:
    z = torch.tanh(mine() @ w)
    return ((z - dist.pmean(z.mean())) ** 3).sum() + psum(z.sum()) * z[0]


def by_psum_and_pvary(w: Tensor) -> Tensor:
    z = torch.tanh(mine() @ pvary(w))
    return ((z - pvary(dist.pmean(z.mean()))) ** 3).sum() + pvary(psum(z.sum())) * z[0]


def by_all_gather(w: Tensor) -> Tensor:
    z = torch.tanh(mine() @ w)
    all_ranks = dist.all_gather(z)
    return ((z - all_ranks.mean()) ** 3).sum() + all_ranks.sum() * z[0]


def of_all_rows(w: Tensor) -> Tensor:
    z = torch.tanh(X @ w)
    # The first rows of the two ranks.
    return ((z - z.mean()) ** 3).sum() + z.sum() * (z[0] + z[1])


STATISTICS = {"psum": by_psum, "psum and pvary": by_psum_and_pvary, "all_gather": by_all_gather}


def normalised(name: str, derivative: str) -> Tensor:
    return DERIVATIVES[derivative](psum_of(STATISTICS[name]))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_all_ranks_may_enter_a_local_function(on_ranks, name: str, derivative: str) -> None:
    expected = DERIVATIVES[derivative](of_all_rows)
    for found in on_ranks(2, normalised, name, derivative):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# --- one axis in itself -----------------------------------------------------------------------------------------------

NESTED: dict[str, Callable[[Tensor], Any]] = {
    "psum_of in psum_of": lambda w: psum_of(lambda w: of(mine(), w) * psum_of(lambda w: of(mine(), w))(w))(w),
    "pmean_of in psum_of": lambda w: psum_of(lambda w: of(mine(), w) * dist.pmean_of(lambda w: of(mine(), w))(w))(w),
    "vmap in vmap": lambda w: dist.vmap(lambda x: dist.vmap(lambda y: (x * y * w).sin().sum())(X).sum())(X),
    "psum_of in vmap": lambda w: dist.vmap(lambda x: psum_of(lambda w: (x * w).sum())(w))(X),
    "shard in psum_of": lambda w: psum_of(lambda w: dist.shard(torch.stack([w, w])).sum())(w),
    "vmap in psum_of": lambda w: psum_of(lambda w: dist.vmap(lambda x: (x * w).sum())(mine()).sum())(w),
}


def nested(name: str) -> Any:
    return outcome(lambda: NESTED[name](W)), outcome(lambda: grad(lambda w: NESTED[name](w).sum())(W)), is_usable()


@pytest.mark.parametrize("name", NESTED)
def test_one_axis_inside_of_itself_is_refused(on_ranks, name: str) -> None:
    """Ranks with as many lanes each would give wrong values, and no error."""
    for value, gradient, usable in on_ranks(2, nested, name):
        for error in (value, gradient):
            assert isinstance(error, Raised) and error.type is RuntimeError, error
            assert "pass another axis" in error.text
        assert usable


# --- counts -----------------------------------------------------------------------------------------------------------

ROWS, SIGNS = draw(3, 24, 3), draw(4, 24).sign()


def likelihood(w: Tensor) -> Tensor:
    here = slice(c10d.get_rank(), None, c10d.get_world_size())
    return nn.functional.softplus(-SIGNS[here] * (ROWS[here] @ w)).sum() / len(ROWS)


def penalised(w: Tensor, theta: Tensor) -> Tensor:
    return psum_of(likelihood)(w) + (theta.exp() * w**2).sum() / 2


def by_search(maxiter: int) -> Callable[[Tensor], Tensor]:
    solver = solvers.lbfgs(penalised, maxiter=maxiter, rtol=0.0, atol=0.0)
    return lambda theta: solver.run(torch.zeros_like(theta), theta)[0].sum()


def costs() -> dict[str, Any]:
    theta = torch.zeros(3, dtype=W.dtype)
    grad(by_search(1))(theta)  # The first calls compare arguments and machines.
    return {
        "value": counted(lambda: penalised(W, theta))[1:],
        "gradient": counted(lambda: grad(penalised)(W, theta))[1:],
        "5 iterations": counted(lambda: by_search(5)(theta))[1:],
        "6 iterations": counted(lambda: by_search(6)(theta))[1:],
        "hypergradient of 5": counted(lambda: grad(by_search(5))(theta))[1:],
    }


def test_how_often_and_how_much_a_search_sends(on_ranks) -> None:
    """A value takes 8 bytes, and a gradient in three unknowns 24 more; an iteration is one of both."""
    for cost in on_ranks(2, costs):
        assert cost["value"] == ({"all_reduce": 1}, {"all_reduce": 8})
        assert cost["gradient"] == ({"all_reduce": 2}, {"all_reduce": 8 + 24})
        (before, sent_before), (after, sent_after) = cost["5 iterations"], cost["6 iterations"]
        assert after["all_reduce"] - before["all_reduce"] == 2
        assert sent_after["all_reduce"] - sent_before["all_reduce"] == 8 + 24
        assert before == {"all_reduce": 16}
        assert cost["hypergradient of 5"][0] == {"all_reduce": 19}


def evaluations(is_held: bool) -> tuple[int, dict[str, int]]:
    """How often a search evaluates a function, where the backend's threads let go of tensors early or late."""
    calls, held = 0, []
    psum(W)  # The first collective of a group compares the machines.

    def residual(x: Tensor, c: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return psum(pvary(x) ** 3 + pvary(x)) / c10d.get_world_size() - dist.all_gather(pvary(c))[: len(c)]

    with Traffic() as traffic:
        for name in ("all_reduce", "all_gather"):
            send = getattr(c10d, name)

            def sent(*args: Any, send: Any = send, **kwargs: Any) -> Any:
                held.append(args if is_held else None)
                return send(*args, **kwargs)

            setattr(c10d, name, sent)
        by_backward(lambda c: solvers.newton(residual).run(torch.zeros_like(c), c)[0].sum(), W)
        return calls, dict(traffic.calls)


def test_a_tensor_that_a_backend_still_holds_does_not_count_as_stored(on_ranks) -> None:
    """Else the ranks evaluate a function in other numbers, and take each other's data for another collective's."""
    assert on_ranks(2, evaluations, True) == on_ranks(2, evaluations, False)
