"""A function as the operations of one evaluation: what is repeated, what is refused, and how often the user's runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from checks.compiled import needs_cpu
from tables.solvers import MINIMISERS
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import implicitdiff._torch.trees as pytree
from implicitdiff import solvers
from implicitdiff._recorded.straight import StraightLine, StraightLines, straight_line
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.dispatch import outside_dispatch
from implicitdiff._torch.modes import no_modes
from implicitdiff.solvers._loop.recordings import kept

F64 = torch.float64
X = torch.tensor([0.6, -0.4, 0.9, 0.7], dtype=F64)
THETA = torch.tensor([0.5, 0.3, -0.4, 1.1], dtype=F64)
MATRIX = torch.tensor(
    [[0.4, -0.9, 0.2, 0.1], [0.1, 0.8, -0.3, 0.5], [0.7, 0.5, -0.6, 0.2], [0, 0.3, 0.1, 1]], dtype=F64
)
PLACES = torch.tensor([2, 0, 1])
SINGLE = torch.tensor([0.5, -1.5, 2.0, 0.25])
HIDDEN = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
CONSTANTS = [MATRIX, PLACES, SINGLE, *MATRIX.unbind()]
Function = Callable[[Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def no_recordings():
    kept.clear()
    yield
    kept.clear()


def writes_to_a_copy(x, theta):
    y = x.clone()
    y[1:] = y[1:] * theta[1:]
    y += 1
    y[0].mul_(2)
    return y * y


def fills(x, theta):
    y = torch.zeros(4, dtype=F64)
    y[:2] = 2 * x[2:]
    y[2] = theta[0]
    return y * x


def writes_through_a_view(x, theta):
    y = 1.0 * x
    z = y.view(2, 2)
    y += theta
    z[0] *= 3
    return z.reshape(-1) + y


def constants_without_gradients(x, theta):
    with torch.no_grad():
        weights = MATRIX.exp().sum(0)
    return x * weights


def turns(x, theta):
    y = torch.outer(x, theta)
    y.t_()
    return y.sum(0)


REPEATED: dict[str, Function] = {
    "arithmetic": lambda x, theta: 2 * torch.exp(x) * theta - x.sum() / 3 + 2**x,
    "its argument": lambda x, theta: x,
    "an operand": lambda x, theta: theta,
    "a constant": lambda x, theta: [MATRIX, x],
    "several results": lambda x, theta: {"a": x * theta, "b": (theta.exp(), 3, None)},
    "split, unbind": lambda x, theta: [*x.split(2), *(2 * theta).unbind()],
    "chunk, cat, stack": lambda x, theta: torch.cat([*x.chunk(2)[::-1], torch.stack([theta, x], 1).sum(1)]),
    "writes to a copy": writes_to_a_copy,
    "fills": fills,
    "writes through a view": writes_through_a_view,
    "turns a result": turns,
    "constants without gradients": constants_without_gradients,
    "numbers": lambda x, theta: x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64) + torch.arange(4),
    "dtypes": lambda x, theta: (x.float() * SINGLE + theta).double() + x.to(torch.int64),
    "where": lambda x, theta: torch.where(x > theta, x**2, theta * x) + torch.relu(x - theta),
    "indices": lambda x, theta: torch.index_put(x, (PLACES,), theta[:3]) + x[PLACES].sum(),
    "views": lambda x, theta: (x[:, None] * theta).T.reshape(16)[4:12] + x.expand(2, 4).reshape(8),
    "products": lambda x, theta: torch.einsum("i,ij,j->i", x, MATRIX, theta) + MATRIX @ x,
    "linear": lambda x, theta: functional.linear(x, MATRIX, theta),
    "softmax": lambda x, theta: functional.softmax(x, 0) * theta + functional.gelu(x),
    "layer_norm": lambda x, theta: functional.layer_norm(x, (4,), theta),
    "detach": lambda x, theta: x * theta.exp().detach() + x.detach(),
    "straight through": lambda x, theta: x + (torch.round(3 * x) / 3 - x).detach() * theta,
    "inner grad": lambda x, theta: grad(lambda y: (torch.exp(y) * theta).sum())(x),
    "inner grad of a detached": lambda x, theta: grad(lambda y: (y.detach() * y**2).sum())(x) * theta,
    "inner vjp": lambda x, theta: vjp(lambda y: torch.sigmoid(y) * y, x)[1](theta)[0],
    "inner jacrev": lambda x, theta: jacrev(lambda y: torch.sin(y) * theta)(x) @ theta,
    "inner vmap": lambda x, theta: vmap(lambda row: torch.tanh(row @ x))(MATRIX) + theta,
    "inner vmap of grad": lambda x, theta: vmap(grad(lambda row: torch.tanh(row @ x)))(MATRIX).sum(0) + theta,
}


def without_gradients(x, theta):
    with torch.no_grad():
        y = 2 * x
    return x * y


def literal(x, theta):
    y = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    y += 1
    return x * y


class Twice(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def with_hook(x, theta):
    y = x * theta
    y.register_hook(lambda g: 3 * g)
    return y**2


def by_requirement(x, theta):
    return 2 * x if x.requires_grad else 3 * x


REFUSED: dict[str, tuple[Function, str]] = {
    "no_grad": (without_gradients, "switches gradients off"),
    "inference": (torch.inference_mode()(lambda x, theta: MATRIX[0] * x.detach()), "switches gradients off"),
    "data": (lambda x, theta: x * x.data, "detaches a tensor"),
    "autograd.grad": (
        lambda x, theta: torch.autograd.grad((x.exp() * theta).sum(), x, create_graph=True)[0],
        "detaches a tensor",
    ),
    "inner jvp": (lambda x, theta: jvp(torch.sin, (x,), (theta,))[1], "forward mode"),
    "an autograd.Function": (lambda x, theta: Twice.apply(x), "switches gradients off"),
    "a hook": (with_hook, "register_hook"),
    "requires_grad": (by_requirement, "asks whether gradients"),
    "the graph": (lambda x, theta: x * (2 if (x * theta).grad_fn else 3), "asks whether gradients"),
    "a write to a literal": (literal, "writes to a tensor from outside"),
    "a write to a constant": (lambda x, theta: x * MATRIX[0].mul_(1.0), "writes to a tensor from outside"),
    "item": (lambda x, theta: x * theta[0].item(), "reads the value"),
    "a branch": (lambda x, theta: x if x[0] > 0 else theta, "reads the value"),
    "a mask": (lambda x, theta: x[x > 0].sum() * theta, "reads the value"),
    "tolist": (lambda x, theta: x * theta.detach().tolist()[0], "reads the value"),
    "a list of tensors": (
        lambda x, theta: x * torch.tensor([x[0].detach(), 1.0, 2.0, 3.0], dtype=F64),
        "reads the value",
    ),
    "str": (lambda x, theta: x * float(str(theta[0])[7:10]), "reads the value"),
    "random numbers": (lambda x, theta: x * torch.rand(4, dtype=F64), "draws random numbers"),
    "as_strided": (lambda x, theta: x.as_strided((4,), (1,)) * theta, "lies in memory"),
    "bits": (lambda x, theta: x + 0 * x.view(torch.int64), "lies in memory"),
    "a hidden tensor": (lambda x, theta: x * HIDDEN, "unknown origin"),
}


def weighted(values: Any) -> Tensor:
    """Return a sum of all entries with irregular weights."""
    flat = torch.cat([t.reshape(-1).double() for t in pytree.tensors(values)])
    return (flat * torch.cos(torch.arange(len(flat)))).sum()


def noted(fn: Function) -> Any:
    return straight_line(lambda operands: fn(*operands), [X, THETA], [], CONSTANTS)


# At other points than the one where the functions are noted, and with other strides.
OTHER = 1.3 * THETA - 0.1, torch.stack([X, 2 * X], 1)[:, 0] - 0.2
LANES = torch.stack([X + 0.3 * k for k in range(3)]), torch.stack([THETA - 0.2 * k for k in range(3)], 1)
WAYS: dict[str, Callable[[Function], Any]] = {
    "value": lambda fn: pytree.tensors(fn(*OTHER)),
    "gradient": lambda fn: grad(lambda *a: weighted(fn(*a)), (0, 1))(*OTHER),
    "jacfwd": lambda fn: jacfwd(lambda *a: weighted(fn(*a)), (0, 1))(*OTHER),
    "hessian": lambda fn: hessian(lambda *a: weighted(fn(*a)), (0, 1))(*OTHER),
    "third": lambda fn: jacrev(jacrev(jacrev(lambda *a: weighted(fn(*a)))))(*OTHER),
    "lanes": lambda fn: vmap(lambda *a: weighted(fn(*a)), (0, 1))(*LANES),
    "lanes of one": lambda fn: vmap(lambda x: weighted(fn(x, THETA)))(LANES[0]),
    "gradients of lanes": lambda fn: vmap(grad(lambda *a: weighted(fn(*a))), (0, 1))(*LANES),
    "gradient of lanes": lambda fn: grad(lambda x: vmap(lambda x: weighted(fn(x, THETA)))(x).sum())(LANES[0]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_operations_are_the_function_under_all_transforms(name):
    fn, line = REPEATED[name], noted(REPEATED[name])
    for way in WAYS.values():
        try:
            expected = way(fn)
        except RuntimeError:
            # A vmap refuses a write to a tensor that it does not batch.
            assert "write" in name or "fills" in name
            continue
        torch.testing.assert_close(way(lambda *a, line=line: line(a)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", REFUSED)
def test_what_operations_do_not_show_is_refused(name):
    fn, reason = REFUSED[name]
    with pytest.raises(NotRecordableError, match=reason):
        noted(fn)


def test_a_write_through_a_view_is_not_lost_where_memory_lies_otherwise():
    def fn(operands):
        m = 1.0 * operands[0]
        m.view(16)[0] = 5.0
        return m

    line = straight_line(fn, [MATRIX], [], [])
    assert line([2 * MATRIX])[0][0, 0] == 5
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        line([MATRIX.mT])


def test_an_evaluation_leaves_nothing_behind():
    x = X.clone().requires_grad_()
    straight_line(lambda operands: (operands[0] * 2).exp(), [x], [], [])
    assert x.grad is None and x._version == 0


def test_derivatives_of_the_second_order_are_compared(monkeypatch):
    """The values and the slopes of a tangent are those of the function."""

    def tangent(self, operands):
        x, theta = operands
        at, of = x.detach(), theta.detach()
        return [at**3 * of + 3 * at**2 * of * (x - at) + at**3 * (theta - of)]

    monkeypatch.setattr(StraightLine, "__call__", tangent)
    with pytest.raises(NotRecordableError, match="other numbers"):
        noted(lambda x, theta: x**3 * theta)


def test_a_function_of_more_arguments_is_noted_for_each_kind():
    calls = []

    def function(operands, name, *more):
        calls.append(name)
        return [operands[0] * (more[0] if more else 2.0)] if name == "product" else operands[0].log()

    lines = StraightLines(function, [-X], [X.abs()], [], compares=False)
    size = torch.tensor(3.0, dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(lines([X], "product", size), [3 * X])
        torch.testing.assert_close(lines([X], "product"), [2 * X])
        # Not finite at the first point.
        torch.testing.assert_close(lines([X.abs()], "log"), [X.abs().log()])
    assert calls == ["product", "product", "log", "log"]
    assert lines.repeats


# --- searches ---------------------------------------------------------------------------------------------------------

# So few iterations that no solution hides a difference.
SHORT: dict[str, Any] = {"maxiter": 3, "rtol": 0.0, "atol": 0.0, "on_failure": "ignore"}


class Counted:
    """A function that counts its evaluations."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.fn(*args, **kwargs)

    def since(self, run: Callable[[], Any]) -> tuple[Any, int]:
        before = self.calls
        return run(), self.calls - before


def bounded(fn: Function) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a sum that is small against the other terms of the problems below."""
    return lambda x, theta: 0.05 * torch.tanh(0.3 * weighted(fn(x, theta)))


def minimising(factory: Callable[..., Any], fn: Function) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return factory, lambda x, t: ((x - t) ** 2).sum() + (x**4).sum() / 9 + bounded(fn)(x, t) ** 2


PROBLEMS: dict[str, Callable[[Function], tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "newton": lambda fn: (solvers.newton, lambda x, t: 2 * x + x**3 / 9 - t + bounded(fn)(x, t) * X),
    "levenberg_marquardt": lambda fn: (
        solvers.levenberg_marquardt,
        lambda x, t: torch.cat([x - t, bounded(fn)(x, t)[None]]),
    ),
    **{row.name: partial(minimising, row.factory) for row in MINIMISERS},
}


@needs_cpu
@pytest.mark.one_in(3)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", [*REPEATED, *REFUSED])
def test_a_search_ends_as_with_the_function_itself(name, problem):
    factory, fn = PROBLEMS[problem](REPEATED[name] if name in REPEATED else REFUSED[name][0])
    counted = Counted(fn)

    def run(compile, theta=THETA):
        return counted.since(lambda: factory(counted, compile=compile, **SHORT).run(X, theta)[0])

    try:
        expected, expected_later = (run("off", theta)[0] for theta in (THETA, -2 * THETA))
    except (RuntimeError, ValueError):
        assert name in REFUSED
        return
    found, at_first = run("auto")
    again, later = run("auto")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(run("auto", -2 * THETA)[0], expected_later, rtol=1e-9, atol=1e-12)
    if name in REPEATED:
        assert at_first <= later + 2


NET = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4)).double()
BY_NAME = {name: parameter.detach() for name, parameter in NET.named_parameters()}


def image(x, theta):
    return 0.3 * torch.cos(x) + theta / 4


def objective(x, theta):
    return ((x - theta) ** 2).sum() + (x**4).sum()


def attention(x, theta):
    q = torch.outer(x, theta)[None]
    return 0.1 * functional.scaled_dot_product_attention(q, q, q)[0].sum(0) + theta


def shrink(v, stepsize):
    return torch.sign(v) * torch.relu(v.abs() - 0.1 * stepsize)


FIRST: dict[str, tuple[Callable[..., Any], Callable[..., Any], int]] = {
    "fixed_point_iteration": (solvers.fixed_point_iteration, image, 2),
    "anderson": (solvers.anderson, image, 2),
    "newton": (solvers.newton, lambda x, theta: x - image(x, theta), 2),
    **{row.name: (row.factory, objective, 2) for row in MINIMISERS},
    "levenberg_marquardt": (solvers.levenberg_marquardt, lambda x, theta: torch.cat([x**2 - theta, x / 9]), 2),
    "a robust loss": (
        lambda fn, **options: solvers.levenberg_marquardt(fn, loss="huber", **options),
        lambda x, theta: torch.cat([x**2 - theta, x / 9]),
        2,
    ),
    "a projection": (lambda fn, **options: solvers.projected_gradient(fn, torch.relu, **options), objective, 1),
    "a step size": (lambda fn, **options: solvers.proximal_gradient(fn, shrink, **options), objective, 1),
    "a module": (solvers.anderson, lambda x, theta: 0.2 * NET(x) + theta, 2),
    "a functional call": (solvers.anderson, lambda x, theta: 0.2 * functional_call(NET, BY_NAME, (x,)) + theta, 2),
    "attention": (solvers.fixed_point_iteration, attention, 2),
}
"""A search, and how many evaluations its first call makes more than a later one."""


@needs_cpu
@pytest.mark.parametrize("lanes", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", FIRST)
def test_a_recording_evaluates_the_function_twice(name, lanes):
    factory, fn, more = FIRST[name]
    counted = Counted(fn)
    thetas = THETA * torch.linspace(0.5, 1, 6, dtype=F64)[: lanes[-1] if lanes else 1, None]

    def run(compile="auto"):
        solve = lambda theta: factory(counted, compile=compile, **SHORT).run(X, theta)[0]  # noqa: E731
        for _ in lanes:
            solve = vmap(solve)
        return counted.since(lambda: solve(thetas.expand(*lanes, 4) if lanes else THETA))

    (found, first), (_, later) = run(), run()
    assert first <= later + more
    torch.testing.assert_close(found, run("off")[0], rtol=1e-8, atol=1e-10)


@needs_cpu
def test_the_function_has_the_last_word_about_gradients():
    """Python may ask torch whether gradients are on; evaluations in a search have them off and on."""

    def image(x, theta):
        return (0.2 if torch.is_grad_enabled() else 0.3) * torch.cos(x) + theta

    found, expected = (
        solvers.fixed_point_iteration(image, compile=c, **SHORT).run(X, THETA)[0] for c in ("auto", "off")
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@needs_cpu
def test_a_function_is_noted_aside_of_the_guess():
    """At a guess of zeros the derivatives of many functions are zero, so that nothing is compared."""
    sizes = []

    def fn(x, theta):
        with no_modes(), outside_dispatch():
            sizes.append(float(x.detach().abs().max()))
        return (x**4).sum() - (theta * x).sum()

    solvers.gradient_descent(fn, **SHORT).run(torch.zeros_like(X), THETA)
    at_guess, aside, again, *_ = sizes
    assert at_guess == again == 0 < aside < 1e-3


@needs_cpu
@pytest.mark.parametrize("guess", [X.new_tensor([1e-9, 1.0, 2.0, 100.0]), X.new_zeros(4)])
def test_a_function_that_is_undefined_close_to_the_guess(guess):
    def fn(x, theta):
        if not torch.linalg.cholesky_ex(torch.diag(x + 1e-9))[1].sum() == 0:
            raise ValueError("outside of the domain")
        return 0.5 * torch.cos(x) + 1 + theta / 9

    def logarithmic(x, theta):
        return (torch.log(x + 1e-12) - theta).square().sum()

    for factory, function in ((solvers.fixed_point_iteration, fn), (solvers.lbfgs, logarithmic)):
        auto, off = (factory(function, compile=c, **SHORT).run(guess, THETA)[0] for c in ("auto", "off"))
        torch.testing.assert_close(auto, off, rtol=1e-8, atol=1e-10)


@needs_cpu
@pytest.mark.parametrize("factory", [solvers.newton, solvers.anderson, solvers.levenberg_marquardt])
def test_a_search_is_recorded_inside_of_a_checkpoint(factory):
    """A checkpoint counts the tensors that are saved; a first and a later call have to save as many."""
    fn = image if factory is solvers.anderson else lambda x, theta: x - image(x, theta)

    def loss(theta):
        return weighted(factory(fn).run(X, theta)[0])

    inside, outside = THETA.clone().requires_grad_(), THETA.clone().requires_grad_()
    checkpoint(loss, inside, use_reentrant=False).backward()
    loss(outside).backward()
    torch.testing.assert_close(inside.grad, outside.grad)


@needs_cpu
def test_a_function_that_cannot_be_repeated_is_compiled_all_the_same():
    """The recorder sees its operations as derivatives see them, in each evaluation."""

    def residual(x, theta):
        return x + without_gradients(x, theta) / 9 - theta

    found, expected = (solvers.newton(residual, compile=c).run(X, THETA)[0] for c in ("always", "off"))
    torch.testing.assert_close(found, expected)
