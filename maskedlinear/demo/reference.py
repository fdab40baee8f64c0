"""The first step by the spec, in float64: what the frameworks' first gradients should be, and how far rounding may go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskedlinear import spec
from maskedlinear.demo.problem import Mask, Problem
from maskedlinear.demo.settings import BATCH_NORM_EPSILON
from maskedlinear.demo.training import Gradients

__all__ = ["BOUND", "Difference", "Reference", "first_step", "largest_difference"]

Float64 = NDArray[np.float64]

BOUND = 8 * 2.0**-24
"""The bound on a gradient's error in units of S: 8 u, u the unit roundoff of float32."""


@dataclass(frozen=True)
class Reference:
    """A masked layer's gradients in the first step, and the sums of magnitudes that measure their rounding error.

    Each has a ``weight`` (out, in) and a ``bias`` (out,), zero where the mask is zero. A relative error would say nothing:
    a bias that batch norm follows has the gradient zero, as a sum of terms that are not.

    Attributes:
        gradients: gᵀ·x and the sum of g, with x the layer's input and g = dloss/dy.
        own_terms: |g|ᵀ·|x| and the sum of |g|: S for a layer that is handed x and g. In a network both arrive with
            rounding errors, which are not small beside them where batch norm or the softmax made them by subtraction.
        all_terms: the same of the whole step: the magnitudes of all terms that x and g are made of, from the last
            subtraction on in x, and back to the loss in g. Wherever the step subtracts, they add. S for a network. It
            knows nothing of the bend of ReLU: a value within rounding of zero may fall on the other side, once in
            thousands of runs.
    """

    gradients: Gradients
    own_terms: Gradients
    all_terms: Gradients


class Difference(NamedTuple):
    """How far two sets of gradients are apart: each the largest over all entries of all masked layers.

    Attributes:
        absolute: the difference as it is.
        bound_ratio: in units of 8·u·S with S of all terms; the promise is at most 1.
        own_ratio: in units of 8·u·S with S of the layer's own terms.
    """

    absolute: float
    bound_ratio: float
    own_ratio: float


@dataclass(frozen=True)
class _Block:
    """A block's forward pass: ``x`` (batch, in), ``normal`` (batch, out) and their terms, the rest as in ``Problem``."""

    x: Float64
    x_terms: Float64
    weight: Float64
    mask: Mask
    bias: Float64
    deviation: Float64
    normal: Float64
    normal_terms: Float64
    active: NDArray[np.bool_]


def first_step(problem: Problem) -> tuple[Reference, ...]:
    """Return each masked layer's gradients on the first batch, at the initial weights."""
    batch = problem.batches[0, 0]
    x = problem.train_x[batch].astype(np.float64)
    x_terms = np.abs(x)
    blocks = []
    for mask, *parameters in problem.layers:
        weight, bias, shift = (parameter.astype(np.float64) for parameter in parameters)
        y = spec.forward(x, weight, mask, bias)
        deviation = np.sqrt(y.var(axis=0) + BATCH_NORM_EPSILON)
        normal = (y - y.mean(axis=0)) / deviation
        normal_terms = (np.abs(y) + np.abs(y.mean(axis=0))) / deviation
        active = normal + shift > 0
        blocks.append(_Block(x, x_terms, weight, mask, bias, deviation, normal, normal_terms, active))
        x = (normal + shift) * active
        x_terms = (normal_terms + np.abs(shift)) * active

    exponentials = np.exp(x - x.max(axis=1, keepdims=True))
    softmax = exponentials / exponentials.sum(axis=1, keepdims=True)
    softmax_terms = softmax * (1 + x_terms + (softmax * x_terms).sum(axis=1, keepdims=True))
    truth = np.eye(softmax.shape[1])[problem.train_y[batch]]
    g, g_terms = (softmax - truth) / len(batch), (softmax_terms + truth) / len(batch)

    references = []
    for block in reversed(blocks):
        g = _norm_backward(g * block.active, block.normal, block.deviation, -1)
        g_terms = _norm_backward(g_terms * block.active, block.normal_terms, block.deviation, +1)
        magnitudes = (np.abs(block.weight), block.mask, block.bias)
        exact = spec.vjp(block.x, block.weight, block.mask, block.bias, g)
        own = spec.vjp(np.abs(block.x), *magnitudes, np.abs(g))
        total = spec.vjp(block.x_terms, *magnitudes, g_terms)
        references.append(Reference(*(Gradients(part.weight, np.asarray(part.bias)) for part in (exact, own, total))))
        g, g_terms = exact.x, total.x
    return tuple(reversed(references))


def largest_difference(
    first: Sequence[Gradients], second: Sequence[Gradients], references: Sequence[Reference]
) -> Difference:
    """Return how far two sets of gradients are apart, given layer by layer in one order."""
    found = []
    for a, b, reference in zip(first, second, references, strict=True):
        for one, other, own, total in zip(a, b, reference.own_terms, reference.all_terms, strict=True):
            distance = np.abs(one.astype(np.float64) - other)
            found.append(Difference(float(distance.max()), _ratio(distance, total), _ratio(distance, own)))
    return Difference(*(float(np.max(column)) for column in zip(*found, strict=True)))


def _norm_backward(g: Float64, normal: Float64, deviation: Float64, sign: int) -> Float64:
    """Batch norm's backward rule, shape ``(batch, out)``; of magnitudes with ``sign`` +1, which adds where it subtracts."""
    result: Float64 = (g + sign * g.mean(axis=0) + sign * normal * (g * normal).mean(axis=0)) / deviation
    return result


def _ratio(distance: Float64, scale: Float64) -> float:
    """The largest distance in units of its bound: NaN for a NaN, infinite for a difference where there must be none."""
    moved = distance != 0
    with np.errstate(divide="ignore"):
        return float(np.max(distance[moved] / (BOUND * scale[moved]), initial=0.0))
