"""x^3 factor - x - 2 = 0 by bisection, which has no derivative of its own."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from implicitdiff import custom_root


def condition(x, factor):
    return factor * x**3 - x - 2


@custom_root(condition)
def bisect(bracket, factor):
    low, high = (torch.full_like(factor, end) for end in bracket)
    for _ in range(70):
        middle = (low + high) / 2
        right = condition(middle, factor) < 0
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    return (low + high) / 2


def root(factor):
    return bisect((0.1, 10.0), factor)


def derivatives(x, factor):
    """The first three derivatives of x(factor), by differentiating the equation by hand.

    With g = 3 f x^2 - 1:  x' = -x^3 / g,  g x'' = -6 x^2 x' - 6 f x x'^2,  and once more for x'''.
    """
    g = 3 * factor * x**2 - 1
    d1 = -(x**3) / g
    d2 = -(6 * x**2 * d1 + 6 * factor * x * d1**2) / g
    d3 = -(18 * x * d1**2 + 9 * x**2 * d2 + 6 * factor * d1**3 + 18 * factor * x * d1 * d2) / g
    return d1, d2, d3


FACTOR = torch.tensor(1.0, dtype=torch.float64)
FACTORS = torch.linspace(0.5, 20.0, 1000, dtype=torch.float64)
MODES = pytest.mark.parametrize("derivative", [grad, jacrev, jacfwd])


def test_the_root_is_the_known_one():
    # scipy.optimize.brentq(lambda x: x**3 - x - 2, 0, 10)
    assert root(FACTOR).item() == pytest.approx(1.5213797068045676, abs=1e-14)
    assert vmap(lambda f: condition(root(f), f))(FACTORS).abs().max() < 1e-12


@MODES
def test_three_derivatives_of_one_root(derivative):
    first, second, third = derivatives(root(FACTOR), FACTOR)
    assert derivative(root)(FACTOR).item() == pytest.approx(first.item(), rel=1e-10)
    assert derivative(derivative(root))(FACTOR).item() == pytest.approx(second.item(), rel=1e-10)
    assert derivative(derivative(derivative(root)))(FACTOR).item() == pytest.approx(third.item(), rel=1e-10)


@MODES
def test_three_derivatives_of_a_thousand_roots_at_once(derivative):
    expected = derivatives(vmap(root)(FACTORS), FACTORS)
    function = root
    for values in expected:
        function = derivative(function)
        torch.testing.assert_close(vmap(function)(FACTORS), values, rtol=1e-9, atol=0)


def test_derivatives_agree_with_central_differences():
    h = 1e-5
    central = (root(FACTOR + h) - root(FACTOR - h)) / (2 * h)
    assert grad(root)(FACTOR).item() == pytest.approx(central.item(), rel=1e-8)
    central = (grad(root)(FACTOR + h) - grad(root)(FACTOR - h)) / (2 * h)
    assert grad(grad(root))(FACTOR).item() == pytest.approx(central.item(), rel=1e-8)
