"""Files of masked models: small, safe, and the same for PyTorch, JAX, Flax and NumPy.

A checkpoint is a safetensors file. Of each masked weight it holds the live values and the mask, encoded; see
``docs/checkpoint-format.md`` for each byte::

    from maskedlinear import checkpoint

    checkpoint.save(model, "model.safetensors")
    checkpoint.load_into(model, "model.safetensors")
    arrays = checkpoint.load("model.safetensors")

What others have written comes in by :func:`read`, and goes out by :func:`write_dense`, :func:`dense_state` and
:func:`to_scipy`.
"""

from maskedlinear.checkpoint._arrays import MaskedArray, PlainArray
from maskedlinear.checkpoint._dense import dense_state, to_scipy, write_dense
from maskedlinear.checkpoint._errors import CheckpointError
from maskedlinear.checkpoint._file import CheckpointFile, open
from maskedlinear.checkpoint._foreign import ReadArrays, read
from maskedlinear.checkpoint._models import load, load_into, save
from maskedlinear.checkpoint._wirings import wirings

__all__ = [
    "CheckpointError",
    "CheckpointFile",
    "MaskedArray",
    "PlainArray",
    "ReadArrays",
    "dense_state",
    "load",
    "load_into",
    "open",
    "read",
    "save",
    "to_scipy",
    "wirings",
    "write_dense",
]
