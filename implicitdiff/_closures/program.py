"""What a function did when it ran: its operations of torch, their arguments, and where each tensor came from.

A function is evaluated again when a derivative is taken. That it is the same function as before is not to be seen in
its values: a residual at a solution is rounding noise. It is to be seen in its program. Two evaluations are the same
function if they apply the same operations, in the same order, to the same numbers, strings and other arguments that are
no tensors, and if every tensor came from the same place: the same operand, the result of the same operation, or the
same constant.

Nothing is asked of the tensors' values, so nothing waits for a device, and the comparison is the same under every
transform.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import implicitdiff._torch.levels as functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._torch.trees import Leaves

Origin = tuple[Any, ...]
"""``("operand", i)``; ``("result", i, k)``, the k-th of the i-th operation; or ``("constant", id)``. There are no other
tuples in a program."""


class Program:
    """The operations of one evaluation.

    Attributes:
        outside: the tensors that the function used and was not given and did not make, each with its version, by id.
        operations: ``(function, arguments, keyword arguments)``, with an `Origin` in the place of each tensor.
        recorded: whether gradients were on, for each operation.
        silent: how many library calls, each of which counts as one operation, are under way.
        has_sparse: whether it has met a sparse tensor.
    """

    def __init__(self, operands: Sequence[torch.Tensor]) -> None:
        self.depth = functorch.depth()
        self.outside: dict[int, tuple[torch.Tensor, int]] = {}
        self.operations: list[tuple[Any, Any, Any]] = []
        self.recorded: list[bool] = []
        # Where gradients are off all along, it does not show which operations a function records.
        self.is_recording = torch.is_grad_enabled()
        self.silent = 0
        self.has_sparse = False
        self.aliases: dict[Origin, Origin] = {}
        self.borrowed: dict[int, tuple[Any, Any]] = {}
        self._origins: dict[int, Origin] = {}
        self._hidden: dict[int, weakref.ref[torch.Tensor]] = {}
        # An id belongs to another tensor once its own has died, and what counts as captured would depend on chance.
        self._alive: list[Any] = []
        for i, operand in enumerate(operands):
            self._place(operand, ("operand", i))

    # --- recording --------------------------------------------------------------------------------------------------

    def receive(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The arguments of an operation as they are compared; tensors among them are noted."""
        if self.silent:
            for tensor in _tensors_in([*args, *kwargs.values()]):
                self.see(tensor)
            return (), {}
        # Once for each operation, so without the calls of Python that can be had without.
        shown, origins = [], self._origins
        for value in args:
            # An id that has an origin is that of a tensor which is kept alive.
            known = origins.get(id(value))
            shown.append(known or (value if type(value) in _PLAIN else self._shown(value)))
        if not kwargs:
            return shown, kwargs
        return shown, {k: self._shown(v) for k, v in kwargs.items() if k not in _RECORDING}

    def add(self, function: Any, arguments: tuple[Any, Any], result: Any) -> None:
        """Note an operation that has run."""
        if isinstance(result, torch.Tensor) and not self.silent:
            self.operations.append((function, *arguments))
            self.recorded.append(torch.is_grad_enabled())
            self._add_result(result, ("result", len(self.operations), 0))
            return
        made = [result] if isinstance(result, torch.Tensor) else _tensors_in(result)
        if self.silent:
            for tensor in made:
                self._hide(tensor)
            return
        if made or (result is None and getattr(function, "__name__", "") not in _SWITCHES):
            self._note(function, arguments)
        for k, tensor in enumerate(made):
            self._add_result(tensor, ("result", len(self.operations), k))

    def nest(self, program: Program) -> None:
        """Note the program of a function that this one gives to a solver or a linear solve."""
        self._note(program, ([], {}))

    def finish(self) -> None:
        """Let the tensors go that the function made."""
        self._made = [weakref.ref(t) for t in self._alive if self._origins.get(id(t), _HIDDEN)[0] == "result"]
        self._alive.clear()
        self._origins.clear()
        self._hidden.clear()

    def left(self) -> list[weakref.ref[torch.Tensor]]:
        """The tensors that the function made and that have outlived it and its result: they are kept somewhere."""
        return [made for made in self._made if made() is not None]

    def see(self, tensor: torch.Tensor) -> Origin:
        """Where a tensor came from."""
        if (origin := self._origins.get(id(tensor))) is not None:
            return origin
        if id(tensor) in self.outside:
            return ("constant", id(tensor))
        # Transforms that the function itself starts wrap what they are given without a torch function that could be
        # seen.
        while not self._knows(tensor) and functorch.level(tensor) > self.depth:
            tensor = functorch.unwrap(tensor)
        if self._knows(tensor):
            return self._origins.get(id(tensor), _HIDDEN)
        if id(tensor) not in self.outside:
            self.outside[id(tensor)] = (tensor, version(tensor))
            self.has_sparse = self.has_sparse or tensor.layout is not torch.strided
            self._note_borrowed(functorch.base(tensor))
        return ("constant", id(tensor))

    def _note(self, function: Any, arguments: tuple[Any, Any]) -> None:
        self.operations.append((function, *arguments))
        self.recorded.append(torch.is_grad_enabled())

    def _knows(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._origins or id(tensor) in self._hidden

    def _add_result(self, tensor: torch.Tensor, origin: Origin) -> None:
        known = ("constant", id(tensor)) if id(tensor) in self.outside else self._origins.get(id(tensor))
        if known is None:
            self._place(tensor, origin)
        else:
            # What changes nothing, such as `contiguous`, returns its argument on plain tensors, and another under vmap.
            self.aliases.setdefault(origin, known)

    def _place(self, tensor: torch.Tensor, origin: Origin) -> None:
        """Note the origin of a tensor and of what it wraps, which a transform returns when it ends."""
        self._origins[id(tensor)] = origin
        self._alive.append(tensor)
        self.has_sparse = self.has_sparse or tensor.layout is not torch.strided
        while functorch.level(tensor) > self.depth:
            tensor = functorch.unwrap(tensor)
            if id(tensor) not in self.outside:
                self._origins.setdefault(id(tensor), origin)
                self._alive.append(tensor)

    def _hide(self, tensor: torch.Tensor) -> None:
        """Note a tensor that a library call has made, for as long as it lives: there may be any number of them."""
        key = id(tensor)
        if key not in self._origins:
            self.has_sparse = self.has_sparse or tensor.layout is not torch.strided
            self._hidden[key] = weakref.ref(tensor, lambda _: self._hidden.pop(key, None))

    def _shown(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.see(value)
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, (list, tuple)):
            return [self._shown(v) for v in value]
        if isinstance(value, dict):
            return {k: self._shown(v) for k, v in value.items()}
        if kind is slice:
            return ["slice", *map(self._shown, (value.start, value.stop, value.step))]
        if isinstance(value, np.ndarray):
            return ["array", value.shape.__repr__(), str(value.dtype), self._borrow(value)]
        if isinstance(value, torch.Generator):
            with functorch.no_levels(), functorch.no_modes():
                return ["generator", value.get_state().numpy().tobytes()]
        return value if isinstance(value, (int, float, complex, str, np.generic)) else None

    # --- memory that others may write to ----------------------------------------------------------------------------

    def note_memory(self, operands: Leaves) -> None:
        """Note the memory of operands as well, if others may write to it."""
        for operand in operands:
            self._note_borrowed(functorch.base(operand))

    def _note_borrowed(self, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel() and is_borrowed(tensor):
            with functorch.no_levels(), functorch.no_modes():
                self._borrow(_array(tensor))

    def _borrow(self, array: Any) -> Any:
        """A checksum of an array, which is kept to be compared later."""
        if array is None:
            return None
        self.borrowed[id(array)] = (array, found := checksum(array))
        return found

    # --- comparing --------------------------------------------------------------------------------------------------

    def difference(self, then: Program, constants: set[int] | None) -> str | None:
        """The first difference from an earlier program, in words; None if there is none.

        Args:
            then: the program before.
            constants: ids of the tensors whose identity has to be the same; None: origins are not compared.
        """
        same = _Comparison({**then.aliases, **self.aliases}, constants)
        for i, (a, b) in enumerate(zip(self.operations, then.operations, strict=False)):
            if a == b:
                continue
            if isinstance(a[0], Program) and isinstance(b[0], Program):
                if (inner := a[0].difference(b[0], None)) is not None:
                    return f"in a function that it gives to a solver or a linear solve, {inner}"
            elif a[0] != b[0]:
                return f"its operation {i} is {_name(a[0])}, where it was {_name(b[0])}"
            elif not (same(a[1], b[1]) and same(a[2], b[2])):
                return f"its operation {i}, {_name(a[0])}, receives ({_call(a)}), where it received ({_call(b)})"
        if len(self.operations) != len(then.operations):
            return f"it has {len(self.operations)} operations, where it had {len(then.operations)}"
        if self.is_recording and then.is_recording and self.recorded != then.recorded:
            i = next(i for i, (a, b) in enumerate(zip(self.recorded, then.recorded, strict=True)) if a != b)
            now, before = ("on", "off") if self.recorded[i] else ("off", "on")
            return (
                f"gradients are {now} for its operation {i}, {_name(self.operations[i][0])}, where they were {before}"
            )
        return None


class _Comparison:
    """Whether two arguments are the same."""

    def __init__(self, aliases: dict[Origin, Origin], constants: set[int] | None) -> None:
        self.aliases, self.constants = aliases, constants

    def __call__(self, now: Any, then: Any) -> bool:
        if isinstance(then, tuple):
            return isinstance(now, tuple) and self._origins(self._first(now), self._first(then))
        if isinstance(then, (float, complex)) and isinstance(now, (float, complex)):
            return _are_close(now, then)
        if isinstance(then, list):
            return isinstance(now, list) and len(now) == len(then) and all(map(self, now, then))
        if isinstance(then, dict):
            return isinstance(now, dict) and now.keys() == then.keys() and all(self(now[k], then[k]) for k in now)
        return type(now) is type(then) and bool(now == then)

    def _first(self, origin: Any) -> Origin:
        while origin in self.aliases:
            origin = self.aliases[origin]
        return origin  # type: ignore[no-any-return]

    def _origins(self, now: Origin, then: Origin) -> bool:
        if self.constants is None:
            return True
        if then[0] == "constant" and then[1] not in self.constants:
            # Made out of sight, each time anew.
            return bool(now[0] == "constant")
        return bool(now == then)


_HIDDEN: Origin = ("result", -1, 0)
_PLAIN = {int, float, bool, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout}
_PLAIN |= {torch.memory_format}
# How much of it is recorded does not change a result.
_RECORDING = ("create_graph", "retain_graph")
# What returns nothing and computes nothing.
_SWITCHES = ("_set_grad_enabled", "backward", "__set__")


def _tensors_in(result: Any) -> Leaves:
    return pytree.tensors(result) if isinstance(result, (tuple, list, dict)) else []


def _are_close(now: complex, then: complex) -> bool:
    """Whether two numbers are the same to rounding: they may have been computed from tensors."""
    both_nan = now != now and then != then
    return bool(both_nan or now == then or abs(now - then) <= 1e-6 * max(abs(now), abs(then)))


def _name(function: Any) -> str:
    return "a library call" if isinstance(function, Program) else str(getattr(function, "__name__", function))


def _call(operation: tuple[Any, Any, Any]) -> str:
    _, args, kwargs = operation
    shown = [*map(_word, args), *(f"{k}={_word(v)}" for k, v in kwargs.items())]
    text = ", ".join(shown)
    return text if len(text) <= 120 else text[:117] + "..."


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return {"operand": f"operand {value[1]}", "result": f"result {value[1]}"}.get(value[0], "a captured tensor")
    if isinstance(value, list):
        if value and value[0] in ("array", "generator"):
            return f"a {value[0]} in this state"
        return f"[{', '.join(map(_word, value))}]"
    return repr(value)


def version(tensor: torch.Tensor) -> int:
    """Counts the changes of a plain tensor in place; constant for tensors that do not count them."""
    return tensor._version if functorch.is_plain(tensor) and not tensor.is_inference() else 0


def is_borrowed(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor belongs to somebody else, who may write to it unseen, as NumPy may."""
    try:
        return not tensor.untyped_storage().resizable()
    except NotImplementedError:  # subclasses and wrappers that have no memory
        return False


def _array(tensor: torch.Tensor) -> Any:
    """The memory of a plain tensor as an array; None where NumPy has no such type."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.int16)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        return None


def checksum(array: Any) -> list[Any]:
    """Sums over 64 stretches of memory: as fast as memory is read, and not the same after a permutation of rows."""
    if array.dtype.hasobject:
        return [repr(array)]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    words = data[: data.size // 8 * 8].view(np.uint64)
    rest = data[words.size * 8 :].tobytes()
    if not words.size:
        return [rest]
    starts = np.arange(0, words.size, max(1, words.size // 64))
    return [np.add.reduceat(words, starts).tobytes(), rest]
