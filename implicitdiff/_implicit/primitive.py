"""The one primitive: a solution of an equation, with the derivatives that the equation implies.

Let ``r(x, theta) = 0`` define ``x`` as a function of ``theta``, and ``A = dr/dx`` at the solution. Then

    forward:   A x'      = - (dr/dtheta) theta'
    reverse:   theta_bar = - (dr/dtheta)^H u,    A^H u = x_bar

A root of a nonlinear residual and the solution of a linear system ``r = A(theta) x - b`` are both of this kind, and
the linear solves in the rules are themselves applications of the primitive, so derivatives of any order follow.

See Blondel et al., "Efficient and Modular Implicit Differentiation", 2022, section 2.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.settings as _settings
from implicitdiff._closures.lift import one_derivative
from implicitdiff._implicit.linearisation import ByFunctorch, Linearisation, OfOperands, Residual
from implicitdiff._implicit.operators import Dims
from implicitdiff._torch.trees import Leaves


class Problem(ABC):
    """An equation ``residual(x, theta) = 0`` over lists of leaves, with everything static about it.

    A problem knows nothing of transforms: under vmap it is replaced by its `batched` self, which takes plain tensors
    with more dimensions, so whatever a problem computes in `primal` runs on plain tensors outside of every transform.
    """

    @abstractmethod
    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        """What the solution makes zero; pure."""

    @abstractmethod
    def primal(self, theta: Leaves) -> Leaves:
        """The solution, from plain tensors."""

    @abstractmethod
    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        """The ``v`` with ``A v = b``, or ``A^H v = b``, where ``A`` is ``d residual / dx``."""

    @abstractmethod
    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        """The problem under one more vmap of `size` lanes, whose operands ``theta`` are batched at `dims`.

        Returns the new problem, where it wants the batch dimension of each operand (None: not batched, -1: batched,
        expand it if need be), and at which dimension of its solution the lanes lie.
        """

    def jvp(self, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
        """``x'`` for the tangents of operands given by position."""
        rhs = self.pushforward(x, theta, tangents)
        return self.solve(x, theta, [-t for t in rhs], adjoint=False)

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """``theta_bar`` for the operands whose positions are `wanted`."""
        u = self.solve(x, theta, x_bar, adjoint=True)
        return self.pullback(x, theta, [-t for t in u], wanted)

    @property
    def is_lazy(self) -> bool:
        """Whether `quiet_vjp` takes less time than `vjp`, and may run below the transforms."""
        return False

    def release(self) -> Leaves:
        """Tensors for autograd to save with the operands, for `quiet_vjp`; they are not held here any longer."""
        return []

    def quiet_vjp(
        self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
    ) -> dict[int, torch.Tensor]:
        """`vjp` on plain tensors, where nothing is recorded."""
        return self.vjp(x, theta, x_bar, wanted)

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """``(d residual / d theta)^H u`` for the operands whose positions are `wanted`."""
        by: type[Linearisation] = OfOperands if functorch.is_quiet([*x, *theta], u) else ByFunctorch
        pull = by(self._of(x, theta, wanted), [theta[i] for i in wanted], []).pull()
        return dict(zip(wanted, pull(u), strict=True))

    def pushforward(self, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
        """``(d residual / d theta) theta'`` for the tangents given by position."""
        given = list(tangents.values())
        by: type[Linearisation] = OfOperands if functorch.is_quiet([*x, *theta], given) else ByFunctorch
        return by(self._of(x, theta, list(tangents)), [theta[i] for i in tangents], []).push()(given)

    def _of(self, x: Leaves, theta: Leaves, positions: Sequence[int]) -> Residual:
        def residual(values: Leaves, _: Leaves) -> Leaves:
            replaced = list(theta)
            for i, value in zip(positions, values, strict=True):
                replaced[i] = value
            return self.residual(x, replaced)

        return residual


def solve_problem(problem: Problem, theta: Leaves) -> Leaves:
    """The problem's solution as a differentiable function of `theta`."""
    theta = [functorch.alive(t) for t in _modes.alias(theta)]
    if functorch.is_quiet([], theta) and not _modes.is_inside():
        return solve_quietly(problem, theta)
    return list(functorch.apply(_Solution, problem, 0, *theta))


def solve_quietly(problem: Problem, theta: Leaves) -> Leaves:
    """The same where there is nothing to differentiate: the vmaps are taken off without an autograd.Function."""
    layer = functorch.outermost_layer(theta)
    if layer is None:
        with functorch.nothing_running(), _settings.full_precision():
            return problem.primal(theta)
    batched, theta, at = _batch(problem, layer.below, layer.dims, layer.size)
    return [functorch.add_layer(t, at, layer) for t in solve_quietly(batched, theta)]


def _batch(problem: Problem, theta: Leaves, dims: Dims, size: int) -> tuple[Problem, Leaves, int]:
    """The problem under one more vmap, its operands as it wants them, and where its solution is batched."""
    batched, wanted, at = problem.batched(dims, size)
    return batched, [_lay(t, d, w, size, at) for t, d, w in zip(theta, dims, wanted, strict=True)], at


def attach(problem: Problem, x: Leaves, theta: Leaves) -> Leaves:
    """The known solution `x` as a differentiable function of `theta`; `x` itself gets no gradient."""
    return _apply(problem, len(x), [*x, *theta])


def _apply(problem: Problem, known: int, operands: Leaves) -> Leaves:
    return list(functorch.apply(_Solution, problem, known, *_modes.alias(operands)))


class _Solution(torch.autograd.Function):
    """Operands: the problem, the number of leaves of a known solution (0 if it is to be computed), those leaves,
    theta."""

    @staticmethod
    @functorch.outside_compile
    def forward(problem: Problem, known: int, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if known:
            return tuple(t.clone() for t in operands[:known])
        with _settings.full_precision():
            solution = problem.primal(list(operands))
        # What is returned as it came in cannot be saved, nor marked as a result under vmap what was expanded.
        given = set(map(id, operands))
        return tuple(t.clone() if id(t) in given or 0 in t.stride() else t for t in solution)

    @staticmethod
    @functorch.outside_compile
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.problem, ctx.known, *operands = inputs
        ctx.unknowns, ctx.operands = len(output), len(operands) - ctx.known
        ctx.save_for_backward(*output, *operands[ctx.known :], *ctx.problem.release())
        ctx.save_for_forward(*output, *operands[ctx.known :])
        ctx.set_materialize_grads(False)

    @staticmethod
    @functorch.outside_compile
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, theta = _split([functorch.alive(t) for t in ctx.saved_tensors], ctx.unknowns)
        theta, released = _split(theta, ctx.operands)
        first = 2 + ctx.known
        grads: list[torch.Tensor | None] = [None] * (first + len(theta))
        wanted = [i for i in range(len(theta)) if ctx.needs_input_grad[first + i]]
        if wanted and any(c is not None for c in cotangents):
            x_bar = [torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, x, strict=True)]
            with one_derivative():
                pulled = _pulled_back(ctx.problem, x, theta, x_bar, wanted, released)
            for i, grad in pulled.items():
                grads[first + i] = grad
        return tuple(grads)

    @staticmethod
    @functorch.outside_compile
    @functorch.nested_forward_mode
    def jvp(ctx: Any, saved: Leaves, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, theta = _split(saved, ctx.unknowns)
        given = {i: t for i, t in enumerate(tangents[2 + ctx.known :]) if t is not None}
        if not given:
            return tuple(None for _ in x)
        # Without this level's tangent the saved solution is that of the level below, which has its derivatives already.
        with one_derivative():
            return tuple(_pushed_forward(ctx.problem, x, theta, given))

    @staticmethod
    @functorch.outside_compile
    def vmap(info: Any, in_dims: Dims, problem: Problem, known: int, *operands: torch.Tensor) -> Any:
        x, theta = _split(operands, known)
        x_dims, theta_dims = in_dims[2 : 2 + known], in_dims[2 + known :]
        batched, theta, at = _batch(problem, theta, theta_dims, info.batch_size)
        x = [_lay(t, d, -1, info.batch_size, at) for t, d in zip(x, x_dims, strict=True)]
        out = tuple(_apply(batched, known, [*x, *theta]))
        return out, (at,) * len(out)


class _Derivative(torch.autograd.Function):
    """``theta_bar``, computed where nothing is recorded, and differentiated only if somebody asks for it.

    Under one grad transform the next derivative is possible, but hardly ever taken. Operands: the problem, the
    positions that are wanted, the number of unknowns, x, x_bar and theta.
    """

    @staticmethod
    @functorch.outside_compile
    def forward(
        problem: Problem, wanted: tuple[int, ...], unknowns: int, *operands: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x, x_bar, theta = _three(operands, unknowns)
        pulled = problem.quiet_vjp(x, theta, x_bar, wanted, [])
        return tuple(pulled[i] for i in wanted)

    @staticmethod
    @functorch.outside_compile
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.problem, ctx.wanted, ctx.unknowns, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    @functorch.outside_compile
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operands = [functorch.alive(t) for t in ctx.saved_tensors]
        varied = [i for i in range(len(operands)) if ctx.needs_input_grad[3 + i]]

        def vjp(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            replaced = list(operands)
            for i, value in zip(varied, values, strict=True):
                replaced[i] = value
            x, x_bar, theta = _three(replaced, ctx.unknowns)
            pulled = ctx.problem.vjp(x, theta, x_bar, ctx.wanted)
            return tuple(pulled[i] for i in ctx.wanted)

        with one_derivative():
            pull: Any = torch.func.vjp(vjp, *[operands[i] for i in varied])[1]
            pulled = dict(zip(varied, pull(cotangents), strict=True))
        return (None, None, None, *[pulled.get(i) for i in range(len(operands))])

    @staticmethod
    @functorch.outside_compile
    def vmap(
        info: Any, in_dims: Dims, problem: Problem, wanted: tuple[int, ...], unknowns: int, *operands: torch.Tensor
    ) -> Any:
        x, x_bar, theta = _three(operands, unknowns)
        x_dims, x_bar_dims, theta_dims = _three(in_dims[3:], unknowns)
        # Of an operand that the lanes share, each lane has a derivative of its own.
        shared = [i for i in wanted if theta_dims[i] is None]
        theta = [t.expand(info.batch_size, *t.shape) if i in shared else t for i, t in enumerate(theta)]
        theta_dims = [0 if i in shared else d for i, d in enumerate(theta_dims)]
        batched, theta, at = _batch(problem, theta, tuple(theta_dims), info.batch_size)
        known = [_lay(t, d, -1, info.batch_size, at) for t, d in zip([*x, *x_bar], [*x_dims, *x_bar_dims], strict=True)]
        out = functorch.apply(_Derivative, batched, wanted, unknowns, *_modes.alias([*known, *theta]))
        return out, (0,) * len(out)


# `apply` asks for it each time, and would work it out anew.
for _function in (_Solution, _Derivative):
    vars(_function)["forward"].__func__.__signature__ = inspect.signature(_function.forward)


def _pulled_back(
    problem: Problem, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
) -> dict[int, torch.Tensor]:
    if _modes.is_inside() or functorch.have_legacy_batch(x_bar):
        return problem.vjp(x, theta, x_bar, wanted)
    if functorch.nothing_records():
        # An ordinary backward pass. What autograd knows of the operands is of no use any more.
        x, theta = [t.detach() for t in x], [t.detach() for t in theta]
        return problem.quiet_vjp(x, theta, x_bar, wanted, released)
    if problem.is_lazy and functorch.is_grad_alone([*x, *x_bar, *theta]):
        operands = _modes.alias([*x, *x_bar, *theta])
        pulled = functorch.apply(_Derivative, problem, tuple(wanted), len(x), *operands)
        return dict(zip(wanted, pulled, strict=True))
    return problem.vjp(x, theta, x_bar, wanted)


def _pushed_forward(problem: Problem, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
    given = list(tangents.values())
    if not problem.is_lazy or _modes.is_inside() or not functorch.is_jvp_alone([*x, *theta, *given]):
        return problem.jvp(x, theta, tangents)

    def jvp(x: Leaves, theta: Leaves, given: Leaves) -> Leaves:
        return problem.jvp(x, theta, dict(zip(tangents, given, strict=True)))

    return functorch.below_the_top(jvp, x, theta, given)


def _three(values: Sequence[Any], unknowns: int) -> tuple[list[Any], list[Any], list[Any]]:
    return list(values[:unknowns]), list(values[unknowns : 2 * unknowns]), list(values[2 * unknowns :])


def _lay(tensor: torch.Tensor, dim: int | None, wanted: int | None, size: int, at: int) -> torch.Tensor:
    """A vmapped operand with its batch dimension where the batched problem wants it."""
    if wanted is None:
        return tensor
    target = at if wanted < 0 else wanted
    if dim is None:
        return tensor.unsqueeze(target).expand(*tensor.shape[:target], size, *tensor.shape[target:])
    return tensor.movedim(dim, target)


def _split(values: Sequence[torch.Tensor], count: int) -> tuple[Leaves, Leaves]:
    return list(values[:count]), list(values[count:])
