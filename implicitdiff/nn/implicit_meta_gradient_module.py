"""Modules with inner parameters that are the differentiable solution of a problem."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as _levels
import implicitdiff._torch.switches as _switches
import implicitdiff.nn._solve as _solve
from implicitdiff._closures.evaluation import gradient
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff._torch.slots import ParameterSlot
from implicitdiff.nn.meta_gradient_module import MetaGradientModule

# Default of the class argument: None asks for `solve_auto`, so another value has to stand for "not given".
_INHERITED: Any = object()


class ImplicitMetaGradientModule(MetaGradientModule):
    r"""A module whose inner parameters solve a problem in its meta-parameters.

    The user defines ``solve``, which writes a solution into the inner parameters by any method, and either
    ``objective``, a scalar that the solution minimises, or ``optimality``, residuals ``F`` that are zero at the
    solution. After ``solve(...)`` the inner parameters have the derivative ``dx*/dtheta = -A^-1 dF/dtheta`` with
    ``A = dF/dx``, see `implicitdiff.custom_root`: in meta-parameters, in arguments of ``solve``, and in all other
    tensors that the residuals read, to any order. The next ``solve`` starts from the values of the solution.

    ``solve`` runs under ``torch.no_grad`` (call ``torch.enable_grad`` inside as needed), on ordinary parameters. A
    ``backward`` inside leaves no ``.grad`` on tensors other than inner parameters. ``objective`` or ``optimality`` is
    called with the arguments of ``solve``; further arguments of ``solve`` need defaults and are passed by keyword.
    Tensors in the result of ``solve`` are returned detached, except inner parameters, which carry their derivatives.

    Frozen inner parameters are constants. ``objective`` and ``optimality`` have to read inner parameters as attributes
    of the module and its submodules.

    A class needs the methods ``solve``, and ``objective`` or ``optimality``. A base class without one of these has
    ``abc.ABC`` among its bases, as in ``class Base(ImplicitMetaGradientModule, abc.ABC)``, or an abstract method.

    Class arguments:
        linear_solve: solver of the linear systems with ``A``, see `implicitdiff.linear_solve`. Subclasses inherit it.

    Raises:
        TypeError: a class lacks ``solve``, or both ``objective`` and ``optimality``, or defines one that is not a
            method; later, the arguments of a call of ``solve`` do not fit.
        ValueError: in a call of ``solve``: the module has no inner parameters, the residuals do not match these, or
            read them otherwise than as attributes. After an error in ``solve`` the module is as before.
        LinearSolveError: in a derivative, if the linear solve fails.

    Reference:
        Rajeswaran et al., "Meta-Learning with Implicit Gradients", 2019; Ren et al., "TorchOpt: An Efficient Library
        for Differentiable Optimization", JMLR 2023, for the interface.

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
    _functions: dict[str, _solve.ModuleMethod]
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
        # A declared base class may lack methods; instances are checked again in __init__.
        is_base = abc.ABC in cls.__bases__ or any(map(_is_abstract, vars(cls).values()))
        _check_methods(cls, is_base)
        if not getattr(cls.solve, "__isabstractmethod__", hasattr(cls.solve, "is_implicit")):
            cls.solve = _implicit(cls.solve)  # type: ignore[method-assign]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_methods(type(self), is_base=False)
        super().__init__(*args, **kwargs)
        self._leaves, self._unknowns, self._is_solving = {}, None, False

    @abc.abstractmethod
    def solve(self, *args: Any, **kwargs: Any) -> Any:
        """Write a solution into the inner parameters; ``return self`` allows chaining."""

    def objective(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the scalar that the inner parameters minimise."""
        raise NotImplementedError(f"{type(self).__name__} does not define objective()")

    def optimality(self, *args: Any, **kwargs: Any) -> Any:
        """Return the residuals that are zero at a solution. Default: the gradient of `objective`.

        Returns:
            One tensor for each inner parameter that is not frozen, of equal shape, in the order of ``parameters``; or a
            dictionary of such tensors by name.
        """
        held = {name: slot.tensor for name, slot in self._inner_slots().items() if self._is_unknown(name, slot)}
        value = functools.partial(_solve.call_method, self, "objective", args=args, kwargs=kwargs)
        return gradient(value, held)

    def _is_unknown(self, name: str, slot: ParameterSlot) -> bool:
        return slot.tensor.requires_grad if self._unknowns is None else name in self._unknowns

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for leaf in self._leaves.values():
            # Kept leaves are no parameters of the module, so `nn.Module._apply` does not convert them.
            leaf.data = fn(leaf.data)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore_leaves()
        super()._load_from_state_dict(*args, **kwargs)

    def _restore_leaves(self) -> None:
        """Replace the last solution by ordinary parameters with its values."""
        for name, slot in self._inner_slots().items():
            leaf = self._leaf_for(name, slot.tensor)
            if leaf is not None:
                leaf.grad = None
                self._refuse_stale_optimizer(name, slot.tensor)
                slot.put(leaf)

    def _leaf_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return a leaf with the values of an inner parameter, or None if the slot needs no replacement."""
        kept = self._leaves.get(name)
        is_frozen = kept is None and not tensor.requires_grad
        if is_frozen or (tensor.is_leaf and _solve.outlasts_call(tensor)):
            return None
        if _levels.batch_levels(tensor):  # the lanes of a vmap have no common value to start from
            return kept
        with _switches.no_levels(), torch.no_grad():
            value = _levels.base(tensor).detach()
            if _modes.is_traced():
                # Inside of another module's condition the leaf is an intermediate result: it has to be made by traced
                # operations, and must not outlive the evaluation.
                return value.clone().requires_grad_()
            return nn.Parameter(value.clone()) if kept is None else kept.copy_(value)

    def _refuse_stale_optimizer(self, name: str, tensor: torch.Tensor) -> None:
        """Raise if an optimizer of the module holds a replaced parameter: steps would have no effect."""
        optimizers = [held for held in vars(self).values() if isinstance(held, torch.optim.Optimizer)]
        if any(
            held is tensor for optimizer in optimizers for group in optimizer.param_groups for held in group["params"]
        ):
            raise ValueError(
                f"{type(self).__name__}.solve: an optimizer was made in __init__ for the inner parameter {name!r}, "
                "but a transform or the condition of another module replaces inner parameters: make the optimizer in "
                "solve"
            )

    def _condition(self) -> _solve.ModuleMethod:
        kind = type(self)
        is_default = kind.optimality is ImplicitMetaGradientModule.optimality
        return kind.objective if is_default else kind.optimality


def _is_abstract(value: object) -> bool:
    return bool(getattr(value, "__isabstractmethod__", False))


def _is_method(value: object) -> bool:
    """True for any descriptor that binds `self`, such as the result of a decorator."""
    return hasattr(type(value), "__get__") and not isinstance(value, (staticmethod, classmethod, property))


def _check_methods(cls: type[ImplicitMetaGradientModule], is_base: bool) -> None:
    """Raise unless a class defines the required methods. A base class may lack some."""
    given = {name: inspect.getattr_static(cls, name) for name in ("solve", *_CONDITIONS)}
    if odd := {name: method for name, method in given.items() if not _is_method(method)}:
        name, method = next(iter(odd.items()))
        raise TypeError(f"{cls.__name__}: {name} must be a method, def {name}(self, ...), got {type(method).__name__}")
    base = ImplicitMetaGradientModule
    conditions = [getattr(cls, name) for name in _CONDITIONS if getattr(cls, name) is not getattr(base, name)]
    required = {
        "does not define solve(), which is required": [cls.solve],
        "defines neither objective() nor optimality(), of which one is required": conditions,
    }
    lacks = [lack for lack, methods in required.items() if all(map(_is_abstract, methods))]
    if lacks and not is_base:
        raise TypeError(
            f"{cls.__name__} {' and '.join(lacks)}; for a base class that leaves methods to subclasses, write class "
            f"{cls.__name__}(ImplicitMetaGradientModule, abc.ABC)"
        )


_CONDITIONS = ("objective", "optimality")


def _implicit(solve: _solve.ModuleMethod) -> _solve.ModuleMethod:
    @functools.wraps(solve)
    def implicit(self: ImplicitMetaGradientModule, *args: Any, **kwargs: Any) -> Any:
        if self._is_solving:  # a call of ``super().solve`` belongs to the running solve
            return solve(self, *args, **kwargs)
        return _solve.solve_implicitly(self, solve, self._condition(), args, kwargs)

    implicit.is_implicit = True  # type: ignore[attr-defined]
    return implicit
