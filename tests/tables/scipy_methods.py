"""Methods of SciPy by kind, and functions that they solve."""

from __future__ import annotations

import pytest
import torch

from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

F32, F64 = torch.float32, torch.float64

ROOT = ["hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov"]
ROOT = [*ROOT, "df-sane"]
FIRST_ORDER = ["CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP"]
SECOND_ORDER = ["Newton-CG", "trust-constr", "dogleg", "trust-ncg", "trust-krylov", "trust-exact"]
VALUES_ONLY = ["Nelder-Mead", "Powell", "COBYLA", "COBYQA"]
MINIMIZE = [*FIRST_ORDER, *SECOND_ORDER, *VALUES_ONLY]
LEAST_SQUARES = ["trf", "dogbox", "lm"]

TANH = 0.9611797513715395
"""z = tanh(z + 1)."""


def tensor(*values, dtype=F64):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)


def tanh_residual(z, shift):
    return torch.tanh(z + shift) - z


def tanh_objective(z, shift):
    """Stationary, and least, where z = tanh(z + shift)."""
    return (z**2 / 2 - torch.log(torch.cosh(z + shift))).sum()


def tanh_derivative(z):
    slope = 1 - z**2
    return slope / (1 - slope)


def rosenbrock(x, a=1.0):
    return (a - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


X = tensor(0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74)
Y = tensor(0.050, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317)


def enzyme(c, y=Y):
    return y - c[0] * X / (c[1] + X)


MIXED = tensor([[1.0, 0.3, -0.2], [0.1, 1.5, 0.4], [0.0, -0.3, 2.0]])


def cubic(x, theta):
    """One root for each theta."""
    return MIXED @ x + 0.1 * x**3 - theta


def quadratic(x, theta):
    """With the Hessian A = MIXED' MIXED + I; least at A^-1 theta."""
    return ((MIXED @ x) ** 2).sum() / 2 + (x**2).sum() / 2 - theta @ x


HESSIAN = MIXED.T @ MIXED + torch.eye(3, dtype=F64)
THETA = tensor(1.0, -2.0, 0.5)

SOLVERS = {
    "root": lambda: scipy_root(tanh_residual),
    "minimize": lambda: scipy_minimize(tanh_objective),
    "bounded": lambda: scipy_minimize(tanh_objective, bounds=(0.0, 2.0)),
    "least squares": lambda: scipy_least_squares(tanh_residual),
    "bounded least squares": lambda: scipy_least_squares(tanh_residual, bounds=(0.0, 2.0)),
}
EACH = pytest.mark.parametrize("name", SOLVERS)
# SciPy's minimisers stop at a gradient of about the square root of the precision, and |z''| < 2.
ACCEPTED = {"root": 1e-10, "minimize": 1e-7, "bounded": 1e-7, "least squares": 1e-10, "bounded least squares": 1e-10}
