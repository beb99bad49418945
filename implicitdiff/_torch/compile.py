"""Eager execution inside of compiled functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch._compile import _disable_dynamo

_compiler: Callable[[], Any] = torch._C._dynamo.eval_frame.get_eval_frame_callback


Fn = TypeVar("Fn", bound=Callable[..., Any])


def outside_compile(fn: Fn) -> Fn:
    """Decorate a function to run eagerly, with every function that it calls, also inside of `torch.compile`.

    Dynamo silently drops custom derivative rules of an autograd.Function (pytorch #192985, #193279). Unlike
    `torch.compiler.disable`, this decorator does not import the compiler before it is needed, and costs two questions
    where nothing is compiled.
    """
    # The wrapper imports the compiler at the first call, and not here.
    disabled = _disable_dynamo(fn)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Dynamo can trace the first question.
        if torch.compiler.is_compiling() or _compiler() is not None:
            return disabled(*args, **kwargs)
        return fn(*args, **kwargs)

    return cast(Fn, run)
