"""Masks: which connections a layer has. Made here, checked here, with NumPy alone.

A mask is a boolean array of shape ``(out, in)``: row i says which inputs reach output node i. ``True`` is a live
connection. The random masks are the same bit for bit on every machine and in every framework, because they come from the
project's own generator, ``mask_v1``, and never from a framework's.
"""

from maskedlinear._check import as_mask
from maskedlinear.masks._autoregressive import autoregressive, from_adjacency
from maskedlinear.masks._distribution import erdos_renyi_num_zeros, uniform_plus_num_zeros
from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._layered import LayeredWiring
from maskedlinear.masks._random import ALGORITHM, bernoulli, random
from maskedlinear.masks._recipe import Recipe
from maskedlinear.masks._structured import blocks, constant_fan_in, n_of_m, receptive_field, receptive_field_pattern
from maskedlinear.masks._threefry import threefry2x32, words
from maskedlinear.masks._wiring import Wiring
from maskedlinear.masks._wiring_picture import plot_wirings

__all__ = [
    "ALGORITHM",
    "DropReport",
    "LayeredWiring",
    "Recipe",
    "Wiring",
    "as_mask",
    "autoregressive",
    "bernoulli",
    "blocks",
    "constant_fan_in",
    "erdos_renyi_num_zeros",
    "from_adjacency",
    "n_of_m",
    "plot_wirings",
    "random",
    "receptive_field",
    "receptive_field_pattern",
    "threefry2x32",
    "uniform_plus_num_zeros",
    "words",
]
