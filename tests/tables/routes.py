"""The everyday ways by which Python reaches a number when a function runs: `ROUTES`.

Each makes a function ``fn(x, t) = s x^2 - t`` and ``put``, which replaces the s that fn finds. The derivative has to be
that of the s of the call.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from implicitdiff import custom_root, linear_solve, solvers
from implicitdiff.solvers import KKTSolution, make_kkt_optimality_fn

F64 = torch.float64
Residual = Callable[[Tensor, Tensor], Tensor]
Put = Callable[[float], None]


class Route(NamedTuple):
    name: str
    make: Callable[[], tuple[Residual, Put]]
    exact: bool

    def __str__(self) -> str:
        return self.name


ROUTES: list[Route] = []


def everyday(make: Callable[[], tuple[Residual, Put]]) -> Callable[[], tuple[Residual, Put]]:
    ROUTES.append(Route(make.__name__, make, exact=True))
    return make


def setter(owner: Any, name: str = "s") -> Put:
    return lambda value: setattr(owner, name, value)


def putter(container: Any, key: Any) -> Put:
    return lambda value: operator.setitem(container, key, value)


class Box:
    s = 1.0


def box() -> Any:
    return type("Box", (Box,), {})()


# --- variables --------------------------------------------------------------------------------------------------------


@everyday
def closure_cell():
    s = 1.0

    def fn(x, t):
        return s * x**2 - t

    def put(value):
        nonlocal s
        s = value

    return fn, put


@everyday
def cell_of_a_function_inside():
    inner, put = closure_cell()
    return lambda x, t: inner(x, t), put


@everyday
def cell_of_a_default_argument():
    inner, put = closure_cell()

    def fn(x, t, inner=inner):
        return inner(x, t)

    return fn, put


def script(source: str, **variables: Any) -> tuple[Residual, Put]:
    module = types.ModuleType("a_script")
    module.__dict__.update(s=1.0, **variables)
    exec(source, module.__dict__)
    return module.fn, setter(module)


@everyday
def global_variable():
    return script("def fn(x, t): return s * x**2 - t")


@everyday
def global_variable_of_a_function_inside():
    return script("def inner(x, t): return s * x**2 - t\ndef fn(x, t): return (lambda: inner(x, t))()")


@everyday
def global_variable_of_another_module():
    other = types.ModuleType("another")
    other.s = 1.0
    return script("def fn(x, t): return other.s * x**2 - t", other=other)[0], setter(other)


# --- containers -------------------------------------------------------------------------------------------------------


@everyday
def item_of_a_list():
    items = [1.0]
    return lambda x, t: items[0] * x**2 - t, putter(items, 0)


@everyday
def item_of_a_dictionary():
    options = {"s": 1.0}
    return lambda x, t: options["s"] * x**2 - t, putter(options, "s")


@everyday
def item_of_a_list_of_dictionaries():
    options = [{"s": [1.0]}]
    return lambda x, t: options[0]["s"][-1] * x**2 - t, putter(options[0]["s"], 0)


@everyday
def list_in_a_default_argument():
    items = [1.0]
    return lambda x, t, items=items: items[0] * x**2 - t, putter(items, 0)


@everyday
def list_in_a_keyword_default():
    items = [1.0]

    def fn(x, t, *, items=items):
        return items[0] * x**2 - t

    return fn, putter(items, 0)


@everyday
def list_in_a_partial():
    items = [1.0]
    return functools.partial(lambda items, x, t: items[0] * x**2 - t, items), putter(items, 0)


@everyday
def keyword_list_in_a_partial():
    items = [1.0]
    return functools.partial(lambda x, t, items: items[0] * x**2 - t, items=items), putter(items, 0)


@everyday
def function_in_a_partial():
    inner, put = closure_cell()
    return functools.partial(lambda fn, x, t: fn(x, t), inner), put


@everyday
def function_in_a_list():
    inner, put = closure_cell()
    functions = [inner]
    return lambda x, t: functions[0](x, t), put


@everyday
def replaced_function_in_a_dictionary():
    table = {"square": lambda x: x**2}

    def put(value):
        table["square"] = lambda x: value * x**2

    return lambda x, t: table["square"](x) - t, put


# --- objects ----------------------------------------------------------------------------------------------------------


@everyday
def attribute_of_an_object():
    owner = box()
    return lambda x, t: owner.s * x**2 - t, setter(owner)


@everyday
def attribute_of_an_attribute():
    owner = box()
    owner.inner = box()
    return lambda x, t: owner.inner.s * x**2 - t, setter(owner.inner)


@everyday
def item_of_an_attribute():
    owner = box()
    owner.items = [1.0]
    return lambda x, t: owner.items[0] * x**2 - t, putter(owner.items, 0)


@everyday
def attribute_of_an_item():
    items = [box()]
    return lambda x, t: items[0].s * x**2 - t, setter(items[0])


@everyday
def slot_of_an_object():
    class Slotted:
        __slots__ = ("s",)

    owner = Slotted()
    owner.s = 1.0
    return lambda x, t: owner.s * x**2 - t, setter(owner)


@everyday
def field_of_a_dataclass():
    @dataclasses.dataclass
    class Options:
        s: float = 1.0

    owner = Options()
    return lambda x, t: owner.s * x**2 - t, setter(owner)


@everyday
def bound_method():
    class Problem:
        s = 1.0

        def residual(self, x, t):
            return self.s * x**2 - t

    owner = Problem()
    return owner.residual, setter(owner)


@everyday
def method_of_a_method():
    class Problem:
        s = 1.0

        def scale(self):
            return self.s

        def residual(self, x, t):
            return self.scale() * x**2 - t

    owner = Problem()
    return owner.residual, setter(owner)


@everyday
def method_of_a_parent():
    class Parent:
        def __init__(self):
            self.s = 1.0

        def scale(self):
            return self.s

    class Child(Parent):
        def scale(self):
            return super().scale()

        def residual(self, x, t):
            return self.scale() * x**2 - t

    owner = Child()
    return lambda x, t: owner.residual(x, t), setter(owner)


@everyday
def callable_object():
    class Problem:
        s = 1.0

        def __call__(self, x, t):
            return self.s * x**2 - t

    owner = Problem()
    return owner, setter(owner)


@everyday
def property_of_an_object():
    class Problem:
        hidden = 1.0

        @property
        def s(self):
            return self.hidden

    owner = Problem()
    return lambda x, t: owner.s * x**2 - t, setter(owner, "hidden")


@everyday
def attribute_of_a_class():
    class Options:
        s = 1.0

    return lambda x, t: Options.s * x**2 - t, setter(Options)


@everyday
def attribute_of_the_class_of_an_object():
    class Options:
        s = 1.0

    owner = Options()
    return lambda x, t: owner.s * x**2 - t, setter(Options)


@everyday
def static_method():
    inner, put = closure_cell()

    class Problem:
        residual = staticmethod(inner)

    return Problem.residual, put


@everyday
def class_method():
    class Problem:
        s = 1.0

        @classmethod
        def residual(cls, x, t):
            return cls.s * x**2 - t

    return Problem.residual, setter(Problem)


@everyday
def attribute_of_the_function():
    def fn(x, t):
        return fn.s * x**2 - t

    fn.s = 1.0
    return fn, setter(fn)


@everyday
def array_of_numpy():
    owner = box()
    owner.s = np.array([1.0, 2.0])

    def put(value):
        owner.s = np.array([value, 2.0])

    return lambda x, t: torch.as_tensor(owner.s)[0] * x**2 - t, put


# --- modules ----------------------------------------------------------------------------------------------------------


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = 1.0
        self.register_buffer("weight", torch.ones((), dtype=F64))
        self.dropout = nn.Dropout(0.5).eval()

    def forward(self, x, t):
        return self.s * self.weight * self.dropout(x**2) - t


@everyday
def attribute_of_a_module():
    module = Squared()
    return module, setter(module)


@everyday
def module_in_a_lambda():
    module = Squared()
    return lambda x, t: module(x, t), setter(module)


@everyday
def module_called_functionally():
    module = Squared()
    buffers = {"weight": torch.ones((), dtype=F64)}
    return lambda x, t: functional_call(module, buffers, (x, t)), setter(module)


@everyday
def buffer_of_a_module():
    module = Squared()

    def put(value):
        module.weight = torch.tensor(value, dtype=F64)

    return module, put


@everyday
def submodule_of_a_module():
    module, outer = Squared(), nn.Sequential(nn.Identity())

    def put(value):
        outer[0] = Squared()
        outer[0].s = value

    outer[0] = module
    return lambda x, t: outer[0](x, t), put


# --- wrappers ---------------------------------------------------------------------------------------------------------


@everyday
def wrapper_of_torch():
    inner, put = closure_cell()
    return torch.enable_grad()(inner), put


@everyday
def context_of_torch_as_decorator():
    owner = box()

    @torch.autocast("cpu", enabled=False)
    def fn(x, t):
        return owner.s * x**2 - t

    return fn, setter(owner)


@everyday
def wrapper_of_functools():
    inner, put = closure_cell()

    @functools.wraps(inner)
    def fn(*args):
        return inner(*args)

    return fn, put


@everyday
def decorator_that_is_a_class():
    class Decorated:
        def __init__(self, inner):
            functools.update_wrapper(self, inner)
            self.inner = inner

        def __call__(self, *args):
            return self.inner(*args)

    inner, put = closure_cell()
    return Decorated(inner), put


@everyday
def gradient_of_an_objective():
    inner, put = closure_cell()
    return grad(lambda x, t: (x * inner(x, t) - 2 * t * x) / 3), put


@everyday
def mapped_function():
    inner, put = closure_cell()
    mapped = vmap(inner)
    return lambda x, t: mapped(x[None], t[None])[0], put


@everyday
def condition_of_a_solver():
    inner, put = closure_cell()
    return solvers.lbfgs(lambda x, t: (x * inner(x, t) - 2 * t * x) / 3).optimality_fn, put


@everyday
def condition_of_a_constrained_problem():
    inner, put = closure_cell()
    condition = make_kkt_optimality_fn(lambda x, t: (x * inner(x, t) - 2 * t * x) / 3)
    return lambda x, t: condition(KKTSolution(x), t).primal, put


@everyday
def solution_of_a_decorated_solver():
    owner = box()
    scale = custom_root(lambda u, x: u - owner.s * x**2)(lambda init, x: owner.s * x**2)
    return lambda x, t: scale(None, x) - t, setter(owner)


@everyday
def solution_of_a_solver():
    owner = box()
    solver = solvers.newton(lambda u, x: u - owner.s * x**2)
    return lambda x, t: solver.run(torch.zeros_like(x), x)[0] - t, setter(owner)


@everyday
def solution_of_a_linear_system():
    owner = box()
    solve = linear_solve.solve_lu()
    return lambda x, t: solve(lambda v: v / owner.s, x**2) - t, setter(owner)
