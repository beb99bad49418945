"""Ways by which a number is reached that no walk over variables, containers and attributes finds: `UNUSUAL`.

As in `routes`, but the derivative is that of the call or is refused.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import itertools
import operator
import os
import sys
import threading
import types
from collections.abc import Callable

import numpy as np
import torch

from tables.routes import Put, Residual, Route, Squared, box, putter, script, setter

UNUSUAL: list[Route] = []


def unusual(make: Callable[[], tuple[Residual, Put]]) -> Callable[[], tuple[Residual, Put]]:
    UNUSUAL.append(Route(make.__name__, make, exact=False))
    return make


@unusual
def attribute_by_name():
    owner = box()
    return lambda x, t: getattr(owner, "s"[:1]) * x**2 - t, setter(owner)


@unusual
def dictionary_of_an_object():
    owner = box()
    owner.s = 1.0
    return lambda x, t: vars(owner)["s"] * x**2 - t, setter(owner)


@unusual
def dictionary_of_globals():
    return script("def fn(x, t): return globals()['s'] * x**2 - t")


@unusual
def evaluated_name():
    return script("def fn(x, t): return eval('s') * x**2 - t")


@unusual
def getter_of_an_attribute():
    owner, get = box(), operator.attrgetter("s")
    return lambda x, t: get(owner) * x**2 - t, setter(owner)


@unusual
def attribute_made_on_demand():
    values = {"s": 1.0}

    class Dynamic:
        def __getattr__(self, name):
            return values[name]

    owner = Dynamic()
    return lambda x, t: owner.s * x**2 - t, putter(values, "s")


@unusual
def context_variable():
    variable = contextvars.ContextVar("s", default=1.0)
    return lambda x, t: variable.get() * x**2 - t, variable.set


@unusual
def variable_of_a_thread():
    local = threading.local()
    local.s = 1.0
    return lambda x, t: local.s * x**2 - t, setter(local)


@unusual
def variable_of_the_environment():
    def put(value):
        os.environ["IMPLICITDIFF_TEST"] = str(value)

    put(1.0)
    return lambda x, t: float(os.environ["IMPLICITDIFF_TEST"]) * x**2 - t, put


@unusual
def module_imported_inside():
    other = types.ModuleType("implicitdiff_moved")
    other.s = 1.0

    def fn(x, t):
        sys.modules["implicitdiff_moved"] = other
        try:
            from implicitdiff_moved import s
        finally:
            del sys.modules["implicitdiff_moved"]
        return s * x**2 - t

    return fn, setter(other)


@unusual
def item_of_a_deque():
    items = collections.deque([1.0])
    return lambda x, t: items[0] * x**2 - t, putter(items, 0)


@unusual
def item_of_an_array():
    items = array.array("d", [1.0])
    return lambda x, t: items[0] * x**2 - t, putter(items, 0)


@unusual
def memory_of_c():
    number = ctypes.c_double(1.0)
    return lambda x, t: number.value * x**2 - t, setter(number, "value")


@unusual
def contents_of_a_numpy_array():
    values = np.array([1.0])
    return lambda x, t: float(values[0]) * x**2 - t, putter(values, 0)


@unusual
def operand_of_numpy():
    values = np.array(1.0)
    return lambda x, t: torch.from_numpy(np.atleast_1d(values))[0] * x**2 - t, putter(values, ())


@unusual
def state_of_an_iterator():
    numbers = itertools.repeat(1.0)
    state = {"numbers": numbers}
    return lambda x, t: next(state["numbers"]) * x**2 - t, lambda v: state.update(numbers=itertools.repeat(v))


@unusual
def code_of_a_function():
    def fn(x, t):
        return x**2 - t

    def put(value):
        fn.__code__ = fn.__code__.replace(co_consts=tuple(fn.__code__.co_consts))
        names = {}
        exec(f"def fn(x, t): return {value!r} * x**2 - t", names)
        fn.__code__ = names["fn"].__code__

    return fn, put


@unusual
def defaults_of_a_function():
    def fn(x, t, s=1.0):
        return s * x**2 - t

    def put(value):
        fn.__defaults__ = (value,)

    return fn, put


@unusual
def method_replaced_on_its_class():
    class Problem:
        def scale(self):
            return 1.0

    owner = Problem()

    def put(value):
        Problem.scale = lambda self: value

    return lambda x, t: owner.scale() * x**2 - t, put


@unusual
def method_replaced_on_an_object():
    owner = box()
    owner.scale = lambda: 1.0

    def put(value):
        owner.scale = lambda: value

    return lambda x, t: owner.scale() * x**2 - t, put


@unusual
def hook_of_a_module():
    module, handles = Squared(), []

    def put(value):
        for handle in handles:
            handle.remove()
        handles[:] = [module.dropout.register_forward_hook(lambda module, args, out: value * out)]

    return module, put


@unusual
def descriptor_with_a_store_of_its_own():
    class Stored:
        def __set_name__(self, owner, name):
            self.values = collections.UserDict()

        def __get__(self, instance, owner):
            return self.values.get("s", 1.0)

        def __set__(self, instance, value):
            self.values["s"] = value

    class Options:
        s = Stored()

    owner = Options()
    return lambda x, t: owner.s * x**2 - t, setter(owner)


@unusual
def state_of_a_generator():
    def numbers():
        value = 1.0
        while True:
            sent = yield value
            value = value if sent is None else sent

    generator = numbers()
    next(generator)
    return lambda x, t: next(generator) * x**2 - t, lambda value: generator.send(value)
