"""The sparse products of PyTorch off the CPU: the rule, the panels, and those of half types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import ROOT
from maskedlinear import _gpu_rule, masks
from maskedlinear._gpu_rule import Multiply, Product, Way, choose, seconds
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch import _gpu_products, _half_products
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
        monkeypatch.setattr(_gpu_rule, "PANEL_BYTES", rows * sizes * right.itemsize)
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
    monkeypatch.setattr(_gpu_rule, "PANEL_BYTES", 1 << 16)
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
    y = _half_products.half_spmm(values, right, PATTERN)
    assert y.dtype is torch.float32
    y = y.to(torch.bfloat16)
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


LIVE = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.0079, 0.0077, 0.005, 0.001)


def slowest(ways: tuple[Way, ...], multiply: Multiply, batch: int, **of: Any) -> float:
    """Return the longest time of the chosen way, of any density, in those of the dense product."""
    size = {"float64": 8, "half": 2}.get(multiply, 4)
    products = [Product(8192, 8192, int(live * 8192**2), batch, size, multiply, **of) for live in LIVE]
    if "tiles" in ways:  # with Triton places are found by bits, if there are any
        each = [0 if _gpu_rule.has_bits(*product[:3]) else _gpu_products._PLACE_BYTES for product in products]
        products = [product._replace(place_bytes=one) for product, one in zip(products, each, strict=True)]
    return max(seconds(choose(ways, product), product) / seconds("dense", product) for product in products)


@pytest.mark.parametrize(("multiply", "least"), [("float32", 2048), ("float64", 2048), ("tf32", 8192), ("half", 16384)])
def test_by_count_panels_of_large_batches_take_no_longer_than_dense(multiply: Multiply, least: int) -> None:
    """Below, a panel takes longer to be unpacked than to be multiplied."""
    for of in ({}, {"sampled": True}, {"transposed": True}):
        assert slowest(("panels", "gathered"), multiply, least, **of) < 1.15
        assert slowest(("panels", "gathered"), multiply, least // 4, **of) > 1.15


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)


@pytest.mark.parametrize("multiply", ["float32", "tf32", "half"])
def test_by_count_with_triton_no_density_and_batch_is_far_from_dense(multiply: Multiply) -> None:
    """But where float32 is multiplied by what unpacks it too, and where what two programs make of a tile is added up, since
    there are fewer tiles than multiprocessors: of powers of two."""
    by_all: tuple[Way, ...] = ("rows", "bits", "tiles", "panels")
    by_most: tuple[Way, ...] = ("rows", "tiles", "panels")
    for ways, of in ((by_all, {}), (by_most, {"transposed": True}), (by_most, {"sampled": True})):
        sampled = "sampled" in of
        found = {batch: slowest(ways, multiply, batch, **of) for batch in BATCHES}
        far = {batch: round(ratio, 2) for batch, ratio in found.items() if ratio > 1.15}
        if multiply == "float32":
            assert far.keys() == ({32, 64} if sampled else {32})
        else:
            assert far.keys() == (set() if sampled else {256})
        assert max(far.values(), default=0) < {"float32": 1.275, "tf32": 1.205, "half": 1.265}[multiply]


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
    # A batch that no power of two is near is not multiplied as if it were the next one.
    for batch in (300, 321, 384, 513):
        few = _gpu_rule.tiles_of(Product(8192, 8192, 1 << 22, batch, size, multiply))
        width = few.wide + few.tail
        assert -(-batch // width) * width < 1.3 * batch, (batch, few)


def test_a_pattern_of_no_size_has_no_bits() -> None:
    assert not _gpu_rule.has_bits(0, 5, 0)
    assert not _gpu_rule.has_bits(5, 0, 0)
    assert _gpu_rule.has_bits(5, 5, 1)


def test_a_row_that_fills_a_panel_is_not_unpacked() -> None:
    wide = Product(10, 1 << 24, 1 << 20, 4096, 4, "float32")
    assert choose(("gathered", "panels"), wide) == "gathered"
    assert choose(("gathered", "panels"), wide._replace(depth=1 << 12, nnz=1 << 14)) == "panels"


def cells(
    batches: tuple[int, ...], multiply: Multiply, live: tuple[float, ...], **of: Any
) -> tuple[list[str], list[str]]:
    """Return the cells of the documentation's tables: of W x and Wᵀ g, and of the gradient of values."""

    def most(batch: int, **kind: Any) -> float:
        size = {"half": 2}.get(multiply, 4)
        ratios = []
        for one in live:
            product = Product(8192, 8192, int(one * 8192**2), batch, size, multiply, **kind)
            if of["torch"]:
                bits = _gpu_rule.has_bits(*product[:3]) if of["triton"] else 0
                product = product._replace(place_bytes=0 if bits else _gpu_products._PLACE_BYTES)
            if not of["kept"]:
                product = product._replace(forms_bits=0.5 if kind else 1.0)
            elif not of["torch"]:
                product = _gpu_rule.panels_by_bits(product)
            ways: list[Way] = ["cusparse", "panels"] if of["torch"] else ["gathered", "panels"]
            if of["kept"] and not of["torch"] and not kind:
                ways.append("reduced")
            if of["triton"]:
                ways += ["rows", "tiles"] if kind else ["rows", "bits", "tiles"]
            ratios.append(seconds(choose(ways, product), product) / seconds("dense", product))
        return max(ratios)

    rows = [max(most(batch), most(batch, transposed=True)) for batch in batches]
    return [f"{row:.2f}" for row in rows], [f"{most(batch, sampled=True):.2f}" for batch in batches]


def test_the_tables_of_the_documentation_are_the_rules() -> None:
    text = (ROOT / "docs" / "when-sparse-pays.md").read_text()
    batches = (1, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
    triton = {"torch": True, "triton": True, "kept": True}
    for name, multiply in (("float32", "float32"), ("TF32", "tf32"), ("half types", "half")):
        one, other = cells(batches, multiply, LIVE, **triton)  # type: ignore[arg-type]
        wanted = f"| {name}: W x, Wᵀ g | {' | '.join(one)} |\n| the gradient of values | {' | '.join(other)} |"
        assert wanted in text, wanted
    jax = {"torch": False, "triton": False, "kept": False}
    for multiply, last in (
        ("tf32", "1.07, 1.02 in TF32"),
        ("half", "1.14, 1.03 in half types"),
        ("float32", ""),
    ):
        of_torch, of_jax = (
            cells(batches, multiply, LIVE, **of)  # type: ignore[arg-type]
            for of in (triton, jax | {"triton": True, "kept": True})
        )
        other = [(row, place) for row in (0, 1) for place in range(10) if of_jax[row][place] != of_torch[row][place]]
        assert all(place >= 8 for row, place in other if row)
        of_products = [(place, of_jax[0][place]) for row, place in other if not row]
        assert of_products == [(8, "1.07")] * (multiply == "half")
        if last:
            assert last.startswith(", ".join(of_jax[1][8:]))
            assert last in text
    # One or two rows of x, by XLA.
    ratios = []
    for live, size, multiply, batch in (
        (0.1, 4, "tf32", 1),
        (0.1, 4, "tf32", 2),
        (0.1, 2, "half", 1),
        (0.1, 2, "half", 2),
    ):
        product = Product(8192, 8192, int(live * 8192**2), batch, size, multiply)  # type: ignore[arg-type]
        ratios.append(round(seconds("reduced", product) / seconds("dense", product), 2))
    assert ratios == [0.48, 0.83, 0.96, 1.66]
    for batch in (1, 2):
        full = Product(8192, 8192, 8192**2, batch, 4, "tf32")
        assert seconds("reduced", full) / seconds("dense", full) < 1.065
    # From where on they go by bits, and from how many rows of x.
    for multiply, size, first, unpacked, seen in (
        ("tf32", 4, 1, 1.0, 22.9),
        ("half", 2, 9, 5.1, 27.5),
        ("float32", 4, 10, 1.0, 0),
    ):
        asked = Product(8192, 8192, 0, 1024, size, multiply)  # type: ignore[arg-type]
        for sampled_too, wanted in ((False, unpacked), (True, seen)):
            every = [asked._replace(sampled=sampled_too, nnz=int(live / 1000 * 8192**2)) for live in range(1, 300)]
            least = next(place for place, one in enumerate(every) if _gpu_rule.panels_by_bits(one).by_xla)
            assert not wanted or (least + 1) / 10 == wanted
        some = asked._replace(nnz=int(0.1 * 8192**2))
        chosen = [
            choose(["gathered", "panels", "rows", "bits", "tiles"], some._replace(batch=batch))
            for batch in range(1, 12)
        ]
        assert chosen.index("tiles") + 1 == first
    # The list of what limits them.
    by_most: tuple[Way, ...] = ("rows", "tiles", "panels")
    odd: tuple[tuple[Multiply, int], ...] = ("tf32", 257), ("half", 257), ("half", 241), ("float32", 33)
    uneven = [
        max(slowest((*by_most, "bits"), name, batch), slowest(by_most, name, batch, transposed=True))
        for name, batch in odd
    ]
    assert [round(one, 2) for one in uneven] == [1.94, 1.99, 2.06, 1.7]
    formed, by_xla = (
        [cells((1, 16, 64, 256, 1024), multiply, LIVE, **jax | of)[0] for multiply in ("tf32", "half")]  # type: ignore[arg-type]
        for of in ({"triton": True}, {"kept": True})
    )
    assert [max(map(float, row[:4])) for row in formed] == [2.14, 3.25]
    sampled = [cells((1, 64, 256), multiply, LIVE, **jax | {"kept": True})[1] for multiply in ("tf32", "half")]  # type: ignore[arg-type]
    assert [max(row) for row in sampled] == ["2.09", "3.55"]
    assert [(row[0], row[3], row[4]) for row in by_xla] == [("1.61", "1.94", "1.24"), ("1.78", "2.09", "1.27")]
    rows: list[tuple[str, Multiply, dict[str, bool]]] = [
        ("PyTorch with Triton, TF32", "tf32", triton),
        ("JAX with `jax-triton` and bits kept", "tf32", jax | {"triton": True, "kept": True}),
        ("JAX with `jax-triton`", "tf32", jax | {"triton": True}),
        ("JAX with bits kept", "tf32", jax | {"kept": True}),
        ("JAX", "tf32", jax),
        ("PyTorch without Triton", "tf32", triton | {"triton": False}),
        ("PyTorch with Triton, half types", "half", triton),
        ("JAX with `jax-triton` and bits kept", "half", jax | {"triton": True, "kept": True}),
        ("JAX with `jax-triton`", "half", jax | {"triton": True}),
        ("JAX with bits kept", "half", jax | {"kept": True}),
        ("JAX", "half", jax),
    ]
    for name, multiply, of in rows:
        pairs = zip(*cells((1, 16, 64, 256, 1024, 4096), multiply, (0.1,), **of), strict=True)
        wanted = f"| {name} | {' | '.join(' / '.join(pair) for pair in pairs)} |"
        assert wanted in text, wanted
