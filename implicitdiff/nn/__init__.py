"""Modules whose parameters are the solution of a problem in other parameters."""

from implicitdiff.nn.implicit_meta_gradient_module import ImplicitMetaGradientModule
from implicitdiff.nn.meta_gradient_module import MetaGradientModule

__all__ = ["ImplicitMetaGradientModule", "MetaGradientModule"]
