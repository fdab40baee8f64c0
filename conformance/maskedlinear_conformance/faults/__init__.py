"""Faulty backends: what an author of a backend could really get wrong, each to be caught by a law.

``python -m maskedlinear_conformance --faults`` runs the suite on all of them, and on the reference backend they are made
from. A fault that no law catches is a missing law; so is one that only an unrelated exception gives away.
"""

from maskedlinear_conformance.faults import (
    _arithmetic,
    _checkpoints,
    _derivatives,
    _distribution,
    _dtypes,
    _generation,
    _large,
    _layers,
    _missing,
    _optimizers,
    _storage,
    _storage_changes,
    _transforms,
    _vmap,
)
from maskedlinear_conformance.faults._reference_backend import Mutant, ReferenceBackend

__all__ = ["FAULTS", "ReferenceBackend"]

FAULTS: dict[str, type[Mutant]] = {
    fault.name: fault
    for module in (
        _arithmetic,
        _dtypes,
        _derivatives,
        _vmap,
        _transforms,
        _layers,
        _storage,
        _storage_changes,
        _checkpoints,
        _missing,
        _large,
        _optimizers,
        _generation,
        _distribution,
    )
    for fault in vars(module).values()
    if isinstance(fault, type) and issubclass(fault, Mutant) and fault.name != ReferenceBackend.name
}
"""The faults by name. Each says in its docstring what is wrong, and in ``laws`` which laws must catch it, every one."""
