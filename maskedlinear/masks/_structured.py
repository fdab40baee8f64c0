"""Masks with a structure: a constant fan-in, blocks, N:M groups, receptive fields on a grid. Random ones on ``mask_v1``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskedlinear.masks._random import Sparsity, checked_seed, checked_shape, integer, random
from maskedlinear.masks._threefry import words
from maskedlinear.pattern import SparsityPattern

__all__ = ["blocks", "constant_fan_in", "n_of_m", "receptive_field", "receptive_field_pattern"]

Mask = NDArray[np.bool_]

_CHUNK = 1 << 20  # entries made at a time


def constant_fan_in(shape: tuple[int, int], inputs: int, *, seed: int = 0) -> Mask:
    """Return a random mask whose every output has exactly ``inputs`` live inputs.

    In each row the entries of smallest ``(word(i), i)`` are cleared, with the words of :func:`random`; masks of one seed and
    shape are nested. Source: M. Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.

    Args:
        shape: ``(out, in)``.
        inputs: the live inputs of each output, from 0 to ``in``.
        seed: an integer in [0, 2⁶⁴).

    Returns:
        A boolean array of shape ``(out, in)``.

    Raises:
        ValueError: if a value is out of its range.
        TypeError: if one is not an integer.
    """
    out, in_ = checked_shape(shape)
    live = integer("inputs", inputs)
    if not 0 <= live <= in_:
        raise ValueError(f"inputs must be from 0 to the layer's number of inputs, {in_}; got {live}")
    return _of_each((out, in_), in_, live, checked_seed(seed))


def n_of_m(shape: tuple[int, int], n: int, m: int, *, seed: int = 0) -> Mask:
    """Return a random N:M mask: in each group of ``m`` successive inputs of an output exactly ``n`` are live.

    Source: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021.

    Args:
        shape: ``(out, in)``, ``in`` a multiple of ``m``.
        n: the live inputs of a group, from 0 to ``m``.
        m: the size of a group, from 1 on.
        seed: an integer in [0, 2⁶⁴).

    Returns:
        A boolean array of shape ``(out, in)``.

    Raises:
        ValueError: if a value is out of its range, or the inputs do not divide into groups.
        TypeError: if one is not an integer.
    """
    shape = checked_shape(shape)
    check_groups(shape, n, m)
    return _of_each(shape, m, n, checked_seed(seed))


def check_groups(shape: tuple[int, int], n: int, m: int) -> None:
    """Raise unless rows of ``shape`` divide into groups of ``m``, of which ``n`` can be live."""
    n, m = integer("n", n), integer("m", m)
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"an N:M mask has n from 0 to m live inputs in each group of m; got n={n}, m={m}")
    if shape[1] % m:
        raise ValueError(f"an N:M mask needs a number of inputs that is a multiple of m = {m}; got {shape[1]}")


def blocks(
    shape: tuple[int, int],
    block: tuple[int, int],
    *,
    sparsity: Sparsity | None = None,
    num_zeros: int | None = None,
    seed: int = 0,
) -> Mask:
    """Return a random mask of whole blocks: :func:`random` on the grid of blocks.

    Args:
        shape: ``(out, in)``, multiples of the block's sizes.
        block: ``(outputs, inputs)`` of a block.
        sparsity: the fraction of masked blocks, in [0, 1]; rounded down to whole blocks.
        num_zeros: the number of masked blocks instead. Give exactly one of the two.
        seed: an integer in [0, 2⁶⁴).

    Returns:
        A boolean array of shape ``(out, in)``.

    Raises:
        ValueError: if a value is out of its range, or the shape does not divide into blocks.
        TypeError: if a size, ``num_zeros`` or the seed is not an integer.
    """
    shape = checked_shape(shape)
    height, width = check_blocks(shape, block)
    grid = random((shape[0] // height, shape[1] // width), sparsity=sparsity, num_zeros=num_zeros, seed=seed)
    return of_blocks(grid, (height, width))


def of_blocks(grid: Mask, block: tuple[int, int]) -> Mask:
    """Return the mask whose blocks are live where ``grid`` says."""
    return np.repeat(np.repeat(grid, block[0], axis=0), block[1], axis=1)


def check_blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Return the sizes of a block, or raise if ``shape`` does not divide into such."""
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise ValueError(f"a block's shape must be (outputs, inputs); got {block!r}")
    height, width = (integer("a block's size", n) for n in block)
    if height < 1 or width < 1 or shape[0] % height or shape[1] % width:
        raise ValueError(
            f"a mask of shape (out, in) = {tuple(shape)} must divide into blocks; got blocks of {(height, width)}"
        )
    return height, width


def receptive_field(
    grid: Sequence[int],
    size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same"] = 0,
    dilation: int | Sequence[int] = 1,
    channels: tuple[int, int] = (1, 1),
) -> Mask:
    """Return the mask of local receptive fields: the connections of a convolution, without its weight sharing.

    Args:
        grid: the sizes of the input grid, ``(height, width)`` for a picture; any number of dimensions.
        size: the size of the window, for each dimension or for all.
        stride: the step from one output's window to the next one's.
        padding: how many places beyond each edge windows may reach; ``"same"`` is ``dilation * (size - 1) / 2``, which with
            stride 1 gives as many outputs as inputs, and needs that to be a whole number.
        dilation: the distance between neighbours in a window.
        channels: ``(inputs, outputs)``: how many features there are at each place; all see one another.

    Returns:
        A boolean array of shape ``(out, in)``. Both axes are flattened with the channels first and the last dimension of
        the grid last: as of a picture ``(channels, height, width)``. An output's window starts at
        ``stride * place - padding``, and there are ``floor((n + 2 * padding - dilation * (size - 1) - 1) / stride) + 1``
        places, as for a convolution.

    Raises:
        ValueError: if a value is out of its range, there is none for each dimension, or no window fits.
        TypeError: if one is not an integer.
    """
    return reduce(np.kron, _fields(grid, size, stride, padding, dilation, channels))


def receptive_field_pattern(grid: Sequence[int], size: int | Sequence[int], **options: Any) -> SparsityPattern:
    """Return the connections that :func:`receptive_field` returns as a mask, without a matrix, for ``SparseLinear``.

    A large grid's matrix is mostly zeros: for 224 x 224 places it has 2.5 billion entries, of which windows of 5 x 5 keep
    1.2 million.

    Args:
        grid: as of :func:`receptive_field`.
        size: as above.
        options: ``stride``, ``padding``, ``dilation`` and ``channels``, as above.

    Raises:
        ValueError, TypeError: as by :func:`receptive_field`.

    Example:
        >>> receptive_field_pattern((224, 224), 5, padding="same").nnz
        1240996
    """
    rows = columns = np.zeros(1, np.int64)
    shape = (1, 1)
    for factor in _fields(grid, size, **options):
        own_rows, own_columns = np.nonzero(factor)
        rows = (rows[:, None] * factor.shape[0] + own_rows).reshape(-1)
        columns = (columns[:, None] * factor.shape[1] + own_columns).reshape(-1)
        shape = (shape[0] * factor.shape[0], shape[1] * factor.shape[1])
    return SparsityPattern.from_edges(rows, columns, shape)[0]


def _fields(
    grid: Sequence[int],
    size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | Literal["same"] = 0,
    dilation: int | Sequence[int] = 1,
    channels: tuple[int, int] = (1, 1),
) -> list[Mask]:
    """Return the masks of channels and of each dimension, whose Kronecker product the receptive fields are."""
    sizes = tuple(integer("a grid's size", n) for n in grid)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"a grid must have one or more sizes, each from 1 on; got {grid!r}")
    window = _for_each("size", size, sizes, 1)
    steps, apart = _for_each("stride", stride, sizes, 1), _for_each("dilation", dilation, sizes, 1)
    if padding == "same":
        beyond = tuple(gap * (length - 1) // 2 for gap, length in zip(apart, window, strict=True))
        if any(gap * (length - 1) % 2 for gap, length in zip(apart, window, strict=True)):
            raise ValueError(
                f"padding='same' needs dilation * (size - 1) to be even; got size {size}, dilation {dilation}"
            )
    else:
        beyond = _for_each("padding", padding, sizes, 0)
    in_channels, out_channels = (integer("a number of channels", n) for n in channels)
    if min(in_channels, out_channels) < 1:
        raise ValueError(f"channels must be (inputs, outputs), each from 1 on; got {channels}")
    lines = [_line(*parts) for parts in zip(sizes, window, steps, beyond, apart, strict=True)]
    return [np.ones((out_channels, in_channels), bool), *lines]


def _line(inputs: int, size: int, stride: int, padding: int, dilation: int) -> Mask:
    """Return the receptive fields along one dimension, shape (outputs, inputs)."""
    outputs = (inputs + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    if outputs < 1:
        raise ValueError(
            f"a window of size {size} with dilation {dilation} must fit into the grid's {inputs} places and the padding, "
            f"{padding} on each side; it does not"
        )
    offset = np.arange(inputs) - (stride * np.arange(outputs)[:, None] - padding)
    return np.asarray((offset >= 0) & (offset < dilation * size) & (offset % dilation == 0))


def _for_each(name: str, value: int | Sequence[int], sizes: tuple[int, ...], least: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(sizes)
    if len(values) != len(sizes):
        raise ValueError(
            f"{name} must be one number, or one for each of the grid's {len(sizes)} dimensions; got {value}"
        )
    found = tuple(integer(name, n) for n in values)
    if min(found) < least:
        raise ValueError(f"{name} must be {least} or more; got {value}")
    return found


def _of_each(shape: tuple[int, int], group: int, live: int, seed: int) -> Mask:
    """Return a mask with ``live`` entries in each ``group`` of successive ones: those of the largest (word, place)."""
    mask = np.zeros(math.prod(shape), bool)
    if live and mask.size:
        step = max(1, _CHUNK // group) * group
        place = np.arange(group, dtype=np.uint64)
        for start in range(0, mask.size, step):
            drawn = words(seed, start, min(start + step, mask.size)).reshape(-1, group)
            keys = (drawn.astype(np.uint64) << np.uint64(32)) | place
            least = np.partition(keys, group - live, axis=1)[:, group - live, None]
            mask[start : start + step] = (keys >= least).reshape(-1)
    return mask.reshape(shape)
