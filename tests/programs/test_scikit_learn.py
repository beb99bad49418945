"""Estimators of scikit-learn as solvers: their coefficients are differentiated in the penalty and in the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks.differences import central
from torch.func import grad

from implicitdiff import custom_root

linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")

generator = torch.Generator().manual_seed(0)
X = torch.randn(12, 2, dtype=torch.float64, generator=generator)
NOISE = torch.randn(12, dtype=torch.float64, generator=generator)
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + NOISE
PENALTY = torch.tensor(0.7, dtype=torch.float64)


def squares(w, penalty, x, y):
    return ((x @ w - y) ** 2).sum() / 2 + penalty * (w**2).sum() / 2


def logistic(w, penalty, x, y):
    return torch.nn.functional.softplus(-torch.sign(y) * (x @ w)).sum() + penalty * (w**2).sum() / 2


def ridge(penalty):
    return linear_model.Ridge(alpha=penalty, fit_intercept=False, solver="cholesky")


def classifier(penalty):
    return linear_model.LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-12, solver="newton-cholesky")


def fitted(objective, estimator, targets):
    @custom_root(grad(objective), check=1e-6)
    def fit(init, penalty, x, y):
        model = estimator(float(penalty)).fit(x.numpy(force=True), targets(y.numpy(force=True)))
        return torch.from_numpy(model.coef_.reshape(-1))

    return lambda penalty, x: fit(None, penalty, x, Y)


FITS = {
    "Ridge": fitted(squares, ridge, lambda y: y),
    "LogisticRegression": fitted(logistic, classifier, np.sign),
}


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
@pytest.mark.parametrize("route", ["backward", "func.grad"])
def test_derivatives_of_a_fit_are_those_of_refitting(fit, route):
    def total(penalty, x):
        return fit(penalty, x).exp().sum()

    penalty, x = PENALTY.clone().requires_grad_(), X.clone().requires_grad_()
    if route == "backward":
        total(penalty, x).backward()
        found = penalty.grad, x.grad
    else:
        found = grad(total, argnums=(0, 1))(PENALTY, X)
    expected = central(lambda p: total(p, X), PENALTY), central(lambda x: total(PENALTY, x), X)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
