"""Differentiation through optimisation on torch.func: of solutions, and of an optimizer's steps."""

from torch.distributed import is_available as _is_distributed_built

# Spelt so, they belong to the package, but `from implicitdiff import *` leaves the user's own `nn` alone.
from implicitdiff import linear_solve as linear_solve
from implicitdiff import nn as nn
from implicitdiff import objects as objects
from implicitdiff import optim as optim
from implicitdiff import projections as projections
from implicitdiff import prox as prox
from implicitdiff import pytree as pytree
from implicitdiff import schedule as schedule
from implicitdiff import solvers as solvers
from implicitdiff._problems import fixed_point, least_squares, minimize, root
from implicitdiff._torch.replacements import elementary
from implicitdiff._unroll import unroll
from implicitdiff._version import __version__ as __version__
from implicitdiff.errors import (
    CompileError,
    ConvergenceError,
    ConvergenceWarning,
    LinearSolveError,
    LinearSolveWarning,
    NotARootError,
    RankError,
    TransformError,
)
from implicitdiff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from implicitdiff.objects import (
    SGD,
    AdaDelta,
    Adadelta,
    AdaGrad,
    Adagrad,
    Adam,
    AdaMax,
    Adamax,
    AdamW,
    FuncOptimizer,
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
    ModuleState,
    Optimizer,
    RAdam,
    RMSProp,
    RMSprop,
    extract_state_dict,
    from_torch,
    module_clone,
    recover_state_dict,
    stop_gradient,
)
from implicitdiff.optim import (
    GradientTransformation,
    accelerated_op_available,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    apply_updates,
    chain,
    clip_grad_norm,
    radam,
    rmsprop,
    sgd,
)

# torch may be built without it.
if _is_distributed_built():
    from implicitdiff import distributed as distributed

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
    "CompileError",
    "ConvergenceError",
    "ConvergenceWarning",
    "FuncOptimizer",
    "GradientTransformation",
    "LinearSolveError",
    "LinearSolveWarning",
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
    "NotARootError",
    "Optimizer",
    "RAdam",
    "RMSProp",
    "RMSprop",
    "RankError",
    "TransformError",
    "accelerated_op_available",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "apply_updates",
    "chain",
    "clip_grad_norm",
    "custom_fixed_point",
    "custom_root",
    "elementary",
    "extract_state_dict",
    "fixed_point",
    "from_torch",
    "least_squares",
    "minimize",
    "module_clone",
    "radam",
    "recover_state_dict",
    "rmsprop",
    "root",
    "root_jvp",
    "root_vjp",
    "sgd",
    "stop_gradient",
    "unroll",
]


def __dir__() -> list[str]:
    modules = ["linear_solve", "nn", "objects", "optim", "projections", "prox", "pytree", "schedule", "solvers"]
    return [*__all__, "distributed", *modules, "__version__"]
