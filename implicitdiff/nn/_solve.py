"""One call of a module's ``solve``: what it solves, as a root problem of pure functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as _functorch
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.signature import Matcher
from implicitdiff._implicit.root import pose, root
from implicitdiff._implicit.solver_body import run_solver
from implicitdiff._torch.slots import Place
from implicitdiff.linear_solve.auto import solve_auto

Module = Any
"""An `ImplicitMetaGradientModule`."""


def call(module: nn.Module, method: str, held: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """The result of a method of a module that holds other tensors for the time."""
    tensors = {f"module.{name}": tensor for name, tensor in held.items()}
    return torch.func.functional_call(_Method(module, method), tensors, args, kwargs)


class _Method(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (function := self.module.__dict__.get("_functions", {}).get(self.method)) is not None:
            return function(self.module, *args, **kwargs)
        return getattr(self.module, self.method)(*args, **kwargs)


@_functorch.outside_compile
@_modes.one_operation
def solve(
    module: Module,
    method: Callable[..., Any],
    condition: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a module's method that solves, and give its inner parameters their derivatives.

    Args:
        module: the module.
        method: its ``solve``, as the user wrote it.
        condition: its ``objective`` or ``optimality``, whose arguments those of `method` have to be.
        args: of the call.
        kwargs: of the call.
    """
    module._refuse_exchanged()
    method, kwargs = _with_options(method, condition, kwargs)
    before = {name: place.tensor for name, place in module._inner_places().items()}
    module._reopen()
    begun = module._inner_places()
    values = {name: place.tensor.detach().clone() for name, place in begun.items() if place.tensor.requires_grad}
    if not values:
        raise ValueError(
            f"{type(module).__name__}.solve: there are no inner parameters: make those to be solved for in __init__"
        )
    for name in values:
        if _functorch.is_plain(begun[name].tensor) and not _modes.is_traced():
            module._leaves[name] = begun[name].tensor
    try:
        return _Problem(module, method, condition, values)(args, kwargs)
    except BaseException:
        with _functorch.no_levels(), torch.no_grad():
            for name in values:
                if _functorch.is_plain(begun[name].tensor):
                    begun[name].tensor.copy_(_functorch.base(values[name]))
        for name, place in begun.items():
            place.put(before[name])
        raise


def _with_options(
    method: Callable[..., Any], condition: Callable[..., Any], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The method with those of its arguments that are no business of the condition, and the others."""
    known, mine = (inspect.signature(fn).parameters for fn in (condition, method))
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return method, kwargs
    none = inspect.Parameter.empty
    options = {k: v for k, v in kwargs.items() if k not in known and k in mine and mine[k].default is not none}
    return functools.partial(method, **options), {k: v for k, v in kwargs.items() if k not in options}


class _Problem:
    """One call of ``solve``: as a solver of the problem that its module poses, for `pose`."""

    def __init__(
        self,
        module: Module,
        method: Callable[..., Any],
        condition: Callable[..., Any],
        values: dict[str, torch.Tensor],
    ) -> None:
        self.module, self.method, self.condition, self.values = module, method, condition, values
        self.name = type(module).__name__
        # The graph must not lead back to the module, which holds what the graph made: a cycle that nothing collects.
        self.twin: Module = object.__new__(type(module))
        self.output: Any = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def run(values: Any, /, *args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        residuals = functools.partial(_residuals, self.name, self.twin)
        run.__signature__ = _without_self(self.method)  # type: ignore[attr-defined]
        run.__qualname__ = f"{self.name}.solve"
        call = Matcher(run, self.condition).bind((self.values, *args), kwargs)
        with _gradients_kept(self.module.meta_parameters()):
            solution, _, derived = run_solver(run, call, has_aux=False)
        routed = call.to_condition(call.args, call.kwargs)
        solve = type(self.module).linear_solve or solve_auto()
        posed = pose(f"{self.name}.optimality", residuals, root, solve, solution, *routed)
        posed.refuse_kept(derived)
        _forget_unused(self.twin, posed.theta)
        places = self._places()
        _refuse_read_otherwise(self.name, places, posed.theta)
        attached = posed.attached()
        known = {id(place.tensor): place.tensor for place in places.values()}
        if any(tensor.requires_grad or not _functorch.is_plain(tensor) for tensor in attached.values()):
            for name, place in places.items():
                if _functorch.is_plain(place.tensor) and not _modes.is_traced():
                    self.module._leaves[name] = place.tensor
                place.put(attached[name])
                known[id(place.tensor)] = attached[name]
        return pytree.map_tensors(lambda t: known[id(t)] if id(t) in known else t.detach(), self.output)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.module._is_solving = True
        try:
            self.output = self.method(self.module, *args, **kwargs)
        finally:
            self.module._is_solving = False
        _become(self.twin, self.module, {})
        self.twin._unknowns = list(self.values)
        # As functions, not as methods, which would hold the twin.
        methods = {name: getattr(self.module, name) for name in ("objective", "optimality")}
        self.twin._functions = {name: m.__func__ for name, m in methods.items() if inspect.ismethod(m)}
        return {name: place.tensor.detach().clone() for name, place in self._places().items()}

    def _places(self) -> dict[str, Place]:
        places = self.module._inner_places()
        if missing := self.values.keys() - places.keys():
            raise ValueError(f"{self.name}.solve: the inner parameter {min(missing)!r} is gone after it")
        return {name: places[name] for name in self.values}


@contextmanager
def _gradients_kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take back what `torch.autograd.backward` accumulates into leaves, and what `zero_grad` drops."""
    leaves = [t for t in tensors if t.is_leaf and _functorch.is_plain(t)]
    before = [(leaf, grad, grad.detach().clone(), grad._version) for leaf in leaves if (grad := leaf.grad) is not None]
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.grad = None
        for leaf, grad, value, version in before:
            if grad._version != version:
                grad.detach().copy_(value)
            leaf.grad = grad


def _without_self(method: Callable[..., Any]) -> inspect.Signature:
    """A method's signature, with the solution in the place of ``self``."""
    signature = inspect.signature(method)
    first, *others = signature.parameters.values()
    return signature.replace(parameters=[first.replace(kind=inspect.Parameter.POSITIONAL_ONLY), *others])


def _residuals(name: str, twin: Module, solution: Any, /, *args: Any, **kwargs: Any) -> Any:
    found = call(twin, "optimality", solution, args, kwargs)
    if isinstance(found, torch.Tensor):
        found = (found,)
    if not isinstance(found, dict):
        found = tuple(found)
        if len(found) != len(solution):
            raise ValueError(
                f"{name}.optimality: one residual for each of the inner parameters {list(solution)} is needed, got "
                f"{len(found)}"
            )
        found = dict(zip(solution, found, strict=True))
    return found


def _become(twin: nn.Module, module: nn.Module, twins: dict[int, nn.Module]) -> None:
    """Fill an empty module with what another one has, and with twins of its submodules in their places."""
    twins[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    twin._modules = {}
    for name, part in module._modules.items():
        if part is not None and id(part) not in twins:
            _become(object.__new__(type(part)), part, twins)
        twin._modules[name] = None if part is None else twins[id(part)]


def _forget_unused(twin: nn.Module, used: list[torch.Tensor]) -> None:
    """Drop tensors that a graph made and that the condition has not used: one may be the loss of the last round."""
    kept = set(map(id, used))
    for part in twin.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None and id(value) not in kept:
                del vars(part)[name]


def _refuse_read_otherwise(name: str, places: dict[str, Place], theta: list[torch.Tensor]) -> None:
    captured = set(map(id, theta))
    for key, place in places.items():
        if id(place.tensor) in captured:
            raise ValueError(
                f"{name}.optimality: the inner parameter {key!r} is read in another way than as an attribute of the "
                "module, such as a list or a function that holds it, its module, or self, or a module that "
                "torch.compile made; its derivative would be wrong: read it as an attribute (an nn.ModuleList holds "
                "modules)"
            )
