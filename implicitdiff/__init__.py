"""Differentiation through optimisation on torch.func: of solutions, and of an optimizer's steps."""

from implicitdiff import linear_solve, optim, projections, prox, schedule, solvers
from implicitdiff._unroll import unroll
from implicitdiff.errors import (
    ConvergenceError,
    ConvergenceWarning,
    LinearSolveError,
    LinearSolveWarning,
    NotARootError,
)
from implicitdiff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
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

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "GradientTransformation",
    "LinearSolveError",
    "LinearSolveWarning",
    "NotARootError",
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
    "linear_solve",
    "optim",
    "projections",
    "prox",
    "radam",
    "rmsprop",
    "root_jvp",
    "root_vjp",
    "schedule",
    "sgd",
    "solvers",
    "unroll",
]
