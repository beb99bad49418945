"""The convex quadratic programs of Maros and Meszaros, those with at most 600 unknowns and rows, bounds of unknowns
not counted.

The optima are those of Maros and Meszaros, "A repository of convex quadratic programming problems", Optimization
Methods and Software 11 (1999), to 9 digits. The data is that of their collection as it was converted for the benchmarks
of OSQP (https://github.com/osqp/osqp_benchmarks, Apache License 2.0). VALUES is in the collection, but its matrix has
negative eigenvalues.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from problem_sets.quadratic_programs import QuadraticProgram

OPTIMA = {
    "CVXQP1_S": 1.15907181e4,
    "CVXQP2_S": 8.12094048e3,
    "CVXQP3_S": 1.19434322e4,
    "DPKLO1": 3.70096217e-1,
    "DUAL1": 3.50129657e-2,
    "DUAL2": 3.37336761e-2,
    "DUAL3": 1.35755839e-1,
    "DUAL4": 7.46090842e-1,
    "DUALC1": 6.15525083e3,
    "DUALC2": 3.55130769e3,
    "DUALC5": 4.27232327e2,
    "DUALC8": 1.83093588e4,
    "GENHS28": 9.27173694e-1,
    "HS118": 6.64820450e2,
    "HS21": -9.99600000e1,
    "HS268": 0.0,
    "HS35": 1.11111111e-1,
    "HS35MOD": 2.50000000e-1,
    "HS51": 0.0,
    "HS52": 5.32664756,
    "HS53": 4.09302326,
    "HS76": -4.68181818,
    "LOTSCHD": 2.39841590e3,
    "PRIMAL1": -3.50129657e-2,
    "PRIMALC1": -6.15525083e3,
    "PRIMALC2": -3.55130769e3,
    "PRIMALC5": -4.27232327e2,
    "PRIMALC8": -1.83094298e4,
    "QADLITTL": 4.80318859e5,
    "QAFIRO": -1.59078179,
    "QBEACONF": 1.64712062e5,
    "QBORE3D": 3.10020080e3,
    "QBRANDY": 2.83751149e4,
    "QE226": 2.12653433e2,
    "QFORPLAN": 7.45663150e9,
    "QGROW7": -4.27987139e7,
    "QISRAEL": 2.53478378e7,
    "QPCBLEND": -7.84254092e-3,
    "QPCBOEI2": 8.17196225e6,
    "QPTEST": 4.37187500,
    "QRECIPE": -2.66616001e2,
    "QSC205": -5.81395349e-3,
    "QSCAGR7": 2.68659486e7,
    "QSHARE1B": 7.20078318e5,
    "QSHARE2B": 1.17036917e4,
    "S268": 0.0,
    "TAME": 0.0,
    "VALUES": -1.39662114,
    "ZECEVIC2": -4.12500000,
}
NOT_CONVEX = {"VALUES"}


@cache
def programs() -> tuple[QuadraticProgram, ...]:
    """All of them, from the smallest to the largest."""
    data = dict(np.load(Path(__file__).with_suffix(".npz")))
    vectors = {name: iter(np.split(data[name], _ends(data["sizes"][:, 0]))) for name in ("q",)}
    rows = data["sizes"][:, :2].sum(axis=1)
    vectors |= {name: iter(np.split(data[name], _ends(rows))) for name in ("l", "u")}
    entries = np.stack([data["rows"], data["columns"], data["values"]], axis=1)
    matrices = iter(np.split(entries, _ends(data["sizes"][:, 2:].ravel())))
    found = []
    for name, r, (n, m, _, _) in zip(data["names"].tolist(), data["r"].tolist(), data["sizes"], strict=True):
        half, rows_of_a = _dense(next(matrices), n, n), _dense(next(matrices), m, n)
        P, A = half + np.triu(half, 1).T, np.vstack([rows_of_a, np.eye(n)])
        found.append(
            QuadraticProgram(name, P, next(vectors["q"]), r, A, next(vectors["l"]), next(vectors["u"]), OPTIMA[name])
        )
    return tuple(sorted(found, key=lambda p: sum(p.A.shape)))


def _ends(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes)[:-1]


def _dense(entries: np.ndarray, m: int, n: int) -> np.ndarray:
    matrix = np.zeros((m, n))
    matrix[entries[:, 0].astype(int), entries[:, 1].astype(int)] = entries[:, 2]
    return matrix
