"""Masks from scores: exact counts, ties broken by place, the same from every framework's arrays."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear._check import as_mask
from maskedlinear._progress import Progress, progress_callback
from maskedlinear.masks._distribution import allocate_proportionally, uniform_plus
from maskedlinear.masks._random import Sparsity, checked_zeros
from maskedlinear.masks._structured import check_blocks, check_groups, of_blocks
from maskedlinear.pruning._layers import Scores, as_dict, like_input
from maskedlinear.pruning._select import best_entries, clear_smallest, first_nan, ordered, passes

__all__ = [
    "OnEmpty",
    "Scope",
    "are_too_large",
    "check_empty",
    "check_scope",
    "checked_least",
    "clear_by_scope",
    "n_of_m",
    "nan_error",
    "prune",
    "prune_matrices",
    "refuse_empty",
    "scores_of_blocks",
    "threshold",
    "too_large_error",
    "zeros_by_scope",
]

_NAMES = 8  # that a message lists
_ROWS_AT_A_TIME = 1 << 20  # entries of rows that are sorted at a time
_WHOLE = 1 << 53  # up to which float64 holds every whole number

_logger = logging.getLogger("maskedlinear")

Mask = NDArray[np.bool_]
Scope = Literal["global", "layer", "row", "erdos_renyi", "uniform_plus"]
OnEmpty = Literal["raise", "allow", "keep"]


def prune(
    scores: Scores,
    *,
    sparsity: Sparsity | None = None,
    num_zeros: int | None = None,
    masks: Any = None,
    scope: Scope = "global",
    block: tuple[int, int] | None = None,
    on_empty: OnEmpty = "raise",
    keep_at_least: Mapping[str, int] | None = None,
    progress: Progress = False,
) -> Any:
    """Return masks from which the connections of the lowest scores are gone: exactly as many as asked for.

    Of equal scores the one in the earlier layer goes first, and in a layer the one of the smaller flat index.

    Args:
        scores: shape ``(out, in)``: one array, a mapping of names to arrays, or a sequence of them, in the order of layers.
        sparsity: the fraction of zeros in the new masks, in [0, 1]: ``floor(sparsity * size)`` of them, taken as in
            :func:`maskedlinear.masks.random`. Of each layer or of all together, by ``scope``.
        num_zeros: the number of zeros instead; with ``scope="layer"`` in each layer, with ``"row"`` in each row. Give
            exactly one of the two.
        masks: the masks so far, in the same form as ``scores``: what is masked stays so, and counts. Full if ``None``.
        scope: ``"global"`` compares the scores of all layers; ``"layer"`` prunes each to the same sparsity;
            ``"row"`` prunes each row (output) to the same sparsity, as Wanda does; ``"erdos_renyi"`` prunes each layer to
            its share by :func:`maskedlinear.masks.erdos_renyi_num_zeros`, or less where more than its share is masked
            already (here of matrices; functions that prune models know the windows of their kernels: ERK);
            ``"uniform_plus"`` to its share by :func:`maskedlinear.masks.uniform_plus_num_zeros`.
        block: ``(outputs, inputs)``: prune whole blocks, by the sum of their scores. Counts are of blocks then, and masks so
            far must be of whole blocks.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection, or has none to begin with; or
            ``"keep"``, which leaves each layer its best one, prunes fewer where there are not enough others, and none where
            more is masked already than is asked for; what it did instead is logged.
        keep_at_least: how many of the best connections stay whatever is asked for, in each ``"row"`` (output) and in each
            ``"layer"``: ``{"row": 1, "layer": 8}``; all, where there are fewer. Of blocks, if there are blocks.
        progress: ``True`` to show on the standard error stream how far it is; or a function that is called with the fraction
            done, from 0 to 1. 10⁸ scores take some seconds.

    Returns:
        Boolean NumPy arrays of the scores' shapes, in the form of ``scores``.

    Raises:
        ValueError: if a fraction or number is out of its range; if scores hold NaN or are of an empty list; if a mask does
            not fit; if there are more zeros already than asked for; if a layer would lose its last connection; or if there
            are too few others than those that ``keep_at_least`` keeps.
        TypeError: if scores are not arrays of real numbers.
    """
    return prune_matrices(
        scores,
        sparsity=sparsity,
        num_zeros=num_zeros,
        masks=masks,
        scope=scope,
        block=block,
        on_empty=on_empty,
        keep_at_least=keep_at_least,
        progress=progress,
    )


def prune_matrices(
    scores: Scores,
    *,
    sparsity: Sparsity | None = None,
    num_zeros: int | None = None,
    masks: Any,
    scope: Scope,
    block: tuple[int, int] | None,
    on_empty: OnEmpty,
    keep_at_least: Mapping[str, int] | None,
    progress: Progress = False,
    sums_of_sizes: Mapping[Any, int] | None = None,
) -> Any:
    """Return what :func:`prune` does, of matrices that may be those of kernels; their blocks are shared out as a matrix's.

    Args and errors: those of :func:`prune`; ``sums_of_sizes`` as :func:`zeros_by_scope` takes them.
    """
    layers = as_dict(scores, as_numpy)
    if not layers:
        raise ValueError("there must be scores of at least one layer; got none")
    check_scope(scope)
    before = masks_so_far(masks, scores, layers)
    check_empty(on_empty, layers)
    if block is not None:
        layers, before = scores_of_blocks(layers, before, block)
    tell = progress_callback(progress, "pruning")
    keys = _comparable(layers)
    least = checked_least(keep_at_least, on_empty)
    kept = {name: best_entries(keys[name], before[name], **least) for name in keys} if any(least.values()) else {}
    work = sum(key.size * passes(key) for key in keys.values())
    seen = 0

    def look(number: int) -> None:
        nonlocal seen
        seen += number
        tell(min(seen / work, 0.99))

    found = {name: mask.copy() for name, mask in before.items()}

    def clear(names: Sequence[Any], count: int) -> None:
        for name in names:
            found[name].reshape(-1)[kept.get(name, [])] = False  # which the selection passes over
        clear_smallest([keys[name] for name in names], [found[name] for name in names], count, look)
        for name in names:
            found[name].reshape(-1)[kept.get(name, [])] = True

    live = {name: int(np.count_nonzero(mask)) for name, mask in before.items()}
    amount: Any = {"sparsity": sparsity, "num_zeros": num_zeros, "on_empty": on_empty, "keep_at_least": keep_at_least}
    if scope == "row":
        for name, mask in found.items():
            _clear_rows(name, keys[name], mask, kept.get(name, np.empty(0, np.intp)), **amount)
            look(mask.size * passes(keys[name]))
    else:
        shapes = {name: mask.shape for name, mask in before.items()}
        amount["sums_of_sizes"] = None if block is not None else sums_of_sizes
        clear_by_scope(clear, shapes, live, {name: len(places) for name, places in kept.items()}, scope=scope, **amount)
    if on_empty == "raise":
        refuse_empty(live, {name: int(np.count_nonzero(mask)) for name, mask in found.items()})
    if block is not None:
        found = {name: of_blocks(mask, block) for name, mask in found.items()}
    tell(1.0)
    return like_input(found, scores)


def threshold(scores: Scores, least: float, *, masks: Any = None, on_empty: Literal["raise", "allow"] = "raise") -> Any:
    """Return masks of the connections whose score is ``least`` or more.

    Args:
        scores: as :func:`prune` takes them.
        least: the lowest score that stays; not NaN.
        masks: the masks so far; what is masked stays so.
        on_empty: ``"raise"`` or ``"allow"`` where a layer would lose its last connection, or has none to begin with.

    Raises:
        ValueError: as by :func:`prune`.
        TypeError: if scores are not arrays of real numbers.
    """
    layers = as_dict(scores, as_numpy)
    if math.isnan(least):
        raise ValueError("a threshold must be a number; got NaN")
    for name, array in layers.items():
        _refuse_nan(name, array)
    before = masks_so_far(masks, scores, layers)
    check_empty(on_empty, layers, ("raise", "allow"))
    found = {name: before[name] & (array >= least) for name, array in layers.items()}
    if on_empty == "raise":
        refuse_empty(*({name: int(np.count_nonzero(m)) for name, m in masks.items()} for masks in (before, found)))
    return like_input(found, scores)


def n_of_m(scores: Scores, n: int, m: int) -> Any:
    """Return N:M masks: in each group of ``m`` successive inputs of an output, the ``n`` of the highest scores.

    Of equal scores the later ones stay. Source: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch", ICLR 2021.

    Args:
        scores: as :func:`prune` takes them; the number of inputs a multiple of ``m``.
        n: the live inputs of a group, from 0 to ``m``.
        m: the size of a group.

    Raises:
        ValueError: if scores hold NaN, or a value is out of its range.
        TypeError: if scores are not arrays of real numbers.
    """
    found = {}
    for name, array in as_dict(scores, as_numpy).items():
        _check_matrix(name, array)
        _refuse_nan(name, array)
        check_groups(array.shape, n, m)
        groups = array.reshape(-1, m)
        last = np.argsort(groups, axis=1, kind="stable")[:, m - n :]
        mask = np.zeros(groups.shape, bool)
        np.put_along_axis(mask, last, True, axis=1)
        found[name] = mask.reshape(array.shape)
    return like_input(found, scores)


def masks_so_far(masks: Any, scores: Scores, layers: Mapping[Any, NDArray[Any]]) -> dict[Any, Mask]:
    """Return a mask for each layer: those given, checked, or full ones."""
    for name, array in layers.items():
        _check_matrix(name, array)
    if masks is None:
        return {name: np.ones(array.shape, bool) for name, array in layers.items()}
    given = as_dict(masks, lambda mask: mask)
    if isinstance(masks, Mapping) is not isinstance(scores, Mapping) or set(given) != set(layers):
        raise ValueError(
            f"there must be a mask for each layer with scores and no other; got masks of {list(given)} and scores of "
            f"{list(layers)}"
        )
    return {name: np.array(as_mask(as_numpy(given[name]), layers[name].shape), order="C") for name in layers}


def _comparable(layers: Mapping[Any, NDArray[Any]]) -> dict[Any, NDArray[Any]]:
    """Return the scores in one floating dtype, which all of their values fit into."""
    dtype = np.result_type(np.float32, *(array.dtype for array in layers.values()))
    found = {}
    for name, array in layers.items():
        if are_too_large(array):
            raise too_large_error(name)
        found[name] = np.ascontiguousarray(array, dtype)
        _refuse_nan(name, found[name])
    return found


def are_too_large(array: NDArray[Any]) -> bool:
    """Whether float64 does not hold each of the whole numbers of an array."""
    return array.dtype.kind in "iu" and array.size > 0 and max(abs(int(array.min())), abs(int(array.max()))) > _WHOLE


def too_large_error(name: Any) -> ValueError:
    """Return the error that a layer's scores are whole numbers that no float holds."""
    return ValueError(f"scores that are whole numbers must be within 2**53; got one beyond{_of([name])}")


def clear_by_scope(
    clear: Callable[[Sequence[Any], int], None],
    shapes: Mapping[Any, tuple[int, ...]],
    live: Mapping[Any, int],
    kept: Mapping[Any, int],
    *,
    sparsity: Sparsity | None,
    num_zeros: int | None,
    scope: Scope,
    on_empty: OnEmpty,
    keep_at_least: Mapping[str, int] | None,
    sums_of_sizes: Mapping[Any, int] | None = None,
) -> None:
    """Have as many entries cleared of each set of layers that are compared with each other as :func:`prune` asks for.

    Args:
        clear: clears a number of entries of the lowest scores in layers of these names.
        shapes: of each layer's mask.
        live: how many connections of each are live so far.
        kept: how many of these stay whatever is asked for; empty where nothing was to be kept.
        sparsity: as :func:`prune` takes it, and so the rest.
        num_zeros: as above.
        scope: as above.
        on_empty: as above.
        keep_at_least: as above; for messages.
        sums_of_sizes: as :func:`zeros_by_scope` takes them.
    """
    for names, zeros in zeros_by_scope(shapes, live, sparsity, num_zeros, scope, sums_of_sizes):
        masked = sum(math.prod(shapes[name]) - live[name] for name in names)
        if zeros < masked and on_empty == "keep":
            _logger.info(
                "%d connections are masked%s, where %d were asked for: none more is", masked, _of(names), zeros
            )
            zeros = masked
        if zeros < masked:
            raise ValueError(
                f"pruning only removes connections; got {masked} masked ones{_of(names)}, where {zeros} were asked for: ask "
                "for at least as many, or pass no masks"
            )
        count, free = zeros - masked, sum(live[name] - kept.get(name, 0) for name in names)
        if count > free and kept:
            if on_empty != "keep":
                raise ValueError(
                    f"keep_at_least={dict(keep_at_least or {})!r} leaves {free} connections to prune{_of(names)}; got "
                    f"{count}: prune less, keep fewer, or pass on_empty='keep', which prunes what it can"
                )
            _logger.warning("%d connections are pruned%s, and not %d: the others are kept", free, _of(names), count)
            count = free
        clear(names, count)


def _clear_rows(
    name: Any,
    keys: NDArray[Any],
    mask: Mask,
    kept: NDArray[np.intp],
    *,
    sparsity: Sparsity | None,
    num_zeros: int | None,
    on_empty: OnEmpty,
    keep_at_least: Mapping[str, int] | None,
) -> None:
    """Clear as many entries of each row as :func:`prune` asks for, but none of the flat places ``kept``, in ``mask``."""
    out, in_ = mask.shape
    zeros = checked_zeros(in_, sparsity, num_zeros)
    masked = in_ - np.count_nonzero(mask, axis=1)
    free = mask.copy()
    free.reshape(-1)[kept] = False
    count, number = np.maximum(zeros - masked, 0), np.count_nonzero(free, axis=1)
    if on_empty != "keep":
        if (masked > zeros).any():
            row = int(np.argmax(masked > zeros))
            raise ValueError(
                f"pruning only removes connections; got {masked[row]} masked ones of row {row}{_of([name])}, where {zeros} "
                "were asked for: ask for at least as many, or pass no masks"
            )
        if (count > number).any():
            row = int(np.argmax(count > number))
            raise ValueError(
                f"keep_at_least={dict(keep_at_least or {})!r} leaves {number[row]} connections to prune of row "
                f"{row}{_of([name])}; got {count[row]}: prune less, keep fewer, or pass on_empty='keep', which prunes what "
                "it can"
            )
    count = np.minimum(count, number)
    step = max(1, _ROWS_AT_A_TIME // max(in_, 1))
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        numbers = ordered(keys[rows])
        numbers[~free[rows]] = np.iinfo(numbers.dtype).max  # after all that can go
        order = np.argsort(numbers, axis=1, kind="stable")
        gone = np.zeros(numbers.shape, bool)
        np.put_along_axis(gone, order, np.arange(in_) < count[rows, None], axis=1)
        mask[rows] &= ~gone


def check_scope(scope: str) -> None:
    """Raise a ``ValueError`` if ``scope`` is none."""
    if scope not in get_args(Scope):
        raise ValueError(
            f"scope must be {', '.join(map(repr, get_args(Scope)[:-1]))} or {get_args(Scope)[-1]!r}; got {scope!r}"
        )


def zeros_by_scope(
    shapes: Mapping[Any, tuple[int, ...]],
    live: Mapping[Any, int],
    sparsity: Sparsity | None,
    num_zeros: int | None,
    scope: Scope,
    sums_of_sizes: Mapping[Any, int] | None = None,
) -> list[tuple[Sequence[Any], int]]:
    """Return which layers are compared with each other, and how many zeros they get together.

    Args:
        shapes: of each layer's mask.
        live: how many connections of each are live so far.
        sparsity: as :func:`prune` takes it, and so the rest.
        num_zeros: as above.
        scope: as above.
        sums_of_sizes: in whose proportion ``"erdos_renyi"`` shares out, where they are not those of the shapes: of kernels.

    Raises:
        ValueError: if rows are compared, which only whole ones can be.
    """
    if scope == "row":
        raise ValueError("scope='row' compares whole rows on one process, outside jit; prune by scope='layer' here")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if scope == "layer":
        return [([name], checked_zeros(size, sparsity, num_zeros)) for name, size in sizes.items()]
    total = sum(sizes.values())
    zeros = checked_zeros(total, sparsity, num_zeros)
    if scope == "global":
        return [(list(shapes), zeros)]
    if scope == "uniform_plus":
        return [([name], part) for name, part in zip(shapes, uniform_plus(list(sizes.values()), zeros), strict=True)]
    counts = [live[name] for name in shapes]
    if total - zeros > sum(counts):
        return [(list(shapes), zeros)]  # which is refused, as more than there are
    sums = [sum(shape) if sums_of_sizes is None else sums_of_sizes[name] for name, shape in shapes.items()]
    kept = allocate_proportionally(sums, counts, total - zeros)
    return [([name], sizes[name] - count) for name, count in zip(shapes, kept, strict=True)]


def scores_of_blocks(
    layers: Mapping[Any, NDArray[Any]], before: Mapping[Any, Mask], block: tuple[int, int]
) -> tuple[dict[Any, NDArray[Any]], dict[Any, Mask]]:
    """Return the scores and the masks of whole blocks."""
    sums: dict[Any, NDArray[Any]] = {}
    masks: dict[Any, Mask] = {}
    for name, array in layers.items():
        height, width = check_blocks(array.shape, block)
        split = (array.shape[0] // height, height, array.shape[1] // width, width)
        # In one order, whatever the order of a weight's axes in memory.
        sums[name] = np.ascontiguousarray(array).reshape(split).sum(axis=(1, 3), dtype=np.float64)
        live = before[name].reshape(split)
        masks[name] = np.asarray(live.any(axis=(1, 3)))
        if not (masks[name] == live.all(axis=(1, 3))).all():
            raise ValueError(
                f"masks so far must be of whole blocks of {(height, width)}; got one of parts{_of([name])}"
            )
    return sums, masks


def _check_matrix(name: Any, array: NDArray[Any]) -> None:
    if array.ndim != 2:
        raise ValueError(f"scores must have the weight's shape (out, in); got {array.shape}{_of([name])}")


def _refuse_nan(name: Any, array: NDArray[Any]) -> None:
    place = first_nan(array)
    if place is not None:
        raise nan_error(name, place, array.shape)


def nan_error(name: Any, place: int, shape: tuple[int, ...]) -> ValueError:
    """Return the error that a layer's scores are NaN at a flat place."""
    where = tuple(int(i) for i in np.unravel_index(place, shape))
    return ValueError(f"scores must be numbers; got NaN at {where}{_of([name])}")


def checked_least(keep_at_least: Mapping[str, int] | None, on_empty: str) -> dict[str, int]:
    """Return how many connections a row and a layer keep."""
    least = dict(keep_at_least or {})
    if set(least) - {"row", "layer"} or any(not isinstance(n, int) or n < 0 for n in least.values()):
        raise ValueError(
            f"keep_at_least must be a number of connections, 0 or more, by 'row' and 'layer'; got {keep_at_least!r}"
        )
    layer = max(least.get("layer", 0), 1 if on_empty == "keep" else 0)
    return {"row": least.get("row", 0), "layer": layer}


def check_empty(on_empty: str, layers: Mapping[Any, Any], choices: Sequence[str] = get_args(OnEmpty)) -> None:
    """Raise a ``ValueError`` if ``on_empty`` is no choice, or "raise" where a layer, of a shape and size, is empty."""
    if on_empty not in choices:
        raise ValueError(f"on_empty must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}; got {on_empty!r}")
    for name, array in layers.items():
        if on_empty == "raise" and not array.size:
            raise ValueError(
                f"a layer must have a connection to keep; got scores of shape {array.shape}{_of([name])}: leave it out, or "
                "pass on_empty='allow'"
            )


def refuse_empty(before: Mapping[Any, int], after: Mapping[Any, int]) -> None:
    """Raise a ``ValueError`` if a layer that had live connections, by their number, has none any more."""
    lost = [name for name, live in after.items() if before[name] and not live]
    if lost:
        raise ValueError(
            f"a layer must keep a connection; all would be gone{_of(lost)}: prune less, prune by scope='layer', or pass "
            "on_empty='keep' or 'allow'"
        )


def _of(names: Sequence[Any]) -> str:
    if list(names) == [0]:
        return ""
    named = [name if isinstance(name, str) else f"layer {name}" for name in names]
    return f" of {', '.join(named[:_NAMES])}" + (f" and {len(named) - _NAMES} more" if len(named) > _NAMES else "")
