"""One call of a module's ``solve``, posed as a root problem of pure functions.

The residuals ``F(x, theta)`` of the module's ``optimality`` are evaluated on a twin of the module, through
`torch.func.functional_call`: ``x`` are the inner parameters, and ``theta`` are the arguments of the call and all
tensors that the twin reads otherwise. `pose` captures ``theta`` and attaches the implicit derivative to the solution.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.compile as _compile
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
import implicitdiff._torch.trees as pytree
from implicitdiff._closures.signature import Matcher
from implicitdiff._implicit.root import root_at, root_form
from implicitdiff._implicit.solver_body import run_solver
from implicitdiff._torch.slots import ParameterSlot
from implicitdiff._torch.trees import Tree
from implicitdiff.linear_solve.auto import solve_auto

Module: TypeAlias = Any
"""An `ImplicitMetaGradientModule`, whose file imports this one."""
ModuleMethod: TypeAlias = Callable[..., Any]
"""A method that a user defines."""


def call_method(module: nn.Module, method: str, held: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
    """Call a method of a module with parameters temporarily replaced, by `torch.func.functional_call`."""
    tensors = {f"module.{name}": tensor for name, tensor in held.items()}
    return torch.func.functional_call(_Method(module, method), tensors, args, kwargs)


class _Method(nn.Module):
    """A module whose ``forward`` is a method of another: `functional_call` calls ``forward`` alone."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (function := self.module.__dict__.get("_functions", {}).get(self.method)) is not None:
            return function(self.module, *args, **kwargs)
        return getattr(self.module, self.method)(*args, **kwargs)


@_compile.outside_compile
@_modes.one_operation
def solve_implicitly(
    module: Module,
    method: ModuleMethod,
    condition: ModuleMethod,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module's ``solve``, and attach implicit derivatives to its inner parameters.

    Args:
        module: the module.
        method: the user's ``solve``.
        condition: ``objective`` or ``optimality`` of the class, with the arguments of `method`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    module._refuse_exchanged()
    method, kwargs = _bind_options(method, condition, kwargs)
    # Solutions of the last call, which an error puts back. `_restore_leaves` replaces them by leaves to solve for.
    before = {name: slot.tensor for name, slot in module._inner_slots().items()}
    module._restore_leaves()
    begun = module._inner_slots()
    # Inner parameters that require a gradient are the unknowns, the others constants.
    values = {name: slot.tensor.detach().clone() for name, slot in begun.items() if slot.tensor.requires_grad}
    if not values:
        raise ValueError(
            f"{type(module).__name__}.solve: the module has no inner parameters; create the parameters to be solved "
            "for in __init__"
        )
    _keep_leaves(module, {name: begun[name] for name in values})
    try:
        return _ModuleProblem(module, method, condition, values)(args, kwargs)
    except BaseException:
        # Restore values and slots: after an error the module is as before.
        with _switches.no_levels(), torch.no_grad():
            for name in [name for name in values if _levels.is_plain(begun[name].tensor)]:
                begun[name].tensor.copy_(_levels.base(values[name]))
        for name, slot in begun.items():
            slot.put(before[name])
        raise


def _keep_leaves(module: Module, slots: dict[str, ParameterSlot]) -> None:
    """Keep leaves on the module for the next call."""
    module._leaves.update({name: slot.tensor for name, slot in slots.items() if outlasts_call(slot.tensor)})


def outlasts_call(tensor: torch.Tensor) -> bool:
    """False for tensors of a transform or a trace, which end with it."""
    return _levels.is_plain(tensor) and not _modes.is_traced()


def _bind_options(
    method: ModuleMethod, condition: ModuleMethod, kwargs: dict[str, Any]
) -> tuple[ModuleMethod, dict[str, Any]]:
    """Bind keyword arguments of the method that the condition does not take. Return the method and the rest."""
    known, mine = (inspect.signature(fn).parameters for fn in (condition, method))
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return method, kwargs
    none = inspect.Parameter.empty
    options = {k: v for k, v in kwargs.items() if k not in known and k in mine and mine[k].default is not none}
    return functools.partial(method, **options), {k: v for k, v in kwargs.items() if k not in options}


class _ModuleProblem:
    """One call of ``solve``.

    Attributes:
        module: the module.
        method: the user's ``solve``.
        condition: ``objective`` or ``optimality``.
        values: initial values of the unknowns, by name.
        twin: a copy of the module with shared tensors, for the evaluation of residuals.
        output: the result of `method`.
    """

    def __init__(
        self,
        module: Module,
        method: ModuleMethod,
        condition: ModuleMethod,
        values: dict[str, torch.Tensor],
    ) -> None:
        self.module, self.method, self.condition, self.values = module, method, condition, values
        self.name = type(module).__name__
        # Residuals are evaluated in backward passes, so the graph holds the twin. With the module instead, which holds
        # the solution and thereby its graph, the cycle would run through C++ objects that Python's collector cannot
        # see.
        self.twin: Module = object.__new__(type(module))
        self.output: Tree = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The initial values stand for `self` in the signature, so that their matching to arguments is that of any
        # solver.
        def run(values: Tree, /, *args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        # Without a reference to the module, see `twin`.
        residuals = functools.partial(_residuals, self.name, self.twin)
        run.__signature__ = _without_self(self.method)  # type: ignore[attr-defined]
        run.__qualname__ = f"{self.name}.solve"
        call = Matcher(run, self.condition).bind((self.values, *args), kwargs)
        # The user's ``solve`` may call ``backward``, which adds to the gradients of the meta-parameters.
        with _gradients_restored(self.module.meta_parameters()):
            solution, _, derived = run_solver(run, call, has_aux=False)
        routed = call.to_condition(call.args, call.kwargs)
        solve = type(self.module).linear_solve or solve_auto()
        root = root_at(f"{self.name}.optimality", residuals, root_form, solve, solution, *routed)
        root.refuse_solver_caches(derived)
        _drop_unused(self.twin, root.theta)
        slots = self._slots()
        _refuse_captured(self.name, slots, root.theta)
        attached = root.attached()
        known = {id(slot.tensor): slot.tensor for slot in slots.values()}
        # Without a tracked operand the solution has no derivative, and the parameters remain leaves.
        if any(tensor.requires_grad or not _levels.is_plain(tensor) for tensor in attached.values()):
            _keep_leaves(self.module, slots)
            for name, slot in slots.items():
                slot.put(attached[name])
                known[id(slot.tensor)] = attached[name]
        # Tensors of the output that are inner parameters are returned with derivatives, others detached.
        return pytree.map_tensors(lambda t: known.get(id(t), t.detach()), self.output)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.module._is_solving = True
        try:
            self.output = self.method(self.module, *args, **kwargs)
        finally:
            self.module._is_solving = False
        # The twin is filled after the user's solve, with buffers and attributes as `solve` left them.
        _fill_twin(self.twin, self.module, {})
        self.twin._unknowns = list(self.values)
        # Functions instead of bound methods, which would refer to the module and close the cycle again.
        methods = {name: getattr(self.module, name) for name in ("objective", "optimality")}
        self.twin._functions = {name: m.__func__ for name, m in methods.items() if inspect.ismethod(m)}
        return {name: slot.tensor.detach().clone() for name, slot in self._slots().items()}

    def _slots(self) -> dict[str, ParameterSlot]:
        slots = self.module._inner_slots()
        if missing := self.values.keys() - slots.keys():
            raise ValueError(
                f"{self.name}.solve: the module has lost its inner parameter {min(missing)!r} in solve; write values "
                "into it instead of deleting it"
            )
        return {name: slots[name] for name in self.values}


@contextmanager
def _gradients_restored(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore ``.grad`` of leaves at exit, whatever ``backward`` and ``zero_grad`` did in the body."""
    leaves = [t for t in tensors if t.is_leaf and _levels.is_plain(t)]
    before = [(leaf, grad, grad.detach().clone(), grad._version) for leaf in leaves if (grad := leaf.grad) is not None]
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.grad = None
        for leaf, grad, value, version in before:
            # `backward` adds in place to an existing .grad; `zero_grad` replaces it by None or fills it with zeros.
            if grad._version != version:
                grad.detach().copy_(value)
            leaf.grad = grad


def _without_self(method: ModuleMethod) -> inspect.Signature:
    """Return the signature of a method with ``self`` positional-only: the solution takes this position."""
    signature = inspect.signature(method)
    first, *others = signature.parameters.values()
    return signature.replace(parameters=[first.replace(kind=inspect.Parameter.POSITIONAL_ONLY), *others])


def _residuals(name: str, twin: Module, solution: dict[str, torch.Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """Evaluate ``optimality`` at inner parameters, as a dictionary by name."""
    found = call_method(twin, "optimality", solution, args, kwargs)
    # Forms that ``optimality`` may return: one tensor, a sequence, or a dictionary by name.
    if isinstance(found, torch.Tensor):
        found = (found,)
    if not isinstance(found, dict):
        found = tuple(found)
        if len(found) != len(solution):
            raise ValueError(
                f"{name}.optimality: must return one residual for each of the inner parameters {list(solution)}, got "
                f"{len(found)}"
            )
        found = dict(zip(solution, found, strict=True))
    return found


def _fill_twin(twin: nn.Module, module: nn.Module, twins: dict[int, nn.Module]) -> None:
    """Make an empty object a copy of a module that shares all tensors and attributes, with copies of submodules.

    `twins` maps ids of copied modules to copies, so that shared submodules stay shared.
    """
    twins[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    # `functional_call` exchanges entries of these dictionaries, so the twin has dictionaries of its own.
    twin.__dict__.update(_parameters=dict(module._parameters), _buffers=dict(module._buffers))
    twin._modules = {}
    for name, part in module._modules.items():
        # A module that is registered twice has one twin; a cycle ends here too.
        if part is not None and id(part) not in twins:
            _fill_twin(object.__new__(type(part)), part, twins)
        twin._modules[name] = None if part is None else twins[id(part)]


def _drop_unused(twin: nn.Module, used: list[torch.Tensor]) -> None:
    """Delete attributes of the twin that are unused tensors with history.

    For example, the loss of the last iteration would keep a graph alive.
    """
    kept = set(map(id, used))
    for part in twin.modules():
        held = {name: value for name, value in vars(part).items() if isinstance(value, torch.Tensor)}
        for name in [name for name, t in held.items() if t.grad_fn is not None and id(t) not in kept]:
            del vars(part)[name]


def _refuse_captured(name: str, slots: dict[str, ParameterSlot], theta: list[torch.Tensor]) -> None:
    """Raise if the residuals captured an inner parameter as a constant."""
    # An inner parameter among the operands was captured by identity, so the residuals do not see its replacement.
    captured = set(map(id, theta))
    if keys := [key for key, slot in slots.items() if id(slot.tensor) in captured]:
        raise ValueError(
            f"{name}.optimality: the inner parameter {keys[0]!r} is not read as an attribute of the module, but "
            "through a list or a function that holds the parameter, its module or self, or through a module that "
            "torch.compile made; the derivative would be wrong: read an attribute (an nn.ModuleList holds modules)"
        )
