"""Turn a function that captures tensors into a pure function of them.

An autograd.Function only differentiates its operands: a tensor that reaches it through a closure, a
`functools.partial`, a bound method or a module is lost, silently. So the function runs once, watched, and every
tensor that it uses without having been given or having made it is noted; from then on it runs with those tensors
substituted by operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import implicitdiff._functorch as functorch
import implicitdiff._pytree as pytree
from implicitdiff._elementary import elementary
from implicitdiff._modes import Substitute, Watch, version


class Closure:
    """A function together with the tensors that it captures, to be evaluated later as it would have been at the call.

    Attributes:
        captured: the captured tensors that a derivative or a batch dimension can hang on; plain constants stay where
            they are.
    """

    def __init__(
        self, name: str, fn: Callable[..., Any], outside: Sequence[tuple[torch.Tensor, int]], exchanges: bool
    ) -> None:
        self.name = name
        self.fn = elementary(fn) if exchanges else fn
        self.captured = [t for t, _ in outside if functorch.may_be_differentiated(t)]
        # Captured tensors become operands, which autograd watches.
        self.constants = [(t, v) for t, v in outside if not functorch.may_be_differentiated(t)]
        # At least one: a mode sees what a custom autograd.Function is applied to only where some transform is running.
        self.levels = max(1, max(map(functorch.level, self.captured), default=0))
        self.autocast = autocast_state()

    def __call__(self, values: Sequence[torch.Tensor], *args: Any) -> Any:
        """``fn(*args)`` with ``values`` in the place of the captured tensors."""
        if changed := [t for t, before in self.constants if version(t) != before]:
            raise RuntimeError(
                f"{self.name} captures a tensor of shape {list(changed[0].shape)} that has been changed in place since "
                "the call, so its derivative can no longer be taken; give the call a clone, or update out of place"
            )
        if self.autocast != autocast_state():
            with autocast(self.autocast):
                return self(values, *args)
        if not self.captured:
            return self.fn(*args)
        with functorch.levels_up_to(self.levels), Substitute(self.captured, values) as substitute:
            return pytree.map_tensors(substitute.resolve, self.fn(*args))


def close_over(name: str, fn: Callable[..., Any], *args: Any) -> tuple[Any, Closure]:
    """Run ``fn(*args)`` once and find what it captures.

    Args:
        name: how an error message calls the function.
        fn: a deterministic function free of side effects.
        args: pytrees; the tensors among them are replaced by detached aliases, so that the same tensor, captured as
            well, counts as captured.

    Returns:
        The (detached) result and the closure.

    Raises:
        ValueError: the function drew random numbers, changed a tensor in place that it was given or had captured, or
            captures one where that cannot be seen.
    """
    aliases = pytree.map_tensors(torch.Tensor.detach, args)
    watch = Watch(pytree.tensors(aliases))
    random_state = torch.get_rng_state()
    with torch.enable_grad(), watch:
        result = fn(*aliases)
    watch.see(pytree.tensors(result))
    if not torch.equal(random_state, torch.get_rng_state()):
        raise ValueError(
            f"{name} draws random numbers, but it is evaluated more than once and must give the same values each time; "
            "draw them outside and pass them as arguments (dropout: use eval mode)"
        )
    if changed := watch.changed():
        raise ValueError(
            f"{name} changes a tensor of shape {list(changed[0].shape)} in place that it did not make, but it is "
            "evaluated more than once and must be free of side effects (batch normalisation: use eval mode)"
        )
    closure = Closure(name, fn, list(watch.outside.values()), watch.exchanges)
    _refuse_unseen(closure, result, args)
    return pytree.map_tensors(torch.Tensor.detach, result), closure


def _refuse_unseen(closure: Closure, result: Any, args: tuple[Any, ...]) -> None:
    """Raise if the result still hangs on something when nothing that is known of does: its derivative would be lost."""
    if closure.captured:
        with torch.enable_grad():
            result = closure([t.detach() for t in closure.captured], *pytree.map_tensors(torch.Tensor.detach, args))
    if any(map(functorch.is_tracked, pytree.tensors(result))):
        raise ValueError(
            f"{closure.name} depends on a tensor that it captures where this cannot be seen, as in TorchScript, or "
            "where a captured tensor passes through an inner vmap untouched: pass the tensor as an argument"
        )


Autocast = tuple[tuple[str, bool, torch.dtype], ...]


def autocast_state() -> Autocast:
    """What autocast does now."""
    return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))


@contextmanager
def autocast(state: Autocast) -> Iterator[None]:
    """Run the body as autocast was."""
    with ExitStack() as stack:
        for (device, enabled, dtype), now in zip(state, autocast_state(), strict=True):
            if (device, enabled, dtype) != now:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Run linear algebra outside of autocast."""
    with autocast(tuple((device, False, dtype) for device, _, dtype in autocast_state())):
        yield
