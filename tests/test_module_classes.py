"""Subclasses of ImplicitMetaGradientModule: the signature of solve, inheritance, and what is refused."""

from __future__ import annotations

import abc

import pytest
import torch
from checks.differences import slope as slope_of
from tables.meta_modules import (
    EYE,
    F64,
    SLOPE,
    Ridge,
    RidgeByResiduals,
    X,
    Y,
    by_scipy,
    close,
    expected_grad,
    grad,
    leaf,
    newton,
    ridge,
    zeros,
)
from torch import nn

from implicitdiff.errors import LinearSolveError
from implicitdiff.linear_solve import solve_cg, solve_normal_cg
from implicitdiff.nn import ImplicitMetaGradientModule, MetaGradientModule

# Calls of solve


class Signature(Ridge):
    def objective(self, x, y, *others, scale=1.0, shift):
        loss = sum(((x @ self.w - scale * z - shift) ** 2).sum() for z in (y, *others))
        return loss + self.penalty * (self.w**2).sum()

    def solve(self, x, y, *others, scale=1.0, shift, steps=1):
        newton(self, x, y, *others, scale=scale, shift=shift, steps=steps)
        return self.w


@pytest.mark.parametrize("others", [(), (2 * Y,), (2 * Y, -Y)])
@pytest.mark.parametrize("scale", [{}, {"scale": 1.7}])
def test_solve_takes_arguments_by_position_by_keyword_and_by_default(others, scale):
    penalty, shift = leaf(), leaf(0.2)
    w = Signature(penalty).solve(X, Y, *others, **scale, shift=shift)
    factor, count = scale.get("scale", 1.0), 1 + len(others)

    def closed(penalty, shift):
        mean = sum(factor * z + shift for z in (Y, *others)) / count
        return ridge(penalty / count, X, mean)

    wanted = grad(closed(penalty, shift).sum(), penalty, shift)
    for mine, other in zip(grad(w.sum(), penalty, shift), wanted, strict=True):
        close(mine, other)


def test_keyword_arguments_may_come_in_any_order():
    penalty = leaf()
    close(grad(Ridge(penalty).solve(y=Y, x=X).w.sum(), penalty), SLOPE)


def test_arguments_may_be_trees():
    class Inner(Ridge):
        def objective(self, batch):
            return super().objective(*batch["data"])

        def solve(self, batch):
            newton(self, batch, steps=1)
            return self

    scale = leaf(1.3)
    w = Inner(leaf()).solve({"data": (X * scale, Y), "name": "train"}).w
    close(grad(w.sum(), scale), expected_grad(lambda s: ridge(0.7, X * s).sum(), 1.3))


def test_options_of_solve_alone_have_defaults_and_stay_there():
    class Inner(Ridge):
        def solve(self, x, y, steps=2, verbose=False):
            assert steps == 2 and verbose is False
            newton(self, x, y, steps=steps)
            return self

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


def test_options_of_solve_alone_may_be_given_by_keyword():
    class Inner(Ridge):
        def solve(self, x, y, steps=2, verbose=False):
            assert steps == 3 and verbose is True
            newton(self, x, y, steps=steps)
            return self

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, y=Y, steps=3, verbose=True).w.sum(), penalty), SLOPE)


def test_solve_is_inherited():
    class Inner(Ridge):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


def test_a_solve_may_call_its_parents_and_itself():
    calls = []

    class Inner(Ridge):
        def solve(self, x, y, again=True):
            calls.append(again)
            if again:
                self.solve(x, y, again=False)
            assert self.w.is_leaf
            return super().solve(x, y)

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)
    assert calls == [True, False]


def test_a_mixin_may_bring_solve():
    class Newton:
        def solve(self, x, y):
            newton(self, x, y, steps=1)
            return self

    class Problem(ImplicitMetaGradientModule, abc.ABC):
        objective = Ridge.objective

        def __init__(self, penalty):
            super().__init__()
            self.penalty, self.w = penalty, zeros(2)

    class Inner(Newton, Problem):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


class Counting:
    def __init__(self, solve):
        self.solve, self.calls = solve, 0

    def __call__(self, matvec, b):
        self.calls += 1
        return self.solve(matvec, b)


def test_the_linear_solve_is_inherited_overridden_and_reset():
    first, second = Counting(solve_cg()), Counting(solve_normal_cg())

    class Inner(Ridge, linear_solve=first):
        pass

    class Heir(Inner):
        pass

    class Other(Inner, linear_solve=second):
        pass

    class Default(Inner, linear_solve=None):
        pass

    for kind, calls in [(Inner, (1, 0)), (Heir, (2, 0)), (Other, (2, 1)), (Default, (2, 1))]:
        penalty = leaf()
        close(grad(kind(penalty).solve(X, Y).w.sum(), penalty), SLOPE, 1e-10)
        assert (first.calls, second.calls) == calls


def test_a_plain_function_may_be_the_linear_solve():
    def solve(matvec, b):
        (name,) = b
        columns = [matvec({name: e})[name] for e in EYE]
        return {name: torch.linalg.solve(torch.stack(columns, 1), b[name])}

    class Inner(Ridge, linear_solve=solve):
        pass

    penalty = leaf()
    close(grad(Inner(penalty).solve(X, Y).w.sum(), penalty), SLOPE)


# What is refused


def method(self):
    return torch.zeros(())


def test_meta_modules_and_children_have_names():
    class Tuned(MetaGradientModule):
        def __init__(self, prior, deep):
            super().__init__()
            self.prior, self.again = prior, prior
            self.wrap = nn.Sequential(nn.Linear(1, 1), deep)

    prior, deep = nn.Sequential(nn.Linear(1, 1)), nn.Linear(1, 1)
    tuned = Tuned(prior, deep)
    assert dict(tuned.named_meta_children()) == {"prior": prior} and [*tuned.meta_children()] == [prior]
    named = {"prior": prior, "prior.0": prior[0], "wrap.1": deep}
    assert dict(tuned.named_meta_modules()) == named
    assert set(dict(tuned.named_meta_modules(prefix="of"))) == {f"of.{name}" for name in named}
    assert {name for name, _ in tuned.named_meta_modules(remove_duplicate=False)} == {*named, "again", "again.0"}


NO_CLASS = {
    "no solve": ({"objective": method}, r"Inner does not define solve\(\), which is required; for a base class"),
    "no condition": (
        {"solve": method},
        r"Inner defines neither objective\(\) nor optimality\(\), of which one is required",
    ),
    "nothing": ({}, r"does not define solve.* and defines neither objective"),
    "a number": ({"solve": method, "objective": 3}, r"Inner: objective must be a method, def.*got int"),
    "a loss": ({"solve": method, "objective": nn.MSELoss()}, r"objective must be a method.*got MSELoss"),
    "static": ({"solve": method, "optimality": staticmethod(method)}, r"optimality must be a method.*staticmethod"),
    "a property": ({"solve": property(method), "objective": method}, r"solve must be a method.*property"),
}


@pytest.mark.parametrize(("body", "match"), NO_CLASS.values(), ids=NO_CLASS)
def test_a_class_that_cannot_be_used_is_not_made(body, match):
    with pytest.raises(TypeError, match=match):
        type(ImplicitMetaGradientModule)("Inner", (ImplicitMetaGradientModule,), dict(body))


def test_a_base_says_that_it_leaves_methods_to_its_subclasses():
    class Posed(ImplicitMetaGradientModule, abc.ABC):
        objective = Ridge.objective

    class Declared(ImplicitMetaGradientModule):
        @abc.abstractmethod
        def optimality(self, x, y):
            """Of each kind."""

    for base in (Posed, Declared):
        with pytest.raises(TypeError, match=r"abstract|does not define solve"):
            base()
        with pytest.raises(TypeError, match="does not define solve"):
            type(base)("Child", (base,), {"optimality": RidgeByResiduals.optimality})

    class Whole(Posed):
        solve = Ridge.solve

    assert isinstance(Whole(), Posed)


def test_an_objective_that_is_not_there_says_so():
    class Inner(Ridge):
        objective = ImplicitMetaGradientModule.objective
        optimality = RidgeByResiduals.optimality

    with pytest.raises(NotImplementedError, match=r"Inner does not define objective\(\)"):
        Inner(leaf()).objective()


def test_a_linear_solve_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"Inner: linear_solve must be a function solve\(matvec, b\), got str"):

        class Inner(Ridge, linear_solve="cg"):
            pass


def test_arguments_that_do_not_fit_are_refused():
    class Inner(Ridge):
        def solve(self, x):
            return self

    module = Ridge(leaf())
    with pytest.raises(TypeError, match=r"missing a required argument: 'y'.*Ridge\.solve.*Ridge\.objective"):
        module.solve(X)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'z'.*Ridge\.solve.*Ridge\.objective"):
        module.solve(X, Y, z=1)
    with pytest.raises(TypeError, match=r"no argument is given for parameter 'y'.*Inner\.solve.*Ridge\.objective"):
        Inner(leaf()).solve(X)
    assert module.w.is_leaf and not module.w.any()


def test_a_module_without_inner_parameters_is_refused():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.w.requires_grad_(False)

    with pytest.raises(
        ValueError, match=r"Inner\.solve: the module has no inner parameters; create the parameters to be solved for"
    ):
        Inner(leaf()).solve(X, Y)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda self: (self.w, self.w), r"must return one residual for each of the inner parameters \['w'\], got 2"),
        (lambda self: {"v": self.w}, "Inner.optimality"),
        (lambda self: (self.w[:1],), "Inner.optimality"),
        (lambda self: {"w": self.w.sum()}, "Inner.optimality"),
    ],
)
def test_residuals_that_are_not_like_the_inner_parameters_are_refused(found, message):
    class Inner(Ridge):
        def optimality(self, x, y):
            return found(self)

    module = Inner(leaf())
    with pytest.raises(ValueError, match=message):
        module.solve(X, Y)
    assert module.w.is_leaf and not module.w.any()


def test_inner_parameters_read_in_another_way_than_as_attributes_are_refused():
    class Listed(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.listed = [self.w]

        def objective(self, x, y):
            return ((x @ self.listed[0] - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    class Bound(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.product = lambda x: x @ self.w

        def objective(self, x, y):
            return ((self.product(x) - y) ** 2).sum() + self.penalty * (self.w**2).sum()

    for kind in (Listed, Bound):
        module = kind(leaf())
        with pytest.raises(ValueError, match=r"inner parameter 'w' is not read as an attribute"):
            module.solve(X, Y)
        assert module.w.is_leaf and not module.w.any()


def test_inner_parameters_that_are_gone_are_named():
    class Inner(Ridge):
        def solve(self, x, y):
            del self.w
            return self

    with pytest.raises(ValueError, match=r"Inner\.solve: the module has lost its inner parameter 'w'"):
        Inner(leaf()).solve(X, Y)


def test_an_inner_parameter_that_nothing_determines_fails_in_the_derivative():
    class Inner(Ridge):
        def __init__(self, penalty):
            super().__init__(penalty)
            self.unused = zeros(1)

        def solve(self, x, y):
            by_scipy(self, x, y)
            return self

    penalty = leaf()
    w = Inner(penalty).solve(X, Y).w
    with pytest.raises(LinearSolveError, match="singular"):
        grad(w.sum(), penalty)


class Layered(ImplicitMetaGradientModule):
    def __init__(self, penalty, layer):
        super().__init__()
        self.penalty = penalty
        self.net = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 1)).to(F64)
        self.net[1].load_state_dict(layer.state_dict())

    def objective(self):
        return (self.net(X) ** 2).sum() + self.penalty * sum((p**2).sum() for p in self.parameters())

    def solve(self):
        newton(self)
        return self


def test_dropout_in_training_mode_is_refused_and_in_evaluation_mode_is_not():
    module = Layered(leaf(), nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"Layered\.optimality draws random numbers.*dropout: use eval mode"):
        module.solve()
    assert module.eval().solve().net[0].weight.requires_grad


def test_batch_normalisation_in_training_mode_is_refused_and_in_evaluation_mode_is_not():
    module = Layered(leaf(), nn.BatchNorm1d(2, affine=False))
    with pytest.raises((ValueError, RuntimeError), match=r"in place|in-place"):
        module.solve()
    assert module.eval().solve().net[0].weight.requires_grad


def test_an_lstm_may_be_the_inner_network():
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, penalty, state):
            super().__init__()
            self.penalty, self.net = penalty, nn.LSTM(2, 1).to(F64)
            self.net.load_state_dict(state)

        def objective(self):
            loss = ((self.net(X)[0][:, 0] - 0.3 * Y) ** 2).sum()
            return loss + self.penalty * sum((p**2).sum() for p in self.parameters())

        def solve(self):
            newton(self, steps=12)
            return self

    torch.manual_seed(0)
    state = {k: 0.1 * v for k, v in nn.LSTM(2, 1).to(F64).state_dict().items()}

    def outer(penalty):
        return (Inner(penalty, state).solve().net(X)[0] ** 2).sum()

    penalty = leaf(1.0)
    close(grad(outer(penalty), penalty), slope_of(lambda p: outer(torch.tensor(p, dtype=F64)).item(), 1.0), 1e-8)
