"""Optimizer steps by compiled kernels: the steps they may run, their operands, their derivatives.

One kernel computes the step of an `UpdateRule` on all leaves in one pass over memory, a second one its vector-Jacobian
product. Kernels take addresses, so every operand is checked before its address is taken. The plain formula computes all
else: steps under vmap, in forward mode and while tracing, and derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

import implicitdiff._C as _C
import implicitdiff._closures.modes as _modes
import implicitdiff._torch.context as _context
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.tracking as _tracking
import implicitdiff.optim._donation as _donation
from implicitdiff._torch.modes import is_any_running, no_modes
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

# Columns of a `Step`, in the order of StepLayout in src/layout.h. From _MOMENTS on they have the accumulator's dtype.
_DECAYED, _BASES, _MOMENTS = 1, 2, 3
# The columns that hold parameters, as bits.
_PARAMS = 1 << _DECAYED | 1 << _BASES

# Costs under torch.func.grad, in elements that plain operations step in the same time: of an autograd.Function, and of
# the plain operations on one more leaf.
_FUNCTION, _LEAF = 40_000, 8_000


def accelerated_op_available(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> bool:
    """True if compiled optimizer steps for tensors of a device and dtype were built and can run now.

    In a clone, Python imports the clone's own files, and not those of ``pip install .``, which have the compiled steps.
    ``python -m implicitdiff`` names the files that run.

    Args:
        device: device of the parameters; None is torch's default device.
        dtype: dtype of the parameters.

    Example:
        >>> import torch
        >>> from implicitdiff import accelerated_op_available
        >>> accelerated_op_available("cpu", torch.int64)
        False
    """
    return missing(torch.get_default_device() if device is None else torch.device(device), dtype) is None


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the reason why there are no compiled steps for a device and dtype, None if there are."""
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
    """Raise RuntimeError if no compiled module was built."""
    if _C.cpu is None and _C.cuda is None:
        raise RuntimeError(
            f"{name}: use_accelerated_op=True, but the compiled extension implicitdiff._C was not built; install with "
            "a C++ compiler and without IMPLICITDIFF_NO_EXTENSIONS, or leave use_accelerated_op at None"
        )


class Located(NamedTuple):
    """Addresses of a step whose tensors are plain, alike, contiguous and aligned.

    Attributes:
        addresses: addresses of the columns, one column after the other and 0 for None, followed by those of the
            columns to be overwritten.
        sizes: number of elements of each row.
        requiring: columns, as bits, with a tensor that requires a gradient.
        inner: columns, as bits, with a tensor that requires a gradient and is the result of an operation.
        apart: True if the memory to be overwritten overlaps no other operand, except that a row may read the memory
            that its own result is written to.
    """

    addresses: list[int]
    sizes: list[int]
    requiring: int
    inner: int
    apart: bool

    @property
    def is_free(self) -> bool:
        """True if neither autograd nor forward mode records a step that makes new tensors."""
        return not _records(self.requiring)

    @property
    def is_donated(self) -> bool:
        """True if a step may overwrite its operands.

        Parameters may require a gradient if they are leaves: the step is then not recorded, as in torch.optim.
        """
        return self.apart and not self.inner & _PARAMS and not _records(self.requiring & ~_PARAMS)


NOT_LOCATED = Located([], [], 0, 0, False)


def _records(requiring: int) -> bool:
    """True if autograd or forward mode records a step, with these columns, as bits, that require a gradient."""
    return bool(requiring and torch.is_grad_enabled()) or _context.now().forward


def locate(columns: Sequence[Operands], overwritten: Sequence[int], count: torch.Tensor | None = None) -> Located:
    """Return the addresses of a step on these columns; `NOT_LOCATED` if each tensor must be checked by itself.

    Args:
        columns: columns of a `Step`, or gradients and parameters alone.
        overwritten: indices of the columns to be overwritten, first that of the parameters or the gradients.
        count: number of the step for every leaf, if a kernel reads it.
    """
    # Under a transform, a mode or a tracer a tensor need not have the memory of its values.
    if _C.cpu is None or torch.compiler.is_compiling() or _context.depth() or _context.dispatch_modes():
        return NOT_LOCATED
    if is_any_running():
        return NOT_LOCATED
    found = _C.cpu.locate(columns, _MOMENTS, overwritten, count)
    return NOT_LOCATED if found is None else Located._make(found)


def numbers_of(rule: UpdateRule) -> list[float]:
    """Return the hyper-parameters in the order of the kernel."""
    return [float(getattr(rule, name)) for name in rule.numbers]


def serves(step: Step, name: str, *, insists: bool) -> bool:
    """True if a kernel may run this step; device, dtype and layout of its tensors are not looked at.

    Args:
        step: the step.
        name: name of the optimizer, for error messages.
        insists: run a kernel even if plain operations cost less, and raise if a hyper-parameter prevents one.

    Raises:
        ValueError: if `insists`, and a hyper-parameter is more than one number without derivative.
    """
    if torch.compiler.is_compiling() or _context.dispatch_modes() or not _modes.let_addresses_through():
        return False
    if learned := [k for k in step.rule.numbers if not is_number(getattr(step.rule, k))]:
        if insists:
            raise ValueError(
                f"{name}: use_accelerated_op=True, but compiled steps take numbers, and {', '.join(learned)} is a "
                "tensor of several numbers, or one that is differentiated, batched or not on the CPU; leave "
                "use_accelerated_op at None"
            )
        return False
    operands = step.operands
    if not {type(t) for t in operands} <= {torch.Tensor, torch.nn.Parameter}:
        return False
    if not _is_recorded(step):
        # A kernel reads a single number from `count` for each leaf, so the lanes must share the count.
        return not _levels.have_batch_layer([step.count])
    worth = insists or _context.depth() == 0 or sum(step.sizes) + _LEAF * len(step.rows) >= _FUNCTION
    return worth and _context.now().only_reverse_mode and not _levels.have_batch_layer([*operands, step.count])


def is_number(value: object) -> bool:
    """True if a hyper-parameter is one number for all elements and has no derivative."""
    if not isinstance(value, torch.Tensor):
        return True
    return value.ndim == 0 and value.device.type == "cpu" and not _tracking.may_be_differentiated(value)


def run_kernel(step: Step, buffers: Buffers) -> list[Leaves]:
    """Return the results of a step on tensors of one device and dtype, in the buffers that can hold them."""
    if not _is_recorded(step):
        # Outside all modes and transforms tensors are those that have the memory.
        with no_modes(), _switches.nothing_running():
            return _forward(step, buffers)
    # An `autograd.Function` tracks only tensors among its direct arguments, so the tensors follow the emptied step.
    results = _Step.apply(step.emptied(), *step.operands)  # type: ignore[no-untyped-call]
    return _donation.fill(buffers, split(results, 1 + len(step.moments)))


def at_once(
    kernel: str,
    numbers: Sequence[float],
    rows: list[int],
    count: torch.Tensor,
    columns: Sequence[Operands],
    overwritten: Sequence[int],
    memory: Located,
) -> list[Leaves]:
    """Return the results of a located step: the overwritten columns, or new columns if none is overwritten.

    To be called only if `memory.is_donated`, or `memory.is_free` if no column is overwritten.
    """
    results: list[Any] = [columns[k] for k in overwritten]
    addresses, grads = memory.addresses, columns[0]
    if not overwritten:
        results = [list(map(torch.empty_like, like)) for like in (grads, *columns[_MOMENTS:])]  # type: ignore[arg-type]
        # A new list, because the old list belongs to `memory`.
        addresses = addresses + _addresses(results)
    _launch("step", grads[0], kernel, numbers, memory.sizes, rows, count, addresses)  # type: ignore[arg-type]
    if overwritten:
        _note_change(flat(results))
    return results


def _is_recorded(step: Step) -> bool:
    """True if autograd or a transform follows the tensors of a step."""
    return not step.is_constant or (torch.is_grad_enabled() and any([t.requires_grad for t in step.operands]))


class _Step(torch.autograd.Function):
    """A step as one operation of autograd. Operands: the `Step` without tensors, then the tensors of the step."""

    @staticmethod
    def forward(step: Step, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(_forward(step.of(operands), step.no_buffers)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        step, *operands = inputs
        # The derivative in a base is the identity, so the backward does not keep the bases.
        ctx.step, ctx.bases = step.baseless(), step.places_of_bases
        ctx.save_for_backward(*(t for k, t in enumerate(operands) if k not in ctx.bases))
        # Zero cotangents stay None, so a kernel does not read zeros.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Operands:
        saved = ctx.saved_tensors
        step, asked = ctx.step.of(saved), ctx.needs_input_grad[1:]
        wanted = [ask for k, ask in enumerate(asked) if k not in ctx.bases]
        given = [*saved, *(c for c in cotangents if c is not None)]
        if not any(wanted):
            grads: list[torch.Tensor | None] = [None] * len(wanted)
        elif not _context.now().only_reverse_mode or _tracking.have_legacy_batch(given):
            grads = list(step.pullback(cotangents, wanted))
        else:
            grads = list(_Pull.apply(step.emptied(), wanted, *saved, *cotangents))  # type: ignore[no-untyped-call]
        # A result is the sum of base and update, so its cotangent is that of the base.
        grads[ctx.bases.start : ctx.bases.start] = cotangents[: len(ctx.bases)]
        return (None, *grads)


class _Pull(torch.autograd.Function):
    """The vector-Jacobian product of a step as one operation of autograd.

    Operands: the `Step` without its tensors; for each of them, True if its cotangent is wanted; its tensors; the
    cotangents of its results.
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
        # The kernels have no second derivative: the plain formula gives it, and all higher ones.
        def pull(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            operands = _in_places(tensors, ctx.given)
            step, cotangents = ctx.step.of(operands[: len(ctx.wanted)]), operands[len(ctx.wanted) :]
            return tuple(t for t in step.pullback(cotangents, ctx.wanted) if t is not None)

        pulled: Any = torch.func.vjp(pull, *(t for t in ctx.saved_tensors if t is not None))[1]
        return (None, None, *_in_places(pulled(tuple(bar for bar in bars if bar is not None)), ctx.given))


def _in_places(values: Sequence[Any], where: Sequence[bool]) -> list[Any]:
    """Return the values at the places where `where` is True, None at the others."""
    rest = iter(values)
    return [next(rest) if there else None for there in where]


def _forward(step: Step, buffers: Buffers) -> list[Leaves]:
    # A buffer without a readable address gets a fresh tensor, from which `fill` copies the result.
    outputs = [
        [b if b is not None and _is_addressable(b) else _fresh(t) for b, t in zip(*pair, strict=True)]
        for pair in zip(buffers, (step.grads, *step.moments), strict=True)
    ]
    _launch_for(step, "step", step.columns, outputs)
    _note_change(flat(outputs))
    return _donation.fill(buffers, outputs)


def _backward(step: Step, cotangents: Operands, wanted: Sequence[bool]) -> Operands:
    bars = split(cotangents, 1 + len(step.moments))
    fresh = [_fresh(t) if ask else None for t, ask in zip(step.operands, wanted, strict=True)]
    outputs = split(_in_places(fresh, [t is not None for t in flat(step.columns)]), len(step.columns))
    _launch_for(step, "pull", [*_without_bases(step.columns), *bars], _without_bases(outputs))
    return fresh


def _without_bases(columns: Sequence[Operands]) -> list[Operands]:
    """Return the columns in the order of PullLayout in src/layout.h."""
    return [*columns[:_BASES], *columns[_MOMENTS:]]


def _launch_for(
    step: Step, function: Literal["step", "pull"], inputs: Sequence[Operands], outputs: Sequence[Operands]
) -> None:
    """Call a compiled function for a step, with a copy of each input that it cannot read."""
    first = step.grads[0]
    # Lanes share the count, see `serves`, so the tensor inside of all wrappers has the numbers.
    count = _levels.base(step.count).to(first.device).contiguous()
    readable = _readable(inputs)  # keeps the copies alive until the call returns
    addresses = _addresses([*readable, *outputs])
    _launch(function, first, step.rule.kernel, numbers_of(step.rule), step.sizes, step.rows, count, addresses)


def _launch(
    function: Literal["step", "pull"],
    first: torch.Tensor,
    kernel: str,
    numbers: Sequence[float],
    sizes: list[int],
    rows: list[int],
    count: torch.Tensor,
    addresses: list[int],
) -> None:
    """Call a compiled function on tensors of the device and dtype of `first`."""
    arguments = (kernel, numbers, _DTYPES[first.dtype], sizes, rows, count.data_ptr(), addresses)
    if first.is_cpu:
        getattr(_C.cpu, function)(*arguments, torch.get_num_threads())
    else:
        # The kernel is launched on torch's current stream, hence ordered with torch's operations, without a
        # synchronisation.
        with torch.cuda.device(first.device):
            getattr(_C.cuda, function)(*arguments, torch.cuda.current_stream().cuda_stream)


def _note_change(tensors: Leaves) -> None:
    """Count an in-place change of each tensor, since autograd does not see the writes of kernels."""
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # Tensors made in inference mode have no version.
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _fresh(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _readable(columns: Sequence[Operands]) -> list[Operands]:
    """Return the columns with a contiguous copy of each tensor that kernels cannot read."""
    return [
        [
            t if t is None or _is_addressable(t) else t.resolve_neg().clone(memory_format=torch.contiguous_format)
            for t in c
        ]
        for c in columns
    ]


def _is_addressable(tensor: torch.Tensor) -> bool:
    """True if the numbers of a tensor lie at its address, in order and aligned.

    Two kinds of tensors do not: the imaginary part of a conjugate view, which is the negative of the memory, and a
    tensor of zeros without memory, which autograd may pass as a cotangent.
    """
    if not tensor.is_contiguous() or tensor.is_neg() or tensor.data_ptr() % tensor.itemsize:
        return False
    return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0


def _addresses(columns: Sequence[Operands]) -> list[int]:
    return [0 if t is None else t.data_ptr() for column in columns for t in column]
