"""One fate for all ranks: an error on one rank is raised on all, and none waits for a collective that never comes.

Inside of `together` each collective follows a header: an all-reduce of three integers, which tells whether a rank has
failed and whether all ranks came to the same collective. A rank that fails answers the header of the others with its
failure, and then all exchange their errors.
"""

from __future__ import annotations

import pickle
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as c10d
from torch.distributed import ProcessGroup

import implicitdiff._torch.switches as _switches
from implicitdiff.distributed._groups import Axis, group_of, host_group, rounding_of_machine
from implicitdiff.errors import ConvergenceError, RankError

# Of the process, not of a thread: autograd runs the backward pass of a GPU on a thread of its own.
_guarded: list[ProcessGroup] = []


@contextmanager
def together(axis: Axis = None) -> Iterator[None]:
    """Run the body so that all ranks leave it alike: an error on one rank is raised on all.

    The body may hold anything: evaluations, searches, backward passes. If a rank raises, the others raise the same
    error at their next collective, or at the end of the body; a note tells the ranks where it came from. With several
    errors, that of the lowest rank is raised. Afterwards the group can be used as before.

    Each collective of the group takes one all-reduce of 24 bytes more. Errors travel as pickles between the ranks of
    the group.

    Args:
        axis: the ranks, see `Axis`.

    Raises:
        RankError: the ranks came to different collectives, or a rank has ended or has not come to a collective within
            the timeout of the group; in the second case the group cannot be used again.
    """
    group = group_of(axis)
    _guarded.append(group)
    try:
        yield
    except Exception as error:
        # An error that all ranks share already must not be sent again: no other rank would answer.
        if group.group_name not in getattr(error, "agreed_on", ()):
            exchange(group, "an error", error)
        raise
    else:
        exchange(group, "the end of `together`", None)
    finally:
        _guarded.remove(group)


def agree(group: ProcessGroup, what: str) -> None:
    """Inside of `together`, raise unless all ranks of a group have come to the same collective."""
    if group in _guarded:
        exchange(group, what, None)


_rounds_differently: weakref.WeakKeyDictionary[ProcessGroup, bool] = weakref.WeakKeyDictionary()


def rounds_differently(group: ProcessGroup) -> bool:
    """Return whether the machines of a group may round the same operations differently; asked once of each group."""
    if group not in _rounds_differently:
        agree(group, "the first collective of a group")
        told: list[object] = [None] * c10d.get_world_size(group)
        with _switches.unobserved(), broken_by(group, "the first collective of a group"):
            c10d.all_gather_object(told, rounding_of_machine(), group=host_group(group))
        # Sums on a GPU may round differently each time.
        _rounds_differently[group] = len(told) > 1 and (len(set(told)) > 1 or "cuda" in str(told[0]))
    return _rounds_differently[group]


def exchange(group: ProcessGroup, what: str, error: Exception | None) -> None:
    """Raise on all ranks of a group if a rank has an error, or if the ranks differ in `what`."""
    with _switches.unobserved():
        control = host_group(group)
        # A checksum of 32 bits, so that both signs fit an int64.
        code = zlib.crc32(what.encode())
        # One maximum gives both ends: `most` is the largest code, and `least` is minus the smallest.
        header = torch.tensor([error is not None, code, -code])
        with broken_by(group, what, error):
            c10d.all_reduce(header, op=c10d.ReduceOp.MAX, group=control)
        has_failed, most, least = header.tolist()
        if not has_failed and most == -least:
            return
        said: list[tuple[bytes | None, str]] = [(None, "")] * c10d.get_world_size(group)
        with broken_by(group, what, error):
            c10d.all_gather_object(said, (None if error is None else _pickled(error), what), group=control)
    found = _agreed(_of_all(said, c10d.get_rank(group), error), group)
    try:
        if found is error:
            raise found
        raise found from error
    finally:
        # A frame that holds its own error is a cycle, which would keep the group alive.
        del found, error


def _of_all(said: list[tuple[bytes | None, str]], rank: int, own: Exception | None) -> Exception:
    """Return the error that all ranks raise, from what each rank said."""
    failed = {r: parcel for r, (parcel, _) in enumerate(said) if parcel is not None}
    if not failed:
        return RankError(_differences([what for _, what in said]))
    # The pickles come from processes of the same program.
    errors: dict[int, Exception] = {r: pickle.loads(parcel) for r, parcel in failed.items()}
    # An error that cannot be pickled must be of the same type on its own rank as on the others.
    if own is not None and type(errors[rank]) is type(own):
        errors[rank] = own
    error = errors[min(errors)]
    lanes = [e for e in errors.values() if isinstance(e, ConvergenceError)]
    # Each rank knows its own lanes alone.
    if 1 < len(lanes) == len(errors) and len({e.solver for e in lanes}) == 1:
        error = ConvergenceError.of_all(lanes)
    error.add_note(f"raised on ranks {sorted(errors)} of {len(said)}")
    return error


def _differences(said: list[str]) -> str:
    """Return how the ranks differ: what all said first, and of the rest what not all said."""
    (first, *_), *others = parts = [what.split("; ") for what in said]
    common = set(parts[0]).intersection(*others)
    own = "; ".join(f"rank {r}: {', '.join(p for p in each if p not in common)}" for r, each in enumerate(parts))
    return f"{first} ({own})" if first in common else f"the ranks came to different points ({own})"


def _pickled(error: Exception) -> bytes:
    """Return an error as a pickle; of an error that cannot be restored from its pickle, type and text remain."""
    try:
        parcel = pickle.dumps(error)
        pickle.loads(parcel)
    except Exception:
        parcel = pickle.dumps(RankError(f"{type(error).__name__}: {error}"))
    return parcel


@contextmanager
def broken_by(group: ProcessGroup, what: str, cause: Exception | None = None) -> Iterator[None]:
    """Raise `RankError` if a collective in the body fails, as where a rank has ended."""
    try:
        yield
    except RuntimeError as error:
        reason = (
            "a rank of the group has ended, or has not come to this point within the group's timeout; the group cannot "
            f"be used again ({str(error)[:200]})"
        )
        raise _agreed(RankError(f"{what.partition('; ')[0]}: {reason}"), group) from (cause or error)
    finally:
        del cause


def _agreed(error: Exception, group: ProcessGroup) -> Exception:
    """Mark an error as one that all ranks of a group have, so that an outer `together` does not exchange it again."""
    error.agreed_on = (*getattr(error, "agreed_on", ()), group.group_name)  # type: ignore[attr-defined]
    return error
