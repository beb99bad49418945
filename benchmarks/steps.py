"""What an optimizer's step costs, against torch's fused steps and against copies that move as many bytes.

Times are medians of interleaved turns, with their quartiles; what counts is the ratio to the first row of a table,
since machines differ and are shared.

    python benchmarks/steps.py [device]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from measure import measure
from torch import Tensor

import implicitdiff as idf
from implicitdiff import _C

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
ROWS: dict[str, tuple[Callable[..., idf.GradientTransformation], type[torch.optim.Optimizer], dict[str, object]]] = {
    "sgd, momentum": (idf.sgd, torch.optim.SGD, {"momentum": 0.9}),
    "adam": (idf.adam, torch.optim.Adam, {}),
    "adamw": (idf.adamw, torch.optim.AdamW, {}),
    "rmsprop": (idf.rmsprop, torch.optim.RMSprop, {}),
    "adagrad": (idf.adagrad, torch.optim.Adagrad, {}),
    "adadelta": (idf.adadelta, torch.optim.Adadelta, {}),
    "adamax": (idf.adamax, torch.optim.Adamax, {}),
    "radam": (idf.radam, torch.optim.RAdam, {}),
}


def timed(run: Callable[[], object]) -> Callable[[], object]:
    """The same, waiting for a GPU to have done it."""
    if DEVICE.type == "cpu":
        return run

    def waited() -> None:
        run()
        torch.cuda.synchronize()

    return waited


def tensors(count: int, size: int) -> list[Tensor]:
    return [torch.randn(size, device=DEVICE) for _ in range(count)]


def in_place(name: str, count: int, size: int, fused: bool) -> Callable[[], object]:
    """A row of torch.optim, and one of ours that overwrites parameters and state alike."""
    _, reference, options = ROWS[name]
    params = [p.requires_grad_() for p in tensors(count, size)]
    for p in params:
        p.grad = torch.randn_like(p)
    return reference(params, lr=1e-3, **options, **({"fused": True} if fused else {})).step


def ours(name: str, count: int, size: int) -> Callable[[], object]:
    factory, _, options = ROWS[name]
    params, grads = tensors(count, size), tensors(count, size)
    pair = factory(lr=1e-3, use_accelerated_op=True, **options)
    carry = [params, pair.init(params)]

    def step() -> None:
        carry[:] = pair.step(grads, carry[1], carry[0], inplace=True)

    return step


def ours_in_two(count: int, size: int) -> Callable[[], object]:
    params, grads = tensors(count, size), tensors(count, size)
    pair = idf.adam(lr=1e-3, use_accelerated_op=True)
    carry = [params, pair.init(params)]

    def step() -> None:
        updates, carry[1] = pair.update(grads, carry[1], inplace=True)
        carry[0] = idf.apply_updates(carry[0], updates, inplace=True)

    return step


def fused_adam(count: int, size: int) -> Callable[[], object]:
    """The operation below torch.optim.Adam, without what makes it an optimizer."""
    columns = [tensors(count, size) for _ in range(2)] + [[t.zero_() for t in tensors(count, size)] for _ in range(2)]
    counts = [torch.tensor(1.0, device=DEVICE) for _ in range(count)]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    return lambda: torch._fused_adam_(*columns, [], counts, **options, amsgrad=False, maximize=False)


def compiled_alone(count: int, size: int) -> Callable[[], object]:
    """The call below ours, without what finds the addresses and looks at them."""
    grads, params = tensors(count, size), tensors(count, size)
    moments = [t.zero_() for t in tensors(2 * count, size)]
    counts = torch.ones(count, dtype=torch.int64, device=DEVICE)
    new = [t.data_ptr() for t in (*params, *moments)]
    addresses = [t.data_ptr() for t in grads] + [0] * count + new + new
    numbers = [1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0, 0.0]
    call = ("adam", numbers, "float32", [size] * count, list(range(count)), counts.data_ptr(), addresses)

    def step() -> None:
        if DEVICE.type == "cpu":
            _C.cpu.step(*call, torch.get_num_threads())
        else:
            _C.cuda.step(*call, torch.cuda.current_stream().cuda_stream)
        assert grads and params and moments and counts is not None  # their memory is in use

    return step


def adam_in_place(count: int, size: int, repetitions: int, calls: int) -> None:
    measure(
        f"Adam in place, {count} x {size:,} float32 on {DEVICE}, {torch.get_num_threads()} threads",
        {
            "torch.optim.Adam(fused=True).step": timed(in_place("adam", count, size, fused=True)),
            "torch._fused_adam_ alone": timed(fused_adam(count, size)),
            "the compiled step alone": timed(compiled_alone(count, size)),
            "adam().step": timed(ours("adam", count, size)),
            "adam().update, then apply_updates": timed(ours_in_two(count, size)),
        },
        repetitions,
        calls,
    )


def every_optimizer(count: int, size: int) -> None:
    for name in ROWS:
        measure(
            f"{name} in place, {count} x {size:,} float32 on {DEVICE}",
            {
                "torch.optim, its default": timed(in_place(name, count, size, fused=False)),
                "step": timed(ours(name, count, size)),
            },
            repetitions=7,
        )


def out_of_place(size: int) -> None:
    """Three tensors are read and three are made."""
    (grad,) = tensors(1, size)
    pair = idf.adam(use_accelerated_op=True)
    state = pair.init(grad)
    plain = idf.adam(use_accelerated_op=False)
    measure(
        f"Adam out of place, {size:,} float32 on {DEVICE}",
        {
            "a copy that moves the same bytes": timed(lambda: [t.clone() for t in (grad, state.mu, state.nu)]),
            "adam().update": timed(lambda: pair.update(grad, state)),
            "the same in plain torch": timed(lambda: plain.update(grad, state)),
        },
        repetitions=15,
    )


def textbook(grad: Tensor, mu: Tensor, nu: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adam as one writes it down."""
    mu = 0.9 * mu + 0.1 * grad
    nu = 0.999 * nu + 0.001 * grad**2
    return -1e-3 * (mu / (1 - 0.9**t)) / ((nu / (1 - 0.999**t)).sqrt() + 1e-8), mu, nu


def differentiable(count: int, size: int) -> None:
    """A step and its vector-Jacobian product, all of it in the graph."""
    grads = [g.requires_grad_() for g in tensors(count, size)]
    state = idf.adam().init(grads)
    moments = [[m.abs_().add_(1).requires_grad_() for m in column] for column in (state.mu, state.nu)]
    state = state._replace(mu=moments[0], nu=moments[1], count=state.count + 5)
    inputs = [*grads, *moments[0], *moments[1]]

    def step(use_accelerated_op: bool) -> list[Tensor]:
        updates, new = idf.adam(use_accelerated_op=use_accelerated_op).update(grads, state)
        return [*updates, *new.mu, *new.nu]

    def by_hand() -> list[Tensor]:
        rows = [textbook(g, mu, nu, 6) for g, mu, nu in zip(grads, *moments, strict=True)]
        return [t for column in zip(*rows, strict=True) for t in column]

    seeds = [torch.randn_like(t) for t in inputs]
    measure(
        f"Adam differentiated, forward and backward, {count} x {size:,} float32 on {DEVICE}",
        {
            "compiled": timed(lambda: torch.autograd.grad(step(True), inputs, seeds)),
            "the same formula in plain torch": timed(lambda: torch.autograd.grad(step(False), inputs, seeds)),
            "the textbook in plain torch": timed(lambda: torch.autograd.grad(by_hand(), inputs, seeds)),
        },
        repetitions=9,
        calls=2,
    )
    print("\nkept for the backward pass, MiB beside the inputs:")
    for name, run in (("compiled", lambda: step(True)), ("plain", lambda: step(False)), ("textbook", by_hand)):
        print(f"{name:58s} {kept(run, inputs) / 2**20:10.1f}")


def kept(run: Callable[[], object], inputs: list[Tensor]) -> int:
    """The bytes that autograd keeps, each storage once, without those of the inputs."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = run()
    for t in inputs:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del alive
    return sum(storages.values())


if __name__ == "__main__":
    adam_in_place(1, 10_000_000, repetitions=41, calls=5)
    adam_in_place(100, 1_000, repetitions=41, calls=20)
    adam_in_place(1, 10, repetitions=41, calls=100)
    if DEVICE.type == "cuda":
        adam_in_place(1, 100_000_000, repetitions=21, calls=5)
        adam_in_place(1000, 1_000, repetitions=21, calls=5)
    out_of_place(10_000_000)
    differentiable(4, 1_000_000)
    every_optimizer(1, 10_000_000)
