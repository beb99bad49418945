"""The code of installed packages is trusted: it is not looked through at each call, and where it has become another
nevertheless, an error says so. What a user can set of a package is put back as everything else is."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
import torch
from tables.moved import WAYS
from tables.routes import setter
from torch import nn
from torch.func import grad

import implicitdiff._torch.messages as messages
from implicitdiff import custom_root, solvers
from implicitdiff._closures.packages import is_installed
from implicitdiff._closures.snapshot import Snapshot

SOURCE = """
import functools
import torch
from torch import nn
from . import settings

scale = 1.0

def residual(x, t):
    return scale * x**2 - t

def energy(x, t):
    return scale * x**3 / 3 - t * x

def helped(x, t):
    return residual(x, t)

def with_default(x, t, options={"s": 1.0}):
    return options["s"] * x**2 - t

def scaled_by(s):
    def fn(x, t):
        return s * x**2 - t
    def put(value):
        nonlocal s
        s = value
    return fn, put

def plain(fn):
    return lambda *args: fn(*args)

def wrapping(fn):
    return functools.wraps(fn)(lambda *args: fn(*args))

class Options:
    s = 1.0

class Slotted:
    __slots__ = ("inner",)
    def scaled(self, x):
        return self.inner * x**2

class Base:
    unit = 1.0
    def factor(self):
        return self.inner["s"]

class Problem(Base):
    def __init__(self):
        self.inner = {"s": 1.0}
    @property
    def power(self):
        return 1.0 * self.unit
    @functools.cached_property
    def offset(self):
        return torch.zeros((), dtype=torch.float64)
    def scaled(self, x):
        if not hasattr(self, "ready"):
            self.ready = torch.ones((), dtype=torch.float64)
        return self.factor() * self.power * x**2 * self.ready + self.offset
    def residual(self, x, t):
        return scale * self.scaled(x) - t
    def __call__(self, x, t):
        return self.residual(x, t)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = 1.0
        self.register_buffer("weight", torch.ones((), dtype=torch.float64))
    def forward(self, x):
        return self.s * self.weight * x**2
"""
# Each function names the next two.
MANY = "".join(f"def f{i}(x, t): return f{i + 1}(x, t) + f{i + 2}(x, t)\n" for i in range(3000))


def make(folder, record=False):
    package = folder / "acme"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "settings.py").write_text("s = 1.0\n")
    (package / "many.py").write_text(MANY)
    (folder / "beside.py").write_text("scale = 1.0\ndef residual(x, t):\n    return scale * x**2 - t\n")
    if record:
        (folder / "acme-1.0.dist-info").mkdir()
        (folder / "acme-1.0.dist-info" / "RECORD").write_text("acme/__init__.py,sha256=0,1\nacme/settings.py,,\n")
    return str(folder)


# "backward" runs no function again, and "jacfwd" runs it before it changes.
LATER = ["twice", "grad", "vmap of grad"]


@pytest.fixture
def imported(monkeypatch):
    """Imports modules from a folder, for the time of a test."""
    names = ("acme", "acme.settings", "acme.many", "beside")

    def load(folder, name="acme"):
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def acme(imported, tmp_path):
    """A package that is installed."""
    return imported(make(tmp_path / "site-packages"))


def solved_then(condition, put):
    def f(t):
        put(1.0)
        x = custom_root(condition)(lambda init, t: t.sqrt())(None, t)
        put(4.0)
        return x

    return f


def is_that_of_the_call(condition, put, way):
    found = WAYS[way](solved_then(condition, put))
    torch.testing.assert_close(found, WAYS[way](torch.sqrt), rtol=1e-8, atol=0)


# --- what is trusted --------------------------------------------------------------------------------------------------


def test_a_package_is_installed_where_an_installer_puts_it(imported, acme):
    assert is_installed("acme") and is_installed("acme.settings") and is_installed("pytest") and is_installed("torch")
    assert not any(map(is_installed, (__name__, "__main__", "sys", "json", "no such module", None)))


@pytest.mark.parametrize("way", LATER)
def test_a_package_where_its_author_writes_it_is_followed(way, imported, tmp_path):
    acme = imported(make(tmp_path / "src"))
    assert not is_installed("acme")
    is_that_of_the_call(lambda x, t: acme.helped(x, t), setter(acme, "scale"), way)


def test_a_folder_that_packages_are_installed_to_has_their_records(imported, tmp_path):
    folder = make(tmp_path / "target", record=True)
    imported(folder), imported(folder, "acme.many"), imported(folder, "beside")
    assert is_installed("acme") and is_installed("acme.settings") and is_installed("acme.many")
    assert not is_installed("beside")


@pytest.mark.parametrize("way", LATER)
def test_a_variable_of_an_installed_package_that_changes_is_refused(way, acme):
    for condition in (lambda x, t: acme.residual(x, t), lambda x, t: acme.helped(x, t)):
        with pytest.raises(RuntimeError, match="has changed since the call"):
            WAYS[way](solved_then(condition, setter(acme, "scale")))


@pytest.mark.parametrize("way", ["backward", "jacfwd"])
def test_the_other_derivatives_are_right_whatever_changes(way, acme):
    is_that_of_the_call(lambda x, t: acme.residual(x, t), setter(acme, "scale"), way)


def test_a_large_package_is_not_looked_through(acme):
    many = importlib.import_module("acme.many")
    for fn in (lambda x: acme.many.f0(x, x), lambda x: many.f0(x, x), lambda x, f=many.f0: f(x, x)):
        values = [location.value for location in Snapshot(fn).locations]
        assert sum(len(v) if isinstance(v, dict) else 1 for v in values) < 10


# --- the package of the function itself ------------------------------------------------------------------------------

GIVEN = {
    "a function": lambda acme: acme.residual,
    "one that calls another": lambda acme: acme.helped,
    "a partial": lambda acme: functools.partial(acme.residual),
    "a gradient": lambda acme: grad(acme.energy),
    "a wrapper of torch": lambda acme: torch.enable_grad()(acme.residual),
    "a method": lambda acme: acme.Problem().residual,
    "an object": lambda acme: acme.Problem(),
    "the condition of a solver": lambda acme: solvers.lbfgs(acme.energy).optimality_fn,
}


@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("given", GIVEN)
def test_the_package_of_the_function_is_followed(given, way, acme):
    is_that_of_the_call(GIVEN[given](acme), setter(acme, "scale"), way)


@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("wrap", ["plain", "wrapping"])
def test_a_users_function_in_a_wrapper_of_a_package_is_followed(wrap, way, acme):
    s = {"s": 1.0}
    is_that_of_the_call(getattr(acme, wrap)(lambda x, t: s["s"] * x**2 - t), functools.partial(s.__setitem__, "s"), way)


# --- what a user can set of a package --------------------------------------------------------------------------------


def attribute_of_a_module(acme):
    return lambda x, t: acme.settings.s * x**2 - t, setter(acme.settings, "s")


def attribute_of_a_class(acme):
    return lambda x, t: acme.Options.s * x**2 - t, setter(acme.Options, "s")


def attribute_of_the_class_of_an_object(acme):
    owner = acme.Options()
    return lambda x, t: owner.s * x**2 - t, setter(acme.Options, "s")


def attribute_that_hides_that_of_the_class(acme):
    owner = acme.Options()
    return lambda x, t: owner.s * x**2 - t, lambda s: vars(owner).update(s=s) if s > 1 else vars(owner).clear()


def item_that_a_method_looks_up(acme):
    owner = acme.Problem()
    return lambda x, t: owner.scaled(x) - t, lambda value: owner.inner.update(s=value)


def attribute_that_a_method_looks_up(acme):
    owner = acme.Problem()
    return lambda x, t: owner.scaled(x) - t, lambda value: setattr(owner, "inner", {"s": value})


def attribute_of_a_class_that_a_property_looks_up(acme):
    owner = acme.Problem()
    return lambda x, t: owner.scaled(x) - t, setter(acme.Base, "unit")


def attribute_of_an_object_in_an_argument(acme):
    owner = acme.Problem()
    return functools.partial(lambda owner, x, t: owner.scaled(x) - t, owner), setter(owner, "unit")


def slot_that_a_method_looks_up(acme):
    owner = acme.Slotted()
    owner.inner = 1.0
    return lambda x, t: owner.scaled(x) - t, setter(owner, "inner")


def attribute_of_a_layer(acme):
    layer = acme.Layer()
    return lambda x, t: layer(x) - t, setter(layer, "s")


def buffer_of_a_layer(acme):
    layer = acme.Layer()
    return lambda x, t: layer(x) - t, lambda v: setattr(layer, "weight", torch.tensor(v, dtype=torch.float64))


def attribute_of_a_layer_of_a_users_module(acme):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = acme.Layer()

        def forward(self, x, t):
            return self.layer(x) - t

    mine = Mine()
    return mine, setter(mine.layer, "s")


def method_of_a_users_class(acme):
    class Mine(acme.Problem):
        s = 1.0

        def factor(self):
            return self.s

    owner = Mine()
    return lambda x, t: owner.scaled(x) - t, setter(owner, "s")


def variable_of_a_function(acme):
    fn, put = acme.scaled_by(1.0)
    return lambda x, t: fn(x, t), put


def default_of_a_function(acme):
    options = acme.with_default.__defaults__[0]
    return lambda x, t: acme.with_default(x, t), functools.partial(options.__setitem__, "s")


def function_of_a_module(acme):
    first = acme.residual
    return lambda x, t: acme.residual(x, t), lambda s: setattr(acme, "residual", first if s == 1 else acme.with_default)


SET = (
    attribute_of_a_module,
    attribute_of_a_class,
    attribute_of_the_class_of_an_object,
    attribute_that_hides_that_of_the_class,
    item_that_a_method_looks_up,
    attribute_that_a_method_looks_up,
    attribute_of_a_class_that_a_property_looks_up,
    attribute_of_an_object_in_an_argument,
    slot_that_a_method_looks_up,
    attribute_of_a_layer,
    buffer_of_a_layer,
    attribute_of_a_layer_of_a_users_module,
    method_of_a_users_class,
    variable_of_a_function,
    default_of_a_function,
    function_of_a_module,
)


@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("place", SET, ids=lambda place: place.__name__)
def test_what_a_user_sets_of_an_installed_package_is_that_of_the_call(place, way, acme):
    is_that_of_the_call(*place(acme), way)


def test_a_package_whose_name_begins_as_that_of_torch_is_not_torch():
    """Code of ``torchvision`` is the user's: messages name its line."""
    name = f"{Path(torch.__file__).parent}vision/ops.py"
    seen = {}
    exec(compile("asks, line = is_torch_asking(), line_of_user()", name, "exec"), dict(vars(messages)), seen)
    assert not seen["asks"] and seen["line"].startswith(f", at {name}:1")
