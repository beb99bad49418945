"""Process groups: which one an axis names, and what their ranks have in common."""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Iterable
from typing import TypeAlias

import torch
import torch.distributed as c10d
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

# torch imports this at the first derivative. Its functions have the group of all ranks as a default, from the time of
# the import: an import that follows `init_process_group` keeps the group alive, and may abort the process at its end.
import torch.distributed.nn.functional  # isort: skip

Axis: TypeAlias = ProcessGroup | DeviceMesh | tuple[DeviceMesh, str | int] | None
"""The ranks that take part: None for all, a process group, a mesh of one dimension, or a mesh and its dimension."""

_HOST_GROUPS: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()


def group_of(axis: Axis) -> ProcessGroup:
    """Return the process group that an axis names; this process must be one of its ranks."""
    if not (c10d.is_available() and c10d.is_initialized()):
        raise RuntimeError(
            "implicitdiff.distributed needs a process group: call torch.distributed.init_process_group first, in "
            "processes that torchrun started"
        )
    group = _named_by(axis)
    # torch returns -1 for a process outside of the group.
    if not isinstance(group, ProcessGroup) or c10d.get_rank(group) < 0:
        raise ValueError(f"axis: this process is not a rank of the group {axis!r}; call the function on its ranks only")
    return group


def _named_by(axis: Axis) -> object:
    if axis is None:
        return c10d.group.WORLD
    if isinstance(axis, tuple) and len(axis) == 2 and isinstance(axis[0], DeviceMesh):
        return axis[0].get_group(axis[1])
    if isinstance(axis, DeviceMesh):
        if axis.ndim != 1:
            raise ValueError(
                f"axis: a mesh of {axis.ndim} dimensions names no single group; pass (mesh, dimension), for example "
                f"(mesh, {(axis.mesh_dim_names or (0,))[0]!r})"
            )
        return axis.get_group()
    if isinstance(axis, ProcessGroup) or axis is c10d.GroupMember.NON_GROUP_MEMBER:
        return axis
    raise TypeError(
        f"axis must be None, a ProcessGroup, a DeviceMesh of one dimension, or (mesh, dimension); got {axis!r}"
    )


def host_group(group: ProcessGroup) -> ProcessGroup:
    """Return a group of the same ranks that sends tensors in the memory of the CPU; all ranks call at once."""
    if "cpu:gloo" in c10d.get_backend_config(group):
        return group
    if group not in _HOST_GROUPS:
        ranks = c10d.get_process_group_ranks(group)
        # Without local synchronisation all processes would have to call, and not the ranks of the group alone.
        _HOST_GROUPS[group] = c10d.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _HOST_GROUPS[group]


def rounding_of_machine() -> tuple[str, ...]:
    """Return what decides how this machine rounds: the same operations on the same numbers, where all of it is the
    same, have the same bits."""
    capability = torch.backends.cpu.get_cpu_capability()
    devices = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    # Both change the order in which MKL and threads add.
    kernels = [os.environ.get("MKL_CBWR", ""), str(torch.get_num_threads())]
    return (torch.__version__, _processor(), capability, *kernels, *(f"cuda {name}" for name in devices))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def numbers_of_ranks(numbers: Iterable[int], group: ProcessGroup) -> list[list[int]]:
    """Return the numbers of each rank of a group, as many on all."""
    own = torch.tensor([*numbers])
    found = [torch.empty_like(own) for _ in range(c10d.get_world_size(group))]
    c10d.all_gather(found, own, group=host_group(group))
    return [t.tolist() for t in found]
