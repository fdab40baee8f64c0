"""Laws that every backend of maskedlinear must obey, made executable, for any registered backend.

Run it with ``python -m maskedlinear_conformance --backend NAME``, once for each backend to prove; every pair of the
backends named is compared directly as well.
"""

import pytest

# Before the modules with the assertions are imported, so that a failure shows its values.
pytest.register_assert_rewrite("maskedlinear_conformance.bounds", "maskedlinear_conformance.suite")

from maskedlinear_conformance.bounds import Bounds, accumulation_unit, output_unit
from maskedlinear_conformance.suite import BackendConformance

__all__ = ["BackendConformance", "Bounds", "accumulation_unit", "output_unit"]
