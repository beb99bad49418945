"""Object-oriented wrappers of the pure functions, for programs that hold a module and an optimizer."""

from torch.serialization import add_safe_globals

from implicitdiff.objects.from_torch import from_torch
from implicitdiff.objects.func_optimizer import FuncOptimizer
from implicitdiff.objects.meta_optimizer import (
    MetaAdaDelta,
    MetaAdadelta,
    MetaAdaGrad,
    MetaAdagrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaRMSprop,
    MetaSGD,
)
from implicitdiff.objects.optimizer import Optimizer
from implicitdiff.objects.optimizers import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    RAdam,
    RMSProp,
    RMSprop,
)
from implicitdiff.objects.state import (
    ModuleState,
    extract_state_dict,
    module_clone,
    recover_state_dict,
    stop_gradient,
)

__all__ = [
    "SGD",
    "AdaDelta",
    "AdaGrad",
    "AdaMax",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdadelta",
    "MetaAdagrad",
    "MetaAdam",
    "MetaAdamW",
    "MetaAdamax",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaRMSprop",
    "MetaSGD",
    "ModuleState",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "extract_state_dict",
    "from_torch",
    "module_clone",
    "recover_state_dict",
    "stop_gradient",
]


def __dir__() -> list[str]:
    return __all__


# `torch.load` with weights_only=True accepts registered classes alone.
add_safe_globals([ModuleState])
