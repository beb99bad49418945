"""Hyper-parameters of Gaussian processes, with the kernels of GPyTorch.

The covariance that GPyTorch computes for one lengthscale has a first derivative only. A condition that is a gradient in
the lengthscale needs the second, which is silently wrong in GPyTorch itself, and refused here. With a lengthscale for
each dimension it is right.
"""

from __future__ import annotations

import math

import pytest
import torch
from checks.differences import central
from torch.func import functional_call, grad
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from implicitdiff import custom_root, solvers

gpytorch = pytest.importorskip("gpytorch", reason="GPyTorch is not installed")

generator = torch.Generator().manual_seed(0)
X, NEW, PLANE = (torch.rand(*size, dtype=torch.float64, generator=generator) for size in ((12, 1), (5, 1), (12, 2)))
Y, Y_NEW = torch.sin(6 * X[:, 0]), torch.sin(6 * NEW[:, 0])
SIGNS, CLASSES = Y.sign(), (Y_NEW > 0).double()
EYE = torch.eye(12, dtype=torch.float64)


def rbf(a, b, lengthscale):
    return torch.exp(-((a - b.mT) ** 2) / (2 * lengthscale**2))


def matern(a, b, lengthscale):
    r = math.sqrt(5) * (a - b.mT).abs() / lengthscale
    return (1 + r + r**2 / 3) * torch.exp(-r)


class Covariance(torch.nn.Module):
    """A kernel that is evaluated when it is called: by itself it would be later, outside of functional_call."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, a, b):
        return self.kernel(a, b).to_dense()


def slope(latent):
    """The derivative of the log-likelihood of the classes."""
    return SIGNS * torch.sigmoid(-SIGNS * latent)


def error(covariance, weights):
    return ((covariance(NEW, X) @ weights - Y_NEW) ** 2).mean()


def loss(covariance, latent):
    return binary_cross_entropy_with_logits(covariance(NEW, X) @ slope(latent), CLASSES)


def regression(covariance):
    """The error of the predictive mean, whose weights solve a linear condition."""

    @custom_root(lambda weights: covariance(X, X) @ weights + 0.1 * weights - Y)
    def weigh(init):
        return torch.linalg.solve(covariance(X, X) + 0.1 * EYE, Y)

    return error(covariance, weigh(None))


def classification(covariance):
    """The loss at the mode of the latent function, which Laplace's approximation finds by Newton's method."""
    mode, _ = solvers.newton(lambda f: f - covariance(X, X) @ slope(f)).run(torch.zeros_like(Y))
    return loss(covariance, mode)


def classification_with_the_matrix_passed(covariance):
    mode, _ = solvers.newton(lambda f, matrix: f - matrix @ slope(f)).run(torch.zeros_like(Y), covariance(X, X))
    return loss(covariance, mode)


def regression_by_hand(covariance):
    return error(covariance, torch.linalg.solve(covariance(X, X) + 0.1 * EYE, Y))


def classification_by_hand(covariance):
    matrix, latent = covariance(X, X), torch.zeros_like(Y)
    for _ in range(10):
        curvature = torch.sigmoid(latent) * torch.sigmoid(-latent)
        latent = latent - torch.linalg.solve(EYE + matrix * curvature, latent - matrix @ slope(latent))
    return loss(covariance, latent)


BY_HAND = {
    "RBFKernel": rbf,
    "MaternKernel": matern,
    regression: regression_by_hand,
    classification: classification_by_hand,
    classification_with_the_matrix_passed: classification_by_hand,
}


@pytest.mark.parametrize("problem", [regression, classification, classification_with_the_matrix_passed])
@pytest.mark.parametrize("kind", ["RBFKernel", "MaternKernel"])
def test_hyper_parameters_have_the_derivatives_that_all_by_hand_has(kind, problem):
    kernel = gpytorch.kernels.ScaleKernel(getattr(gpytorch.kernels, kind)()).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.3, 1.5
    problem(Covariance(kernel)).backward()
    raw = {name: parameter.detach().clone().requires_grad_() for name, parameter in kernel.named_parameters()}
    scale, lengthscale = map(softplus, (raw["raw_outputscale"], raw["base_kernel.raw_lengthscale"]))
    BY_HAND[problem](lambda a, b: scale * BY_HAND[kind](a, b, lengthscale)).backward()
    found = {name: parameter.grad for name, parameter in kernel.named_parameters()}
    torch.testing.assert_close(found, {name: p.grad for name, p in raw.items()}, rtol=1e-7, atol=1e-9)


def fitted(kernel, y):
    """The lengthscales that maximise the evidence of the targets."""
    covariance = Covariance(kernel)
    start = {name: parameter.detach() for name, parameter in covariance.named_parameters()}

    def evidence(raw, y):
        matrix = functional_call(covariance, raw, (PLANE, PLANE)) + 0.1 * EYE
        return (y @ torch.linalg.solve(matrix, y) + torch.logdet(matrix)) / 2

    return softplus(solvers.lbfgs(evidence).run(start, y)[0]["kernel.raw_lengthscale"])


TARGETS, SHIFT = torch.sin(6 * PLANE[:, 0]) + PLANE[:, 1], PLANE[:, 0].square()
ZERO = torch.tensor(0.0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["RBFKernel", "MaternKernel"])
def test_lengthscales_fitted_to_the_evidence_have_derivatives_in_the_targets(kind):
    kernel = getattr(gpytorch.kernels, kind)(ard_num_dims=2).double()

    def total(s):
        return fitted(kernel, TARGETS + s * SHIFT).square().sum()

    shift = ZERO.clone().requires_grad_()
    total(shift).backward()
    expected = central(total, ZERO)
    torch.testing.assert_close((shift.grad, grad(total)(ZERO)), (expected, expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["RBFKernel", "MaternKernel"])
def test_a_single_lengthscale_fitted_to_the_evidence_is_refused(kind):
    with pytest.raises(ValueError, match="cannot be differentiated twice"):
        fitted(getattr(gpytorch.kernels, kind)().double(), TARGETS.clone().requires_grad_()).sum().backward()
