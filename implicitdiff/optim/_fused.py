"""Steps by the compiled kernels: where they serve, what they are handed, and how they are differentiated.

A kernel computes the `UpdateRule`, all leaves in one pass over memory, and its companion the vector-Jacobian product.
They take addresses, so everything is checked before one is taken. What they cannot serve is computed by the plain
formula: vmap, forward mode, tracing, derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch

import implicitdiff._C as _C
import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as functorch
import implicitdiff.optim._donation as _donation
from implicitdiff._torch.modes import is_any_running
from implicitdiff._torch.trees import Leaves
from implicitdiff.optim._rule import UpdateRule
from implicitdiff.optim._step import Buffers, Operands, Step, flat, split

if _C.cpu is not None:
    _C.cpu.use(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.Tensor, torch.nn.Parameter)

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

# Under torch.func.grad a Function costs as much as plain operations on so many elements, and those on a leaf as much as
# on so many more.
_FUNCTION, _LEAF = 40_000, 8_000


def accelerated_op_available(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether there are compiled optimizer steps for tensors of a device and dtype, here and now.

    Args:
        device: where the parameters live; None is torch's default device.
        dtype: what they are stored in.

    Example:
        >>> import torch
        >>> from implicitdiff import accelerated_op_available
        >>> accelerated_op_available("cpu", torch.int64)
        False
    """
    return missing(torch.get_default_device() if device is None else torch.device(device), dtype) is None


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is missing for compiled steps, in words; None if nothing is."""
    if dtype not in _DTYPES:
        return f"there is no compiled step for {dtype}, only for {', '.join(map(str, _DTYPES))}"
    if device.type not in ("cpu", "cuda"):
        return f"there is no compiled step for {device.type} devices"
    if (_C.cpu if device.type == "cpu" else _C.cuda) is None:
        return f"the compiled extension implicitdiff._C was not built for {device.type} (see python -m implicitdiff)"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def require(name: str) -> None:
    """Raise if there are no compiled steps at all."""
    if _C.cpu is None and _C.cuda is None:
        raise RuntimeError(
            f"{name}: use_accelerated_op=True, but the compiled extension implicitdiff._C was not built; install with "
            "a C++ compiler and without IMPLICITDIFF_NO_EXTENSIONS, or leave use_accelerated_op at None"
        )


# The columns that hold parameters, as bits: what weight decay reads, and the bases.
_PARAMS = 0b110


class Memory(NamedTuple):
    """The memory of a step whose tensors are plain, alike, and laid out as kernels read them.

    Attributes:
        addresses: the columns one after the other, 0 for None, and then again those that are to be overwritten.
        sizes: the number of elements of each row.
        requiring: the columns, as bits, with a tensor that requires a gradient.
        inner: the columns, as bits, with a tensor that is no leaf of a graph.
        apart: whether what is to be overwritten overlaps nothing else, except that a row may read the memory that its
            result is written to.
    """

    addresses: list[int]
    sizes: list[int]
    requiring: int
    inner: int
    apart: bool

    @property
    def is_free(self) -> bool:
        """Whether nothing records a step that overwrites no operand."""
        return not (self.requiring and torch.is_grad_enabled()) and not functorch.in_forward_mode()

    @property
    def is_donated(self) -> bool:
        """Whether a step may overwrite what is to be overwritten. Leaves of a graph are read and overwritten out of
        it."""
        if not self.apart or self.inner & _PARAMS or functorch.in_forward_mode():
            return False
        return not (self.requiring & ~_PARAMS and torch.is_grad_enabled())


def locate(columns: Sequence[Operands], overwritten: Sequence[int], count: torch.Tensor | None = None) -> Memory | None:
    """The memory of a step on these columns; None where it has to be asked tensor by tensor.

    Args:
        columns: those of a `Step`, or gradients and parameters alone.
        overwritten: which of them are to be overwritten, that of the parameters or the gradients first.
        count: the number of the step for every leaf, if a kernel is to read it.
    """
    if _C.cpu is None or torch.compiler.is_compiling() or functorch.depth() or functorch.in_dispatch_mode():
        return None
    if is_any_running():
        return None
    found = _C.cpu.locate(columns, 3, overwritten, count)
    return None if found is None else Memory._make(found)


def numbers_of(rule: UpdateRule) -> list[float]:
    """The hyper-parameters as a kernel takes them."""
    return [float(getattr(rule, name)) for name in rule.numbers]


def serves(step: Step, name: str, *, insists: bool) -> bool:
    """Whether a kernel may run this step, whatever its tensors are stored in.

    Args:
        step: the step.
        name: the optimizer, for error messages.
        insists: do not weigh costs, and raise where it is a hyper-parameter that is in the way.
    """
    if torch.compiler.is_compiling() or functorch.in_dispatch_mode() or not _modes.let_addresses_through():
        return False
    if learned := [k for k in step.rule.numbers if not is_number(getattr(step.rule, k))]:
        if insists:
            raise ValueError(
                f"{name}: use_accelerated_op=True, but {', '.join(learned)} is a tensor of several "
                "numbers, or one that is differentiated, batched or not on the CPU, and compiled steps take numbers; "
                "leave use_accelerated_op at None"
            )
        return False
    operands = step.operands
    if not {type(t) for t in operands} <= {torch.Tensor, torch.nn.Parameter}:
        return False
    if not _is_recorded(step):
        return not functorch.have_batch_layer([step.count])
    worth = insists or functorch.depth() == 0 or sum(step.sizes) + _LEAF * len(step.rows) >= _FUNCTION
    return worth and functorch.only_reverse_mode() and not functorch.have_batch_layer([*operands, step.count])


def is_number(value: Any) -> bool:
    """Whether a hyper-parameter is one number for all elements, with no derivative."""
    if not isinstance(value, torch.Tensor):
        return True
    is_scalar = value.ndim == 0 and value.device.type == "cpu"
    return is_scalar and functorch.are_constant([value]) and not value.requires_grad


def run(name: str, step: Step, buffers: Buffers | None) -> list[Leaves]:
    """What `Step.results` gives, for tensors of one device and dtype; in the buffers, where they can hold it."""
    if buffers is not None:
        with _nothing_else():
            return _in_place(name, step, buffers)
    if not _is_recorded(step):
        with _nothing_else():
            return _forward(step)
    results = _Step.apply(step.emptied(), *step.operands)  # type: ignore[no-untyped-call]
    return split(results, 1 + len(step.moments))


def at_once(
    kernel: str,
    numbers: Sequence[float],
    rows: list[int],
    count: torch.Tensor,
    columns: Sequence[Operands],
    overwritten: Sequence[int],
    memory: Memory,
) -> list[Leaves]:
    """What `Step.results` gives, where `memory` allows it: the columns that are overwritten, or new ones."""
    results: list[Any] = [columns[k] for k in overwritten]
    addresses = memory.addresses
    if not overwritten:
        results = [list(map(torch.empty_like, like)) for like in (columns[0], *columns[3:])]  # type: ignore[arg-type]
        addresses = addresses + _addresses(results)
    _launch("step", columns[0][0], kernel, numbers, memory.sizes, rows, count, addresses)  # type: ignore[arg-type]
    if overwritten:
        _note_change(flat(results))
    return results


def _is_recorded(step: Step) -> bool:
    """Whether autograd or a transform follows the tensors of a step."""
    return not step.is_constant or (torch.is_grad_enabled() and any([t.requires_grad for t in step.operands]))


class _Step(torch.autograd.Function):
    """Operands: the step, its tensors."""

    @staticmethod
    def forward(step: Step, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(_forward(step.of(operands))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        step, *operands = inputs
        ctx.step, ctx.bases = step.baseless(), step.places_of_bases
        ctx.save_for_backward(*(t for k, t in enumerate(operands) if k not in ctx.bases))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Operands:
        saved = ctx.saved_tensors
        step, asked = ctx.step.of(saved), ctx.needs_input_grad[1:]
        wanted = [ask for k, ask in enumerate(asked) if k not in ctx.bases]
        given = [*saved, *(c for c in cotangents if c is not None)]
        if not any(wanted):
            grads: list[torch.Tensor | None] = [None] * len(wanted)
        elif not functorch.only_reverse_mode() or functorch.have_legacy_batch(given):
            grads = list(step.pullback(cotangents, wanted))
        else:
            grads = list(_Pull.apply(step.emptied(), wanted, *saved, *cotangents))  # type: ignore[no-untyped-call]
        # What a base is added to has the cotangent of the sum.
        grads[ctx.bases.start : ctx.bases.start] = cotangents[: len(ctx.bases)]
        return (None, *grads)


class _Pull(torch.autograd.Function):
    """The vector-Jacobian product of a step.

    Operands: the step, which cotangents of its tensors are wanted, its tensors, the cotangents of its results.
    """

    @staticmethod
    def forward(step: Step, wanted: Sequence[bool], *operands: Any) -> tuple[torch.Tensor | None, ...]:
        return tuple(_backward(step.of(operands[: len(wanted)]), operands[len(wanted) :], wanted))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor | None, ...]) -> None:
        ctx.step, ctx.wanted, *operands = inputs
        ctx.given = [t is not None for t in operands]
        ctx.save_for_backward(*operands)

    @staticmethod
    def backward(ctx: Any, *bars: torch.Tensor | None) -> Operands:
        # A derivative of a derivative: from here on it is the plain formula's.
        def pull(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            operands = _spread(tensors, ctx.given)
            step, cotangents = ctx.step.of(operands[: len(ctx.wanted)]), operands[len(ctx.wanted) :]
            return tuple(t for t in step.pullback(cotangents, ctx.wanted) if t is not None)

        pulled: Any = torch.func.vjp(pull, *(t for t in ctx.saved_tensors if t is not None))[1]
        return (None, None, *_spread(pulled(tuple(bar for bar in bars if bar is not None)), ctx.given))


def _spread(values: Sequence[Any], where: Sequence[bool]) -> list[Any]:
    rest = iter(values)
    return [next(rest) if there else None for there in where]


def _forward(step: Step) -> list[Leaves]:
    outputs = [[_fresh(t) for t in like] for like in (step.grads, *step.moments)]
    inputs = _readable(step.columns)
    _call("step", step, _addresses(inputs), _addresses(outputs))
    return outputs


def _in_place(name: str, step: Step, buffers: Buffers) -> list[Leaves]:
    buffers = _donation.unshared_buffers(name, step, buffers)
    inputs = _readable(step.columns)
    outputs = [
        [b if b is not None and _is_addressable(b) else _fresh(t) for b, t in zip(*pair, strict=True)]
        for pair in zip(buffers, (step.grads, *step.moments), strict=True)
    ]
    _call("step", step, _addresses(inputs), _addresses(outputs))
    _note_change(flat(outputs))
    return _donation.fill(buffers, outputs)


def _backward(step: Step, cotangents: Operands, wanted: Sequence[bool]) -> Operands:
    bars = split(cotangents, 1 + len(step.moments))
    asked = _spread(wanted, [t is not None for t in flat(step.columns)])
    likes = [t if ask else None for t, ask in zip(flat(step.columns), asked, strict=True)]
    outputs = split([None if t is None else _fresh(t) for t in likes], len(step.columns))
    inputs = _readable([step.grads, step.decayed, *step.moments, *bars])
    _call("pull", step, _addresses(inputs), _addresses([*outputs[:2], *outputs[3:]]))
    return [out for out, t in zip(flat(outputs), flat(step.columns), strict=True) if t is not None]


def _call(which: str, step: Step, inputs: list[int], outputs: list[int]) -> None:
    first = step.grads[0]
    count = functorch.base(step.count).to(first.device).contiguous()
    _launch(which, first, step.rule.kernel, numbers_of(step.rule), step.sizes, step.rows, count, inputs + outputs)


def _launch(
    which: str,
    first: torch.Tensor,
    kernel: str,
    numbers: Sequence[float],
    sizes: list[int],
    rows: list[int],
    count: torch.Tensor,
    addresses: list[int],
) -> None:
    """Call a compiled function for tensors of the device and dtype of `first`."""
    operands = (kernel, numbers, _DTYPES[first.dtype], sizes, rows, count.data_ptr(), addresses)
    if first.is_cpu:
        getattr(_C.cpu, which)(*operands, torch.get_num_threads())
    else:
        with torch.cuda.device(first.device):
            getattr(_C.cuda, which)(*operands, torch.cuda.current_stream().cuda_stream)


def _note_change(tensors: Leaves) -> None:
    """Tell autograd what a kernel has overwritten."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # Tensors made in inference mode have no version.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _nothing_else() -> AbstractContextManager[Any]:
    """Run the body with no mode and no transform between it and the memory."""
    if functorch.depth() == 0 and not is_any_running():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(functorch.no_modes())
    stack.enter_context(functorch.nothing_running())
    return stack


def _fresh(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _readable(columns: Sequence[Operands]) -> list[Operands]:
    """The columns with a copy in the place of what does not lie in memory as kernels read it."""
    return [
        [
            t if t is None or _is_addressable(t) else t.resolve_neg().clone(memory_format=torch.contiguous_format)
            for t in c
        ]
        for c in columns
    ]


def _is_addressable(tensor: torch.Tensor) -> bool:
    """Whether the numbers lie at the address, in order and aligned.

    A view of a conjugate may stand for the negatives of what is in memory, and a tensor of zeros may have no memory.
    """
    if not tensor.is_contiguous() or tensor.is_neg() or tensor.data_ptr() % tensor.itemsize:
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0


def _addresses(columns: Sequence[Operands]) -> list[int]:
    return [0 if t is None else t.data_ptr() for column in columns for t in column]
