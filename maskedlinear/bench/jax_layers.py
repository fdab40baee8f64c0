"""The layers that are timed in JAX, each as a jitted training step and as an inference."""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import sparse

from maskedlinear.bench.cases import NAMES, Case
from maskedlinear.jax import masked_linear, sparse_linear
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._trial import LayerCall, forward_backward, inference, training_step

__all__ = ["BASE", "DENSE", "SPARSE", "calls", "chosen", "description", "device_of", "kept"]

BASE, DENSE, SPARSE = NAMES["jax"]

Layer = tuple[LayerCall, Any, Any]  # with its parameters, and what is fixed


def description() -> dict[str, str]:
    """Return what ran."""
    found = {"jax": jax.__version__, "optax": optax.__version__}
    if find_spec("brainevent"):
        import brainevent  # type: ignore[import-not-found]

        found["brainevent"] = brainevent.__version__
    return found


def device_of(device: str) -> str:
    """Return where JAX computes, which its own settings decide; ``device`` is only checked.

    Raises:
        ValueError: if JAX computes elsewhere.
    """
    found = jax.default_backend()
    if (device == "cpu") != (found == "cpu"):
        raise ValueError(f"JAX computes on {found!r}; got device {device!r}: set JAX_PLATFORMS")
    return found


def _layers(case: Case) -> dict[str, Callable[[], Layer]]:
    pattern = case.pattern()
    generator = np.random.default_rng(0)
    shape, bias = (case.out_features, case.in_features), np.zeros(case.out_features, np.float32)

    def drawn(*size: int) -> Array:
        return jnp.asarray(generator.standard_normal(size) / np.sqrt(case.in_features), jnp.float32)

    def dense(params: Any, x: Array, _: Any) -> Array:
        return x @ params["weight"].T + params["bias"]

    def masked(params: Any, x: Array, mask: Array) -> Array:
        return masked_linear(x, params["weight"], mask, params["bias"])

    def by_connections(params: Any, x: Array, pattern: Any) -> Array:
        return sparse_linear(x, params["values"], pattern, params["bias"])

    def bcoo(params: Any, x: Array, indices: Array) -> Array:
        matrix = sparse.BCOO((params["values"], indices), shape=shape, indices_sorted=True, unique_indices=True)
        return (matrix @ x.T).T + params["bias"]

    def product(params: Any, x: Array, mask: Array) -> Array:
        return x @ (params["weight"] * mask).T + params["bias"]

    def weights() -> Any:
        return {"weight": drawn(*shape), "bias": jnp.asarray(bias)}

    def values() -> Any:
        return {"values": drawn(pattern.nnz), "bias": jnp.asarray(bias)}

    found: dict[str, Callable[[], Layer]] = {
        BASE: lambda: (dense, weights(), ()),
        DENSE: lambda: (masked, weights(), jnp.asarray(pattern.to_mask())),
        SPARSE: lambda: (by_connections, values(), jax.device_put(pattern)),
    }
    if case.of in ("choice", "costs"):  # the layers that compress exchanges, whose weights lie the other way round
        found |= _flax_layers(pattern)
    if case.of == "layers":
        found["weight * mask"] = lambda: (product, weights(), jnp.asarray(pattern.to_mask(), jnp.float32))
        if case.density < 0.05:  # a step of denser ones takes seconds
            places = np.stack([pattern.rows, pattern.indices], 1)
            found["BCOO"] = lambda: (bcoo, values(), jnp.asarray(places))
            if find_spec("brainevent"):
                found["brainevent"] = lambda: (_brainevent(shape), values(), (pattern.indices, pattern.indptr))
    return found


def _flax_layers(pattern: SparsityPattern) -> dict[str, Callable[[], Layer]]:
    from flax import nnx

    from maskedlinear.flax import MaskedLinear, SparseLinear
    from maskedlinear_jax.flax._models import as_function

    outputs, inputs = pattern.shape
    return {
        DENSE: lambda: as_function(MaskedLinear(inputs, outputs, mask=pattern.to_mask().T, rngs=nnx.Rngs(0))),
        SPARSE: lambda: as_function(SparseLinear(inputs, outputs, pattern=pattern, rngs=nnx.Rngs(0))),
    }


def _brainevent(shape: tuple[int, int]) -> Callable[..., Array]:
    import brainevent

    def layer(params: Any, x: Array, places: Any) -> Array:
        matrix = brainevent.CSR((params["values"], *map(jnp.asarray, places)), shape=shape)
        return (matrix @ x.T).T + params["bias"]

    return layer


def calls(case: Case, device: str = "cpu", only: Sequence[str] = ()) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return the calls to time, by what they are and by layer: whole steps with Adam, forward + backward, and inference.

    ``only`` names layers; all of them if it is empty.
    """
    device_of(device)
    generator = np.random.default_rng(1)
    x, g = (
        jnp.asarray(generator.standard_normal((case.batch, size)), jnp.float32)
        for size in (case.in_features, case.out_features)
    )
    found: dict[str, dict[str, Callable[[], Any]]] = {"step": {}, "inference": {}}
    if case.of == "layers":
        found["forward + backward"] = {}
    for name, make in _layers(case).items():
        if only and name not in only:
            continue
        layer, params, fixed = make()
        found["step"][name] = training_step(layer, params, fixed, x, g)
        found["inference"][name] = inference(layer, params, fixed, x)
        if case.of == "layers":
            found["forward + backward"][name] = forward_backward(layer, params, fixed, x, g)
    return found


def kept(case: Case, device: str = "cpu") -> dict[str, int]:
    """Return the bytes that training keeps from step to step: parameters, gradients, Adam's state, masks and indices."""
    found = {}
    for name, make in _layers(case).items():
        _, params, fixed = make()
        leaves = jax.tree.leaves((params, params, optax.adam(1e-3).init(params), fixed))
        found[name] = sum(leaf.nbytes for leaf in leaves)
    return found


def chosen(case: Case, device: str, training: bool) -> str:
    """Return the form that ``compress`` gives the layer, with what it measures."""
    from flax import nnx

    from maskedlinear.flax import MaskedLinear, SparseLinear, compress

    device_of(device)
    mask = case.pattern().to_mask().T
    layer = MaskedLinear(case.in_features, case.out_features, mask=mask, rngs=nnx.Rngs(0))
    made = compress(layer, batch=case.batch, training=training, measure=True)
    return "sparse" if isinstance(made, SparseLinear) else "dense"
