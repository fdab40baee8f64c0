"""Pruning: weights in, masks out. Arrays of any framework are read as NumPy, so that all give the same masks bit for bit.

A score says how much a connection matters; :func:`prune` removes those of the lowest scores, exactly as many as asked for;
a schedule says how many at each step; :func:`regrow` moves connections while a sparse network trains.
"""

from maskedlinear.pruning._edges import OnEmpty, Scope, n_of_m, prune, threshold
from maskedlinear.pruning._growth import regrow, regrow_pattern
from maskedlinear.pruning._nodes import node_mask, node_norm, node_taylor, prune_nodes
from maskedlinear.pruning._schedules import CubicSchedule, GeometricSchedule, cosine_decay
from maskedlinear.pruning._scores import magnitude, movement, random_scores, snip, taylor

__all__ = [
    "CubicSchedule",
    "GeometricSchedule",
    "OnEmpty",
    "Scope",
    "cosine_decay",
    "magnitude",
    "movement",
    "n_of_m",
    "node_mask",
    "node_norm",
    "node_taylor",
    "prune",
    "prune_nodes",
    "random_scores",
    "regrow",
    "regrow_pattern",
    "snip",
    "taylor",
    "threshold",
]
