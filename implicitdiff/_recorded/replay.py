"""A step as a list of torch's own operations, run without derivatives, transforms and modes.

The values of a step are numbered. Branches and loops hold lists of their own, and ask the host. The list becomes the
text of a function in Python: a loop over the list would take as long as the operations of a small problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import Tensor

from implicitdiff._recorded.tape import NotRecordableError
from implicitdiff._torch.modes import no_modes
from implicitdiff._torch.trees import Leaves


class Slot(int):
    """The number of a value, in the place of a tensor among arguments."""


@dataclass(eq=False)
class ListedCall:
    """An operation of torch.

    Attributes:
        function: the operation.
        args: its arguments by position, with a `Slot` for each tensor.
        kwargs: its arguments by name, likewise.
        made: the values that the operation makes.
        target: the left side of the assignment of these, see `target_of`.
        writes: True if the operation writes to an argument.
    """

    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    made: Sequence[int]
    target: list[str]
    writes: bool = False

    def reads(self) -> list[int]:
        """Return the values that the operation takes."""
        return _slots([self.args, [*self.kwargs.values()]])

    def makes(self) -> Sequence[int]:
        """Return the values that the operation makes."""
        return self.made

    def straight(self) -> list[ListItem]:
        """Return the operation."""
        return [self]

    def lines(self, names: Names) -> Iterator[str]:
        """Yield the lines of the operation."""
        by_name = [f"{k}={names.shown(v)}" for k, v in self.kwargs.items()]
        call = f"{names.of(self.function)}({', '.join([*map(names.shown, self.args), *by_name])})"
        yield " = ".join([*self.target, call])


@dataclass(eq=False)
class Branch:
    """A list that runs if a flag is set in any lane.

    Attributes:
        flag: the flag.
        block: the list.
        taken: the results where the list runs.
        passed: the results where it does not.
        results: their numbers after the branch.
    """

    flag: int
    block: Block
    taken: Sequence[int]
    passed: Sequence[int]
    results: Sequence[int]
    writes: ClassVar[bool] = False

    def reads(self) -> list[int]:
        """Return the values from outside of the branch."""
        own = self.block.makes()
        return [self.flag, *self.passed, *(s for s in (*self.block.reads(), *self.taken) if s not in own)]

    def makes(self) -> Sequence[int]:
        """Return the values that the branch makes for the items after it."""
        return self.results

    def straight(self) -> list[ListItem]:
        """Return the operations of the branch, after which the results get the numbers that later items read."""
        pairs = zip(self.taken, self.results, strict=True)
        return [*self.block.straight().items, *[ListedCall(_itself, [Slot(s)], {}, [r], [f"v{r}"]) for s, r in pairs]]

    def lines(self, names: Names) -> Iterator[str]:
        """Yield the lines of the branch."""
        yield f"if v{self.flag}.any():"
        yield from _indented([*self.block.lines(names), *_renamed(self.taken, self.results, self.block)])
        yield "else:"
        yield from _indented(_renamed(self.passed, self.results))


@dataclass(eq=False)
class Loop:
    """A list that runs as long as a flag is set in any lane.

    Attributes:
        asking: the list that computes the flag.
        flag: the flag.
        block: the list of a pass.
        first: the carried values before the first pass.
        news: the carried values after a pass.
        results: their numbers in the lists, and after the loop.
        at_most: bound on the number of passes.
    """

    asking: Block
    flag: int
    block: Block
    first: Sequence[int]
    news: Sequence[int]
    results: Sequence[int]
    at_most: int
    writes: ClassVar[bool] = False

    def reads(self) -> list[int]:
        """Return the values from outside of the loop."""
        own = {*self.asking.makes(), *self.block.makes(), *self.results}
        read = (self.flag, *self.asking.reads(), *self.block.reads(), *self.news)
        return [*self.first, *(s for s in read if s not in own)]

    def makes(self) -> Sequence[int]:
        """Return the values that the loop makes for the items after it."""
        return self.results

    def straight(self) -> list[ListItem]:
        """Refuse, since the length depends on values."""
        raise NotRecordableError("the step has a loop whose length depends on values")

    def lines(self, names: Names) -> Iterator[str]:
        """Yield the lines of the loop."""
        yield from _renamed(self.first, self.results)
        yield f"for _ in range({self.at_most}):"
        asking = [*self.asking.lines(names), f"if not v{self.flag}.any():", "    break"]
        yield from _indented([*asking, *self.block.lines(names), *_renamed(self.news, self.results, self.block)])


ListItem = ListedCall | Branch | Loop


@dataclass(eq=False)
class Block:
    """A list of operations, branches and loops.

    Attributes:
        items: the list.
        wanted: the values that are read after the list.
    """

    items: list[ListItem]
    wanted: Sequence[int]

    def reads(self) -> list[int]:
        """Return the values that the items read."""
        return [slot for item in self.items for slot in item.reads()]

    def makes(self) -> set[int]:
        """Return the values that the items make."""
        return {slot for item in self.items for slot in item.makes()}

    def needed(self) -> Block:
        """Return the list without operations whose results nothing reads."""
        read, items = set(self.wanted), list[ListItem]()
        for item in reversed(self.items):
            makes = item.makes()
            # An operation without results may raise, as a check does.
            if not makes or not read.isdisjoint(makes) or item.writes:
                read.update(item.reads())
                items.append(item)
        return Block(items[::-1], self.wanted)

    def split(self, operands: Iterable[int], changing: set[int]) -> tuple[Block, Block]:
        """Divide the list in the operations that depend on operands alone, and the others.

        Args:
            operands: the operands.
            changing: the values in whose memory an operation writes; all operations on them stay in order.
        """
        known, before, after = set(operands), list[ListItem](), list[ListItem]()
        for item in self.items:
            reads, makes = item.reads(), item.makes()
            is_fixed = known.issuperset(reads) and changing.isdisjoint([*reads, *makes])
            # Branches and loops ask the host in each step, and stay.
            if isinstance(item, ListedCall) and makes and is_fixed:
                known.update(makes)
                before.append(item)
            else:
                after.append(item)
        rest = Block(after, self.wanted)
        first = Block(before, [])
        read = {*rest.reads(), *self.wanted}
        return Block(before, sorted(first.makes() & read)), rest

    def straight(self) -> Block:
        """Return the list with every branch always taken, which changes no value that is used, see `control`.

        Raises:
            NotRecordableError: the list has a loop, whose length depends on values.
        """
        return Block([part for item in self.items for part in item.straight()], self.wanted)

    def lines(self, names: Names) -> Iterator[str]:
        """Yield the lines of the list; a value is deleted after its last use."""
        read, own, ends = set(self.wanted), self.makes(), list[list[int]]()
        # From the end: a value that no later item reads ends after this item.
        for item in reversed(self.items):
            used = {*item.reads(), *item.makes()}
            ends.append(sorted(s for s in used if s in own and s not in read))
            read |= used
        for item, last in zip(self.items, reversed(ends), strict=True):
            yield from item.lines(names)
            if last:
                yield f"del {', '.join(f'v{s}' for s in last)}"


@dataclass(eq=False)
class Names:
    """The names of operations and arguments in the text of a function.

    Attributes:
        space: the objects by name.
    """

    space: dict[str, Any] = field(default_factory=dict)
    _known: dict[int, str] = field(default_factory=dict)

    def of(self, value: Any) -> str:
        """Return the name of an object."""
        # `space` keeps the object alive, so the id stays unique.
        name = self._known.setdefault(id(value), f"k{len(self._known)}")
        self.space[name] = value
        return name

    def shown(self, argument: Any) -> str:
        """Return an argument as text."""
        if type(argument) is Slot:
            return f"v{int(argument)}"
        if type(argument) in (list, tuple):
            return f"[{', '.join(map(self.shown, argument))}]"
        # Infinity and nan have no literal, and become names.
        # Exact types: the repr of a subclass such as `IntEnum` is no expression.
        if type(argument) in (NoneType, int, bool) or (type(argument) is float and math.isfinite(argument)):
            return repr(argument)
        return self.of(argument)


def function_of(block: Block, given: Iterable[int]) -> tuple[Callable[..., Leaves], str]:
    """Return a list as a function of some values, and its text.

    Args:
        block: the list.
        given: the numbers of the arguments.
    """
    names = Names()
    body = [*block.lines(names), f"return [{', '.join(f'v{s}' for s in block.wanted)}]"]
    text = "\n".join([f"def step({', '.join(f'v{s}' for s in given)}):", *_indented(body)])
    # Code of this folder, so that messages name the line of the user instead.
    code = compile(text, f"{__file__}, generated", "exec")
    exec(code, names.space)  # the text of numbers and names alone that the lines above have written
    return names.space["step"], text


class Replay:
    """A recorded step, ready to run.

    Args:
        block: the operations.
        strides: the strides of the carried tensors.
        operands: the number of the operands; their numbers follow those of the carried tensors.
        changing: the values in whose memory an operation writes.

    Attributes:
        text: the step as a function in Python.
    """

    def __init__(self, block: Block, strides: list[tuple[int, ...]], operands: int, changing: set[int]) -> None:
        self._strides, self._count, self._changing = strides, operands, changing
        self._block = block.needed()
        # Slots count the carried tensors first, then the operands, as `Lister` numbers both.
        given = range(len(strides), len(strides) + operands)
        first, rest = self._block.split(given, changing)
        self._first, _ = function_of(first, given)
        self._step, self.text = function_of(rest, [*range(len(strides) + operands), *first.wanted])

    def prepared(self, operands: Leaves) -> Leaves:
        """Return the operands, and the values that depend on operands alone."""
        with no_modes():
            return [*operands, *self._first(*operands)]

    def __call__(self, carried: Leaves, prepared: Leaves) -> Leaves:
        """Return the new carried tensors. No argument is changed."""
        with no_modes():
            return self._step(*self.restrided(carried), *prepared)

    def restrided(self, carried: Leaves) -> Leaves:
        """Return the carried tensors with the strides of the recording: the operations were chosen for them."""
        pairs = zip(carried, self._strides, strict=True)
        return [t if t.stride() == s else _with_strides(t, s) for t, s in pairs]

    def straight(self) -> Replay:
        """Return the step without any question to the host, see `Block.straight`."""
        return Replay(self._block.straight(), self._strides, self._count, self._changing)


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)


def _renamed(sources: Sequence[int], targets: Sequence[int], block: Block | None = None) -> Iterator[str]:
    """Yield the lines that give values their numbers after a branch; the values that `block` has made end."""
    # One assignment of tuples, since a source may be a target as well.
    left, right = (", ".join(f"v{s}" for s in slots) for slots in (targets, sources))
    yield f"{left} = {right}"
    # Without these names the tensors of a pass would live on into the next.
    if block is not None and (own := sorted(block.makes() & set(sources))):
        yield f"del {', '.join(f'v{s}' for s in own)}"


def with_slots(argument: Any, slot_of: Callable[[Tensor], Any]) -> Any:
    """Return an argument with a slot for each tensor."""
    if isinstance(argument, Tensor):
        return slot_of(argument)
    if type(argument) in (list, tuple):
        return [with_slots(a, slot_of) for a in argument]
    return argument


def target_of(result: Any, slot_of: Callable[[Tensor], int]) -> list[str]:
    """Return the left side of an assignment of the results of an operation; torch returns None for some of them."""
    if isinstance(result, Tensor):
        return [f"v{slot_of(result)}"]
    return [" ".join(["_," if t is None else f"v{slot_of(t)}," for t in result])]


def _slots(arguments: Any) -> list[int]:
    if type(arguments) is Slot:
        return [int(arguments)]
    return [s for a in arguments for s in _slots(a)] if type(arguments) in (list, tuple) else []
