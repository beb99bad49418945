"""A recording is used again for the same function only, and what cannot be recorded is refused by name."""

from __future__ import annotations

import array
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checks.compiled import needs_cpu
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import implicitdiff.solvers as solvers
from implicitdiff import sgd
from implicitdiff._recorded.replay import Replay
from implicitdiff.errors import CompileError
from implicitdiff.solvers._loop.problem import row_norm
from implicitdiff.solvers._loop.recordings import is_fixed, kept
from implicitdiff.solvers._loop.state import State

pytestmark = needs_cpu
F64 = torch.float64
X = torch.tensor([0.3, -0.2, 0.5], dtype=F64)
THETA = torch.tensor([0.5, 0.3, -0.4], dtype=F64)
MATRIX = torch.tensor([[0.4, -0.9, 0.2], [0.1, 0.8, -0.3], [0.7, 0.5, -0.6]], dtype=F64)
# So few iterations that a solution of another problem shows.
SHORT = {"maxiter": 4, "rtol": 0.0, "atol": 0.0, "on_failure": "ignore"}
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_recordings():
    kept.clear()
    yield
    kept.clear()


def by_image(fn: Function, theta: Any = THETA) -> Function:
    return lambda compile: solvers.fixed_point_iteration(fn, compile=compile, **SHORT).run(X, theta)[0]


def by_objective(fn: Function, **options: Any) -> Function:
    given = {"stepsize": 0.05, **SHORT, **options}
    return lambda compile: solvers.gradient_descent(fn, compile=compile, **given).run(X, THETA)[0]


def image(x, theta):
    return 0.3 * torch.cos(x) + theta


def objective(x, theta):
    return (x**4 / 4 + x**2 / 2 - theta * x).sum()


# --- the second of two functions does not run as the first ------------------------------------------------------------


class Index:
    def __init__(self, i: int) -> None:
        self.i = i

    def __index__(self) -> int:
        return self.i


class Module(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("shift", torch.full((3,), scale, dtype=F64))

    def forward(self, x):
        return torch.sin(x) * self.scale + self.shift


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.cos.default else result


GLOBAL = {"scale": 1.0}
LIBRARY = torch.library.Library("implicitdiff_recordings", "DEF")
LIBRARY.define("scaled(Tensor x) -> Tensor")
LIBRARY.impl("scaled", lambda x: GLOBAL["scale"] * torch.sin(x), "CompositeImplicitAutograd")


class Scaled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return GLOBAL["scale"] * torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return GLOBAL["scale"] * torch.cos(ctx.saved_tensors[0]) * g


def with_global(solve: Function, scale: float) -> Function:
    def run(compile: str) -> Any:
        GLOBAL["scale"] = scale
        return solve(compile)

    return run


def swapped(k: int) -> np.ndarray:
    """A large array with two neighbours exchanged, which its checksum does not show."""
    values = np.arange(1000.0)
    values[3:5] = values[3:5][::-1] if k else values[3:5]
    return values


def gradient_off(k: int) -> Function:
    def fn(x, theta):
        with torch.no_grad() if k else nullcontext():
            weight = torch.sin(x)
        return (weight * x + x**2 - theta * x).sum()

    return fn


def under_mode(k: int) -> Function:
    def fn(x, theta):
        with Doubling() if k else nullcontext():
            return 0.3 * torch.cos(x) + theta

    return fn


def chosen(k: int) -> Function:
    """Both results are computed, one of them is returned."""
    return lambda x, theta: (0.3 * torch.cos(x) + theta, 0.2 * torch.sin(x) - theta)[k]


def newton_of_chosen(k: int) -> Function:
    def fn(x, theta):
        return (x**3 + x - theta, x**3 + 2 * x - theta)[k]

    return lambda compile: solvers.newton(fn, compile=compile, **SHORT).run(X, THETA)[0]


def captured(values: torch.Tensor) -> Function:
    return by_image(lambda x, theta: 0.3 * torch.cos(x) * values + theta)


def fresh_constant(k: int) -> Function:
    """A new tensor at each call, which may have the id of a dead one."""
    return lambda compile: captured(torch.full((3,), k + 1.0, dtype=F64))(compile)


def written_constant(k: int, values: torch.Tensor) -> Function:
    def run(compile: str) -> Any:
        values.fill_(k + 1.0)
        return captured(values)(compile)

    return run


def plus(make: Function) -> Function:
    return lambda k: by_image(lambda x, theta: 0.3 * torch.cos(x) + theta + make(k))


def schedule(count):
    return GLOBAL["scale"] * 0.05


def from_sgd(transformation: Any) -> Function:
    return lambda compile: solvers.from_optimizer(objective, transformation, compile=compile, **SHORT).run(X, THETA)[0]


SGD = sgd(schedule)
MODULES = [Module(0.1), Module(0.2)]
WRITTEN = torch.ones(3, dtype=F64)
CHANGES: dict[str, Function] = {
    "a number": lambda k: by_image(lambda x, theta: (0.3, 0.2)[k] * torch.cos(x) + theta),
    "a sign of zero": lambda k: by_image(lambda x, theta: torch.atan2(x, torch.full_like(x, (0.0, -0.0)[k])) * theta),
    "a default argument": lambda k: by_image(lambda x, theta, a=k + 1: torch.cos(x) / a + theta),
    "an operation": lambda k: by_image(lambda x, theta: 0.3 * (torch.cos, torch.sin)[k](x) + theta),
    "the result": lambda k: by_image(chosen(k)),
    "the result, alone": newton_of_chosen,
    "a module": lambda k: by_image(lambda x, theta: MODULES[k](x) + theta),
    "gradients off": lambda k: by_objective(gradient_off(k)),
    "an inner vmap": lambda k: by_image(lambda x, m: vmap(lambda r: torch.cos(r @ x), in_dims=k)(m), MATRIX),
    "the result of an inner vmap": lambda k: by_image(
        lambda x, m: torch.cos(vmap(lambda r: r * x, out_dims=k)(m))[0], MATRIX
    ),
    "an inner gradient": lambda k: by_image(
        lambda x, theta: 0.3 * grad(lambda a, b: (torch.sin(a) * b).sum(), argnums=k)(x, theta)
    ),
    "a mode inside": lambda k: by_image(under_mode(k)),
    "a range": plus(lambda k: torch.tensor(range(k, 3 + k))),
    "a Python array": plus(lambda k: torch.tensor(array.array("d", [k, 2.0, 3.0]))),
    "a deque": plus(lambda k: torch.tensor(deque([k, 2.0, 3.0]))),
    "a memoryview": plus(lambda k: torch.tensor(memoryview(array.array("d", [k, 2.0, 3.0])))),
    "a NumPy array": plus(lambda k: torch.tensor(np.array([k, 2.0, 3.0]))),
    "a large NumPy array": plus(lambda k: torch.tensor(swapped(k))[2:5]),
    "memory of NumPy": plus(lambda k: torch.from_numpy(np.array([k, 2.0, 3.0]))),
    "an index": lambda k: by_image(lambda x, theta: 0.3 * torch.cos(x) + theta[Index(k)]),
    "a function as an argument": lambda k: by_objective(
        lambda x, theta: (
            (x**2).sum()
            + torch.nn.functional.triplet_margin_with_distance_loss(
                x[None],
                theta[None],
                2 * theta[None],
                distance_function=lambda a, b: (k + 1) * (a - b).sum(-1),
                margin=5.0,
            )
        )
    ),
    "a global of a new operation": lambda k: with_global(
        by_image(lambda x, theta: 0.3 * torch.ops.implicitdiff_recordings.scaled(x) + theta), k + 1.0
    ),
    "a global of an autograd.Function": lambda k: with_global(
        by_image(lambda x, theta: 0.3 * Scaled.apply(x) + theta), k + 1.0
    ),
    "a new constant": fresh_constant,
    "a constant, in place": lambda k: written_constant(k, WRITTEN),
    "the memory of a constant": lambda k: captured((MATRIX[0], MATRIX[:, 0])[k]),
    "the strides of an operand": lambda k: by_image(lambda x, m: 0.3 * torch.cos(x) + m @ x, (MATRIX, MATRIX.T)[k]),
    "as_strided": lambda k: by_image(
        lambda x, m: 0.3 * torch.cos(x) + m.as_strided((3,), (1,), 0), (MATRIX, MATRIX.T)[k]
    ),
    "a type of operand": lambda k: by_image(image, (THETA, THETA.float())[k]),
    "a step size": lambda k: by_objective(objective, stepsize=(0.05, 0.1)[k]),
    "an integer step size": lambda k: by_objective(objective, stepsize=(1, 0.1)[k]),
    "the number of iterations": lambda k: by_objective(objective, maxiter=4 + k),
    "the radius": lambda k: (
        lambda compile: solvers.levenberg_marquardt(
            lambda x, theta: x**3 + x - theta,
            radius=(0.1, 1.0)[k],
            compile="auto" if compile == "always" else compile,
            **SHORT,
        ).run(X, THETA)[0]
    ),
    "a learning rate": lambda k: from_sgd(sgd((0.05, 0.1)[k])),
    "a global of a schedule": lambda k: with_global(from_sgd(SGD), k + 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_function_has_a_recording_of_its_own(change):
    for k in (0, 1, 0):
        solve = CHANGES[change](k)
        for _ in range(2):
            expected = solve("off")
            try:
                result = solve("always")
            except CompileError:
                result = solve("auto")
            assert torch.allclose(result, expected, rtol=1e-12, atol=1e-14), (k, result, expected)


@pytest.mark.parametrize("transformation", [SGD, sgd(partial(schedule))], ids=["a function", "a partial"])
def test_one_solver_is_recorded_anew_where_a_function_of_its_options_may_have_changed(transformation, monkeypatch):
    solver = solvers.from_optimizer(objective, transformation, compile="auto", **SHORT)
    for scale in (1.0, 2.0, 1.0):
        monkeypatch.setitem(GLOBAL, "scale", scale)
        expected = from_sgd(transformation)("off")
        assert torch.allclose(solver.run(X, THETA)[0], expected, rtol=1e-12, atol=1e-14)


class Measured(float):
    """A number that may have a state."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2.0, "a", None, State, solvers.Status.DIVERGED, partial(row_norm, eps=1.0)), True),
        ([1.0], False),
        (partial(row_norm, eps=[1.0]), False),
        (THETA, False),
        (image, False),
        (partial(row_norm, image), False),
        (Measured(1.0), False),
    ],
)
def test_what_may_change_is_not_fixed(value, expected):
    assert is_fixed(value) == expected


def test_the_same_function_is_recorded_once(monkeypatch):
    import implicitdiff.solvers._loop.compiled as compiled

    made = []
    record = compiled.record_step
    monkeypatch.setattr(compiled, "record_step", lambda *args: made.append(1) or record(*args))
    for k in range(3):
        solvers.fixed_point_iteration(lambda x, m: 0.1 * torch.cos(m.T @ x), compile="always").run(X, MATRIX * (1 + k))
        assert len(made) == 1


def test_a_recording_does_not_import_the_compiler_of_torch():
    code = (
        "import sys, torch; from implicitdiff import solvers; x = torch.zeros(3, dtype=torch.float64); "
        "solvers.fixed_point_iteration(torch.cos, compile='always').run(x); print('torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.stdout == "False\n", ran.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def nested(x, theta):
    return 0.3 * solvers.fixed_point_iteration(image).run(x, x)[0] + theta


def with_hook(x, theta):
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return (y**2 - theta * y).sum()


def whole(x):
    return (100 * x).long()


SPARSE = torch.eye(3, dtype=F64).to_sparse()
BY_IMAGE: dict[str, tuple[Function, str]] = {
    "item": (lambda x, theta: 0.3 * torch.cos(x) * x[0].item() + theta, "reads the value"),
    "a branch": (lambda x, theta: 0.3 * torch.cos(x) * (1 if x[0] > 0 else 2) + theta, "reads the value"),
    "tolist": (lambda x, theta: 0.3 * torch.cos(x) * x.detach().tolist()[0] + theta, "Tensor.tolist reads the value"),
    "numpy": (lambda x, theta: 0.3 * torch.cos(x) * float(x.detach().numpy()[0]) + theta, "Tensor.numpy reads"),
    "asarray": (lambda x, theta: 0.3 * torch.cos(x) * float(np.asarray(x.detach())[0]) + theta, "reads the value"),
    "a list of tensors": (
        lambda x, theta: 0.3 * torch.cos(x) * torch.tensor([x[0], 1.0, 1.0], dtype=F64) + theta,
        "tensor reads",
    ),
    "data": (
        lambda x, theta: 0.3 * torch.cos(x) * torch.tensor(data=[x[0], x[1], 1.0], dtype=F64) + theta,
        "tensor reads",
    ),
    "as_tensor": (lambda x, theta: 0.3 * torch.cos(x) * torch.as_tensor([x[0], 1.0, 1.0]) + theta, "as_tensor reads"),
    "torch.asarray": (
        lambda x, theta: 0.3 * torch.cos(x) * torch.asarray([[x[0]], [x[1]]])[1] + theta,
        "asarray reads",
    ),
    "new_tensor": (lambda x, theta: 0.3 * torch.cos(x) * x.new_tensor([x[0], 1.0, 1.0]) + theta, "new_tensor reads"),
    "new": (lambda x, theta: 0.3 * torch.cos(x) * x.new([x[0], 1.0, 1.0]) + theta, "new reads"),
    "tensor_split": (
        lambda x, theta: 0.3 * torch.cos(torch.cat(x.tensor_split((theta[:1] > 0).long() + 1)[::-1])) + theta,
        "tensor_split reads",
    ),
    "str": (lambda x, theta: 0.3 * torch.cos(x) * float(str(x[0])[7:12]) + theta, "Tensor.__repr__ reads"),
    "apply_": (lambda x, theta: 0.3 * torch.cos(x) + x.detach().clone().apply_(abs), "cannot be compared"),
    "a shape": (lambda x, theta: 0.3 * torch.cos(x) + 0.1 * x[x > 0].sum() + theta, "reads the value"),
    "as_strided": (lambda x, theta: 0.3 * torch.cos(x) + theta.as_strided((3,), (1,), 0), "reads the memory"),
    "a nested solver": (nested, "calls another solver"),
}


@pytest.mark.parametrize("name", BY_IMAGE)
def test_an_operation_is_refused_by_name(name):
    fn, reason = BY_IMAGE[name]
    with pytest.raises(CompileError, match=reason) as error:
        by_image(fn)("always")
    if ", at " in str(error.value):
        assert "test_recordings.py" in str(error.value)
    for _ in range(2):
        assert torch.equal(by_image(fn)("auto"), by_image(fn)("off"))


REPLAYED: dict[str, Function] = {
    "bits": lambda x, theta: 0.3 * torch.cos(x) + 1e-3 * x.view(torch.int64).double() * 0,
    "a product of integers": lambda x, theta: 0.3 * torch.cos(x) + 1e-9 * (whole(x) * whole(x)),
    "a power of integers": lambda x, theta: 0.3 * torch.cos(x) + 1e-9 * whole(x) ** 2,
    "a quotient of integers": lambda x, theta: 0.3 * torch.cos(x) + 1e-9 * (whole(x) // whole(theta)),
    "a new dtype": lambda x, theta: 0.3 * torch.cos(x) + 0.1 * x.sum(dtype=torch.bool),
    "half precision": lambda x, theta: 0.3 * torch.cos(x) + theta.half().double(),
    "an eigenvalue": lambda x, theta: 0.3 * torch.linalg.eigvals(torch.outer(x, x)).real + theta,
}
"""Functions for which the machine has no instruction."""


@pytest.mark.parametrize("name", REPLAYED)
def test_an_operation_without_an_instruction_is_replayed(name):
    for _ in range(2):
        result, expected = by_image(REPLAYED[name])("always"), by_image(REPLAYED[name])("off")
        torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
    assert any(isinstance(found, Replay) for found in kept._recordings.values())


@pytest.mark.parametrize(
    ("solve", "reason"),
    [
        (by_objective(with_hook), "register_hook"),
        (by_image(lambda x, theta: 0.3 * torch.cos(SPARSE @ x) + theta), "sparse"),
        (by_image(lambda x, m: 0.3 * torch.cos(m @ x), SPARSE), "sparse"),
    ],
)
def test_a_function_is_refused(solve, reason):
    with pytest.raises(CompileError, match=reason):
        solve("always")
    for _ in range(2):
        assert torch.equal(solve("auto"), solve("off"))


@pytest.mark.parametrize("mode", [Doubling, lambda: torch.device("meta")], ids=["dispatch", "device"])
def test_a_search_is_eager_under_a_mode(mode):
    with mode():
        expected = by_image(image)("off")
        with pytest.raises(CompileError):
            by_image(image)("always")
    for _ in range(2):
        by_image(image)("auto")
        with mode():
            assert torch.equal(by_image(image)("auto"), expected)


def test_a_function_that_fails_under_a_recorder_alone_runs_eagerly():
    def image(x, theta):
        if torch._C._len_torch_dispatch_stack():
            raise RuntimeError("a mode is running")
        return 0.3 * torch.cos(x) + theta

    solver = solvers.fixed_point_iteration(image)
    assert torch.equal(solver.run(X, THETA)[0], solvers.fixed_point_iteration(image, compile="off").run(X, THETA)[0])
    with pytest.raises(CompileError, match="the recording raised RuntimeError: a mode is running"):
        solvers.fixed_point_iteration(image, compile="always").run(X, THETA)


def test_a_large_operand_of_an_inner_vmap_is_not_copied_for_each_lane_of_the_outer_one(monkeypatch):
    monkeypatch.setattr("implicitdiff.solvers._loop.compiled._MAX_COPIED", 100)
    matrices, shifts = 0.3 * MATRIX.expand(5, 3, 3), torch.linspace(0, 1, 8, dtype=F64)

    def run(compile):
        solver = solvers.fixed_point_iteration(lambda x, m, s: torch.cos(m @ x + s), compile=compile)
        of_all = vmap(vmap(lambda m, s: solver.run(X, m, s)[0], (0, None)), (None, 0))
        return of_all(matrices, shifts)

    # The replay takes operands as they are.
    for _ in range(2):
        assert torch.equal(run("always"), run("off"))
    monkeypatch.undo()
    torch.testing.assert_close(run("always"), run("off"), rtol=1e-12, atol=1e-12)


def test_large_matrices_are_left_to_torch():
    matrix = torch.eye(140, dtype=F64)
    solver = solvers.newton(lambda x: x + 0.1 * torch.cos(matrix @ x), compile="always")
    solver.run(torch.zeros(140, dtype=F64))
    assert "faster in torch" in str([*kept._recordings.values()])


@pytest.mark.parametrize("change", ["a hook of a tensor", "a hook of a node"])
def test_what_no_operation_shows_is_not_taken_for_an_earlier_function(change):
    def objective(k):
        def fn(x):
            y = 2 * x
            if k and change == "a hook of a tensor" and y.requires_grad:
                y.register_hook(lambda g: 0.1 * g)
            if k and change == "a hook of a node" and y.grad_fn is not None:
                y.grad_fn.register_prehook(lambda g: (0.1 * g[0],))
            return (y - 1).square().sum() + x.pow(4).sum()

        return fn

    for k in range(2):
        found, expected = (solvers.lbfgs(objective(k), compile=c, **SHORT).run(X)[0] for c in ("auto", "off"))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
