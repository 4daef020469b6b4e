"""The placement as a mixed-integer program, solved by HiGHS.

[Note: the program] Offsets x_i are continuous, the height h is whole; each pair wanted at once has a binary z that says
which of the two lies lower. Minimize h subject to

    x_i + s_i <= h,   x_i + s_i <= x_j + U (1 - z_ij),   x_j + s_j <= x_i + U z_ij

with U one less than the height known, so that an answer is better than it and "infeasible" proves that it is the
smallest. Three cuts of symmetry: a placement turned upside down is as good, so the largest request lies in the lower
half; of requests alike in size and company the earlier lies lower; and h is at least the load.
Sizes are divided by their greatest common divisor. The solver's offsets carry its tolerances, so only their order is
kept: each request is put again, exactly, on top of those below it.

Source: arXiv 2407.12117 (its planner's program); HiGHS, doi 10.1007/s12532-017-0130-5.
"""

import importlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_PAIRS = 6000
"""Binaries with which a search of seconds may still find something; more only cost the time limit."""

Offsets = NDArray[np.int64]
_log = logging.getLogger(__name__)


def improve(
    known: Offsets, sizes: Offsets, neighbours: Sequence[NDArray[np.int32]], bound: int, gap: float, deadline: float
) -> tuple[Offsets | None, int, str]:
    """Offsets lower than `known`, or None; the lower bound, raised where more was proven; what happened, in words.

    All in one unit; neighbours[i] are the requests that meet i. `deadline` is a time of `time.monotonic`.
    """
    pairs = [(i, int(j)) for i, near in enumerate(neighbours) for j in near if j > i]
    if len(pairs) > MAX_PAIRS:
        return None, bound, f"no MIP: {len(pairs)} pairs wanted at once, above {MAX_PAIRS}"
    try:
        highspy = importlib.import_module("highspy")
    except ImportError:
        _log.warning("memory plans are best fit alone and may be larger than need be: pip install highspy")
        return None, bound, "no MIP: highspy is not installed (pip install highspy)"
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        return None, bound, "no MIP: the time limit was reached"
    unit = math.gcd(*(int(s) for s in sizes), bound)
    height = int((known + sizes).max())
    solver = _load(highspy, sizes // unit, neighbours, pairs, bound // unit, height // unit)
    for option, value in (("time_limit", left_s), ("mip_rel_gap", gap), ("threads", 1), ("random_seed", 0)):
        solver.setOptionValue(option, value)
    solver.run()
    status, states = solver.getModelStatus(), highspy.HighsModelStatus
    if status == states.kInfeasible:
        return None, height, "the MIP proves that nothing is smaller"
    info = solver.getInfo()
    if math.isfinite(info.mip_dual_bound) and info.mip_dual_bound < height / unit:
        bound = max(bound, math.ceil(info.mip_dual_bound - 1e-6) * unit)
    found = None
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        x = np.array(solver.getSolution().col_value[: len(sizes)])
        found = _stacked(x, sizes, neighbours)
        if (found + sizes).max() >= height:
            found = None
    if status == states.kOptimal:
        return found, bound, "solved to the gap asked for" if gap else "solved"
    return found, bound, f"the MIP stopped: {solver.modelStatusToString(status).lower()}"


def _load(
    highspy: Any,
    sizes: Offsets,
    neighbours: Sequence[NDArray[np.int32]],
    pairs: list[tuple[int, int]],
    bound: int,
    height: int,
) -> Any:
    """A solver that holds the program; columns are the offsets, the height, the binaries."""
    n, most = len(sizes), height - 1
    rows: list[tuple[float, list[int], list[float]]] = []  # upper side, columns, values
    lower = np.concatenate((np.zeros(n), [bound], np.zeros(len(pairs))))
    upper = np.concatenate((most - sizes, [most], np.ones(len(pairs))))
    company = [near.tobytes() for near in neighbours]
    for i in range(n):
        rows.append((-float(sizes[i]), [i, n], [1, -1]))
    for k, (i, j) in enumerate(pairs, start=n + 1):
        rows.append((float(most - sizes[i]), [i, j, k], [1, -1, most]))
        rows.append((-float(sizes[j]), [j, i, k], [1, -1, -most]))
        if sizes[i] == sizes[j] and company[i] == company[j]:
            lower[k] = 1
    # Requests that are alike are in order of their place: the first of the largest is then the lowest, as it may be.
    largest = int(np.argmax(sizes))
    rows.append((-float(sizes[largest]), [largest, n], [2, -1]))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = n + 1 + len(pairs), len(rows)
    lp.col_cost_ = np.eye(1, lp.num_col_, n)[0]
    lp.col_lower_, lp.col_upper_ = lower, upper
    lp.row_lower_ = np.full(len(rows), -highspy.kHighsInf)
    lp.row_upper_ = np.array([side for side, _, _ in rows])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(columns) for _, columns, _ in rows)])
    lp.a_matrix_.index_ = np.concatenate([columns for _, columns, _ in rows])
    lp.a_matrix_.value_ = np.concatenate([values for _, _, values in rows]).astype(float)
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kContinuous] * n + [kinds.kInteger] * (1 + len(pairs))
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    return solver


def _stacked(x: NDArray[np.float64], sizes: Offsets, neighbours: Sequence[NDArray[np.int32]]) -> Offsets:
    """In the order of `x` each request on top of those before it that it meets."""
    offsets = np.full(len(sizes), -1, dtype=np.int64)
    for i in np.argsort(x, kind="stable"):
        below = neighbours[i][offsets[neighbours[i]] >= 0]
        offsets[i] = (offsets[below] + sizes[below]).max(initial=0)
    return offsets
