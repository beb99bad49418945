"""Canaries of the levels of torch.func, of modes, and of the rest of the state of a thread."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks.private_names import canary, find
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LEVELS = "torch._C._functorch."
INTERPRETERS = "torch._functorch.pyfunctorch."


def plain() -> Tensor:
    return torch.arange(6.0, dtype=torch.float64).reshape(2, 3)


def inside(transform: Callable[..., Any], body: Callable[[Tensor], object], x: Tensor | None = None) -> None:
    """Run an assertion on the argument of a function under a transform."""
    ran = []

    def fn(x: Tensor) -> Tensor:
        body(x)
        ran.append(True)
        return x.sum()

    transform(fn)(plain() if x is None else x)
    assert ran


def jvp_of(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    return lambda x: jvp(fn, (x,), (torch.ones_like(x),))


def left_by_a_transform() -> Tensor:
    """A wrapper of a transform that has finished."""
    kept = []
    inside(grad, kept.append)
    return kept[0]


@contextlib.contextmanager
def one_level(increment: Callable[..., int], decrement: Callable[[], int], size: int = 2) -> Iterator[int]:
    level = increment(size, "same")
    try:
        yield level
    finally:
        decrement()


@canary(LEVELS + "maybe_get_level")
def levels_count_from_one_and_are_negative_without(get: Any) -> None:
    assert get(plain()) == -1
    inside(vmap, lambda x: inside(grad, lambda y: check([get(x), get(y)], [1, 2]), x))
    assert get(left_by_a_transform()) < -1


def check(got: Any, expected: Any) -> None:
    assert got == expected, f"{got} and not {expected}"


@canary(LEVELS + "get_interpreter_stack")
def the_stack_has_an_entry_for_each_transform(stack: Any) -> None:
    assert stack() is None
    inside(vmap, lambda x: inside(grad, lambda _: check(len(stack()), 2), x))


@canary(LEVELS + "get_unwrapped")
def one_layer_is_taken_off(unwrap: Any) -> None:
    inside(grad, lambda x: torch.testing.assert_close(unwrap(x), plain()))
    inside(vmap, lambda x: check(tuple(unwrap(x).shape), (2, 3)))
    torch.testing.assert_close(unwrap(left_by_a_transform()), plain())


@canary(LEVELS + "is_batchedtensor", LEVELS + "maybe_get_bdim")
def batch_wrappers_know_their_dimension(is_batched: Any, dimension: Any) -> None:
    assert not is_batched(plain())
    inside(grad, lambda x: check(is_batched(x), False))
    inside(lambda fn: vmap(fn, in_dims=1), lambda x: check((is_batched(x), dimension(x)), (True, 1)))


@canary(*(LEVELS + n for n in ("_vmap_increment_nesting", "_vmap_decrement_nesting", "_add_batch_dim")))
def a_vmap_is_a_level_and_wrappers_of_it(increment: Any, decrement: Any, add: Any) -> None:
    functorch = torch._C._functorch
    with one_level(increment, decrement) as level:
        assert level == 1
        assert len(functorch.get_interpreter_stack()) == 1
        wrapped = add(plain(), 1, level)
        assert wrapped.shape == (2,)
        assert (functorch.maybe_get_level(wrapped), functorch.maybe_get_bdim(wrapped)) == (1, 1)
    assert functorch.get_interpreter_stack() is None


@canary(LEVELS + "_remove_batch_dim")
def the_lanes_come_back_in_front(remove: Any) -> None:
    functorch = torch._C._functorch
    with one_level(functorch._vmap_increment_nesting, functorch._vmap_decrement_nesting, 3) as level:
        image = 2 * functorch._add_batch_dim(plain(), 1, level)
        torch.testing.assert_close(remove(image, level, 3, 0), 2 * plain().T)
        # What is not batched is repeated.
        assert remove(torch.ones(2), level, 3, 0).shape == (3, 2)


@canary(LEVELS + "_wrap_for_grad", LEVELS + "_unwrap_for_grad")
def gradient_wrappers_carry_the_level_they_are_given(wrap: Any, unwrap: Any) -> None:
    functorch = torch._C._functorch
    below = plain()  # made inside, it would be a wrapper

    def body(x: Tensor) -> None:
        wrapped = wrap(below, 1)
        assert functorch.maybe_get_level(wrapped) == 1
        assert not functorch.is_batchedtensor(wrapped)
        assert functorch.maybe_get_level(unwrap(wrapped, 1)) == -1
        torch.testing.assert_close(unwrap(x, 1), below)
        assert x.requires_grad
        assert unwrap(below, 1) is below

    inside(grad, body)


@canary(LEVELS + "is_legacy_batchedtensor")
def the_vmap_of_batched_gradients_has_wrappers_of_its_own(is_legacy: Any) -> None:
    seen = []
    x = plain().requires_grad_()
    y = 2 * x
    y.register_hook(lambda u: seen.append(is_legacy(u)))
    torch.autograd.grad(y, x, torch.ones(4, 2, 3, dtype=y.dtype), is_grads_batched=True)
    assert seen == [True]
    assert not is_legacy(plain())
    inside(vmap, lambda x: check(is_legacy(x), False))


@canary(LEVELS + "set_inplace_requires_grad_allowed", "torch._functorch.eager_transforms.enable_inplace_requires_grad")
def requires_grad_is_refused_inside_of_a_transform_unless_allowed(allow: Any, allowed: Any) -> None:
    def body(_: Tensor) -> None:
        with allowed(True):
            assert plain().requires_grad_().requires_grad
        with pytest.raises(RuntimeError, match="requires_grad_"):
            plain().requires_grad_()
        with allowed(False):
            allow(True)
            assert plain().requires_grad_().requires_grad

    inside(vmap, body)


@canary(*(INTERPRETERS + n for n in ("retrieve_all_functorch_interpreters", "VmapInterpreter")))
def interpreters_are_listed_from_the_outermost(running: Any, of_vmap: Any) -> None:
    assert running() == []

    def body(_: Tensor) -> None:
        outer, inner = running()
        assert isinstance(outer, of_vmap)
        assert not isinstance(inner, of_vmap)
        assert (outer.level(), outer.batch_size(), outer.randomness()) == (1, 2, "same")
        assert inner.level() == 2

    inside(lambda fn: vmap(fn, randomness="same"), lambda x: inside(grad, body, x))


@canary(LEVELS + "TransformType", *(LEVELS + f"TransformType.{kind}" for kind in ("Vmap", "Grad", "Jvp")))
def an_interpreter_has_the_type_of_its_transform(_: Any, of_vmap: Any, of_grad: Any, of_jvp: Any) -> None:
    def keys() -> list[Any]:
        return [one.key() for one in torch._C._functorch.get_interpreter_stack()]

    inside(vmap, lambda _: check(keys(), [of_vmap]))
    inside(grad, lambda _: check(keys(), [of_grad]))
    inside(jvp_of, lambda _: check(keys(), [of_jvp]))


@canary(INTERPRETERS + "retrieve_current_functorch_interpreter")
def the_current_interpreter_is_the_innermost_and_lowers(current: Any) -> None:
    stack = torch._C._functorch.get_interpreter_stack

    def body(_: Tensor) -> None:
        assert current().level() == 2
        with current().lower():
            assert len(stack()) == 1
        assert len(stack()) == 2

    inside(vmap, lambda x: inside(grad, body, x))


@canary(INTERPRETERS + "temporarily_clear_interpreter_stack")
def the_stack_is_cleared_and_put_back(cleared: Any) -> None:
    stack = torch._C._functorch.get_interpreter_stack

    def body(x: Tensor) -> None:
        with cleared():
            assert stack() is None
        assert len(stack()) == 1
        assert (x + 1).shape == (3,)

    inside(vmap, body)
    with cleared():
        assert stack() is None


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return 2 * u


class Seen(TorchFunctionMode):
    """Keeps the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@canary("torch._functorch.autograd_function.custom_function_call")
def a_mode_sees_a_custom_function_where_a_level_runs(call: Any) -> None:
    def body(x: Tensor) -> None:
        with Seen() as mode:
            Twice.apply(x)
        assert call in mode.functions

    inside(grad, body)


@canary("torch._functorch.utils.enable_single_level_autograd_function", "torch.autograd.function._SingleLevelFunction")
def a_single_level_function_is_recorded_by_autograd_of_this_level(enabled: Any, base: Any) -> None:
    functorch, current = torch._C._functorch, find(INTERPRETERS + "retrieve_current_functorch_interpreter")

    def forward(x: Tensor) -> Tensor:
        assert functorch.maybe_get_level(x) == 1
        with current().lower():
            y = 3 * functorch._unwrap_for_grad(x, 1)
        return functorch._wrap_for_grad(y, 1)

    rules = {"forward": forward, "setup_context": Twice.setup_context, "backward": lambda ctx, u: 3 * u}
    function = type("Thrice", (base,), {name: staticmethod(rule) for name, rule in rules.items()})

    def thrice(x: Tensor) -> Tensor:
        with enabled():
            return function.apply(x).sum()

    torch.testing.assert_close(grad(thrice)(plain()), torch.full_like(plain(), 3.0))


@canary("torch._functorch.utils.unwrap_dead_wrappers")
def dead_wrappers_alone_are_taken_off(without: Any) -> None:
    level = torch._C._functorch.maybe_get_level
    dead, number = without((left_by_a_transform(), 1.0))
    assert level(dead) == -1
    assert number == 1.0
    inside(grad, lambda x: check(without((x,))[0] is x, True))


@canary("torch._functorch.vmap.lazy_load_decompositions")
def decompositions_batch_what_has_no_rule(load: Any) -> None:
    functorch = torch._C._functorch
    load()
    with one_level(functorch._vmap_increment_nesting, functorch._vmap_decrement_nesting) as level:
        v = functorch._add_batch_dim(plain(), 0, level)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a loop over lanes, in place of a rule
            image = torch.addr(torch.zeros(3, 3, dtype=v.dtype), v, v)
        lanes = functorch._remove_batch_dim(image, level, 2, 0)
    torch.testing.assert_close(lanes, plain()[:, :, None] * plain()[:, None])


# --- modes, and what else a thread has ------------------------------------------------------------------------------


@canary("torch._C.DisableTorchFunction", "torch._C._EnableTorchFunction")
def no_mode_looks_on_where_torch_functions_are_disabled_and_one_where_enabled(disabled: Any, enabled: Any) -> None:
    with Seen() as mode:
        with disabled():
            plain().sin()
            with enabled():
                plain().cos()
            plain().sin()
        assert torch.Tensor.sin not in mode.functions and torch.Tensor.cos in mode.functions


@canary("torch._C._len_torch_function_stack")
def modes_are_counted(count: Any) -> None:
    assert count() == 0
    with Seen() as mode:
        assert count() == 1
        plain().sin()
    assert torch.Tensor.sin in mode.functions


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@canary("torch.utils._python_dispatch.TorchDispatchMode")
def a_mode_says_whether_its_rule_asks_for_the_compiler(mode: Any) -> None:
    class Asking(mode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any: ...

    class Plain(mode):
        __torch_dispatch__ = Dispatched.__torch_dispatch__

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

    assert hasattr(Asking.__torch_dispatch__, "__wrapped__")
    assert Plain.__torch_dispatch__ is Dispatched.__torch_dispatch__


@canary("torch._C._DisableTorchDispatch", "torch._C._len_torch_dispatch_stack")
def no_mode_looks_on_where_dispatch_is_disabled(disabled: Any, count: Any) -> None:
    assert count() == 0
    x = plain()
    with Dispatched() as mode:
        assert count() == 1
        with disabled():
            x.sin()
        assert mode.functions == []
        x.sin()
    assert mode.functions == [torch.ops.aten.sin.default]


@canary("torch.utils._python_dispatch._disable_current_modes")
def the_running_modes_look_away_and_new_ones_look_on(disabled: Any) -> None:
    x = plain()
    with Dispatched() as outer:
        with disabled(), Dispatched() as inner:
            x.sin()
        x.cos()
    assert (inner.functions, outer.functions) == ([torch.ops.aten.sin.default], [torch.ops.aten.cos.default])


HOOKS = [f"torch._C._autograd._{verb}_saved_tensors_default_hooks" for verb in ("top", "pop", "push")]


@canary(*HOOKS)
def hooks_of_saved_tensors_are_a_stack(top: Any, pop: Any, push: Any) -> None:
    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t

    packed: list[Tensor] = []
    x = plain().requires_grad_()
    assert top(True) is None
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        assert top(True) == (pack, torch.clone)
        pop()
        assert top(True) is None
        x.exp()
        assert not packed
        push(pack, torch.clone)
        x.exp()
        assert len(packed) == 1
    assert top(True) is None


@canary("torch._C._is_fwd_grad_enabled", "torch.autograd.forward_ad._set_fwd_grad_enabled")
def forward_mode_is_switched_off_and_on(is_enabled: Any, switched: Any) -> None:
    assert is_enabled()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(plain(), plain())
        with switched(False):
            assert not is_enabled()
            y = 2 * x
            with switched(True):
                z = 2 * x
        assert forward_ad.unpack_dual(y).tangent is None
        torch.testing.assert_close(forward_ad.unpack_dual(z).tangent, 2 * plain())
    assert is_enabled()


@canary("torch.autograd.forward_ad._current_level")
def forward_mode_is_a_level_of_at_least_zero(level: Any) -> None:
    assert level == -1
    with forward_ad.dual_level():
        assert forward_ad._current_level == 0
    inside(jvp_of, lambda _: check(forward_ad._current_level, 0))
    assert forward_ad._current_level == -1


@canary("torch.autograd.Variable._execution_engine.run_backward")
def the_engine_returns_the_gradients(run: Any) -> None:
    x, unused = plain().requires_grad_(), plain().requires_grad_()
    y = x**2
    for _ in range(2):  # the graph is kept
        found = run((y,), (torch.ones_like(y),), True, True, (x, unused), allow_unreachable=True, accumulate_grad=False)
        torch.testing.assert_close(found[0], 2 * x)
        assert found[0].requires_grad
        assert found[1] is None
    assert x.grad is None


@canary("torch._compile._disable_dynamo", "torch._C._dynamo.eval_frame.get_eval_frame_callback")
def what_is_disabled_runs_eagerly_and_the_callback_tells_of_a_compiler(disable: Any, callback: Any) -> None:
    compiled, callbacks = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.extend(node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph.forward

    def probe(x: Tensor) -> Tensor:
        callbacks.append(callback())
        return x.cos()

    assert callback() is None
    disabled = disable(probe)
    # Its own frame is not compiled, but those below would be.
    skipped = torch._dynamo.disable(probe, recursive=False)
    torch.testing.assert_close(
        torch.compile(lambda x: disabled(skipped(x.sin())), backend=backend)(plain()), plain().sin().cos().cos()
    )
    assert "sin" in compiled
    assert "cos" not in compiled
    assert callbacks[0] is not None
    assert callbacks[1] is None
    assert callback() is None


@canary("torch.overrides._get_current_function_mode_stack")
def modes_are_listed_from_the_outermost(stack: Any) -> None:
    assert list(stack()) == []
    with Seen() as outer, Seen() as inner:
        assert list(stack()) == [outer, inner]


@canary("torch._C._is_any_autocast_enabled")
def autocast_is_on_for_some_device(is_on: Any) -> None:
    assert not is_on()
    with torch.autocast("cpu"):
        assert is_on()
        with torch.autocast("cpu", enabled=False):
            assert not is_on()


@canary("torch.overrides._push_mode", "torch.overrides._pop_mode")
def modes_are_pushed_and_popped(push: Any, pop: Any) -> None:
    with Seen() as mode:
        assert pop() is mode
        plain().sin()
        assert torch.Tensor.sin not in mode.functions
        push(mode)
        plain().sin()
    assert torch.Tensor.sin in mode.functions


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@canary("torch.nn.utils.parametrize._cache_enabled")
def the_cache_of_parametrised_weights_is_counted(count: Any) -> None:
    parametrize = torch.nn.utils.parametrize
    module = nn.Linear(2, 1)
    parametrize.register_parametrization(module, "weight", Doubled())
    assert count == 0
    with parametrize.cached():
        assert parametrize._cache_enabled == 1
        assert module.weight is module.weight
        parametrize._cache_enabled = 0
        assert module.weight is not module.weight
        parametrize._cache_enabled = 1
    assert parametrize._cache_enabled == 0
