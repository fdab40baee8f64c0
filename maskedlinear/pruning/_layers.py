"""Several layers at once: their arrays by name, which of a model are meant, and the scores of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from maskedlinear._arrays import as_numpy
from maskedlinear._check import as_mask
from maskedlinear.masks._random import checked_seed
from maskedlinear.masks._recipe import Recipe
from maskedlinear.pattern import SparsityPattern
from maskedlinear.pruning import _scores

__all__ = [
    "Include",
    "Score",
    "Scores",
    "Scoring",
    "as_dict",
    "asked_by_name",
    "check_known",
    "check_score",
    "gradient_error",
    "layer_seed",
    "like_input",
    "matches",
    "pattern_of",
    "score_layers",
    "select_weights",
]

Include = str | Sequence[str] | Callable[[str, Any], bool] | None
Score = Literal["magnitude", "random", "snip", "taylor"]
Scoring = Score | Callable[[Any, Any], Any] | Mapping[str, Any]
Scores = Any  # an array, a mapping of names to arrays, or a sequence of arrays

T = TypeVar("T")


def as_dict(arrays: Scores, convert: Callable[[Any], T]) -> dict[Any, T]:
    """Return a single array, a mapping or a sequence of arrays as a dictionary, whose order is the order of layers."""
    if isinstance(arrays, Mapping):
        return {name: convert(array) for name, array in arrays.items()}
    if isinstance(arrays, Sequence) and not hasattr(arrays, "dtype"):
        return {place: convert(array) for place, array in enumerate(arrays)}
    return {0: convert(arrays)}


def like_input(found: dict[Any, T], like: Scores) -> Any:
    """Return ``found`` in the form that ``like`` has."""
    if isinstance(like, Mapping):
        return found
    if isinstance(like, Sequence) and not hasattr(like, "dtype"):
        return list(found.values())
    return found[0]


def matches(name: str, layer: Any, include: Include) -> bool:
    """Whether a layer matches ``include``: a shell pattern of names, several of them, a function, or ``None`` for all."""
    if include is None:
        return True
    if callable(include):
        return bool(include(name, layer))
    return any(fnmatchcase(name, pattern) for pattern in ([include] if isinstance(include, str) else include))


def asked_by_name(include: Include) -> list[str]:
    """Return what stands in ``include`` that may be the very name of a layer, not a pattern of several."""
    return [include] if isinstance(include, str) else [] if include is None or callable(include) else list(include)


def check_known(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ``ValueError`` if one of ``names`` is not among those ``known``."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"{what} must be of layers that there are; got {', '.join(map(repr, unknown))}, and there are "
            f"{', '.join(map(repr, known)) or 'none'}"
        )


def select_weights(
    model: Any, possible: Mapping[str, T], masks: Mapping[str, Any], include: Include, left_out: Mapping[str, str]
) -> dict[str, T]:
    """Return the layers of a model to mask: those that masks are given for, and those that match ``include``.

    Without ``include`` all of them, or, if there are masks, no other.

    Args:
        model: which they are of.
        possible: the layers that can be masked, by name.
        masks: by name.
        include: which are meant.
        left_out: why the other parameters of the model are left out, by name.

    Raises:
        ValueError: if a mask is of a layer that is not possible, or no layer is left.
    """
    check_known("masks", masks, list(possible))
    every = include is None and not masks
    found = {
        name: layer
        for name, layer in possible.items()
        if name in masks or every or (include is not None and matches(name, layer, include))
    }
    if not possible:
        reasons = ", ".join(f"{name} ({why})" for name, why in list(left_out.items())[:4])
        raise ValueError(f"there is no weight to mask in {type(model).__name__}{reasons and f': it has {reasons}'}")
    if not found:
        raise ValueError(f"there is no weight to mask: include={include!r} means none of {list(possible)}")
    return found


def pattern_of(name: str, own: SparsityPattern, given: Any) -> SparsityPattern:
    """Return the connections that a layer in the sparse form is given, as a pattern or as a mask ``(out, in)``.

    Raises:
        ValueError: if there are not as many as it has, or they are of another shape, or a mask holds anything but 0 and 1.
    """
    try:
        given = given.make(own.shape) if isinstance(given, Recipe) else given
        mask = None if isinstance(given, SparsityPattern) else np.asarray(as_mask(as_numpy(given), own.shape))
    except ValueError as error:
        raise ValueError(f"the mask of {name or 'the layer'}: {error}") from error
    pattern: SparsityPattern = given if mask is None else SparsityPattern.from_mask(mask)
    if (pattern.shape, pattern.nnz) != (own.shape, own.nnz):
        raise ValueError(
            f"a layer in the sparse form keeps the number of its connections, {own.nnz} of shape {own.shape}; got "
            f"{pattern.nnz} of shape {pattern.shape} for {name or 'the layer'}: make it dense first, with expand(model)"
        )
    return pattern


def layer_seed(seed: int, place: int) -> int:
    """Return the seed of the layer at a place in its model: ``seed + place``, in [0, 2⁶⁴)."""
    return (checked_seed(seed) + place) % (1 << 64)


def score_layers(
    score: Scoring, weights: Mapping[str, Any], gradients: Mapping[str, Any], seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Return the scores of layers, by name.

    Args:
        score: one of the names; a function of a layer's weight and gradient that returns scores of its shape; or the scores
            themselves, by name.
        weights: by name.
        gradients: by name; ``None`` for a layer without one.
        seed: for ``"random"``: layer i takes ``seed + i``.

    Raises:
        ValueError: if ``score`` is none of the names, needs a gradient where there is none, lacks a layer or names one that
            there is not, or if a function's scores have another shape.
    """
    if isinstance(score, Mapping):
        check_known("scores", score, list(weights))
        check_known("scores, which each layer must have,", weights, list(score))
        return _of_shape({name: as_numpy(score[name]) for name in weights}, weights)
    check_score(score)
    found = {}
    for place, (name, weight) in enumerate(weights.items()):
        gradient = gradients.get(name)
        if callable(score):
            found[name] = as_numpy(score(weight, gradient))
        elif score == "magnitude":
            found[name] = _scores.magnitude(weight)
        elif score == "random":
            found[name] = _scores.random_scores(tuple(weight.shape), layer_seed(seed, place))
        elif gradient is None:
            raise gradient_error(score, name)
        else:
            found[name] = (_scores.snip if score == "snip" else _scores.taylor)(weight, gradient)
    return _of_shape(found, weights)


def check_score(score: Scoring) -> None:
    """Raise a ``ValueError`` if ``score`` is none of the names, and neither a function nor scores by name."""
    if not callable(score) and not isinstance(score, Mapping) and score not in get_args(Score):
        raise ValueError(
            f"score must be one of {', '.join(map(repr, get_args(Score)))}, a function, or scores by name; got {score!r}"
        )


def gradient_error(score: Scoring, name: str) -> ValueError:
    """Return the error that a weight, whose score needs its gradient, has none."""
    return ValueError(
        f"score={score!r} needs the gradient of each weight; {name or 'the layer'} has none: run a backward pass, "
        "and prune before the gradients are zeroed; or leave it out with include=..."
    )


def _of_shape(scores: dict[str, NDArray[Any]], weights: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    for name, array in scores.items():
        if array.shape != tuple(weights[name].shape):
            raise ValueError(
                f"scores must have their weight's shape (out, in) = {tuple(weights[name].shape)}; got {array.shape} of "
                f"{name or 'the layer'}"
            )
    return scores
