"""Laws that every backend of maskedlinear must obey, made executable, for any registered backend.

Run it with ``python -m maskedlinear_conformance --backend NAME``, once for each backend to prove; every pair of the
backends named is compared directly as well. ``python -m maskedlinear_conformance --faults`` proves the suite itself.
"""

from maskedlinear._extras import missing_framework

try:
    import pytest

    # Before the modules with the assertions are imported, so that a failure shows its values.
    pytest.register_assert_rewrite("maskedlinear_conformance.backend_under_test", "maskedlinear_conformance.laws")

    from maskedlinear_conformance.bounds import Expected, accumulation_unit, expected, output_unit
    from maskedlinear_conformance.suite import BackendConformance
except ModuleNotFoundError as error:
    needed = ("pytest", "hypothesis", "safetensors")
    raise missing_framework(error, "maskedlinear_conformance", "conformance", *needed) from error

__all__ = ["BackendConformance", "Expected", "accumulation_unit", "expected", "output_unit"]
