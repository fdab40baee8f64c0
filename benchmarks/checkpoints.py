"""Claims: a checkpoint takes the bytes of its live values and the entropy of its mask, and as long as NumPy for a matrix.

A random mask of 4096 x 4096 float32 weights: at most 1.02 of that bound at 1 %, and 1.02 and a KiB at 0.1, 10 and 50 %. A
structured mask: at most 1.00 of the bound of a random one of its density. A mask from a recipe: 200 bytes. bfloat16 at 10 %,
pruned by magnitude, through pcodec: 14 bits a live weight. To save arrays, and to load them, at 1 and at 10 %: each at most
twice numpy.save or numpy.load of the dense matrix; times are those of the process on a processor, the least of several.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskedlinear import masks
from maskedlinear.checkpoint import CheckpointFile, MaskedArray
from maskedlinear.checkpoint._file import save_arrays

ROUNDS = 7
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
    """Print the times of saving and loading, and their ratios to NumPy's of the dense matrix."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    dense = path.with_suffix(".npy")

    def load(whole: bool) -> None:
        with CheckpointFile(path) as file:
            if whole:
                file["weight"]
            else:
                file.array("weight")

    base = least(lambda: np.save(dense, weight)), least(lambda: np.load(dense))
    for percent in (1, 10):
        mask = masks.random((WIDTH, WIDTH), sparsity=1 - percent / 100)
        array = MaskedArray.of(weight, mask)
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "save arrays": (lambda array=array: save_arrays({"weight": array}, path), base[0]),
            "save, from dense": (
                lambda mask=mask: save_arrays({"weight": MaskedArray.of(weight, mask)}, path),
                base[0],
            ),
            "load arrays": (lambda: load(whole=False), base[1]),
            "load, to dense": (lambda: load(whole=True), base[1]),
        }
        for name, (call, other) in calls.items():
            took = least(call)
            print(
                f"{name:16} at {percent:2} %: {took:7.1f} ms, {took / other:.2f} of NumPy's {other:.1f} ms", flush=True
            )


def least(call: Callable[[], Any]) -> float:
    """Return the least time of several calls, in ms of the processor."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return 1000 * min(found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        times(Path(folder) / "model.safetensors")
        sizes(Path(folder) / "model.safetensors")
