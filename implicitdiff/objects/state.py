"""Leave the state of a module or an optimizer, and come back to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

import implicitdiff._torch.trees as pytree
from implicitdiff._torch.slots import Place, buffers_of, listed_parameters_of, parameters_of
from implicitdiff.objects.func_optimizer import FuncOptimizer
from implicitdiff.objects.meta_optimizer import MetaOptimizer

By = Literal["reference", "copy", "deepcopy"]
Replicate = Callable[[torch.Tensor], torch.Tensor]

_OPTIMIZERS = (MetaOptimizer, FuncOptimizer)


class ModuleState(NamedTuple):
    """The tensors of a module.

    Attributes:
        params: its parameters by name, tied ones once; of an `implicitdiff.nn.MetaGradientModule` the inner ones.
        buffers: its buffers by name.
    """

    params: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def extract_state_dict(
    target: Any,
    *,
    by: By = "reference",
    device: torch.device | str | None = None,
    with_buffers: bool = True,
    detach_buffers: bool = False,
) -> Any:
    """The state of a module, of a meta-optimizer, or of a pytree, to come back to by `recover_state_dict`.

    Args:
        target: an ``nn.Module``, a `MetaOptimizer` or `FuncOptimizer`, or a pytree of tensors.
        by: ``"reference"`` takes the tensors themselves, ``"copy"`` clones them within the graph, so that what is
            computed from the clones is differentiable in the originals, and ``"deepcopy"`` clones them out of it:
            leaves, which need a gradient where the originals do, and are an ``nn.Parameter`` where these are.
            Buffers are cloned in any case: layers such as batch normalisation overwrite them.
        device: where the state shall be; None leaves each tensor where it is.
        with_buffers: whether a module's buffers are part of the state.
        detach_buffers: take buffers out of the graph whatever `by` says.

    Returns:
        A `ModuleState` for a module, else a tree like the optimizer's state or like `target`.

    Raises:
        ValueError: `by` is none of the three.
        TypeError: `target` is, or its leaves are, an object with a state of its own, such as a module in a list.

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
        keep = _replicator("extract_state_dict", "deepcopy" if detach_buffers or by == "deepcopy" else "copy", device)
        buffers = buffers_of(target) if with_buffers else {}
        return ModuleState(
            {name: replicate(place.tensor) for name, place in listed_parameters_of(target).items()},
            {name: keep(place.tensor) for name, place in buffers.items()},
        )
    return pytree.map_tensors(replicate, _tree("extract_state_dict", target))


def recover_state_dict(target: Any, state: Any) -> None:
    """Bring a module, a meta-optimizer, or a tree of dictionaries and lists back to a state.

    No tensor is overwritten: the target holds those of the state from then on, and clones of its buffers. So a state
    serves any number of times, and what was computed in between keeps its graph.

    Args:
        target: what the state was extracted from, or has the same parameters.
        state: what `extract_state_dict` gave; without buffers, the target's are left alone.

    Raises:
        ValueError: the state does not fit, and nothing is changed.
        TypeError: the tree holds a tensor in a tuple, which cannot be exchanged, or a leaf is as in
            `extract_state_dict`.
    """
    if isinstance(target, _OPTIMIZERS):
        target.load_state_dict(state)
    elif isinstance(target, nn.Module):
        _recover_module(target, state)
    else:
        leaves, structure = pytree.flatten(_tree("recover_state_dict", target))
        try:
            shapes = [t.shape for t in structure.tensors_of(state)]
        except ValueError:
            shapes = []
        if shapes != [t.shape for t in leaves]:
            raise ValueError(
                f"recover_state_dict: the state given is none of this target: expected {pytree.describe(target)}, got "
                f"{pytree.describe(state)}"
            )
        for container, key, tensor in _exchanges(target, state):
            container[key] = tensor


def stop_gradient(target: Any) -> None:
    """Cut tensors off the graph that made them, in place: those of a module, an optimizer's state, or a pytree.

    Afterwards they are leaves, which need a gradient if they did before, but for the moments of an optimizer, which
    need none. References to them elsewhere, such as a state extracted by reference, are cut off as well. Differentiate
    what was computed from them before: afterwards torch raises where a derivative needs their values.

    Raises:
        ValueError: a tensor is a view, which cannot be cut off in place; nothing is changed.
        TypeError: as for `extract_state_dict`.

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
        places = [*listed_parameters_of(target).values(), *buffers_of(target).values()]
        tensors = [place.tensor for place in places]
    else:
        tensors = pytree.tensors(_tree("stop_gradient", target))
    attached = [t for t in tensors if t.grad_fn is not None]
    if views := [t for t in attached if t._is_view()]:
        raise ValueError(
            f"stop_gradient: a tensor of shape {list(views[0].shape)} is a view of another one and cannot be cut off "
            "in place; use its detach()"
        )
    for tensor in attached:
        tensor.detach_().requires_grad_(not isinstance(target, _OPTIMIZERS))


def module_clone(
    target: Any,
    *,
    by: By = "reference",
    device: torch.device | str | None = None,
    detach_buffers: bool = False,
) -> Any:
    """Another module, optimizer or tree with the tensors of this one.

    A module whose parameters are in the middle of a graph can be cloned within it, unlike by ``copy.deepcopy``. Tied
    parameters stay tied, and meta-parameters are shared. The clone of a `MetaOptimizer` has a clone of its module, at
    ``.module``.

    Args:
        target: an ``nn.Module``, a `MetaOptimizer` or `FuncOptimizer`, or a pytree of tensors.
        by: see `extract_state_dict`.
        device: see `extract_state_dict`.
        detach_buffers: see `extract_state_dict`.

    Raises:
        ValueError: `by` is none of the three.
        TypeError: as for `extract_state_dict`.
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
    places = [*parameters_of(target).values(), *buffers_of(target).values()]
    module = copy.deepcopy(target, {id(place.tensor): place.tensor for place in places})
    _recover_module(module, state)
    return module


def _tree(name: str, target: Any) -> Any:
    """A tree of tensors, the state of an optimizer or what was given."""
    if isinstance(target, _OPTIMIZERS):
        return target.state_dict()
    for leaf in pytree.leaves_of(target)[0]:
        # It would pass through unseen.
        if hasattr(leaf, "state_dict"):
            kind = type(leaf).__name__
            raise TypeError(f"{name}: a {kind} is no tensor of a tree; pass a module or meta-optimizer by itself")
    return target


def _replicator(name: str, by: By, device: torch.device | str | None) -> Replicate:
    if by not in get_args(By):
        raise ValueError(f"{name}: by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}")
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replicate(tensor: torch.Tensor) -> torch.Tensor:
        # What is tied stays tied.
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
    value = tensor.detach().clone().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value.requires_grad_() if tensor.requires_grad else value


def _recover_module(module: nn.Module, state: Any) -> None:
    if not isinstance(state, ModuleState):
        raise ValueError(
            f"recover_state_dict: state must be a ModuleState that extract_state_dict gave, got {type(state).__name__}"
        )
    places = listed_parameters_of(module)
    _check_fit("parameters", places, state.params)
    if state.buffers:
        kept = buffers_of(module)
        _check_fit("buffers", kept, state.buffers)
        for name, place in kept.items():
            place.put(state.buffers[name].clone())
    for name, place in places.items():
        place.put(state.params[name])


def _check_fit(what: str, places: dict[str, Place], state: dict[str, torch.Tensor]) -> None:
    mine = {name: list(place.tensor.shape) for name, place in places.items()}
    theirs = {name: list(tensor.shape) for name, tensor in state.items()}
    if mine != theirs:
        odd = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        raise ValueError(
            f"recover_state_dict: the state's {what} are not the module's: {odd[0]!r} has the shape "
            f"{mine.get(odd[0], 'of nothing')} in the module and {theirs.get(odd[0], 'of nothing')} in the state"
        )


def _exchanges(target: Any, state: Any) -> list[tuple[Any, Any, torch.Tensor]]:
    """The entries of dictionaries and lists that hold a tensor, with what shall be there."""
    if not isinstance(target, (dict, list, tuple)):
        if pytree.tensors(target):
            raise _fixed(target)
        return []
    found = []
    for key in target if isinstance(target, dict) else range(len(target)):
        if not isinstance(target[key], torch.Tensor):
            found += _exchanges(target[key], state[key])
        elif isinstance(target, tuple):
            raise _fixed(target)
        else:
            found.append((target, key, state[key]))
    return found


def _fixed(target: Any) -> TypeError:
    return TypeError(
        f"recover_state_dict: a tensor in a {type(target).__name__} cannot be exchanged; use the extracted state "
        "itself, or keep tensors in dictionaries and lists"
    )
