"""Solvers: factories of pure functions that find roots, fixed points and minima, with the derivatives of the solution.

A factory such as ``anderson(fixed_point_fn, history=5, ...)`` takes the user's function of ``(x, *args)`` and returns a
`Solver`, a NamedTuple of pure functions::

    state = solver.init(params, *args)
    params, state = solver.update(params, state, *args)     # one iteration
    params, state = solver.run(params, *args)               # iterations until every lane has stopped

Arguments after the first are positional or by keyword, as in ``solver.run(params, c=c)``. A keyword is a parameter of
the user's first function, or an option of ``run``.

``params`` is a pytree of floating-point tensors, the initial guess; for fixed points and roots complex tensors are
allowed. The result is a tree like ``params``. ``args`` are pytrees, the same from ``init`` to the last ``update``: the
state holds values computed with them.

Derivatives
    The result of ``run`` has the derivatives that its optimality condition implies (`implicitdiff.custom_root`), to any
    order, in both modes, under any nesting of torch.func's transforms, in ``args`` and in every tensor that the user's
    functions capture. The initial guess has zero gradient. ``run(..., implicit_diff=False)`` differentiates the
    iterations instead, like a loop over ``update``: the exact derivative of the computation, also in the initial guess.
    ``checkpoint_every=k`` then keeps only every k-th iterate (`implicitdiff.unroll`).

Batches
    Under `torch.func.vmap` every lane is a problem of its own and stops by itself. All lanes are computed together, as
    a plain batch below all transforms.

Autocast
    A search runs outside of autocast, like a function under `torch.amp.custom_fwd` with ``cast_inputs=torch.float32``:
    arguments in half precision are cast to float32, and so is the solution. A user's function that computes in half
    precision enters autocast itself, and needs an ``rtol`` reachable in half precision.

State
    A `State` has the fields ``iter_num``, ``error``, ``target``, ``status``, ``history``, ``progress``, and the
    method's ``memory``, such as an `LbfgsMemory`; ``state.converged`` is ``status == CONVERGED``. Each tensor has a
    value for each lane. ``run`` returns a detached state. ``update`` detaches all fields except the memory, so a loop
    over ``update`` has the right derivative.

Pickling
    A solver pickles, with its functions and linear solvers, if the user's functions do: spawned workers and
    `torch.save` accept a solver. A state loads with ``torch.load(file, weights_only=True)``.

When a search ends
    The error is the Euclidean norm, over all leaves, of the residual ``F(x)`` of the optimality condition: ``x -
    f(x)`` for fixed points, ``F(x)`` for roots, the gradient for minima, ``J'r`` for least squares, ``x - prox(x -
    grad, 1)`` under constraints and with penalties, the violation of the KKT conditions for `qp`. By default a search
    has converged if a relative change ``p`` of the unknowns would explain the error, ``|F(x)| <= p |J x|`` with ``p =
    max(4 eps, 4e-11)``, or if the error is rounding. ``J`` is the Jacobian of ``F``. A difference measures ``|J x|`` at
    the initial guess and again at the end, at the cost of two evaluations, so the units of the function and of ``x`` do
    not matter. Far from a solution ``|J x|`` says little: at an error above ``|J x| / 100`` the measure is ``|J x -
    F(x)|``, and the next target is at least a tenth of the error. If this measure decreases with the error, the
    solution is zero, and the measure is ``eps^(1/6) |J (x - x0)|``.

    =============  =============  =========================================================================
    ``rtol``       ``atol``       the target of the error
    =============  =============  =========================================================================
    not given      not given      ``p |J x|``, at the initial guess ``x0`` at least ``p |F(x0)|``
    ``r``          not given      ``max(r |F(x0)|, p |J x0|)``
    not given      ``a``          ``a``
    ``r``          ``a``          ``max(r |F(x0)|, a)``
    =============  =============  =========================================================================

    By default a method with Newton-type steps must also be near the solution. The steps of `newton`, `gauss_newton`,
    `levenberg_marquardt` and the doglegs are of this type. For roots the last step is at most ``eps^(1/3) |x|``, so the
    remaining error is about the square of that. For least squares it is at most ``eps^(2/5) |x|``, and each unknown is
    measured by itself, except unknowns with hardly any effect on ``r``. `lbfgs`, `nonlinear_cg`, `newton_cg`,
    `gradient_descent` and `from_optimizer` compute a Newton-type step at their target, by a few products with the
    Hessian, and the step is at most ``eps^(2/5) |x|``; for an objective without second derivatives the step is omitted.
    With a longer step the search continues.

    A search reports lack of progress. If the error has not decreased for some iterations, or a line search has failed,
    two evaluations measure the rounding floor: the change of ``F`` if every unknown moves by 4 units in its last place.
    With default tolerances a search with an error of at most the floor has CONVERGED if its Newton-type step, if any,
    is at most ``eps^(1/6) |x|`` for roots, ``eps^(1/2) |x|`` for least squares and ``eps^(2/5) |x|`` for minima;
    otherwise the search has STALLED. For `levenberg_marquardt` and `dogleg` that step uses products with the full
    Hessian, because the Jacobian may be singular at points with a regular Hessian. After a failed line search, with
    default tolerances, ``|F(x)| <= eps^(2/3) |J x|`` is sufficient for convergence. After 16 steps of length zero a
    search has STALLED. ``state.progress.floor`` is the floor. `bisection` and `qp` judge their own rounding:
    `bisection` by the brackets, `qp` by the terms of the equations.

    At a solution of zero the floor does not contain the rounding of constants, such as data. Where a search fails, or
    makes no progress for 64 iterations, at an ``x`` so small, 27 evaluations on a line through ``x`` measure it. An
    error of at most 16 times this rounding has converged, for minimisers with Newton-type steps. For other methods it
    has converged only if compiled code and torch round it differently.

    Give ``atol``, in the error's units, if both the guess and the solution are zero, because then no size of ``x`` is
    available, and the measurement may fail. Give ``atol`` also if unknowns, or equations, of very different sizes share
    the norm, because the large entries hide the small.

Options
    `SolverOptions` lists the options of every factory, and ``help(solver.run)`` those of ``run``.

    With ``compile="auto"`` the loop of ``run`` is recorded at the first call and runs in compiled code, if all
    operations of a step have instructions. Otherwise torch replays the recorded operations, if Python decides on no
    value. Otherwise, and with a callback, a history, a progress bar or ``implicit_diff=False``, the loop runs in
    Python. The logger ``implicitdiff.solvers`` tells which, at the level INFO. Compiled results differ from the others
    in their last digits.

    Every status except ``CONVERGED`` is a failure; with an integer ``maxiter``, ``BUDGET_SPENT`` and ``STALLED`` are
    not. ``on_failure`` also applies to the linear solve of the derivative if ``solve`` is None: with ``"ignore"`` the
    derivative of a lane with a singular matrix is nan, and the other lanes are unaffected.

    Iterations after convergence change nothing, so ``check_every`` does not change a result. A history has the shape
    ``(iterations + 1,)``, with checkpoints the errors at checkpoints; a stopped lane repeats its last error. A callback
    gets plain, detached tensors, with the lanes of the vmaps in front; its first call precedes the first iteration.
"""

from torch.serialization import add_safe_globals

from implicitdiff.solvers._loop.options import SolverOptions
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
    "SolverOptions",
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


def __dir__() -> list[str]:
    return __all__


# A saved state names the classes of its parts. It names them here, so that private modules may move.
State.__module__ = Progress.__module__ = __name__
ProximalGradientMemory.__module__ = DoglegMemory.__module__ = ScipyMemory.__module__ = __name__

# Classes that `torch.load` accepts with weights_only=True.
add_safe_globals([KKTSolution, Progress, State, *(globals()[name] for name in __all__ if name.endswith("Memory"))])
