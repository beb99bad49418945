"""Optimizers whose steps on a module are differentiable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

import implicitdiff._torch.levels as _levels
import implicitdiff.objects._check as _check
import implicitdiff.objects._hooks as _hooks
import implicitdiff.optim as optim
from implicitdiff._calls import FactoryCall
from implicitdiff._torch.slots import ParameterSlot, listed_parameters_of
from implicitdiff._torch.tracking import is_continuous
from implicitdiff._torch.trees import Tree
from implicitdiff.objects.func_optimizer import loss_gradients
from implicitdiff.optim._base import GradientTransformation


class MetaOptimizer:
    """An optimizer of a module's parameters with differentiable steps.

    A step replaces each parameter ``p`` of the module by ``p + update``, an ``nn.Parameter`` with autograd history.
    Results that the module computes afterwards are differentiable in the old parameters, in tensors of the loss, and in
    the hyper-parameters. Tied parameters stay tied. Frozen parameters, and parameters without influence on the loss, do
    not change. Hooks of a parameter (``register_hook``) apply to its gradient in every step. ``copy.deepcopy`` of the
    module copies values without history.

    The state is initialised at first use, and converted with the parameters (``module.double()``).

    The graph grows with each step. To restart, call `extract_state_dict` before the first step and `recover_state_dict`
    after the last. To continue from the last step, call `stop_gradient`. Both release the graph.

    Args:
        module: the module to optimize; of an `implicitdiff.nn.MetaGradientModule`, the inner parameters.
        transformation: the pair, e.g. ``implicitdiff.adam(1e-3)``.

    Attributes:
        module: the module.
        transformation: the pair.
        state: the state for a dictionary of parameters by name. Trees of hyper-parameters are nested likewise.

    Raises:
        TypeError: `transformation` is not a `GradientTransformation`, or `module` not an ``nn.Module``.
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
        self.transformation = _check.check_transformation(name, transformation)
        self.module = module
        slots = self._slots()
        if not slots:
            raise ValueError(f"{name}: the module has no parameters")
        self._state: Tree = None
        self._options: _check.TensorOptions | None = None
        self._shapes = _shapes(slots)
        # Errors of ``init`` are due here. The state itself is made at first use, when dtypes and devices are final.
        self._fit(_tensors_by_name(slots))
        self._state = None

    def __repr__(self) -> str:
        return repr(FactoryCall(type(self).__name__, (self.module, self.transformation), {}))

    @property
    def state(self) -> Tree:
        slots = self._slots()
        if _shapes(slots) == self._shapes:
            self._fit(_tensors_by_name(slots))
        return self._state

    @state.setter
    def state(self, state: Tree) -> None:
        self._state, self._options = state, None

    def _fit(self, params: dict[str, torch.Tensor]) -> None:
        """Initialise the state, or convert it to the present dtypes and devices of the parameters."""
        init = torch.no_grad()(self.transformation.init)
        self._state, self._options = _check.fitted(self._state, self._options, params, init)

    def step(self, loss: torch.Tensor, *, first_order: bool = False) -> None:
        """Replace the module's parameters by the result of a step along the gradients of a loss.

        Args:
            loss: a scalar, computed with the present parameters; under `implicitdiff.elementary` if the module has
                operations whose higher derivatives torch gets wrong or lacks.
            first_order: treat the gradients as constants, which avoids second derivatives. The new parameters then
                depend on the old parameters with derivative 1, and on the hyper-parameters.

        Raises:
            ValueError: the loss depends on none of the parameters, or names or shapes of parameters have changed.
            RuntimeError: later, in a derivative that torch gets wrong: through a step on a loss with `weight_norm`, or
                the second derivative through a step on a loss with `layer_norm` or `batch_norm`.
        """
        name = f"{type(self).__name__}.step"
        slots = self._slots()
        if _shapes(slots) != self._shapes:
            raise ValueError(
                f"{name}: the module's parameters are {_shapes(slots)}, but were {self._shapes} when this optimizer "
                "was made; make another optimizer"
            )
        params = _tensors_by_name(slots)
        self._fit(params)
        grads = loss_gradients(name, loss, params, constant=first_order, keep=True)
        # Differentiable in hyper-parameters even if the user computes the step under no_grad.
        with torch.enable_grad():
            stepped, self._state = self.transformation.step(grads, self._state, params)
        # A parameter without a gradient keeps its tensor with the hooks.
        for key, slot in [(key, slot) for key, slot in slots.items() if grads[key] is not None]:
            _hooks.inherit(stepped[key], slot.tensor)
            slot.put(_as_parameter(stepped[key]))

    def state_dict(self) -> Tree:
        """Return the state, a pytree of tensors with their graphs, not copied."""
        return self.state

    def load_state_dict(self, state_dict: Tree) -> None:
        """Continue from a state that `state_dict` returned."""
        self.state = _check.check_state(f"{type(self).__name__}.load_state_dict", self.state, state_dict)

    def _slots(self) -> dict[str, ParameterSlot]:
        # Integer parameters, of quantised modules, have no gradients.
        slots = listed_parameters_of(self.module)
        return {key: p for key, p in slots.items() if is_continuous(p.tensor)}


def _tensors_by_name(slots: dict[str, ParameterSlot]) -> dict[str, torch.Tensor]:
    return {key: slot.tensor for key, slot in slots.items()}


def _as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor an ``nn.Parameter`` in place: torch cannot deep-copy other tensors with history."""
    if type(tensor) is torch.Tensor and _levels.is_plain(tensor):
        # `nn.Parameter(tensor)` would be a leaf.
        tensor.__class__ = nn.Parameter
    return tensor


def _shapes(slots: dict[str, ParameterSlot]) -> dict[str, list[int]]:
    return {name: list(slot.tensor.shape) for name, slot in slots.items()}


class _NamedMetaOptimizer(MetaOptimizer):
    """A meta-optimizer with the arguments of a factory of transformations."""

    factory: ClassVar[Callable[..., GradientTransformation]]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, factory: Callable[..., GradientTransformation] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if factory is not None:
            cls.factory = staticmethod(factory)
            cls.__signature__ = _check.object_signature("module", factory)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _check.bind_arguments(type(self), args, kwargs)
        super().__init__(given.pop("module"), type(self).factory(**given))

    def __repr__(self) -> str:
        call = getattr(self.transformation.update, "call", None)
        return repr(FactoryCall(type(self).__name__, (self.module,), call.kwargs if call else {}))


class MetaSGD(_NamedMetaOptimizer, factory=optim.sgd):
    """`MetaOptimizer` of `implicitdiff.sgd`, whose arguments it takes."""


class MetaAdam(_NamedMetaOptimizer, factory=optim.adam):
    """`MetaOptimizer` of `implicitdiff.adam`, whose arguments it takes."""


class MetaAdamW(_NamedMetaOptimizer, factory=optim.adamw):
    """`MetaOptimizer` of `implicitdiff.adamw`, whose arguments it takes."""


class MetaRMSProp(_NamedMetaOptimizer, factory=optim.rmsprop):
    """`MetaOptimizer` of `implicitdiff.rmsprop`, whose arguments it takes."""


class MetaAdaGrad(_NamedMetaOptimizer, factory=optim.adagrad):
    """`MetaOptimizer` of `implicitdiff.adagrad`, whose arguments it takes."""


class MetaAdaDelta(_NamedMetaOptimizer, factory=optim.adadelta):
    """`MetaOptimizer` of `implicitdiff.adadelta`, whose arguments it takes."""


class MetaAdaMax(_NamedMetaOptimizer, factory=optim.adamax):
    """`MetaOptimizer` of `implicitdiff.adamax`, whose arguments it takes."""


class MetaRAdam(_NamedMetaOptimizer, factory=optim.radam):
    """`MetaOptimizer` of `implicitdiff.radam`, whose arguments it takes."""


# Spelling of torch.optim.
MetaRMSprop, MetaAdagrad, MetaAdadelta, MetaAdamax = MetaRMSProp, MetaAdaGrad, MetaAdaDelta, MetaAdaMax
