"""``Recipe``: a random mask by name and seed, which layers take in a mask's place, and files hold in a few bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from maskedlinear.masks._random import ALGORITHM, bernoulli, checked_fraction, checked_seed, integer, random

if TYPE_CHECKING:
    from maskedlinear.models import WeightAxes

__all__ = ["Recipe"]

# A closed list, looked up here and nowhere else, since files name what is in it. Of each the count that it takes.
_MAKERS: dict[str, tuple[Callable[..., NDArray[np.bool_]], str]] = {
    "random": (random, "num_zeros"),
    "bernoulli": (bernoulli, "threshold"),
}
_COUNT = re.compile(r"[0-9]{1,20}", re.ASCII)
_NUMBER = re.compile(
    r"[0-9]{1,99}(\.[0-9]{0,99})?(e[-+]?[0-9]{1,3})?|[0-9]{1,99}/[1-9][0-9]{0,98}", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True)
class Recipe:
    """A mask of :func:`maskedlinear.masks.random` or :func:`maskedlinear.masks.bernoulli`, before anybody has made it.

    Layers take it wherever they take a mask, and make that of their weight's own shape. A file of a layer that still has the
    mask of its recipe holds the recipe in the mask's place::

        >>> from maskedlinear import masks
        >>> recipe = masks.Recipe("random", sparsity=0.75, seed=7)
        >>> int(recipe.make((2, 4)).sum())
        2
        >>> recipe.to_json()
        {'name': 'random', 'algorithm': 'mask_v1', 'sparsity': '0.75', 'seed': '7'}

    Args:
        name: ``"random"`` or ``"bernoulli"``.
        sparsity: the fraction of zeros, in [0, 1], taken as the decimal that it prints as, which is what is kept.
        num_zeros: of ``"random"``, the number of zeros instead.
        threshold: of ``"bernoulli"``, the threshold instead, in [0, 2³²].
        seed: an integer in [0, 2⁶⁴).

    Raises:
        ValueError: if the name is another, a value is out of its range, or not exactly one of the sparsity and the name's
            count is given.
        TypeError: if the sparsity is no number, or another value no integer.
    """

    name: Literal["random", "bernoulli"]
    _: KW_ONLY
    sparsity: float | Fraction | Decimal | str | None = None
    num_zeros: int | None = None
    threshold: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _MAKERS:
            raise ValueError(f"a recipe's name is one of {', '.join(map(repr, _MAKERS))}; got {self.name!r}")
        own = _MAKERS[self.name][1]
        given = [name for name in ("sparsity", "num_zeros", "threshold") if getattr(self, name) is not None]
        if given not in (["sparsity"], [own]):
            raise ValueError(
                f"a recipe of {self.name!r} has exactly one of sparsity and {own}; got {' and '.join(given) or 'none'}"
            )
        kept: dict[str, Any] = {"seed": checked_seed(self.seed)}
        if self.sparsity is None:
            kept[own] = integer(own, getattr(self, own))
            if not 0 <= kept[own] < 1 << 62 or (own == "threshold" and kept[own] > 1 << 32):
                raise ValueError(f"{own} must not be negative, nor a threshold above 2**32; got {kept[own]}")
        else:
            kept["sparsity"] = text = str(self.sparsity)
            if not isinstance(self.sparsity, str):
                checked_fraction(self.sparsity)
            if not _NUMBER.fullmatch(text):
                raise ValueError(f"sparsity must be a decimal or a fraction of at most 99 digits; got {text[:200]!r}")
            checked_fraction(Fraction(text))
        for name, value in kept.items():
            object.__setattr__(self, name, value)  # past what keeps it frozen, as dataclasses do

    def make(self, shape: tuple[int, ...], axes: WeightAxes | None = None) -> NDArray[np.bool_]:
        """Return the mask of a weight: that of its matrix (out, in), the same connections however its axes lie.

        Args:
            shape: of the weight.
            axes: what its axes mean; of a stack of matrices the outputs of all lie one below the other. If ``None``, the
                first axis is that of outputs.

        Raises:
            ValueError: if there are to be more zeros than entries, or axes are none of such a weight.
        """
        maker, own = _MAKERS[self.name]
        amount = {own: getattr(self, own)} if self.sparsity is None else {"sparsity": Fraction(self.sparsity)}
        if axes is None:
            out, in_ = math.prod(shape[:1]), math.prod(shape[1:])
            return maker((out, in_), seed=self.seed, **amount).reshape(shape)
        stacked, out, in_ = axes.matrix_shape(shape)
        mask = maker((stacked * out, in_), seed=self.seed, **amount)
        return axes.from_matrices(mask.reshape(stacked, out, in_), shape)

    def to_json(self) -> dict[str, str]:
        """Return it as strings by name, since seeds are too large for many who read JSON; for :meth:`from_json`."""
        given = {name: getattr(self, name) for name in ("sparsity", "num_zeros", "threshold", "seed")}
        kept = {name: str(value) for name, value in given.items() if value is not None}
        return {"name": self.name, "algorithm": ALGORITHM, **kept}

    @classmethod
    def from_json(cls, told: Any) -> Self:
        """Return the recipe of which :meth:`to_json` made this.

        Raises:
            ValueError: if it is something else, or of an algorithm that this version does not know.
        """
        known = {"name", "algorithm", "sparsity", "num_zeros", "threshold", "seed"}
        if not isinstance(told, Mapping) or not {"name", "algorithm", "seed"} <= told.keys() <= known:
            raise ValueError(f"a recipe has a name, an algorithm, a seed and an amount; got {str(told)[:200]}")
        if told["algorithm"] != ALGORITHM:
            raise ValueError(f"recipes are of the algorithm {ALGORITHM}; got {str(told['algorithm'])[:200]!r}")
        given = {name: value for name, value in told.items() if name != "algorithm"}
        for name in ("num_zeros", "threshold", "seed"):
            if name in given:
                if not isinstance(given[name], str) or not _COUNT.fullmatch(given[name]):
                    raise ValueError(f"{name} is written as up to 20 digits; got {str(given[name])[:200]!r}")
                given[name] = int(given[name])
        if not isinstance(given.get("sparsity", ""), str):
            raise ValueError(f"the sparsity of a recipe is written as a string; got {str(given['sparsity'])[:200]}")
        return cls(**given)
