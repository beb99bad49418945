"""Euclidean projections: the point of a set that is nearest to ``v``.

Each takes ``v`` first, a floating-point tensor or a tree of them, and returns a tree like it, so that a solver can call
``projection(v)`` on a `functools.partial`. `box`, `non_negative` and `linf_ball` act on every entry alone, and
`transport` and `birkhoff` on one matrix. All others take ``v`` as one vector of all its entries, whatever its shape and
nesting; for one projection per row, take ``torch.func.vmap``. The result has the dtypes of ``v``.

They compose with all transforms of torch.func, to any order, and are differentiated in the numbers that make the set
as well. Where a derivative jumps, it is that of the side on which the constraint is active: zero for a ``v`` on a side
of the box, and for a set that is a single point zero everywhere. Where the nearest point itself jumps, as it does for
`l1_sphere`, `l2_sphere` and `sparse_simplex`, whose sets are not convex, it is that of one of the nearest points.

Numbers that make no set (a negative radius) raise a ValueError; inside of ``torch.compile``, tensors go unchecked.
`polyhedron`, `transport` and `birkhoff` search, outside of what is compiled, and raise a `ConvergenceError` if there is
no point.

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
