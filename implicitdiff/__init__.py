"""Implicit differentiation on torch.func: right derivatives of any solver's solution, under every transform."""

from implicitdiff import linear_solve
from implicitdiff.errors import LinearSolveError, LinearSolveWarning, NotARootError
from implicitdiff.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp

__all__ = [
    "LinearSolveError",
    "LinearSolveWarning",
    "NotARootError",
    "custom_fixed_point",
    "custom_root",
    "linear_solve",
    "root_jvp",
    "root_vjp",
]
