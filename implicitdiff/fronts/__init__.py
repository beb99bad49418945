"""Objects over the pure functions, for programs that hold a module and an optimizer."""

from implicitdiff.fronts.from_torch import from_torch
from implicitdiff.fronts.func_optimizer import FuncOptimizer
from implicitdiff.fronts.meta_optimizer import (
    MetaAdaDelta,
    MetaAdaGrad,
    MetaAdam,
    MetaAdaMax,
    MetaAdamW,
    MetaOptimizer,
    MetaRAdam,
    MetaRMSProp,
    MetaSGD,
)
from implicitdiff.fronts.optimizer import Optimizer
from implicitdiff.fronts.optimizers import (
    SGD,
    AdaDelta,
    AdaGrad,
    Adam,
    AdaMax,
    AdamW,
    RAdam,
    RMSProp,
)
from implicitdiff.fronts.state import (
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
    "Adam",
    "AdamW",
    "FuncOptimizer",
    "MetaAdaDelta",
    "MetaAdaGrad",
    "MetaAdaMax",
    "MetaAdam",
    "MetaAdamW",
    "MetaOptimizer",
    "MetaRAdam",
    "MetaRMSProp",
    "MetaSGD",
    "ModuleState",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "extract_state_dict",
    "from_torch",
    "module_clone",
    "recover_state_dict",
    "stop_gradient",
]
