"""`root`, `fixed_point`, `minimize`, `least_squares`: solutions, derivatives, and options where they belong."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from implicitdiff import fixed_point, least_squares, minimize, root
from implicitdiff.solvers import broyden, gauss_newton, lbfgs_b, newton, newton_cg

# Each has the solution sqrt(a), for positive a.
CALLS = {
    root: lambda x, a: x**2 - a,
    fixed_point: lambda x, a: (x + a / x) / 2,
    minimize: lambda x, a: x**3 / 3 - a * x,
    least_squares: lambda x, a: torch.stack([x**2 - a, 2 * (x**2 - a)]),
}
OTHERS = {root: newton, fixed_point: broyden, minimize: newton_cg, least_squares: gauss_newton}
ONE, A = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


@every_call
def test_the_solution_and_its_derivatives_are_those_of_the_square_root(call):
    def solve(a):
        return call(CALLS[call], ONE, a)[0]

    for of in (lambda f: f, grad, jacfwd, hessian):
        torch.testing.assert_close(of(solve)(A), of(torch.sqrt)(A), rtol=1e-8, atol=0)
    many = torch.tensor([0.5, 2.5, 9.0], dtype=torch.float64)
    torch.testing.assert_close(vmap(grad(solve))(many), 0.5 / many.sqrt(), rtol=1e-8, atol=0)


@every_call
def test_another_solver_and_the_options_of_both(call):
    seen = []
    x, state = call(
        CALLS[call], ONE, A, solver=OTHERS[call], atol=1e-9, keep_history=True, callback=lambda *args: seen.append(args)
    )
    torch.testing.assert_close(x, A.sqrt())
    assert state.target == 1e-9 and len(seen) > 1 and len(state.history) == int(state.iter_num) + 1
    assert state.memory.__class__ is OTHERS[call](CALLS[call]).init(ONE, A).memory.__class__


@every_call
def test_arguments_that_do_not_fit(call):
    with pytest.raises(TypeError, match=f"^{call.__name__}: solver must be a factory of implicitdiff.solvers, such as"):
        call(CALLS[call], ONE, A, solver=OTHERS[call](CALLS[call]))
    with pytest.raises(TypeError, match=r"unknown option 'tol', did you mean .*?; the arguments are .*, rtol, atol"):
        call(CALLS[call], ONE, A, tol=1e-3)


def test_options_of_one_factory():
    x, _ = minimize(CALLS[minimize], ONE, A, solver=lbfgs_b, bounds=(0.0, 1.25))
    assert x == 1.25
