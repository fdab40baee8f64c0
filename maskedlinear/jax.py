"""The masked linear layer for JAX: functions of arrays. Needs the extra ``jax``."""

from maskedlinear._extras import missing_framework

try:
    from maskedlinear_jax import (
        PackedWeights,
        PruningState,
        RegrowthState,
        apply_constraints,
        apply_masks,
        freeze_masked,
        grasp_scores,
        masked_linear,
        n_of_m_tree,
        pack,
        prune_tree,
        regrow_tree,
        scheduled_pruning,
        scheduled_regrowth,
        set_optimizer_masks,
        sparse_linear,
        stack_patterns,
        straight_through,
        synflow_scores,
        top_kast,
        top_kast_masks,
        trace_axes,
        with_bits,
    )
except ModuleNotFoundError as error:
    raise missing_framework(error, "maskedlinear.jax", "jax", "jax", "jaxlib", "optax") from error

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
