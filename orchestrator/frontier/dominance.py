"""Dominance and hypervolume over arrays of objective values, on moocore. A pure leaf: it knows no ledger and no study.

Shapes: ``values`` is (n, m): n points, m objectives in the objectives' own units. ``directions`` has m entries,
``minimize`` or ``maximize``.

Policies:
    - A point with a NaN is never a member and adds no volume.
    - Equal points do not dominate each other: if one is a member, all of them are.
    - The stated reference point: with every value divided by the baseline's, 1.1 for a minimised objective and 0 for a
      maximised one. So a point must be at most a tenth worse than the baseline where less is better; what is beyond the
      reference adds no volume.
"""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

REFERENCE_MINIMIZED = 1.1
REFERENCE_MAXIMIZED = 0.0
"""Coordinates of the reference point, as multiples of the baseline's value."""


def nondominated(values: npt.ArrayLike, directions: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Finds the Pareto frontier.

    Args:
        values: (n, m); NaN for unknown.
        directions: m entries.

    Returns:
        (n,), True for the points that no other point dominates: none is at least as good everywhere and better
        somewhere.

    Raises:
        ValueError: if shape and directions do not fit.
    """
    points, maximise = _checked(values, directions)
    members: npt.NDArray[np.bool_] = np.asarray(~np.isnan(points).any(axis=1))
    if members.any():
        members[members] = moocore.is_nondominated(points[members], maximise=maximise, keep_weakly=True)
    return members


def ranks(values: npt.ArrayLike, directions: Sequence[str]) -> npt.NDArray[np.int64]:
    """Returns the non-dominated rank of each point, (n,): 0 on the frontier, 1 on the frontier of the others, and so on.

    Source: Deb et al., NSGA-II, IEEE Transactions on Evolutionary Computation 6(2), 2002, section III-A.

    Args:
        values: (n, m), without NaN.
        directions: m entries.

    Raises:
        ValueError: if shape and directions do not fit, or a value is NaN.
    """
    points, maximise = _checked(values, directions)
    if np.isnan(points).any():
        raise ValueError("values: a rank needs every value, got NaN")
    if not len(points):
        return np.empty(0, np.int64)
    return np.asarray(moocore.pareto_rank(points, maximise=maximise), dtype=np.int64)


def nondominated_share(worlds: npt.ArrayLike) -> Floats:
    """Returns the share of draws in which each point is on the frontier, (n,).

    Args:
        worlds: (draws, n, m), everything minimised, without NaN.
    """
    points = np.ascontiguousarray(worlds, dtype=np.float64)
    found = np.zeros(points.shape[1])
    for world in points:
        found += moocore.is_nondominated(world, keep_weakly=True)
    return np.asarray(found / max(len(points), 1))


def hypervolume(values: npt.ArrayLike, directions: Sequence[str], reference: npt.ArrayLike) -> float:
    """Returns the volume that the points dominate, up to ``reference`` (m,), in the product of the objectives' units.

    Raises:
        ValueError: if shapes and directions do not fit, or the reference is not finite.
    """
    points, maximise = _checked(values, directions)
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape != (len(directions),) or not np.isfinite(corner).all():
        raise ValueError(
            f"reference: must be {len(directions)} finite numbers, one an objective, got {corner.tolist()}"
        )
    sign = np.where(maximise, -1.0, 1.0)
    points, corner = points * sign, corner * sign
    points = points[(points < corner).all(axis=1)]  # drops NaN too
    if not len(points):
        return 0.0
    front = points[moocore.is_nondominated(points, keep_weakly=False)]
    return float(moocore.hypervolume(front, ref=corner))


def default_reference(baseline: npt.ArrayLike, directions: Sequence[str]) -> Floats:
    """Returns the stated reference point in the objectives' own units, (m,).

    Args:
        baseline: (m,) values of the uncompressed baseline, finite and above 0.

    Raises:
        ValueError: for a baseline that values cannot be divided by.
    """
    values = np.asarray(baseline, dtype=np.float64)
    _, maximise = _checked(values[None, :] if values.ndim == 1 else values, directions)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"baseline: every objective must be a finite number above 0, got {values.tolist()}")
    return values * np.where(maximise, REFERENCE_MAXIMIZED, REFERENCE_MINIMIZED)


def relative_hypervolume(values: npt.ArrayLike, directions: Sequence[str], baseline: npt.ArrayLike) -> float:
    """Returns the hypervolume of ``values / baseline`` up to the stated reference point: a number without unit.

    The baseline alone has 0.1 to the power of the number of minimised objectives.
    """
    reference = default_reference(baseline, directions)
    scale = np.asarray(baseline, dtype=np.float64)
    return hypervolume(np.asarray(values, dtype=np.float64) / scale, directions, reference / scale)


def _checked(values: npt.ArrayLike, directions: Sequence[str]) -> tuple[Floats, list[bool]]:
    points = np.asarray(values, dtype=np.float64)
    if not directions or any(d not in ("minimize", "maximize") for d in directions):
        raise ValueError(f"directions: must be 'minimize' or 'maximize', one an objective, got {list(directions)}")
    if points.ndim != 2 or points.shape[1] != len(directions):
        raise ValueError(
            f"values: must have the shape (n, {len(directions)}), one column a direction, got {points.shape}"
        )
    return points, [d == "maximize" for d in directions]
