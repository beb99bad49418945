"""The primitive: the solution of an equation, with the derivatives that the equation implies.

Let ``r(x, theta) = 0`` define ``x`` as a function of ``theta``, and ``A = dr/dx`` at the solution. Then

    forward:   A x'      = - (dr/dtheta) theta'
    reverse:   theta_bar = - (dr/dtheta)^H u,    A^H u = x_bar

Both follow from ``A x' + (dr/dtheta) theta' = 0``, the derivative of ``r(x(theta), theta) = 0``. Roots of a nonlinear
residual, and solutions of a linear system ``r = A(theta) x - b``, are problems of this form. The linear solves in the
rules are applications of the primitive too. So derivatives of any order follow.

See Blondel et al., "Efficient and Modular Implicit Differentiation", 2022, section 2.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.context as _context
import implicitdiff._torch.functions as _functions
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.settings as _settings
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.tracking as _tracking
from implicitdiff._closures.evaluation import one_derivative
from implicitdiff._implicit.linearisation import ByFunctorch, Linearisation, OfOperands, Residual
from implicitdiff._implicit.operators import Dims
from implicitdiff._torch.trees import Leaves

BatchedOutputs = tuple[tuple[torch.Tensor, ...], tuple[int, ...]]
"""The outputs of a vmap rule, and their batch dimensions."""
_Value = TypeVar("_Value")


class Problem(ABC):
    """An equation ``residual(x, theta) = 0`` over lists of leaves; the object holds all data other than tensors.

    A problem is independent of transforms. Under vmap, the problem from `batched` replaces a problem; its tensors are
    plain and have one more dimension. So `primal` always runs on plain tensors, outside of every transform.
    """

    @abstractmethod
    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        """Return the residual, which is zero at the solution; a pure function."""

    @abstractmethod
    def primal(self, theta: Leaves) -> Leaves:
        """Return the solution, from plain tensors."""

    @abstractmethod
    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        """Return ``v`` with ``A v = b``, or ``A^H v = b``, for ``A = d residual / dx``."""

    @abstractmethod
    def batched(self, dims: Dims, size: int) -> tuple[Problem, Dims, int]:
        """Return the problem under one more vmap of `size` lanes, with ``theta`` batched at `dims`.

        Returns:
            The new problem; the batch dimension that the new problem needs for each operand (None: not batched; -1:
            at the position of the solution's, expanded if need be); the batch dimension of the solution.
        """

    def jvp(self, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
        """Return ``x'``, given the tangents of operands by position."""
        rhs = self.pushforward(x, theta, tangents)
        return self.solve(x, theta, [-t for t in rhs], adjoint=False)

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return ``theta_bar`` for the operands at the positions `wanted`."""
        u = self.solve(x, theta, x_bar, adjoint=True)
        return self.pullback(x, theta, [-t for t in u], wanted)

    @property
    def prefers_unrecorded(self) -> bool:
        """True if `unrecorded_vjp` is faster than `vjp`, and may run below the transforms."""
        return False

    def release(self) -> Leaves:
        """Return tensors for autograd to save, which `unrecorded_vjp` receives, and drop the references to them."""
        return []

    def unrecorded_vjp(
        self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
    ) -> dict[int, torch.Tensor]:
        """Return `vjp` on plain tensors, when no derivative of the result is recorded."""
        return self.vjp(x, theta, x_bar, wanted)

    def pullback(self, x: Leaves, theta: Leaves, u: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return ``(d residual / d theta)^H u`` for the operands at the positions `wanted`."""
        # If nothing differentiates the result, a graph of autograd does and costs less.
        by: type[Linearisation] = OfOperands if _tracking.is_quiet([*x, *theta], u) else ByFunctorch
        pull = by(self._residual_at(x, theta, wanted), [theta[i] for i in wanted], []).pull()
        return dict(zip(wanted, pull(u), strict=True))

    def pushforward(self, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
        """Return ``(d residual / d theta) theta'``, given the tangents by position."""
        given = list(tangents.values())
        by: type[Linearisation] = OfOperands if _tracking.is_quiet([*x, *theta], given) else ByFunctorch
        return by(self._residual_at(x, theta, list(tangents)), [theta[i] for i in tangents], []).push()(given)

    def _residual_at(self, x: Leaves, theta: Leaves, positions: Sequence[int]) -> Residual:
        """Return the residual as a function of the operands at some positions, with the others fixed."""

        def residual(values: Leaves, _: Leaves) -> Leaves:
            replaced = list(theta)
            for i, value in zip(positions, values, strict=True):
                replaced[i] = value
            return self.residual(x, replaced)

        return residual


def solve_problem(problem: Problem, theta: Leaves) -> Leaves:
    """Return the problem's solution as a differentiable function of `theta`."""
    # A mode sees the operands as arguments of `view_as`. Dead wrappers come off afterwards.
    theta = [_levels.strip_dead_wrappers(t) for t in _modes.alias(theta)]
    # Nothing differentiates the solution: no Function, and no tensor is saved.
    if _tracking.is_quiet([], theta) and not _modes.is_inside():
        return solve_unrecorded(problem, theta)
    return list(_functions.apply(_ImplicitSolution, problem, 0, *theta))


def solve_unrecorded(problem: Problem, theta: Leaves) -> Leaves:
    """`solve_problem` for operands that nothing differentiates: remove the vmaps without an autograd.Function."""
    # Each call takes the layer of the innermost vmap off; the last solves all lanes at once.
    layer = _levels.outermost_layer(theta)
    if layer is None:
        with _switches.nothing_running(), _settings.full_precision():
            return problem.primal(theta)
    batched, theta, at = _batch(problem, layer.below, layer.dims, layer.size)
    return [_levels.add_layer(t, at, layer) for t in solve_unrecorded(batched, theta)]


def _batch(problem: Problem, theta: Leaves, dims: Dims, size: int) -> tuple[Problem, Leaves, int]:
    """Return the problem under one more vmap, the moved operands, and the batch dimension of the solution."""
    batched, wanted, at = problem.batched(dims, size)
    return batched, [_move_batch_dim(t, d, w, size, at) for t, d, w in zip(theta, dims, wanted, strict=True)], at


def attach(problem: Problem, x: Leaves, theta: Leaves) -> Leaves:
    """Return the known solution `x` as a differentiable function of `theta`; the operand `x` gets no gradient."""
    return _apply(problem, len(x), [*x, *theta])


def _apply(problem: Problem, known: int, operands: Leaves) -> Leaves:
    return list(_functions.apply(_ImplicitSolution, problem, known, *_modes.alias(operands)))


class _ImplicitSolution(torch.autograd.Function):
    """The solution of a problem, with the derivative rules of `Problem.vjp` and `Problem.jvp`.

    Operands: the problem, the number of leaves of a known solution (0: compute the solution), these leaves, theta.
    """

    @staticmethod
    @_compile.outside_compile
    def forward(problem: Problem, known: int, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if known:
            # An autograd.Function has to return new tensors, so clone the operands.
            return tuple(map(torch.clone, operands[:known]))
        with _settings.full_precision():
            solution = problem.primal(list(operands))
        # Clone results that are operands, which autograd cannot save as outputs, and results with zero strides:
        # they cannot be marked as outputs under vmap.
        given = set(map(id, operands))
        return tuple(t.clone() if id(t) in given or 0 in t.stride() else t for t in solution)

    @staticmethod
    @_compile.outside_compile
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.problem, ctx.known, *operands = inputs
        ctx.unknowns, ctx.operands = len(output), len(operands) - ctx.known
        # autograd frees saved tensors after the backward pass, unlike attributes of ctx, and detects in-place changes.
        # The order is that of `_split`: solution, theta, then the released graph.
        ctx.save_for_backward(*output, *operands[ctx.known :], *ctx.problem.release())
        ctx.save_for_forward(*output, *operands[ctx.known :])
        # An absent cotangent stays None, and a derivative that is zero costs no solve.
        ctx.set_materialize_grads(False)

    @staticmethod
    @_compile.outside_compile
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # A pullback may run after the end of its transform: wrappers of this level are dead by then.
        x, theta = _split([_levels.strip_dead_wrappers(t) for t in ctx.saved_tensors], ctx.unknowns)
        theta, released = _split(theta, ctx.operands)
        # The problem, the number `known` and the known solution get no gradient.
        first = 2 + ctx.known
        grads: list[torch.Tensor | None] = [None] * (first + len(theta))
        wanted = [i for i in range(len(theta)) if ctx.needs_input_grad[first + i]]
        if wanted and any(c is not None for c in cotangents):
            x_bar = [torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, x, strict=True)]
            # The solve may evaluate the user's function once for each product, but compares only the first two.
            with one_derivative():
                pulled = _pulled_back(ctx.problem, x, theta, x_bar, wanted, released)
            for i, grad in pulled.items():
                grads[first + i] = grad
        return tuple(grads)

    @staticmethod
    @_compile.outside_compile
    @_functions.nested_forward_mode
    def jvp(ctx: Any, saved: Leaves, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, theta = _split(saved, ctx.unknowns)
        given = {i: t for i, t in enumerate(tangents[2 + ctx.known :]) if t is not None}
        if not given:
            return tuple(None for _ in x)
        # `nested_forward_mode` has removed this level's tangent from the saved solution, which is now the solution of
        # the level below, with all derivatives of that level.
        with one_derivative():
            return tuple(_pushed_forward(ctx.problem, x, theta, given))

    @staticmethod
    @_compile.outside_compile
    def vmap(info: Any, in_dims: Dims, problem: Problem, known: int, *operands: torch.Tensor) -> BatchedOutputs:
        x, theta = _split(operands, known)
        x_dims, theta_dims = in_dims[2 : 2 + known], in_dims[2 + known :]
        # One more level of the same Function, for the batched problem: the next transform finds its rules there.
        batched, theta, at = _batch(problem, theta, theta_dims, info.batch_size)
        x = [_move_batch_dim(t, d, -1, info.batch_size, at) for t, d in zip(x, x_dims, strict=True)]
        out = tuple(_apply(batched, known, [*x, *theta]))
        return out, (at,) * len(out)


class _UnrecordedVjp(torch.autograd.Function):
    """``theta_bar`` without a record of its computation, which is repeated if a further derivative is taken.

    A single grad transform allows a further derivative, but few callers take one. Operands: the problem, the positions
    to differentiate, the number of unknowns, x, x_bar and theta.
    """

    @staticmethod
    @_compile.outside_compile
    def forward(
        problem: Problem, wanted: tuple[int, ...], unknowns: int, *operands: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x, x_bar, theta = _split_in_three(operands, unknowns)
        pulled = problem.unrecorded_vjp(x, theta, x_bar, wanted, [])
        return tuple(pulled[i] for i in wanted)

    @staticmethod
    @_compile.outside_compile
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        # No `jvp`: `_pulled_back` chooses this Function only if forward mode is off.
        ctx.problem, ctx.wanted, ctx.unknowns, *operands = inputs
        ctx.save_for_backward(*operands)

    @staticmethod
    @_compile.outside_compile
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        operands = [_levels.strip_dead_wrappers(t) for t in ctx.saved_tensors]
        varied = [i for i in range(len(operands)) if ctx.needs_input_grad[3 + i]]

        def vjp(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            replaced = list(operands)
            for i, value in zip(varied, values, strict=True):
                replaced[i] = value
            x, x_bar, theta = _split_in_three(replaced, ctx.unknowns)
            pulled = ctx.problem.vjp(x, theta, x_bar, ctx.wanted)
            return tuple(pulled[i] for i in ctx.wanted)

        with one_derivative():
            # `Problem.vjp` repeats the computation, as a composition of differentiable operations.
            pull: Any = torch.func.vjp(vjp, *[operands[i] for i in varied])[1]
            pulled = dict(zip(varied, pull(cotangents), strict=True))
        return (None, None, None, *[pulled.get(i) for i in range(len(operands))])

    @staticmethod
    @_compile.outside_compile
    def vmap(
        info: Any, in_dims: Dims, problem: Problem, wanted: tuple[int, ...], unknowns: int, *operands: torch.Tensor
    ) -> BatchedOutputs:
        x, x_bar, theta = _split_in_three(operands, unknowns)
        x_dims, x_bar_dims, theta_dims = _split_in_three(in_dims[3:], unknowns)
        # Each lane has its own derivative with respect to an operand that all lanes share, so expand the operand.
        shared = [i for i in wanted if theta_dims[i] is None]
        theta = [t.expand(info.batch_size, *t.shape) if i in shared else t for i, t in enumerate(theta)]
        theta_dims = [0 if i in shared else d for i, d in enumerate(theta_dims)]
        batched, theta, at = _batch(problem, theta, tuple(theta_dims), info.batch_size)
        known = [
            _move_batch_dim(t, d, -1, info.batch_size, at)
            for t, d in zip([*x, *x_bar], [*x_dims, *x_bar_dims], strict=True)
        ]
        out = _functions.apply(_UnrecordedVjp, batched, wanted, unknowns, *_modes.alias([*known, *theta]))
        return out, (0,) * len(out)


# `apply` reads the signature of `forward` in each call. Store it: `inspect.signature` is slow.
for _function in (_ImplicitSolution, _UnrecordedVjp):
    vars(_function)["forward"].__func__.__signature__ = inspect.signature(_function.forward)


def _pulled_back(
    problem: Problem, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int], released: Leaves
) -> dict[int, torch.Tensor]:
    """Return ``theta_bar`` by the fastest rule that the running modes and transforms allow."""
    # A mode has to see the operations. A vmap by `is_grads_batched=True` has no level, so `solve_unrecorded` could not
    # remove its batch dimension.
    if _modes.is_inside() or _tracking.have_legacy_batch(x_bar):
        return problem.vjp(x, theta, x_bar, wanted)
    if _context.now().is_silent:
        # An ordinary backward pass without `create_graph`: the history of the operands is not needed.
        x, theta = [t.detach() for t in x], [t.detach() for t in theta]
        return problem.unrecorded_vjp(x, theta, x_bar, wanted, released)
    # Under one grad transform and any vmaps: compute without a record, see `_UnrecordedVjp`.
    if problem.prefers_unrecorded and _tracking.is_grad_alone([*x, *x_bar, *theta]):
        operands = _modes.alias([*x, *x_bar, *theta])
        pulled = _functions.apply(_UnrecordedVjp, problem, tuple(wanted), len(x), *operands)
        return dict(zip(wanted, pulled, strict=True))
    # The general rule, composed of differentiable operations.
    return problem.vjp(x, theta, x_bar, wanted)


def _pushed_forward(problem: Problem, x: Leaves, theta: Leaves, tangents: dict[int, torch.Tensor]) -> Leaves:
    """Return ``x'`` by the fastest rule that the running modes and transforms allow."""
    given = list(tangents.values())
    if not problem.prefers_unrecorded or _modes.is_inside() or not _tracking.is_jvp_alone([*x, *theta, *given]):
        return problem.jvp(x, theta, tangents)

    # The innermost transform is a jvp, whose tangent has been removed. So compute at the level below, where none
    # differentiates the operands.
    def jvp(x: Leaves, theta: Leaves, given: Leaves) -> Leaves:
        return problem.jvp(x, theta, dict(zip(tangents, given, strict=True)))

    return _functions.below_the_top(jvp, x, theta, given)


def _split_in_three(values: Sequence[_Value], unknowns: int) -> tuple[list[_Value], list[_Value], list[_Value]]:
    """Split values into those of x, of x_bar, and of theta."""
    return list(values[:unknowns]), list(values[unknowns : 2 * unknowns]), list(values[2 * unknowns :])


def _move_batch_dim(tensor: torch.Tensor, dim: int | None, wanted: int | None, size: int, at: int) -> torch.Tensor:
    """Move the batch dimension of an operand to the position that the batched problem needs; see `Problem.batched`."""
    if wanted is None:
        return tensor
    target = at if wanted < 0 else wanted
    if dim is None:
        # A view of zero strides, without a copy.
        return tensor.unsqueeze(target).expand(*tensor.shape[:target], size, *tensor.shape[target:])
    return tensor.movedim(dim, target)


def _split(values: Sequence[torch.Tensor], count: int) -> tuple[Leaves, Leaves]:
    return list(values[:count]), list(values[count:])
