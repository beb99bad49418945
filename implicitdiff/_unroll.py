"""Loops differentiated step by step, with checkpoints that save memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.trees as pytree
from implicitdiff._calls import FactoryCall
from implicitdiff._closures.lift import confirm, lift
from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.primitive import Problem, attach, solve_problem
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.replacements import elementary
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, Tree, UserFunction


def unroll(step: UserFunction, n: int, checkpoint_every: int | None = None) -> UserFunction:
    """Return the function ``run(carry, *args) -> carry`` that repeats ``carry = step(carry, *args)`` `n` times.

    The derivatives are those of the steps, as for a loop in plain Python, under every transform of torch.func and to
    any order. With ``k = checkpoint_every``, only every ``k``-th carry is kept, and a derivative computes the steps
    between two kept carries again. Memory is that of ``n / k`` carries and ``k`` steps, smallest for ``k`` near the
    square root of `n`. Time grows by one evaluation of the steps (two, if a step captures tensors). Higher derivatives
    are right, but keep all steps. The steps run under `elementary`; computations on the last carry, such as the loss
    after adaptation in MAML, do not.

    Args:
        step: ``step(carry, *args) -> carry`` on pytrees. Captured tensors are differentiated too. With
            `checkpoint_every` the step must be deterministic and free of side effects, and must take gradients by
            torch.func; a step that differs in its second evaluation is refused.
        n: the number of steps.
        checkpoint_every: the number of steps between two checkpoints; None keeps all steps.

    Returns:
        The function ``run(carry, *args) -> carry``.

    Raises:
        ValueError: ``n`` is negative, or ``checkpoint_every`` is not positive; later, a step draws random numbers.
        RuntimeError: when the derivative is taken, the step has changed since the call.

    Reference:
        Griewank and Walther, "Evaluating Derivatives", 2008, chapter 12; one level of checkpoints.

    Example:
        >>> import torch
        >>> from implicitdiff import unroll
        >>> descend = unroll(lambda w, lr: w - lr * 2 * w, 100, checkpoint_every=10)
        >>> w, lr = torch.tensor(1.0), torch.tensor(0.01, dtype=torch.float64)
        >>> torch.func.grad(descend, argnums=1)(w, lr), -200 * (1 - 2 * lr) ** 99
        (tensor(-27.0652, dtype=torch.float64), tensor(-27.0652, dtype=torch.float64))
    """
    if n < 0:
        raise ValueError(f"unroll: n must be at least 0, got {n!r}")
    if checkpoint_every is not None and not checkpoint_every >= 1:
        raise ValueError(f"unroll: checkpoint_every must be at least 1, or None, got {checkpoint_every!r}")

    return Unrolled(step, n, checkpoint_every)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The loop of `unroll`."""

    step: UserFunction
    n: int
    checkpoint_every: int | None

    def __call__(self, carry: Tree, *args: Any) -> Tree:
        if self.checkpoint_every is None:
            return self._steps(self.n, carry, args)
        for start in range(0, self.n, self.checkpoint_every):
            carry = _recomputed(self._steps, min(self.checkpoint_every, self.n - start), carry, args)
        return carry

    def _steps(self, count: int, carry: Tree, args: tuple[Tree, ...]) -> Tree:
        # A derivative of any order may follow, and torch has wrong higher derivatives of some operations.
        with elementary():
            for _ in range(count):
                carry = self.step(carry, *args)
        return carry

    def __repr__(self) -> str:
        given = {} if self.checkpoint_every is None else {"checkpoint_every": self.checkpoint_every}
        return repr(FactoryCall("unroll", (self.step, self.n), given))


@_modes.one_operation
def _recomputed(fn: UserFunction, *args: Any) -> Tree:
    """Return ``fn(*args)`` without a graph; a derivative evaluates ``fn`` again."""
    if _context.now().is_silent:
        return fn(*args)
    # The call runs under a mode, detached, so no step is recorded. A derivative starts from the operands.
    lifted = lift("unroll: the step", fn, *args)
    confirm(lifted)
    values, structure = pytree.flatten(lifted.value)
    # Integer tensors such as counters have no derivative.
    smooth = [i for i, t in enumerate(values) if is_continuous(t)]

    def evaluate(theta: Leaves) -> Leaves:
        # `lifted` compares the operations with those at the call, so a changed step raises.
        again = structure.tensors_of(lifted(theta))
        return [again[i] for i in smooth]

    if smooth:
        attached = attach(_Segment(evaluate), [values[i] for i in smooth], lifted.operands)
        for i, value in zip(smooth, attached, strict=True):
            values[i] = value
    return structure.unflatten(values)


@dataclass(frozen=True)
class _Segment(Problem):
    """``x = f(theta)`` as the equation ``f(theta) - x = 0``, whose solution ``x`` is known.

    ``A = d residual / dx = -I``, so the rules of the primitive give the derivatives of ``f``. A rule evaluates ``f``
    again, so only ``theta`` is kept.
    """

    fn: Callable[[Leaves], Leaves]
    levels: tuple[Dims, ...] = ()

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        return [a - b for a, b in zip(self.primal(theta), x, strict=True)]

    def primal(self, theta: Leaves) -> Leaves:
        return over_levels(self.fn, [(list(dims),) for dims in self.levels])(theta)  # type: ignore[no-any-return]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        # ``A = -I`` is symmetric, so `adjoint` makes no difference.
        return [-t for t in b]

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        # torch.func.grad records the backward pass too, for a second derivative. As a segment, the backward pass keeps
        # its operands only.
        def pull(operands: Leaves) -> Leaves:
            # n is at least 1, so the slices by -n are the ones meant.
            x, theta, u = operands[:n], operands[n:-n], operands[-n:]
            return list(self.pullback(x, theta, u, wanted).values())

        n, operands = len(x), [*x, *theta, *x_bar]
        if _context.now().is_silent:
            operands = [t.detach() for t in operands]
        return dict(zip(wanted, solve_problem(_Segment(pull), operands), strict=True))

    def batched(self, dims: Dims, size: int) -> tuple[_Segment, Dims, int]:
        front = tuple(None if d is None else 0 for d in dims)
        return replace(self, levels=(*self.levels, front)), front, 0
