"""Functions of replicated values: what a function receives and captures is made varying before it runs on one rank."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.tracking as _tracking
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.lift import lift
from implicitdiff._closures.modes import Substitute, substitutes
from implicitdiff._closures.walk import tensors_within
from implicitdiff._torch.decisions import each_alone
from implicitdiff._torch.modes import is_any_running, no_modes
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Leaves, Tree, UserFunction
from implicitdiff.distributed._agreement import exchange, rounds_differently
from implicitdiff.distributed._collectives import varied
from implicitdiff.distributed._local import apart, refuse_inside


class LocalCall(NamedTuple):
    """A call of a function on one rank.

    Attributes:
        name: the caller and the function, in error messages.
        fn: the function.
        args: its arguments, trees.
        own: for each tensor of the arguments, whether its value is varying already.
        captured: tensors that the function captures. Where no mode runs, those that may be differentiated; under a mode
            all, since each evaluation must have the same operations, whatever is differentiated then.
    """

    name: str
    fn: UserFunction
    args: tuple[Tree, ...]
    own: Sequence[bool]
    captured: Leaves

    @classmethod
    def of(
        cls,
        name: str,
        fn: UserFunction,
        group: ProcessGroup,
        args: tuple[Tree, ...],
        own: Sequence[bool] | None = None,
    ) -> LocalCall:
        """Return the call of a function, after a search for what it captures."""
        refuse_inside(name, group)
        tensors, structure = pytree.flatten(args)
        captured = _captured_by(name, fn, args, structure.others)
        found = [t for t in captured if is_continuous(t) and (is_any_running() or _tracking.may_be_differentiated(t))]
        return cls(name, fn, args, [False] * len(tensors) if own is None else own, found)

    def run(self, group: ProcessGroup) -> Tree:
        """Return the result, a varying value, as a function of replicated arguments and captured tensors."""
        leaves, structure = pytree.flatten(self.args)
        # Integers and flags have no derivative, and need no `pvary`.
        given = [i for i, t in enumerate(leaves) if not self.own[i] and is_continuous(t)]
        varying = varied(group, [*[leaves[i] for i in given], *self.captured])
        # `varying` goes on with the captured tensors, hence no `strict`.
        for i, t in zip(given, varying, strict=False):
            leaves[i] = t
        args = structure.unflatten(leaves)
        with each_alone(), apart(self.name, group):
            if not self.captured:
                return self.fn(*args)
            # -1: levels of the caller may run, and none of those is inert.
            with Substitute(self.captured, varying[len(given) :], -1) as substitute:
                return pytree.map_tensors(substitute.resolve, self.fn(*args))

    def differentiated(self) -> dict[str, Tensor]:
        """Return the replicated tensors that are differentiated in reverse mode, by name.

        In forward mode the tangents of a varying value are as good as those of a replicated one.
        """
        given = zip(pytree.tensors(self.args), self.own, strict=True)
        named = {f"tensor {i} of the arguments": t for i, (t, own) in enumerate(given) if not own}
        named |= {f"captured tensor {i}": t for i, t in enumerate(self.captured)}
        running = substitutes()
        # A mode would record the questions as operations of the function.
        with no_modes():
            return {name: t for name, t in named.items() if _tracking.is_in_graph(_resolved(t, running))}


def _resolved(tensor: Tensor, running: Sequence[Substitute]) -> Tensor:
    for substitute in running:
        tensor = substitute.resolve(tensor)
    return tensor


def _captured_by(name: str, fn: UserFunction, args: Sequence[Tree], others: Sequence[object]) -> Leaves:
    """Return the tensors that a function may use without receiving them, each once."""
    found, is_all = tensors_within(fn, others, by_name=False)
    if not is_all:
        # A generator, a context variable or the like may hide tensors: one evaluation more shows what is used.
        found = [*found, *lift(name, fn, *args).captured]
    return list({id(t): t for t in found}.values())


def refuse_unlike(name: str, named: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Raise unless replicated tensors have the same shapes and values on all ranks."""
    # Unlike machines may have computed a replicated value with other last bits.
    shown = _shape if rounds_differently(group) else _shape_and_values
    with _switches.unobserved():
        plain = [f"{path} {shown(_levels.base(t).detach())}" for path, t in named.items()]
    exchange(group, "; ".join([f"{name}: {_REMEDY}", *plain]), None)


def _shape(tensor: Tensor) -> str:
    return f"of shape {list(tensor.shape)}, {tensor.dtype}"


def _shape_and_values(tensor: Tensor) -> str:
    """Return shape, dtype and a checksum of some entries of a tensor: enough to tell other data from these."""
    flat = tensor.reshape(-1)
    some = flat[:: max(1, flat.numel() // _ENTRIES)].cpu().resolve_conj().resolve_neg().contiguous()
    return f"{_shape(tensor)}, checksum {zlib.crc32(some.view(torch.uint8).numpy().tobytes()):x}"


_ENTRIES = 4096
_REMEDY = (
    "tensors that are mapped or differentiated must be the same on all ranks: take no derivative of what one rank "
    "alone holds, and pass lanes that one rank alone holds with Shard(dim) in in_dims"
)
