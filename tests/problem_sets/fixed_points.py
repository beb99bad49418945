"""The problems on which JAXopt and Optimistix test their fixed-point, root, bracketing and first-order solvers.

Where these draw data from JAX's or scikit-learn's generators, ours are NumPy's, of the same sizes and distributions.
Values and solutions are closed forms, or were computed with NumPy and SciPy by other methods than those under test.

References:
    google/jaxopt, tests of FixedPointIteration, AndersonAcceleration, Broyden, Bisection, MirrorDescent,
    ProximalGradient, ProjectedGradient, NonlinearCG and GradientDescent; patrick-kidger/optimistix,
    tests/helpers.py and tests/test_root_find.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq, nnls

from problem_sets.hock_schittkowski import beale, rosenbrock
from problem_sets.minpack_roots import numbers
from problem_sets.problem import Bounded, FixedPoint, Function, Roots, constant, library


class Bracketed(NamedTuple):
    """``F(x) = 0`` for ``lower <= x <= upper``, at whose ends ``F`` has different signs; entry by entry."""

    name: str
    fn: Function
    lower: float
    upper: float
    root: float

    def __str__(self) -> str:
        return self.name


class Minimum(NamedTuple):
    """``min f(x)``; `value` is the least ``f``, of `solution` if that is unique."""

    name: str
    objective: Function
    start: tuple[float, ...]
    value: float
    solution: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name


class Composite(NamedTuple):
    """``min f(x) + g(x)``, ``f`` smooth.

    Attributes:
        name: of the problem.
        objective: ``f``.
        penalty: ``g``.
        prox: ``prox(v, s)`` minimises ``s g(x) + |x - v|^2 / 2``.
        start: the initial guess.
        value: the least ``f + g``.
        solution: its minimiser, if that is unique.
    """

    name: str
    objective: Function
    penalty: Function
    prox: Callable[[Any, Any], Any]
    start: tuple[float, ...]
    value: float
    solution: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return self.name


class Constrained(NamedTuple):
    """``min f(x)`` over a convex set.

    Attributes:
        name: of the problem.
        objective: ``f``.
        projection: onto the set.
        start: the initial guess, inside the set.
        value: the least ``f``.
        solution: its minimiser, if that is unique.
        softmax: for a product of simplices, the map from logarithms to it.
    """

    name: str
    objective: Function
    projection: Function
    start: tuple[float, ...]
    value: float
    solution: tuple[float, ...] | None = None
    softmax: Function | None = None

    def __str__(self) -> str:
        return self.name


def _draws(seed: int) -> np.random.RandomState:
    """Legacy, since its stream is the same in every version of NumPy."""
    return np.random.RandomState(seed)


# Fixed points


def _scaling(factors: Sequence[float]) -> Function:
    return lambda x: constant(x, factors) * x


def sines_and_cubes(x: Any) -> Any:
    xp = library(x)
    return xp.concatenate((xp.sin(x[:3]) * x[:3] ** 2, x[3:5] ** 3, -x[5:]))


def shifted_cosine(x: Any) -> Any:
    return library(x).cos(x) + constant(x, (0, math.pi / 2))


def _affine(matrix: np.ndarray, shift: np.ndarray) -> Function:
    return lambda x: constant(x, matrix) @ x + constant(x, shift)


def _affine_problem(name: str, matrix: np.ndarray, shift: np.ndarray, start: np.ndarray) -> FixedPoint:
    solution = np.linalg.solve(np.eye(len(shift)) - matrix, shift)
    return FixedPoint(name, _affine(matrix, shift), numbers(start), numbers(solution))


def _contraction(n: int) -> FixedPoint:
    draws = _draws(0)
    matrix = draws.uniform(-1, 1, (n, n))
    matrix = matrix + matrix.T
    matrix /= 2 * np.linalg.eigvalsh(matrix)[-1] + 1e-4
    return _affine_problem(f"affine contraction {n}", matrix, draws.uniform(size=n), np.zeros(n))


def _rotations() -> FixedPoint:
    """No contraction: the distance to the centre stays the same."""
    angles = math.pi / np.array([2, 3, 4, 5, 6, 1.27, 1.73])
    n = 2 * len(angles)
    matrix, centre = np.zeros((n, n)), np.arange(1.0, n + 1)
    for i, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return FixedPoint(
        "rotations 14", _affine(matrix, centre - matrix @ centre), numbers(_draws(0).uniform(size=n)), numbers(centre)
    )


JAXOPT_FIXED_POINTS = (
    FixedPoint("geometric decay", _scaling((0.9, 0.99, 0.999)), (1.0, 0.4, -0.2), (0.0,) * 3),
    FixedPoint("sine and cubes", sines_and_cubes, (0.6, 0.0, -0.1, 0.7, 0.5), (0.0,) * 5),
    FixedPoint(
        "sine, cubes, reflections",
        sines_and_cubes,
        (0.6, 0.0, -0.1, 0.7, 0.5, -1 / 3, 0.0, 2 / 3, -0.4 / 3),
        (0.0,) * 9,
    ),
    FixedPoint("shifted cosine", shifted_cosine, (0.3, math.pi / 4), (0.7390851332151607, math.pi / 2)),
    FixedPoint("flat", _scaling((0.05, 0.2)), (1.0, -0.5), (0.0, 0.0)),
    FixedPoint("scalar", lambda x: 0.5 * x + 0.5, (0.0,), (1.0,)),
    _contraction(200),
    _contraction(10),
    _rotations(),
)

SIZE = 28
"""Of the tree of Optimistix's fixed points."""
_MATRIX = _draws(19).normal(size=(SIZE, SIZE))


def cosine(x: Any) -> Any:
    return library(x).cos(x)


def exponential(x: Any) -> Any:
    return library(x).exp(-x)


def _network() -> Function:
    """A tenth of a perceptron with 8 softplus units, initialised as Equinox does."""
    draws = _draws(42)
    shapes = (((8, SIZE), SIZE), ((8,), SIZE), ((SIZE, 8), 8), ((SIZE,), 8))
    weights = [draws.uniform(-1, 1, shape) / fan_in**0.5 for shape, fan_in in shapes]

    def fn(x: Any) -> Any:
        first, bias, second, last = (constant(x, w) for w in weights)
        inner = first @ x + bias
        return 0.1 * (second @ library(x).logaddexp(inner, 0 * inner) + last)

    return fn


def heat_step(y: Any) -> Any:
    """Half a step of ``y_t = (1 - y) L y``, of Crank and Nicolson, for the sum ``L`` of three neighbours there. It is
    no contraction, nor is it the heat equation: ``L`` has a plus where the Laplacian has a minus."""
    xp, x = library(y), np.linspace(-1, 1, 100)
    dx, end = x[1] - x[0], constant(y, [0])
    old = x**2
    force = (1 - old) * np.concatenate(([0], old[2:] + old[1:-1] + old[:-2], [0])) / dx
    neighbours = xp.concatenate((end, y[2:] + y[1:-1] + y[:-2], end)) / dx
    return constant(y, old + 0.5 * force) + 0.5 * (1 - y) * neighbours


def robertson(y: Any) -> Any:
    a, b, c = y
    first, second = 0.04 * a - 1e4 * b * c, 3e7 * b**2
    return library(y).stack((-first, first - second, second))


STEP = 2.0**-4
OPTIMISTIX_FIXED_POINTS = (
    FixedPoint("cosine 28", cosine, (0.5,) * SIZE, (0.7390851332151607,) * SIZE),
    FixedPoint("exponential 28", exponential, (0.5,) * SIZE, (0.5671432904097838,) * SIZE),
    FixedPoint("perceptron 28", _network(), (0.5,) * SIZE),
    FixedPoint("heat 100", heat_step, (1.0,) * 100),
    # An implicit midpoint step, from zero, in terms of the solution, the slope, and the slope times the step.
    FixedPoint("midpoint y, linear 28", _affine(STEP / 2 * _MATRIX, np.zeros(SIZE)), (0.5,) * SIZE, (0.0,) * SIZE),
    FixedPoint("midpoint f, linear 28", _affine(STEP * _MATRIX, np.zeros(SIZE)), (0.5,) * SIZE, (0.0,) * SIZE),
    FixedPoint("midpoint y, Robertson", lambda y: 1e-8 * robertson(y / 2), (1.0,) * 3, (0.0,) * 3),
    FixedPoint("midpoint f, Robertson", lambda y: robertson(1e-8 * y), (1.0,) * 3, (0.0,) * 3),
    FixedPoint("midpoint k, Robertson", lambda y: 1e-8 * robertson(y), (1.0,) * 3, (0.0,) * 3),
)
FIXED_POINTS = JAXOPT_FIXED_POINTS + OPTIMISTIX_FIXED_POINTS


# Roots


def _less_identity(fn: Function) -> Function:
    return lambda x: fn(x) - x


def products(x: Any) -> Any:
    """A double root in the third unknown, and two branches."""
    xp = library(x)
    a, b, c, d, e = x
    return xp.stack(((a + b + c + d + e) * (a - b + c - d + e), a, c**2, xp.tanh(d), e + 1))


def tangents(x: Any) -> Any:
    return library(x).tanh(constant(x, (1, 1, 2)) * x + constant(x, (0.1, -0.5, 0)))


def rootless(x: Any) -> Any:
    xp = library(x)
    return xp.concatenate((constant(x, [1]) + 0 * x[:1], tangents(x)[1:]))


_NOT_AS_ROOTS = ("midpoint k, Robertson",)
ROOTS = (
    *(Roots(p.name, _less_identity(p.fn), p.start) for p in FIXED_POINTS if p.name not in _NOT_AS_ROOTS),
    Roots(
        "products", products, (0.0, 0.0, 1.0, 2.0, 3.0), ((0.1, 1.1, 0.1, 0.1, -1.1), (-0.1, -1.1, -0.1, -0.1, -1.1))
    ),
    Roots("tangents", tangents, (0.5, -0.3, 0.7)),
    Roots("tangents, no root", rootless, (0.5, -0.3, 0.7)),
    Roots("identity", lambda x: x, (0.0,), ((1.0,),)),
)
ROOTLESS = ("tangents, no root",)


# Brackets


def _threshold(seed: int, n: int = 50) -> Bracketed:
    """The threshold of the projection onto the simplex."""
    v = _draws(seed).normal(size=n)

    def fn(x: Any) -> Any:
        above = constant(x, v) - x[..., None]
        return library(x).where(above > 0, above, 0.0).sum(-1) - 1

    root = np.max((np.cumsum(np.sort(v)[::-1]) - 1) / np.arange(1, n + 1))
    return Bracketed(f"simplex {seed}", fn, float(v.min() - 1 / n), float(v.max()), float(root))


BRACKETS = (
    *(_threshold(seed) for seed in range(10)),
    Bracketed("shifted", lambda x: x - 0.5, 0.0, 1.0, 0.5),
    Bracketed("trivial", lambda x: x - 1, 0.5, 2.0, 1.0),
    Bracketed("cosine", lambda x: library(x).cos(x) - x, 0.0, 1.0, 0.7390851332151607),
    Bracketed("exponential", lambda x: library(x).exp(-x) - x, 0.0, 1.0, 0.5671432904097838),
    Bracketed("midpoint y", lambda x: (STEP * 0.25 - 1) * x, 0.0, 1.0, 0.0),
    Bracketed("midpoint f", lambda x: (STEP * 0.625 - 1) * x, 0.0, 1.0, 0.0),
    Bracketed("midpoint k", lambda x: (STEP * -0.137 - 1) * x, 0.0, 1.0, 0.0),
    Bracketed("rising", lambda x: x, -1.0, 2.0, 0.0),
    Bracketed("falling", lambda x: -x, -1.0, 2.0, 0.0),
)


# Minima


def _least_squares(X: np.ndarray, y: np.ndarray) -> Function:
    """``|X w - y|^2 / 2``, averaged over the rows."""
    return lambda w: ((constant(w, X) @ w - constant(w, y)) ** 2).mean() / 2


def _logistic(X: np.ndarray, y: np.ndarray, strength: float = 0.0) -> Function:
    """Logistic regression; `y` is of 0 and 1."""

    def fn(w: Any) -> Any:
        score = constant(w, X) @ w
        loss = library(w).logaddexp(0 * score, score) - constant(w, y) * score
        return loss.mean() + strength / 2 * (w**2).sum()

    return fn


def _multinomial(X: np.ndarray, labels: np.ndarray, classes: int, strength: float, intercept: bool) -> Function:
    """Multinomial regression with a ridge penalty, which the intercepts, the last unknowns, do not pay."""
    size = X.shape[1] * classes
    chosen = np.eye(classes)[labels]

    def fn(w: Any) -> Any:
        xp = library(w)
        score = constant(w, X) @ w[:size].reshape(-1, classes)
        score = score + w[size:] if intercept else score
        top = xp.amax(score, -1)
        total = top + xp.log(xp.exp(score - top[:, None]).sum(-1))
        return (total - (constant(w, chosen) * score).sum(-1)).mean() + strength / 2 * (w[:size] ** 2).sum()

    return fn


def _classes(seed: int, samples: int, features: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points round the centres of their classes. Those of seed 6 are not separable."""
    draws = _draws(seed)
    labels = np.arange(samples) % classes
    return draws.normal(size=(samples, features)) + draws.normal(size=(classes, features))[labels], labels


def _regression(
    name: str, seed: int, sizes: tuple[int, int, int], strength: float, value: float, intercept: bool
) -> Any:
    X, labels = _classes(seed, *sizes)
    unknowns = (sizes[1] + intercept) * sizes[2]
    return Minimum(name, _multinomial(X, labels, sizes[2], strength, intercept), (0.0,) * unknowns, value)


def power_of_complex(x: Any) -> Any:
    """``sum |W z|^1.5`` for a complex ``z``, its real parts in front. It has no second derivative at its minimum."""
    w = np.array([[1, -2], [3, 4], [-4 + 2j, 5 - 3j], [-2 - 2j, 6]])
    real = constant(x, np.hstack((w.real, -w.imag))) @ x
    imaginary = constant(x, np.hstack((w.imag, w.real))) @ x
    square = real**2 + imaginary**2
    zero = square == 0
    where = library(x).where
    return where(zero, 0.0, where(zero, 1.0, square) ** 0.75).sum()


def _bowl() -> Function:
    root = _draws(17).normal(size=(20, 20))
    return lambda x: x @ (constant(x, root.T @ root) @ x)


def _diagonal_bowl() -> Function:
    weights = 0.1 + _draws(17).normal(size=20) ** 2
    return lambda x: (constant(x, weights) * x**2).sum()


def himmelblau(x: Any) -> Any:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def matyas(x: Any) -> Any:
    return 0.26 * (x**2).sum() - 0.48 * x[0] * x[1]


def linear_chain(x: Any) -> Any:
    """What Optimistix calls Rosenbrock's function, without its square."""
    return 1e4 * ((x[1:] - x[:-1]) ** 2).sum() + ((1 - x[:-1]) ** 2).sum()


def variably_dimensioned(x: Any) -> Any:
    total = (constant(x, np.arange(1, len(x) + 1)) * (x - 1)).sum()
    return ((x - 1) ** 2).sum() + total**2 + total**4


def _wide() -> Function:
    draws = _draws(0)
    return _least_squares(draws.normal(size=(15, 70)), np.arange(15) % 2)


MINIMA = (
    Minimum("least squares 15 by 70", _wide(), numbers(0.05 * _draws(1).normal(size=70)), 0.0),
    Minimum("logistic 10 by 5", _logistic(*_classes(6, 10, 5, 2)), (0.0,) * 5, 0.282061906964156),
    Minimum("power of complex", power_of_complex, (1.0, 0.0, -1.0, 1.0), 0.0, (0.0,) * 4),
    _regression("multinomial 10 by 5 by 3, intercepts", 1, (10, 5, 3), 100.0, 1.0845584638825794, True),
    _regression("multinomial 30 by 5 by 2", 2, (30, 5, 2), 1.0, 0.37651066679207146, False),
    _regression("multinomial 30 by 5 by 2, weak", 2, (30, 5, 2), 1e-2, 0.05696262582010894, False),
    _regression("multinomial 100 by 8 by 4", 3, (100, 8, 4), 1e-3, 0.06207720322328192, False),
    Minimum("Rosenbrock", rosenbrock, (0.0, 0.0), 0.0, (1.0, 1.0)),
    Minimum("bowl 20", _bowl(), (0.05,) * 20, 0.0, (0.0,) * 20),
    Minimum("diagonal bowl 20", _diagonal_bowl(), (0.05,) * 20, 0.0, (0.0,) * 20),
    Minimum("linear chain 2", linear_chain, (1.5, 1.5), 0.0, (1.0, 1.0)),
    Minimum("linear chain 20", linear_chain, (1.45,) * 20, 0.0, (1.0,) * 20),
    Minimum("Himmelblau", himmelblau, (2.0, 2.5), 0.0),
    Minimum("Matyas", matyas, (6.0, 6.0), 0.0, (0.0, 0.0)),
    Minimum("Beale", beale, (2.0, 0.0), 0.0, (3.0, 0.5)),
    Minimum("square", lambda x: (x**2).sum() - 1, (1.0,), -1.0, (0.0,)),
    Minimum("variably dimensioned 10", variably_dimensioned, numbers(1 - np.arange(1, 11) / 10), 0.0, (1.0,) * 10),
)
BOUNDED = (
    Bounded("Himmelblau I", himmelblau, (4.0, 1.0), (0.0, 0.0), (5.0, 5.0), 0.0, (3.0, 2.0)),
    Bounded("Himmelblau II", himmelblau, (4.0, -1.0), (0.0, -5.0), (5.0, 0.0), 0.0),
    Bounded("Himmelblau III", himmelblau, (-3.0, -2.0), (-5.0, -5.0), (0.0, 0.0), 0.0),
    Bounded("Himmelblau IV", himmelblau, (-3.0, 2.0), (-8.0, 0.0), (0.0, 8.0), 0.0),
    Bounded("paraboloid", lambda x: (x**2).sum(), (-3.0, -1.0), (-math.inf,) * 2, (-1.0, 1.0), 1.0, (-1.0, 0.0)),
)


# Composite


def soft_threshold(v: Any, threshold: Any) -> Any:
    xp = library(v)
    excess = xp.abs(v) - threshold
    return xp.sign(v) * xp.where(excess > 0, excess, 0.0)


def coordinate_descent(X: np.ndarray, y: np.ndarray, strength: float, sweeps: int = 500) -> np.ndarray:
    """The minimiser of ``|X w - y|^2 / (2 rows) + strength |w|_1``: the signs by coordinate descent, then exactly."""
    gram, right, w = X.T @ X / len(X), X.T @ y / len(X), np.zeros(X.shape[1])
    for _ in range(sweeps):
        old = w.copy()
        for i in range(len(w)):
            w[i] = soft_threshold(right[i] - gram[i] @ w + gram[i, i] * w[i], strength) / gram[i, i]
        if np.abs(w - old).max() <= 1e-12 * np.abs(w).max():
            break
    s = w != 0
    w[s] = np.linalg.solve(gram[np.ix_(s, s)], right[s] - strength * np.sign(w[s]))
    return w


def _lasso(samples: int, features: int, strength: float, correlation: float = 0.0) -> Composite:
    draws = _draws(0)
    X = draws.normal(size=(samples, features)) + correlation * draws.normal(size=(samples, 1))
    y = X @ (100 * draws.uniform(size=features) * (draws.uniform(size=features) < 0.5)) + draws.normal(size=samples)
    objective, solution = _least_squares(X, y), coordinate_descent(X, y, strength)

    def penalty(x: Any) -> Any:
        return strength * library(x).abs(x).sum()

    def prox(v: Any, stepsize: Any) -> Any:
        return soft_threshold(v, strength * stepsize)

    value = float(objective(solution) + penalty(solution))
    name = f"lasso {samples} by {features}, {strength:g}"
    return Composite(name, objective, penalty, prox, (0.0,) * features, value, numbers(solution))


COMPOSITES = (
    _lasso(10, 3, 10.0),
    _lasso(10, 3, 0.0),
    _lasso(60, 30, 10.0),
    _lasso(60, 30, 1.0, correlation=1.0),
    _lasso(30, 60, 5.0),
)


# Sets


def non_negative(v: Any) -> Any:
    return library(v).where(v > 0, v, 0.0)


def ball(v: Any, radius: float) -> Any:
    xp = library(v)
    square = (v**2).sum()
    outside = square > radius**2
    return v * xp.where(outside, radius / xp.sqrt(xp.where(outside, square, 1.0)), 1.0)


def triangle(v: Any) -> Any:
    """With the corners (0, 1), (1, 0) and (2, 1)."""
    xp = library(v)
    a, b = v
    # Coordinates along the two sides that meet at (1, 0), in a right angle: there it is 0 <= p, q and p + q <= 1.
    within = non_negative(xp.stack(((b - a + 1) / 2, (b + a - 1) / 2)))
    p, q = xp.where(within.sum() > 1, simplices(within), within)
    return xp.stack((1 + q - p, q + p))


def simplices(v: Any, blocks: int = 1) -> Any:
    """Onto a product of simplices."""
    xp, rows = library(v), v.reshape(blocks, -1)
    ascending = xp.sort(rows)
    ascending = getattr(ascending, "values", ascending)
    n = rows.shape[1]
    largest = ascending.sum(-1)[:, None] - xp.cumsum(ascending, -1) + ascending
    threshold = xp.amax((largest - 1) / constant(v, np.arange(n, 0, -1)), -1)
    return non_negative(rows - threshold[:, None]).reshape(-1)


def softmaxes(v: Any, blocks: int = 1) -> Any:
    xp, rows = library(v), v.reshape(blocks, -1)
    e = xp.exp(rows - xp.amax(rows, -1)[:, None])
    return (e / e.sum(-1)[:, None]).reshape(-1)


def _svm_dual(samples: int, features: int, classes: int, strength: float) -> Function:
    """The dual of a multiclass support vector machine, of rows on simplices."""
    X, labels = _classes(0, samples, features, classes)
    Y = np.eye(classes)[labels]

    def fn(b: Any) -> Any:
        rows = b.reshape(samples, classes)
        v = constant(b, X.T) @ (constant(b, Y) - rows)
        return (v**2).sum() / (2 * strength) - (rows * constant(b, 1 - Y)).sum()

    return fn


def _fit(samples: int, features: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    draws = _draws(0)
    X = draws.normal(size=(samples, features))
    w = draws.normal(size=features) if signed else draws.uniform(size=features)
    return X, X @ w


def _in_ball(radius: float) -> Constrained:
    """The minimiser solves ``(X'X + m) w = X'y``, for the ``m`` at which it lies on the sphere."""
    X, y = _fit(10, 5, signed=False)
    fn = _least_squares(X, y)

    def at(ridge: float) -> np.ndarray:
        return np.linalg.solve(X.T @ X + ridge * np.eye(5), X.T @ y)

    inside = np.linalg.norm(at(0.0)) <= radius
    w = at(0.0 if inside else brentq(lambda m: np.linalg.norm(at(m)) - radius, 0.0, 1e6, xtol=1e-14, rtol=1e-15))
    return Constrained(f"ball {radius:g}", fn, partial(ball, radius=radius), (0.0,) * 5, float(fn(w)), numbers(w))


def _non_negative(name: str, signed: bool) -> Constrained:
    X, y = _fit(10, 5, signed)
    fn, w = _least_squares(X, y), nnls(X, y)[0]
    return Constrained(name, fn, non_negative, (0.0,) * 5, float(fn(w)), numbers(w))


def _distance(n: int) -> Constrained:
    v = np.array([1.0, 0.5, -2.0]) if n == 3 else _draws(5).normal(size=n)
    w = simplices(v)
    return Constrained(
        f"distance to simplex {n}",
        lambda x: ((x - constant(x, v)) ** 2).sum(),
        simplices,
        (1 / n,) * n,
        float(((w - v) ** 2).sum()),
        numbers(w),
        softmaxes,
    )


def _mixture() -> Constrained:
    """Non-negative least squares, with a heavy row that asks for the sum 1, tells which weights are not zero."""
    draws = _draws(7)
    X = draws.normal(size=(20, 10))
    y = X @ np.array([0.5, 0.3, 0.2, 0, 0, 0, 0, 0, 0, 0]) + 0.5 * draws.normal(size=20)
    support = nnls(np.vstack((X, np.full(10, 1e4))), np.append(y, 1e4))[0] > 1e-6
    n, w = support.sum(), np.zeros(10)
    part = X[:, support]
    kkt = np.block([[part.T @ part, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    w[support] = np.linalg.solve(kkt, np.append(part.T @ y, 1.0))[:n]
    fn = _least_squares(X, y)
    return Constrained("mixture 20 by 10", fn, simplices, (0.1,) * 10, float(fn(w)), numbers(w), softmaxes)


SIMPLICES = (
    Constrained(
        "SVM dual 20 by 3",
        _svm_dual(20, 5, 3, 10.0),
        partial(simplices, blocks=20),
        (1 / 3,) * 60,
        -9.894261086840741,
        None,
        partial(softmaxes, blocks=20),
    ),
    _distance(3),
    _distance(50),
    _mixture(),
)
CONSTRAINED = (
    _non_negative("non-negative, inside", signed=False),
    _non_negative("non-negative, at bounds", signed=True),
    _in_ball(1.0),
    _in_ball(0.1),
    Constrained("saddle in a triangle", lambda x: x[0] ** 2 - x[1] ** 2, triangle, (0.0, 1.0), -1.0, (0.0, 1.0)),
    *SIMPLICES,
)
