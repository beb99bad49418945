"""Levels of torch.func, and the wrappers that carry them.

torch.func keeps a stack of interpreters, one level for each running transform; the outermost has level 1. A tensor
that takes part in a transform is a wrapper that carries the level: a batch wrapper for vmap, a gradient wrapper for
grad, vjp and jvp. Wrappers nest. One layer of a tensor is one wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch._C import _functorch as functorch
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.context import depth
from implicitdiff._torch.modes import no_modes

# `maybe_get_level` returns -1 for a plain tensor, and -2 for a dead wrapper.
PLAIN = -1
"""The `level` of a tensor that is not a wrapper."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is not a wrapper."""
    return level(tensor) == PLAIN


# Only a gradient wrapper (`TensorWrapper`) can die. A batch wrapper keeps its level after the end of its vmap.
level: Callable[[torch.Tensor], int] = functorch.maybe_get_level
"""Return the level of the transform to which a wrapper belongs; a negative number for plain tensors and for wrappers of
a finished transform (dead wrappers).

A dead wrapper acts as a plain tensor, except that a pullback still finds its graph through the wrapper.
"""

unwrap: Callable[[torch.Tensor], torch.Tensor] = functorch.get_unwrapped
"""Return a wrapper without the outermost layer."""


def rewrap(inner: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `inner` in a layer like the outermost layer of `like`."""
    if functorch.is_batchedtensor(like):
        return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(like), level(like))
    return functorch._wrap_for_grad(inner, level(like))


batch_dim: Callable[[torch.Tensor], int] = functorch.maybe_get_bdim
"""Return the dimension that the vmap of a wrapper takes; -1 for the wrapper of another transform."""


def replace_inside(tensor: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a wrapper with the wrapped tensor replaced; the same wrapper if the replacement is the same tensor.

    A dead wrapper is dropped: the result is the replacement.
    """
    inner = unwrap(tensor)
    replaced = replace(inner)
    if replaced is inner:
        return tensor
    # No level runs any more for which `_wrap_for_grad` could make a new wrapper.
    return replaced if level(tensor) < 0 else rewrap(replaced, tensor)


def layers_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor, and what each wrapper contains, down to the plain tensor."""
    found = [tensor]
    while level(found[-1]) != PLAIN:
        found.append(unwrap(found[-1]))
    return found


def base(tensor: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor inside all wrappers."""
    # Dead wrappers come off as well, since -2 is not the level of plain tensors.
    while level(tensor) != PLAIN:
        tensor = unwrap(tensor)
    return tensor


def is_any(condition: torch.Tensor) -> bool:
    """Return whether a condition is true for any entry in any lane. Reads the value outside of every mode."""
    with no_modes():
        # `bool` of a batched tensor raises, and `any` under vmap gives a flag for each lane. The plain tensor holds all
        # lanes.
        return bool(base(condition).any())


def is_all(condition: torch.Tensor) -> bool:
    """Return whether a condition is true for all entries in all lanes. Reads the value outside of every mode."""
    with no_modes():
        return bool(base(condition).all())


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all entries in all lanes are finite. Reads the values outside of every mode."""
    with no_modes():
        return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in map(base, tensors))


def is_vmap(level: int) -> bool:
    """Return whether the transform of a level is a vmap."""
    running = retrieve_all_functorch_interpreters()
    # Levels count from 1, and the stack begins with the outermost.
    return level <= len(running) and isinstance(running[level - 1], VmapInterpreter)


@contextmanager
def inert_gradient_levels() -> Iterator[int]:
    """Run the body with every vmap kept, and every level of grad, vjp and jvp inert. Yield the number of levels.

    An inert level is a vmap that batches nothing. So levels keep their numbers: batched tensors in a closure stay
    valid, and a transform that starts in the body has a number of its own.
    """
    outer = retrieve_all_functorch_interpreters()
    # The kind of a running level cannot change, so the stack is built again from the outermost level inwards.
    with temporarily_clear_interpreter_stack(), ExitStack() as opened:
        for interpreter in outer:
            # With "same", random numbers are drawn once and carry no batch dimension; "error" would refuse them.
            size, randomness = 1, "same"
            if isinstance(interpreter, VmapInterpreter):
                size, randomness = interpreter.batch_size(), interpreter.randomness()
            functorch._vmap_increment_nesting(size, randomness)
            opened.callback(functorch._vmap_decrement_nesting)
        # As in `switches.requires_grad_allowed`.
        opened.enter_context(enable_inplace_requires_grad(True))
        yield len(outer)


class levels_up_to:
    """Run the body with at least `count` levels; missing levels are added, inert. Yield the number of levels if all are
    inert, else -1.

    torch.func refuses to wrap a tensor of a level that does not run.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> int:
        running = depth()
        self.missing = max(0, self.count - running)
        for _ in range(self.missing):
            functorch._vmap_increment_nesting(1, "same")
        # With a level of the caller running, the rules of an autograd.Function must apply, see `call_inert`.
        return -1 if running else self.missing

    def __exit__(self, *error: object) -> None:
        for _ in range(self.missing):
            functorch._vmap_decrement_nesting()


class Layer(NamedTuple):
    """The outermost batch layer among some tensors.

    Attributes:
        level: the level of the vmap.
        size: the number of lanes.
        dims: the batch dimension in each tensor; None if the vmap does not batch the tensor.
        below: the tensors without the layer.
    """

    level: int
    size: int
    dims: tuple[int | None, ...]
    below: list[torch.Tensor]


def outermost_layer(tensors: Sequence[torch.Tensor]) -> Layer | None:
    """Take the outermost batch layer off; return None if all tensors are plain."""
    # Levels fall from the outermost layer inwards. So the outermost layer belongs to the innermost transform.
    top = max(map(level, tensors), default=PLAIN)
    if top < 0:
        return None
    # A tensor of a lower level lacks the layer: the vmap does not batch this tensor.
    pairs = [(unwrap(t), batch_dim(t)) if level(t) == top else (t, None) for t in tensors]
    size = next(t.shape[d] for t, d in pairs if d is not None)
    return Layer(top, size, tuple([d for _, d in pairs]), [t for t, _ in pairs])


def add_layer(tensor: torch.Tensor, dim: int, of: Layer) -> torch.Tensor:
    """Put a layer round a tensor with its batch dimension at `dim`: the inverse of `outermost_layer`."""
    return functorch._add_batch_dim(tensor, dim, of.level)


def without_batch_layers(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Layer]]:
    """Take all layers off tensors that have batch layers alone.

    Returns:
        The plain tensors with batch dimensions in front, the dimension of the outermost vmap first; and the layers,
        the layer of the innermost vmap first.
    """
    plain = list(tensors)
    layers: list[Layer] = []
    if are_plain(plain):
        return plain, layers
    # `movedim` of a tensor that still has inner layers needs the levels of the inner layers to run.
    with inert_gradient_levels(), torch.no_grad():
        while (layer := outermost_layer(plain)) is not None:
            # The innermost vmap comes off first, and each later dimension is moved in front of the earlier.
            plain = [t if d is None else t.movedim(d, 0) for t, d in zip(layer.below, layer.dims, strict=True)]
            layers.append(layer)
    return plain, layers


def strip_dead_wrappers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without dead wrappers on the outside."""
    while level(tensor) < PLAIN:
        tensor = unwrap(tensor)
    return tensor


def without_gradient_layers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with batch layers alone."""
    if level(tensor) == PLAIN:
        return tensor
    if functorch.is_batchedtensor(tensor):
        return replace_inside(tensor, without_gradient_layers)
    return without_gradient_layers(unwrap(tensor))


def plain_under_vmap(tensor: torch.Tensor) -> torch.Tensor:
    """Return the value of a tensor: detached, with batch layers alone."""
    # The order counts: `detach` of a wrapper detaches at all layers, but unwrapping first would leave the graph of a
    # plain tensor.
    return without_gradient_layers(tensor.detach())


def plain_values(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the values of tensors: detached, with batch layers alone, without dead wrappers."""
    if are_plain(tensors):
        return [*map(torch.Tensor.detach, tensors)]
    return [plain_under_vmap(strip_dead_wrappers(t)) for t in tensors]


def swap(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return `value`, an argument of a torch function, with each tensor replaced."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    if type(value) in (tuple, list, dict):
        return pytree.map_tensors(replace, value)
    return value


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether the outermost layer of a tensor is a batch layer."""
    return bool(functorch.is_batchedtensor(tensor))


def have_batch_layer(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether a running vmap batches one of these tensors."""
    return not are_plain(tensors) and any(batch_levels(t) for t in tensors)


def batch_levels(tensor: torch.Tensor) -> frozenset[int]:
    """Return the levels of the vmaps that batch a tensor."""
    return frozenset([level(t) for t in layers_of(tensor) if functorch.is_batchedtensor(t)])


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether all tensors are plain."""
    return set(map(functorch.maybe_get_level, tensors)) <= {PLAIN}


def is_same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two plain tensors are the same view of the same memory."""
    # A mode would handle each question, and `Watch` would note `data_ptr` as a read of values.
    with no_modes():
        return tensor is other or (_has_own_memory([tensor, other]) and _view_of(tensor) == _view_of(other))


def _has_own_memory(tensors: Sequence[torch.Tensor]) -> bool:
    # A subclass may compute its values from other memory than that at `data_ptr`.
    is_usual = {*map(type, tensors)} <= {torch.Tensor, torch.nn.Parameter}
    return is_usual and are_plain(tensors) and {t.layout for t in tensors} == {torch.strided}


def _view_of(tensor: torch.Tensor) -> tuple[object, ...]:
    # Lazy conjugation and negation change the values and not the memory.
    signs = tensor.is_conj(), tensor.is_neg()
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr(), signs
