"""Modules with inner parameters that solve a problem in meta-parameters."""

from implicitdiff.nn.implicit_meta_gradient_module import ImplicitMetaGradientModule
from implicitdiff.nn.meta_gradient_module import MetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "MetaGradientModule"]


def __dir__() -> list[str]:
    return __all__
