"""Claims: a checkpoint takes the bytes of its live values and the entropy of its mask, and as long as NumPy for a matrix.

A random mask of 4096 x 4096 float32 weights: at most 1.02 of that bound at 1 %, and 1.02 and a KiB at 0.1, 10 and 50 %. A
structured mask: at most 1.00 of the bound of a random one of its density. A mask from a recipe: 200 bytes. bfloat16 at 10 %,
pruned by magnitude, through pcodec: 14 bits a live weight. To save arrays, and to load them, at 1 and at 10 %: each at most
twice numpy.save or numpy.load of the dense matrix. Times are those of the process on a processor, so that neither waits for
the disk (numpy.save does not wait, a checkpoint is flushed). NumPy's call and ours take turns, and each of ours is compared
with NumPy's of the same turn. What NumPy takes for the parts that no way of saving and loading can do without comes last.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks
from maskedlinear.checkpoint import CheckpointFile, MaskedArray
from maskedlinear.checkpoint._arrays import mask_digest
from maskedlinear.checkpoint._file import save_arrays
from maskedlinear.checkpoint._masks import encode

ROUNDS = 15
WIDTH = 4096


def entropy(array: MaskedArray) -> float:
    """Return the bytes of information in a random mask with as many live entries."""
    p = array.nnz / array.size
    return float(array.size * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8)


def saved(array: MaskedArray, path: Path, **more: Any) -> int:
    """Save an array, check it, and return the file's size in bytes."""
    save_arrays({"weight": array}, path, **more)
    with CheckpointFile(path) as file:
        file.verify()
    return path.stat().st_size


def normal(mask: NDArray[np.bool_]) -> MaskedArray:
    """Return normal values under a mask."""
    return MaskedArray.of(np.random.default_rng(0).standard_normal(mask.shape, np.float32), mask)


def pathways() -> NDArray[np.bool_]:
    """Return connections as those from genes to pathways of Reactome are: of very unequal numbers a node."""
    rng, mask = np.random.default_rng(0), np.zeros((1177, 10994), np.bool_)
    ends = [rng.choice(n, 12_000, p=(w := rng.pareto(1.0, n) + 0.05) / w.sum()) for n in mask.shape]
    mask[ends[0], ends[1]] = True
    return mask


STRUCTURED: dict[str, Callable[[], NDArray[np.bool_]]] = {
    "blocks 16 x 16, 10 %": lambda: masks.blocks((1024, 1024), (16, 16), sparsity=0.9),
    "rows, 10 %": lambda: np.repeat(masks.random((1024, 1), sparsity=0.9), 1024, axis=1),
    "columns, 10 %": lambda: np.repeat(masks.random((1, 1024), sparsity=0.9), 1024, axis=0),
    "receptive fields 5 x 5": lambda: masks.receptive_field((28, 28), 5, channels=(1, 4)),
    "2:4": lambda: masks.n_of_m((1024, 1024), 2, 4),
    "pathways": pathways,
    "fan-in 41 of 4096": lambda: masks.constant_fan_in((1024, 4096), 41),
}


def sizes(path: Path) -> None:
    """Print the sizes of files, and their ratios to the bounds."""
    for percent in (0.1, 1, 10, 50):
        array = normal(masks.random((WIDTH, WIDTH), sparsity=round(1 - percent / 100, 3)))
        show(f"random, {percent} %", saved(array, path), array.values.nbytes + entropy(array))
    for name, make in STRUCTURED.items():
        array = normal(make())
        show(name, saved(array, path), array.values.nbytes + entropy(array))
    recipe = masks.Recipe("random", sparsity=0.99, seed=1)
    array = MaskedArray.of(np.zeros((WIDTH, WIDTH), np.float32), recipe.make((WIDTH, WIDTH)), recipe=recipe)
    full = MaskedArray.of(array.values[None], np.ones((1, array.nnz), np.bool_))
    print(f"a mask from a recipe: {saved(array, path) - saved(full, path)} bytes more than its values", flush=True)
    try:
        import ml_dtypes
        import pcodec  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"bfloat16 through pcodec: not measured, {error.name} is not installed")
        return
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    array = MaskedArray.of(weight.astype(ml_dtypes.bfloat16), np.abs(weight) > np.quantile(np.abs(weight), 0.9))
    bits = 8 * saved(array, path, values="pcodec") / array.nnz
    print(f"bfloat16 at 10 %, pruned by magnitude, through pcodec: {bits:.2f} bits a live weight", flush=True)


def show(name: str, size: int, bound: float) -> None:
    """Print one size."""
    print(f"{name:24} {size:10} bytes, {size / bound:.4f} of the bound ({size - bound:+.0f} bytes)", flush=True)


def times(path: Path) -> None:
    """Print the times of saving and loading, their ratios to NumPy's of the dense matrix, and those of the parts."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    dense = path.with_suffix(".npy")
    np.save(dense, weight)

    def load(*, whole: bool, mmap: bool = False) -> Any:
        with CheckpointFile(path, mmap=mmap) as file:
            return file["weight"] if whole else file.array("weight")

    for percent in (1, 10):
        mask = masks.random((WIDTH, WIDTH), sparsity=1 - percent / 100)
        array = MaskedArray.of(weight, mask)
        save_arrays({"weight": array}, path)
        compare(
            f"at {percent} %",
            ("numpy.save", lambda: np.save(dense, weight)),
            {
                "save arrays": lambda array=array: save_arrays({"weight": replace(array)}, path),
                "save, from dense": lambda mask=mask: save_arrays({"weight": MaskedArray.of(weight, mask)}, path),
            },
        )
        compare(
            f"at {percent} %",
            ("numpy.load", lambda: np.load(dense)),
            {
                "load arrays": lambda: load(whole=False),
                "load arrays, mapped": lambda: load(whole=False, mmap=True),
                "load, to dense": lambda: load(whole=True),
                "load, to dense, mapped": lambda: load(whole=True, mmap=True),
            },
        )
        flat, places, values = weight.reshape(-1), array.places, array.values
        floors = {
            "places of a mask": lambda mask=mask: np.flatnonzero(mask),
            "values at places": lambda flat=flat, places=places: flat[places],
            "SHA-256 of places": lambda places=places: mask_digest((WIDTH, WIDTH), places),
            "CRC-32 of values": lambda values=values: zlib.crc32(values.data),
            "places, coded": lambda array=array: encode(array),
            "to dense": lambda array=array: array.raw(),
        }
        for name, call in floors.items():
            print(f"{name:22} at {percent} %: {1000 * float(np.median([took(call) for _ in range(ROUNDS)])):7.1f} ms")


def compare(case: str, base: tuple[str, Callable[[], Any]], calls: dict[str, Callable[[], Any]]) -> None:
    """Print the times of calls, and their ratios to those of a call of NumPy's, with which they take turns."""
    other, reference = base
    found: dict[str, list[float]] = {name: [] for name in (other, *calls)}
    for _ in range(ROUNDS):
        for name, call in ((other, reference), *calls.items()):
            found[name].append(took(call))
    for name in calls:
        ratios = np.array(found[name]) / found[other]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(
            f"{name:22} {case}: {1000 * np.median(found[name]):7.1f} ms, {middle:.2f} ({low:.2f} to {high:.2f}) of "
            f"{other}'s {1000 * np.median(found[other]):.1f} ms",
            flush=True,
        )


def took(call: Callable[[], Any]) -> float:
    """Return the time of a call, in seconds of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        times(Path(folder) / "model.safetensors")
        sizes(Path(folder) / "model.safetensors")
