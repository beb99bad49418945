"""What a step of small parameters costs, in counts that no busy machine can blur."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from checks.compiled import needs_cpu
from torch.utils._python_dispatch import TorchDispatchMode

import implicitdiff as idf
from implicitdiff import _C

FACTORIES = {"sgd": idf.sgd, "sgd-momentum": lambda **flag: idf.sgd(momentum=0.9, **flag), "adam": idf.adam}
each_factory = pytest.mark.parametrize("name", FACTORIES)
each_tree = pytest.mark.parametrize("tree", [list, lambda leaves: dict(enumerate(leaves))], ids=["list", "dict"])


def parameters(leaves):
    return [torch.nn.Parameter(leaf) for leaf in leaves]


def inputs_of(pair, leaves, tree=list, made=list):
    params = tree(made([torch.full((3,), 1.0 + i) for i in range(leaves)]))
    grads = tree([torch.full((3,), 0.5) for _ in range(leaves)])
    state = pair.init(params)
    for _ in range(2):  # what is found out once is known
        params, state = pair.step(grads, state, params, inplace=True)
    return grads, state, params


def in_place(pair, inputs):
    return lambda: pair.step(*inputs, inplace=True)


def functional(pair, inputs):
    def step():
        grads, state, params = inputs
        updates, state = pair.update(grads, state, params)
        return idf.apply_updates(params, updates), state

    return step


def operations(f):
    """The torch operations that are dispatched, as a profiler sees them: under a dispatch mode no kernel runs."""
    with torch.autograd.profiler.profile() as profile:
        f()
    return Counter(event.name for event in profile.function_events if event.cpu_parent is None)


def python_calls(f):
    """How often a Python function, or one of C, is called."""
    counts = Counter()

    def note(frame, event, arg):
        counts[event] += 1

    # A collection calls what waits for the end of dead objects.
    gc.collect()
    gc.disable()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(before)
        gc.enable()
    return counts["call"] + counts["c_call"]


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is not torch.ops.aten.detach.default
        return func(*args, **(kwargs or {}))


@needs_cpu
@each_tree
@pytest.mark.parametrize("made", [list, parameters], ids=["tensors", "parameters"])
@each_factory
def test_a_step_in_place_is_one_operation_and_two_compiled_calls(name, made, tree, monkeypatch):
    pair = FACTORIES[name]()
    step = in_place(pair, inputs_of(pair, 10, tree, made))
    assert operations(step) == {"aten::add_": 1}

    calls, module = Counter(), _C.cpu

    def counted(called):
        def run(*operands):
            calls[called] += 1
            return getattr(module, called)(*operands)

        return run

    names = [k for k, v in vars(module).items() if callable(v)]
    monkeypatch.setattr(_C, "cpu", SimpleNamespace(**{k: counted(k) for k in names}))
    step()
    assert calls == {"locate": 1, "step": 1}


@needs_cpu
@each_tree
@pytest.mark.parametrize(["name", "most"], [("sgd", 100), ("sgd-momentum", 130), ("adam", 150)])
def test_python_asks_nothing_leaf_by_leaf(name, most, tree):
    pair = FACTORIES[name]()
    few, many = (python_calls(in_place(pair, inputs_of(pair, leaves, tree))) for leaves in (2, 50))
    assert few == many <= most


@needs_cpu
@each_factory
def test_an_update_by_a_kernel_makes_its_results_and_adds_them(name):
    pair = FACTORIES[name]()
    moments = {"sgd": 0, "sgd-momentum": 1, "adam": 2}[name]
    counts = operations(functional(pair, inputs_of(pair, 10)))
    # The last is the count's.
    assert counts == {"aten::empty_like": 10 * (1 + moments), "aten::add": 10 + 1}


@pytest.mark.parametrize(["name", "each"], [("sgd", 1), ("sgd-momentum", 4), ("adam", 15)])
def test_operations_on_each_leaf_in_plain_torch(name, each):
    pair = FACTORIES[name](use_accelerated_op=False)
    counts = []
    for leaves in (2, 12):
        inputs = inputs_of(pair, leaves)
        with Dispatched() as mode:
            functional(pair, inputs)()
        counts.append(mode.count)
    # One more to apply the update. What depends on the step number is computed for all leaves at once.
    assert counts[1] - counts[0] == 10 * (each + 1)
    assert counts[0] - 2 * (each + 1) == {"sgd": 2, "sgd-momentum": 11, "adam": 14}[name]
