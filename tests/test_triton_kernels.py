"""Triton's kernels without a GPU: interpreted on the CPU against the spec, and compiled for an H100."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: there is none but for Linux"
)


def python(code: str, folder: Path, **variables: str) -> str:
    """Run code in a process of its own, since Triton is interpreted, or not, from its import on."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    variables |= {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


INTERPRETED = """
import torch
from maskedlinear import masks
from maskedlinear.pattern import SparsityPattern
from maskedlinear import _gpu_rule
from maskedlinear import _triton_tiles as tiles
from maskedlinear._triton_rows import Sizes
from maskedlinear.torch import sparse_linear
from maskedlinear_torch import _gpu_products, _products
from maskedlinear_torch import _triton_products as kernels
from maskedlinear_torch._products import DevicePattern

torch.manual_seed(0)
mask = masks.random((5, 70), sparsity=0.6)
mask[1], mask[2] = True, False
live = torch.tensor(mask)
pattern = DevicePattern.of(SparsityPattern.from_mask(mask), torch.device("cpu"))
for dtype, batch in ((torch.float32, 3), (torch.float64, 1), (torch.bfloat16, 16), (torch.float16, 2), (torch.float32, 130)):
    values, left, right = (torch.randn(s).to(dtype) for s in ((int(mask.sum()),), (5, batch), (70, batch)))
    matrix = torch.zeros(5, 70, dtype=torch.float64)
    matrix[live] = values.double()
    found = {
        "spmm": (kernels.rows_spmm(values, right, pattern.csr(False)), matrix, right),
        "sddmm": (kernels.rows_sddmm(left, right, pattern.csr(False)), left, right),
    }
    if batch <= _gpu_rule.LARGEST_BITS_BATCH:
        found["bits"] = (kernels.bits_spmm(values, right, pattern.csr(False)), matrix, right)
    for name, (product, one, other) in found.items():
        one, other = one.double(), other.double().mT if name == "sddmm" else other.double()
        wanted, scale = one @ other, one.abs() @ other.abs()
        if name == "sddmm":
            wanted, scale = wanted[live], scale[live]
        wide = torch.promote_types(dtype, torch.float32)
        assert product.dtype is wide, (name, dtype)
        assert ((product.double() - wanted).abs() <= 8 * torch.finfo(wide).eps / 2 * scale).all(), (name, dtype, batch)
values, left = torch.randn(int(mask.sum())), torch.randn(5, 1)
matrix = torch.zeros(5, 70).masked_scatter_(live, values)
torch.testing.assert_close(kernels.rows_spmm(values, left, pattern.csr(True)), matrix.T @ left)
# What stands where nothing is connected reaches nothing, and an edit of the indices is seen.
right = torch.full((70, 1), torch.nan)
right[live[0]] = 1.0
assert kernels.rows_spmm(values, right, pattern.csr(False))[0].isfinite()
assert kernels.bits_spmm(values, right, pattern.csr(False))[0].isfinite()
before = kernels.bits_of(pattern.csr(False), 70)
assert kernels.bits_of(pattern.csr(False), 70) is before
pattern.indices.add_(0)
assert kernels.bits_of(pattern.csr(False), 70) is not before

for dtype in (torch.float32, torch.bfloat16):  # of which the interpreter's own products are wrong: widened before
    values, left, right = (torch.randn(s).to(dtype) for s in ((int(mask.sum()),), (5, 20), (70, 20)))
    matrix = torch.zeros(5, 70, dtype=torch.float64)
    matrix[live] = values.double()
    by_rows, near = pattern.csr(False), {"rtol": 0, "atol": 1e-5}
    multiply = "float32" if dtype is torch.float32 else "half"
    found = kernels.tiles_spmm(values, right, by_rows, 70, False, multiply, up=True)
    torch.testing.assert_close(found.double(), matrix @ right.double(), **near)
    found = kernels.tiles_spmm(values, left, by_rows, 70, True, multiply, up=True)
    torch.testing.assert_close(found.double(), matrix.T @ left.double(), **near)
    found = kernels.tiles_sddmm(left, right, by_rows, multiply, up=True)
    torch.testing.assert_close(found.double(), (left.double() @ right.double().T)[live], **near)

    # Panels of two rows, the last of one, and their transposes.
    whole, _gpu_products.has_triton = (_gpu_rule.PANEL_BYTES, _gpu_rule.LARGEST_PANEL), lambda tensor: True
    _gpu_rule.PANEL_BYTES = _gpu_rule.LARGEST_PANEL = 2 * 70 * 4
    wide = [side.float() for side in (values, left, right)]
    found = _gpu_products.spmm_in_panels(wide[0], wide[2], by_rows)
    torch.testing.assert_close(found.double(), matrix @ right.double(), **near)
    found = _gpu_products.spmm_in_panels(wide[0], wide[1], pattern.csr(True))
    torch.testing.assert_close(found.double(), matrix.T @ left.double(), **near)
    found = _gpu_products.sddmm_in_panels(wide[1], wide[2], by_rows)
    torch.testing.assert_close(found.double(), (left.double() @ right.double().T)[live], **near)
    _gpu_rule.PANEL_BYTES, _gpu_rule.LARGEST_PANEL = whole
    for first, last in ((0, 5), (1, 3)):  # of any type, as it is
        panel = torch.full((last - first, 70), torch.nan, dtype=dtype)
        kernels.unpack(values, by_rows, first, panel)
        assert torch.equal(panel, matrix[first:last].to(dtype))
        sampled = torch.zeros_like(values)
        kernels.sample(panel, by_rows, first, sampled)
        assert torch.equal(sampled, values * ((live.nonzero()[:, 0] >= first) & (live.nonzero()[:, 0] < last)))

# Long rows, and columns, which several programs share.
LONG = (
    (torch.float32, False, 1100, 4),
    (torch.float32, True, 1100, 4),
    (torch.bfloat16, False, 2200, 2),
    (torch.bfloat16, True, 1100, 2),
)
for dtype, transposed, length, programs in LONG:
    shape = (length, 40) if transposed else (40, length)
    some = masks.random(shape, sparsity=0.7, seed=1)
    by_rows = DevicePattern.of(SparsityPattern.from_mask(some), torch.device("cpu")).csr(False)
    values, right = torch.randn(int(some.sum())).to(dtype), torch.randn(length, 20).to(dtype)
    dense = torch.zeros(shape, dtype=torch.float64).masked_scatter_(torch.tensor(some), values.double())
    multiply = "float32" if dtype is torch.float32 else "half"
    sizes = Sizes(*shape, values.numel(), 20)
    launch = tiles.spmm(sizes, right.itemsize, multiply, transposed=transposed, checked=False)
    assert launch.grid[2] == programs, launch.grid
    found = kernels.tiles_spmm(values, right, by_rows, shape[1], transposed, multiply, up=True)
    torch.testing.assert_close(found.double(), (dense.T if transposed else dense) @ right.double(), rtol=0, atol=1e-4)

# Tiles of each width, of which the last one is not full; sides of each layout.
chosen = tiles.tiles_of
CUTS = (
    ("float32", 32, 41, 520),
    ("float32", 64, 64, 150),
    ("half", 16, 10, 300),
    ("half", 64, 90, 520),
    ("half", 128, 250, 150),
    ("tf32", 32, 40, 520),
    ("tf32", 256, 250, 150),
)
for multiply, wide, batch, length in CUTS:
    for transposed in (False, True):
        tiles.tiles_of = lambda product: _gpu_rule._cut(product, wide)
        shape = (length, 40) if transposed else (40, length)
        some, dtype = masks.random(shape, sparsity=0.7, seed=2), torch.bfloat16 if multiply == "half" else torch.float32
        by_rows = DevicePattern.of(SparsityPattern.from_mask(some), torch.device("cpu")).csr(False)
        values, right = torch.randn(int(some.sum())).to(dtype), torch.randn(length, batch).to(dtype)
        dense = torch.zeros(shape, dtype=torch.float64).masked_scatter_(torch.tensor(some), values.double())
        sizes = Sizes(*shape, values.numel(), batch)
        launch = tiles.spmm(sizes, right.itemsize, multiply, transposed=transposed, checked=True)
        assert launch.told["BN"] == wide and launch.grid[:2] == (1, -(-batch // wide))
        side = right.mT.contiguous().mT if wide == 32 else right  # which may lie as the kernel takes it, or not
        found = kernels.tiles_spmm(values, side, by_rows, shape[1], transposed, multiply, up=True)
        wanted = (dense.T if transposed else dense) @ right.double()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
        side[:, 1] = torch.nan  # beyond the end of one line of x lies the next
        found = kernels.tiles_spmm(values, side, by_rows, shape[1], transposed, multiply, up=True)
        assert found[:, 1].isnan().all() and found[:, [0, *range(2, batch)]].isfinite().all(), (multiply, wide)
tiles.tiles_of = chosen

# Sampled tiles, of neither of whose sizes there is a multiple.
for multiply, depth in ("tf32", 380), ("half", 120), ("float32", 190):
    some, dtype = masks.random((150, depth), sparsity=0.7, seed=3), torch.bfloat16 if multiply == "half" else torch.float32
    by_rows = DevicePattern.of(SparsityPattern.from_mask(some), torch.device("cpu")).csr(False)
    left, right = torch.randn(150, 20).to(dtype), torch.randn(depth, 20).to(dtype)
    found = kernels.tiles_sddmm(left, right, by_rows, multiply, up=True)
    wanted = (left.double() @ right.double().T)[torch.tensor(some)]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)

# Sampled panels of a row that is longer than what a program takes at once, beside empty ones, of so few connections that the
# pattern has no bits.
some = torch.zeros(9, 6000, dtype=torch.bool)
some[4, ::15], some[7, 5] = True, True
few = DevicePattern.of(SparsityPattern.from_mask(some.numpy()), torch.device("cpu")).csr(False)
panel, sampled = torch.randn(9, 6000), torch.zeros(int(some.sum()))
assert kernels.sample(panel, few, 0, sampled) is None and torch.equal(sampled, panel[some])
assert len(sampled) // 9 < 128 < int(some[4].sum()) and not _gpu_rule.has_bits(9, 6000, len(sampled))
kept, called = kernels.sample, []
kernels.sample = lambda *given: called.append(given[2]) or kept(*given)
_gpu_rule.PANEL_BYTES = _gpu_rule.LARGEST_PANEL = 2 * 6000 * 4
left, right = torch.randn(9, 3), torch.randn(6000, 3)
found = _gpu_products.sddmm_in_panels(left, right, few)
torch.testing.assert_close(found, (left @ right.T)[some])
assert called == [0, 2, 4, 6, 8], called
kernels.sample, (_gpu_rule.PANEL_BYTES, _gpu_rule.LARGEST_PANEL) = kept, whole

# The way from the function to the kernels, as on CUDA.
_products._is_on_gpu = _gpu_products.has_triton = lambda tensor: True
whole = SparsityPattern.from_mask(mask)
tiled, sides = kernels.tiles_spmm, []
kernels.tiles_spmm = lambda values, right, *rest: sides.append(right) or tiled(values, right, *rest)
for wanted in ("rows", "bits", "tiles", "panels"):
    chosen = []
    _gpu_rule.choose = lambda ways, product: chosen.append(wanted if wanted in ways else "rows") or chosen[-1]
    values = torch.randn(whole.nnz, requires_grad=True)
    x = torch.randn(3, 70, requires_grad=True)
    dense = torch.zeros(5, 70).index_put(tuple(live.nonzero().T), values)
    y, expected = sparse_linear(x, values, whole), x @ dense.T
    torch.testing.assert_close(y, expected)
    for one, other in zip(*(torch.autograd.grad(z.square().sum(), (x, values)) for z in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len(chosen) == 5 and wanted in chosen, chosen  # of the two right sides of W x and its transpose once more
    # Tiles read x and g as a layer has them: neither is copied.
    assert all(side.mT.is_contiguous() for side in sides)
    assert len(sides) == 2 * (wanted == "tiles")
    sides.clear()
"""


def test_interpreted_they_are_the_spec(tmp_path: Path) -> None:
    python(INTERPRETED, tmp_path, TRITON_INTERPRET="1", MASKEDLINEAR_KERNELS="0")


COMPILED = """
import json, re, subprocess
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource
from maskedlinear import _gpu_rule
from maskedlinear import _triton_rows as kernels
from maskedlinear import _triton_tiles as tiles

TYPES = dict.fromkeys(("starts", "across", "order", "bits", "firsts"), "*i32")
TYPES |= dict.fromkeys(("product", "sampled"), "*fp32")
TYPES |= dict.fromkeys(("batch", "splits", "rows", "depth", "words", "nnz", "part"), "i32")
MULTIPLY = {"fp32": "float32", "fp64": "float64"}

def in_longest_loop(kernel):
    "Count the instructions between the two ends of the jump back that goes furthest, and all others."
    disassembler = Path(compiler.get_ptxas(90).path).with_name("nvdisasm")
    code = subprocess.run([disassembler, "-c", kernel], capture_output=True, text=True, check=True).stdout
    count, labels, longest = 0, {}, 0
    for line in code.splitlines():
        if found := re.match(r"(\\.L_x_\\d+):", line):
            labels[found[1]] = count
        elif re.match(r"\\s+/\\*[0-9a-f]{4,}\\*/", line):
            count += 1
            if found := re.search(r"BRA.*`\\((\\.L_x_\\d+)\\)", line):
                longest = max(longest, count - labels.get(found[1], count))
    return longest, count - longest

def order_of(ptx):
    "Return, a letter each, what the loop that has tensor cores does, one after the other; R: they read registers."
    kinds = {"st.shared": "S", "stmatrix": "S", "cp.async.c[ag]": "A", "cp.async.wait": "w", "fence.proxy.async": "F"}
    kinds |= {"bar.sync": "B", "wgmma.commit": "C", "wgmma.wait": "W", "wgmma.mma_async": "M"}
    bodies = re.split(r"^(\\$L__BB\\d+_\\d+):|bra[ \\t]+(\\$L__BB\\d+_\\d+)", ptx, flags=re.MULTILINE)
    looped = [body for body in bodies if body and "wgmma.mma_async" in body]
    letters = []
    for line in (looped[0] if looped else "").splitlines():
        for pattern, letter in kinds.items():
            if re.search(pattern, line):
                # A is a list of registers, or a descriptor, before that of B.
                of_registers = letter == "M" and line.count("{") > 1
                letters.append("R" if of_registers else letter)
    return "".join(letters) + "," * (len(looped) - 1)

def compiled(kernel, dtype, constants, expected=0, places=1, outside=0, batch=1, uneven=None, beside=None):
    # Tell what a kernel takes, whose loop, in a program, has so many instructions for each of so many places; a sampled one
    # for each place and row of x, and, outside of it, so many for each place.
    constants = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "UP": False, "CHECKED": True} | constants
    constants |= {"UNIT": 1 if uneven == "batch" else 16, "ALONG_UNIT": 1 if uneven in ("depth", "rows") else 16}
    told = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    types = TYPES | dict.fromkeys(("values", "left", "right", "x", "panel"), "*" + dtype)
    if dtype == "fp64":
        types |= dict.fromkeys(("product", "sampled"), "*fp64")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind[0] == "*"]
    made = triton.compile(
        ASTSource(
            kernel, signature, {k: v for k, v in constants.items() if k in kernel.arg_names},
            {(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", 90, 32), options=told,
    )
    Path("kernel.ptx").write_text(made.asm["ptx"])
    ptxas = compiler.get_ptxas(90).path
    said = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", "kernel.ptx", "-o", "kernel"], capture_output=True, text=True)
    products = made.asm["ptx"].count("wgmma.mma_async") + made.asm["ptx"].count("mma.sync")
    threads = told["num_warps"] * 32
    batch_of_bits = constants["BB"] if kernel is kernels.bits_spmm_kernel else 0
    tale = [kernel.__name__, batch_of_bits, threads, products, dtype, constants.get("PRECISION")]
    tale += [beside, order_of(made.asm["ptx"]), made.metadata.shared, said.returncode, said.stderr]
    looped, others = (count / (places / threads) for count in in_longest_loop("kernel"))
    issued = [[looped / batch, expected]] * bool(expected) + [[others, outside]] * bool(outside)
    print(json.dumps([*tale, issued]))

BATCHES = ("bf16", 1), ("fp32", 512), ("fp32", 16), ("fp64", 16), ("fp32", 4), ("bf16", 2), ("bf16", 4), ("fp32", 8)
for dtype, batch in BATCHES[: 8 if EVERY else 2]:
    sizes = kernels.Sizes(4096, 4096, 1 << 20, batch)
    rows = kernels.rows_options(sizes, sampled=False)
    compiled(kernels.rows_spmm_kernel, dtype, {"ORDERED": batch > 16} | rows)
    compiled(kernels.rows_sddmm_kernel, dtype, kernels.rows_options(sizes, sampled=True))
    if batch <= _gpu_rule.LARGEST_BITS_BATCH:
        sizes = kernels.bits_options(batch, 8 if dtype == "fp64" else 4)
        expected = _gpu_rule.instructions("bits", MULTIPLY.get(dtype, "half"), batch)
        compiled(kernels.bits_spmm_kernel, dtype, sizes, expected, sizes["BM"] * sizes["BW"] * 32)
form = kernels.form_bits(4096, 8192, 1 << 22, checked=True).told
form = {name: form[name] for name in ("BW", "AT_ONCE", "num_warps")}
compiled(kernels.form_bits_kernel, "fp32", form, _gpu_rule.ROUND, form["BW"])
for dtype in ("bf16", "fp32", "fp64")[: 3 if EVERY else 1]:
    told = kernels.PANEL_OPTIONS | {"CHECKED": False}
    issued = _gpu_rule.instructions("panel", MULTIPLY.get(dtype, "half"))
    compiled(kernels.panel_kernel, dtype, told, 0, told["BM"] * told["BW"] * 32, issued, beside=9)
for dtype, each in (("fp32", 4096), ("fp64", 64))[: 1 + EVERY]:
    told = kernels.sample(4096, 8192, each).told
    compiled(kernels.sample_kernel, dtype, {name: told[name] for name in ("BK", "num_warps")})
for dtype, itemsize, multiply in (("bf16", 2, "half"), ("fp32", 4, "float32"), ("fp32", 4, "tf32")):
    precision = {"PRECISION": "tf32" if multiply == "tf32" else "ieee"}
    for transposed in (False, True):
        widths = _gpu_rule._TILES[multiply, transposed]
        # Where sides are read a number at a time, too; half types' transposed by the batch.
        uneven = "depth" if not transposed else "rows" if multiply == "tf32" else "batch"
        for wide in widths if EVERY else ([32, 256] if multiply == "half" else [64])[: 2 - transposed]:
            for odd in (None, uneven)[: 1 + EVERY]:
                product = _gpu_rule.Product(8192, 8192, 1 << 22, 512, itemsize, multiply, transposed=transposed)
                if odd and multiply == "half" and wide == 256:
                    continue
                sizes = tiles.spmm_options(_gpu_rule._cut(product, wide), multiply, transposed)
                expected = widths[wide].instructions
                expected = 0 if odd else expected + (multiply == "float32") * wide
                told = sizes | {"TRANSPOSED": transposed} | precision
                beside = None if odd else widths[wide].beside
                compiled(
                    tiles.tiles_spmm_kernel, dtype, told, expected, sizes["BM"] * sizes["BW"] * 32, uneven=odd, beside=beside
                )
    sizes = tiles.sddmm_options(itemsize, multiply)
    loop = (_gpu_rule._LOADED, sizes["BM"] * 128, _gpu_rule.instructions("sampled", multiply), sizes["BK"])
    compiled(
        tiles.tiles_sddmm_kernel, dtype, sizes | precision, *(loop if multiply == "float32" else (0, *loop[1:])), beside=2
    )
"""

# Registers of a thread and bytes of a program, at most, of sizes that are multiples of 16: five programs by rows, three by
# bits and two of float64 fit a multiprocessor; by tiles as many as the rule says.
LIMITS = {
    "rows": (96, 8 << 10),
    "bits": (168, 8 << 10),
    "form": (48, 4 << 10),
    "tiles": (255, 160 << 10),
    "panel": (64, 8 << 10),
    "sample": (40, 0),
}
FLOAT64 = 208
BITS = {1: 64, 2: 96, 4: 128}  # by batch: eight, five and four programs by bits


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_for_an_h100_they_spill_nothing_and_are_as_short_as_the_rule_says(tmp_path: Path, every: bool) -> None:
    lines = python(f"import os\nos.chdir({str(tmp_path)!r})\nEVERY = {every}\n{COMPILED}", tmp_path).splitlines()
    assert len(lines) == (29 + 53 if every else 8 + 10)
    for line in lines:
        name, batch, threads, products, dtype, precision, beside, order, shared, status, said, issued = json.loads(line)
        assert status == 0, said
        registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        assert spilled is not None
        assert spilled.groups() == ("0", "0"), (name, dtype, said)
        kind = name.partition("_")[0]
        most = LIMITS[kind]
        allowed = FLOAT64 if dtype == "fp64" else BITS.get(batch, most[0])
        assert registers <= allowed, (name, dtype, batch, registers)
        doubled = kind == "panel" and dtype == "fp64"  # a panel's numbers change threads there before they are written
        assert shared <= most[1] << doubled, (name, dtype, shared)
        by_tensor_cores = kind == "tiles" and (dtype == "bf16" or precision == "tf32")
        assert bool(products) == by_tensor_cores, (name, dtype, precision)
        sampled = name == "tiles_sddmm_kernel"
        if by_tensor_cores:
            assert "serialized" not in said, (name, dtype, said)  # ptxas would let no product go on
        if by_tensor_cores and not sampled:
            # What is written to shared memory is fenced, and all wait, before tensor cores read it; they read nothing from
            # registers, and there is one product a step.
            assert re.fullmatch(r"[SAwFB]*FBM+CW[SAwFB]*", order), (name, dtype, order)
        if beside:  # so many programs fit a multiprocessor, with registers by the eight
            assert beside * threads * -(-registers // 8) * 8 <= 1 << 16, (name, dtype, precision, registers, beside)
            assert beside * shared <= 227 << 10, (name, dtype, shared)
        counted = {
            "tiles_sddmm_kernel": 2 - by_tensor_cores,
            "tiles_spmm_kernel": int(beside is not None),  # none where sides are read a number at a time
            "bits_spmm_kernel": 1,
            "form_bits_kernel": 1,
            "panel_kernel": 1,
        }
        assert len(issued) == counted.get(name, 0)
        for found, expected in issued:
            assert found <= 1.03 * expected, (name, dtype, precision, found, expected)


OF_SIZES = """
from maskedlinear import _triton_rows as rows, _triton_tiles as tiles
from maskedlinear._gpu_rule import unit_of
from maskedlinear._triton_rows import Sizes

ALL = [Sizes(out * 16, in_ * 16, out * in_ * each, batch * 16)
       for out, in_, each, batch in ((48, 192, 26, 8), (192, 48, 25, 8), (64, 64, 20, 9), (300, 501, 23, 15))]

def launches(sizes):
    yield rows.rows_spmm(sizes, 4, ordered=True, checked=True)
    yield rows.rows_sddmm(sizes, 4, checked=True)
    yield rows.bits_spmm(sizes._replace(batch=16), 4, checked=True)
    yield rows.panel(sizes.rows, sizes.depth, sizes.nnz)
    for multiply in ("tf32", "float32"):
        for transposed in (False, True):
            yield tiles.spmm(sizes._replace(batch=256), 4, multiply, transposed=transposed, checked=True)
        yield tiles.sddmm(sizes, 4, multiply, checked=True)

made = [list(launches(sizes)) for sizes in ALL]
for one in zip(*made, strict=True):
    cut = ("BM", "BN", "BW", "num_warps", "num_stages") if one[0].kernel is tiles.tiles_spmm_kernel else ()  # by the rule
    told = [{name: constant for name, constant in launch.told.items() if name not in cut} for launch in one]
    assert all(constants == told[0] for constants in told), told
    assert len({str(launch.told) for launch in one}) <= 3
    assert len({tuple(launch.sizes.values()) for launch in one}) == len(ALL)
# Arguments are pointers, sizes in their order, results; and then constants.
others = [rows.form_bits(70, 33, 5, checked=True), rows.sample(70, 33, 5)]
for launch in [*made[0], *others]:
    given = [name for name in launch.kernel.arg_names if name not in launch.told]
    first = given.index(next(iter(launch.sizes)))
    assert given[first : first + len(launch.sizes)] == list(launch.sizes), given
    into = given[first + len(launch.sizes) :]
    assert into == ["bits", "firsts"] if launch is others[0] else len(into) == 1
    assert all(type(size) is int for size in launch.sizes.values())
    unspecialized = [one.name for one in launch.kernel.params if one.do_not_specialize]
    assert unspecialized == list(launch.sizes), (launch.kernel, unspecialized)
    constants = set(launch.kernel.arg_names) - set(given)
    assert list(launch.kernel.arg_names[len(given) :]) == [name for name in launch.kernel.arg_names if name in constants]
# What is said to be a multiple is one, of 16 at most: the stride of what is read along the batch, or the length.
for size, itemsize in ((size, itemsize) for size in range(1, 70) for itemsize in (2, 4, 8)):
    assert unit_of(size) == max(of for of in (1, 2, 4, 8, 16) if size % of == 0)
    for one in (Sizes(size, 64, 5, 64), Sizes(64, size, 5, 64), Sizes(64, 64, 5, size)):
        for transposed in (False, True) if itemsize < 8 else ():
            multiply = "half" if itemsize == 2 else "tf32"
            told = tiles.spmm(one, itemsize, multiply, transposed=transposed, checked=True).told
            assert told["UNIT"] == unit_of(one.batch)
            assert told["ALONG_UNIT"] == unit_of(one.rows if transposed else one.depth)
            assert tiles.sddmm(one, itemsize, multiply, checked=True).told["UNIT"] == told["UNIT"]
        both = (rows.rows_spmm(one, itemsize, ordered=False, checked=True), rows.rows_sddmm(one, itemsize, checked=True))
        for launch in both:
            assert launch.told["UNIT"] == unit_of(one.batch)
        for launch in (rows.bits_spmm(one._replace(batch=2), itemsize, checked=True), rows.panel(*one[:3])):
            assert launch.told["UNIT"] == unit_of(one.depth)
"""


def test_no_kernel_is_compiled_anew_for_another_size(tmp_path: Path) -> None:
    python(OF_SIZES, tmp_path)
