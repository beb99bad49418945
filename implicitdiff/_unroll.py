"""Loops differentiated step by step, with as little memory as is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.lift import confirm, lift
from implicitdiff._closures.signature import name_of
from implicitdiff._implicit.operators import Dims
from implicitdiff._implicit.primitive import Problem, attach, solve_problem
from implicitdiff._torch.lanes import over_levels
from implicitdiff._torch.replacements import elementary
from implicitdiff._torch.trees import Leaves


def unroll(step: Callable[..., Any], n: int, checkpoint_every: int | None = None) -> Callable[..., Any]:
    """Make the loop of `n` steps ``carry = step(carry, *args)`` a function ``run(carry, *args) -> carry``.

    The loop is differentiated through its steps, as plain Python would be, under every transform of torch.func and to
    any order. With `checkpoint_every` only every so many-th carry is kept for the derivative, and the steps between two
    of them are computed again when it is taken: memory is that of ``n / checkpoint_every`` carries and
    ``checkpoint_every`` steps, least for the root of `n`, and time about one more evaluation of the steps (two, where
    a step captures tensors). Derivatives of derivatives are right too, but keep all steps. The steps run under
    `elementary`; what is computed of the last carry, such as the loss after adaptation in MAML, does not.

    Args:
        step: ``step(carry, *args) -> carry``, from a pytree to one; what it captures is differentiated as well. With
            `checkpoint_every` it has to be deterministic and free of side effects, and takes gradients by torch.func; a
            step that does something else when it is computed again is refused.
        n: how many steps.
        checkpoint_every: how many steps to compute again at a time; None keeps all.

    Raises:
        ValueError: ``n`` is negative, or ``checkpoint_every`` not positive; later, a step draws random numbers.
        RuntimeError: when the derivative is taken: the step has become another function since the call.

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
        raise ValueError(f"unroll: n has to be at least 0, but it is {n!r}")
    if checkpoint_every is not None and not checkpoint_every >= 1:
        raise ValueError(f"unroll: checkpoint_every has to be at least 1, or None, but it is {checkpoint_every!r}")

    return Unrolled(step, n, checkpoint_every)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """The loop of `unroll`."""

    step: Callable[..., Any]
    n: int
    checkpoint_every: int | None

    def __call__(self, carry: Any, *args: Any) -> Any:
        if self.checkpoint_every is None:
            return self._steps(self.n, carry, args)
        for start in range(0, self.n, self.checkpoint_every):
            carry = _recomputed(self._steps, min(self.checkpoint_every, self.n - start), carry, args)
        return carry

    def _steps(self, count: int, carry: Any, args: tuple[Any, ...]) -> Any:
        with elementary():
            for _ in range(count):
                carry = self.step(carry, *args)
        return carry

    def __repr__(self) -> str:
        return f"<implicitdiff.unroll({name_of(self.step)}, {self.n})>"


@_modes.one_operation
def _recomputed(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, evaluated again when it is differentiated."""
    if functorch.nothing_records():
        return fn(*args)
    lifted = lift("unroll: the step", fn, *args)
    confirm(lifted)
    values, structure = pytree.flatten(lifted.value)
    # Counters and the like have no derivative.
    smooth = [i for i, t in enumerate(values) if t.is_floating_point() or t.is_complex()]

    def evaluate(theta: Leaves) -> Leaves:
        again = structure.tensors_of(lifted(theta))
        return [again[i] for i in smooth]

    if smooth:
        attached = attach(_Segment(evaluate), [values[i] for i in smooth], lifted.operands)
        for i, value in zip(smooth, attached, strict=True):
            values[i] = value
    return structure.unflatten(values)


@dataclass(frozen=True)
class _Segment(Problem):
    """``f(theta) - x = 0``: that x depends on theta as f does is all that has to be remembered.

    With ``A = -I`` the rules of the primitive are those of f, which is evaluated where they use it.
    """

    fn: Callable[[Leaves], Leaves]
    levels: tuple[Dims, ...] = ()

    def residual(self, x: Leaves, theta: Leaves) -> Leaves:
        return [a - b for a, b in zip(self.primal(theta), x, strict=True)]

    def primal(self, theta: Leaves) -> Leaves:
        return over_levels(self.fn, [(list(dims),) for dims in self.levels])(theta)  # type: ignore[no-any-return]

    def solve(self, x: Leaves, theta: Leaves, b: Leaves, *, adjoint: bool) -> Leaves:
        return [-t for t in b]

    def vjp(self, x: Leaves, theta: Leaves, x_bar: Leaves, wanted: Sequence[int]) -> dict[int, torch.Tensor]:
        # torch.func.grad records the backward pass too. As a segment of its own that keeps nothing either.
        def pull(operands: Leaves) -> Leaves:
            x, theta, u = operands[:n], operands[n:-n], operands[-n:]
            return list(self.pullback(x, theta, u, wanted).values())

        n, operands = len(x), [*x, *theta, *x_bar]
        if functorch.nothing_records():
            operands = [t.detach() for t in operands]
        return dict(zip(wanted, solve_problem(_Segment(pull), operands), strict=True))

    def batched(self, dims: Dims, size: int) -> tuple[_Segment, Dims, int]:
        front = tuple(None if d is None else 0 for d in dims)
        return replace(self, levels=(*self.levels, front)), front, 0
