"""Inputs, devices and transforms for the tests of compiled steps, beside the plain formulas."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

import implicitdiff as idf
from tables.optimizers import ROWS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LARGE = 10**6 + 3

# The formulas of a kernel and of torch differ in the order of a few operations: by so many units in the last place of
# what is computed in.
ULPS = 32
# Where two such results of full precision are stored in half, rarely one is rounded up and the other one down.
UNEQUALLY_ROUNDED = 0.01


# One of every formula, with all of its branches but those of the others.
FEW = [next(row for row in reversed(ROWS) if row.factory is factory) for factory in {row.factory: 0 for row in ROWS}]
some_rows = pytest.mark.parametrize("row", FEW, ids=lambda row: row.name)


def both(row, **options):
    """The pair that insists on kernels, and the plain one."""
    return [row.factory(**{**row.options, **options}, use_accelerated_op=flag) for flag in (True, False)]


def smooth(row):
    """The same with a large eps. Without, the step of some hardly changes with a gradient: its derivative is noise."""
    return both(row, **({"eps": 0.5} if "eps" in inspect.signature(row.factory).parameters else {}))


def call(pair, method, inputs):
    grads, state, params = inputs
    return getattr(pair, method)(grads, state, params)


def floats(tree):
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, torch.Tensor) and x.dtype != torch.int64]


def normal(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def normals(sizes, dtype, device, seed):
    return [normal(n, dtype, device, 100 * seed + i) for i, n in enumerate(sizes)]


def gradients(sizes, dtype, device, step):
    """Gradients with elements that are 0 always, at odd steps, and at even ones; at the first step, one leaf is 0."""
    grads = normals(sizes, dtype, device, 1 + step)
    for g in grads:
        g[2::5] = 0
        g[3 + step % 2 :: 5] = 0
    if step == 0:
        grads[-1].zero_()
    return grads


def inputs_of(pair, sizes, dtype, device, steps):
    """What comes after some steps, at a different number of each leaf."""
    params = normals(sizes, dtype, device, 0)
    state = pair.init(params)
    state = state._replace(count=state.count + 2 * torch.arange(len(sizes), device=device))
    for step in range(steps):
        params, state = pair.step(gradients(sizes, dtype, device, step), state, params)
    return gradients(sizes, dtype, device, steps), state, params


def assert_near(actual, expected, ulps=ULPS):
    """Equal within some units in the last place, of each element or of a typical one: sums may cancel."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if not actual.dtype.is_floating_point and not actual.dtype.is_complex:
        assert torch.equal(actual, expected)
        return
    computed = torch.float32 if actual.dtype in (torch.float16, torch.bfloat16) else actual.dtype.to_real()
    near = ulps * torch.finfo(computed).eps
    sizes = expected.detach()[(expected != 0) & expected.isfinite()].abs().to(computed)
    atol = near * float(sizes.median()) if len(sizes) else 0.0
    if computed is actual.dtype.to_real():
        torch.testing.assert_close(actual, expected, rtol=near, atol=atol, equal_nan=True)
        return
    info = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual, expected, rtol=info.eps, atol=atol + info.smallest_normal * info.eps, equal_nan=True
    )
    unequal = (actual != expected) & ~(actual.isnan() & expected.isnan())
    assert unequal.sum() <= UNEQUALLY_ROUNDED * actual.numel()


def assert_all_near(actual, expected, ulps=ULPS):
    actual, spec = pytree.tree_flatten(actual)
    expected, other = pytree.tree_flatten(expected)
    assert spec == other
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, ulps)


def same(tensor):
    return tensor


def weighted(pair, method, inputs, used=None, layout=None):
    """A weighted sum of the used results as a function of all gradients, moments and parameters, and these."""
    leaves, spec = pytree.tree_flatten(inputs)
    at = [i for i, x in enumerate(leaves) if x.dtype != torch.int64]
    layouts = layout or [same] * 3
    # Gradients come first and parameters last.
    kinds = [*[0] * len(pytree.tree_leaves(inputs[0])), *[1] * len(floats(inputs[1])), *[2] * len(floats(inputs[2]))]

    def function(*tensors):
        filled = list(leaves)
        for i, kind, tensor in zip(at, kinds, tensors, strict=True):
            filled[i] = layouts[kind](tensor)
        results = floats(call(pair, method, pytree.tree_unflatten(filled, spec)))
        total = 0.0
        for i in range(len(results)) if used is None else used:
            weights = torch.cos(torch.arange(results[i].numel(), device=results[i].device) + i)
            # The sum itself gives its operand a cotangent of stride 0.
            part = results[i] * weights.to(results[i].dtype).reshape(results[i].shape) if i % 2 == 0 else results[i]
            part = torch.view_as_real(part).sum(-1) if part.is_complex() else part
            total = total + part.sum(dtype=torch.float64)
        return total

    return function, [leaves[i] for i in at]


def by_autograd(pair, method, inputs, used=None, layout=None):
    function, tensors = weighted(pair, method, inputs, used, layout)
    tensors = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*tensors), tensors, allow_unused=True, materialize_grads=True)


def by_transform(pair, method, inputs, used=None, layout=None):
    function, tensors = weighted(pair, method, inputs, used, layout)
    return grad(function, argnums=tuple(range(len(tensors))))(*tensors)


def trained(pair, theta):
    """What two steps make of parameters when all that enters them depends on theta."""
    params = {"a": theta[:2].sin(), "b": (2 * theta[2:]).cos()}
    state = pair.init(params)
    nothing, *moments = state
    moments = pytree.tree_map(lambda m: m + 0.3 + 0.1 * theta.sum().exp(), moments)
    state = type(state)(nothing + 1, *moments)
    for _ in range(2):
        grads = {"a": params["a"] ** 3 - theta[2], "b": params["b"] * theta[0] + 0.5}
        updates, state = pair.update(grads, state, params)
        params = idf.apply_updates(params, updates)
        params, state = pair.step(grads, state, params)
    return torch.cat([*params.values()])


THETA = torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.7, -1.1, 0.4, 0.9], dtype=torch.float64)


def loss(f):
    return lambda theta: (WEIGHTS.to(theta.device) * f(theta)).sum() + (f(theta) ** 2).sum()


def lanes(theta):
    return torch.stack([theta, 1.1 * theta, theta - 0.05])


def backward_twice(f, theta):
    theta = theta.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(f)(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), theta, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), theta)
    return torch.stack([first.detach(), second.detach(), third])


def cotangents_in_a_batch(f, theta):
    theta = theta.clone().requires_grad_()
    out = f(theta)
    eye = torch.eye(len(out), dtype=out.dtype, device=out.device)
    return torch.autograd.grad(out, theta, eye, is_grads_batched=True)[0]


def dual_numbers(f, theta):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(theta, theta.cos()))).tangent


TRANSFORMS = {
    "value": lambda f, t: f(t),
    "grad": lambda f, t: grad(loss(f))(t),
    "grad of grad": lambda f, t: grad(lambda t: (grad(loss(f))(t) ** 2).sum())(t),
    "backward twice": backward_twice,
    "cotangents in a batch": cotangents_in_a_batch,
    "jacrev": lambda f, t: jacrev(f)(t),
    "jacfwd": lambda f, t: jacfwd(f)(t),
    "jvp": lambda f, t: jvp(f, (t,), (t.cos(),))[1],
    "forward_ad": dual_numbers,
    "vmap": lambda f, t: vmap(f)(lanes(t)),
    "vmap of grad": lambda f, t: vmap(grad(loss(f)))(lanes(t)),
    "grad of vmap": lambda f, t: grad(lambda b: (vmap(f)(b) ** 2).sum())(lanes(t)),
    "hessian": lambda f, t: hessian(loss(f))(t),
}
