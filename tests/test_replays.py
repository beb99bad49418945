"""Replayed loops against eager ones, bit by bit; what is not replayed; and the list of a step."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tables.solvers import MINIMISERS, SEARCHES, THETA
from torch import Tensor
from torch.func import jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import implicitdiff as idf
import implicitdiff._torch.control as _control
import implicitdiff.solvers as solvers
import implicitdiff.solvers._loop.compiled as compiled
from implicitdiff._recorded.graph import several
from implicitdiff._recorded.listing import Lister
from implicitdiff._recorded.replay import Replay
from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.control import if_any, repeat
from implicitdiff._torch.dispatch import TorchDispatchMode, aten
from implicitdiff._torch.trees import tensors
from implicitdiff.errors import CompileError
from implicitdiff.linear_solve import solve_gmres, solve_lu
from implicitdiff.solvers._loop.recordings import kept

F64, C128 = torch.float64, torch.complex128
ROWS = {row.name: row for row in SEARCHES}
NAMES = [name for name in ROWS if not name.startswith("scipy") and name != "newton, Krylov"]


@pytest.fixture(autouse=True)
def no_machine(monkeypatch):
    """Replay every loop: the machine is not built."""
    monkeypatch.setattr("implicitdiff.solvers._loop.compiled.is_available", lambda: False)
    kept.clear()
    yield
    kept.clear()


def assert_same_bits(result: Any, expected: Any) -> None:
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a[~a.isnan()], b[~b.isnan()]), (a, b)


def assert_replayed(run: Callable[[str], Any]) -> None:
    """The first call records, and the second finds the recording."""
    expected = run("off")
    for _ in range(2):
        assert_same_bits(run("always"), expected)


def rotation(n: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.linalg.qr(torch.randn(n, n, dtype=dtype, generator=generator))[0]


# --- the solvers' table -----------------------------------------------------------------------------------------------


def solved(name: str, theta: Tensor, compile: str, **options: Any) -> Any:
    row = ROWS[name]
    solver = row.solver(compile=compile, on_failure="ignore", **options)
    run = lambda theta: solver.run(row.family.start(theta), theta)  # noqa: E731
    return (vmap(run) if theta.dim() > 1 else run)(theta)


@pytest.mark.parametrize("lanes", [None, 1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_every_solver_is_replayed_to_the_last_bit(name, lanes):
    theta = THETA
    if lanes:
        theta = THETA * torch.linspace(0.2, 1.2, lanes, dtype=F64)[:, None]
        theta[2:3] *= math.nan if name != "bisection" else 1.0
    for options in ({}, {"rtol": 1e-5, "atol": 1e-5, "check_every": 3, "maxiter": 300}):
        assert_replayed(lambda compile, o=options: solved(name, theta, compile, **o))


@pytest.mark.parametrize(
    ("linear_solve", "reason"),
    [
        (solve_gmres(on_failure="ignore"), "by iterations"),
        (solve_gmres(), "by iterations"),
        (solve_lu(), "reads the value"),
    ],
)
def test_linear_solvers_of_a_step_are_not_replayed(linear_solve, reason):
    def run(compile):
        return solvers.newton(equation, linear_solve=linear_solve, compile=compile).run(X, MATRIX)

    with pytest.raises(CompileError, match=reason):
        run("always")
    for _ in range(2):
        assert_same_bits(run("auto"), run("off"))


@pytest.mark.parametrize("name", ["newton", "lbfgs", "levenberg_marquardt"])
def test_derivatives_are_those_of_the_eager_search_bit_by_bit(name):
    row = ROWS[name]

    def derivative(compile):
        solver = row.solver(compile=compile)
        return jacrev(lambda theta: solver.run(row.family.start(theta), theta)[0])(THETA)

    assert_replayed(derivative)


# --- dtypes and sizes -------------------------------------------------------------------------------------------------


def image(x, a):
    return 0.8 * torch.tanh(a @ x) + 0.1


def equation(x, a):
    return x + 0.5 * torch.tanh(a @ x) - 0.3


def residuals(x, a):
    return torch.cat([a @ x - torch.sin(x) - 1, 0.1 * x])


def objective(x, a):
    return ((a @ x - 1).abs() ** 2).sum() + (x.abs() ** 4).sum()


PROBLEMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "fixed_point_iteration": (solvers.fixed_point_iteration, image),
    "anderson": (solvers.anderson, image),
    "broyden": (solvers.broyden, image),
    "newton": (solvers.newton, equation),
    "chord": (solvers.chord, equation),
    **{row.name: (row.factory, objective) for row in MINIMISERS},
    "gauss_newton": (partial(solvers.gauss_newton, maxiter=6), residuals),
    "levenberg_marquardt": (partial(solvers.levenberg_marquardt, maxiter=20), residuals),
}


def found(name: str, a: Tensor, compile: str, lanes: int | None = None) -> Any:
    make, fn = PROBLEMS[name]
    solver = make(fn, compile=compile, on_failure="ignore")
    x = torch.zeros(a.shape[-1], dtype=a.dtype)
    return solver.run(x, a) if lanes is None else vmap(partial(solver.run, x))(a)


@pytest.mark.parametrize("lanes", [None, 4])
@pytest.mark.parametrize("dtype", [C128, torch.complex64, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.one_in(4)
def test_every_dtype_is_replayed(name, dtype, lanes):
    a = rotation(4, C128)
    a = a.to(dtype) if dtype.is_complex else a.real.to(dtype)
    if lanes is not None:
        a = torch.stack([a, -a, 0.5 * a, a.mT])
    assert_replayed(lambda compile: found(name, a, compile, lanes))


@pytest.mark.parametrize("name", ["newton", "levenberg_marquardt", "gauss_newton", "lbfgs"])
def test_large_matrices_are_replayed(name):
    assert_replayed(lambda compile: found(name, rotation(160), compile))


def test_the_machine_comes_first(monkeypatch, caplog):
    monkeypatch.undo()
    with caplog.at_level(logging.INFO, "implicitdiff.solvers"):
        found("newton", rotation(4), "always")
        assert_replayed(lambda compile: found("newton", rotation(160), compile))
    first = "compiled loop" if idf.accelerated_op_available("cpu") else "replayed loop"
    assert caplog.messages == [f"newton(equation): {first}", *["newton(equation): replayed loop"] * 2]


# --- what changes from call to call -----------------------------------------------------------------------------------

X = torch.zeros(3, dtype=F64)
MATRIX = 0.5 * rotation(3).contiguous()
BATCH = torch.stack([MATRIX, MATRIX.T, 0.3 * MATRIX, -MATRIX])


def run_image(fn: Callable[..., Any], *args: Any) -> Callable[[str], Any]:
    def run(compile: str) -> Any:
        return solvers.fixed_point_iteration(fn, compile=compile, maxiter=8, on_failure="ignore").run(X, *args)

    return run


WRITTEN = torch.ones(3, dtype=F64)
WIDE = torch.zeros(2, 3, dtype=F64)


def written(k: int) -> Callable[[str], Any]:
    WRITTEN.fill_(k + 1.0)
    return run_image(lambda x, m: torch.tanh(m @ x) * WRITTEN + 0.1, MATRIX)


def part_of_written(k: int) -> Callable[[str], Any]:
    WIDE[1] = torch.tensor([1.0, 2.0, 3.0]) + k
    return run_image(lambda x, m: torch.tanh(m @ x) * WIDE[1] + 0.1, MATRIX)


def lanes_of(m: Tensor, *dims: int | None) -> Callable[[str], Any]:
    def run(compile: str) -> Any:
        solver = solvers.fixed_point_iteration(
            lambda x, m, b: torch.tanh(m @ x) + b, compile=compile, maxiter=8, on_failure="ignore"
        )
        b = X + 0.1 if len(dims) < 2 or dims[1] is None else BATCH[:, 0]
        return vmap(lambda m, b: solver.run(X, m, b), in_dims=(dims[0], dims[1] if len(dims) > 1 else None))(m, b)

    return run


def pair(x, a, b):
    return torch.tanh(a @ x) + 0.1 * b @ torch.cos(x)


CHANGES: dict[str, list[Callable[[], Callable[[str], Any]]]] = {
    "values": [lambda: run_image(image, MATRIX), lambda: run_image(image, -0.5 * MATRIX)],
    "strides": [lambda: run_image(image, MATRIX), lambda: run_image(image, MATRIX.T.contiguous().T)],
    "a transposed operand": [lambda: run_image(image, MATRIX), lambda: run_image(image, MATRIX.T)],
    "an expanded operand": [
        lambda: run_image(image, MATRIX),
        lambda: run_image(image, MATRIX[0].expand(3, 3)),
        lambda: run_image(image, MATRIX[1].expand(3, 3)),
    ],
    "an offset in memory": [lambda: run_image(image, BATCH[0]), lambda: run_image(image, BATCH[2])],
    "a captured tensor, in place": [partial(written, 0), partial(written, 1), partial(written, 2)],
    "a part of a captured tensor": [partial(part_of_written, 0), partial(part_of_written, 1)],
    "the number of lanes": [lambda: lanes_of(BATCH, 0), lambda: lanes_of(BATCH[:2], 0), lambda: lanes_of(BATCH[:1], 0)],
    "the dimension of the lanes": [lambda: lanes_of(BATCH, 0), lambda: lanes_of(BATCH.permute(1, 2, 0), 2)],
    "which operands have lanes": [lambda: lanes_of(BATCH, 0), lambda: lanes_of(BATCH, 0, 0)],
    "operands in one memory": [
        lambda: run_image(pair, MATRIX, MATRIX),
        lambda: run_image(pair, MATRIX, -MATRIX.T),
        lambda: run_image(pair, MATRIX, MATRIX.T),
    ],
    "a lazily conjugated operand": [
        lambda: run_image(lambda x, a: torch.tanh((a @ x.to(C128)).real) + 0.1, rotation(3, C128)),
        lambda: run_image(lambda x, a: torch.tanh((a @ x.to(C128)).real) + 0.1, rotation(3, C128).conj()),
        lambda: run_image(lambda x, a: torch.tanh((a @ x.to(C128)).real) + 0.1, 0.5j * rotation(3, C128).conj()),
    ],
    "a number of Python": [
        lambda: run_image(lambda x, m, s: s * torch.tanh(m @ x) + 1, MATRIX, 0.5),
        lambda: run_image(lambda x, m, s: s * torch.tanh(m @ x) + 1, MATRIX, 0.25),
    ],
    "a dtype of an operand": [
        lambda: run_image(lambda x, m: torch.tanh(m.double() @ x) + 0.1, MATRIX.half()),
        lambda: run_image(lambda x, m: torch.tanh(m.double() @ x) + 0.1, MATRIX.bfloat16()),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_later_call_computes_with_its_own_data(change):
    calls = CHANGES[change]
    for make in (*calls, *calls[::-1]):
        assert_replayed(make())


def test_the_same_function_is_listed_once(monkeypatch):
    made = []
    record = compiled.record_replay
    monkeypatch.setattr(compiled, "record_replay", lambda *args: made.append(1) or record(*args))
    for k in range(3):
        run_image(image, MATRIX * (1 - 0.1 * k))("always")
    assert len(made) == 1


@pytest.mark.parametrize("change", ["strides", "an expanded operand", "the number of lanes", "a dtype of an operand"])
def test_what_torch_chooses_operations_by_is_in_the_key(change, monkeypatch):
    made = []
    record = compiled.record_replay
    monkeypatch.setattr(compiled, "record_replay", lambda *args: made.append(1) or record(*args))
    for make in CHANGES[change]:
        make()("always")
    assert len(made) == len(CHANGES[change]) - (change == "an expanded operand")


# --- operations -------------------------------------------------------------------------------------------------------


def in_place(x, m):
    y = m @ x
    z = y.view(3, 1)
    y.mul_(0.5)
    z[1] += 0.1
    return torch.tanh(y) + 0.1


def squeezed(x, m):
    y = (m @ x[:, None]).clone()
    return torch.tanh(y.squeeze_(-1)) + 0.1


def filled(x, m):
    y = torch.zeros(4, dtype=F64)
    y[1:] = m @ x
    y[0] = 0.2
    return torch.tanh(y[1:] + y[0])


def written_constant(x, m):
    y = torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    y += m @ x
    return torch.tanh(y)


def by_mask(x, m):
    return torch.tanh(m @ x) + 0.1 * x[torch.tensor([True, False, True])].sum()


NOT_BATCHED = ("a filled tensor", "a constant, in place")
"""vmap refuses to write batched numbers to a tensor without lanes."""
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "in place": in_place,
    "squeeze_": squeezed,
    "a filled tensor": filled,
    "a constant, in place": written_constant,
    "a mask of constants": by_mask,
    "places": lambda x, m: torch.tanh(m @ x)[torch.tensor([2, 0, 1])] * 0.5 + 0.1,
    "sort": lambda x, m: torch.tanh(m @ x).sort().values * 0.5,
    "eigenvalues": lambda x, m: 0.1 * torch.linalg.eigvals(m + torch.diag(x)).real,
    "an inverse": lambda x, m: 0.1 * torch.linalg.inv(m + 2 * torch.diag(torch.cos(x))) @ x + 0.1,
    "a factor": lambda x, m: 0.1 * torch.linalg.cholesky(m @ m.T + torch.diag(x**2 + 1)) @ x + 0.1,
    "a convolution": lambda x, m: torch.tanh(torch.conv1d(x[None, None], m[:1, None], padding=1)[0, 0]) * 0.3 + 0.1,
    "a Fourier transform": lambda x, m: 0.1 * torch.fft.fft(m @ x).abs() + 0.1,
    "an inner gradient": lambda x, m: 0.1 * torch.func.grad(lambda y: torch.sin(m @ y).sum())(x) + 0.1,
    "an inner derivative in forward mode": lambda x, m: 0.3 * jvp(lambda y: torch.sin(m @ y), (x,), (m[0],))[1] + 0.1,
    "an inner vmap": lambda x, m: 0.3 * vmap(lambda r: torch.tanh(r @ x))(m) + 0.1,
    "integers": lambda x, m: 0.3 * torch.tanh(m @ x) + 1e-3 * (100 * x).long() ** 2,
    "half precision": lambda x, m: 0.3 * torch.tanh(m.half() @ x.half()).double() + 0.1,
    "a stack of views": lambda x, m: 0.3 * torch.stack([*torch.tanh(m @ x).unbind()[::-1]]) + 0.1,
    "infinities": lambda x, m: torch.nan_to_num(m @ x / 0.0, nan=0.1, posinf=0.2, neginf=-0.2) + torch.clamp(x, min=0),
    "the imaginary part": lambda x, m: 0.3 * torch.imag(torch.exp(1j * (m @ x))) + 0.1,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_replayed(name):
    fn = OPERATIONS[name]
    for m in (MATRIX, 0.9 * MATRIX):
        assert_replayed(run_image(fn, m))
    if name not in NOT_BATCHED:
        assert_replayed(lambda compile: vmap(lambda m: run_image(fn, m)(compile))(BATCH))


LENGTHS = torch.tensor([3])
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "item": (lambda x, m: torch.tanh(m @ x + 0.1) + x[0].item(), "reads the value"),
    "a branch": (lambda x, m: torch.tanh(m @ x + 0.1) if x[0] > 0 else torch.sin(m @ x) + 0.1, "reads the value"),
    "a mask": (lambda x, m: torch.tanh(m @ x + 0.1) + 0.1 * x[x > 0].sum(), "reads the value"),
    "a mask of an operand": (lambda x, m: torch.tanh(m @ x + 0.1) + 0.1 * m[m > 0].sum(), "reads the value"),
    "nonzero": (lambda x, m: torch.tanh(m @ x + 0.1) + 0.1 * (x > 0).nonzero().sum(), "reads the value"),
    "equal": (lambda x, m: torch.tanh(m @ x + 0.1) + 0.1 * float(torch.equal(x, 2 * x)), "reads the value"),
    "tolist": (lambda x, m: torch.tanh(m @ x + 0.1) + x.detach().tolist()[0], "Tensor.tolist reads"),
    "numpy": (lambda x, m: torch.tanh(m @ x + 0.1) + float(x.detach().numpy()[0]), "Tensor.numpy reads"),
    "a list of numbers": (
        lambda x, m: torch.tanh(m @ x + 0.1) + torch.tensor([x[0], 0.1, 0.2], dtype=F64),
        "reads the value",
    ),
    "text": (lambda x, m: torch.tanh(m @ x + 0.1) + 0.01 * len(str(x)), "reads"),
    "memory of NumPy": (lambda x, m: torch.tanh(m @ x + 0.1) + torch.from_numpy(np.ones(3)), "unknown origin"),
    "packed sequences": (
        lambda x, m: torch.tanh(m @ x + 0.1) + 0.1 * pack_padded_sequence(x[:, None, None], LENGTHS).data.sum(),
        "reads the value",
    ),
    "as_strided": (lambda x, m: torch.tanh(m @ x + 0.1) + m.as_strided((3,), (1,), 0), "reads the memory"),
    "sparse": (lambda x, m: torch.tanh(torch.eye(3, dtype=F64).to_sparse() @ x + 0.1), "nor replayed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_replayed(name):
    fn, reason = REFUSED[name]
    run = run_image(fn, MATRIX)
    with pytest.raises(CompileError, match=reason):
        run("always")
    for _ in range(2):
        assert_same_bits(run("auto"), run("off"))


def singular_later(x, m):
    # Singular in the third iteration.
    return torch.linalg.inv(torch.diag(3.0 - x)).diagonal() * 0.0 + x + 1.0 + 0.0 * m[0]


def test_an_error_in_a_replayed_step_is_that_of_the_eager_step():
    messages, names = [], []
    for compile in ("off", "always", "auto"):
        solver = solvers.fixed_point_iteration(singular_later, compile=compile, maxiter=8)
        with pytest.raises(RuntimeError) as error:
            solver.run(X, MATRIX)
        messages.append((type(error.value), str(error.value)))
        names.append("singular_later" in [entry.name for entry in error.traceback])
    assert messages[0] == messages[1] == messages[2]
    assert all(names)


# --- the list ---------------------------------------------------------------------------------------------------------


class Unread(TorchDispatchMode):
    """A mode that refuses questions to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def listed(fn: Callable[[Tensor], Tensor], x: Tensor, *operands: Tensor) -> Replay:
    lister = Lister([x], operands)
    with _control.recorded_by(lister), lister:
        new = fn(x, *operands)
    return lister.replay([new])


def double_large(x, b):
    def then(y):
        return torch.where(x > 1, 2 * b * y, y)

    return if_any(x > 1, then, x + 0.0)


def double_all(x, b):
    """In lanes without a flag the result tells whether the branch was taken, against the rule."""
    return if_any(x > 1, lambda y: 2 * b * y, x + 0.0)


def halve(x, b):
    return repeat(lambda y: y / (2 * b), x, lambda y: y > 1, 5)


@pytest.mark.parametrize("fn", [double_large, double_all, halve])
def test_branches_and_loops_ask_the_values_of_each_call(fn):
    b = torch.ones(4)
    replay = listed(fn, torch.zeros(4), b)
    for x in (torch.full((4,), 0.5), torch.arange(4.0), 100 * torch.arange(4.0)):
        assert torch.equal(replay([x], replay.prepared([b]))[0], fn(x, b))


def test_branches_are_taken_without_asking():
    b = torch.ones(4)
    replay = listed(double_large, torch.zeros(4), b).straight()
    for x in (torch.zeros(4), torch.arange(4.0)):
        expected = x
        for _ in range(3):
            expected = double_large(expected, b)
        with Unread():
            assert torch.equal(several(replay, 3, [x], replay.prepared([b]))[0], expected)
    with pytest.raises(NotRecordableError, match="loop"):
        listed(halve, torch.full((4,), 7.0), b).straight()


def test_what_depends_on_operands_alone_runs_once():
    replay = listed(lambda x, b: x + torch.exp(b).sum(), torch.zeros(3), torch.ones(3))
    assert replay.text == "def step(v0, v1, v3):\n    v4 = k0(v0, v3)\n    return [v4]"
    assert torch.equal(replay.prepared([torch.ones(3)])[1], torch.ones(3).exp().sum())


def test_what_nothing_reads_is_left_out():
    def fn(x, b):
        torch.exp(x)
        return x + b

    assert listed(fn, torch.zeros(3), torch.ones(3)).text == "def step(v0, v1):\n    v3 = k0(v0, v1)\n    return [v3]"


def test_values_end_at_their_last_use():
    alive = []

    def fn(x, b):
        for _ in range(5):
            x = torch.exp(x * b)
        return x

    replay = listed(fn, torch.zeros(1000), torch.ones(1000))

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            alive.append(weakref.ref(result))
            assert sum(ref() is not None for ref in alive) <= 4
            return result

    x, b = torch.zeros(1000), torch.ones(1000)
    with Count():
        replay([x], [b])
    assert len(alive) == 10


WRITES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "the unknowns": (lambda x, b: x.add_(1), "writes to an operand"),
    "a view of an operand": (lambda x, b: b[1:].mul_(2).sum() + x, "writes to an operand"),
    "a result of a branch": (lambda x, b: if_any(x > 1, lambda y: 2 * y, x * 1).add_(1), "writes to an operand or"),
    "in a branch": (
        lambda x, b: (y := x * 1) + if_any(x > 1, lambda z: y.add_(1) + z, x),
        "writes in a branch",
    ),
    "an out argument": (lambda x, b: torch.add(x, 1, out=b) + x, "writes to an operand"),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_what_outlives_a_step_are_refused(name):
    fn, reason = WRITES[name]
    with pytest.raises(NotRecordableError, match=reason):
        listed(fn, torch.ones(3), torch.ones(3))


def test_a_value_of_a_branch_is_refused_outside():
    inside = []

    def then(y):
        inside.append(2 * y)
        return inside[0] + 1

    with pytest.raises(NotRecordableError, match="unknown origin"):
        listed(lambda x, b: if_any(x > 1, then, x) + inside[0], torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("name", ["fixed_point_iteration", "anderson", "broyden", "newton", "chord"])
def test_steps_of_a_graph_ask_nothing(name, monkeypatch):
    """What a CUDA graph captures, run on the CPU: so many steps with every branch taken, and lanes that have stopped or
    ask for the rounding floor unchanged."""
    seen = []

    def steps(self, key, replay, carried, operands):
        straight = replay.straight()
        with Unread():
            seen.append(several(straight, 8, carried, straight.prepared(operands)))
        expected = several(replay, 8, carried, replay.prepared(operands))
        assert_same_bits(seen[-1], expected)

    monkeypatch.setattr(compiled.Compiler, "_graph", steps)
    monkeypatch.setattr(compiled, "_on_cuda", lambda x: True)
    a = torch.stack([rotation(4), 0.5 * rotation(4), 0.0 * rotation(4)])
    assert_replayed(lambda compile: found(name, a, compile, 3))
    assert len(seen) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_cuda_graph_ends_as_the_eager_loop(name, caplog):
    a = torch.stack([rotation(4), 0.5 * rotation(4), 0.0 * rotation(4)]).cuda()

    def run(compile):
        make, fn = PROBLEMS[name]
        solver = make(fn, compile=compile, on_failure="ignore")
        return vmap(partial(solver.run, torch.zeros(4, dtype=F64, device="cuda")))(a)

    x, state = run("off")
    with caplog.at_level(logging.INFO, "implicitdiff.solvers"):
        for _ in range(2):
            new_x, new = run("always")
            torch.testing.assert_close(new_x, x, rtol=1e-9, atol=1e-12)
            assert torch.equal(new.status, state.status)
    assert all("replayed loop" in message for message in caplog.messages)
