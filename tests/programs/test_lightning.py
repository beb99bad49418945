"""A Lightning module whose training step solves a problem, trained in mixed precision."""

from __future__ import annotations

import pytest
import torch

from implicitdiff import solvers

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

generator = torch.Generator().manual_seed(0)
X, X_NEW = (torch.randn(n, 5, generator=generator) for n in (12, 40))
WEIGHTS = torch.randn(5, generator=generator)
Y, Y_NEW = (x @ WEIGHTS + 2 * torch.randn(len(x), generator=generator) for x in (X, X_NEW))
STEPS, RATE = 4, 1.0


def ridge(w, log_penalty, x, y):
    return ((x @ w - y) ** 2).sum() + log_penalty.exp() * (w**2).sum()


class Ridge(lightning.LightningModule):
    """Learns the penalty of a ridge regression by the error on other data."""

    def __init__(self, solver):
        super().__init__()
        self.solver, self.log_penalty = solver, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, _):
        x, y, x_new, y_new = batch
        w, _ = self.solver.run(torch.zeros(5), self.log_penalty, x, y)
        return ((x_new @ w - y_new) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def by_closed_form():
    log_penalty = torch.zeros((), requires_grad=True)
    for _ in range(STEPS):
        w = torch.linalg.solve(X.T @ X + log_penalty.exp() * torch.eye(5), X.T @ Y)
        (slope,) = torch.autograd.grad(((X_NEW @ w - Y_NEW) ** 2).mean(), log_penalty)
        log_penalty = (log_penalty - RATE * slope).detach().requires_grad_()
    return log_penalty


@pytest.mark.filterwarnings("default")  # Lightning's, of what it could do faster
@pytest.mark.parametrize(
    "solver", [solvers.lbfgs(ridge), solvers.newton(torch.func.grad(ridge))], ids=["lbfgs", "newton"]
)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-3), ("bf16-mixed", 3e-2)])
def test_a_penalty_is_learned_as_by_the_closed_form(solver, precision, tolerance, tmp_path):
    module = Ridge(solver)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = lightning.Trainer(
        accelerator="cpu", precision=precision, max_epochs=STEPS, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, torch.utils.data.DataLoader([(X, Y, X_NEW, Y_NEW)], batch_size=None))
    expected = by_closed_form()
    assert expected.abs() > 0.5
    torch.testing.assert_close(module.log_penalty, expected, rtol=tolerance, atol=tolerance, check_dtype=True)
