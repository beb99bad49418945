"""The public names of TorchOpt 0.7.3 on implicitdiff, for TorchOpt's own tests.

Where a name or an argument differs there is a line here, and a row in docs/migrating.md. What has no counterpart is
not here, and the tests that ask for it are in left_out.py.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from typing import Any

import torch
from torch.utils import _pytree as _torch_tree

import implicitdiff
from implicitdiff import nn as _nn
from implicitdiff import optim as _optim
from implicitdiff import pytree as _tree
from implicitdiff import schedule as _schedule


def _taking(factory: Any, *dropped: str, **constants: Any) -> Any:
    """A factory that ignores some keywords, and takes others with the only value that they have here."""

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        for key in dropped:
            kwargs.pop(key, None)
        for key, value in constants.items():
            if kwargs.pop(key, value) != value:
                raise NotImplementedError(f"{factory.__name__}: {key} is always {value!r}")
        return factory(*args, **kwargs)

    return made


def _extract_state_dict(target: Any, **options: Any) -> Any:
    """TorchOpt has tuples: of a dictionary for each submodule, of a state for each group."""
    state = implicitdiff.extract_state_dict(target, **options)
    if isinstance(state, implicitdiff.ModuleState):
        return state._replace(params=(state.params,), buffers=(state.buffers,))
    return (state,) if isinstance(target, implicitdiff.MetaOptimizer) else state


def _accelerated_op_available(devices: Any = None) -> bool:
    """TorchOpt takes several devices at a time; None and numbers are CUDA's."""
    names = {None: "cuda", 0: "cuda:0"}
    devices = devices if isinstance(devices, list) else [devices]
    return all(implicitdiff.accelerated_op_available(names.get(device, device)) for device in devices)


def _register_hook(hook: Any) -> implicitdiff.GradientTransformation:
    """A transformation that puts a hook on each gradient."""

    def update(updates: Any, state: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        _tree.tree_map(lambda t: (t.register_hook(hook), t)[1], updates)
        return updates, state

    return implicitdiff.GradientTransformation(lambda params: (), update)


def _nan_to_num_hook(nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Any:
    return functools.partial(torch.nan_to_num, nan=nan, posinf=posinf, neginf=neginf)


def _solve_inv(matvec: Any = None, b: Any = None, **options: Any) -> Any:
    """TorchOpt takes a system where the solver is made as well, and forgets it."""
    return implicitdiff.linear_solve.solve_inv(**options)


def _module(name: str, **names: Any) -> types.ModuleType:
    """A module of TorchOpt's."""
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(names)
    sys.modules[module.__name__] = module
    return module


_nn.MetaGradientModule.add_meta_module = _nn.MetaGradientModule.register_meta_module
implicitdiff.MetaOptimizer.state_groups = property(lambda self: [self.state])

_TRANSFORMATIONS = {
    "adadelta": _taking(_optim.adadelta, "moment_requires_grad"),
    "adagrad": _optim.adagrad,
    "adam": _taking(_optim.adam, "moment_requires_grad"),
    "adamax": _taking(_optim.adamax, "moment_requires_grad"),
    "adamw": _taking(_optim.adamw, "moment_requires_grad"),
    "radam": _taking(_optim.radam, "moment_requires_grad"),
    "rmsprop": _taking(_optim.rmsprop, nesterov=False, initial_scale=0.0),
    "sgd": _taking(_optim.sgd, "moment_requires_grad"),
}
_OPTIMIZERS = {
    "SGD": implicitdiff.SGD,
    "AdaDelta": implicitdiff.AdaDelta,
    "Adadelta": implicitdiff.AdaDelta,
    "AdaGrad": implicitdiff.AdaGrad,
    "Adagrad": implicitdiff.AdaGrad,
    "Adam": implicitdiff.Adam,
    "AdaMax": implicitdiff.AdaMax,
    "Adamax": implicitdiff.AdaMax,
    "AdamW": implicitdiff.AdamW,
    "Optimizer": implicitdiff.Optimizer,
    "RAdam": implicitdiff.RAdam,
    "RMSProp": _taking(implicitdiff.RMSProp, nesterov=False, initial_scale=0.0),
    "RMSprop": _taking(implicitdiff.RMSProp, nesterov=False, initial_scale=0.0),
}
_META_OPTIMIZERS = {
    "MetaAdaDelta": implicitdiff.MetaAdaDelta,
    "MetaAdadelta": implicitdiff.MetaAdaDelta,
    "MetaAdaGrad": implicitdiff.MetaAdaGrad,
    "MetaAdagrad": implicitdiff.MetaAdaGrad,
    "MetaAdam": _taking(implicitdiff.MetaAdam, "moment_requires_grad"),
    "MetaAdaMax": implicitdiff.MetaAdaMax,
    "MetaAdamax": implicitdiff.MetaAdaMax,
    "MetaAdamW": implicitdiff.MetaAdamW,
    "MetaOptimizer": implicitdiff.MetaOptimizer,
    "MetaRAdam": implicitdiff.MetaRAdam,
    "MetaRMSProp": implicitdiff.MetaRMSProp,
    "MetaRMSprop": implicitdiff.MetaRMSProp,
    "MetaSGD": implicitdiff.MetaSGD,
}
_STATE = {
    "extract_state_dict": _extract_state_dict,
    "module_clone": implicitdiff.module_clone,
    "module_detach_": implicitdiff.stop_gradient,
    "recover_state_dict": implicitdiff.recover_state_dict,
    "stop_gradient": implicitdiff.stop_gradient,
}
_VERSION = {"__version__": "0.7.3"}
_ANNOTATIONS = (
    *("ChainedGradientTransformation", "EmptyState", "UninitializedState", "Params", "Updates", "OptState", "Scalar"),
    *("Numeric", "Schedule", "ScalarOrSchedule", "PyTree", "Tensor", "OptionalTensor", "ListOfTensors"),
    *("TupleOfTensors", "SequenceOfTensors", "TensorOrTensors", "TensorTree", "ListOfOptionalTensors"),
    *("TupleOfOptionalTensors", "SequenceOfOptionalTensors", "OptionalTensorOrOptionalTensors", "OptionalTensorTree"),
    *("TensorContainer", "ModuleTensorContainers", "Future", "LinearSolver", "Device", "Size", "Distribution"),
    *("SampleFunc", "Samplable"),
)

globals().update(_TRANSFORMATIONS, **_OPTIMIZERS, **_META_OPTIMIZERS, **_STATE, **_VERSION)
FuncOptimizer = implicitdiff.FuncOptimizer
accelerated_op_available = _accelerated_op_available
apply_updates = implicitdiff.apply_updates
chain = functools.partial(implicitdiff.chain)
chain.flat = chain
clip_grad_norm = implicitdiff.clip_grad_norm
nan_to_num = _optim.nan_to_num

if implicitdiff._C.cpu is not None:
    _C = _module("_C", adam_op=_module("_C.adam_op"))
# Which way TorchOpt goes through a tree, for its tests; there is one way here.
alias = _module(
    "alias", utils=_module("alias.utils", _set_use_chain_flat=lambda use_chain_flat: None), **_TRANSFORMATIONS
)
clip = _module("clip", clip_grad_norm=clip_grad_norm)
combine = _module("combine", chain=chain, chain_flat=chain.flat)
diff = _module(
    "diff",
    implicit=_module(
        "diff.implicit",
        custom_root=implicitdiff.custom_root,
        ImplicitMetaGradientModule=_nn.ImplicitMetaGradientModule,
    ),
)
linear_solve = _module(
    "linear_solve",
    solve_cg=implicitdiff.linear_solve.solve_cg,
    solve_inv=_solve_inv,
    solve_normal_cg=implicitdiff.linear_solve.solve_normal_cg,
)
schedule = _module(
    "schedule",
    exponential_decay=lambda init_value, decay_rate, transition_begin=0, transition_steps=1, **options: (
        _schedule.exponential(init_value, decay_rate, transition_steps, begin=transition_begin, **options)
    ),
    linear_schedule=lambda init_value, end_value, transition_steps, transition_begin=0: _schedule.linear(
        init_value, end_value, transition_steps, begin=transition_begin
    ),
    polynomial_schedule=lambda init_value, end_value, power, transition_steps, transition_begin=0: _schedule.polynomial(
        init_value, end_value, power, transition_steps, begin=transition_begin
    ),
)
transform = _module(
    "transform",
    add_decayed_weights=_optim.add_decayed_weights,
    masked=_optim.masked,
    nan_to_num=nan_to_num,
    scale=_optim.scale,
    scale_by_accelerated_adam=functools.partial(_optim.scale_by_adam, use_accelerated_op=True),
    scale_by_adam=_optim.scale_by_adam,
    scale_by_rms=_optim.scale_by_rmsprop,
    scale_by_schedule=_optim.scale_by_schedule,
    scale_by_stddev=functools.partial(_optim.scale_by_rmsprop, centered=True),
    trace=_optim.trace,
)
register_hook = _register_hook
hook = _module(
    "hook", register_hook=register_hook, nan_to_num_hook=_nan_to_num_hook, zero_nan_hook=_nan_to_num_hook(0.0)
)
typing = _module(
    "typing", **dict.fromkeys(_ANNOTATIONS, Any), GradientTransformation=implicitdiff.GradientTransformation
)
update = _module("update", apply_updates=apply_updates)
utils = _module("utils", ModuleState=implicitdiff.ModuleState, **_STATE)
version = _module("version", **_VERSION)
pytree = _module(
    "pytree",
    tree_add=_tree.tree_add,
    tree_add_scalar_mul=lambda x, y, alpha=1.0: _tree.tree_add_scalar_mul(x, alpha, y),
    tree_flatten=_torch_tree.tree_flatten,
    tree_flatten_as_tuple=lambda tree: (tuple(_torch_tree.tree_leaves(tree)), _torch_tree.tree_structure(tree)),
    tree_leaves=_torch_tree.tree_leaves,
    tree_map=_torch_tree.tree_map,
    tree_map_=_torch_tree.tree_map_,
    tree_matmul=functools.partial(_tree.tree_map, operator.matmul),
    tree_mul=_tree.tree_mul,
    tree_neg=_tree.tree_neg,
    tree_pos=functools.partial(_tree.tree_map, operator.pos),
    tree_scalar_mul=_tree.tree_scalar_mul,
    tree_structure=_torch_tree.tree_structure,
    tree_sub=_tree.tree_sub,
    tree_sub_scalar_mul=lambda x, y, alpha=1.0: _tree.tree_add_scalar_mul(x, -alpha, y),
    tree_truediv=_tree.tree_div,
    tree_vdot_real=lambda x, y: _tree.tree_vdot(x, y).real.item(),
    tree_wait=lambda tree: _torch_tree.tree_map(lambda future: future.wait(), tree),
)
nn = _module(
    "nn",
    ImplicitMetaGradientModule=_nn.ImplicitMetaGradientModule,
    MetaGradientModule=_nn.MetaGradientModule,
)
optim = _module(
    "optim",
    func=_module("optim.func", FuncOptimizer=FuncOptimizer),
    meta=_module("optim.meta", **_META_OPTIMIZERS),
    FuncOptimizer=FuncOptimizer,
    **_OPTIMIZERS,
)
