"""Pruning that changes the weights that stay, so that the layer's outputs on data change least: SparseGPT and OBS.

All minimise ``Σ ‖W x - W' x‖²`` over rows x of data, which depends on them through ``H = Σ x xᵀ`` alone. NumPy, in float64.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear._check import as_mask
from maskedlinear.masks._random import Sparsity, checked_fraction
from maskedlinear.masks._structured import check_groups

__all__ = ["obs", "obs_update", "sparsegpt"]

Mask = NDArray[np.bool_]
Matrix = NDArray[np.float64]

_ROWS_AT_A_TIME = 1 << 22  # numbers of inverse Hessians that are held at a time


def sparsegpt(
    weight: Any,
    hessian: Any,
    sparsity: Sparsity | None = None,
    *,
    n_of_m: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    mask: Any = None,
) -> tuple[Mask, Matrix]:
    """Return a mask and new weights: columns are pruned from left to right, those to the right make up for what is lost.

    In each block of columns the entries of lowest ``w² / [U]ⱼⱼ²`` go, U being the upper Cholesky factor of the inverse
    Hessian. As in the authors' code, which compares with ``<=``, a block loses ``floor(sparsity * size) + 1`` entries, so
    that its masks are these; with a sparsity of 0 none go.
    Source: E. Frantar and D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023.

    Args:
        weight: shape ``(out, in)``.
        hessian: ``Σ x xᵀ`` over the rows of data, shape ``(in, in)``; a factor changes nothing.
        sparsity: the fraction to prune, in [0, 1]. Give this or ``n_of_m``.
        n_of_m: keep n of each m successive inputs of an output instead, chosen as their columns come.
        block_size: columns whose mask is chosen at a time; of ``n_of_m`` a multiple of m.
        damping: added to the diagonal of the Hessian, as a fraction of its mean.
        mask: the mask so far, shape ``(out, in)``: what is masked is 0, stays masked, and counts; a block that has lost more
            than its share already loses no more.

    Returns:
        The mask, booleans ``(out, in)``, and the weights, float64 ``(out, in)``, 0 where the mask is off. Weights of inputs
        that are 0 in all data are pruned first, and become 0.

    Raises:
        ValueError: if shapes do not fit, numbers are not finite, a value is out of its range, more is masked already than
            was asked for, or the Hessian is not positive definite even when it is damped.
        TypeError: if they are not arrays of real numbers.
    """
    rest, curvature, dead = _prepared(weight, hessian, damping)
    live = _mask_so_far(mask, rest.shape)
    if (sparsity is None) == (n_of_m is None):
        raise ValueError(f"give exactly one of sparsity and n_of_m; got {sparsity!r} and {n_of_m!r}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a number of columns, 1 or more; got {block_size!r}")
    fraction = None if sparsity is None else checked_fraction(sparsity)
    if n_of_m is not None:
        check_groups(rest.shape, *n_of_m)
        if block_size % n_of_m[1]:
            raise ValueError(f"block_size must be a multiple of {n_of_m[1]}, the size of a group; got {block_size}")
    rest[:, dead] = 0
    rest[~live] = 0
    columns = rest.shape[1]
    if fraction is not None:
        widths = [min(block_size, columns - start) for start in range(0, columns, block_size)]
        masked, counts = live.size - int(live.sum()), [_to_clear(len(rest) * width, fraction) for width in widths]
        if masked > sum(counts):
            raise _more_masked(masked, sum(counts))
    factor = np.linalg.cholesky(_inverse(curvature)).T  # upper: the inverse is factorᵀ · factor
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        part, keep = rest[:, start:stop], live[:, start:stop]
        errors = np.zeros_like(part)
        if fraction is not None:
            saliency = (part / np.diagonal(factor)[start:stop]) ** 2
            _clear_lowest(saliency, keep, _to_clear(keep.size, fraction))
        for column in range(stop - start):
            place = start + column
            if n_of_m is not None and column % n_of_m[1] == 0:
                group = slice(column, column + n_of_m[1])
                saliency = (part[:, group] / np.diagonal(factor)[start:stop][group]) ** 2
                _keep_highest(saliency, keep[:, group], n_of_m[0])
            errors[:, column] = np.where(keep[:, column], 0, part[:, column]) / factor[place, place]
            part[:, column:] -= np.outer(errors[:, column], factor[place, place:stop])
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    rest[~live] = 0
    return live, rest


def obs(
    weight: Any, hessian: Any, sparsity: Sparsity, *, damping: float = 0.0, mask: Any = None
) -> tuple[Mask, Matrix]:
    """Return a mask and new weights: one weight of a row goes after the other, and the others make up for each exactly.

    In each row the weight of lowest ``w² / [H⁻¹]ⱼⱼ`` goes, the others move by the surgeon's rule, and H⁻¹ loses its row and
    column; then the ``floor(sparsity * size)`` steps of lowest loss of all rows are taken. Each row takes time in³ and
    memory in²: for small layers; :func:`sparsegpt` is for large ones.
    Source: B. Hassibi and D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992; by
    rows, E. Frantar and D. Alistarh, "Optimal Brain Compression", NeurIPS 2022, algorithms 1 and 2.

    Args:
        weight: shape ``(out, in)``.
        hessian: as :func:`sparsegpt` takes it.
        sparsity: the fraction to prune, in [0, 1].
        damping: as above.
        mask: as above.

    Returns:
        As :func:`sparsegpt`; the weights are those of :func:`obs_update` for the mask.

    Raises:
        ValueError: as by :func:`sparsegpt`.
        TypeError: as above.
    """
    matrix, curvature, dead = _prepared(weight, hessian, damping)
    live = _mask_so_far(mask, matrix.shape)
    count = math.floor(checked_fraction(sparsity) * matrix.size)
    if count < matrix.size - int(live.sum()):
        raise _more_masked(matrix.size - int(live.sum()), count)
    matrix[:, dead] = 0
    matrix[~live] = 0
    if count == 0 or not matrix.size:
        return live, matrix
    inverse = _inverse(curvature)
    rows, columns = matrix.shape
    step = max(1, _ROWS_AT_A_TIME // columns**2)
    parts = [_eliminated(matrix[at : at + step], live[at : at + step], inverse) for at in range(0, rows, step)]
    losses, orders = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
    lowest = np.argsort(losses, axis=None, kind="stable")[:count]
    taken = np.bincount(lowest // columns, minlength=rows)
    for row, number in enumerate(taken):
        live[row, orders[row, :number]] = False
    return live, _updated(matrix, curvature, live)


def obs_update(weight: Any, hessian: Any, mask: Any, *, damping: float = 0.0) -> Matrix:
    """Return the weights that serve best under a given mask: each row's least squares, all masked ones at once.

    The surgeon's rule for a group of weights. It serves masks from wherever they come: ``wanda``'s, a wiring.
    Source: as :func:`obs`, whose steps one after the other end here.

    Args:
        weight: shape ``(out, in)``.
        hessian: as :func:`sparsegpt` takes it.
        mask: shape ``(out, in)``, booleans or 0s and 1s.
        damping: as there.

    Returns:
        The weights, float64 ``(out, in)``, 0 where the mask is off.

    Raises:
        ValueError: as by :func:`sparsegpt`.
        TypeError: as above.

    >>> obs_update([[1.0, 1.0]], [[1.0, 0.5], [0.5, 1.0]], [[1, 0]])  # half of what is lost comes in by the other
    array([[1.5, 0. ]])
    """
    matrix, curvature, dead = _prepared(weight, hessian, damping)
    matrix[:, dead] = 0
    return _updated(matrix, curvature, _mask_so_far(mask, matrix.shape))


def _prepared(weight: Any, hessian: Any, damping: float) -> tuple[Matrix, Matrix, Mask]:
    """Return copies of the weight and of the damped Hessian, and which inputs are 0 in all data."""
    matrix, curvature = np.array(as_numpy(weight), np.float64), np.array(as_numpy(hessian), np.float64)
    if matrix.ndim != 2 or curvature.shape != matrix.shape[1:] * 2:
        raise ValueError(
            f"there must be a weight (out, in) and a Hessian (in, in); got {matrix.shape} and {curvature.shape}"
        )
    if not (np.isfinite(matrix).all() and np.isfinite(curvature).all()):
        raise ValueError("weight and Hessian must be finite; got infinite numbers or NaN: look at the recorded data")
    if not (isinstance(damping, int | float) and math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be a number of 0 or more; got {damping!r}")
    dead = np.diagonal(curvature) == 0
    curvature[dead, dead] = 1
    if curvature.size:
        curvature[np.diag_indices_from(curvature)] += damping * np.diagonal(curvature).mean()
    return matrix, curvature, dead


def _mask_so_far(mask: Any, shape: tuple[int, ...]) -> Mask:
    return np.ones(shape, bool) if mask is None else np.array(as_mask(as_numpy(mask), shape))


def _inverse(curvature: Matrix) -> Matrix:
    try:
        lower = np.linalg.cholesky(curvature)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the Hessian must be positive definite; it is not: record at least as many rows of data as there are inputs, or "
            "raise the damping"
        ) from error
    half = np.linalg.inv(lower)
    return np.asarray(half.T @ half)


def _to_clear(size: int, fraction: Fraction) -> int:
    """Return how many entries of a block are masked afterwards: one more than its share, as by the authors' ``<=``."""
    return min(size, math.floor(fraction * size) + 1) if fraction else 0


def _clear_lowest(saliency: Matrix, keep: Mask, count: int) -> None:
    """Clear the lowest entries of a block, so many that ``count`` of them are masked."""
    order = np.lexsort((saliency.reshape(-1), keep.reshape(-1)))  # what is masked first
    keep[np.unravel_index(order[:count], keep.shape)] = False


def _keep_highest(saliency: Matrix, keep: Mask, number: int) -> None:
    """Clear all but the highest entries of each row of a group."""
    order = np.argsort(np.where(keep, saliency, -1), axis=1, kind="stable")
    np.put_along_axis(keep, order[:, : keep.shape[1] - number], False, axis=1)


def _eliminated(matrix: Matrix, live: Mask, inverse: Matrix) -> tuple[Matrix, NDArray[np.intp]]:
    """Return for rows what each step loses, and which column it takes: first those that are masked, at no loss."""
    rest, count = matrix.copy(), matrix.shape[1]
    full = np.repeat(inverse[None], len(matrix), axis=0)
    left, masked = np.ones(matrix.shape, bool), (~live).sum(axis=1)
    losses, orders = np.empty(matrix.shape), np.empty(matrix.shape, np.intp)
    own = np.arange(len(matrix))
    for step in range(count):
        diagonal = np.diagonal(full, axis1=1, axis2=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            saliency = np.where(left, rest**2 / diagonal, np.inf)
        saliency[~live & left] = -1  # before all others
        place = saliency.argmin(axis=1)
        losses[:, step], orders[:, step] = np.where(step < masked, -1, saliency[own, place] / 2), place
        row, pivot = full[own, place], diagonal[own, place].copy()
        rest -= row * (rest[own, place] / pivot)[:, None]
        left[own, place] = False
        rest[~left] = 0
        full -= row[:, :, None] * (row / pivot[:, None])[:, None, :]
    return losses, orders


def _updated(matrix: Matrix, curvature: Matrix, live: Mask) -> Matrix:
    """Return each row's solution of ``H[live, live] v = (H w)[live]``; rows with one pattern are solved together."""
    new = np.zeros_like(matrix)
    target = matrix @ curvature
    if not live.size:
        return new
    patterns, which = np.unique(live, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows, places = np.flatnonzero(which.reshape(-1) == number), np.flatnonzero(pattern)
        if places.size == matrix.shape[1]:
            new[rows] = matrix[rows]  # nothing is to be made up for
        elif places.size:
            try:
                solved = np.linalg.solve(curvature[np.ix_(places, places)], target[np.ix_(rows, places)].T)
            except np.linalg.LinAlgError as error:
                raise ValueError(
                    "the Hessian of live inputs is singular: record more rows of data, or give a damping above 0"
                ) from error
            new[np.ix_(rows, places)] = solved.T
    return new


def _more_masked(masked: int, count: int) -> ValueError:
    return ValueError(
        f"pruning only removes connections; {masked} are masked where {count} were asked for: ask for a higher sparsity"
    )
