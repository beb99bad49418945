"""Modules whose inner parameters are the solution of a problem, and differentiable as such."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

import implicitdiff._closures.modes as _modes
import implicitdiff._torch.levels as _functorch
import implicitdiff.nn._solve as _solve
from implicitdiff._closures.evaluation import gradient
from implicitdiff._implicit.linear_problem import Solve
from implicitdiff._torch.slots import Place
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
    arguments that ``objective`` or ``optimality`` is to be called with; those of its own have defaults, and are
    given by keyword. What it returns comes back detached, but for inner parameters, which come back as they are then.

    Frozen inner parameters are constants. The inner parameters have to be read as attributes of the module and its
    submodules in ``objective`` and ``optimality``.

    A class has to have ``solve``, and ``objective`` or ``optimality``, as methods. A base that leaves one of these to
    its subclasses says so as abstract classes do: it has ``abc.ABC`` among its bases, as
    ``class Base(ImplicitMetaGradientModule, abc.ABC)``, or an abstract method of its own.

    Class arguments:
        linear_solve: solves the linear systems with ``A``, see `implicitdiff.linear_solve`; subclasses inherit it.

    Raises:
        TypeError: a class is made without ``solve``, without both ``objective`` and ``optimality``, or with one that is
            no method; later, the arguments of a call of ``solve`` do not fit.
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
    _functions: dict[str, Callable[..., Any]]
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
        value = functools.partial(_solve.call, self, "objective", args=args, kwargs=kwargs)
        return gradient(value, held)

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
            leaf = self._leaf_for(name, place.tensor)
            if leaf is not None:
                leaf.grad = None
                self._refuse_held(name, place.tensor)
                place.put(leaf)

    def _leaf_for(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """A leaf to solve for in the place of a tensor; None if it is one, or frozen."""
        kept = self._leaves.get(name)
        is_frozen = kept is None and not tensor.requires_grad
        if is_frozen or (tensor.is_leaf and _functorch.is_plain(tensor) and not _modes.is_traced()):
            return None
        if _functorch.batch_levels(tensor):  # what a vmap solved for is no value to begin with
            return kept
        with _functorch.no_levels(), torch.no_grad():
            value = _functorch.base(tensor).detach()
            if _modes.is_traced():
                # What a condition solves for is its own: made by functions that it is seen to call, kept nowhere.
                return value.clone().requires_grad_()
            return nn.Parameter(value.clone()) if kept is None else kept.copy_(value)

    def _refuse_held(self, name: str, tensor: torch.Tensor) -> None:
        """Raise if an optimizer would step what is kept no more, and so nothing."""
        optimizers = [held for held in vars(self).values() if isinstance(held, torch.optim.Optimizer)]
        if any(
            held is tensor for optimizer in optimizers for group in optimizer.param_groups for held in group["params"]
        ):
            raise ValueError(
                f"{type(self).__name__}.solve: an optimizer was made in __init__ for the inner parameter {name!r}, but "
                "inside of a transform or of another module's condition solve has others: make the optimizer in solve"
            )

    def _condition(self) -> Callable[..., Any]:
        kind = type(self)
        is_default = kind.optimality is ImplicitMetaGradientModule.optimality
        return kind.objective if is_default else kind.optimality


def _is_abstract(value: Any) -> bool:
    return bool(getattr(value, "__isabstractmethod__", False))


def _check_methods(cls: type[ImplicitMetaGradientModule], is_base: bool) -> None:
    """Raise unless a class has the methods that it needs, or is a base that leaves some to its subclasses."""
    for name in ("solve", "objective", "optimality"):
        method = inspect.getattr_static(cls, name)
        # Anything that becomes a method, such as the result of a decorator, will do.
        if isinstance(method, (staticmethod, classmethod, property)) or not hasattr(type(method), "__get__"):
            raise TypeError(
                f"{cls.__name__}: {name} has to be a method, def {name}(self, ...), got {type(method).__name__}"
            )
    if is_base:
        return
    base = ImplicitMetaGradientModule
    lacks = []
    if _is_abstract(cls.solve):
        lacks.append("does not define solve(), and needs it")
    if all(getattr(cls, name) is getattr(base, name) or _is_abstract(getattr(cls, name)) for name in _CONDITIONS):
        lacks.append("defines neither objective() nor optimality(), and needs one")
    if lacks:
        raise TypeError(
            f"{cls.__name__} {' and '.join(lacks)}; if it is a base that leaves this to its subclasses, say so: class "
            f"{cls.__name__}(ImplicitMetaGradientModule, abc.ABC)"
        )


_CONDITIONS = ("objective", "optimality")


def _implicit(solve: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(solve)
    def implicit(self: ImplicitMetaGradientModule, *args: Any, **kwargs: Any) -> Any:
        if self._is_solving:  # a solve that calls its parent's is one
            return solve(self, *args, **kwargs)
        return _solve.solve(self, solve, self._condition(), args, kwargs)

    implicit.is_implicit = True  # type: ignore[attr-defined]
    return implicit
