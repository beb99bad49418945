"""Devices and ways on which the compiled steps are tested."""

from __future__ import annotations

import pytest
import torch

import implicitdiff as idf
from implicitdiff._recorded.simplify import simplified
from implicitdiff._recorded.step import Parts, record_step
from implicitdiff._recorded.tape import Instruction

needs_cpu = pytest.mark.skipif(not idf.accelerated_op_available("cpu"), reason="_C is not built")
each_method = pytest.mark.parametrize("method", ["update", "step"])


def _device(name: str):
    reason = "_C is not built" if name == "cpu" or torch.cuda.is_available() else "no CUDA device"
    return pytest.param(name, marks=pytest.mark.skipif(not idf.accelerated_op_available(name), reason=reason))


each_device = pytest.mark.parametrize("device", [_device("cpu"), _device("cuda")])


def recorded_once(functions, x, eager, width, constants=()):
    """The results of a function of each lane, by the compiled machine; `functions` makes tensors with a lane in front.

    Returns:
        The results, and the names of the recorded instructions.
    """
    names = []

    def step(recorder, carried, operands):
        with recorder:
            made = functions(operands[0])
        names.extend(item.name for item in simplified(recorder.tape.items) if isinstance(item, Instruction))
        with recorder:
            return [*made, carried[-1] + 1], carried[-1] > 0

    carried = [*(torch.full_like(t, 1) for t in eager), torch.zeros(len(x), dtype=torch.int64)]
    first = [t[:1] for t in carried]
    recorded = record_step(Parts(step), first, [x[:1]], [True], constants, len(eager), width)
    recorded.run(carried, [x, *constants], len(x), 1)
    return carried[:-1], names
