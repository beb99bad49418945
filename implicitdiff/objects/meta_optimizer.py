"""Optimizers whose steps on a module are differentiable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

import implicitdiff._torch.levels as _functorch
import implicitdiff.objects._check as _check
import implicitdiff.objects._hooks as _hooks
import implicitdiff.optim as optim
from implicitdiff._torch.slots import Place, listed_parameters_of
from implicitdiff.objects.func_optimizer import gradients
from implicitdiff.optim._base import GradientTransformation


class MetaOptimizer:
    """Steps of a module's parameters that stay part of the graph.

    A step replaces each parameter of the module by ``p + update``, an ``nn.Parameter`` in the middle of a graph: it
    depends on the parameter before, on the loss, and on the transformation's hyper-parameters, and what is computed
    with the module afterwards is differentiable in all of these. Tied parameters stay tied. Those that are frozen, or
    that the loss does not depend on, are left alone. Hooks of a parameter (``register_hook``) are applied to its
    gradient in every step. ``copy.deepcopy`` of the module copies the values, out of the graph.

    The state is begun when it is first needed, and converted with the parameters (``module.double()``).

    The graph grows with each step. `extract_state_dict` before the first and `recover_state_dict` after the last
    return to where it began, `stop_gradient` goes on from where it ended; both let go of the graph.

    Args:
        module: its parameters are optimized, of an `implicitdiff.nn.MetaGradientModule` the inner ones.
        transformation: the pair, e.g. ``implicitdiff.adam(1e-3)``.

    Attributes:
        module: the module.
        transformation: the pair.
        state: its state, for the parameters by name; trees of hyper-parameters are nested like these.

    Raises:
        TypeError: `transformation` is none, or `module` no module.
        ValueError: the module has no parameters.

    Example:
        >>> import torch
        >>> from implicitdiff import MetaSGD, extract_state_dict, recover_state_dict
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.ones_(net.weight)
        Parameter containing:
        tensor([[1.]], requires_grad=True)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> inner, x = MetaSGD(net, lr=lr), torch.tensor([[1.0]])
        >>> start = extract_state_dict(net)
        >>> inner.step((net(x) ** 2).sum())  # w - 2 lr w
        >>> (net(x) ** 2).sum().backward()
        >>> lr.grad  # of (1 - 2 lr)^2
        tensor(-3.2000)
        >>> recover_state_dict(net, start)
    """

    def __init__(self, module: nn.Module, transformation: GradientTransformation) -> None:
        name = type(self).__name__
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: module must be an nn.Module, got {type(module).__name__}")
        self.transformation = _check.transformation(name, transformation)
        self.module = module
        places = self._places()
        if not places:
            raise ValueError(f"{name}: the module has no parameters")
        self._state: Any = None
        self._kinds: _check.Kinds | None = None
        self._shapes = _shapes(places)
        self._fit(_tensors(places))  # for its errors
        self._state = None

    @property
    def state(self) -> Any:
        places = self._places()
        if _shapes(places) == self._shapes:
            self._fit(_tensors(places))
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self._kinds = state, None

    def _fit(self, params: dict[str, torch.Tensor]) -> None:
        """Begin the state, or convert it as the parameters were."""
        kinds = _check.kinds(params)
        if self._state is None or kinds != self._kinds:
            with torch.no_grad():
                fresh = self.transformation.init(params)
            self._state, self._kinds = fresh if self._state is None else _check.fitted(self._state, fresh), kinds

    def step(self, loss: torch.Tensor, *, first_order: bool = False) -> None:
        """Replace the module's parameters by those after a step down the gradient of a loss.

        Args:
            loss: a scalar that was computed with the module as it is now; under `implicitdiff.elementary`, if the
                module has operations whose higher derivatives torch gets wrong or lacks.
            first_order: take the gradient for a constant, which saves the derivative of a derivative. The new
                parameters then depend on the ones before with derivative 1, and on the hyper-parameters.

        Raises:
            ValueError: the loss depends on none of the parameters, or the module has others than it had.
            RuntimeError: when a derivative is taken that torch gets wrong: through the step, that of a loss with
                `weight_norm`; of such a derivative again, that of one with `layer_norm` or `batch_norm`.
        """
        name = f"{type(self).__name__}.step"
        places = self._places()
        if _shapes(places) != self._shapes:
            raise ValueError(
                f"{name}: the module's parameters are {_shapes(places)}, but they were {self._shapes} when this "
                "optimizer was made; make another one"
            )
        params = _tensors(places)
        self._fit(params)
        grads = gradients(name, loss, params, constant=first_order, keep=True)
        with torch.enable_grad():
            stepped, self._state = self.transformation.step(grads, self._state, params)
        for key, place in places.items():
            if grads[key] is not None:
                _hooks.inherit(stepped[key], place.tensor)
                place.put(_as_parameter(stepped[key]))

    def state_dict(self) -> Any:
        """The state, a pytree of tensors. These are the tensors, with their graphs, not copies."""
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a state that `state_dict` gave."""
        self.state = _check.state(f"{type(self).__name__}.load_state_dict", self.state, state_dict)

    def _places(self) -> dict[str, Place]:
        places = listed_parameters_of(self.module)
        return {key: p for key, p in places.items() if p.tensor.is_floating_point() or p.tensor.is_complex()}


def _tensors(places: dict[str, Place]) -> dict[str, torch.Tensor]:
    return {key: place.tensor for key, place in places.items()}


def _as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as a parameter, which may be copied: torch refuses a deep copy of others within a graph."""
    if type(tensor) is torch.Tensor and _functorch.is_plain(tensor):
        tensor.__class__ = nn.Parameter  # a new object would be a leaf
    return tensor


def _shapes(places: dict[str, Place]) -> dict[str, list[int]]:
    return {name: list(place.tensor.shape) for name, place in places.items()}


class _Of(MetaOptimizer):
    """A meta-optimizer by the name of its transformation."""

    factory: ClassVar[Callable[..., GradientTransformation]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, factory: Callable[..., GradientTransformation] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if factory is not None:
            cls.factory = staticmethod(factory)
            cls.__signature__ = _check.signature("module", factory)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _check.bound(type(self), args, kwargs)
        super().__init__(given.pop("module"), type(self).factory(**given))


class MetaSGD(_Of, factory=optim.sgd):
    """`MetaOptimizer` of `implicitdiff.sgd`, whose arguments it takes."""


class MetaAdam(_Of, factory=optim.adam):
    """`MetaOptimizer` of `implicitdiff.adam`, whose arguments it takes."""


class MetaAdamW(_Of, factory=optim.adamw):
    """`MetaOptimizer` of `implicitdiff.adamw`, whose arguments it takes."""


class MetaRMSProp(_Of, factory=optim.rmsprop):
    """`MetaOptimizer` of `implicitdiff.rmsprop`, whose arguments it takes."""


class MetaAdaGrad(_Of, factory=optim.adagrad):
    """`MetaOptimizer` of `implicitdiff.adagrad`, whose arguments it takes."""


class MetaAdaDelta(_Of, factory=optim.adadelta):
    """`MetaOptimizer` of `implicitdiff.adadelta`, whose arguments it takes."""


class MetaAdaMax(_Of, factory=optim.adamax):
    """`MetaOptimizer` of `implicitdiff.adamax`, whose arguments it takes."""


class MetaRAdam(_Of, factory=optim.radam):
    """`MetaOptimizer` of `implicitdiff.radam`, whose arguments it takes."""


# As torch.optim spells them.
MetaRMSprop, MetaAdagrad, MetaAdadelta, MetaAdamax = MetaRMSProp, MetaAdaGrad, MetaAdaDelta, MetaAdaMax
