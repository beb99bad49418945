"""Autograd beneath its public functions: custom functions, the engine, the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch._C import _functorch as functorch
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from implicitdiff._torch.context import depth


def leaves_beside(tensors: Iterable[torch.Tensor], known: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the leaves of the graph of tensors that are neither `known` nor reached only through `known`."""
    # A known tensor need not be a leaf: the search ends at the node that computed a known tensor.
    own = set(map(id, known))
    return [t for t in graph_leaves(tensors, map(_GRAD_FN, known)) if id(t) not in own]


_GRAD_FN: Callable[[torch.Tensor], Any] = attrgetter("grad_fn")


def graph_leaves(tensors: Iterable[torch.Tensor], below: Iterable[Any] = ()) -> list[torch.Tensor]:
    """Return the leaves into which `backward` of these tensors would accumulate; the search stops at the nodes
    `below`."""
    seen: set[Any] = {None, *below}
    leaves: list[torch.Tensor] = []
    nodes: list[Any] = [*map(_GRAD_FN, tensors)]
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            # By its kind: the node of a custom `autograd.Function` may have an attribute `variable` of any type.
            if type(node).__name__ == "AccumulateGrad":
                leaves.append(node.variable)
            # Pairs of a node and the number of its result.
            nodes += map(itemgetter(0), node.next_functions)
    return leaves


def hooks_of(tensor: torch.Tensor) -> dict[int, Callable[[torch.Tensor], torch.Tensor | None]] | None:
    """Return the hooks that ``register_hook`` has put on a tensor, by id; None if there never was a hook."""
    return tensor._backward_hooks


def below_the_top(fn: Callable[..., list[torch.Tensor]], *tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a function of lists of tensors one level further down. The innermost transform must not be a vmap."""
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    # `_unwrap_for_grad` returns tensors of other levels as they are, so constants need no test.
    below = [[functorch._unwrap_for_grad(t, level) for t in some] for some in tensors]
    with interpreter.lower():
        values = fn(*below)
    return [functorch._wrap_for_grad(t, level) for t in values]


function_call: Any = custom_function_call
"""torch's operator that applies an autograd.Function while a level runs."""


def call_inert(func: Any, args: Sequence[Any], kwargs: dict[str, Any], depth: int) -> Any:
    """Call a torch function where all `depth` running levels are inert.

    A mode sees the operands of a custom autograd.Function only while some level runs. But then torch asks the Function
    for a vmap rule, though nothing is batched. So the Function itself runs with no level.
    """
    # With more levels than `depth`, a transform of the function itself runs, and the rules have to apply.
    if func is not function_call or len(retrieve_all_functorch_interpreters()) != depth:
        return func(*args, **kwargs)
    with temporarily_clear_interpreter_stack():
        return func(*args, **kwargs)


def over_first(fn: Callable[[Any], Any], stacked: Any) -> Any:
    """Map a function over the first dimension of a tensor, or of each tensor of a list, as `torch.func.vmap` does.

    `torch.func.vmap` takes as long as a small function to flatten trees and check arguments. This function does
    neither.
    """
    is_one = isinstance(stacked, torch.Tensor)
    size = len(stacked if is_one else stacked[0])
    # As `torch.func.vmap` does: torch registers some batching rules at the first vmap.
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(size, "error")
    try:
        if is_one:
            # An image that does not depend on the vectors has no batch layer; `_remove_batch_dim` then expands the
            # image.
            return functorch._remove_batch_dim(fn(functorch._add_batch_dim(stacked, 0, level)), level, size, 0)
        images = fn([functorch._add_batch_dim(t, 0, level) for t in stacked])
        return [functorch._remove_batch_dim(t, level, size, 0) for t in images]
    finally:
        functorch._vmap_decrement_nesting()


def gradients(
    y: Sequence[torch.Tensor], x: Sequence[torch.Tensor], u: Sequence[torch.Tensor], *, create_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of `torch.autograd.grad` with ``retain_graph=True`` and ``allow_unused=True``.

    The engine is called directly: the checks of `torch.autograd.grad` take as long as a small graph.
    """
    run = torch.autograd.Variable._execution_engine.run_backward
    # By position: outputs, cotangents, whether the graph is kept, whether a graph is made, inputs.
    return run(tuple(y), tuple(u), True, create_graph, tuple(x), allow_unreachable=True, accumulate_grad=False)


def recordable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return detached tensors that autograd can record; tensors of inference mode are copied."""
    return [*map(torch.Tensor.detach, out_of_inference(tensors))]


def out_of_inference(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors that autograd can save; tensors of inference mode are copied."""
    if not any(map(torch.Tensor.is_inference, tensors)):
        return list(tensors)
    # Inside of the mode a copy would be an inference tensor as well.
    with torch.inference_mode(False):
        return [t.clone() if t.is_inference() else t for t in tensors]


def apply(function: type[torch.autograd.Function], *operands: Any) -> tuple[torch.Tensor, ...]:
    """Return ``function.apply(*operands)``, for a function whose results are new tensors.

    Under grad, vjp and jvp `apply` makes a new class for each call. This function uses one class for all calls, unless
    a mode has to see the call.
    """
    if depth() == 0:
        # `Function.apply` without its first step, which binds the operands to the signature.
        # Dead wrappers come off as in `Function.apply`, before torch saves the operands.
        return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(operands))  # type: ignore[misc, no-any-return]
    # Under torch.func a mode sees a Function as `custom_function_call` with all operands, and only `Function.apply`
    # makes this call.
    seen = torch._C._len_torch_function_stack() > 0
    # At a level of vmap torch calls the rule `vmap` in the place of `forward`.
    if seen or isinstance(retrieve_current_functorch_interpreter(), VmapInterpreter):
        return function.apply(*operands)  # type: ignore[no-any-return]
    with enable_single_level_autograd_function():
        return _at_one_level(function).apply(*unwrap_dead_wrappers(operands))  # type: ignore[no-any-return]


@functools.cache
def _at_one_level(function: type[torch.autograd.Function]) -> Any:
    """Return the Function that one level of grad, vjp or jvp records: its values come from the level below."""

    def forward(*operands: Any) -> tuple[torch.Tensor, ...]:
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        below = [functorch._unwrap_for_grad(t, level) if isinstance(t, torch.Tensor) else t for t in operands]
        # autograd runs `forward` with both modes off; the level below may record in either.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            values = apply(function, *below)
        return tuple([functorch._wrap_for_grad(t, level) for t in values])

    # The rules receive wrappers of this level, so an outer transform sees and differentiates the operations of a rule.
    rules = {name: staticmethod(getattr(function, name)) for name in ("setup_context", "backward", "jvp")}
    return type(function.__name__, (_SingleLevelFunction,), {"forward": staticmethod(forward), **rules})


Rule = Callable[..., tuple[torch.Tensor | None, ...]]


def nested_forward_mode(jvp: Rule) -> Rule:
    """Decorate an autograd.Function's `jvp` so that outer forward-mode levels see through it.

    torch runs `jvp` with forward mode off, and with saved tensors that still carry the tangents of the rule's own
    level. Both lose the tangents of outer levels (pytorch #197867: the second forward derivative of x**4 comes out as
    0). So forward mode is switched on, and `primal` takes the tangent of the own level off every operand.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            # In a rule `jvp`, `saved_tensors` are the tensors of `save_for_forward`.
            saved = [primal(t) for t in ctx.saved_tensors]
            return jvp(ctx, saved, *(None if t is None else primal(t) for t in tangents))

    return rule


def primal(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the tangent of the innermost level of forward mode."""
    # Inside of a dual level `unpack_dual` raises for a sparse tensor.
    if tensor.layout is not torch.strided:
        return tensor
    # torch has a single level of `forward_ad`, number 0; nested jvps are told apart by the levels of torch.func.
    inner: torch.Tensor = forward_ad.unpack_dual(tensor, level=0).primal
    return inner
