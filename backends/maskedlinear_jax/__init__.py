"""The JAX backend: the op and the optax guard. Users import it as ``maskedlinear.jax``; Flax layers are in ``flax``."""

import jax

if jax.__version_info__ < (0, 6):
    raise ImportError(
        f"maskedlinear.jax needs jax >= 0.6, the oldest release that it is tested with; found {jax.__version__}. "
        'Upgrade with: pip install -U "maskedlinear[jax]"'
    )

from maskedlinear_jax._bits import with_bits
from maskedlinear_jax._constraints import apply_constraints
from maskedlinear_jax._dense_training import n_of_m_tree, straight_through, top_kast, top_kast_masks
from maskedlinear_jax._flow_scores import grasp_scores, synflow_scores
from maskedlinear_jax._functional import masked_linear
from maskedlinear_jax._optim import freeze_masked, set_optimizer_masks
from maskedlinear_jax._packed import PackedWeights, pack
from maskedlinear_jax._schedule import PruningState, scheduled_pruning
from maskedlinear_jax._scheduled_regrowth import RegrowthState, scheduled_regrowth
from maskedlinear_jax._sparse import sparse_linear, stack_patterns
from maskedlinear_jax._trace_axes import trace_axes
from maskedlinear_jax._tree import apply_masks, prune_tree, regrow_tree

__all__ = [
    "PackedWeights",
    "PruningState",
    "RegrowthState",
    "apply_constraints",
    "apply_masks",
    "freeze_masked",
    "grasp_scores",
    "masked_linear",
    "n_of_m_tree",
    "pack",
    "prune_tree",
    "regrow_tree",
    "scheduled_pruning",
    "scheduled_regrowth",
    "set_optimizer_masks",
    "sparse_linear",
    "stack_patterns",
    "straight_through",
    "synflow_scores",
    "top_kast",
    "top_kast_masks",
    "trace_axes",
    "with_bits",
]
