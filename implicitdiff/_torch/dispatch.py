"""Operations below autograd and torch.func, as a TorchDispatchMode sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode as ModeOfTorch
from torch.utils._python_dispatch import _disable_current_modes

import implicitdiff._torch.trees as pytree

outside_dispatch: Callable[[], AbstractContextManager[None]] = torch._C._DisableTorchDispatch
"""Run the body outside of every TorchDispatchMode, those that start in the body too."""

no_dispatch_modes: Callable[[], AbstractContextManager[Any]] = _disable_current_modes
"""Run the body outside of the running TorchDispatchModes."""

aten = torch.ops.aten
"""torch's operations below autograd."""

AtenOperation = OpOverload
"""An operation of the dispatcher, such as ``torch.ops.aten.add.Tensor``."""


class TorchDispatchMode(ModeOfTorch):
    """torch's mode, for subclasses that are not used inside of what torch.compile traces.

    At the first operation that any other subclass sees, torch imports its compiler. The import takes longer than a
    recording.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@cache
def is_random(operation: AtenOperation) -> bool:
    """Return whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operation.tags


@cache
def reads_values(operation: AtenOperation) -> bool:
    """Return whether an operation hands values of tensors to Python, or has a result whose shape depends on values."""
    # The first tag marks `item` and `equal`, the second `nonzero` and masks.
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags))


@cache
def changes_arguments(operation: AtenOperation) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return bool(operation._schema.is_mutable)


def written(operation: AtenOperation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the arguments to which an operation writes."""
    if not changes_arguments(operation):
        return []
    # A call may leave out trailing arguments that have defaults, hence no `strict`.
    named = zip([a.name for a in operation._schema.arguments], args, strict=False)
    return pytree.tensors([v for name, v in (*named, *kwargs.items()) if name in _names_written(operation)])


@cache
def _names_written(operation: AtenOperation) -> frozenset[str]:
    arguments = operation._schema.arguments
    # A schema marks a written argument by an exclamation mark, `Tensor(a!)`.
    return frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def changes_geometry(operation: AtenOperation) -> bool:
    """Return whether an operation changes shape and strides of its first argument, and no number, such as ``t_``."""
    return torch.Tag.inplace_view in operation.tags


@cache
def out_of_place(operation: AtenOperation) -> AtenOperation | None:
    """Return the operation without the write to its first argument, as ``add`` for ``add_``; None if there is none."""
    # In ATen the name of an operation in place is that of the operation out of place with an underscore.
    name = operation._schema.name.split("::")[-1]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    # The names of overloads differ: ``pow_.Scalar`` is ``pow.Tensor_Scalar``.
    found = [getattr(packet, name) for name in (packet.overloads() if packet is not None else ())]
    return next((f for f in found if _argument_types(f) == _argument_types(operation)), None)


def _argument_types(operation: AtenOperation) -> list[str]:
    return [str(a.type) for a in operation._schema.arguments]


@cache
def returns_views(operation: AtenOperation) -> bool:
    """Return whether all results of an operation share the memory of its arguments."""
    returns = operation._schema.returns
    # A result `Tensor(a)` is a view of the argument with this mark; `Tensor(a!)` is the written argument itself.
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def decomposition(operation: AtenOperation) -> Callable[..., Any] | None:
    """Return torch's decomposition of an operation into simpler operations, or None."""
    return decomposition_table.get(operation)


def tensors_among(args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among the arguments of an operation, in order; an argument is at most a list of tensors."""
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [t for t in value if isinstance(t, torch.Tensor)]
    return found


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that is the same for two tensors of the same memory; unique as long as a tensor of it lives."""
    return int(tensor.untyped_storage()._cdata)


def storage_size(tensor: torch.Tensor) -> int:
    """Return the number of elements in the memory of a tensor."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return all elements of the memory of a tensor, as one vector without a copy."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    # A recorder refuses `as_strided` of an operand, and must not see this call.
    with outside_dispatch():
        return torch.as_strided(tensor.detach(), (size,), (1,), 0)


def is_custom(function: object) -> bool:
    """Return whether a function is an operation of the dispatcher that torch does not define."""
    packet = function.overloadpacket if isinstance(function, OpOverload) else function
    return isinstance(packet, OpOverloadPacket) and packet._qualified_op_name.partition("::")[0] not in _TORCHS_OWN


_TORCHS_OWN = ("aten", "prim", "prims")


def is_higher_order(function: object) -> bool:
    """Return whether a function is an operator on functions, as an autograd.Function is under torch.func."""
    return isinstance(function, HigherOrderOperator)
