"""``maskedlinear bench``: how long each form of the layer takes, and what it keeps, against what people use otherwise.

Each framework runs in a process of its own. Within one, the layers of a case take turns in blocks of calls, so that a
machine that slows down slows all of them; what is told is the ratio to the framework's own dense layer in the same round.
"""

from maskedlinear.bench.cases import SETS, Case, cases

__all__ = ["SETS", "Case", "cases"]
