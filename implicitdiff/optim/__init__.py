"""Optimizers as (init, update) pairs, and building blocks for further ones."""

from torch.serialization import add_safe_globals

from implicitdiff.optim._base import GradientTransformation, apply_updates, chain
from implicitdiff.optim._fused import accelerated_op_available
from implicitdiff.optim._inject import InjectState, inject_hyperparams
from implicitdiff.optim.adadelta import AdadeltaState, adadelta, scale_by_adadelta
from implicitdiff.optim.adagrad import AdagradState, adagrad, scale_by_adagrad
from implicitdiff.optim.adam import AdamState, adam, scale_by_adam
from implicitdiff.optim.adamax import AdamaxState, adamax, scale_by_adamax
from implicitdiff.optim.adamw import adamw
from implicitdiff.optim.clip import clip, clip_grad_norm, nan_to_num
from implicitdiff.optim.decay import add_decayed_weights, masked
from implicitdiff.optim.identity import identity
from implicitdiff.optim.radam import RAdamState, radam, scale_by_radam
from implicitdiff.optim.rmsprop import RMSPropState, rmsprop, scale_by_rmsprop
from implicitdiff.optim.scale import ScheduleState, scale, scale_by_schedule
from implicitdiff.optim.sgd import SGDState, sgd, trace

__all__ = [
    "AdadeltaState",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "GradientTransformation",
    "InjectState",
    "RAdamState",
    "RMSPropState",
    "SGDState",
    "ScheduleState",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "clip",
    "clip_grad_norm",
    "identity",
    "inject_hyperparams",
    "masked",
    "nan_to_num",
    "radam",
    "rmsprop",
    "scale",
    "scale_by_adadelta",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_radam",
    "scale_by_rmsprop",
    "scale_by_schedule",
    "sgd",
    "trace",
]


def __dir__() -> list[str]:
    return __all__


# `torch.load` with weights_only=True accepts registered classes alone, so states are registered.
add_safe_globals(
    [
        AdadeltaState,
        AdagradState,
        AdamState,
        AdamaxState,
        InjectState,
        RAdamState,
        RMSPropState,
        SGDState,
        ScheduleState,
    ]
)
