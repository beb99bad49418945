"""Every tensor that a condition captures is differentiated, however it is captured."""

from __future__ import annotations

import dataclasses
import functools
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

from implicitdiff import custom_fixed_point, custom_root
from implicitdiff.linear_solve import solve_lu

F64 = torch.float64
THETA = torch.tensor([4.0, 9.0], dtype=F64)


def solve_with(condition):
    """The root of x -> x^2 - theta, for conditions that are equivalent to it."""
    return lambda theta: custom_root(condition(theta))(lambda init: theta.sqrt())(None)


@dataclasses.dataclass
class Holder:
    value: torch.Tensor

    @property
    def doubled(self):
        return 2 * self.value

    def condition(self, x):
        return x**2 - self.value

    def __call__(self, x):
        return x**2 - self.value


class Residual(nn.Module):
    def __init__(self, theta):
        super().__init__()
        self.register_buffer("theta", theta)

    def forward(self, x):
        return x**2 - self.theta


class Square(torch.autograd.Function):
    """x^2 - theta as a custom Function: the condition's operations do not show its operands."""

    @staticmethod
    def forward(x, theta):
        return x**2 - theta

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g, -g

    @staticmethod
    def jvp(ctx, dx, dtheta):
        return 2 * ctx.saved_tensors[0] * dx - dtheta

    @staticmethod
    def vmap(info, in_dims, x, theta):
        x, theta = (t if d is None else t.movedim(d, 0) for t, d in zip((x, theta), in_dims, strict=True))
        return Square.apply(*torch.broadcast_tensors(x, theta)), 0


CONDITIONS = {
    "closure": lambda theta: lambda x: x**2 - theta,
    "default argument": lambda theta: lambda x, theta=theta: x**2 - theta,
    "partial": lambda theta: functools.partial(lambda t, x: x**2 - t, theta),
    "partial by keyword": lambda theta: functools.partial(lambda x, t: x**2 - t, t=theta),
    "bound method": lambda theta: Holder(theta).condition,
    "callable object": lambda theta: Holder(theta),
    "property": lambda theta: lambda x: x**2 - Holder(theta).doubled / 2,
    "container": lambda theta: lambda x, box={"a": [theta]}: x**2 - box["a"][0],
    "module": lambda theta: Residual(theta),
    "functional_call": lambda theta: lambda x: functional_call(Residual(0 * THETA), {"theta": theta}, (x,)),
    "stacked": lambda theta: lambda x: x**2 - torch.stack([theta, theta])[0],
    "indexed": lambda theta: lambda x: x**2 - torch.stack([theta[0], theta[1]]),
    "keyword of an operation": lambda theta: lambda x: torch.add(x**2, other=theta, alpha=-1),
    "where": lambda theta: lambda x: torch.where(x > 0, x**2 - theta, theta),
    "einsum": lambda theta: lambda x: x**2 - torch.einsum("i,ij->j", theta, torch.eye(2, dtype=F64)),
    "in-place on a fresh tensor": lambda theta: lambda x: (x**2).sub_(theta),
    "gradient of an objective": lambda theta: grad(lambda x: (x**3 / 3 - theta * x).sum()),
    "argument of an inner grad": lambda theta: lambda x: grad(lambda x, t: (x**3 / 3 - t * x).sum())(x, theta),
    "differentiated by an inner grad": lambda theta: lambda x: x**2 - grad(lambda t: (t**2 / 2).sum())(theta),
    "differentiated by an inner vjp": lambda theta: (
        lambda x: x**2 - vjp(lambda t: t**2 / 2, theta)[1](torch.ones_like(x))[0]
    ),
    "primal of an inner jvp": lambda theta: (
        lambda x: x**2 - jvp(lambda t: t**2 / 2, (theta,), (torch.ones_like(x),))[1]
    ),
    "argument of an inner vmap": lambda theta: lambda x: vmap(lambda x, t: x**2 - t)(x, theta),
    "captured by an inner vmap": lambda theta: (
        lambda x: vmap(lambda x, i: x**2 - (theta * i).sum())(x, torch.eye(2, dtype=F64))
    ),
    "inner hessian": lambda theta: (
        lambda x: hessian(lambda x: (x**3 / 3 - theta * x).sum())(x).diagonal() * x / 2 - theta
    ),
    "custom Function": lambda theta: lambda x: Square.apply(x, theta),
    "inner linear solve": lambda theta: lambda x: x**2 - solve_lu()(lambda v: v / theta, torch.ones_like(x)),
    "inner fixed point": lambda theta: (
        lambda x: x**2 - custom_fixed_point(lambda z: z / 2 + theta / 2)(lambda i: theta)(0)
    ),
}


def autograd_of(f):
    theta = THETA.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(theta).sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta)
    return first.detach(), second


TRANSFORMS = {
    "autograd": autograd_of,
    "grad": lambda f: (grad(lambda t: f(t).sum())(THETA), grad(lambda t: grad(lambda t: f(t).sum())(t).sum())(THETA)),
    "hessian": lambda f: (jacfwd(f)(THETA).diagonal(), hessian(lambda t: f(t).sum())(THETA).diagonal()),
    "vmap": lambda f: tuple(
        vmap(g)(torch.stack([THETA, 2 * THETA]))[0]
        for g in (grad(lambda t: f(t).sum()), grad(lambda t: grad(lambda t: f(t).sum())(t).sum()))
    ),
    "grad of vmap": lambda f: (
        grad(lambda b: vmap(f)(b).sum())(torch.stack([THETA, 2 * THETA]))[0],
        grad(lambda b: grad(lambda b: vmap(f)(b).sum())(b).sum())(torch.stack([THETA, 2 * THETA]))[0],
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_captured_tensor_is_differentiated_twice(condition, transform):
    first, second = TRANSFORMS[transform](solve_with(CONDITIONS[condition]))
    torch.testing.assert_close(first, 0.5 * THETA**-0.5, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second, -0.25 * THETA**-1.5, rtol=1e-9, atol=1e-12)


def test_parameters_of_a_captured_module_get_the_unrolled_gradients_to_second_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(F64)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    x = torch.tensor([0.1, -0.4, 0.7], dtype=F64)

    def iterate(z):
        for _ in range(60):
            z = torch.tanh(net(z) + x)
        return z

    implicit = custom_fixed_point(lambda z: torch.tanh(net(z) + x))(iterate)(torch.zeros(3, dtype=F64))
    unrolled = iterate(torch.zeros(3, dtype=F64))
    parameters = list(net.parameters())
    results = []
    for z in implicit, unrolled:
        first = torch.autograd.grad((z**2).sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), parameters)
        results.append((*first, *second))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in parameters)


def test_a_graph_behind_a_captured_tensor_is_followed():
    log_theta = THETA.log().requires_grad_()
    theta = log_theta.exp()
    x = custom_root(lambda x: x**2 - theta)(lambda init: theta.sqrt())(None)
    (found,) = torch.autograd.grad(x.sum(), log_theta)
    torch.testing.assert_close(found, 0.5 * THETA.sqrt())


def test_a_batched_integer_may_be_captured():
    def pick(i):
        return custom_root(lambda x: x**2 - THETA[i])(lambda init: THETA[i].sqrt())(None)

    torch.testing.assert_close(vmap(pick)(torch.tensor([1, 0])), THETA.flip(0).sqrt())


def test_a_solver_may_differentiate_inside_without_confusing_the_levels():
    """The solver runs transforms of its own on tensors that outer transforms of the same kind are tracking."""

    def solve(theta):
        def solver(init):
            x = torch.ones_like(theta)
            for _ in range(8):
                f, df = x**2 - theta, grad(lambda x: (x**3 / 3 - theta * x * x / x).sum())(x)
                x = x - f / vmap(grad(lambda x, t: x**2 - t))(x, theta) + 0 * (df - f)
            return x

        return custom_root(lambda x: x**2 - theta)(solver)(None)

    for f in TRANSFORMS.values():
        first, second = f(solve)
        torch.testing.assert_close(first, 0.5 * THETA**-0.5, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(second, -0.25 * THETA**-1.5, rtol=1e-9, atol=1e-12)


def test_dual_tensors_of_plain_forward_mode_may_be_captured():
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        theta = forward_ad.make_dual(THETA, torch.ones(2, dtype=F64))
        x = custom_root(lambda x: x**2 - theta)(lambda init: theta.sqrt())(None)
        tangent = forward_ad.unpack_dual(x).tangent
    torch.testing.assert_close(tangent, 0.5 * THETA**-0.5)


def test_a_constant_that_is_captured_costs_no_operand():
    theta = THETA.clone().requires_grad_()
    constant = torch.ones(2, dtype=F64)
    x = custom_root(lambda x: constant * x**2 - theta)(lambda init: theta.detach().sqrt())(None)
    assert len(x.grad_fn.next_functions) == 2  # the solution and theta


# ruff: noqa: B023
def test_a_loop_may_go_on_before_the_derivative_is_taken():
    """Captured variables are those of the call, as they are for plain autograd, whatever they are bound to later."""
    theta = THETA.clone().requires_grad_()
    solutions = []
    for scale, shift in (1.0, torch.zeros(2, dtype=F64)), (4.0, torch.ones(2, dtype=F64)):

        def condition(x):
            return residual(x) + 0 * scale

        def residual(x):
            return scale * (x - shift) ** 2 - theta

        solver = custom_root(torch.func.grad(lambda x: (scale * (x - shift) ** 3 / 3 - theta * x).sum()))
        solutions.append(solver(lambda init: (theta.detach() / scale).sqrt() + shift)(None))
        solutions.append(custom_root(condition)(lambda init: (theta.detach() / scale).sqrt() + shift)(None))
    scale, shift = None, None
    (found,) = torch.autograd.grad(sum(x.sum() for x in solutions), theta)
    torch.testing.assert_close(found, 2 * (0.5 * THETA**-0.5 + 0.25 * THETA**-0.5))


def test_a_name_may_be_bound_again_inside_of_a_transform():
    def function(theta):
        x = custom_root(lambda x: x**2 - theta)(lambda init: theta.sqrt())(None)
        theta = 2 * theta
        return (x * theta).sum()

    torch.testing.assert_close(grad(function)(THETA), 3 * THETA.sqrt())
    theta = THETA.clone().requires_grad_()
    function(theta).backward()
    torch.testing.assert_close(theta.grad, 3 * THETA.sqrt())


def test_module_variables_are_those_of_the_call():
    source = """
import torch
from implicitdiff import custom_root
losses = []
for scale in (1.0, 4.0):
    def residual(x, theta):
        return scale * x**2 - theta
    solver = custom_root(lambda x, theta: residual(x, theta))
    losses.append(solver(lambda init, theta: (theta / scale).sqrt())(None, theta))
"""
    theta = THETA.clone().requires_grad_()
    names = {"theta": theta, "__name__": "a_script"}
    exec(source, names)
    (found,) = torch.autograd.grad(sum(x.sum() for x in names["losses"]), theta)
    torch.testing.assert_close(found, 0.75 * THETA**-0.5)


def test_a_constant_that_is_overwritten_before_the_derivative_is_refused():
    theta, buffer = THETA.clone().requires_grad_(), torch.ones(2, dtype=F64)
    x = custom_root(lambda x: buffer * x**2 - theta)(lambda init: theta.detach().sqrt())(None)
    buffer.fill_(5)
    with pytest.raises(RuntimeError, match="changed in place since the call"):
        x.sum().backward()


def test_a_parameter_that_is_replaced_before_the_derivative_is_differentiated_as_it_was():
    net = nn.Linear(2, 2).to(F64)
    old = net.bias
    x = custom_root(lambda x: x - net(torch.zeros_like(x)))(lambda init: net.bias.detach())(None)
    net.bias = nn.Parameter(torch.zeros(2, dtype=F64))
    x.sum().backward()
    torch.testing.assert_close(old.grad, torch.ones(2, dtype=F64))
    assert net.bias.grad is None


class Equilibrium(nn.Module):
    """``z = w z + x``, solved inside."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def condition(self, z, x):
        return z - self.w * z - x

    def forward(self, x):
        return custom_root(self.condition)(lambda init, x: x / (1 - self.w))(torch.zeros_like(x), x)


class EquilibriumByLambda(Equilibrium):
    def forward(self, x):
        return custom_root(lambda z, x: z - self.w * z - x)(lambda init, x: x / (1 - self.w))(torch.zeros_like(x), x)


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("module", [Equilibrium, EquilibriumByLambda])
def test_a_module_that_solves_inside_may_be_called_functionally(module, needs_gradient):
    # functional_call puts the module's own parameters back before the derivative is taken.
    model = module().requires_grad_(needs_gradient)
    w, x = torch.tensor([0.8, 0.4], dtype=F64), torch.tensor(2.0, dtype=F64)

    def f(w, x):
        return functional_call(model, {"w": w}, (x,))

    torch.testing.assert_close(vmap(grad(f), in_dims=(0, None))(w, x), x / (1 - w) ** 2)
    torch.testing.assert_close(vmap(grad(f, argnums=1), in_dims=(0, None))(w, x), 1 / (1 - w))
    torch.testing.assert_close(vmap(grad(grad(f)), in_dims=(0, None))(w, x), 2 * x / (1 - w) ** 3)
    torch.testing.assert_close(vmap(jacfwd(f), in_dims=(0, None))(w, x), x / (1 - w) ** 2)


def untouched(theta):
    return lambda x: x**2 - vmap(lambda i: theta)(torch.ones(1))[0]


def subclassed(theta):
    return lambda x: x**2 - theta.as_subclass(torch.Tensor)


@pytest.mark.parametrize("condition", [untouched, subclassed])
def test_a_capture_that_cannot_be_seen_is_refused_at_the_call(condition):
    theta = THETA.clone().requires_grad_()
    with pytest.raises(ValueError, match="the library cannot find"):
        custom_root(condition(theta))(lambda init: theta.sqrt())(None)
    with pytest.raises((ValueError, RuntimeError)):
        grad(lambda t: custom_root(condition(t))(lambda init: t.sqrt())(None).sum())(THETA)


class WithoutContext:
    """A proxy as of a web framework, outside of a request."""

    @property
    def __class__(self):
        raise RuntimeError("there is no request")


class Odd:
    __class__ = 3


def reference_of_a_dead_object():
    held = Holder(THETA)
    return weakref.proxy(held)


@pytest.mark.parametrize("make", [reference_of_a_dead_object, WithoutContext, Odd])
def test_a_proxy_without_a_value_may_lie_beside_what_is_captured(make):
    bystander = make()

    def condition(x, t):
        return x**2 - t if bystander is not None else x

    found = grad(lambda t: custom_root(condition)(lambda init, t: t.sqrt())(None, t).sum())(THETA)
    torch.testing.assert_close(found, 0.5 / THETA.sqrt())


def test_a_solver_may_differentiate_in_what_it_captures():
    def solve(theta):
        solver = custom_root(lambda x: x**2 - theta)
        return solver(lambda init: grad(lambda t: (t**2 / 2).sum())(theta).sqrt())(None)

    for f in TRANSFORMS.values():
        torch.testing.assert_close(f(solve)[0], 0.5 * THETA**-0.5)


def test_autocast_at_the_call_holds_for_the_derivative_and_not_for_the_linear_algebra():
    # A product of two dtypes, which only autocast allows.
    weight = torch.tensor([[0.5, 0.25], [0.0, 0.5]], dtype=torch.float16)
    theta = torch.ones(2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = custom_fixed_point(lambda z, theta: (weight @ z).float() + theta)(
            lambda z, theta: torch.tensor([6.0, 4.0]) * 0.5 * theta
        )(torch.zeros(2), theta)
    z.sum().backward()
    torch.testing.assert_close(theta.grad, torch.tensor([2.0, 3.0]), rtol=1e-6, atol=0)
