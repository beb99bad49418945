"""Groups, meshes, modules on several ranks, and a search in files: what torch.distributed brings to a program."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as c10d
import torch.distributed.checkpoint as checkpoint
from checks.ranks import Raised, World, is_usable, outcome, rank
from checks.tensors import close, draw, number
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import grad, hessian, jacrev
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as torch_pytree

import implicitdiff.distributed as dist
from implicitdiff import custom_root, linear_solve, solvers
from implicitdiff.nn import ImplicitMetaGradientModule

W = draw(1, 3)


# --- groups and meshes ------------------------------------------------------------------------------------------------


def test_without_a_process_group_the_error_says_how_to_start_one() -> None:
    for call in (lambda: dist.psum(W), lambda: dist.vmap(torch.sin)(W), lambda: dist.psum_of(torch.sin)(W)):
        with pytest.raises(RuntimeError, match=re.escape("call torch.distributed.init_process_group first")):
            call()
    with pytest.raises(RuntimeError, match="init_process_group"), dist.together():
        pass


def of_one_rank() -> Any:
    with dist.together():
        f = dist.psum_of(lambda w: (w.exp() ** 2).sum())
        return [
            grad(f)(W),
            hessian(f)(W),
            dist.vmap(jacrev(torch.sin))(draw(2, 5, 3)),
            dist.all_gather(dist.shard(draw(2, 5, 3))),
        ]


def test_one_process_is_a_group_too(on_ranks) -> None:
    f, x = (lambda w: (w.exp() ** 2).sum()), draw(2, 5, 3)
    close(on_ranks(1, of_one_rank), [[grad(f)(W), hessian(f)(W), torch.vmap(jacrev(torch.sin))(x), x]])


ROWS = draw(3, 4, 6, 3)
"""Four tasks of six rows."""


def loss_of_task(w: Tensor, task: Tensor) -> Tensor:
    return (task @ w).tanh().exp().mean()


def named_axes(mesh: DeviceMesh) -> dict[str, tuple[Any, int]]:
    """Axes, and how many ranks each has."""
    members = c10d.new_group([0, 1, 2, 3])
    return {
        "none": (None, 4),
        "a group": (members, 4),
        "a mesh of one dimension": (mesh["data"], 2),
        "a mesh and a name": ((mesh, "tasks"), 2),
        "a mesh and a number": ((mesh, 1), 2),
    }


def over_axes() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "data"))
    return {
        name: (grad(dist.psum_of(lambda w: (w.exp() * (1 + w)).sum(), axis))(W) / size)
        for name, (axis, size) in named_axes(mesh).items()
    }


def test_an_axis_is_a_group_or_a_dimension_of_a_mesh(on_ranks) -> None:
    expected = grad(lambda w: (w.exp() * (1 + w)).sum())(W)
    for found in on_ranks(4, over_axes):
        assert len(found) == 5
        for value in found.values():
            close(value, expected)


def over_tasks_and_data() -> list[Tensor]:
    """Tasks over one dimension of a mesh, and the rows of each task over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "data"))
    mine = ROWS.chunk(2, 1)[mesh.get_local_rank("data")]

    def of_one(w: Tensor, rows: Tensor) -> Tensor:
        solver = solvers.newton(
            lambda x, w: dist.psum_of(lambda x, w: (x - w / 2) / 2 + (rows.T @ (rows @ x).sin()) / 9, (mesh, "data"))(
                x, w
            )
        )
        return solver.run(torch.zeros(3, dtype=w.dtype), w)[0].square().sum()

    def loss(w: Tensor) -> Tensor:
        # Each rank has other rows: the lanes are those of the ranks of its own column.
        return dist.vmap(of_one, (None, 0), axis=(mesh, "tasks"))(w, mine) @ torch.arange(1.0, 5.0, dtype=w.dtype)

    return [loss(W), grad(loss)(W), hessian(loss)(W)]


def test_tasks_lie_over_one_dimension_of_a_mesh_and_data_over_the_other(on_ranks) -> None:
    def of_one(w: Tensor, rows: Tensor) -> Tensor:
        solver = solvers.newton(lambda x, w: x - w / 2 + rows.T @ (rows @ x).sin() / 9)
        return solver.run(torch.zeros(3, dtype=w.dtype), w)[0].square().sum()

    def loss(w: Tensor) -> Tensor:
        return torch.vmap(of_one, (None, 0))(w, ROWS) @ torch.arange(1.0, 5.0, dtype=w.dtype)

    expected = [loss(W), grad(loss)(W), hessian(loss)(W)]
    for found in on_ranks(4, over_tasks_and_data):
        close(found, expected)


def wrong_axes() -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "data"))
    others = c10d.new_group([0, 1])
    return [
        outcome(lambda: dist.psum(W, mesh)),
        outcome(lambda: dist.psum(W, "tasks")),
        outcome(lambda: float(dist.psum(number(1.0), others))),
        outcome(lambda: dist.psum(W, (mesh, "rows"))),
        is_usable(),
    ]


def test_other_axes_are_refused(on_ranks) -> None:
    for place, (of_two, of_name, of_members, of_no_dimension, usable) in enumerate(on_ranks(4, wrong_axes)):
        assert of_two.type is ValueError and "(mesh, 'tasks')" in of_two.text
        assert of_name.type is TypeError and "'tasks'" in of_name.text
        assert of_members == 2.0 if place < 2 else of_members.type is ValueError and "not a rank" in of_members.text
        assert isinstance(of_no_dimension, Raised)
        assert usable


# --- modules ----------------------------------------------------------------------------------------------------------

INPUTS, TARGETS = draw(4, 8, 3), draw(5, 8, 2)


class Equilibrium(nn.Module):
    """``z = tanh(W z + U x)`` and a readout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.inner, self.readout = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        nn.init.orthogonal_(self.inner.weight, gain=0.5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def layer(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(z) + self.encoder(x))

        solver = solvers.anderson(layer, rtol=1e-14, atol=1e-14)
        return self.readout(solver.run(x.new_zeros(len(x), 4), x)[0])


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """After one step, so that the parameters have changed."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters()]


def by_fsdp() -> nn.Module:
    return fully_shard(Equilibrium(), mesh=init_device_mesh("cpu", (c10d.get_world_size(),)))


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "DDP": lambda: DistributedDataParallel(Equilibrium()),
    "FSDP2": by_fsdp,
}


def wrapped_gradients(name: str) -> list[Tensor]:
    size = c10d.get_world_size()
    return gradients(WRAPPED[name](), INPUTS[rank() :: size], TARGETS[rank() :: size])


@pytest.mark.parametrize("name", WRAPPED)
def test_a_module_that_solves_trains_within(on_ranks, name: str) -> None:
    expected = gradients(Equilibrium(), INPUTS, TARGETS)
    for found in on_ranks(2, wrapped_gradients, name):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# --- DTensor ----------------------------------------------------------------------------------------------------------


def with_dtensors() -> list[Any]:
    mesh = init_device_mesh("cpu", (c10d.get_world_size(),))
    c = draw(6, 4).abs() + 1
    spread = distribute_tensor(c, mesh, [Shard(0)])
    same = distribute_tensor(c, mesh, [Replicate()])
    solve = custom_root(lambda x, c: x**2 - c)(lambda init, c: c**0.5)
    attempts = [
        lambda: solvers.newton(lambda x, c: x**2 - c).run(same, same),
        lambda: solvers.newton(lambda x, c: x**2 - c).run(spread, spread),
        lambda: solvers.lbfgs(lambda x: (x**2).sum()).run(spread),
        lambda: solve(None, spread).sum(),
        lambda: solve(None, spread.clone().requires_grad_()).sum(),
        lambda: linear_solve.solve_cg()(lambda v: 2 * v, spread),
    ]
    return [outcome(lambda attempt=attempt: attempt() and None) for attempt in attempts]


def by_local_parts() -> Tensor:
    """Distributed parameters, by to_local() in, and psum out."""
    mesh = init_device_mesh("cpu", (c10d.get_world_size(),))
    c = distribute_tensor(draw(6, 4).abs() + 1, mesh, [Shard(0)]).requires_grad_()
    mine = c.to_local()
    total = dist.psum(solvers.newton(lambda x, c: x**2 - c).run(torch.ones_like(mine), mine)[0].sum())
    (total**2).backward()
    return c.grad.full_tensor()


def test_unknowns_of_dtensors_are_refused_with_what_to_do(on_ranks) -> None:
    for errors in on_ranks(2, with_dtensors):
        for error in errors:
            assert isinstance(error, Raised), error
            assert "to_local()" in error.text and "psum" in error.text, error


def test_local_parts_of_a_dtensor_solve(on_ranks) -> None:
    expected = grad(lambda c: c.sqrt().sum() ** 2)(draw(6, 4).abs() + 1)
    for found in on_ranks(2, by_local_parts):
        close(found, expected)


# --- a search in a file -----------------------------------------------------------------------------------------------


def local_loss(w: Tensor) -> Tensor:
    rows = ROWS.flatten(0, 1)[rank() :: c10d.get_world_size()]
    return (rows @ w - 1).cosh().sum() / 9


def updated(count: int, x: Tensor, state: Any = None) -> Any:
    solver = solvers.lbfgs(dist.psum_of(local_loss))
    state = solver.init(x) if state is None else state
    for _ in range(count):
        x, state = solver.update(x, state)
    return x, state


START = torch.zeros(3, dtype=torch.float64)


def saved(folder: str) -> Tensor:
    """A part of a search, which goes to files. They take trees; a state is one, a named tuple, but goes as a
    dictionary, which files fill in place."""
    x, state = updated(3, START)
    checkpoint.save({"x": x, "state": as_dictionary(state)}, checkpoint_id=folder)
    return x


def as_dictionary(tree: Any) -> Any:
    """Named tuples as dictionaries of their fields."""
    return {k: as_dictionary(v) for k, v in tree._asdict().items()} if hasattr(tree, "_asdict") else tree


def filled(tree: Any, values: Any) -> Any:
    """The named tuples of a tree, of the values of `as_dictionary`."""
    if not hasattr(tree, "_asdict"):
        return values
    return tree._replace(**{k: filled(v, values[k]) for k, v in tree._asdict().items()})


def resumed(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of it in other processes: load into a state of the same shapes, and go on."""
    x, state = updated(0, START)
    # Copies, since the values are filled in place and a fresh state has one tensor in several places.
    loaded = torch_pytree.tree_map(torch.clone, {"x": x, "state": as_dictionary(state)})
    checkpoint.load(loaded, checkpoint_id=folder)
    begun = loaded["x"].clone()
    return begun, updated(5, loaded["x"], filled(state, loaded["state"]))[0], updated(8, START)[0]


def test_a_search_goes_on_from_a_checkpoint(on_ranks, tmp_path) -> None:
    folder = str(tmp_path / "checkpoint")
    with World(2) as world:
        (first, _) = world.call(saved, folder)
    for begun, found, expected in on_ranks(2, resumed, folder):
        assert torch.equal(begun, first)
        assert not torch.equal(begun, expected)
        assert torch.equal(found, expected)


# --- the end of a group -----------------------------------------------------------------------------------------------


def ended() -> bool:
    group, w = weakref.ref(c10d.group.WORLD), W.clone().requires_grad_()
    kept = dist.psum_of(torch.sin)(w), grad(lambda w: dist.vmap(torch.cos)(w).sum())(w)
    c10d.destroy_process_group()
    return len(kept) == 2 and group() is None


def test_results_with_their_graphs_do_not_keep_a_group_alive() -> None:
    """torch may abort a process that ends with a group."""
    with World(1) as world:
        assert world.call(ended) == [True]


# --- modules of this library ------------------------------------------------------------------------------------------


class Ridge(ImplicitMetaGradientModule, linear_solve=linear_solve.solve_cg()):
    """A regression, whose rows lie on all ranks, solved by gradient steps."""

    def __init__(
        self, penalty: Tensor, rows: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
    ) -> None:
        super().__init__()
        self.penalty, self.rows = penalty, rows
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def objective(self, x: Tensor) -> Tensor:
        return self.rows(lambda w: ((x @ w - 1) ** 2).sum())(self.w) + (self.penalty.exp() * self.w**2).sum()

    def solve(self, x: Tensor) -> Ridge:
        for _ in range(300):
            with torch.enable_grad():
                (step,) = torch.autograd.grad(self.objective(x), self.w)
            self.w.sub_(0.02 * step)
        return self


def learned(spread: bool) -> tuple[Tensor, Tensor]:
    penalty = draw(3, 3).requires_grad_()
    x = draw(2, 6, 3)
    model = Ridge(penalty, dist.psum_of).solve(x[rank() :: 2]) if spread else Ridge(penalty, lambda f: f).solve(x)
    return model.w.detach(), torch.autograd.grad((model.w.sin() ** 2).sum(), penalty)[0]


def test_a_module_that_solves_may_have_its_data_on_all_ranks(on_ranks) -> None:
    w, gradient = learned(False)
    for found in on_ranks(2, learned, True):
        close(found[0], w)
        close(found[1], gradient)
