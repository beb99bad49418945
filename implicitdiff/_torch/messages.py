"""Errors of torch.func in words: the operation that torch.func cannot transform, and the remedy."""

from __future__ import annotations

import dis
import itertools
import os
import sys
import traceback
from pathlib import Path
from types import BuiltinMethodType, FrameType, MethodType
from typing import Any

import torch


def untransformable(error: RuntimeError) -> str | None:
    """Return the operation that made torch.func raise an error, with the remedy; None for other errors."""
    return _words_of(error, _UNTRANSFORMABLE) or untransformable_function(error)


def unbatchable(error: RuntimeError) -> str | None:
    """Return the use of values that made vmap raise an error, such as "control flow"; None for other errors."""
    return _words_of(error, _UNBATCHABLE)


def _words_of(error: RuntimeError, table: dict[str, str]) -> str | None:
    return next((words for start, words in table.items() if str(error).startswith(start)), None)


def untransformable_function(error: RuntimeError) -> str | None:
    """Return the autograd.Function that made torch.func raise an error, with the remedy; None for other errors."""
    if not str(error).startswith("In order to use an autograd.Function with functorch transforms"):
        return None
    name = _refused(error)
    if name.startswith("GeneratedBackwardFor_"):
        return (
            f"the custom operator {name.removeprefix('GeneratedBackwardFor_')}, whose registered derivative "
            "torch.func cannot transform: write it as an autograd.Function with setup_context"
        )
    usual = f"the autograd.Function {name}, which torch.func cannot transform: give it a setup_context"
    return _FUNCTIONS_OF_TORCH.get(name, usual)


def _refused(error: RuntimeError) -> str:
    """Return the name of the class whose ``apply`` raised the error; empty if the code does not tell."""
    trace: Any = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    # Up to torch 2.13 the last frame is that of `apply`. Since 2.14 `apply` is compiled: the last frame calls it.
    if isinstance(cls := trace.tb_frame.f_locals.get("cls"), type):
        return cls.__name__
    return _owner_of_apply(trace.tb_frame, trace.tb_lasti)


def _owner_of_apply(frame: FrameType, end: int) -> str:
    """Return the name of the class whose ``apply`` the code of a frame names last before an instruction."""
    visible = frame.f_globals | frame.f_locals
    read = [i.argval for i in dis.get_instructions(frame.f_code) if i.offset < end and isinstance(i.argval, str)]
    # The code names the class and then `apply`, or names a variable that holds the bound method `apply`.
    for before, name in reversed([*itertools.pairwise(["", *read])]):
        value = visible.get(name)
        if name == "apply":
            return getattr(visible.get(before), "__name__", before)
        if isinstance(value, MethodType | BuiltinMethodType) and value.__name__ == "apply":
            return getattr(value.__self__, "__name__", "")
    return ""


_FUNCTIONS_OF_TORCH = {
    "": "an autograd.Function, which torch.func cannot transform: give it a setup_context",
    "BackwardHookFunction": "a module with a full backward hook, which torch.func cannot transform: remove the hook",
    "CheckpointFunction": "a reentrant checkpoint, which torch.func cannot transform: pass use_reentrant=False",
}


# torch raises plain RuntimeErrors here, so only the text tells the cause. The keys are beginnings of messages.
_UNBATCHABLE = {
    "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow": "control flow",
    "vmap: It looks like you're calling .item()": "item() or float()",
    "vmap: We do not support batching operators that can": "a shape that depends on them",
    "Cannot access data pointer of Tensor that doesn't have storage": "NumPy, or another reader of memory",
}


_UNTRANSFORMABLE = {
    "element 0 of tensors does not require grad": "torch.autograd.grad to its arguments: use torch.func.grad",
    # It does not require grad, or (torch 2.11) is not in the graph.
    "One of the differentiated Tensors": "torch.autograd.grad to its arguments: use torch.func.grad",
    "The differentiated Tensor at index": "torch.autograd.grad to its arguments: use torch.func.grad",
    "backward() called inside a functorch transform": "Tensor.backward: use torch.func.grad",
    "You tried to vmap over": "an autograd.Function without a vmap rule: set generate_vmap_rule = True in its class",
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks": (
        "hooks of saved tensors, which torch.func cannot transform (torch.utils.checkpoint uses them): remove them"
    ),
}


# With a separator at the end: `torch` is also the beginning of `torchvision`.
_OWN_FOLDERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def is_torch_asking() -> bool:
    """Return whether code of torch, and not of the user, has called the function that runs."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe(1)))
    # Frames of this library, such as handlers of modes, stand between the question and the code that asked.
    return next(file for file in files if not file.startswith(_OWN_FOLDERS[1])).startswith(_OWN_FOLDERS[0])


def line_of_user() -> str:
    """Return the line outside of this library and of torch that is running, for a message."""
    of_user = (f for f in reversed(traceback.extract_stack()) if not f.filename.startswith(_OWN_FOLDERS))
    return next((f", at {f.filename}:{f.lineno}: {f.line}" for f in of_user), "")
