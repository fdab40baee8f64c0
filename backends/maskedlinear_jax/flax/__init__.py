"""Flax layers over the JAX backend: nnx and linen. Users import them as ``maskedlinear.flax``.

Flax keeps a layer's kernel as ``(in, out)``, and a mask has the shape of the parameter that it masks: so has every mask
given to a layer here. Masks made by ``maskedlinear.masks`` speak ``(out, in)``: transpose them with ``mask.T``.
"""

from maskedlinear_jax.flax._growth import growth_gradients
from maskedlinear_jax.flax._kernel import Mask, param_masks, set_param_masks
from maskedlinear_jax.flax._linen import MaskedDense
from maskedlinear_jax.flax._models import compress, expand
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._over_time import ScheduledPruning, ScheduledRegrowth, lottery_rounds, rewind_model
from maskedlinear_jax.flax._regrow import regrow_model
from maskedlinear_jax.flax._shrink import shrink
from maskedlinear_jax.flax._sparse_nnx import Connections, SparseLinear
from maskedlinear_jax.flax._whole import mask_model, masks_of, prune_model, report, set_masks, unmask_model

__all__ = [
    "Connections",
    "Mask",
    "MaskedDense",
    "MaskedLinear",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "compress",
    "expand",
    "growth_gradients",
    "lottery_rounds",
    "mask_model",
    "masks_of",
    "param_masks",
    "prune_model",
    "regrow_model",
    "report",
    "rewind_model",
    "set_masks",
    "set_param_masks",
    "shrink",
    "unmask_model",
]
