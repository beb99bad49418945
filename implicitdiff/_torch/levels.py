"""Every private functorch name that the library touches, and nothing else touches them.

functorch keeps a stack of interpreters, one level for each transform that is running. A tensor that takes part in a
transform is a wrapper that carries its level: a batch wrapper for vmap, a gradient wrapper for grad, vjp and jvp;
wrappers nest.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import BuiltinMethodType, FrameType, MethodType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch._C import _functorch as functorch
from torch._compile import _disable_dynamo
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.pyfunctorch import (
    GradInterpreter,
    JvpInterpreter,
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
    temporarily_clear_interpreter_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

import implicitdiff._torch.trees as pytree

_PLAIN = -1
# For a body that has to run otherwise only at times.
_UNCHANGED: AbstractContextManager[None] = nullcontext()
_compiler: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback

Fn = TypeVar("Fn", bound=Callable[..., Any])


def depth() -> int:
    """How many transforms are running."""
    # Without the objects that `retrieve_all_functorch_interpreters` makes of them.
    stack = functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no functorch wrapper."""
    return level(tensor) == _PLAIN


level: Callable[[torch.Tensor], int] = functorch.maybe_get_level
"""The level of the transform that a wrapper belongs to; negative for plain tensors and wrappers of a finished
transform.

The latter act as plain numbers, except that a pullback still finds its graph through them.
"""

unwrap: Callable[[torch.Tensor], torch.Tensor] = functorch.get_unwrapped
"""A wrapper without its outermost layer."""


def rewrap(inner: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`inner` in a layer like the outermost one of `like`."""
    if functorch.is_batchedtensor(like):
        return functorch._add_batch_dim(inner, functorch.maybe_get_bdim(like), level(like))
    return functorch._wrap_for_grad(inner, level(like))


def replace_inside(tensor: torch.Tensor, replace: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A wrapper with what it wraps replaced; itself if that is replaced by itself.

    A wrapper that a finished transform left gives way to the replacement: to everything but a pullback it is that.
    """
    inner = unwrap(tensor)
    replaced = replace(inner)
    if replaced is inner:
        return tensor
    return replaced if level(tensor) < 0 else rewrap(replaced, tensor)


def leaves_beside(tensor: torch.Tensor, known: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves that autograd would accumulate into from here, but for these tensors and what they were made of."""
    own = {id(t) for t in known}
    return [t for t in leaves_of(tensor, [t.grad_fn for t in known]) if id(t) not in own]


def leaves_of(tensor: torch.Tensor, below: Iterable[Any] = ()) -> list[torch.Tensor]:
    """The leaves that autograd would accumulate into from here, without those below some nodes."""
    seen: set[Any] = set(below)
    leaves: list[torch.Tensor] = []
    nodes: list[Any] = [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            nodes += [below for below, _ in node.next_functions]
    return leaves


def base(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside all wrappers."""
    while not is_plain(tensor):
        tensor = unwrap(tensor)
    return tensor


def is_any(condition: torch.Tensor) -> bool:
    """Whether a condition is true somewhere, in any lane; a look from outside of every mode."""
    with no_modes():
        return bool(base(condition).any())


def is_all(condition: torch.Tensor) -> bool:
    """Whether a condition is true everywhere and in all lanes; a look from outside of every mode."""
    with no_modes():
        return bool(base(condition).all())


def may_be_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a derivative or a batch dimension can hang on this tensor itself, whatever a mode puts in its place."""
    with no_modes():
        return tensor.requires_grad or not is_plain(tensor) or _tangent(tensor) is not None


def is_tracked(tensor: torch.Tensor) -> bool:
    """Whether autograd, or a running transform, records what is done with this tensor."""
    while not is_plain(tensor):
        if tensor.requires_grad:
            return True
        tensor = unwrap(tensor)
    return tensor.requires_grad or _tangent(tensor) is not None


def randomness() -> set[str]:
    """How the running vmaps draw random numbers: "error", "same" or "different" ones for every lane."""
    return {i.randomness() for i in retrieve_all_functorch_interpreters() if isinstance(i, VmapInterpreter)}


def is_vmap(level: int) -> bool:
    """Whether the transform of a level is a vmap."""
    running = retrieve_all_functorch_interpreters()
    return level <= len(running) and isinstance(running[level - 1], VmapInterpreter)


def in_forward_mode() -> bool:
    """Whether forward mode is running."""
    return bool(forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled())


def is_quiet(tensors: Sequence[torch.Tensor], batched: Sequence[torch.Tensor] = ()) -> bool:
    """Whether nothing can be differentiated in these tensors, and no running transform but vmap could start to.

    `tensors` have to be plain; those of `batched` may take part in the running vmaps.
    """
    return (
        all(isinstance(interpreter, VmapInterpreter) for interpreter in retrieve_all_functorch_interpreters())
        and not any(map(may_be_differentiated, tensors))
        and not any(may_be_differentiated(base(t)) or without_gradient_layers(t) is not t for t in batched)
    )


def is_grad_alone(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether of the running transforms one is a grad or vjp, which is the innermost, and all others are vmaps, and
    nothing else differentiates these tensors."""
    return not in_forward_mode() and _is_alone(GradInterpreter, tensors)


def is_jvp_alone(tensors: Sequence[torch.Tensor]) -> bool:
    """The same of a jvp."""
    return _is_alone(JvpInterpreter, tensors)


def _is_alone(kind: type, tensors: Sequence[torch.Tensor]) -> bool:
    running = retrieve_all_functorch_interpreters()
    if not running or not isinstance(running[-1], kind):
        return False
    if not all([isinstance(interpreter, VmapInterpreter) for interpreter in running[:-1]]):
        return False
    return not any([may_be_differentiated(base(t)) for t in tensors])


def below_the_top(fn: Callable[..., list[torch.Tensor]], *tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """A function of lists of tensors, run one level further down where the innermost transform is no vmap."""
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    below = [[functorch._unwrap_for_grad(t, level) for t in some] for some in tensors]
    with interpreter.lower():
        values = fn(*below)
    return [functorch._wrap_for_grad(t, level) for t in values]


class Layer(NamedTuple):
    """The outermost batch layer among some tensors: its level, its size, and what is below it."""

    level: int
    size: int
    dims: tuple[int | None, ...]
    below: list[torch.Tensor]


def outermost_layer(tensors: Sequence[torch.Tensor]) -> Layer | None:
    """Take the outermost batch layer off; None if the tensors are plain."""
    top = max(map(level, tensors), default=_PLAIN)
    if top < 0:
        return None
    has = [level(t) == top for t in tensors]
    dims = tuple(functorch.maybe_get_bdim(t) if h else None for t, h in zip(tensors, has, strict=True))
    below = [unwrap(t) if h else t for t, h in zip(tensors, has, strict=True)]
    size = next(t.shape[d] for t, d in zip(below, dims, strict=True) if d is not None)
    return Layer(top, size, dims, below)


def add_layer(tensor: torch.Tensor, dim: int, of: Layer) -> torch.Tensor:
    """The inverse, for a tensor whose batch dimension lies at `dim`."""
    return functorch._add_batch_dim(tensor, dim, of.level)


def without_batch_layers(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Layer]]:
    """Plain tensors with their batch dimensions in front, that of the outermost vmap first, and the layers that were
    taken off, that of the innermost vmap first; for tensors that only vmaps see."""
    plain, layers = list(tensors), []
    # A layer below can be moved only where its level is running.
    with inert_gradient_levels(), torch.no_grad():
        while (layer := outermost_layer(plain)) is not None:
            plain = [t if d is None else t.movedim(d, 0) for t, d in zip(layer.below, layer.dims, strict=True)]
            layers.append(layer)
    return plain, layers


def alive(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the layers that finished transforms left."""
    while level(tensor) < 0 and not is_plain(tensor):
        tensor = unwrap(tensor)
    return tensor


def without_gradient_layers(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the vmaps alone see it."""
    if is_plain(tensor):
        return tensor
    if functorch.is_batchedtensor(tensor):
        return replace_inside(tensor, without_gradient_layers)
    return without_gradient_layers(unwrap(tensor))


def plain_under_vmap(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's value alone: detached, and of the running transforms only the vmaps see it."""
    return without_gradient_layers(tensor.detach())


def swap(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value`, an argument of a torch function, with its tensors replaced."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    if type(value) in (tuple, list, dict):
        return pytree.map_tensors(replace, value)
    return value


@contextmanager
def inert_gradient_levels() -> Iterator[int]:
    """Run the body with every vmap kept and every grad, vjp and jvp level made inert; yields how many levels there are.

    The levels keep their numbers (an inert level is a vmap that batches nothing), so batched tensors in a closure stay
    valid, and a transform that starts inside cannot be taken for one of the outer ones.
    """
    outer = retrieve_all_functorch_interpreters()
    if not outer:
        yield 0
        return
    with temporarily_clear_interpreter_stack():
        opened = 0
        try:
            for interpreter in outer:
                if isinstance(interpreter, VmapInterpreter):
                    functorch._vmap_increment_nesting(interpreter.batch_size(), interpreter.randomness())
                else:
                    functorch._vmap_increment_nesting(1, "same")
                opened += 1
            with requires_grad_allowed():
                yield len(outer)
        finally:
            for _ in range(opened):
                functorch._vmap_decrement_nesting()


class levels_up_to:
    """Run the body with at least so many levels, those that are missing being inert; yields how many there are if all
    are inert, else -1.

    functorch refuses to wrap a tensor of a level that is not running at the same or a lower level.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> int:
        running = depth()
        self.missing = max(0, self.count - running)
        for _ in range(self.missing):
            functorch._vmap_increment_nesting(1, "same")
        return -1 if running else self.missing

    def __exit__(self, *error: object) -> None:
        for _ in range(self.missing):
            functorch._vmap_decrement_nesting()


def untransformable(error: RuntimeError) -> str | None:
    """What a function does that made torch.func raise this error, in words, with the remedy; None for other errors."""
    for start, words in _UNTRANSFORMABLE.items():
        if str(error).startswith(start):
            return words
    return untransformable_function(error)


def untransformable_function(error: RuntimeError) -> str | None:
    """The same for a custom autograd.Function alone."""
    if not str(error).startswith("In order to use an autograd.Function with functorch transforms"):
        return None
    name = _refused(error)
    if name == "BackwardHookFunction":
        return "a module with a full backward hook, which torch.func cannot transform: remove the hook"
    if name.startswith("GeneratedBackwardFor_"):
        return (
            f"the custom operator {name.removeprefix('GeneratedBackwardFor_')}, whose registered derivative torch.func "
            "cannot transform: write it as an autograd.Function with setup_context"
        )
    if name == "CheckpointFunction":
        return "a reentrant checkpoint, which torch.func cannot transform: pass use_reentrant=False"
    which = f"the autograd.Function {name}" if name else "an autograd.Function"
    return f"{which}, which torch.func cannot transform: give it a setup_context"


def _refused(error: RuntimeError) -> str:
    """Return the name of the class whose ``apply`` raised the error; empty if the code does not tell."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    # Up to torch 2.13 the last frame is that of `apply`. Since 2.14 `apply` is compiled: the last frame calls it.
    if isinstance(cls := trace.tb_frame.f_locals.get("cls"), type):
        return cls.__name__
    return _owner_of_apply(trace.tb_frame, trace.tb_lasti)


def _owner_of_apply(frame: FrameType, end: int) -> str:
    """Return the name of the class whose ``apply`` the code of a frame names last before an instruction."""
    visible = frame.f_globals | frame.f_locals
    read = [i.argval for i in dis.get_instructions(frame.f_code) if i.offset < end and isinstance(i.argval, str)]
    for before, name in reversed([*itertools.pairwise(["", *read])]):
        value = visible.get(name)
        if name == "apply":
            owner = visible.get(before)
            return owner.__name__ if isinstance(owner, type) else before
        if isinstance(value, MethodType | BuiltinMethodType) and value.__name__ == "apply":
            return getattr(value.__self__, "__name__", "")
    return ""


def unbatchable(error: RuntimeError) -> str | None:
    """What a function needs the numbers of a batch for, that made vmap raise this error; None for other errors."""
    for start, words in _UNBATCHABLE.items():
        if str(error).startswith(start):
            return words
    return None


_UNBATCHABLE = {
    "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow": "control flow",
    "vmap: It looks like you're calling .item()": "item() or float()",
    "vmap: We do not support batching operators that can": "a shape that depends on them",
    "Cannot access data pointer of Tensor that doesn't have storage": "NumPy, or another reader of memory",
}
_UNTRANSFORMABLE = {
    "element 0 of tensors does not require grad": "torch.autograd.grad to its arguments: take torch.func.grad",
    # It does not require grad, or (torch 2.11) is not in the graph.
    "One of the differentiated Tensors": "torch.autograd.grad to its arguments: take torch.func.grad",
    "The differentiated Tensor at index": "torch.autograd.grad to its arguments: take torch.func.grad",
    "backward() called inside a functorch transform": "Tensor.backward: take torch.func.grad",
    "You tried to vmap over": "an autograd.Function without a vmap rule: set generate_vmap_rule = True in its class",
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks": (
        "hooks of saved tensors, as torch.utils.checkpoint has, which torch.func cannot transform: leave them out"
    ),
}


def call_inert(func: Any, args: Sequence[Any], kwargs: dict[str, Any], depth: int) -> Any:
    """Call a torch function where `depth` levels are running and all of them are inert.

    What a custom autograd.Function is applied to is seen by a mode only where some level is running. There torch asks
    for its vmap rule, which it does not need.
    """
    if func is not custom_function_call or len(retrieve_all_functorch_interpreters()) != depth:
        return func(*args, **kwargs)
    with temporarily_clear_interpreter_stack():
        return func(*args, **kwargs)


no_modes: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunction
"""Run the body with no mode looking at torch functions."""


def no_levels() -> AbstractContextManager[object]:
    """Run the body as if no transform were running."""
    return temporarily_clear_interpreter_stack()


@contextmanager
def no_transforms() -> Iterator[None]:
    """The same with forward mode off, in which transforms that start in the body are on their own."""
    forward_mode = forward_ad._set_fwd_grad_enabled(False) if in_forward_mode() else nullcontext()
    with temporarily_clear_interpreter_stack(), forward_mode:
        yield


def nothing_running() -> AbstractContextManager[None]:
    """The same with gradients off in both modes, as it is inside of an autograd.Function."""
    return _UNCHANGED if nothing_records() and not torch._C._is_fwd_grad_enabled() else _nothing_running()


@contextmanager
def _nothing_running() -> Iterator[None]:
    with temporarily_clear_interpreter_stack(), torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        yield


@contextmanager
def recording() -> Iterator[None]:
    """Let autograd record on plain tensors, whatever mode is on."""
    with torch.inference_mode(False), torch.enable_grad(), requires_grad_allowed(), without_saved_tensor_hooks():
        yield


def in_saved_tensor_hooks() -> bool:
    """Whether the caller has hooks on what autograd saves, as `torch.utils.checkpoint` has."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def without_saved_tensor_hooks() -> AbstractContextManager[None]:
    """Run the body without those hooks, in which torch.func refuses to run."""
    return _hooks_put_aside() if in_saved_tensor_hooks() else _UNCHANGED


@contextmanager
def _hooks_put_aside() -> Iterator[None]:
    hooks = []
    try:
        while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            hooks.append(top)
        yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def over_first(fn: Callable[[Any], Any], stacked: Any) -> Any:
    """`torch.func.vmap` over the first dimension of a tensor, or of each tensor of a list. It flattens no trees and
    checks no arguments, which takes `torch.func.vmap` as long as a small function."""
    is_one = isinstance(stacked, torch.Tensor)
    size = len(stacked if is_one else stacked[0])
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(size, "error")
    try:
        if is_one:
            return functorch._remove_batch_dim(fn(functorch._add_batch_dim(stacked, 0, level)), level, size, 0)
        images = fn([functorch._add_batch_dim(t, 0, level) for t in stacked])
        return [functorch._remove_batch_dim(t, level, size, 0) for t in images]
    finally:
        functorch._vmap_decrement_nesting()


def gradients(
    y: Sequence[torch.Tensor], x: Sequence[torch.Tensor], u: Sequence[torch.Tensor], *, create_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of `torch.autograd.grad` with ``retain_graph=True`` and ``allow_unused=True``, from the engine
    directly: the checks of the wrapper take as long as a small graph."""
    run = torch.autograd.Variable._execution_engine.run_backward
    return run(tuple(y), tuple(u), True, create_graph, tuple(x), allow_unreachable=True, accumulate_grad=False)


def recordable(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors without what autograd knows of them, those made in inference mode copied."""
    if not any([t.is_inference() for t in tensors]):
        return [t.detach() for t in tensors]
    # In that mode a copy would be one of its tensors as well.
    return [t.detach() for t in out_of_inference(tensors)]


def out_of_inference(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, those made in inference mode copied to ones that autograd can save."""
    with torch.inference_mode(False):
        return [t.clone() if t.is_inference() else t for t in tensors]


def requires_grad_allowed() -> AbstractContextManager[None]:
    """Let `requires_grad_` work on plain tensors where only vmaps run, until a backward pass has run there."""
    return enable_inplace_requires_grad(True)


def allow_requires_grad() -> None:
    """The same again, inside of it, whatever has run."""
    functorch.set_inplace_requires_grad_allowed(True)


def outside_compile(fn: Fn) -> Fn:
    """Run a function eagerly, with all that it calls, whatever torch.compile does around it.

    Dynamo drops custom derivative rules of an autograd.Function (pytorch #192985, #193279), silently. Unlike
    `torch.compiler.disable`, this does not import the compiler before it is needed, and asks for nothing where nothing
    is compiled.
    """
    disabled = _disable_dynamo(fn)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        # The first question is one that Dynamo can trace.
        if torch.compiler.is_compiling() or _compiler() is not None:
            return disabled(*args, **kwargs)
        return fn(*args, **kwargs)

    return cast(Fn, run)


def apply(function: type[torch.autograd.Function], *operands: Any) -> tuple[torch.Tensor, ...]:
    """``function.apply(*operands)`` for a function whose results are new tensors.

    Under grad, vjp and jvp torch makes a class for each call. Here there is one for all calls, unless a mode has to see
    the call.
    """
    if depth() == 0:
        # As `apply` does, without matching the operands with the signature.
        return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(operands))  # type: ignore[misc, no-any-return]
    seen = torch._C._len_torch_function_stack() > 0
    if seen or isinstance(retrieve_current_functorch_interpreter(), VmapInterpreter):
        return function.apply(*operands)  # type: ignore[no-any-return]
    with enable_single_level_autograd_function():
        return _at_one_level(function).apply(*unwrap_dead_wrappers(operands))  # type: ignore[no-any-return]


@functools.cache
def _at_one_level(function: type[torch.autograd.Function]) -> Any:
    """The function as a level of grad, vjp or jvp has it: with the values of the level below."""

    def forward(*operands: Any) -> tuple[torch.Tensor, ...]:
        interpreter = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        below = [functorch._unwrap_for_grad(t, level) if isinstance(t, torch.Tensor) else t for t in operands]
        # Autograd has switched both modes off.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            values = apply(function, *below)
        return tuple([functorch._wrap_for_grad(t, level) for t in values])

    rules = {name: staticmethod(getattr(function, name)) for name in ("setup_context", "backward", "jvp")}
    return type(function.__name__, (_SingleLevelFunction,), {"forward": staticmethod(forward), **rules})


Rule = Callable[..., tuple[torch.Tensor | None, ...]]


def nested_forward_mode(jvp: Rule) -> Rule:
    """Decorate an autograd.Function's `jvp` so that outer forward-mode levels see through it.

    torch runs `jvp` with forward mode off and with saved tensors that still carry this level's tangents; both lose
    the tangents of the levels outside (pytorch #197867: the second forward derivative of x**4 comes out as 0). So
    forward mode is switched on, and `primal` takes this level's tangent off everything that enters.
    """

    @functools.wraps(jvp)
    def rule(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [primal(t) for t in ctx.saved_tensors]
            return jvp(ctx, saved, *(None if t is None else primal(t) for t in tangents))

    return rule


def primal(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without the tangent of the innermost forward-mode level."""
    if tensor.layout is not torch.strided:
        return tensor
    inner: torch.Tensor = forward_ad.unpack_dual(tensor, level=0).primal
    return inner


def _tangent(tensor: torch.Tensor) -> torch.Tensor | None:
    # Sparse tensors and those made in inference mode, which have none, cannot be asked.
    if tensor.layout is not torch.strided or tensor.is_inference():
        return None
    tangent: torch.Tensor | None = forward_ad.unpack_dual(tensor).tangent
    return tangent


def hooks_of(tensor: torch.Tensor) -> dict[int, Callable[[torch.Tensor], torch.Tensor | None]] | None:
    """The table of the hooks that ``register_hook`` has put on a tensor; None if there never was one."""
    return tensor._backward_hooks


def have_gradient_layer(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a running grad, vjp, jvp or forward mode differentiates with respect to one of these tensors."""
    if are_constant(tensors):
        return False
    return any(_tangent(t) is not None if is_plain(t) else without_gradient_layers(t) is not t for t in tensors)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether the outermost layer of a tensor is that of a vmap."""
    return bool(functorch.is_batchedtensor(tensor))


def have_batch_layer(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a vmap batches one of these tensors."""
    return not are_plain(tensors) and any(batch_levels(t) for t in tensors)


def batch_levels(tensor: torch.Tensor) -> frozenset[int]:
    """The levels of the vmaps that batch a tensor."""
    levels = []
    while not is_plain(tensor):
        levels += [level(tensor)] if functorch.is_batchedtensor(tensor) else []
        tensor = unwrap(tensor)
    return frozenset(levels)


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether none of these tensors is a functorch wrapper."""
    return all([functorch.maybe_get_level(t) == _PLAIN for t in tensors])


def is_same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two plain tensors are the same numbers in the same memory."""
    if tensor is other:
        return True
    with no_modes():
        return (
            {type(tensor), type(other)} <= {torch.Tensor, torch.nn.Parameter}
            and is_plain(other)
            and is_plain(tensor)
            and tensor.layout is torch.strided
            and tensor.dtype is other.dtype
            and tensor.shape == other.shape
            and tensor.stride() == other.stride()
            and tensor.device == other.device
            and tensor.data_ptr() == other.data_ptr()
            and tensor.is_conj() == other.is_conj()
            and tensor.is_neg() == other.is_neg()
        )


def are_constant(tensors: Sequence[torch.Tensor], *, plain: bool = False) -> bool:
    """Whether no transform, running or finished, has to do with these tensors; autograd may. They may be known to be
    plain."""
    if not plain and not are_plain(tensors):
        return False
    return not in_forward_mode() or all(_tangent(t) is None for t in tensors)


def nothing_records() -> bool:
    """Whether no derivative is recorded, in either mode, and no transform is running."""
    return not torch.is_grad_enabled() and not in_forward_mode() and depth() == 0


def only_autograd() -> bool:
    """Whether no transform is running, and no forward mode."""
    return depth() == 0 and not in_forward_mode()


def only_reverse_mode() -> bool:
    """Whether none but grad, vjp and their kin are running, so that an autograd.Function needs no other rule."""
    running = retrieve_all_functorch_interpreters()
    return not in_forward_mode() and all(isinstance(interpreter, GradInterpreter) for interpreter in running)


def random_state() -> bytes:
    """The state of the generator that functions draw from on the CPU, whatever mode is on."""
    if depth() == 0 and not in_dispatch_mode():
        with no_modes():
            return torch.default_generator.get_state().numpy().tobytes()
    with no_levels(), torch._C._DisableTorchDispatch(), no_modes():
        return torch.default_generator.get_state().numpy().tobytes()


def in_dispatch_mode() -> bool:
    """Whether a mode takes operations before they reach memory, as tracing, fake tensors and profilers of them do."""
    return torch._C._len_torch_dispatch_stack() > 0


def have_legacy_batch(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the vmap of `torch.autograd.grad(..., is_grads_batched=True)`, which has no level, batches a tensor."""
    return any(map(functorch.is_legacy_batchedtensor, tensors))
