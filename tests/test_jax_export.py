"""Both forms leave JAX by ``jax.export``: for any batch and platform, read again by a process that has nothing of ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, export

from helpers import python
from maskedlinear import masks
from maskedlinear.flax import MaskedDense, MaskedLinear, SparseLinear
from maskedlinear.jax import masked_linear, sparse_linear
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import _products
from maskedlinear_jax._compat import is_for_export

PLATFORMS = ["cpu", "cuda", "tpu"]
MASK = masks.random((6, 40), sparsity=0.8, seed=0)  # (out, in)
PATTERN = SparsityPattern.from_mask(MASK)


def data(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def symbolic(*sizes: str | int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(export.symbolic_shape(",".join(map(str, sizes))), jnp.float32)


def merged(layer: nnx.Module) -> Callable[[Array], Array]:
    """A layer as a function of its input, with its state in the program."""
    graph, state = nnx.split(layer)
    return lambda x: nnx.merge(graph, state)(x)  # type: ignore[no-any-return]


def programs() -> dict[str, Callable[[Array], Array]]:
    weight, values, bias = data(6, 40), data(PATTERN.nnz), data(6)
    masked = MaskedLinear(40, 6, mask=MASK.T, rngs=nnx.Rngs(0))
    dense = MaskedDense(6, mask=MASK.T)
    variables = dense.init(jax.random.key(0), data(2, 40))
    return {
        "masked_linear": lambda x: masked_linear(x, weight, MASK, bias),
        "sparse_linear": lambda x: sparse_linear(x, values, PATTERN, bias),
        "MaskedLinear": merged(masked),
        "SparseLinear": merged(SparseLinear.from_masked(masked)),
        "MaskedDense": lambda x: dense.apply(variables, x),
    }


def custom_calls(text: str) -> set[str]:
    return set(re.findall(r"custom_call @(\w+)", text)) - {"shape_assertion"}


READ = """
import numpy as np, sys
from jax import export
from pathlib import Path
for path in sorted(Path('.').glob('*.jax')):
    program = export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    arrays = np.load(path.with_suffix('.npz'))
    for batch in (1, 16):
        np.testing.assert_allclose(program.call(arrays[f'x{batch}']), arrays[f'y{batch}'], rtol=1e-5, atol=1e-5)
    print(path.stem)
assert not [name for name in sys.modules if name.startswith(('maskedlinear', 'flax'))]
"""


def test_a_process_with_jax_alone_reads_every_form(tmp_path: Path) -> None:
    for name, function in programs().items():
        program = export.export(jax.jit(function), platforms=PLATFORMS)(symbolic("batch", 40))
        assert not custom_calls(program.mlir_module()), name
        (tmp_path / f"{name}.jax").write_bytes(program.serialize())
        inputs = {f"x{batch}": data(batch, 40) for batch in (1, 16)}
        outputs = {f"y{key[1:]}": function(x) for key, x in inputs.items()}
        np.savez(tmp_path / f"{name}.npz", **{key: np.asarray(array) for key, array in {**inputs, **outputs}.items()})
    result = python(READ, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(programs())


@pytest.mark.parametrize("chunk", [16, 1 << 20])  # gathered a few connections at a time, and at once
def test_patterns_are_arguments_and_gradients_leave_too(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(_products, "_CHUNK", chunk)
    pattern, values = jax.device_put(PATTERN), data(PATTERN.nnz)
    like = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (values, pattern))
    made = export.export(jax.jit(sparse_linear), platforms=PLATFORMS)(symbolic("b", "s", 40), *like)
    read = export.deserialize(made.serialize(vjp_order=1))
    other = jax.device_put(SparsityPattern.from_mask(MASK[::-1]))
    for x, there in ((data(1, 1, 40), pattern), (data(3, 7, 40), other)):
        np.testing.assert_allclose(read.call(x, values, there), sparse_linear(x, values, there), rtol=1e-5, atol=1e-5)
        found, wanted = (
            jax.grad(lambda x, values, f=f, p=there: (f(x, values, p) ** 2).sum(), (0, 1))(x, values)
            for f in (read.call, sparse_linear)
        )
        for one, another in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-4)


def test_a_masked_program_takes_other_masks_and_gives_gradients() -> None:
    shapes = (symbolic("b", 40), jax.ShapeDtypeStruct((6, 40), jnp.float32), jax.ShapeDtypeStruct((6, 40), bool))
    read = export.deserialize(
        export.export(jax.jit(masked_linear), platforms=PLATFORMS)(*shapes).serialize(vjp_order=1)
    )
    x, weight = data(3, 40), data(6, 40)
    for mask in (jnp.asarray(MASK), ~jnp.asarray(MASK)):
        np.testing.assert_allclose(read.call(x, weight, mask), masked_linear(x, weight, mask), rtol=1e-5, atol=1e-5)
        gradient = jax.grad(lambda weight, mask=mask: (read.call(x, weight, mask) ** 2).sum())(weight)
        assert not gradient[~mask].any()
        assert gradient[mask].all()


def test_the_state_of_a_module_is_an_argument_as_a_plain_dict() -> None:
    layer = SparseLinear(40, 6, pattern=PATTERN, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    weights = nnx.to_pure_dict(state)
    made = export.export(jax.jit(lambda weights, x: nnx.merge(graph, weights)(x)), platforms=PLATFORMS)
    read = export.deserialize(made(weights, symbolic("b", 40)).serialize())
    x = data(5, 40)
    np.testing.assert_allclose(read.call(weights, x), layer(x), rtol=1e-5, atol=1e-5)
    turned = weights | {"indices": weights["indices"][::-1]}  # rows that do not ascend
    assert jnp.isnan(read.call(turned, x)).all()


def test_in_64_bits_and_of_a_fixed_batch(strict_jax: None) -> None:
    x, values = jnp.ones((3, 40), jnp.float64), jnp.asarray(np.random.default_rng(0).standard_normal(PATTERN.nnz))
    made = export.export(jax.jit(lambda x: sparse_linear(x, values, PATTERN)))(x)  # for the CPU alone
    assert not custom_calls(made.mlir_module())
    read = export.deserialize(made.serialize())
    np.testing.assert_allclose(read.call(x), sparse_linear(x, values, PATTERN), rtol=1e-13)


def test_what_is_not_exported_has_its_kernels() -> None:
    lowered = jax.jit(lambda x, values: sparse_linear(x, values, PATTERN)).lower(data(3, 40), data(PATTERN.nnz))
    assert custom_calls(lowered.as_text())
    assert not is_for_export(object())  # of a JAX that cannot say, whose export refuses these


def test_the_sparse_form_takes_less_room() -> None:
    masked = MaskedLinear(512, 256, mask=masks.random((512, 256), sparsity=0.95, seed=0), rngs=nnx.Rngs(0))
    sizes = [
        len(export.export(jax.jit(merged(layer)))(symbolic("b", 512)).serialize())
        for layer in (masked, SparseLinear.from_masked(masked))
    ]
    assert sizes[1] < sizes[0] / 4
