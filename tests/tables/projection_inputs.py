"""Tensors for the tests of projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from checks.tensors import tensor
from checks.transforms import TRANSFORMS
from torch import Tensor

from implicitdiff import projections, prox

F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan
X = tensor([1.0, 2.0, 3.0])


class Smooth(NamedTuple):
    """An operator near a point where it is smooth.

    Attributes:
        solution: the operator, of v and its numbers in one vector.
        reference: the formula that holds there, the active constraints being written out.
        theta: the point.
    """

    solution: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    theta: Tensor


# Formulas, with no rule of our own, that are no different four deep.
UP_TO_THREE = [name for name in TRANSFORMS if not name.startswith("four")]

EYE, ZERO = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
ALONG = tensor([[0.36, 0.48], [0.48, 0.64]])  # u u' for u = (0.6, 0.8)

OPERATORS: dict[str, Callable[[Any], Any]] = {
    "box": lambda v: projections.box(v, -0.5, 0.5),
    "non_negative": projections.non_negative,
    "simplex": projections.simplex,
    "l1_ball": projections.l1_ball,
    "l2_ball": projections.l2_ball,
    "hyperplane": lambda v: projections.hyperplane(v, 1.0, 0.2),
    "halfspace": lambda v: projections.halfspace(v, 1.0, -2.0),
    "affine_set": lambda v: projections.affine_set(v, torch.eye(2, 6, dtype=F64) + 1, 0.3),
    "linf_ball": lambda v: projections.linf_ball(v, 0.5),
    "box_section": lambda v: projections.box_section(v, -0.5, 0.6, 1.0, 0.4),
    "sparse_simplex": lambda v: projections.sparse_simplex(v, 3),
    "l1_sphere": projections.l1_sphere,
    "l2_sphere": projections.l2_sphere,
    "isotonic": projections.isotonic,
    "non_negative_lasso": lambda v: prox.non_negative_lasso(v, 0.3),
    "non_negative_ridge": lambda v: prox.non_negative_ridge(v, 0.3),
    "lasso": lambda v: prox.lasso(v, 0.3),
    "ridge": lambda v: prox.ridge(v, 0.3),
    "elastic_net": lambda v: prox.elastic_net(v, 0.3),
    "group_lasso": lambda v: prox.group_lasso(v, 0.3),
}

each_operator = pytest.mark.parametrize("f", OPERATORS.values(), ids=OPERATORS)
