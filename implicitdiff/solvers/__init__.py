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
    A `State`: ``iter_num``, ``error``, ``target``, ``status``, ``history``, ``progress`` and the ``memory`` of the
    method, such as an `LbfgsMemory`; ``state.converged`` is ``status == CONVERGED``. Each tensor has one value for
    each lane. It comes out of ``run`` detached; out of ``update``, what is reported is detached and the memory is
    not, so that a loop over ``update`` has the right derivative.

Pickling
    A solver pickles, with its functions and linear solvers, if the user's functions do: workers that are spawned
    and `torch.save` take it. A state loads with ``torch.load(file, weights_only=True)``.

When a search ends
    The error is the Euclidean norm, over all leaves, of the residual ``F(x)`` of the optimality condition: ``x -
    f(x)`` for fixed points, ``F(x)`` for roots, the gradient for minima, ``J'r`` for least squares, ``x - prox(x -
    grad, 1)`` under constraints and with penalties, the violation of the KKT conditions for `qp`. By default a
    search has converged when changing the unknowns by ``p`` of themselves would explain the error, ``|F(x)| <= p |J
    x|`` with ``p = max(4 eps, 4e-11)``, or when the error is rounding. ``J`` is the Jacobian of ``F``; ``|J x|`` is
    measured by a difference at the initial guess, and again where the search ends, so the units of the function and
    of ``x`` do not matter. Two evaluations are spent on that.

    =============  =============  =========================================================================
    ``rtol``       ``atol``       the target of the error
    =============  =============  =========================================================================
    not given      not given      ``p |J x|``, at the initial guess ``x0`` at least ``p |F(x0)|``
    ``r``          not given      ``max(r |F(x0)|, p |J x0|)``
    not given      ``a``          ``a``
    ``r``          ``a``          ``max(r |F(x0)|, a)``
    =============  =============  =========================================================================

    By default a method that knows a step of Newton's kind must besides be near the solution. `newton`,
    `gauss_newton`, `levenberg_marquardt` and the doglegs make such steps: the last one is at most ``eps^(1/3) |x|``,
    so that the error left is about the square of that. For least squares each unknown counts by itself there, unless
    it hardly changes ``r``. `lbfgs`, `nonlinear_cg` and `newton_cg` compute a step where they have come to their
    target, by some products with the Hessian, and it is at most ``eps^(2/5) |x|``; where the objective has no second
    derivative there is none. Where it is longer, the search goes on.

    A search that gets no closer says so. Where the error has not become smaller for some iterations, or a line
    search has failed, the rounding floor is measured: the change of ``F`` when every unknown moves by 4 units in
    its last place, two evaluations. A search whose error is no more has CONVERGED with default tolerances, if a
    step of Newton's kind, where there is one, is at most ``eps^(1/6) |x|`` for `newton` and `gauss_newton` and
    ``eps^(2/5) |x|`` for the others, and else has STALLED. For `levenberg_marquardt` and `dogleg` that step has the
    whole Hessian, by products with it, as the Jacobian may be singular where the Hessian is not. A search whose line
    search has failed has converged with default tolerances also at ``|F(x)| <= eps^(2/3) |J x|``. After 16 steps of
    length zero it has STALLED. ``state.progress.floor`` is the floor. `bisection` and `qp` judge their own rounding:
    the first by its brackets, the second by the terms of its equations.

    Give ``atol``, in the error's units, where the guess and the solution are zero: there is then no size to go by.
    Give it also where unknowns, or equations, of very different sizes share the norm, in which the large ones hide
    the small.

Options of every factory:
    rtol, atol: see above.
    maxiter: an integer is a budget, and using it up is no failure. None is a safety net, far above what the method
        should need, and meeting it is one.
    check_every: how many iterations to make between two looks at the status, which cost a synchronisation on a GPU.
        Iterations after convergence change nothing.
    solve: the linear solver of the implicit derivative, see `implicitdiff.custom_root`.
    on_failure: ``"raise"`` an `implicitdiff.ConvergenceError` if a lane fails, ``"warn"`` with an
        `implicitdiff.ConvergenceWarning`, or ``"ignore"``: look at ``state.status``, whose values are those of
        `Status`. Every status but ``CONVERGED`` is a failure; within an integer ``maxiter``, ``BUDGET_SPENT`` and
        ``STALLED`` are none. It goes for the linear solve of the derivative too, if ``solve`` is None: with
        ``"ignore"`` the derivative of a lane whose matrix is singular is nan, and the others have theirs.

Options of run:
    implicit_diff, checkpoint_every: see above.
    keep_history: whether ``state.history`` is to hold the errors of all iterations, ``(iterations + 1,)``, with
        checkpoints those where one is kept; a lane that has stopped repeats its last.
    verbose: show a progress bar (tqdm) on a run of more than a second.
    callback: ``callback(iter_num, params, state)`` at every look at the status, the first before the first iteration.
        Tensors are plain and detached, the lanes of the vmaps in front.
"""

from torch.serialization import add_safe_globals

from implicitdiff.solvers._loop.solver import Solver
from implicitdiff.solvers._loop.state import Progress, State
from implicitdiff.solvers._loop.status import Status
from implicitdiff.solvers._scipy import ScipyMemory
from implicitdiff.solvers._steps.dogleg import DoglegMemory
from implicitdiff.solvers._steps.proximal_gradient import ProximalGradientMemory
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
