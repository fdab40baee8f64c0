"""The sparse products of PyTorch off the CPU: the rule, the panels, and those of half types."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import ROOT
from maskedlinear import _gpu_rule, masks
from maskedlinear._gpu_rule import Multiply, Product, Way, choose, seconds
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import _gpu_products, _layer_product
from maskedlinear_torch._products import DevicePattern

MASK = masks.random((300, 40), sparsity=0.4)
MASK[20:150] = False
MASK[7] = True
PATTERN = DevicePattern.of(SparsityPattern.from_mask(MASK), torch.device("cpu"))


def problem(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, a left and a right side, and W in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((int(MASK.sum()),), (300, batch), (40, batch))
    values, left, right = (torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in shapes)
    matrix = torch.zeros(MASK.shape, dtype=torch.float64)
    matrix[torch.tensor(MASK)] = values.double()
    return values, left, right, matrix


@pytest.mark.parametrize("rows", [1000, 100, 37])  # one panel, three, and nine of which the last is small
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_panels_give_the_products(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values, left, right, matrix = problem(9, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    near: Any = {"rtol": 0, "atol": 1e-12 if dtype is torch.float64 else 1e-4}
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
    for transposed, side, sizes in ((False, right, 40), (True, left, 300)):
        for name in ("PANEL_BYTES", "LARGEST_PANEL"):
            monkeypatch.setattr(_gpu_rule, name, rows * sizes * right.itemsize)
        product = _gpu_products.spmm(values, side, PATTERN.csr(transposed))
        assert product is not None
        assert product.dtype is wide
        torch.testing.assert_close(product.double(), (matrix.T if transposed else matrix) @ side.double(), **near)
    sampled = _gpu_products.sddmm(left, right, PATTERN.csr(False))
    assert sampled is not None
    assert sampled.dtype is wide
    torch.testing.assert_close(sampled.double(), (left.double() @ right.double().T)[torch.tensor(MASK)], **near)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that anything makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


def test_a_panel_is_all_that_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PANEL_BYTES", "LARGEST_PANEL"):
        monkeypatch.setattr(_gpu_rule, name, 1 << 16)
    mask = masks.random((1024, 1024), sparsity=0.999)
    csr = DevicePattern.of(SparsityPattern.from_mask(mask), torch.device("cpu")).csr(False)
    side, values = torch.ones(1024, 2), torch.ones(csr.across.numel())
    with Largest() as seen:
        _gpu_products.spmm_in_panels(values, side, csr)
        _gpu_products.sddmm_in_panels(side, side, csr)
    assert seen.bytes == 1 << 16  # the whole is 4 MiB


def test_half_types_have_the_gradients_of_what_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_rule, "choose", lambda *_: "panels")
    values, g, right, matrix = problem(3, torch.bfloat16)
    values.requires_grad_()
    right.requires_grad_()
    y = _layer_product.layer_product(right.mT, values, PATTERN, None).mT
    assert y.dtype is torch.bfloat16
    found = torch.autograd.grad(y, (values, right), g, retain_graph=True)
    wanted = (g.double() @ right.double().T)[torch.tensor(MASK)], matrix.T @ g.double()
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is torch.bfloat16
        torch.testing.assert_close(one.double(), other.detach(), rtol=1 / 256, atol=1e-4)
    again = torch.autograd.grad(y, (values, right), g, create_graph=True)
    for one, other in zip(again, found, strict=True):
        torch.testing.assert_close(one, other)
    second = torch.autograd.grad(again[0].float().sum(), right)[0]
    wanted = torch.tensor(MASK).double().T @ g.double()
    torch.testing.assert_close(second.double(), wanted, rtol=1 / 128, atol=1e-3)


MEASURED = json.loads((ROOT / "benchmarks" / "results" / "h200" / "kernels.json").read_text())
Case = tuple[int, int, float, int, Multiply, str]  # rows, depth, live, batch, how it multiplies, which product


def took() -> dict[Case, dict[Way, float]]:
    """Return what each product took on an H200, each way as it is now, in microseconds: the last time it was measured."""
    found: dict[Case, dict[Way, float]] = {}
    for run, *case, way, us, _ in MEASURED["rows"]:
        if run and way != "sample":
            found.setdefault(tuple(case), {})[way] = us  # type: ignore[arg-type]
    return found


TOOK = took()


def asked(case: Case) -> Product:
    """Return what the rule is asked about a product that was measured."""
    rows, depth, live, batch, multiply, kind = case
    is_of = {"sampled": kind == "values", "transposed": kind == "Wᵀ g"}
    sizes, nnz = (depth, rows) if kind == "Wᵀ g" else (rows, depth), int(rows * depth * live)
    place_bytes = 0 if kind == "values" or _gpu_rule.has_bits(*sizes, nnz) else _gpu_products._PLACE_BYTES
    return Product(*sizes, nnz, batch, 2 if multiply == "half" else 4, multiply, place_bytes=place_bytes, **is_of)


def ways_of(case: Case) -> tuple[Way, ...]:
    """Return the ways that PyTorch chooses among, with Triton."""
    return ("rows", "bits", "tiles", "panels") if case[-1] == "W x" else ("rows", "tiles", "panels")


def test_what_was_measured_is_right() -> None:
    worst: dict[Multiply, float] = {"tf32": 2.5e-3, "half": 4e-6, "float32": 1e-6}
    errors = [(row[5], row[-1]) for row in MEASURED["rows"] if row[-1] is not None]
    assert len(errors) > 1350
    assert all(error <= worst[multiply] for multiply, error in errors)


def test_the_rule_takes_the_way_that_was_the_fastest_on_an_h200_or_one_near_it() -> None:
    """Of the products that were measured by several ways, also by that one, as they are now."""
    assert len(TOOK) == 561
    lost = []
    for case, ways in TOOK.items():
        chosen = choose(ways_of(case), asked(case))
        if chosen in ways and len(ways) > 2:  # the dense product is one of them
            lost.append(ways[chosen] / min(us for way, us in ways.items() if way != "dense"))
    best, far = sum(loss == 1 for loss in lost), sum(loss > 1.15 for loss in lost)
    text = (ROOT / "docs" / "when-sparse-pays.md").read_text()
    wanted = f"it takes the fastest way of {best} of {len(lost)} products, and of {far} one that takes more than 1.15"
    assert wanted in text, wanted
    assert max(lost) < 1.45
    assert best > 0.85 * len(lost)


def test_where_triton_is_products_are_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small layers, too: others add up in no fixed order."""
    monkeypatch.setattr(_gpu_products, "has_triton", lambda tensor: True)
    side = torch.ones(1, 1)
    for rows, depth, batch, live in itertools.product((5, 129, 2048), (7, 257), (1, 4, 33, 300), (0.001, 0.1, 1)):
        nnz = max(1, int(rows * depth * live))
        for of in ({}, {"sampled": True}, {"transposed": True}):
            product = Product(rows, depth, nnz, batch, 4, "float32", **of)
            assert _gpu_products._way(product, (side, side)) in ("rows", "bits", "tiles", "panels")
    monkeypatch.setattr(_gpu_products, "has_triton", lambda tensor: False)
    assert _gpu_products._way(Product(5, 7, 9, 4, 4, "float32"), (side, side)) in ("gathered", "panels")


def test_the_rules_times_are_those_of_an_h200() -> None:
    """Of the ways that it takes, of large products: small ones wait for more than the rule knows of."""
    for case, ways in TOOK.items():
        product = asked(case)
        chosen = choose([way for way in ways if way != "dense"], product)
        small = product.rows * product.depth < 8192 * 8192
        assert (0.1 if small else 0.4) < 1e6 * seconds("dense", product) / ways["dense"] < 1.3, case
        found = 1e6 * seconds(chosen, product) / ways[chosen]
        assert (0.25 if small else 0.6) < found < 1.65, (case, chosen, found)


def ratios(multiply: Multiply, kind: str, live: float) -> list[str]:
    """Return the cells of a table of the documentation: the fastest way's time, in those of the dense product."""
    batches = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
    found = [TOOK.get((8192, 8192, live, batch, multiply, kind)) for batch in batches]
    best = [ways and min((us, way) for way, us in ways.items() if way != "dense") for ways in found]
    return [
        "–" if not ways or not best else f"{best[0] / ways['dense']:.2f} {best[1]}"
        for ways, best in zip(found, best, strict=True)
    ]


@pytest.mark.parametrize("live", [0.1, 0.01])
def test_the_tables_of_the_documentation_are_what_was_measured(live: float) -> None:
    text = (ROOT / "docs" / "when-sparse-pays.md").read_text()
    of: tuple[tuple[str, Multiply], ...] = ("TF32", "tf32"), ("bfloat16", "half"), ("float32 without TF32", "float32")
    for name, multiply in of:
        for kind in ("W x", "Wᵀ g", "values"):
            label = "the gradient of values" if kind == "values" else kind
            wanted = f"| {name}: {label} | {' | '.join(ratios(multiply, kind, live))} |"
            assert wanted in text, wanted


@pytest.mark.parametrize("multiply", ["float32", "tf32", "half"])
def test_tiles_cover_the_product_and_programs_share_all_of_each(multiply: Multiply) -> None:
    size = 2 if multiply == "half" else 4
    for rows, depth, batch in (
        (1, 1, 1),
        (100, 33, 3),
        (128, 8192, 17),
        (4096, 768, 256),
        (1000, 8191, 65),
        (9, 70000, 300),
    ):
        product = Product(rows, depth, max(1, rows * depth // 10), batch, size, multiply)
        cut = _gpu_rule.tiles_of(product)
        steps = -(-depth // cut.deep)
        assert (cut.programs - 1) * cut.steps < steps <= cut.programs * cut.steps
        assert cut.programs == 1 or cut.steps >= 4
        assert cut.wide < 2 * max(batch, 16)
        assert seconds("tiles", product) < float("inf")
    # A batch that no power of two is near is not multiplied as if it were the next one, where columns are what takes time.
    for batch in (300, 321, 384, 513):
        product = Product(8192, 8192, 1 << 22, batch, size, multiply)
        width = _gpu_rule.tiles_of(product).wide
        assert -(-batch // width) * width < (1.3 * batch if multiply == "float32" else batch + 256), (batch, width)
        others = [_gpu_rule._cut(product, wide) for wide in _gpu_rule._TILES[multiply, False]]
        assert seconds("tiles", product) == min(_gpu_rule._seconds_as_cut(product, cut) for cut in others)


@pytest.mark.parametrize("multiply", ["float32", "float64", "tf32", "half"])
def test_of_every_size_the_rule_takes_a_way_that_there_is(multiply: Multiply) -> None:
    """No rows, no columns, no batch; and what is as large as a kernel is launched for."""
    size = {"float64": 8, "half": 2}.get(multiply, 4)
    ways: tuple[Way, ...] = ("cusparse", "rows", "bits", "tiles", "panels")
    some = (0, 1, 33, 1 << 21)
    for rows, depth, batch, live in itertools.product(some, some, some, (0, 1, 0.1)):
        nnz = min(int(rows * depth * live), (1 << 31) - 1)
        for of in ({}, {"sampled": True}, {"transposed": True}):
            for place_bytes in (0, 36):
                product = Product(rows, depth, nnz, batch, size, multiply, place_bytes=place_bytes, **of)
                chosen = choose(ways, product)
                assert 0 <= seconds(chosen, product) < float("inf"), (product, chosen)
                assert seconds("dense", product) >= 0
                if chosen == "panels":
                    height = -(-(depth if "transposed" in of else rows) // _gpu_rule.panels(product))
                    row = rows if "transposed" in of else depth
                    row *= max(4, size) if "sampled" in of else size
                    assert 0 < height * row <= _gpu_rule.LARGEST_PANEL


def test_a_pattern_of_no_size_has_no_bits() -> None:
    assert not _gpu_rule.has_bits(0, 5, 0)
    assert not _gpu_rule.has_bits(5, 0, 0)
    assert _gpu_rule.has_bits(5, 5, 1)


def test_a_row_that_fills_a_panel_is_not_unpacked() -> None:
    wide = Product(10, 1 << 26, 1 << 20, 4096, 4, "float32")
    assert choose(("gathered", "panels"), wide) == "gathered"
    assert choose(("gathered", "panels"), wide._replace(depth=1 << 12, nnz=1 << 14)) == "panels"


LIVE = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.0079, 0.0077, 0.005, 0.001)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


def slowest(multiply: Multiply, batch: int, **of: Any) -> float:
    """Return the longest time of the chosen way, of any density, in those of the dense product, by the rule."""
    size = 2 if multiply == "half" else 4
    ways: tuple[Way, ...] = ("rows", "tiles", "panels") if of else ("rows", "bits", "tiles", "panels")
    products = [Product(8192, 8192, int(live * 8192**2), batch, size, multiply, **of) for live in LIVE]
    no_bits = [not (product.sampled or _gpu_rule.has_bits(*product[:3])) for product in products]
    each = [_gpu_products._PLACE_BYTES if one else 0 for one in no_bits]
    products = [product._replace(place_bytes=one) for product, one in zip(products, each, strict=True)]
    return max(seconds(choose(ways, product), product) / seconds("dense", product) for product in products)


def test_by_the_rule_no_density_and_batch_is_further_from_dense_than_the_documentation_says() -> None:
    text = (ROOT / "docs" / "when-sparse-pays.md").read_text()
    kinds: tuple[dict[str, bool], ...] = {}, {"transposed": True}, {"sampled": True}
    most = []
    for multiply in ("tf32", "half", "float32"):
        found = {batch: max(slowest(multiply, batch, **of) for of in kinds) for batch in BATCHES}  # type: ignore[arg-type]
        worst = max(found, key=lambda batch: found[batch])
        most.append(f"{found[worst]:.1f} at batch {worst}")
        assert max(slowest(multiply, 16384, **of) for of in ({}, {"sampled": True})) < 1.15  # type: ignore[arg-type]
        assert found[16384] < 1.3
    tf32, half, float32 = most
    wanted = f"of any density it would be at most {tf32} in TF32, {half} in half types, and {float32} without TF32"
    assert wanted in text, wanted


@pytest.mark.parametrize("sampled", [False, True])
def test_xla_goes_by_bits_where_panels_are_sooner_unpacked_so(sampled: bool) -> None:
    for multiply, size in (("tf32", 4), ("half", 2), ("float32", 4)):
        some = [Product(8192, 8192, int(live * 8192**2), 1024, size, multiply, sampled) for live in (0.001, 1)]  # type: ignore[arg-type]
        assert [_gpu_rule.panels_by_bits(one).by_xla for one in some] == [False, True]
