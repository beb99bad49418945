"""Data-parallel training of an implicit layer: two processes and the gloo backend."""

from __future__ import annotations

import datetime
import gc
import time

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from implicitdiff import custom_fixed_point, solvers

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("torch is built without the gloo backend", allow_module_level=True)

PROCESSES, PATIENCE = 2, datetime.timedelta(seconds=120)
X, Y = (torch.randn(8, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 1))


def by_solver(fn, z, x):
    return solvers.anderson(fn).run(z, x)[0]


def by_decorator(fn, z, x):
    @custom_fixed_point(fn)
    def solve(z, x):
        for _ in range(100):
            z = fn(z, x)
        return z

    return solve(z, x)


class Equilibrium(nn.Module):
    """``z = tanh(W z + U x)`` and a readout."""

    def __init__(self, solve):
        super().__init__()
        torch.manual_seed(0)
        self.solve = solve
        self.encoder, self.inner, self.readout = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        nn.init.orthogonal_(self.inner.weight, gain=0.5)
        self.double()

    def forward(self, x):
        def layer(z, x):
            return torch.tanh(self.inner(z) + self.encoder(x))

        return self.readout(self.solve(layer, x.new_zeros(len(x), 4), x))


def trained(net, x, y):
    """The parameters after three steps, and the gradient of the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        ((net(x) - y) ** 2).mean().backward()
        optimizer.step()
    return [(p.detach(), p.grad) for p in net.parameters()]


SOLVES = (by_solver, by_decorator)


def work(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=PATIENCE)
    nets = [DistributedDataParallel(Equilibrium(solve)) for solve in SOLVES]
    torch.save([trained(net, X[rank::PROCESSES], Y[rank::PROCESSES]) for net in nets], f"{folder}/{rank}.pt")
    # The nets end before the group. A net that held the group last would end it, and wait for a thread of gloo that
    # waits for the interpreter's lock.
    del nets
    gc.collect()
    distributed.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    context = torch.multiprocessing.spawn(work, (tmp_path,), PROCESSES, join=False)
    end = time.monotonic() + PATIENCE.total_seconds()
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes have not ended in time"
    finally:
        for process in context.processes:
            process.kill()
    expected = [trained(Equilibrium(solve), X, Y) for solve in SOLVES]
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
