"""A linear layer whose connections are chosen by a mask, the same in every framework.

This package is the framework-free core: the spec, mask generation and the registry of backends. It imports NumPy and
array-api-compat only. The layers live behind one face a framework: ``maskedlinear.torch``, ``maskedlinear.jax`` and
``maskedlinear.flax``.
"""

from maskedlinear import backends, constraints, costs, masks, pattern, spec

__all__ = ["__version__", "backends", "constraints", "costs", "masks", "pattern", "spec"]

__version__ = "0.1.0"
