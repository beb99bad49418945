"""Solvers: factories of pure functions that find roots, fixed points and minima, with the derivatives of the solution.

A factory, ``anderson(fixed_point_fn, history=5, ...)`` say, takes the user's function of ``(x, *args)`` and returns a
`Solver`, a NamedTuple of pure functions::

    state = solver.init(params, *args)
    params, state = solver.update(params, state, *args)     # one iteration
    params, state = solver.run(params, *args)               # iterations until every lane has stopped

The arguments after the first go by position or by keyword, as in ``solver.run(params, c=c)``: a keyword is the
parameter of that name of the user's first function, or an option of ``run``.

``params`` is a pytree of floating-point (for fixed points and roots also complex) tensors, the initial guess; what
comes back is a tree like it. ``args`` are pytrees, the same from ``init`` to the end: the state holds values at them.

Derivatives
    ``run`` gives the solution the derivatives that its optimality condition implies (`implicitdiff.custom_root`), to
    any order, in both modes, under any nesting of torch.func's transforms, in ``args`` and in every tensor that the
    user's functions capture. The initial guess has zero gradient. ``run(..., implicit_diff=False)`` differentiates the
    iterations in its place, as a loop over ``update`` does: the exact derivative of what was computed, also in the
    initial guess; with ``checkpoint_every=k`` only every k-th iterate is kept (`implicitdiff.unroll`).

Batches
    Under `torch.func.vmap` every lane is a problem of its own and stops by itself; the lanes are computed together, as
    one plain batch below all transforms.

Autocast
    A search runs outside of autocast, as a function under `torch.amp.custom_fwd` with ``cast_inputs=torch.float32``
    does: what is given to it in half precision is cast to float32, and so is its solution. A function that has products
    in half precision all the same enters autocast itself, and needs an ``rtol`` that these can reach.

State
    A NamedTuple of tensors. It begins with ``iter_num``, ``error``, ``target``, ``status`` and ``history``, goes on
    with what the method remembers, and has one value for each lane. It comes out of ``run`` detached; out of
    ``update``, what is reported is detached and what is remembered is not, so that a loop over ``update`` has the right
    derivative.

Pickling
    A solver pickles, with its functions and linear solvers, if the user's functions do: workers that are spawned and
    `torch.save` take it. A state loads with ``torch.load(file, weights_only=True)``.

Options of every factory:
    rtol, atol: a lane has converged at ``error <= max(rtol * first_error, atol)``. The error is the Euclidean norm
        over all leaves of what the solution makes zero, at the current ``params`` and in its units: ``f(x) - x`` for
        fixed points, ``F(x)`` for roots, the gradient for minima, ``J'r`` for least squares, ``x - prox(x - grad, 1)``
        for constrained and composite minima, the violation of the KKT conditions for `qp`. A small step is not
        convergence. ``first_error`` is that of the initial guess ``x``. ``rtol=None`` is ``eps^(2/3)`` of the dtype:
        4e-11 in float64, 2e-5 in float32. ``atol=None`` is no number, so that the units of the user's function do not
        matter, but ``eps^(2/3)`` times the size, at the initial guess, of the terms that cancel in the error:
        ``|f(x)|`` for fixed points, ``|J x|`` for roots, ``|H x|`` for minima, ``|J'J x|`` for least squares, for
        constrained minima what the constraints leave of ``|H x|``, and zero for `bisection` and `qp`, which know when
        they are done. So a guess near the solution has about the target that the guess zero has. (``J x`` and ``H x``
        are differences, one evaluation more.) Nor must an error be smaller than rounding makes it: with ``atol=None``,
        after 8, 16, 32, ... iterations and where a search fails, the target is at least what becomes of the error if
        every unknown moves by ``4 eps`` of itself; ``state.target`` says what it was in the end. With both None ``run``
        measures ``|J x|`` (for minima ``|H x|``, ...) again where the target is reached, and goes on if ``eps^(2/3)``
        of that is less: a poor initial guess must not make a poor solution (in float32, one that is at most some 1e4
        times as large). ``update`` alone does not.
        Give a number, in the error's units, where the guess is zero and so, but for rounding, is the solution: then
        there is no size to go by, and the search fails. Give one also where unknowns, or equations, of very different
        sizes share the norm, in which the large ones hide the small.
    maxiter: an integer is a budget, and using it up is no failure. None is a safety net, far above what the method
        should need, and meeting it is one.
    check_every: how many iterations to make between two looks at the status, which cost a synchronisation on a GPU.
        Iterations after convergence change nothing.
    solve: the linear solver of the implicit derivative, see `implicitdiff.custom_root`.
    on_failure: ``"raise"`` an `implicitdiff.ConvergenceError` if a lane fails, ``"warn"`` with an
        `implicitdiff.ConvergenceWarning`, or ``"ignore"``: look at ``state.status``, whose values are those of
        `Status`. What is not finite is a failure also within a budget.

Options of run:
    implicit_diff, checkpoint_every: see above.
    keep_history: whether ``state.history`` is to hold the errors of all iterations, ``(iterations + 1,)``, with
        checkpoints those where one is kept; a lane that has stopped repeats its last.
    verbose: show a progress bar (tqdm) on a run of more than a second.
    callback: ``callback(iter_num, params, state)`` at every look at the status, the first before the first iteration.
        Tensors are plain and detached, the lanes of the vmaps in front.
"""

from torch.serialization import add_safe_globals

from implicitdiff.solvers._dogleg import DoglegMemory
from implicitdiff.solvers._proximal_gradient import ProximalGradientMemory
from implicitdiff.solvers._scipy import ScipyMemory
from implicitdiff.solvers._solver import Solver
from implicitdiff.solvers._state import Progress, State
from implicitdiff.solvers._status import Status
from implicitdiff.solvers.anderson import AndersonMemory, anderson
from implicitdiff.solvers.bisection import BisectionMemory, bisection
from implicitdiff.solvers.broyden import BroydenMemory, broyden
from implicitdiff.solvers.broyden_root import BroydenRootMemory, broyden_root
from implicitdiff.solvers.chord import ChordMemory, chord
from implicitdiff.solvers.dogleg import dogleg
from implicitdiff.solvers.dogleg_root import dogleg_root
from implicitdiff.solvers.fixed_point_iteration import FixedPointMemory, fixed_point_iteration
from implicitdiff.solvers.from_optimizer import FromOptimizerMemory, from_optimizer
from implicitdiff.solvers.gauss_newton import GaussNewtonMemory, gauss_newton
from implicitdiff.solvers.gradient_descent import gradient_descent
from implicitdiff.solvers.kkt import KKTSolution, make_kkt_optimality_fn
from implicitdiff.solvers.lbfgs import LbfgsMemory, lbfgs
from implicitdiff.solvers.lbfgs_b import LbfgsBMemory, lbfgs_b
from implicitdiff.solvers.levenberg_marquardt import LevenbergMarquardtMemory, levenberg_marquardt
from implicitdiff.solvers.mirror_descent import MirrorDescentMemory, mirror_descent
from implicitdiff.solvers.newton import NewtonMemory, newton
from implicitdiff.solvers.newton_cg import NewtonCgMemory, newton_cg
from implicitdiff.solvers.nonlinear_cg import (
    NonlinearCgMemory,
    fletcher_reeves,
    hestenes_stiefel,
    nonlinear_cg,
    polak_ribiere,
)
from implicitdiff.solvers.projected_gradient import projected_gradient
from implicitdiff.solvers.proximal_gradient import proximal_gradient
from implicitdiff.solvers.qp import QPMemory, qp
from implicitdiff.solvers.scipy_least_squares import scipy_least_squares
from implicitdiff.solvers.scipy_minimize import scipy_minimize
from implicitdiff.solvers.scipy_root import scipy_root

__all__ = [
    "AndersonMemory",
    "BisectionMemory",
    "BroydenMemory",
    "BroydenRootMemory",
    "ChordMemory",
    "DoglegMemory",
    "FixedPointMemory",
    "FromOptimizerMemory",
    "GaussNewtonMemory",
    "KKTSolution",
    "LbfgsBMemory",
    "LbfgsMemory",
    "LevenbergMarquardtMemory",
    "MirrorDescentMemory",
    "NewtonCgMemory",
    "NewtonMemory",
    "NonlinearCgMemory",
    "Progress",
    "ProximalGradientMemory",
    "QPMemory",
    "ScipyMemory",
    "Solver",
    "State",
    "Status",
    "anderson",
    "bisection",
    "broyden",
    "broyden_root",
    "chord",
    "dogleg",
    "dogleg_root",
    "fixed_point_iteration",
    "fletcher_reeves",
    "from_optimizer",
    "gauss_newton",
    "gradient_descent",
    "hestenes_stiefel",
    "lbfgs",
    "lbfgs_b",
    "levenberg_marquardt",
    "make_kkt_optimality_fn",
    "mirror_descent",
    "newton",
    "newton_cg",
    "nonlinear_cg",
    "polak_ribiere",
    "projected_gradient",
    "proximal_gradient",
    "qp",
    "scipy_least_squares",
    "scipy_minimize",
    "scipy_root",
]

# What `torch.load` takes with weights_only=True.
add_safe_globals([KKTSolution, Progress, State, *(globals()[name] for name in __all__ if name.endswith("Memory"))])
