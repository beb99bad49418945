"""A user's solver, run out of sight of every derivative.

How a solution is found does not matter, so a solver may do anything. Where no vmap batches what it sees, it runs with
no transform on the stack, as it would outside of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.below import Derived, below_autodiff
from implicitdiff._closures.signature import Call, name_of
from implicitdiff._closures.walk import tensors_within
from implicitdiff._torch.trees import Leaves, Structure
from implicitdiff.errors import TransformError

Solver = Callable[..., Any]


def run_solver(solver: Solver, call: Call, has_aux: bool) -> tuple[Any, Any, Derived]:
    """The solver's result, detached, and the tensors that it computed from what is differentiated. It sees values
    that are out of every derivative's sight, and its own copy of the initial guess."""
    tensors, structure = pytree.flatten((call.init, call.args, call.kwargs))
    own = len(pytree.tensors(call.init))
    values = [functorch.plain_under_vmap(t) for t in tensors]
    flags = [functorch.is_plain(v) and functorch.base(t).requires_grad for v, t in zip(values, tensors, strict=True)]

    def run(outside: bool) -> tuple[Any, Derived]:
        with below_autodiff(outside) as derived:
            entering = [v.clone() for v in values[:own]] + values[own:]
            before = [_modes.version(v) for v in entering]
            entered = [v.requires_grad_() if flag else v for v, flag in zip(entering, flags, strict=True)]
            init, args, kwargs = structure.unflatten(entered)
            result = solver(init, *args, **kwargs)
        _refuse_changed(solver, entering[own:], before[own:])
        return result, derived

    result, derived = _run_where_it_can(solver, run, values, structure)
    if not has_aux:
        return detached(result), None, derived
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"with has_aux=True the solver {name_of(solver)} must return (solution, aux), got {type(result).__name__}"
        )
    return detached(result[0]), detached(result[1]), derived


def _run_where_it_can(solver: Solver, run: Callable[[bool], Any], values: Leaves, structure: Structure) -> Any:
    """``run(outside)``, with no transform on the stack if that is possible."""
    if functorch.depth() == 0:
        return run(False)
    is_batched = not functorch.are_plain(values) or "different" in functorch.randomness()
    within, is_all = tensors_within(solver, structure.others)
    outside = not is_batched and functorch.are_plain(within)
    if not is_all and (functorch.randomness() or functorch.in_forward_mode()):
        # A lane or a tangent of an outer transform, that the body holds out of sight, would be taken for its own.
        outside = False
    # A vmap may forbid random numbers.
    at_once = outside and is_all and "error" not in functorch.randomness()
    try:
        return run(at_once)
    except RuntimeError as error:
        is_refused = isinstance(error, TransformError) or functorch.untransformable_function(error) is not None
        if at_once or not outside or not is_refused:
            if (why := _why(error, is_batched)) is None:
                raise
            raise TransformError(f"the solver {name_of(solver)} {why}") from error
    return run(True)


def _why(error: RuntimeError, is_batched: bool) -> str | None:
    """What a solver does that running transforms cannot take, with the remedy; None for other errors."""
    if "INTERNAL ASSERT FAILED" in str(error) and "TensorWrapper.cpp" in str(error):
        return (
            "uses a tensor of a transform that runs round it, from where this cannot be seen, such as a generator: "
            "pass the tensor as an argument"
        )
    if is_batched and (what := functorch.unbatchable(error)) is not None:
        return (
            f"needs numbers where vmap gives it a batch, for {what}: call it lane by lane, in a Python loop in the "
            "place of vmap, or write it in operations of torch"
        )
    if (what := functorch.untransformable_function(error)) is None:
        return None
    if is_batched:
        return f"applies {what}; or call it lane by lane, in a Python loop in the place of vmap"
    return f"applies {what}; or pass the tensors that it captures as arguments, so that it runs outside of transforms"


def _refuse_changed(solver: Solver, arguments: Leaves, before: Sequence[int]) -> None:
    for value, version in zip(arguments, before, strict=True):
        if _modes.version(value) != version:
            raise ValueError(
                f"the solver {name_of(solver)} changes an argument of shape {list(value.shape)} in place; only the "
                "initial guess is its own copy: clone the argument first"
            )


def detached(tree: Any) -> Any:
    """The tree without what autograd knows of it."""
    return pytree.map_tensors(torch.Tensor.detach, tree)
