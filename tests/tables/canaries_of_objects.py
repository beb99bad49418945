"""Canaries of tensors, modules and trees, and of the messages of torch that the package knows."""

from __future__ import annotations

import traceback
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks.private_names import canary
from torch import Tensor, nn
from torch.func import grad, vmap

from tables.canaries_of_levels import Seen, Twice, plain

# --- tensors and modules --------------------------------------------------------------------------------------------


@canary("._backward_hooks")
def hooks_of_a_tensor_are_in_a_table(name: str) -> None:
    x = plain().requires_grad_()
    assert getattr(x, name) is None
    x.register_hook(torch.neg)
    assert list(getattr(x, name).values()) == [torch.neg]


@canary("._version")
def the_version_counts_writes(name: str) -> None:
    x = plain()
    before = getattr(x, name)
    x.add_(1)
    assert getattr(x, name) == before + 1


@canary("._is_view")
def views_say_that_they_are(name: str) -> None:
    x = plain().requires_grad_().clone()
    assert getattr(x[0], name)()
    assert not getattr(x, name)()


@canary("._parameters", "._buffers", "._modules")
def tables_of_a_module_are_where_its_tensors_are(*names: str) -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    own, kept = (getattr(module[0], name) for name in names[:2])
    assert list(getattr(module, names[2])) == ["0"]
    assert list(own) == ["weight", "bias"]
    assert list(kept) == ["running_mean", "running_var", "num_batches_tracked"]
    own["weight"] = kept["running_mean"] = three = torch.full((2,), 3.0)
    assert module[0].weight is three
    assert module[0].running_mean is three


class Overriding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.calls: list[str] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.calls.append("_apply")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("_load_from_state_dict")
        super()._load_from_state_dict(*args, **kwargs)


@canary("._apply", "._load_from_state_dict")
def casts_and_loads_of_a_module_go_by_its_own_methods(cast: str, load: str) -> None:
    module = Overriding()
    module.double()
    assert (module.calls, module.weight.dtype) == ([cast], torch.float64)
    module.load_state_dict({"weight": torch.zeros(2)})
    assert module.calls == [cast, load]
    assert not module.weight.any()


@canary("torch._weight_norm")
def weight_norm_is_one_function_that_a_mode_sees(weight_norm: Any) -> None:
    v, g = plain() + 1, torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    torch.testing.assert_close(weight_norm(v, g, 0), v * g / v.norm(dim=1, keepdim=True))
    torch.testing.assert_close(weight_norm(v, g[:1], -1), v * 2 / v.norm())
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with Seen() as mode:
        module(torch.ones(3))
    assert weight_norm in mode.functions


@canary("torch._subclasses.fake_tensor.FakeTensor")
def fake_tensors_are_of_this_class(fake: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert isinstance(FakeTensorMode().from_tensor(plain()), fake)


@canary("torch.fx.experimental.proxy_tensor")
def the_mode_of_make_fx_is_known(module: Any) -> None:
    assert module.get_proxy_mode() is None
    seen = []

    def fn(x: Tensor) -> Tensor:
        seen.append(module.get_proxy_mode())
        return x.sin()

    module.make_fx(fn)(plain())
    assert seen[0] is not None


@canary("torch.distributed.tensor.DTensor")
def distributed_tensors_are_of_a_class_of_tensors(distributed: Any) -> None:
    assert issubclass(distributed, Tensor)
    assert callable(distributed.full_tensor)
    assert callable(distributed.to_local)


@canary("torch.distributed.tensor.Shard")
def a_shard_names_the_dimension_that_is_split(shard: Any) -> None:
    assert shard(2).dim == 2


# --- operations below autograd ----------------------------------------------------------------------------------------

aten = torch.ops.aten


@canary("._cdata")
def storages_have_an_address(name: str) -> None:
    x, y = plain(), plain()
    first, view, other = (getattr(t.untyped_storage(), name) for t in (x, x[0].detach(), y))
    assert int(first) == int(view) != int(other)


@canary("torch._ops.OpOverloadPacket")
def an_overload_knows_its_packet(packet: Any) -> None:
    assert isinstance(aten.add, packet)
    assert aten.add.Tensor.overloadpacket is aten.add
    assert aten.add._qualified_op_name == "aten::add"


@canary("torch._ops.OpOverload")
def operations_know_what_they_do(operation: Any) -> None:
    for each in (aten.add.Tensor, aten.add_.Tensor, aten.view.default, aten.dropout.default, aten.squeeze_.dim):
        assert isinstance(each, operation)
    assert not isinstance(aten.add, operation)
    assert (aten.add_.Tensor._schema.name, aten.add_.Tensor._overloadname) == ("aten::add_", "Tensor")
    assert aten.add_.Tensor._schema.is_mutable
    assert not aten.add.Tensor._schema.is_mutable
    assert aten.add.Tensor._schema.returns[0].alias_info is None
    assert aten.add_.Tensor._schema.returns[0].alias_info.is_write
    assert not aten.view.default._schema.returns[0].alias_info.is_write


@canary("torch._ops.HigherOrderOperator")
def functions_of_autograd_are_applied_by_an_operator(operator: Any) -> None:
    assert not isinstance(torch.sin, operator)
    with Seen() as mode:
        grad(lambda x: Twice.apply(x).sum())(plain())
    assert any(isinstance(function, operator) for function in mode.functions)


@canary("torch._decomp.decomposition_table.get")
def operations_are_computed_by_simpler_ones(get: Any) -> None:
    parts = get(aten.addcmul.default)
    x = plain()
    torch.testing.assert_close(parts(x, x, x, value=2.0), x + 2.0 * x * x)
    assert get(aten._linalg_eigh.default) is None


# --- trees ----------------------------------------------------------------------------------------------------------

TREES = "torch.utils._pytree."
Pair = namedtuple("Pair", "first second")
TREE = {"b": [1, (2, None)], "a": Pair(3, OrderedDict(c=4))}
LEAVES = [1, 2, None, 3, 4]


@canary(*(TREES + name for name in ("tree_flatten", "tree_unflatten", "tree_structure", "TreeSpec", "treespec_leaf")))
def trees_are_split_and_made_again(flatten: Any, unflatten: Any, structure: Any, spec_type: Any, leaf: Any) -> None:
    leaves, spec = flatten(TREE)
    assert leaves == LEAVES
    assert unflatten(leaves, spec) == TREE
    assert list(unflatten(leaves, spec)) == ["b", "a"]
    assert isinstance(spec, spec_type)
    assert spec == structure(TREE)
    assert structure(1) == leaf()
    assert leaf().is_leaf()


@canary(TREES + "SUPPORTED_NODES", TREES + "is_namedtuple_class")
def nodes_are_known_by_their_type(nodes: Any, is_namedtuple: Any) -> None:
    children, context = nodes[OrderedDict].flatten_fn(OrderedDict(c=4, d=5))
    assert (list(children), context) == ([4, 5], ["c", "d"])
    assert Tensor not in nodes
    assert is_namedtuple(Pair)
    assert not is_namedtuple(tuple)


@canary(TREES + "tree_map", TREES + "tree_map_only")
def maps_keep_the_nesting(over_all: Any, over_some: Any) -> None:
    assert over_all(lambda _: 7, TREE) == {"b": [7, (7, 7)], "a": Pair(7, OrderedDict(c=7))}
    assert over_some(int, lambda n: -n, TREE) == {"b": [-1, (-2, None)], "a": Pair(-3, OrderedDict(c=-4))}


@canary(TREES + "keystr", TREES + "tree_flatten_with_path")
def paths_are_written_as_python_does(write: Any, flatten: Any) -> None:
    names = [write(path) for path, _ in flatten(TREE)[0]]
    assert names == ["['b'][0]", "['b'][1][0]", "['b'][1][1]", "['a'].first", "['a'].second['c']"]


# --- messages -------------------------------------------------------------------------------------------------------


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return 2 * u


X = torch.tensor([1.0, -2.0], dtype=torch.float64)
W = torch.ones((), dtype=torch.float64, requires_grad=True)


def branching(x: Tensor) -> Tensor:
    return x if x > 0 else -x


def differentiating_a_constant(x: Tensor) -> Tensor:
    return torch.autograd.grad(x.sum(), x)[0]


def differentiating_another(x: Tensor) -> Tensor:
    return torch.autograd.grad((x**2).sum(), X)[0].sum()


def calling_backward(x: Tensor) -> Tensor:
    x.sum().backward()
    return x.sum()


def hooked(x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return grad(lambda x: x.exp().sum())(x)


MISUSES: dict[str, Callable[[], object]] = {
    "vmap: It looks like you're attempting to use a Tensor in some data-dependent control flow": lambda: vmap(
        branching
    )(X),
    "vmap: It looks like you're calling .item()": lambda: vmap(Tensor.item)(X),
    "vmap: We do not support batching operators that can": lambda: vmap(torch.nonzero)(X[None]),
    "Cannot access data pointer of Tensor that doesn't have storage": lambda: vmap(Tensor.data_ptr)(X),
    "element 0 of tensors does not require grad": lambda: vmap(differentiating_a_constant)(X),
    "One of the differentiated Tensors": lambda: grad(differentiating_another)(X),
    "The differentiated Tensor at index": lambda: torch.autograd.grad(W.exp(), W.detach().requires_grad_()),
    "backward() called inside a functorch transform": lambda: grad(calling_backward)(X),
    "You tried to vmap over": lambda: vmap(Twice.apply)(X),
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks": lambda: hooked(X),
}


def provoked(misuse: Callable[[], object]) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        misuse()
    return caught.value


# Of the same misuse in torch 2.11.
OLDER = {"The differentiated Tensor at index": "One of the differentiated Tensors"}

for text in MISUSES:

    @canary(f"message: {text}")
    def begins_the_message(text: str) -> None:
        message = str(provoked(MISUSES[text]))
        assert message.startswith((text, OLDER.get(text, text))), message


@canary("message: In order to use an autograd.Function with functorch transforms")
def the_last_frame_has_the_function_or_calls_it(text: str) -> None:
    def caller(x: Tensor) -> Tensor:
        return OldStyle.apply(x)

    error = provoked(lambda: vmap(caller)(X))
    assert str(error).startswith(text), error
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    # Since torch 2.14 `apply` is compiled.
    assert frame.f_locals.get("cls") is OldStyle or frame.f_code is caller.__code__
