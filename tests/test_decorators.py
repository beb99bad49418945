"""What a decorated solver sees, what it gives back, and what it refuses."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from implicitdiff import NotARootError, custom_fixed_point, custom_root, root_jvp, root_vjp

F64 = torch.float64
THETA = torch.tensor([4.0, 9.0], dtype=F64)


def square_condition(x, theta):
    return x**2 - theta


def square_root(init, theta):
    return theta.sqrt()


root = custom_root(square_condition)(square_root)


def test_solver_sees_detached_values_that_keep_their_flags_and_no_gradient_mode():
    seen = {}

    @custom_root(square_condition)
    def solver(init, theta):
        seen.update(
            init=init.requires_grad, theta=theta.requires_grad, leaf=theta.is_leaf, mode=torch.is_grad_enabled()
        )
        return theta.detach().sqrt()

    theta = (2 * THETA.clone().requires_grad_()) / 2
    solver(torch.ones(2), theta)
    assert seen == {"init": False, "theta": True, "leaf": True, "mode": False}


def test_solver_may_work_in_place_on_its_guess_and_leaves_no_trace():
    @custom_root(square_condition)
    def solver(init, theta):
        for _ in range(30):
            init.copy_((init + theta / init) / 2)
        return init

    init = torch.ones(2, dtype=F64, requires_grad=True)
    theta = THETA.clone().requires_grad_()
    x = solver(init, theta)
    x.sum().backward()
    assert torch.equal(init.detach(), torch.ones(2, dtype=F64))
    assert init.grad is None
    torch.testing.assert_close(theta.grad, 0.5 / THETA.sqrt())


def test_initial_guess_has_zero_gradient():
    init = torch.ones(2, dtype=F64)
    assert torch.equal(grad(lambda init: root(init, THETA).sum())(init), torch.zeros(2, dtype=F64))
    # Also where the solver returns the guess itself, and the guess depends on what is differentiated.
    identity = custom_root(square_condition)(lambda init, theta: init)
    found = grad(lambda theta: identity(theta.sqrt(), THETA).sum())(THETA)
    assert torch.equal(found, torch.zeros(2, dtype=F64))


def scipy_solver(init, theta):
    found = scipy.optimize.fsolve(lambda x: x**2 - theta.numpy(), np.ones(2), xtol=1e-14)
    return torch.from_numpy(found)


def autograd_solver(init, theta):
    x = torch.ones_like(theta).requires_grad_()
    for _ in range(200):
        with torch.enable_grad():
            (g,) = torch.autograd.grad((x**3 / 3 - theta * x).sum(), x)
        x = (x - 0.1 * g).detach().requires_grad_()
    return x


def backward_solver(init, theta):
    x = torch.ones_like(theta).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        with torch.enable_grad():
            (x**3 / 3 - theta * x).sum().backward()
        optimizer.step()
    return x


def host_loop_solver(init, theta):
    x = torch.ones_like(theta)
    while bool((x**2 - theta).abs().max() > 1e-13):
        x = (x + theta / x) / 2
    return x


@pytest.mark.parametrize("solver", [scipy_solver, autograd_solver, backward_solver, host_loop_solver])
@pytest.mark.parametrize("captures", [False, True], ids=["given", "captured"])
def test_any_solver_works_inside_of_transforms(solver, captures):
    def function(theta):
        if captures:
            return custom_root(lambda x: x**2 - theta)(lambda init: solver(init, theta))(None)
        return custom_root(square_condition)(solver)(None, theta)

    first, second = torch.diag(0.5 / THETA.sqrt()), -0.25 * THETA**-1.5
    for jacobian in jacrev, jacfwd:
        torch.testing.assert_close(jacobian(function)(THETA), first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hessian(lambda t: function(t).sum())(THETA), torch.diag(second), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(jacfwd(jacfwd(function))(THETA).sum((1, 2)), second, rtol=1e-9, atol=1e-12)


def test_a_solver_that_needs_plain_tensors_says_so_under_vmap():
    with pytest.raises(RuntimeError):
        vmap(lambda t: custom_root(square_condition)(autograd_solver)(None, t))(THETA[:, None])


def test_aux_is_detached_in_both_modes_and_may_hold_anything():
    @custom_root(square_condition, has_aux=True)
    def solver(init, theta):
        return theta.sqrt(), {"residual": theta * 2, "steps": 7, "converged": torch.tensor(True), "note": "fine"}

    theta = THETA.clone().requires_grad_()
    x, aux = solver(None, theta)
    assert x.requires_grad and not aux["residual"].requires_grad
    assert (aux["steps"], aux["note"], bool(aux["converged"])) == (7, "fine", True)
    with forward_ad.dual_level():
        x, aux = solver(None, forward_ad.make_dual(THETA, torch.ones(2, dtype=F64)))
        assert forward_ad.unpack_dual(x).tangent is not None
        assert forward_ad.unpack_dual(aux["residual"]).tangent is None

    def pair(theta):
        x, aux = solver(None, theta)
        return x, aux["residual"]

    _, tangent, _ = jvp(pair, (THETA,), (THETA,), has_aux=True)
    torch.testing.assert_close(tangent, THETA.sqrt() / 2)
    _, aux = vmap(pair)(THETA[:, None])
    torch.testing.assert_close(aux, 2 * THETA[:, None])


def test_has_aux_wants_a_pair():
    with pytest.raises(TypeError, match=r"square_root must return \(solution, aux\)"):
        custom_root(square_condition, has_aux=True)(square_root)(None, THETA)


Point = namedtuple("Point", ["x", "y"])


def test_trees_of_every_kind_go_in_and_come_out():
    """Nested dictionaries, namedtuples, None, strings, callables, 0-dim tensors, float32 beside float64."""

    def condition(sol, problem, options):
        a, b = problem["a"], problem["rest"][0]
        first = sol["points"].x ** 2 - a
        second = sol["points"].y ** 3 - b.to(torch.float32) * options["scale"](sol["points"].x.sum().to(torch.float32))
        return OrderedDict([("points", Point(first, second)), ("note", None), ("kind", "root")])

    def solver(init, problem, options):
        x = problem["a"].sqrt()
        y = (problem["rest"][0].to(torch.float32) * options["scale"](x.sum().to(torch.float32))) ** (1 / 3)
        return OrderedDict([("points", Point(x, y)), ("note", None), ("kind", "root")])

    def function(a, b):
        options = {"scale": lambda s: 1 + s, "module": torch.nn.Identity(), "name": "n", "count": 3, "none": None}
        out = custom_root(condition)(solver)(None, {"a": a, "rest": (b, np.ones(2))}, options)
        assert isinstance(out["points"], Point) and out["kind"] == "root" and out["note"] is None
        assert (out["points"].x.dtype, out["points"].y.dtype) == (torch.float64, torch.float32)
        return out["points"].x.sum() + out["points"].y.to(F64)

    b = torch.tensor(2.0, dtype=F64)
    found = grad(function, argnums=(0, 1))(THETA, b)
    x = THETA.sqrt()
    y = (b * (1 + x.sum())) ** (1 / 3)
    dx = 0.5 / x
    torch.testing.assert_close(found[0], dx + b * dx / (3 * y**2), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], (1 + x.sum()) / (3 * y**2), rtol=1e-6, atol=0)


def test_scalar_unknowns_have_gradients():
    theta = torch.tensor(8.0, dtype=F64)
    cube = custom_root(lambda x, t: x**3 - t)(lambda init, t: t ** (1 / 3))
    assert grad(lambda t: cube(None, t))(theta).item() == pytest.approx(1 / 12)


def test_vmap_takes_unbatched_arguments_and_in_dims_inside_dictionaries():
    scaled = custom_root(lambda x, p: p["scale"] * x**2 - p["theta"])(lambda init, p: (p["theta"] / p["scale"]).sqrt())
    thetas = torch.stack([THETA, THETA + 1, THETA + 2], dim=1)
    scale = torch.tensor(2.0, dtype=F64)
    in_dims = (None, {"theta": 1, "scale": None})
    found = vmap(scaled, in_dims=in_dims)(torch.ones(2), {"theta": thetas, "scale": scale})
    torch.testing.assert_close(found, (thetas.T / 2).sqrt())

    def total(p):
        return vmap(scaled, in_dims=in_dims)(torch.ones(2), p).sum()

    grads = grad(total)({"theta": thetas, "scale": scale})
    torch.testing.assert_close(grads["theta"], 0.5 / (thetas * 2).sqrt())
    torch.testing.assert_close(grads["scale"], -0.25 * (thetas / 2).sqrt().sum())
    for chunk_size in 1, 2:
        torch.testing.assert_close(
            vmap(lambda t: root(None, t), in_dims=1, chunk_size=chunk_size)(thetas), thetas.T.sqrt()
        )


def test_argnums_restricts_the_arguments_and_not_what_is_captured():
    captured = torch.tensor(2.0, dtype=F64)

    def function(a, b, c):
        solver = custom_root(lambda x, a, b: x - a * b * c, argnums=2)(lambda init, a, b: a * b * captured)
        return solver(None, a, b)

    grads = grad(function, argnums=(0, 1, 2))(captured, 3 * captured, captured)
    assert [g.item() for g in grads] == [0.0, 4.0, 12.0]
    tangents = jvp(function, (captured, 3 * captured, captured), (captured, 0 * captured, 0 * captured))[1]
    assert tangents.item() == 0.0
    both = custom_root(lambda x, a, b: x - a * b, argnums=(1, 2))(lambda init, a, b: a * b)
    assert [g.item() for g in grad(lambda a, b: both(None, a, b), argnums=(0, 1))(captured, 3 * captured)] == [6.0, 2.0]


@pytest.mark.parametrize("argnums", [0, (0, 1), -1, (1, "a")])
def test_argnums_counts_from_the_guess_which_is_not_among_them(argnums):
    with pytest.raises((ValueError, TypeError), match="argnums must be integers >= 1"):
        custom_root(square_condition, argnums=argnums)


def test_a_result_unlike_the_solution_is_named_at_the_call_with_both_structures():
    cases = [
        (lambda x, t: (x**2 - t)[:1], r"expected float64\[2\], got float64\[1\]"),
        (lambda x, t: (x**2 - t).to(torch.float32), r"expected float64\[2\], got float32\[2\]"),
        (lambda x, t: {"x": x**2 - t}, r"got \{x: float64\[2\]\}"),
        (lambda x, t: None, "got None"),
    ]
    for condition, message in cases:
        with pytest.raises(ValueError, match=message):
            custom_root(condition)(square_root)(None, THETA)
    with pytest.raises(ValueError, match="custom_fixed_point: "):
        custom_fixed_point(lambda x, t: x[:1])(square_root)(None, THETA)


def test_a_solution_without_floating_tensors_is_refused():
    with pytest.raises(TypeError, match="the solution holds no tensor"):
        custom_root(square_condition)(lambda init, theta: None)(None, THETA)
    with pytest.raises(TypeError, match=r"torch.int64"):
        custom_root(square_condition)(lambda init, theta: torch.ones(2, dtype=torch.int64))(None, THETA)


def test_options_of_the_wrong_kind_are_refused_where_they_are_given():
    with pytest.raises(TypeError, match="must be a function"):
        custom_root(3)
    with pytest.raises(TypeError, match="solve must be a function"):
        custom_root(square_condition, solve="cg")
    with pytest.raises(ValueError, match="check must be"):
        custom_root(square_condition, check=-1.0)


def test_check_reports_a_solution_that_is_no_root_lane_by_lane():
    approximate = custom_root(square_condition, check=1e-6)(lambda init, theta: theta.sqrt() + init)
    good = torch.zeros(2, dtype=F64)
    approximate(good, THETA)
    with pytest.raises(NotARootError, match="square_condition") as caught:
        approximate(good + 0.1, THETA)
    residual = (((THETA.sqrt() + 0.1) ** 2 - THETA) ** 2).sum().sqrt()
    assert caught.value.residual == pytest.approx(residual.item())
    inits = torch.stack([good, good + 0.1, good, good + float("nan")])
    with pytest.raises(NotARootError, match="in 2 of 4 lanes") as caught:
        vmap(lambda init: grad(lambda t: approximate(init, t).sum())(THETA))(inits)
    assert (caught.value.failed, caught.value.total) == (2, 4)
    custom_root(square_condition)(lambda init, theta: theta.sqrt() + init)(good + 0.1, THETA)


def test_random_and_mutating_conditions_are_refused_at_the_call():
    def noisy(x, theta):
        return x**2 - theta + 0 * torch.rand(2, dtype=F64)

    with pytest.raises(ValueError, match="noisy draws random numbers"):
        custom_root(noisy)(square_root)(None, THETA)
    count = torch.zeros(())

    def counting(x, theta):
        count.add_(1)
        return x**2 - theta

    with pytest.raises(ValueError, match="counting changes a tensor of shape"):
        custom_root(counting)(square_root)(None, THETA)
    norm = torch.nn.BatchNorm1d(2, dtype=F64)
    with pytest.raises(ValueError, match="eval mode"):
        custom_root(lambda x: norm(x[None].expand(3, 2))[0] + x)(lambda init: init)(THETA)
    norm.eval()
    custom_root(lambda x: norm(x[None].expand(3, 2))[0] + x)(lambda init: init)(THETA)


def test_errors_in_the_solver_or_the_condition_leave_the_transforms_intact():
    def broken(*_):
        raise ZeroDivisionError("of the user's own")

    for solver in custom_root(broken)(square_root), custom_root(square_condition)(broken):
        for call in (
            lambda s=solver: s(None, THETA),
            lambda s=solver: grad(lambda t: s(None, t).sum())(THETA),
            lambda s=solver: vmap(lambda t: jacfwd(lambda t: s(None, t))(t))(THETA[:, None]),
        ):
            with pytest.raises((ZeroDivisionError, TypeError)):
                call()
            torch.testing.assert_close(grad(lambda t: root(None, t).sum())(THETA), 0.5 / THETA.sqrt())


def test_root_vjp_and_root_jvp_match_a_hand_made_jacobian():
    a = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=F64)

    def condition(x, theta, scale):
        return a @ x - scale["s"] * theta["t"]

    theta, scale = {"t": THETA, "i": torch.arange(3), "name": "t"}, {"s": torch.tensor(2.0, dtype=F64)}
    sol = torch.linalg.inv(a) @ (2 * THETA)
    cotangent = torch.tensor([1.0, -2.0], dtype=F64)
    grads = root_vjp(condition, sol, (theta, scale), cotangent)
    u = torch.linalg.inv(a).T @ cotangent
    torch.testing.assert_close(grads[0]["t"], 2 * u)
    torch.testing.assert_close(grads[1]["s"], u @ THETA)
    assert grads[0]["i"] is None and grads[0]["name"] is None
    tangent = root_jvp(condition, sol, (theta, scale), ({"t": cotangent, "i": None, "name": None}, None))
    torch.testing.assert_close(tangent, torch.linalg.inv(a) @ (2 * cotangent))
    torch.testing.assert_close(root_jvp(condition, sol, (theta, scale), (None, None)), torch.zeros(2, dtype=F64))


def test_root_products_refuse_trees_that_do_not_match():
    with pytest.raises(ValueError, match="root_vjp: cotangent"):
        root_vjp(square_condition, THETA, (THETA,), THETA[:1])
    with pytest.raises(TypeError, match="root_vjp: args must be a tuple"):
        root_vjp(square_condition, THETA, THETA, THETA)
    with pytest.raises(ValueError, match=r"root_jvp: tangents\[0\]"):
        root_jvp(square_condition, THETA, (THETA,), (THETA[:1],))
    with pytest.raises(ValueError, match="of length 1, got length 2"):
        root_jvp(square_condition, THETA, (THETA,), (THETA, THETA))


def test_root_vjp_of_one_solution_under_many_parameters_does_not_mix_the_lanes():
    thetas = torch.stack([THETA, 2 * THETA, 3 * THETA])
    a = torch.tensor([1.0, 2.0], dtype=F64)

    def condition(x, theta):
        return x * theta.sum() + a * x**2 - theta

    batched = vmap(lambda theta: root_vjp(condition, THETA, (theta,), a)[0])(thetas)
    looped = torch.stack([root_vjp(condition, THETA, (theta,), a)[0] for theta in thetas])
    torch.testing.assert_close(batched, looped)


def test_a_solver_that_changes_an_argument_in_place_is_refused():
    def solver(init, theta):
        return theta.clamp_(max=4.0).sqrt()

    theta = THETA.clone().requires_grad_()
    with pytest.raises(ValueError, match="changes an argument of shape"):
        custom_root(square_condition)(solver)(None, theta)


def test_inference_mode_gives_values():
    with torch.inference_mode():
        theta = THETA.clone()
        torch.testing.assert_close(root(None, theta), theta.sqrt())


IN_INFERENCE_MODE = {
    "grad": lambda theta: grad(lambda t: root(None, t).sum())(theta),
    "jacrev": lambda theta: jacrev(lambda t: root(None, t))(theta).sum(0),
    "jacfwd": lambda theta: jacfwd(lambda t: root(None, t))(theta).sum(0),
    "vmap of grad": lambda theta: vmap(grad(lambda t: root(None, t)))(theta),
    "root_vjp": lambda theta: root_vjp(square_condition, theta.sqrt(), (theta,), torch.ones_like(theta))[0],
    "root_jvp": lambda theta: root_jvp(square_condition, theta.sqrt(), (theta,), (torch.ones_like(theta),)),
}


@pytest.mark.parametrize("what", IN_INFERENCE_MODE)
def test_inference_mode_has_the_right_derivatives(what):
    with torch.inference_mode():
        torch.testing.assert_close(IN_INFERENCE_MODE[what](THETA.clone()), 0.5 * THETA**-0.5)


@pytest.mark.parametrize("before", [None, 7.0], ids=["without .grad", "with .grad"])
def test_backward_in_a_solver_leaves_no_trace_on_captured_leaves(before):
    theta = THETA.clone().requires_grad_()
    theta.grad = None if before is None else torch.full((2,), before, dtype=F64)
    held = theta.grad

    def solver(init):
        x = torch.ones(2, dtype=F64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            with torch.enable_grad():
                (x**3 / 3 - theta * x).sum().backward()
            optimizer.step()
        return x

    x = custom_root(lambda x: x**2 - theta)(solver)(None)
    assert theta.grad is held
    assert before is None or torch.equal(held, torch.full((2,), before, dtype=F64))
    x.sum().backward()
    torch.testing.assert_close(theta.grad, (before or 0.0) + 0.5 * THETA**-0.5)
