"""What looks at values says so where there are none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from implicitdiff import custom_root, root_jvp, root_vjp
from implicitdiff.linear_solve import solve_cg, solve_lu
from implicitdiff.solvers import gradient_descent, newton, qp

Program = Callable[[Tensor], Tensor]


def squared(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum()


PROGRAMS: dict[str, Program] = {
    "newton": lambda t: newton(lambda x, t: x**3 + x - t).run(torch.zeros_like(t), t)[0],
    "qp": lambda t: qp().run(None, torch.eye(3, device=t.device), t)[0].primal,
    "solve_lu": lambda t: solve_lu()(lambda v: 2 * v, t),
    "solve_cg": lambda t: solve_cg()(lambda v: 2 * v, t),
    "root_vjp": lambda t: root_vjp(lambda x, t: x - t, t, (t,), t)[0],
    "root_jvp": lambda t: root_jvp(lambda x, t: x - t, t, (t,), (t,)),
}
STEPS: dict[str, Program] = {
    "init": lambda t: newton(lambda x, t: x**3 + x - t).init(torch.zeros_like(t), t).error,
    "unrolled": lambda t: gradient_descent(squared).run(torch.zeros_like(t), t, implicit_diff=False)[0],
}


class Wrapped(torch.nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, t: Tensor) -> Tensor:
        return self.program(t)


WITHOUT: dict[str, tuple[Callable[[Program], Any], str]] = {
    "fake": (
        lambda f: f(FakeTensorMode().from_tensor(torch.ones(3))),
        "FakeTensor has no values; call the solver outside",
    ),
    "meta": (lambda f: f(torch.ones(3, device="meta")), "meta device has no values; move the tensors to a real device"),
    "make_fx": (lambda f: make_fx(f)(torch.ones(3)), "make_fx and torch.export .*; call the solver outside"),
    "export": (
        lambda f: torch.export.export(Wrapped(f), (torch.ones(3),)),
        "make_fx and torch.export .*; call the solver",
    ),
}


@pytest.mark.parametrize("way", WITHOUT)
@pytest.mark.parametrize("name", PROGRAMS | STEPS)
def test_what_looks_at_values_refuses_tensors_without(name, way, capsys):
    run, said = WITHOUT[way]
    with pytest.raises(NotImplementedError, match=f"depends on the values of tensors, and .*{said}"):
        run((PROGRAMS | STEPS)[name])


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_looks_at_values_refuses_to_be_traced(name):
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match=r"torch\.jit\.trace would record"):
        warnings.simplefilter("ignore")
        torch.jit.trace(PROGRAMS[name], (torch.ones(3),), check_trace=False)


@pytest.fixture
def group() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed", reason="torch.distributed is not built")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_looks_at_values_refuses_a_dtensor(name, group):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    t = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(NotImplementedError, match=r"DTensor .*full_tensor"):
        PROGRAMS[name](t)


def test_a_decorated_solver_that_asks_for_no_value_runs_without():
    t = torch.ones(3, device="meta")
    assert custom_root(lambda x, t: x - t)(lambda init, t: t.clone())(None, t).is_meta
