"""Euclidean projections: the point of a set nearest to ``v``.

The first argument ``v`` is a floating-point tensor or a tree of such tensors. The result is a tree like ``v``, with its
dtypes. A solver calls ``projection(v)``, so bind further arguments by `functools.partial`. `box`, `non_negative` and
`linf_ball` act entry by entry, `transport` and `birkhoff` on one matrix. All others take ``v`` as one vector of all
entries, of any shape and nesting; for one projection a row, use ``torch.func.vmap``.

Projections compose with all transforms of torch.func, to any order, and have derivatives in the numbers that define the
set. Where a derivative jumps, the result is the derivative of the side with the active constraint: zero for ``v`` on a
face of the box, and zero everywhere for a set of one point. `l1_sphere`, `l2_sphere` and `sparse_simplex` project onto
sets that are not convex: where several points are nearest, the result is one of them, with its derivative.

Numbers that define no set (a negative radius) raise a ValueError. Under ``torch.compile`` tensors are not checked.
`polyhedron`, `transport` and `birkhoff` run an iteration outside of the compiled graph, and raise a `ConvergenceError`
if the set is empty.

Reference:
    Parikh and Boyd, "Proximal Algorithms", 2014, sections 6.2 and 6.5.
"""

from implicitdiff.projections._balls import l1_ball, l1_sphere, l2_ball, l2_sphere
from implicitdiff.projections._boxes import box, box_section, linf_ball, non_negative
from implicitdiff.projections._orders import isotonic
from implicitdiff.projections._planes import affine_set, halfspace, hyperplane
from implicitdiff.projections._polyhedra import polyhedron
from implicitdiff.projections._simplices import simplex, sparse_simplex
from implicitdiff.projections._transport import birkhoff, transport

__all__ = [
    "affine_set",
    "birkhoff",
    "box",
    "box_section",
    "halfspace",
    "hyperplane",
    "isotonic",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf_ball",
    "non_negative",
    "polyhedron",
    "simplex",
    "sparse_simplex",
    "transport",
]


def __dir__() -> list[str]:
    return __all__
