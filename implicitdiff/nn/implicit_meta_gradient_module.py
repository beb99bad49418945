"""Modules whose inner parameters are the solution of a problem, and differentiable as such."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

import implicitdiff._functorch as _functorch
import implicitdiff._pytree as pytree
from implicitdiff._linear import Solve
from implicitdiff._places import Place
from implicitdiff._primitive import attach
from implicitdiff._root import pose, root
from implicitdiff._signature import Matcher
from implicitdiff.implicit import run_solver
from implicitdiff.nn.meta_gradient_module import MetaGradientModule

_INHERITED: Any = object()


class ImplicitMetaGradientModule(MetaGradientModule):
    r"""A module whose inner parameters solve a problem in its meta-parameters.

    The user writes ``solve``, which brings the inner parameters to a solution, in any way and in place, and says what
    a solution is: by ``objective``, the scalar that is least there, or by ``optimality``, the residuals that are zero
    there. With ``A = dF/dx`` of the residuals, after ``solve(...)`` the inner parameters are tensors with the
    derivative ``dx*/dtheta = -A^-1 dF/dtheta``, see `implicitdiff.custom_root`: in the meta-parameters, in the
    arguments of ``solve``, and in whatever else the residuals depend on, in any order. The next ``solve`` begins with
    their values.

    ``solve`` runs with gradients off (``torch.enable_grad`` turns them on for its own use) and on ordinary
    parameters; ``backward`` in it leaves no ``.grad`` on tensors that are not inner parameters. It is called with the
    arguments that ``objective`` or ``optimality`` is to be called with; those of its own have defaults. What it
    returns comes back detached, but for inner parameters, which come back as they are after it.

    Frozen inner parameters are constants. The inner parameters have to be read as attributes of the module and its
    submodules in ``objective`` and ``optimality``.

    Class arguments:
        linear_solve: solves the linear systems with ``A``, see `implicitdiff.linear_solve`; subclasses inherit it.

    Raises:
        TypeError: a class without ``solve``, or without both ``objective`` and ``optimality``, is instantiated; later,
            the arguments of a call of ``solve`` do not fit.
        ValueError: on a call of ``solve``: there are no inner parameters, the residuals are not like them, or read
            them in another way than as attributes. After an error in ``solve`` the module is as it was.
        LinearSolveError: in a derivative, if the linear solve fails.

    Reference:
        Rajeswaran et al., "Meta-Learning with Implicit Gradients", 2019; Ren et al., "TorchOpt: An Efficient Library
        for Differentiable Optimization", JMLR 2023, whose interface this is.

    Example:
        >>> import torch
        >>> from implicitdiff.nn import ImplicitMetaGradientModule
        >>> class Ridge(ImplicitMetaGradientModule):
        ...     def __init__(self, penalty):
        ...         super().__init__()
        ...         self.penalty = penalty
        ...         self.w = torch.nn.Parameter(torch.zeros(()))
        ...     def objective(self, x, y):
        ...         return ((x * self.w - y) ** 2).sum() + self.penalty * self.w**2
        ...     def solve(self, x, y):
        ...         optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        ...         for _ in range(100):
        ...             optimizer.zero_grad()
        ...             with torch.enable_grad():
        ...                 self.objective(x, y).backward(inputs=list(self.parameters()))
        ...             optimizer.step()
        ...         return self
        >>> penalty = torch.tensor(1.0, requires_grad=True)
        >>> x, y = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])
        >>> w = Ridge(penalty).solve(x, y).w  # sum(x y) / (sum(x^2) + penalty)
        >>> torch.autograd.grad(w, penalty)  # - sum(x y) / (sum(x^2) + penalty)^2
        (tensor(-0.3333),)
    """

    linear_solve: ClassVar[Solve | None] = None
    _leaves: dict[str, torch.Tensor]
    _unknowns: list[str] | None
    _is_solving: bool

    def __init_subclass__(cls, linear_solve: Solve | None = _INHERITED, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if linear_solve is not _INHERITED:
            if linear_solve is not None and not callable(linear_solve):
                raise TypeError(
                    f"{cls.__name__}: linear_solve must be a function solve(matvec, b), got "
                    f"{type(linear_solve).__name__}"
                )
            cls.linear_solve = None if linear_solve is None else staticmethod(linear_solve)
        if not getattr(cls.solve, "__isabstractmethod__", hasattr(cls.solve, "is_implicit")):
            cls.solve = _implicit(cls.solve)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base = ImplicitMetaGradientModule
        if type(self).optimality is base.optimality and type(self).objective is base.objective:
            raise TypeError(f"{type(self).__name__} defines neither objective() nor optimality(), and needs one")
        super().__init__(*args, **kwargs)
        self._leaves, self._unknowns, self._is_solving = {}, None, False

    @abc.abstractmethod
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Bring the inner parameters to a solution, in place; ``return self`` makes chaining easy."""

    def objective(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The scalar that the inner parameters make least, if there is one."""
        raise NotImplementedError(f"{type(self).__name__} does not define objective()")

    def optimality(self, *args: Any, **kwargs: Any) -> Any:
        """The residuals that are zero at a solution: here the gradient of `objective`.

        Returns:
            One tensor for each inner parameter that is not frozen, of its shape, in the order of ``parameters``; or a
            dictionary of these by name.
        """
        held = {name: place.tensor for name, place in self._inner_places().items() if self._is_unknown(name, place)}
        value = functools.partial(_called, self, "objective", args=args, kwargs=kwargs)
        return torch.func.grad(value)(held)

    def _is_unknown(self, name: str, place: Place) -> bool:
        return place.tensor.requires_grad if self._unknowns is None else name in self._unknowns

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for leaf in self._leaves.values():
            leaf.data = fn(leaf.data)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._reopen()
        super()._load_from_state_dict(*args, **kwargs)

    def _reopen(self) -> None:
        """Keep ordinary parameters in the place of the last solution, with its values."""
        for name, place in self._inner_places().items():
            if not place.tensor.is_leaf:
                value = place.tensor.detach()
                leaf = self._leaves.setdefault(name, nn.Parameter(value.clone()))
                leaf.data.copy_(value)
                leaf.grad = None
                place.put(leaf)


def _called(module: nn.Module, method: str, held: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """The result of a method of a module that holds other tensors for the time."""
    tensors = {f"module.{name}": tensor for name, tensor in held.items()}
    return torch.func.functional_call(_Method(module, method), tensors, args, kwargs)


class _Method(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def _implicit(solve: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(solve)
    def implicit(self: ImplicitMetaGradientModule, *args: Any, **kwargs: Any) -> Any:
        # A solve that calls its parent's is one.
        return solve(self, *args, **kwargs) if self._is_solving else _solve(self, solve, args, kwargs)

    implicit.is_implicit = True  # type: ignore[attr-defined]
    return implicit


@_functorch.outside_compile
def _solve(
    module: ImplicitMetaGradientModule, solve: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    before = {name: place.tensor for name, place in module._inner_places().items()}
    module._reopen()
    begun = module._inner_places()
    values = {name: place.tensor.detach().clone() for name, place in begun.items() if place.tensor.requires_grad}
    if not values:
        raise ValueError(
            f"{type(module).__name__}.solve: there are no inner parameters: make those to be solved for in __init__"
        )
    try:
        return _Problem(module, solve, values)(args, kwargs)
    except BaseException:
        for name, place in begun.items():
            if name in values:
                place.tensor.data.copy_(values[name])
            place.put(before[name])
        raise


class _Problem:
    """One call of ``solve``: as a solver of the problem that its module poses, for `pose`."""

    def __init__(
        self, module: ImplicitMetaGradientModule, solve: Callable[..., Any], values: dict[str, torch.Tensor]
    ) -> None:
        self.module, self.method, self.values = module, solve, values
        self.name = type(module).__name__
        # The graph must not lead back to the module, which holds what the graph made: a cycle that nothing collects.
        self.twin: ImplicitMetaGradientModule = object.__new__(type(module))
        self.output: Any = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def run(values: Any, /, *args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        residuals = functools.partial(_residuals, self.name, self.twin)
        run.__signature__ = _without_self(self.method)  # type: ignore[attr-defined]
        residuals.__signature__ = _without_self(_condition_of(self.module))  # type: ignore[attr-defined]
        call = Matcher(run, residuals).bind((self.values, *args), kwargs)
        solution, _ = run_solver(run, call, has_aux=False)
        routed = call.to_condition(call.args, call.kwargs)
        posed = pose(f"{self.name}.optimality", residuals, root, type(self.module).linear_solve, solution, *routed)
        places = self._places()
        _refuse_read_otherwise(self.name, places, posed.theta)
        attached = posed.problem.structure.unflatten(attach(posed.problem, posed.x, posed.theta))
        known = {id(places[name].tensor): tensor for name, tensor in attached.items()}
        if any(tensor.requires_grad or not _functorch.is_plain(tensor) for tensor in attached.values()):
            for name, place in places.items():
                self.module._leaves[name] = place.tensor
                place.put(attached[name])
        return pytree.map_tensors(lambda t: known[id(t)] if id(t) in known else t.detach(), self.output)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.module._is_solving = True
        try:
            self.output = self.method(self.module, *args, **kwargs)
        finally:
            self.module._is_solving = False
        _become(self.twin, self.module, {})
        self.twin._unknowns = list(self.values)
        return {name: place.tensor.detach().clone() for name, place in self._places().items()}

    def _places(self) -> dict[str, Place]:
        places = self.module._inner_places()
        if missing := self.values.keys() - places.keys():
            raise ValueError(f"{self.name}.solve: the inner parameter {min(missing)!r} is gone after it")
        return {name: places[name] for name in self.values}


def _condition_of(module: ImplicitMetaGradientModule) -> Callable[..., Any]:
    kind = type(module)
    is_default = kind.optimality is ImplicitMetaGradientModule.optimality
    return kind.objective if is_default else kind.optimality


def _without_self(method: Callable[..., Any]) -> inspect.Signature:
    """A method's signature, with the solution in the place of ``self``."""
    signature = inspect.signature(method)
    first, *others = signature.parameters.values()
    return signature.replace(parameters=[first.replace(kind=inspect.Parameter.POSITIONAL_ONLY), *others])


def _residuals(name: str, twin: ImplicitMetaGradientModule, solution: Any, /, *args: Any, **kwargs: Any) -> Any:
    found = _called(twin, "optimality", solution, args, kwargs)
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


def _refuse_read_otherwise(name: str, places: dict[str, Place], theta: list[torch.Tensor]) -> None:
    captured = set(map(id, theta))
    for key, place in places.items():
        if id(place.tensor) in captured:
            raise ValueError(
                f"{name}.optimality: the inner parameter {key!r} is read in another way than as an attribute of the "
                "module, such as a list or a function that holds it, its module, or self; its derivative would be "
                "wrong: read it as an attribute (an nn.ModuleList holds modules)"
            )
