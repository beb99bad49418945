"""What a call keeps for its derivative goes with its graph: nothing chains one call to the next, whatever is kept where
the function looks, and how often a function runs is a matter of the program alone."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from implicitdiff import custom_fixed_point, custom_root, solvers, unroll
from implicitdiff.linear_solve import solve_lu
from implicitdiff.nn import ImplicitMetaGradientModule

F64 = torch.float64


class Mark:
    """Lives as long as a node of a graph."""


def marked(tensor, marks):
    mark = Mark()
    marks.add(mark)
    tensor.grad_fn.metadata["mark"] = mark
    return tensor


# --- solvers of x^2 = scale -------------------------------------------------------------------------------------------


def by_custom_root(fn, start):
    return custom_root(fn)(lambda init: start.sqrt())(None)


def by_newton(fn, start):
    return solvers.newton(fn).run(start.sqrt())[0]


def by_fixed_point(fn, start):
    return custom_fixed_point(lambda x: x - fn(x) / 4)(lambda init: start.sqrt())(None)


def by_steps(fn, start):
    return unroll(lambda x: x - fn(x) / 4, 4, 2)(start.sqrt())


def by_linear_solve(fn, start):
    return solve_lu()(lambda v: (fn(torch.ones_like(start)) + 9) * v, start)


class Problem(ImplicitMetaGradientModule):
    def __init__(self, fn, start):
        super().__init__()
        self.fn, self.x = fn, nn.Parameter(start.sqrt())

    def optimality(self):
        return self.fn(self.x)

    def solve(self):
        return self.x


def by_module(fn, start):
    return Problem(fn, start).solve()


SOLVERS = {f.__name__: f for f in (by_custom_root, by_newton, by_fixed_point, by_steps, by_linear_solve, by_module)}

# --- where the last loss and the last solution are kept --------------------------------------------------------------


def in_a_global():
    """Of a script whose function reads another global."""
    module = types.ModuleType("a_script")
    exec("last = solution = None\nfactor = 1.0\ndef fn(x): return factor * x**2 - scale()", module.__dict__)

    def keep(loss, x):
        module.last, module.solution = loss, x

    return lambda scale: (module.__dict__.update(scale=lambda: scale), module.fn)[1], keep


def in_a_variable():
    last = solution = None
    factor = 1.0

    def make(scale):
        def fn(x):
            return factor * x**2 - scale

        return fn

    def keep(loss, x):
        nonlocal last, solution
        last, solution = loss, x
        return last, solution

    return make, keep


def in_an_attribute():
    owner = types.SimpleNamespace(factor=1.0, last=None, solution=None)

    def keep(loss, x):
        owner.last, owner.solution = loss, x

    return lambda scale: lambda x: owner.factor * x**2 - scale, keep


def in_an_attribute_beside_the_scale():
    class Model:
        def __init__(self):
            self.factor, self.last, self.solution = 1.0, None, None

        def residual(self, x):
            return self.factor * x**2 - self.scale

        def made(self, scale):
            self.scale = scale
            return self.residual

    model = Model()

    def keep(loss, x):
        model.last, model.solution = loss, x

    return model.made, keep


def in_an_attribute_of_a_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=F64))
            self.last = self.solution = self.scale = None

        def forward(self, x):
            return self.factor * x**2 - self.scale

    model = Model()

    def make(scale):
        model.scale = scale
        return model

    def keep(loss, x):
        model.last, model.solution = loss, x

    return make, keep


def in_items_of_a_list():
    items = [1.0, None, None]

    def keep(loss, x):
        items[1:] = [loss, x]

    return lambda scale: lambda x: items[0] * x**2 - scale, keep


def in_entries_of_a_dictionary():
    options = {"factor": 1.0}

    def keep(loss, x):
        options.update(loss=loss, solution=x)

    return lambda scale: lambda x: options["factor"] * x**2 - scale, keep


def in_items_of_an_attribute():
    owner = types.SimpleNamespace(items=[1.0, None, None])

    def keep(loss, x):
        owner.items[1:] = [loss, x]

    return lambda scale: lambda x: owner.items[0] * x**2 - scale, keep


def in_a_default_argument():
    items = [1.0, None, None]

    def keep(loss, x):
        items[1:] = [loss, x]

    return lambda scale: lambda x, items=items: items[0] * x**2 - scale, keep


def in_the_function():
    """The function writes down what it returned, and its operand."""
    owner = types.SimpleNamespace(factor=1.0, residual=None, x=None)

    def make(scale):
        def fn(x):
            owner.x, owner.residual = x, owner.factor * x**2 - scale
            return owner.residual

        return fn

    return make, lambda loss, x: None


PLACES = {
    f.__name__: f
    for f in (
        in_a_global,
        in_a_variable,
        in_an_attribute,
        in_an_attribute_beside_the_scale,
        in_an_attribute_of_a_module,
        in_items_of_a_list,
        in_entries_of_a_dictionary,
        in_items_of_an_attribute,
        in_a_default_argument,
        in_the_function,
    )
}


def rounds(count, solver, place, backward):
    """Solve again and again; yields how many graphs live, each time."""
    make, keep = PLACES[place]()
    marks = weakref.WeakSet()
    theta = torch.tensor(0.7, dtype=F64, requires_grad=True)
    for _ in range(count):
        scale = marked(theta.exp(), marks)
        x = SOLVERS[solver](make(scale), scale.detach())
        loss = x.sum()
        keep(loss, x)
        if backward:
            loss.backward()
        del scale, x, loss
        yield len(marks)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("place", PLACES)
def test_the_graph_of_one_call_lives_at_most(place, solver, backward):
    """Also without the garbage collector, which runs late."""
    gc.collect()
    gc.disable()
    try:
        alive = list(rounds(8, solver, place, backward))
    finally:
        gc.enable()
    # That of the round before is let go of when the last one is kept.
    assert max(alive) <= 2 and alive[-1] == alive[3], alive


@pytest.mark.one_in(4)
@pytest.mark.parametrize("place", ["in_an_attribute", "in_items_of_a_list"])
@pytest.mark.parametrize(("solver", "count"), [("by_custom_root", 2000), ("by_newton", 2000)])
def test_thousands_of_calls_leave_nothing_behind(solver, count, place):
    """Neither graphs nor other objects, as those of caches and registries would be."""
    sizes = {}
    for i, alive in enumerate(rounds(count, solver, place, backward=True), start=1):
        assert alive <= 2
        if i in (count // 10, count):
            gc.collect()
            sizes[i] = len(gc.get_objects())
    assert sizes[count] - sizes[count // 10] < 100


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("solver", ["by_custom_root", "by_newton"])
def test_memory_does_not_grow_with_the_calls(solver):
    owner = types.SimpleNamespace(factor=1.0, last=None)
    weight = torch.full((100_000,), 1e-5, dtype=F64, requires_grad=True)
    sizes = []
    for i in range(300):
        scale = (weight * 2).exp()  # 0.8 MB, which its own graph keeps
        x = SOLVERS[solver](lambda x, scale=scale: owner.factor * x**2 - scale.mean(), scale.detach().mean())
        owner.last = (x**2).sum()
        owner.last.backward()
        if i in (50, 299):
            gc.collect()
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 60e6  # a chain would have kept 200 MB


@pytest.mark.parametrize("factory", ["lbfgs", "newton"])
def test_a_warm_start_keeps_no_earlier_solution(factory):
    fn = (lambda x, t: x**3 - t) if factory == "newton" else (lambda x, t: (x**4 / 4 - t * x).sum())
    theta = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x, marks = torch.ones(1, dtype=F64), weakref.WeakSet()
    for _ in range(10):
        x = marked(getattr(solvers, factory)(fn).run(x, theta)[0], marks)
        gc.collect()
        assert len(marks) == 1


# --- what is saved ----------------------------------------------------------------------------------------------------


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


class Saved:
    """Knows what autograd has saved and not yet let go of."""

    def __init__(self):
        self.alive = weakref.WeakSet()

    def pack(self, tensor):
        kept = Kept(tensor.detach())
        self.alive.add(kept)
        return kept

    def bytes(self):
        gc.collect()
        return sum(kept.tensor.nbytes for kept in self.alive)

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)


N = 40


def equilibrium(weight):
    return lambda z, x: torch.tanh(weight @ z * 0.1 + x)


def saved_solve(name, weight, x, steps=20):
    step = equilibrium(weight)

    def iterate(z, x):
        for _ in range(steps):
            z = step(z, x)
        return z

    start = torch.zeros(N, dtype=F64)
    return {
        "custom_fixed_point": lambda: custom_fixed_point(step)(iterate)(start, x),
        "custom_root": lambda: custom_root(lambda z, x: z - step(z, x))(iterate)(start, x),
        "newton": lambda: solvers.newton(lambda z, x: z - step(z, x)).run(start, x)[0],
        "anderson": lambda: solvers.anderson(step).run(start, x)[0],
    }[name]()


@pytest.mark.parametrize("name", ["custom_fixed_point", "custom_root", "newton", "anderson"])
def test_one_evaluation_is_saved_until_backward(name):
    torch.manual_seed(0)
    weight = (torch.randn(N, N, dtype=F64) / N**0.5).requires_grad_()
    x = torch.linspace(-1, 1, N, dtype=F64).requires_grad_()
    with (one := Saved()).hooks():
        z = x + equilibrium(weight)(x, x)  # the same operations, and the operands
    with (saved := Saved()).hooks():
        solution = saved_solve(name, weight, x)
        loss = solution.sum()
    matrix = weight.nbytes  # saved by several operations it counts as often here, not in memory
    assert saved.bytes() <= 2 * one.bytes() + 2 * matrix + 16 * x.nbytes
    loss.backward()
    assert saved.bytes() == 0
    assert z.requires_grad and solution.grad_fn is not None


@pytest.mark.parametrize("name", ["custom_fixed_point", "custom_root"])
def test_what_is_saved_does_not_depend_on_the_steps(name):
    weight, x = torch.eye(N, dtype=F64, requires_grad=True), torch.ones(N, dtype=F64, requires_grad=True)
    sizes = []
    for steps in 10, 100:
        with (saved := Saved()).hooks():
            solution = saved_solve(name, weight, x, steps)
        sizes.append(saved.bytes())
        del solution
        assert saved.bytes() == 0
    assert sizes[0] == sizes[1]


# --- how often a function runs ----------------------------------------------------------------------------------------


def energy(x, c):
    return ((x - c) ** 4).sum() / 4 + (x**2).sum() / 2


class Counted:
    def __init__(self, fn):
        self.fn, self.count = fn, 0

    def __call__(self, *args):
        self.count += 1
        return self.fn(*args)


C = torch.tensor([0.3, -0.7, 1.1], dtype=F64)


def of_newton(energy):
    solver = solvers.newton(lambda x, c: grad(energy)(x, c), compile="off")
    return lambda c: solver.run(torch.zeros(3, dtype=F64), c)[0].sum()


def of_lbfgs(energy):
    solver = solvers.lbfgs(energy, compile="off")
    return lambda c: solver.run(torch.zeros(3, dtype=F64), c)[0].sum()


def of_custom_root(energy):
    def solve(init, c):
        x = torch.zeros_like(c)
        for _ in range(20):
            x = x - ((x - c) ** 3 + x) / (3 * (x - c) ** 2 + 1)
        return x

    return lambda c: custom_root(grad(energy))(solve)(None, c).sum()


def backward(f):
    def run(c):
        c = c.clone().requires_grad_()
        f(c).backward()
        return c.grad

    return run


RUNS = {"grad": grad, "backward": backward, "vmap of grad": lambda f: lambda c: vmap(grad(f))(torch.stack([c, 2 * c]))}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("problem", [of_newton, of_lbfgs, of_custom_root])
def test_a_program_evaluates_its_function_as_often_each_time(problem, run):
    counts, garbage = set(), []
    for i in range(200 if problem is of_newton else 40):
        counted = Counted(energy)
        RUNS[run](problem(counted))(C)
        counts.add(counted.count)
        garbage.append(object() if i % 3 else torch.zeros(i + 1))  # so that addresses differ
        del garbage[: i % 2]
    assert len(counts) == 1, counts
