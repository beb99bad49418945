"""Differentiate a fixed point, as an object and as a function

The equation is ``x = W x + b``. Whatever number of plain iterations finds its solution, the derivatives come from the
equation: with ``v`` the gradient of an outer loss in ``x``, solve ``(I - W)' u = v``; then the gradient in ``b`` is
``u`` and that in ``W`` is the outer product of ``u`` and ``x``.

The module below iterates ten times, in place, inside ``solve``. The same is done with a decorator and with a solver of
the library, and compared with the equations written out. Ten iterations are not enough here: the state is off, and
the picture shows by how much. The gradient is that of an exact solution, taken at the state that was found.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from implicitdiff import custom_fixed_point
from implicitdiff.linear_solve import solve_normal_cg
from implicitdiff.nn import ImplicitMetaGradientModule
from implicitdiff.solvers import anderson

ITERATIONS = 10
linear_solve = solve_normal_cg(maxiter=5, atol=0)
torch.manual_seed(0)
net = nn.Linear(4, 4)
x0 = torch.randn(1, 4)


# %%
# As an object
# ------------
# ``net`` is given, so it holds the meta-parameters; ``x`` is made here, so it is what is solved for.
class FixedPoint(ImplicitMetaGradientModule, linear_solve=linear_solve):
    def __init__(self, net: nn.Module, x0: Tensor) -> None:
        super().__init__()
        self.net = net
        self.x = nn.Parameter(x0.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def optimality(self) -> Tensor:
        return self(self.x) - self.x

    def solve(self) -> "FixedPoint":
        for _ in range(ITERATIONS):
            self.x.copy_(self(self.x))
        return self


model = FixedPoint(net, x0).solve()
model.x.mean().backward()
weight_grad, bias_grad = net.weight.grad, net.bias.grad
print("gradient in the weight, first row ", weight_grad[0].numpy().round(4))
print("gradient in the bias              ", bias_grad.numpy().round(4))


# %%
# As functions
# ------------
# The decorated loop gives the same numbers; a solver of the library iterates until it has converged.
def layer(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return functional_call(net, params, (x,))


@custom_fixed_point(layer, solve=linear_solve)
def iterate(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    for _ in range(ITERATIONS):
        x = layer(x, params)
    return x


params = {name: p.detach() for name, p in net.named_parameters()}
functional = torch.func.grad(lambda params: iterate(x0, params).mean())(params)
converged = torch.func.grad(lambda params: anderson(layer).run(x0, params)[0].mean())(params)

# %%
# The equations written out
# -------------------------
W, bias = net.weight.detach().double(), net.bias.detach().double()
identity = torch.eye(4, dtype=torch.float64)
u = torch.linalg.solve((identity - W).T, torch.full((4,), 0.25, dtype=torch.float64))
solution = torch.linalg.solve(identity - W, bias)
at_ten = torch.outer(u, model.x[0].detach().double())
at_solution = torch.outer(u, solution)

xs = [x0[0].double()]
for _ in range(60):
    xs.append(W @ xs[-1] + bias)
states = torch.stack([(x - solution).norm() for x in xs])
grads = torch.stack([(torch.outer(u, x) - at_solution).norm() for x in xs])
off = f"the state is off by {states[ITERATIONS]:.1e}, the gradient by {grads[ITERATIONS]:.1e}"
print(f"after {ITERATIONS} iterations {off}")

expected_weight = torch.tensor([0.0272, 0.0031, -0.0156, -0.0238])
expected_bias = torch.tensor([0.0574, 0.2114, 0.1403, 0.3046])
assert (weight_grad[0] - expected_weight).abs().max() < 6e-5, "the gradient in the weight is another one"
assert (bias_grad - expected_bias).abs().max() < 6e-5, "the gradient in the bias is another one"
assert (bias_grad - u).abs().max() < 1e-5, "the gradient in the bias disagrees with the equations"
assert (weight_grad - at_ten).abs().max() < 1e-5, "the gradient in the weight disagrees with the equations"
assert (functional["weight"] - weight_grad).abs().max() < 1e-6, "functions and objects disagree"
assert (converged["weight"] - at_solution).abs().max() < 1e-5, "the converged gradient disagrees with the equations"

# %%
# The picture
# -----------
figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
axis.semilogy(states, color="#1b7f79", lw=2.5, label="state")
axis.semilogy(grads, color="#d9683c", lw=2.5, label="implicit gradient in the weight")
axis.axvline(ITERATIONS, color="#333333", lw=1, ls=":")
axis.text(ITERATIONS + 0.5, states[0], "where the module stops", va="top")
axis.set(title="The gradient is as good as the state", xlabel="plain iterations", ylabel="distance to the solution's")
axis.legend(frameon=False)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)
