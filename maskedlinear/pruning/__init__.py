"""Pruning: weights in, masks out. Arrays of any framework are read as NumPy, so that all give the same masks bit for bit.

A score says how much a connection matters; :func:`prune` removes those of the lowest scores, exactly as many as asked for;
a schedule says how many at each step; :func:`regrow` moves connections while a sparse network trains.
"""

from maskedlinear.pruning._data_scores import fisher, grasp, obd, synflow, wanda
from maskedlinear.pruning._edges import OnEmpty, Scope, n_of_m, prune, threshold
from maskedlinear.pruning._growth import regrow, regrow_pattern
from maskedlinear.pruning._nodes import node_mask, node_norm, node_taylor, prune_nodes
from maskedlinear.pruning._paths import effective_masks, effective_sparsity
from maskedlinear.pruning._reconstruct import obs, obs_update, sparsegpt
from maskedlinear.pruning._schedules import (
    CubicSchedule,
    GeometricSchedule,
    LinearSchedule,
    PolynomialSchedule,
    SparsitySchedule,
    cosine_decay,
)
from maskedlinear.pruning._scores import magnitude, movement, random_scores, snip, taylor
from maskedlinear.pruning._shrink import KeptNodes

__all__ = [
    "CubicSchedule",
    "GeometricSchedule",
    "KeptNodes",
    "LinearSchedule",
    "OnEmpty",
    "PolynomialSchedule",
    "Scope",
    "SparsitySchedule",
    "cosine_decay",
    "effective_masks",
    "effective_sparsity",
    "fisher",
    "grasp",
    "magnitude",
    "movement",
    "n_of_m",
    "node_mask",
    "node_norm",
    "node_taylor",
    "obd",
    "obs",
    "obs_update",
    "prune",
    "prune_nodes",
    "random_scores",
    "regrow",
    "regrow_pattern",
    "snip",
    "sparsegpt",
    "synflow",
    "taylor",
    "threshold",
    "wanda",
]
