"""Devices and ways on which the compiled steps are tested."""

from __future__ import annotations

import pytest
import torch

import implicitdiff as idf

needs_cpu = pytest.mark.skipif(not idf.accelerated_op_available("cpu"), reason="_C is not built")
each_method = pytest.mark.parametrize("method", ["update", "step"])


def _device(name: str):
    reason = "_C is not built" if name == "cpu" or torch.cuda.is_available() else "no CUDA device"
    return pytest.param(name, marks=pytest.mark.skipif(not idf.accelerated_op_available(name), reason=reason))


each_device = pytest.mark.parametrize("device", [_device("cpu"), _device("cuda")])
