"""The former name of `implicitdiff.objects`."""

import warnings
from typing import Any

from implicitdiff import objects


def __getattr__(name: str) -> Any:
    if name not in objects.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("implicitdiff.fronts is now implicitdiff.objects", DeprecationWarning, stacklevel=2)
    return getattr(objects, name)
