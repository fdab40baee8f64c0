"""Flax layers over the JAX backend: nnx and linen. Users import them as ``maskedlinear.flax``.

Flax keeps a layer's kernel as ``(in, out)``, and a mask has the shape of the parameter that it masks: so has every mask
given to a layer here. Masks made by ``maskedlinear.masks`` speak ``(out, in)``: transpose them with ``mask.T``.
"""

import flax
from flax import nnx

if not hasattr(nnx.Variable, "get_value"):
    raise ImportError(
        f"maskedlinear.flax needs flax >= 0.12.1, whose Variables have get_value and set_value; found {flax.__version__}. "
        'Upgrade with: pip install -U "maskedlinear[flax]"'
    )

from maskedlinear_jax.flax._activations import Activations, record_activations
from maskedlinear_jax.flax._check import check_masks
from maskedlinear_jax.flax._constrain import constrain
from maskedlinear_jax.flax._constraint_variables import Constraint
from maskedlinear_jax.flax._dense_gradients import dense_gradients
from maskedlinear_jax.flax._derivative_scores import fisher_scores, grasp_scores, obd_scores
from maskedlinear_jax.flax._kernel import Dormant, Mask
from maskedlinear_jax.flax._linen import MaskedDense
from maskedlinear_jax.flax._models import compress, expand, get_forms, keep_bits
from maskedlinear_jax.flax._nnx import MaskedLinear
from maskedlinear_jax.flax._over_time import (
    ScheduledPruning,
    ScheduledRegrowth,
    load_state,
    lottery_rounds,
    rewind_model,
)
from maskedlinear_jax.flax._param_masks import param_masks, set_param_masks
from maskedlinear_jax.flax._pathways import PathwayNetwork
from maskedlinear_jax.flax._regrow import regrow_model
from maskedlinear_jax.flax._shrink import shrink
from maskedlinear_jax.flax._sparse_nnx import PatternIndex, SparseLinear
from maskedlinear_jax.flax._updates import prune_with_updates
from maskedlinear_jax.flax._weights import register_axes
from maskedlinear_jax.flax._whole import get_masks, mask_model, prune_model, set_masks, summary, unmask_model

__all__ = [
    "Activations",
    "Constraint",
    "Dormant",
    "Mask",
    "MaskedDense",
    "MaskedLinear",
    "PathwayNetwork",
    "PatternIndex",
    "ScheduledPruning",
    "ScheduledRegrowth",
    "SparseLinear",
    "check_masks",
    "compress",
    "constrain",
    "dense_gradients",
    "expand",
    "fisher_scores",
    "get_forms",
    "get_masks",
    "grasp_scores",
    "keep_bits",
    "load_state",
    "lottery_rounds",
    "mask_model",
    "obd_scores",
    "param_masks",
    "prune_model",
    "prune_with_updates",
    "record_activations",
    "register_axes",
    "regrow_model",
    "rewind_model",
    "set_masks",
    "set_param_masks",
    "shrink",
    "summary",
    "unmask_model",
]
