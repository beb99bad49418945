"""Extract, restore, detach and clone the state of modules and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.slots import ParameterSlot, buffers_of, listed_parameters_of, parameters_of
from implicitdiff._torch.trees import Tree
from implicitdiff.objects._check import is_shaped_like
from implicitdiff.objects.func_optimizer import FuncOptimizer
from implicitdiff.objects.meta_optimizer import MetaOptimizer

By = Literal["reference", "copy", "deepcopy"]
Replicate = Callable[[torch.Tensor], torch.Tensor]

_OPTIMIZERS = (MetaOptimizer, FuncOptimizer)


class ModuleState(NamedTuple):
    """The tensors of a module.

    Attributes:
        params: parameters by name, tied ones once; of an `implicitdiff.nn.MetaGradientModule`, the inner parameters.
        buffers: buffers by name.
    """

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def extract_state_dict(
    target: Tree,
    *,
    by: By = "reference",
    device: torch.device | str | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
) -> Tree:
    """Return the state of a module, a meta-optimizer or a pytree, for `recover_state_dict`.

    Args:
        target: an ``nn.Module``, a `MetaOptimizer` or `FuncOptimizer`, or a pytree of tensors.
        by: ``"reference"`` returns the tensors themselves; ``"copy"`` clones within the graph, so that results of
            clones are differentiable in the originals; ``"deepcopy"`` clones into leaves, with ``requires_grad`` and
            the type ``nn.Parameter`` of the originals. Buffers are always cloned, since layers such as batch
            normalisation overwrite them.
        device: device of the state; None: that of each tensor.
        with_buffers: include the buffers of a module.
        detach_buffers: clone buffers without history, for every `by`.

    Returns:
        A `ModuleState` for a module, otherwise a tree like the state of the optimizer, or like `target`.

    Raises:
        ValueError: `by` is not one of the three strings.
        TypeError: `target` contains an object with a ``state_dict``, such as a module in a list.

    Example:
        >>> import torch
        >>> from implicitdiff import MetaSGD, extract_state_dict, recover_state_dict
        >>> net = torch.nn.Linear(2, 1)
        >>> inner, start = MetaSGD(net, lr=0.1), extract_state_dict(net)
        >>> inner.step(net(torch.ones(1, 2)).sum())
        >>> recover_state_dict(net, start)
        >>> net.weight is start.params["weight"]
        True
    """
    replicate = _replicator("extract_state_dict", by, device)
    if isinstance(target, nn.Module):
        # Buffers by reference would change with the module, so `by="reference"` clones them within the graph.
        keep = _replicator("extract_state_dict", "deepcopy" if detach_buffers or by == "deepcopy" else "copy", device)
        buffers = buffers_of(target) if with_buffers else {}
        return ModuleState(
            {name: replicate(slot.tensor) for name, slot in listed_parameters_of(target).items()},
            {name: keep(slot.tensor) for name, slot in buffers.items()},
        )
    return pytree.map_tensors(replicate, _tensor_tree("extract_state_dict", target))


def recover_state_dict(target: Tree, state: Tree) -> None:
    """Restore a state of a module, a meta-optimizer, or a tree of dictionaries and lists.

    No tensor is overwritten: afterwards the target holds the tensors of the state, and clones of its buffers. A
    state can be restored any number of times, and results computed in between keep their graph.

    Args:
        target: the object of `extract_state_dict`, or one with equal parameters.
        state: the result of `extract_state_dict`. Without buffers, the buffers of the target do not change.

    Raises:
        ValueError: the state does not fit. Nothing is changed then.
        TypeError: the tree holds a tensor in a tuple, which is immutable; or as `extract_state_dict` does.
    """
    if isinstance(target, _OPTIMIZERS):
        target.load_state_dict(state)
    elif isinstance(target, nn.Module):
        _recover_module(target, state)
    else:
        # The whole tree is compared before the first write.
        if not is_shaped_like(state, _tensor_tree("recover_state_dict", target)):
            raise ValueError(
                f"recover_state_dict: the given state does not fit this target: expected {pytree.describe(target)}, "
                f"got {pytree.describe(state)}"
            )
        for container, key, tensor in _assignments(target, state):
            container[key] = tensor


def stop_gradient(target: Tree) -> None:
    """Detach tensors in place: those of a module, of the state of an optimizer, or of a pytree.

    Tensors with history become leaves that require a gradient; the state of an optimizer becomes constant. Other
    references to the tensors, such as a state extracted by reference, are detached as well. Differentiate earlier
    results before the call: afterwards torch raises where a derivative needs the values of the tensors.

    Raises:
        ValueError: a tensor is a view, which torch cannot detach in place. Nothing is changed then.
        TypeError: as `extract_state_dict` does.

    Example:
        >>> import torch
        >>> from implicitdiff import MetaSGD, stop_gradient
        >>> net = torch.nn.Linear(2, 1)
        >>> inner = MetaSGD(net, lr=0.1)
        >>> inner.step(net(torch.ones(1, 2)).sum())
        >>> stop_gradient(net)
        >>> net.weight.is_leaf, net.weight.requires_grad
        (True, True)
    """
    if isinstance(target, nn.Module):
        slots = [*listed_parameters_of(target).values(), *buffers_of(target).values()]
        tensors = [slot.tensor for slot in slots]
    else:
        tensors = pytree.tensors(_tensor_tree("stop_gradient", target))
    attached = [t for t in tensors if t.grad_fn is not None]
    if views := [t for t in attached if t._is_view()]:
        raise ValueError(
            f"stop_gradient: a tensor of shape {list(views[0].shape)} is a view of another tensor, which torch cannot "
            "detach in place; use tensor.detach()"
        )
    for tensor in attached:
        # Moments of an optimizer are constants of the next run, parameters its unknowns.
        tensor.detach_().requires_grad_(not isinstance(target, _OPTIMIZERS))


def module_clone(
    target: Tree,
    *,
    by: By = "reference",
    device: torch.device | str | None = None,
    detach_buffers: bool = False,
) -> Tree:
    """Return another module, optimizer or tree with the tensors of `target`, or clones of them.

    Unlike ``copy.deepcopy``, the clone works for parameters with history, and can keep it. Tied parameters stay tied,
    and meta-parameters are shared. The clone of a `MetaOptimizer` has a clone of the module at ``.module``.

    Args:
        target: an ``nn.Module``, a `MetaOptimizer` or `FuncOptimizer`, or a pytree of tensors.
        by: see `extract_state_dict`.
        device: see `extract_state_dict`.
        detach_buffers: see `extract_state_dict`.

    Raises:
        ValueError: `by` is not one of the three strings.
        TypeError: as `extract_state_dict` does.
    """
    if isinstance(target, _OPTIMIZERS):
        state = extract_state_dict(target, by=by, device=device)
        twin = copy.copy(target)
        if isinstance(twin, MetaOptimizer):
            twin.module = module_clone(twin.module, by=by, device=device, detach_buffers=detach_buffers)
        twin.load_state_dict(state)
        return twin
    state = extract_state_dict(target, by=by, device=device, detach_buffers=detach_buffers)
    if not isinstance(target, nn.Module):
        return state
    slots = [*parameters_of(target).values(), *buffers_of(target).values()]
    # A memo of `deepcopy` that maps each tensor to itself: the copy shares tensors, and history is no obstacle.
    module = copy.deepcopy(target, {id(slot.tensor): slot.tensor for slot in slots})
    _recover_module(module, state)
    return module


def _tensor_tree(name: str, target: Tree) -> Tree:
    """Return the state of an optimizer, or the given tree, checked for leaves with a state of their own."""
    if isinstance(target, _OPTIMIZERS):
        return target.state_dict()
    # A module in a list is a leaf without tensors for a pytree, and would be ignored silently.
    if kinds := [type(leaf).__name__ for leaf in pytree.leaves_of(target)[0] if hasattr(leaf, "state_dict")]:
        raise TypeError(
            f"{name}: a tree must hold tensors, got {kinds[0]}; pass a module or a meta-optimizer by itself"
        )
    return target


def _replicator(name: str, by: By, device: torch.device | str | None) -> Replicate:
    if by not in get_args(By):
        raise ValueError(f"{name}: by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}")
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replicate(tensor: torch.Tensor) -> torch.Tensor:
        # One replica for a tensor, however often the target holds it. The original is kept alive, for its id.
        if id(tensor) not in known:
            known[id(tensor)] = tensor, replicas[by](tensor)
        return known[id(tensor)][1]

    replicas: dict[By, Replicate] = {
        "reference": lambda t: t.to(device),
        "copy": lambda t: t.clone().to(device),
        "deepcopy": lambda t: _deep_copy(t, device),
    }
    return replicate


def _deep_copy(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    # `copy.deepcopy` refuses a tensor with history.
    value = tensor.detach().clone().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value.requires_grad_(tensor.requires_grad)


def _recover_module(module: nn.Module, state: Tree) -> None:
    if not isinstance(state, ModuleState):
        raise ValueError(
            "recover_state_dict: state must be a ModuleState, the result of extract_state_dict, got "
            f"{type(state).__name__}"
        )
    slots = listed_parameters_of(module)
    kept = buffers_of(module) if state.buffers else {}
    # Both checks precede the first write. Buffers are cloned, since the module may overwrite them.
    _check_fit("parameters", slots, state.params)
    _check_fit("buffers", kept, state.buffers)
    buffers = [(slot, state.buffers[name].clone()) for name, slot in kept.items()]
    for slot, tensor in [*buffers, *((slot, state.params[name]) for name, slot in slots.items())]:
        slot.put(tensor)


def _check_fit(what: str, slots: dict[str, ParameterSlot], state: dict[str, torch.Tensor]) -> None:
    mine = {name: list(slot.tensor.shape) for name, slot in slots.items()}
    theirs = {name: list(tensor.shape) for name, tensor in state.items()}
    if mine != theirs:
        odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise ValueError(
            f"recover_state_dict: the {what} of the state are not those of the module: {odd[0]!r} has the shape "
            f"{mine.get(odd[0], 'of nothing')} in the module and {theirs.get(odd[0], 'of nothing')} in the state"
        )


def _assignments(target: Tree, state: Tree) -> list[tuple[Any, Any, torch.Tensor]]:
    """Return (container, key, new tensor) for each tensor in dictionaries and lists of the target."""
    entries = [*_children_of(target)]
    keys = [key for key, entry in entries if isinstance(entry, torch.Tensor)]
    if keys and not isinstance(target, (dict, list)):
        raise TypeError(
            f"recover_state_dict: a tensor in a {type(target).__name__} cannot be replaced; use the extracted state "
            "itself, or keep tensors in dictionaries and lists"
        )
    # Collected first and written by the caller, so that an error leaves the target unchanged.
    here = [(target, key, state[key]) for key in keys]
    below = [(entry, state[key]) for key, entry in entries if not isinstance(entry, torch.Tensor)]
    return here + [assignment for pair in below for assignment in _assignments(*pair)]


def _children_of(target: Tree) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a dictionary, list or tuple by key, and of any other object its tensors."""
    if isinstance(target, dict):
        return target.items()
    return enumerate(target if isinstance(target, (list, tuple)) else pytree.tensors(target))
