"""``BackendConformance``: the laws as tests. The plugin says which backends, dtypes and pairs each is run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from maskedlinear import spec
from maskedlinear.backends import Backend
from maskedlinear_conformance.bounds import Bounds, bounds, pair_ratio, ratio
from maskedlinear_conformance.cases import CASES, Case, Data
from maskedlinear_conformance.record import Record

__all__ = ["QUANTITIES", "BackendConformance"]

QUANTITIES = ("y", "dx", "dW", "db", "ẏ")

Float = NDArray[np.float64]
Results = dict[str, Float | None]


def run(backend: Backend, data: Data, dtype: str, device: str) -> Results:
    """Run value, vjp and jvp of ``data`` on a backend; the results as float64, by the names in ``QUANTITIES``."""

    def send(array: Any) -> Any:
        return None if array is None else backend.asarray(array, dtype, device)

    with backend.strict():
        x, weight, mask, bias = (send(array) for array in data.arguments)
        y = backend.masked_linear(x, weight, mask, bias)
        dx, dweight, dbias = backend.vjp(x, weight, mask, bias, send(data.g))
        _, dy = backend.jvp(x, weight, mask, bias, *(send(tangent) for tangent in data.tangents))
        named = zip(QUANTITIES, (y, dx, dweight, dbias, dy), strict=True)
        return {name: None if array is None else np.array(backend.asnumpy(array)) for name, array in named}


def exact(data: Data) -> Results:
    """Return the same from the spec, in float64."""
    y, dy = spec.jvp(*data.arguments, *data.tangents)
    return dict(zip(QUANTITIES, (y, *spec.vjp(*data.arguments, data.g), dy), strict=True))


def absolute(data: Data) -> dict[str, Any]:
    """Return S of each of the same, for the bounds."""
    sums: Bounds = bounds(*data.arguments, data.g, data.tangents)
    return dict(zip(QUANTITIES, sums, strict=True))


class BackendConformance:
    """The laws. Fixtures: ``backend``, ``pair`` (two backends), ``dtype``, ``device`` and ``record``."""

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_value_vjp_and_jvp_equal_the_spec(
        self, backend: Backend, dtype: str, device: str, case: Case, record: Record
    ) -> None:
        """Law 1: each result lies within the bound of the spec's, and has its shape."""
        data = case.data(dtype)
        got, want, sums = run(backend, data, dtype, device), exact(data), absolute(data)
        for name, expected in want.items():
            result = got[name]
            if expected is None or result is None:
                assert result is expected, f"{name} must be None exactly when there is no bias"
                continue
            assert result.shape == expected.shape, f"the shape of {name}"
            used = ratio(result, expected, sums[name], dtype)
            record.against_spec(backend.name, name, dtype, used)
            assert used <= 1, f"{name} is {used:.3g} times its bound away from the spec"

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_backends_equal_each_other(
        self, pair: tuple[Backend, Backend], dtype: str, device: str, case: Case, record: Record
    ) -> None:
        """The backends' results, gradients above all, lie within the bound of each other."""
        data = case.data(dtype)
        one, other = (run(backend, data, dtype, device) for backend in pair)
        sums = absolute(data)
        for name in QUANTITIES:
            first, second = one[name], other[name]
            if first is None or second is None:
                assert first is second
                continue
            used = pair_ratio(first, second, sums[name], dtype)
            record.between((pair[0].name, pair[1].name), name, dtype, used)
            assert used <= 1, f"{name} differs by {used:.3g} times the bound"

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
    def test_nothing_under_the_mask_leaks(self, backend: Backend, dtype: str, device: str, poison: float) -> None:
        """Law 4: what is stored under the mask reaches no result, and changes no bit of any."""
        data = Case((6,), 19, 11, 0.5).data(dtype)
        dirty = Data(
            **{
                **vars(data),
                "weight": np.where(data.mask, data.weight, poison),
                "dweight": np.where(data.mask, data.dweight, poison),
            }
        )
        clean_results, dirty_results = (run(backend, which, dtype, device) for which in (data, dirty))
        for name, result in clean_results.items():
            assert result is not None
            np.testing.assert_array_equal(dirty_results[name], result, err_msg=name)

    @pytest.mark.parametrize("poisoned", ["x", "g"])
    def test_masked_gradient_is_positive_zero(self, backend: Backend, dtype: str, device: str, poisoned: str) -> None:
        """Law 4: dW is exactly +0 under the mask, even where x or g holds NaN."""
        data = Case((6,), 19, 11, 0.5).data(dtype)
        values = vars(data)[poisoned].copy()
        values[0] = np.nan
        gradient = run(backend, Data(**{**vars(data), poisoned: values}), dtype, device)["dW"]
        assert gradient is not None
        dormant = gradient[~data.mask]
        assert (dormant == 0).all(), "dW must be 0 under the mask"
        assert not np.signbit(dormant).any(), "dW must be +0, not -0, under the mask"
        assert np.isnan(gradient[data.mask]).any(), "NaN must reach the live connections"
