"""Workers of a DataLoader, started by spawn, that solve a problem for each example."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from implicitdiff import custom_root, solvers


def excess(x, c):
    return x**3 - c


@custom_root(excess)
def cube_root(init, c):
    x = init
    for _ in range(60):
        x = x - (x**3 - c) / (3 * x**2)
    return x


class Roots(Dataset):
    """Cube roots and their derivatives, for which a worker needs whatever solves."""

    def __init__(self, root):
        self.root = root

    def __len__(self):
        return 6

    def __getitem__(self, i):
        c = torch.tensor(1.0 + i, dtype=torch.float64)
        return c, self.solve(c).detach(), torch.func.grad(self.solve)(c)

    def solve(self, c):
        start = torch.ones_like(c)
        return self.root.run(start, c)[0] if isinstance(self.root, solvers.Solver) else self.root(start, c)


class Together:
    """Collates examples, and solves for all of them at once."""

    def __init__(self, solver):
        self.solver = solver

    def __call__(self, examples):
        c, *alone = default_collate(examples)

        def root(c):
            return self.solver.run(torch.ones_like(c), c)[0]

        return c, *alone, torch.func.vmap(root)(c), torch.func.vmap(torch.func.grad(root))(c)


NEWTON = solvers.newton(excess)


@pytest.mark.parametrize(
    ("root", "collate"),
    [(cube_root, default_collate), (NEWTON, Together(NEWTON))],
    ids=["a decorated function", "a solver, one by one and together"],
)
def test_workers_solve(root, collate):
    loader = DataLoader(Roots(root), 3, num_workers=2, multiprocessing_context="spawn", collate_fn=collate, timeout=120)
    c, *found = map(torch.cat, zip(*loader, strict=True))
    assert c.tolist() == [1, 2, 3, 4, 5, 6]
    for roots, slopes in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(roots, c ** (1 / 3))
        torch.testing.assert_close(slopes, c ** (-2 / 3) / 3)
