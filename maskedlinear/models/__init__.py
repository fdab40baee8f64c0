"""Whole models, whatever the framework: which axes a weight has, and what of a model is masked, could be, or is left out."""

from maskedlinear.models._axes import WeightAxes, checked_axes
from maskedlinear.models._chains import ChainLayer, known_chain, number_effective, warn_of_cut
from maskedlinear.models._forms import check_patterns
from maskedlinear.models._hierarchy import check_hierarchy
from maskedlinear.models._layer_weight import LayerWeight, choose_weight, matrix_shape, read_matrix
from maskedlinear.models._left_out import warn_of_drift, warn_of_left_out, warn_of_lost, warn_of_sparse
from maskedlinear.models._names import NO_WEIGHT, SHARED, UNKNOWN, axes_by_name, is_norm, why_left_out
from maskedlinear.models._prune import (
    Of,
    Prunable,
    check_of,
    count_masked,
    prune_weights,
    refuse_fixed,
    refuse_unknown,
    zeros_left,
)
from maskedlinear.models._regrow import refuse_shared, regrow_weight
from maskedlinear.models._sharded import AddUp, Shard, ShardedWeight, count_live, prune_shards, regrow_shards
from maskedlinear.models._summary import MaskCheck, ModelSummary, UnmaskedParameter, WeightSummary, first_names
from maskedlinear.models._updates import UpdatesMethod, check_updates_method, update_weight
from maskedlinear.models._weights import ModelWeight, ParameterUser, check_one_mask, describe_weight, weights_to_mask

__all__ = [
    "NO_WEIGHT",
    "SHARED",
    "UNKNOWN",
    "AddUp",
    "ChainLayer",
    "LayerWeight",
    "MaskCheck",
    "ModelSummary",
    "ModelWeight",
    "Of",
    "ParameterUser",
    "Prunable",
    "Shard",
    "ShardedWeight",
    "UnmaskedParameter",
    "UpdatesMethod",
    "WeightAxes",
    "WeightSummary",
    "axes_by_name",
    "check_hierarchy",
    "check_of",
    "check_one_mask",
    "check_patterns",
    "check_updates_method",
    "checked_axes",
    "choose_weight",
    "count_live",
    "count_masked",
    "describe_weight",
    "first_names",
    "is_norm",
    "known_chain",
    "matrix_shape",
    "number_effective",
    "prune_shards",
    "prune_weights",
    "read_matrix",
    "refuse_fixed",
    "refuse_shared",
    "refuse_unknown",
    "regrow_shards",
    "regrow_weight",
    "update_weight",
    "warn_of_cut",
    "warn_of_drift",
    "warn_of_left_out",
    "warn_of_lost",
    "warn_of_sparse",
    "weights_to_mask",
    "why_left_out",
    "zeros_left",
]
