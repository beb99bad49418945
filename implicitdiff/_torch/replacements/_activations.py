"""Activations.

`hardsigmoid` lacks a second derivative, and `glu` lacks forward mode over forward mode (no issues are known).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from implicitdiff._torch.replacements._spelling import Operation, of_aten, only_if


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    # In place the caller expects a write to `input`, and integers raise in torch.
    only_if(not inplace, input.is_floating_point())
    # hardsigmoid(x) = min(max(x + 3, 0), 6) / 6.
    return functional.relu6(input + 3) / 6


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    only_if(input.is_floating_point(), -input.dim() <= dim < input.dim())
    only_if(input.shape[dim] % 2 == 0)
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


REPLACEMENTS: dict[Operation, Operation] = {
    functional.hardsigmoid: _hardsigmoid,
    functional.glu: _glu,
    **of_aten(hardsigmoid=_hardsigmoid, glu=_glu),
}
