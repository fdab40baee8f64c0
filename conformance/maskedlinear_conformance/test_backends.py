"""The door for ``--pyargs maskedlinear_conformance``: the suite, on the backends that the command line names."""

from maskedlinear_conformance.suite import BackendConformance


class TestBackends(BackendConformance):
    """Every law, on every backend named."""
