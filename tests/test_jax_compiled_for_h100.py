"""What XLA makes of the sparse products for an H100, which need not be there: kernels, loops, and memory beside results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT
from maskedlinear import _gpu_rule

CUDA = Path(sys.prefix) / "cuda"
pytestmark = [
    pytest.mark.skipif(not (CUDA / "jax_plugins").exists(), reason="needs XLA's compiler for CUDA: see Makefile"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs ptxas, which Triton brings along"),
]

PROGRAM = r"""
import json, os, re, subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from maskedlinear import _gpu_rule
from maskedlinear_jax import _gpu_products, _triton_products
from maskedlinear_jax._products import DevicePattern
from maskedlinear_jax._sparse import product

# Of NVIDIA's data sheet, and of what its driver says of such a device.
H100 = '''
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
'''
device = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices[0]

def like(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

def pattern(out, in_, nnz, keeps_bits):
    bits = ((out, -(-in_ // 32)),) * 2 if keeps_bits else ()
    return DevicePattern(*(like(jnp.int32, *np.atleast_1d(of)) for of in (out + 1, nnz, nnz, in_ + 1, nnz, nnz, *bits)))

def instructions(folder):
    "Those of the kernel that counts bits, for each place of W: of each of those it counts once."
    kernels = [file for file in Path(folder).glob("*.ptx") if "popc" in file.read_text()]
    found = []
    for file in kernels:
        subprocess.run(["ptxas", "--gpu-name=sm_90a", file, "-o", "kernel"], check=True)
        text = subprocess.run(["nvdisasm", "-c", "kernel"], capture_output=True, text=True, check=True).stdout
        issued = re.findall(r"/\*[0-9a-f]{4}\*/ +(?:@!?\w+ +)?(\w+)", text.partition("EXIT")[0])
        found.append(len(issued) / issued.count("POPC"))
        file.unlink()
    return found

def step(x, values, pattern, g):
    return jax.vjp(lambda x, values: product(x, values, pattern, x.shape[1], None), x, values)[1](g)

choose, by_rule = _gpu_rule.choose, _gpu_rule.panels_by_bits
KERNELS = "rows", "bits", "tiles"
for out, in_, nnz, batch, dtype, way, what in json.loads(sys.argv[1]):
    keeps_bits = bool(way) and way.startswith("kept ")
    way = way.removeprefix("kept ") if way else way
    _gpu_rule.choose = (lambda ways, product: way if way in ways else "rows") if way else choose
    by_bits = lambda product: product._replace(place_bytes=0, by_xla=True)
    _gpu_rule.panels_by_bits = by_bits if way == "panels" and keeps_bits else by_rule
    _triton_products._capability = lambda: 90 * (way in KERNELS)
    number, indices = (lambda *shape: like(jnp.dtype(dtype), *shape)), pattern(out, in_, nnz, keeps_bits)
    x, g, values = (batch, in_), (batch, out), number(nnz)
    function, arguments = {
        "W x": (lambda v, x, p: _gpu_products.spmm(v, x, p, transposed=False), (values, number(*x[::-1]), indices)),
        "Wᵀ g": (lambda v, g, p: _gpu_products.spmm(v, g, p, transposed=True), (values, number(*g[::-1]), indices)),
        "g xᵀ": (_gpu_products.sddmm, (number(*g[::-1]), number(*x[::-1]), indices)),
        "forward": (lambda x, v, p: product(x, v, p, x.shape[1], None), (number(*x), values, indices)),
        "step": (step, (number(*x), values, indices, number(*g))),
    }[what]
    made = jax.jit(lambda *given: function(*given)).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    text = made.as_text()
    entry, side = text[text.index("ENTRY"):], out if what == "Wᵀ g" else in_
    print(json.dumps({
        "kernels": len(re.findall(r" (?:fusion|custom-call|copy)\(", entry)),
        "calls": entry.count('custom_call_target="triton_kernel_call"'),
        "scatters": len(re.findall(r" scatter\(", text)),
        "loops": text.count(" while("),
        "memory": made.memory_analysis().temp_size_in_bytes,
        "issued": instructions("dump") if keeps_bits else [],
        "widened": [size for size in (f"{nnz}", f"{side},{batch}", f"{batch},{side}") if f"f32[{size}]" in text],
    }), flush=True)
"""


def compiled(*cases: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Return what is made of each: out, in, connections, batch, dtype, which way is gone or ``None``, and what is formed."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    here = os.pathsep.join(map(str, (CUDA, ROOT, ROOT / "backends")))
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        flags = "--xla_gpu_autotune_level=0"
        if any(str(case[5]).startswith("kept") for case in cases):
            flags += f" --xla_dump_to={folder}/dump"
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(cases)],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": here, "PATH": path},
            cwd=folder,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(cases)
    return found


BOTH = ("float32", "bfloat16")
PRODUCTS = ("W x", "Wᵀ g", "g xᵀ")
PANEL = 32 << 20


def test_gathered_each_is_one_kernel_without_memory_of_its_own() -> None:
    sizes = ((4096, 4096, 170_000, 4096), (2233, 11876, 46_939, 128), (8192, 8192, 1_000_000, 1))
    cases = [(*size, dtype, "gathered", what) for size in sizes for dtype in BOTH for what in PRODUCTS]
    for case, found in zip(cases, compiled(*cases), strict=True):
        *_, nnz, _, dtype, _, what = case
        assert found["loops"] == 0, case
        # One more writes zeros, to which is added; and one brings values into the order of columns.
        assert found["kernels"] <= {"W x": 2, "Wᵀ g": 3, "g xᵀ": 1}[what], (case, found)
        values = nnz * (4 if dtype == "float32" else 2)
        assert found["memory"] <= (values + 1024 if what == "Wᵀ g" else 0), (case, found)


def test_a_panel_is_unpacked_multiplied_and_no_more() -> None:
    cases = [(1024, 2048, 209_715, 256, dtype, "panels", what) for dtype in BOTH for what in PRODUCTS]
    for case, found in zip(cases, compiled(*cases), strict=True):
        assert found["loops"] == 0
        # Zeros, the values, the product, and the sum of its parts; or the product, and what is sampled of it.
        assert found["kernels"] <= (2 if case[-1] == "g xᵀ" else 4), (case, found)
        assert found["memory"] <= 16 << 20, (case, found)
        if case[4] == "bfloat16" and case[-1] != "g xᵀ":
            assert found["widened"] == [], case


@pytest.mark.parametrize("size", [4096, 16384])  # two panels in the program, and 32 in a loop
def test_one_panel_is_there_at_a_time(size: int) -> None:
    cases = [(size, size, size**2 // 10, 64, "float32", "panels", what) for what in PRODUCTS]
    for case, found in zip(cases, compiled(*cases), strict=True):
        assert found["loops"] == (0 if size == 4096 else 2), (case, found)
        window = int(1.5 * size**2 / 10 / 32) * 4 if size > 4096 else 0  # of connections that are looked at together
        products = 3 * 64 * size * 4
        parts = 16 * 64 * size if case[-1] != "g xᵀ" else 0
        assert found["memory"] <= PANEL + window + products + parts, (case, found)


@pytest.mark.parametrize("depth", [2048, 3072])  # others XLA may fill up, to split the product: 26 to 40 instructions
def test_a_panel_by_bits_is_one_kernel_and_no_longer_than_the_rule_says(depth: int) -> None:
    # In the program, and in a loop over panels, whose first rows a kernel must work out.
    sizes = ((1024, depth, 256), (32768, 8 * depth, 64))
    for dtype in BOTH:
        cases = [
            (out, in_, out * in_ // 2, batch, dtype, "kept panels", what)
            for out, in_, batch in sizes
            for what in PRODUCTS
        ]
        for case, found in zip(cases, compiled(*cases), strict=True):
            sampled = case[-1] == "g xᵀ"
            expected = _gpu_rule.instructions("sampled by XLA" if sampled else "panel by XLA", "tf32")
            assert found["issued"], case
            assert max(found["issued"]) <= expected, (case, found)
            assert found["scatters"] == sampled, case
            # A panel, the product, the sum of its parts, and x filled up to whole words; or, beside a loop, zeros.
            assert found["kernels"] <= 4, (case, found)


def test_a_column_or_two_are_multiplied_in_one_kernel() -> None:
    sizes = ((1024, 2048), (8192, 8192), (4096, 11008))
    cases = [
        (out, in_, out * in_ // 2, batch, dtype, "kept reduced", "W x")
        for out, in_ in sizes
        for batch in (1, 2)
        for dtype in BOTH
    ]
    for case, found in zip(cases, compiled(*cases), strict=True):
        out, _, _, batch, dtype, *_ = case
        expected = _gpu_rule.instructions("reduced", "half" if dtype == "bfloat16" else "tf32", batch)
        assert len(found["issued"]) == 1, case
        assert found["issued"][0] <= expected, (case, found)
        # One more counts to 32, and one brings two columns together.
        assert found["kernels"] <= 1 + batch, (case, found)
        assert found["memory"] <= 8 * out + 256, (case, found)


def test_a_product_as_large_as_w_adds_up_panels_of_128_mebibytes() -> None:
    cases = [(8192, 8192, 8192**2 // 10, 16384, dtype, "panels", "Wᵀ g") for dtype in BOTH]
    for case, found in zip(cases, compiled(*cases), strict=True):
        panel = 4 * PANEL
        parts = 16384 * 8192 * 4 + (1 << 20)  # of the product, which is added
        assert found["memory"] <= panel + parts, (case, found)


def test_a_step_is_three_products() -> None:
    cases = [(2048, 2048, 419_430, 256, dtype, None, what) for dtype in BOTH for what in ("forward", "step")]
    for case, found in zip(cases, compiled(*cases), strict=True):
        assert found["loops"] == 0
        assert found["kernels"] <= (4 if case[-1] == "forward" else 7), (case, found)


@pytest.mark.parametrize("dtype", BOTH)
def test_kernels_in_triton_are_called_and_bits_formed_once(dtype: str) -> None:
    kinds = ("rows", "tiles", "bits", "kept tiles", "kept bits")
    ways = [(way, batch) for way in kinds for batch in (1, 16, 256) if not way.endswith("bits") or batch <= 16]
    cases = [(1024, 2048, 209_715, batch, dtype, way, what) for way, batch in ways for what in ("forward", "step")]
    for case, found in zip(cases, compiled(*cases), strict=True):
        *_, way, what = case
        # Bits are formed once, unless they are kept, and read by all products; y is not asked for in a step.
        unpacked = way == "tiles" or (way == "bits" and what == "forward")
        assert found["calls"] == (1 if what == "forward" else 2) + unpacked, (case, found)
        assert found["scatters"] == 0, (case, found)
        assert found["loops"] == 0
        assert found["kernels"] <= found["calls"] + 4, (case, found)
        words = 1024 * 2048 // 32 * 4
        assert found["memory"] <= 2 * words * unpacked + 4 * 4 * (209_715 + 256 * 3072), (case, found)
