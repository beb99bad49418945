"""The forward pass keeps no graph, and nothing outlives its use."""

from __future__ import annotations

import gc
import weakref

import torch
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from implicitdiff import custom_fixed_point
from implicitdiff.linear_solve import solve_cg


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


class SavedBytes:
    """Counts what autograd saves."""

    def __init__(self) -> None:
        self.total = 0

    def pack(self, tensor):
        self.total += tensor.nbytes
        # Not the tensor itself, which a result would hold in a cycle.
        return tensor.detach()

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def solve_with(steps: int):
    def iterate(z, x):
        for _ in range(steps):
            z = torch.tanh(0.5 * z + x)
        return z

    return iterate


def test_what_autograd_saves_does_not_grow_with_the_iterations():
    saved = {}
    for steps in 10, 1000:
        x = torch.zeros(100, requires_grad=True)
        solver = custom_fixed_point(lambda z, x: torch.tanh(0.5 * z + x))(solve_with(steps))
        with SavedBytes() as counter:
            solver(torch.zeros(100), x)
        saved[steps] = counter.total
    assert saved[10] == saved[1000] <= 4 * 100 * 4


class PeakTensors(TorchDispatchMode):
    """The most results of operations alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.alive.add(out)
        self.peak = max(self.peak, len(self.alive))
        return out


def test_the_solver_holds_no_more_tensors_for_more_iterations():
    peaks = {}
    for steps in 10, 500:
        x = torch.zeros(10, requires_grad=True)
        solver = custom_fixed_point(lambda z, x: torch.tanh(0.5 * z + x))(solve_with(steps))
        with PeakTensors() as counter:
            solver(torch.zeros(10), x).sum().backward()
        peaks[steps] = counter.peak
    assert peaks[10] == peaks[500]


def test_nothing_is_left_behind():
    weight = torch.eye(4, requires_grad=True)

    def loss(x):
        solver = custom_fixed_point(lambda z: torch.tanh(0.5 * weight @ z + x), solve=solve_cg())(
            lambda init: solve_with(20)(init, x)
        )
        return solver(torch.zeros(4)).sum()

    def use():
        x = torch.zeros(4, requires_grad=True)
        loss(x).backward()
        grad(loss)(x)
        vmap(grad(loss))(torch.zeros(3, 4))
        weight.grad = None

    use()
    before = live_tensors()
    for _ in range(5):
        use()
    assert live_tensors() <= before


def test_a_solution_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        x = torch.zeros(4, requires_grad=True)
        z = custom_fixed_point(lambda z, x: torch.tanh(0.5 * z + x))(solve_with(5))(torch.zeros(4), x)
        z.sum().backward()
        watch = weakref.ref(z)
        del z
        assert watch() is None
    finally:
        gc.enable()


SCRIPT = """
import weakref

import torch
from implicitdiff import custom_root

theta = torch.tensor(8.0, requires_grad=True)

def condition(x, theta):
    return x**3 - theta

@custom_root(condition)
def cube_root(init, theta):
    return theta ** (1 / 3)

watches = []
for _ in range(5):
    x = cube_root(torch.tensor(1.0), theta)
    loss = x**2
    loss.backward()
    watches.append(weakref.ref(x))
"""


def test_a_script_whose_variables_are_global_keeps_only_its_last_graph():
    # The condition's globals count as they are at the call, but the solution of the call before is not for it.
    variables = {"__name__": "script"}
    exec(SCRIPT, variables)
    gc.collect()
    assert sum(watch() is not None for watch in variables["watches"]) == 1
