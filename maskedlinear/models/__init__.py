"""Whole models, whatever the framework: which axes a weight has, and what of a model is masked, could be, or is left out."""

from maskedlinear.models._axes import WeightAxes
from maskedlinear.models._names import NO_WEIGHT, SHARED, UNKNOWN, axes_by_name, why_left_out
from maskedlinear.models._prune import Of, Prunable, prune_weights, refuse_unknown
from maskedlinear.models._regrow import regrow_weight
from maskedlinear.models._summary import MaskCheck, ModelSummary, UnmaskedParameter, WeightSummary, first_names

__all__ = [
    "NO_WEIGHT",
    "SHARED",
    "UNKNOWN",
    "MaskCheck",
    "ModelSummary",
    "Of",
    "Prunable",
    "UnmaskedParameter",
    "WeightAxes",
    "WeightSummary",
    "axes_by_name",
    "first_names",
    "prune_weights",
    "refuse_unknown",
    "regrow_weight",
    "why_left_out",
]
