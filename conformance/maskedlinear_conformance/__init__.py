"""Laws that every backend of maskedlinear must obey, made executable, for any registered backend.

Run it with ``python -m maskedlinear_conformance --backend NAME``, once for each backend to prove; every pair of the
backends named is compared directly as well. ``python -m maskedlinear_conformance --faults`` proves the suite itself.
"""

import pytest

# Before the modules with the assertions are imported, so that a failure shows its values.
pytest.register_assert_rewrite("maskedlinear_conformance.subject", "maskedlinear_conformance.laws")

from maskedlinear_conformance.bounds import Expected, accumulation_unit, expected, output_unit
from maskedlinear_conformance.suite import BackendConformance

__all__ = ["BackendConformance", "Expected", "accumulation_unit", "expected", "output_unit"]
