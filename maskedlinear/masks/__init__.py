"""Masks: which connections a layer has. Made here, checked here, with NumPy alone.

A mask is a boolean array of shape ``(out, in)``: row i says which inputs reach output node i. ``True`` is a live
connection. The random masks are the same bit for bit on every machine and in every framework, because they come from the
project's own generator, ``mask_v1``, and never from a framework's.
"""

from maskedlinear.masks._check import as_mask
from maskedlinear.masks._random import ALGORITHM, bernoulli, random
from maskedlinear.masks._threefry import threefry2x32, words

__all__ = ["ALGORITHM", "as_mask", "bernoulli", "random", "threefry2x32", "words"]
