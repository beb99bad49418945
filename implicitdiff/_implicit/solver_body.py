"""Run a user's solver below every derivative.

The derivatives of a solution follow from the equation, not from the solver's steps. So a solver may do anything. If no
vmap batches the tensors of a solver, the solver runs with no transform on the stack, like outside of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.messages as _messages
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.below import Derived, DropGradientLayers, DropOutside, below_autodiff
from implicitdiff._closures.signature import Call, name_of
from implicitdiff._closures.walk import tensors_within
from implicitdiff._torch.trees import Leaves, Structure, Tree, UserFunction
from implicitdiff.errors import TransformError

UserSolver = UserFunction
"""``solver(init, *args, **kwargs)``."""


def run_solver(solver: UserSolver, call: Call, has_aux: bool) -> tuple[Tree, Tree, Derived]:
    """Return the solver's solution and auxiliary result, detached, and the tensors that the solver computed from
    differentiated tensors.

    The solver receives tensors without gradient layers, and a copy of the initial guess.
    """
    tensors, structure = pytree.flatten((call.init, call.args, call.kwargs))
    # The tensors of the initial guess come first.
    own = len(pytree.tensors(call.init))
    values = [_levels.plain_under_vmap(t) for t in tensors]
    # A tensor inside of a batch wrapper cannot be a leaf for the solver, so only plain values get flags.
    flags = [_levels.is_plain(v) and _levels.base(t).requires_grad for v, t in zip(values, tensors, strict=True)]

    def run(form: type[DropGradientLayers]) -> tuple[Tree, Derived]:
        with below_autodiff(form) as derived:
            # The solver may write to its guess, and may differentiate with respect to its arguments by torch.autograd.
            # So clone the guess, and set the `requires_grad` flags again.
            entering = [v.clone() for v in values[:own]] + values[own:]
            # `detach` shares the version counter with the caller's tensor, so the counter shows a write of the solver.
            before = [_modes.version(v) for v in entering]
            entered = [v.requires_grad_(flag) for v, flag in zip(entering, flags, strict=True)]
            init, args, kwargs = structure.unflatten(entered)
            result = solver(init, *args, **kwargs)
        _refuse_changed(solver, entering[own:], before[own:])
        return result, derived

    result, derived = _run_outside_if_possible(solver, run, values, structure)
    if not has_aux:
        return detached(result), None, derived
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"with has_aux=True the solver {name_of(solver)} must return (solution, aux), got {type(result).__name__}"
        )
    return detached(result[0]), detached(result[1]), derived


def _run_outside_if_possible(
    solver: UserSolver,
    run: Callable[[type[DropGradientLayers]], tuple[Tree, Derived]],
    values: Leaves,
    structure: Structure,
) -> tuple[Tree, Derived]:
    """Return the result of `run`, with no transform on the stack (`DropOutside`) if possible."""
    if _context.depth() == 0:
        return run(DropGradientLayers)
    # Run with no level if no tensor of the solver belongs to a running transform. If captured tensors may be hidden
    # (`is_all` is False), run inside first, and outside only if a transform refuses an operation.
    batches = _context.randomness()
    is_batched = not _levels.are_plain(values) or "different" in batches
    within, is_all = tensors_within(solver, structure.others)
    # A tensor of an outer vmap or jvp may be hidden. With no level, functorch would confuse the tensor with tensors of
    # the solver's own transforms.
    is_hidden = not is_all and (batches or _context.now().forward)
    outside = _levels.are_plain(within) and not is_batched and not is_hidden
    # Under a vmap that forbids random numbers, run inside first: outside, the solver could draw them unnoticed.
    at_once = outside and is_all and "error" not in batches
    try:
        return run(DropOutside if at_once else DropGradientLayers)
    except RuntimeError as error:
        is_refused = isinstance(error, TransformError) or _messages.untransformable_function(error) is not None
        if at_once or not (outside and is_refused):
            if (why := _refusal_reason(error, is_batched)) is None:
                raise
            raise TransformError(f"the solver {name_of(solver)} {why}") from error
    return run(DropOutside)


def _refusal_reason(error: RuntimeError, is_batched: bool) -> str | None:
    """Return the operation that the running transforms refuse, and the remedy, in words; None for other errors."""
    if "TensorWrapper.cpp" in str(error):  # an internal assertion of functorch
        return (
            "uses a tensor of a surrounding transform from a place that the library cannot search, such as a "
            "generator: pass the tensor as an argument"
        )
    if is_batched and (what := _messages.unbatchable(error)) is not None:
        return (
            f"needs the values of a tensor that vmap batches, for {what}: call the solver in a Python loop instead of "
            "vmap, or write it in operations of torch"
        )
    if (what := _messages.untransformable_function(error)) is None:
        return None
    if is_batched:
        return f"applies {what}; or call the solver in a Python loop instead of vmap"
    return (
        f"applies {what}; or pass the tensors that the solver captures as arguments, so that it runs outside of "
        "transforms"
    )


def _refuse_changed(solver: UserSolver, arguments: Leaves, before: Sequence[int]) -> None:
    """Raise if the solver has changed an argument in place, by the version counters before and after."""
    for value, version in zip(arguments, before, strict=True):
        if _modes.version(value) != version:
            raise ValueError(
                f"the solver {name_of(solver)} changes an argument of shape {list(value.shape)} in place; only the "
                "initial guess is a copy: clone the argument before the change"
            )


def detached(tree: Tree) -> Tree:
    """Return the tree with its tensors detached."""
    return pytree.map_tensors(torch.Tensor.detach, tree)
