"""``BackendConformance``: all laws in one class. The plugin says on which backends, dtypes and cases each test runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskedlinear_conformance.laws.arrays import Arrays
from maskedlinear_conformance.laws.checkpoints import Checkpoints
from maskedlinear_conformance.laws.comparison import Comparison
from maskedlinear_conformance.laws.compositions import Compositions
from maskedlinear_conformance.laws.derivatives import Derivatives
from maskedlinear_conformance.laws.distribution import Distribution
from maskedlinear_conformance.laws.generation import Generation
from maskedlinear_conformance.laws.layers import Layers
from maskedlinear_conformance.laws.masking import Masking
from maskedlinear_conformance.laws.optimizers import Optimizers
from maskedlinear_conformance.laws.storage import Storage
from maskedlinear_conformance.laws.transforms import Transforms

__all__ = ["BackendConformance"]


class BackendConformance(
    Derivatives,
    Compositions,
    Masking,
    Arrays,
    Transforms,
    Layers,
    Storage,
    Checkpoints,
    Optimizers,
    Generation,
    Comparison,
    Distribution,
):
    """The laws as tests.

    To run them from a test file of your own, load the plugin (``pytest_plugins = ["maskedlinear_conformance.plugin"]`` in
    your topmost ``conftest.py``) and subclass::

        class TestMyBackend(BackendConformance):
            backends = (MyBackend(),)

    Attributes:
        backends: the backends to prove; if empty, those that the command line names with ``--backend``.
    """

    backends: Sequence[Any] = ()
