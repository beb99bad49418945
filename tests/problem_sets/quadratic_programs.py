"""Quadratic programs of the kinds by which OSQP was judged, small and made by formula.

Stellato et al., "OSQP: an operator splitting solver for quadratic programs", Math. Prog. Comp. 12 (2020), appendix A.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

Array = np.ndarray


class QuadraticProgram(NamedTuple):
    """``min x'Px / 2 + q'x + r`` subject to ``l <= A x <= u``; equal bounds are an equality, infinite ones are none.

    Attributes:
        name: of the problem, with its size where that varies.
        P: symmetric, positive semidefinite.
        q, r: the linear term and the constant.
        A, l, u: the constraints.
        optimum: the least objective, where it is known.
    """

    name: str
    P: Array
    q: Array
    r: float
    A: Array
    l: Array  # noqa: E741
    u: Array
    optimum: float | None = None

    def __str__(self) -> str:
        return self.name

    def objective(self, x: Array) -> float:
        return float(0.5 * x @ self.P @ x + self.q @ x + self.r)

    def violation(self, x: Array) -> float:
        """How far any row is from its bounds, relative to its terms."""
        size = np.abs(self.A)
        finite = [np.where(np.isfinite(t), np.abs(t), 0.0) for t in (self.l, self.u)]
        # A bound x_j >= 0 has no other term than what violates it: the other unknowns give it a size.
        terms = np.maximum.reduce([size @ np.abs(x), size.max(axis=1) * np.abs(x).max(), *finite])
        excess = np.maximum(np.maximum(self.l - self.A @ x, self.A @ x - self.u), 0.0)
        return float((excess / np.where(terms > 0, terms, 1.0)).max())

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
        """``(Q, c, A, b, G, h, l)`` of `implicitdiff.solvers.qp`."""
        equal = self.l == self.u
        parts = (self.P, self.q, self.A[equal], self.u[equal], self.A[~equal], self.u[~equal], self.l[~equal])
        return tuple(torch.as_tensor(t, dtype=dtype) for t in parts)


def random_program(seed: int = 0, n: int = 12, m: int = 40) -> QuadraticProgram:
    """A.1: rows with two bounds."""
    g = np.random.default_rng(seed)
    M, A = g.standard_normal((n, n)), g.standard_normal((m, n))
    middle = A @ g.standard_normal(n)
    return _made(
        "random", M @ M.T + 0.01 * np.eye(n), g.standard_normal(n), A, middle - g.random(m), middle + g.random(m)
    )


def equality_program(seed: int = 1, n: int = 20, m: int = 10) -> QuadraticProgram:
    """A.2: equalities alone."""
    g = np.random.default_rng(seed)
    M, A = g.standard_normal((n, n)), g.standard_normal((m, n))
    b = A @ g.standard_normal(n)
    return _made("equality", M @ M.T + 0.01 * np.eye(n), g.standard_normal(n), A, b, b)


def portfolio(seed: int = 2, factors: int = 3, assets: int = 30) -> QuadraticProgram:
    """A.4: ``x`` and the exposures ``y = F'x``; the budget is 1, nothing is sold short."""
    g = np.random.default_rng(seed)
    F = g.standard_normal((assets, factors)) * (g.random((assets, factors)) < 0.5)
    risk = g.random(assets) * np.sqrt(factors)
    P = np.diag(np.concatenate([risk, np.ones(factors)]))
    zeros = np.zeros((assets, factors))
    A = np.block([[F.T, -np.eye(factors)], [np.ones((1, assets)), zeros[:1]], [np.eye(assets), zeros]])
    low = np.concatenate([np.zeros(factors), [1.0], np.zeros(assets)])
    high = np.concatenate([np.zeros(factors), [1.0], np.full(assets, np.inf)])
    return _made("portfolio", 2 * P, np.concatenate([-g.standard_normal(assets), np.zeros(factors)]), A, low, high)


def lasso(seed: int = 3, features: int = 8, samples: int = 25) -> QuadraticProgram:
    """A.5: ``min |D x - b|^2 + weight |x|_1`` with ``y = D x - b`` and ``-t <= x <= t``."""
    g = np.random.default_rng(seed)
    D, truth = g.standard_normal((samples, features)), g.standard_normal(features) * (g.random(features) < 0.5)
    b = D @ truth + g.standard_normal(samples)
    weight = np.abs(D.T @ b).max() / 5
    n, m = features, samples
    P = np.diag(np.concatenate([np.zeros(n), 2 * np.ones(m), np.zeros(n)]))
    eye, none = np.eye(n), np.zeros((n, m))
    A = np.block([[D, -np.eye(m), np.zeros((m, n))], [eye, none, -eye], [eye, none, eye]])
    inf = np.full(n, np.inf)
    q = np.concatenate([np.zeros(n + m), np.full(n, weight)])
    return _made("lasso", P, q, A, np.concatenate([b, -inf, 0 * eye[0]]), np.concatenate([b, 0 * eye[0], inf]))


def huber(seed: int = 4, features: int = 5, samples: int = 25) -> QuadraticProgram:
    """A.6: ``min u'u + 2 (r + s)`` with ``D x - b - u = r - s`` and ``r, s >= 0``; some data are outliers."""
    g = np.random.default_rng(seed)
    D = g.standard_normal((samples, features))
    b = D @ g.standard_normal(features) + np.where(g.random(samples) < 0.9, g.standard_normal(samples) / 4, 10.0)
    n, m = features, samples
    eye, none = np.eye(m), np.zeros((m, n))
    P = np.diag(np.concatenate([np.zeros(n), 2 * np.ones(m), np.zeros(2 * m)]))
    zero = np.zeros((m, m))
    A = np.block([[D, -eye, -eye, eye], [none, zero, eye, zero], [none, zero, zero, eye]])
    q = np.concatenate([np.zeros(n + m), 2 * np.ones(2 * m)])
    return _made("huber", P, q, A, np.concatenate([b, np.zeros(2 * m)]), np.concatenate([b, np.full(2 * m, np.inf)]))


def support_vectors(seed: int = 5, features: int = 4, samples: int = 24) -> QuadraticProgram:
    """A.7: ``min x'x + weight sum t`` with ``t >= diag(b) D x + 1`` and ``t >= 0``."""
    g = np.random.default_rng(seed)
    b = np.where(np.arange(samples) < samples // 2, 1.0, -1.0)
    D = b[:, None] / features + g.standard_normal((samples, features)) / np.sqrt(features)
    n, m = features, samples
    P = np.diag(np.concatenate([2 * np.ones(n), np.zeros(m)]))
    A = np.block([[b[:, None] * D, -np.eye(m)], [np.zeros((m, n)), np.eye(m)]])
    inf = np.full(m, np.inf)
    q = np.concatenate([np.zeros(n), np.ones(m)])
    return _made("SVM", P, q, A, np.concatenate([-inf, np.zeros(m)]), np.concatenate([-np.ones(m), inf]))


def control(seed: int = 6, states: int = 3, inputs: int = 2, steps: int = 6) -> QuadraticProgram:
    """A.3: a linear system is steered to zero; states and inputs are bounded."""
    g = np.random.default_rng(seed)
    M = np.eye(states) + 0.1 * g.standard_normal((states, states))
    B = g.standard_normal((states, inputs))
    n, nx = states * (steps + 1) + inputs * steps, states * (steps + 1)
    P = np.diag(np.concatenate([10 * g.random(nx) * (g.random(nx) < 0.7), 0.1 * np.ones(n - nx)]))
    dynamics = np.zeros((nx, n))
    dynamics[:, :nx] = -np.eye(nx)
    for k in range(steps):
        rows = slice(states * (k + 1), states * (k + 2))
        dynamics[rows, states * k : states * (k + 1)] = M
        dynamics[rows, nx + inputs * k : nx + inputs * (k + 1)] = B
    start = g.uniform(-0.5, 0.5, states)
    right = np.concatenate([-start, np.zeros(nx - states)])
    bound = np.concatenate([1 + g.random(nx), 0.3 * np.ones(n - nx)])
    A = np.vstack([dynamics, np.eye(n)])
    return _made("control", P, np.zeros(n), A, np.concatenate([right, -bound]), np.concatenate([right, bound]))


def _made(name: str, P: Array, q: Array, A: Array, l: Array, u: Array) -> QuadraticProgram:  # noqa: E741
    return QuadraticProgram(f"{name} {len(q)} x {len(l)}", P, q, 0.0, A, l, u)


PROGRAMS = [
    random_program(),
    equality_program(),
    portfolio(),
    lasso(),
    huber(),
    support_vectors(),
    control(),
]
