"""Conditions that torch.func cannot transform: first derivatives by backward(), and an error under a transform."""

import pytest
import torch
from tables.solvers import MINIMISERS, factories
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

from implicitdiff import TransformError, custom_fixed_point, custom_root, linear_solve, root_vjp, solvers

F64 = torch.float64
T = torch.tensor([4.0, 9.0], dtype=F64)
BY_HAND = 0.5 / T.sqrt()  # d sqrt(t) / dt


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return w * g, x * g


class Blind(torch.autograd.Function):
    """The same where no operation of torch uses the parameter."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.saved = x.numpy().copy(), w.detach().numpy()
        return torch.from_numpy(ctx.saved[0] * ctx.saved[1])

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved
        return torch.from_numpy(w) * g, torch.from_numpy(x) * g


@torch.library.custom_op("implicitdiff_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


square.register_autograd(lambda ctx, g: 2 * ctx.saved_tensors[0] * g, setup_context=_keep)


def hooked(register):
    net = nn.Linear(2, 2, bias=False, dtype=F64)
    nn.init.eye_(net.weight)
    getattr(net, register)(lambda *args: None)
    return net


def forces(x, t):
    return torch.autograd.grad((x**3 / 3 - t * x).sum(), x, create_graph=True)[0]


W = nn.Parameter(torch.ones(2, dtype=F64))
HOOKED, BEFORE = hooked("register_full_backward_hook"), hooked("register_full_backward_pre_hook")
# Each the square of x, and the words that name it in an error.
SQUARES = {
    "function": (Square.apply, "the autograd.Function Square"),
    "function of a parameter": (lambda x: Scale.apply(x * x, W), "the autograd.Function Scale"),
    "function of a hidden parameter": (lambda x: Blind.apply(x * x, W), "the autograd.Function Blind"),
    "custom operator": (square, "the custom operator implicitdiff_tests_square"),
    "backward hook": (lambda x: HOOKED(x) ** 2, "a full backward hook"),
    "backward pre-hook": (lambda x: BEFORE(x) ** 2, "a full backward hook"),
    "reentrant checkpoint": (
        lambda x: checkpoint(lambda x: x * x, x, use_reentrant=True),
        "a reentrant checkpoint",
    ),
}
# torch has no gradient with respect to given inputs through a reentrant checkpoint.
DIFFERENTIABLE = [name for name in SQUARES if name != "reentrant checkpoint"]
CONDITIONS = {name: (lambda x, t, sq=sq: sq(x) - t, words) for name, (sq, words) in SQUARES.items()}
CONDITIONS["torch.autograd.grad"] = (forces, "torch.autograd.grad")
ROOTS = [name for name in CONDITIONS if name != "reentrant checkpoint"]
FACTORIES = ["newton", "broyden_root", "gauss_newton", "levenberg_marquardt", "scipy_root"]
LINEAR = ["solve_auto", "solve_lu", "solve_gmres", "solve_cg", "solve_bicgstab", "solve_normal_cg", "solve_lstsq"]


def by_backward(f, wanted=()):
    t = T.clone().requires_grad_()
    return torch.autograd.grad(f(t).sum(), [t, *wanted])


def decorated(condition, **options):
    return lambda t: custom_root(condition, **options)(lambda init, t: t.sqrt())(None, t)


@pytest.mark.parametrize("name", ROOTS)
def test_a_first_derivative_needs_autograd_alone(name):
    condition, _ = CONDITIONS[name]
    torch.testing.assert_close(by_backward(decorated(condition))[0], BY_HAND)
    fixed_point = custom_fixed_point(lambda x, t: x - 0.1 * condition(x, t))(lambda init, t: t.sqrt())
    torch.testing.assert_close(by_backward(lambda t: fixed_point(None, t))[0], BY_HAND)


@pytest.mark.parametrize("name", ["function of a parameter", "function of a hidden parameter"])
def test_a_parameter_in_a_custom_function_has_its_derivative(name):
    # w x^2 = t, so dx/dw = -x / (2 w).
    for f in (decorated(CONDITIONS[name][0]), lambda t: solvers.newton(CONDITIONS[name][0]).run(T / 3, t)[0]):
        t_bar, w_bar = by_backward(f, [W])
        torch.testing.assert_close(t_bar, BY_HAND)
        torch.testing.assert_close(w_bar, -T.sqrt() / 2)


def test_a_result_of_operations_in_a_custom_function_has_its_derivative():
    raw = torch.zeros(2, dtype=F64, requires_grad=True)
    w = raw.exp()
    t_bar, raw_bar = by_backward(decorated(lambda x, t: Scale.apply(x * x, w) - t), [raw])
    torch.testing.assert_close(t_bar, BY_HAND)
    torch.testing.assert_close(raw_bar, -T.sqrt() / 2)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", ROOTS)
def test_solvers_of_roots_need_autograd_alone(name, factory):
    solver = getattr(solvers, factory)(CONDITIONS[name][0])
    torch.testing.assert_close(by_backward(lambda t: solver.run(T / 4, t)[0])[0], BY_HAND, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factory", [*factories(MINIMISERS), solvers.scipy_minimize])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_minimisers_need_autograd_alone(name, factory):
    sq, _ = SQUARES[name]
    if name == "function of a hidden parameter":
        pytest.skip("NumPy has no second derivative")
    solver = factory(lambda x, t: (sq(x) * x / 3 - t * x).sum())
    torch.testing.assert_close(by_backward(lambda t: solver.run(T / 3, t)[0])[0], BY_HAND, rtol=1e-5, atol=0)


@pytest.mark.parametrize("solve", LINEAR)
@pytest.mark.parametrize("name", ROOTS)
def test_linear_solvers_need_autograd_alone(name, solve):
    if name == "function of a hidden parameter" and solve in ("solve_bicgstab", "solve_normal_cg", "solve_lstsq"):
        pytest.skip("products with the Jacobian differentiate the backward pass, which NumPy has no derivative of")
    f = decorated(CONDITIONS[name][0], solve=getattr(linear_solve, solve)())
    torch.testing.assert_close(by_backward(f)[0], BY_HAND, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in ROOTS if "parameter" not in n])
def test_in_a_checkpoint_it_is_evaluated_again(name):
    f = decorated(CONDITIONS[name][0])
    torch.testing.assert_close(by_backward(lambda t: checkpoint(f, t, use_reentrant=False))[0], BY_HAND)


@pytest.mark.parametrize("name", [n for n in ROOTS if "parameter" not in n])
def test_a_product_alone_needs_autograd_alone(name):
    with torch.no_grad():
        (t_bar,) = root_vjp(CONDITIONS[name][0], T.sqrt(), (T,), torch.ones(2, dtype=F64))
    torch.testing.assert_close(t_bar, BY_HAND)


def twice(f):
    t = T.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(t).sum(), t, create_graph=True)
    return torch.autograd.grad(first.sum(), t)[0]


TRANSFORMS = {
    "grad": (lambda f: grad(lambda t: f(t).sum())(T), BY_HAND),
    "jvp": (lambda f: jvp(f, (T,), (T,))[1], T * BY_HAND),
    "hessian": (lambda f: hessian(lambda t: f(t).sum())(T), torch.diag(-0.25 * T**-1.5)),
    "vmap of grad": (lambda f: vmap(grad(lambda t: f(t).sum()))(T[None])[0], BY_HAND),
    "autograd twice": (twice, -0.25 * T**-1.5),
}
# What torch may be able to transform, depending on what it has done before.
SOMETIMES = {("custom operator", transform) for transform in TRANSFORMS} | {("torch.autograd.grad", "autograd twice")}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CONDITIONS)
def test_under_a_transform_the_operation_is_named(name, transform):
    condition, words = CONDITIONS[name]
    take, by_hand = TRANSFORMS[transform]
    try:
        found = take(decorated(condition))
    except TransformError as error:
        assert words in str(error)
    else:
        assert (name, transform) in SOMETIMES
        torch.testing.assert_close(found, by_hand)


class Kernel(torch.autograd.Function):
    """exp(-d / 2 l^2), whose backward pass multiplies by what the forward pass has computed."""

    @staticmethod
    def forward(ctx, d, scale):
        k = torch.exp(-d / (2 * scale**2))
        ctx.save_for_backward(k * d / scale**3)
        return k

    @staticmethod
    def backward(ctx, g):
        return None, (g * ctx.saved_tensors[0]).sum()


def likelihood(kernel):
    x = torch.linspace(-2, 2, 8, dtype=F64)
    y, distances, eye = torch.sin(2 * x), (x[:, None] - x) ** 2, torch.eye(8, dtype=F64)

    def negative(p, noise):
        K = kernel(distances, p.exp()) + noise * eye
        return 0.5 * y @ torch.linalg.solve(K, y) + 0.5 * torch.logdet(K)

    return negative


def test_solvers_within_transforms_within_such_a_function():
    inner = custom_root(lambda y, x: y**3 - x)(lambda init, x: x.sign() * x.abs() ** (1 / 3))
    gradient = solvers.lbfgs(lambda x, t: (Square.apply(x) * x / 3 - t * x).sum()).optimality_fn

    def condition(x, t):
        cube_root = grad(lambda x: inner(None, x).detach() * x)(x[0])
        return gradient(x, t) + 0 * cube_root

    torch.testing.assert_close(by_backward(decorated(condition))[0], BY_HAND)


def test_a_derivative_that_is_right_only_once_is_refused():
    noise = torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = torch.zeros((), dtype=F64)
    with pytest.raises(ValueError, match="cannot be differentiated twice"):
        solvers.lbfgs(likelihood(Kernel.apply)).run(start, noise)
    # Where its first derivative is enough, it is right: the weights that a kernel gives to data.
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(custom_root(weights(kernel))(solved)(None, scale).square().sum(), scale)[0]
        for kernel in (Kernel.apply, lambda d, scale: torch.exp(-d / (2 * scale**2)))
    )
    torch.testing.assert_close(found, expected)


X = torch.linspace(-2, 2, 8, dtype=F64)


def weights(kernel):
    return lambda a, scale: kernel((X[:, None] - X) ** 2, scale) @ a + 0.1 * a - torch.sin(2 * X)


def solved(init, scale):
    K = torch.exp(-((X[:, None] - X) ** 2) / (2 * scale**2)) + 0.1 * torch.eye(8, dtype=F64)
    return torch.linalg.solve(K, torch.sin(2 * X))


TWO = torch.tensor([1.5, 0.5], dtype=F64)
# Each with what it captures as a function of a leaf; written in operations of torch beside it.
OVERLAPPING = {
    "a leaf and its square": lambda a: (a, a * a),
    "two of one leaf": lambda a: (a.exp(), a.sin() + 2),
    "a chain": lambda a: ((b := a.exp()), b.sqrt()),
    "the leaf twice": lambda a: (a, a),
}
USES = {
    "gradient": lambda x, t, b, c: torch.autograd.grad((b * c * x**3 / 3 - t * x).sum(), x, create_graph=True)[0],
    "function": lambda x, t, b, c: Scale.apply(Square.apply(x), b) * c - t,
    "both": lambda x, t, b, c: Scale.apply(x * x * b, b) * c - t,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("captured", OVERLAPPING)
def test_what_hangs_on_each_other_is_counted_once(captured, use):
    a = TWO.clone().requires_grad_()
    b, c = OVERLAPPING[captured](a)
    found = by_backward(decorated(lambda x, t: USES[use](x, t, b, c)), [a])
    # At the point that `decorated` takes for the solution: -F / F_x, with F_x held.
    a, t = (tensor.clone().requires_grad_() for tensor in (TWO, T))
    b, c = OVERLAPPING[captured](a)
    factor = b * c * (b if use == "both" else 1)
    expected = torch.autograd.grad((-(factor * T - t) / (2 * factor.detach() * T.sqrt())).sum(), [t, a])
    torch.testing.assert_close(found, expected)


class Cube(torch.autograd.Function):
    """Has a right derivative, and a wrong derivative of that."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def energy(x, t):
    return (Cube.apply(x) / 3 + x**2 - t * x).sum()


START = torch.tensor([1.5, 2.0], dtype=F64)
FIT = solvers.lbfgs(energy)


def columns(matvec, b):
    return torch.linalg.solve(torch.stack([matvec(e) for e in torch.eye(2, dtype=F64)], 1), b)


def within_a_condition(t):
    return custom_root(lambda z, t: z - FIT.run(START, t)[0])(lambda init, t: (1 + t).sqrt() - 1)(None, t)


ROUTES = {
    "backward": lambda t: FIT.run(START, t)[0],
    "checkpoint": lambda t: checkpoint(lambda t: FIT.run(START, t)[0], t, use_reentrant=False),
    "a solve of the user": lambda t: solvers.lbfgs(energy, solve=columns).run(START, t)[0],
    "a nested solver": within_a_condition,
    "root_vjp": lambda t: root_vjp(FIT.optimality_fn, (1 + t).sqrt() - 1, (t,), torch.ones(2, dtype=F64))[0],
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_wrong_second_derivative_is_refused_on_every_route(route):
    with torch.set_grad_enabled(route != "root_vjp"), pytest.raises(ValueError, match="cannot be differentiated twice"):
        by_backward(ROUTES[route])


def test_a_search_whose_derivative_nobody_can_take_is_not_checked():
    torch.testing.assert_close(FIT.run(START, T)[0], (1 + T).sqrt() - 1, rtol=1e-6, atol=0)


class Named(torch.autograd.Function):
    """A function that keeps a number under the name that a leaf has in a graph of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = 3
        return x**ctx.variable

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def test_a_function_may_call_what_it_keeps_variable():
    """3 (x - 1) has the derivative 3 everywhere, that of the backward pass."""
    parameter = torch.tensor([8.0], dtype=F64, requires_grad=True)
    solve = custom_root(lambda x, t: Named.apply(x) - Named.apply(t))(lambda x, t: t.detach().clone())
    solve(torch.ones(1, dtype=F64), parameter).sum().backward()
    torch.testing.assert_close(parameter.grad, torch.ones(1, dtype=F64))
