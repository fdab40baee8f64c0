"""The op and the layers on eight devices: both kinds of mesh axes, ``shard_map``, and masks that lie as their kernels do."""

from __future__ import annotations

import pytest

from forked import JAX
from helpers import python

SETUP = """
import jax; jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from maskedlinear.jax import masked_linear

def mesh_of(kind, *sizes):
    return jax.make_mesh(sizes, ("d", "e")[: len(sizes)], axis_types=(kind,) * len(sizes))

def putter(mesh):
    return lambda array, *axes: jax.device_put(array, NamedSharding(mesh, P(*axes)))

x, w = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.normal(jax.random.key(1), (4, 8))
m, b = jax.random.bernoulli(jax.random.key(2), 0.5, (4, 8)), jnp.ones(4)

def gradients(x, w, m, b, layer=masked_linear):
    return jax.grad(lambda x, w, b: (layer(x, w, m, b) ** 2).sum(), (0, 1, 2))(x, w, b)

want = gradients(x, w, m, b)

def check(got, want=want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""

GRADIENTS = """
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind, 4, 2)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        placements = [("d", None, None), (None, "d", None), ("e", "d", None)]
        if kind == AxisType.Auto:  # with explicit axes it is the caller who says where a product of sharded inputs goes
            placements.append((None, None, "d"))
        for batch, out, in_ in placements:
            given = put(x, batch, in_), put(w, out, in_), put(m, out, in_), put(b, out)
            check(gradients(*given))
            check(jax.jit(gradients)(*given))
"""

SHARD_MAP = """
mesh = mesh_of(AxisType.Auto, 8)
data = (P("d"), P(), P(), P())
check(jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=data, out_specs=(P("d"), P(), P())))(x, w, m, b))
around = jax.shard_map(masked_linear, mesh=mesh, in_specs=data, out_specs=P("d"))
check(jax.jit(lambda *given: gradients(*given, layer=around))(x, w, m, b))
mesh = mesh_of(AxisType.Auto, 4, 2)  # a replicated x, the outputs apart
tensor = (P(), P("d"), P("d"), P("d"))
check(jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=tensor, out_specs=(P(), P("d"), P("d"))))(x, w, m, b))
"""

FLOAT16 = """
mesh = mesh_of(AxisType.Auto, 8)
put = putter(mesh)
half = [jax.random.normal(jax.random.key(i), shape).astype(jnp.float16) for i, shape in enumerate([(1024, 8), (4, 8)])]
layer = lambda w, x: masked_linear(x, w, m, forward_mode=True).astype(jnp.float32).sum()
got = jax.jit(jax.grad(layer))(put(half[1]), put(half[0], "d"))
exact = np.where(m, np.asarray(half[0], np.float64).sum(0), 0)
assert (np.asarray(got) == exact.astype(np.float32).astype(np.float16)).all()
"""

LAYERS = """
from flax import nnx
from maskedlinear.flax import MaskedLinear
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind, 4, 2)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "d"))
        for option in ({"kernel_metadata": {"out_sharding": (None, "d")}}, {"kernel_init": init}):
            layer = MaskedLinear(8, 4, mask=m.T, rngs=nnx.Rngs(0), **option)
            copy = MaskedLinear.from_linear(layer)
            for one in (layer, copy, MaskedLinear.from_linear(layer.to_linear(), m.T)):
                assert one.mask[...].sharding == one.kernel[...].sharding == NamedSharding(mesh, P(None, "d"))
            layer.set_mask(np.asarray(~m.T))
            assert layer.mask[...].sharding == layer.kernel[...].sharding
            layer.set_mask(m.T)
        found = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum()))(layer, put(x, "e"))
        kernel = np.asarray(layer.kernel[...])
    plain = gradients(x, kernel.T, m, jnp.zeros(4))
    check((found["kernel"][...].T, found["bias"][...]), plain[1:])
"""


@pytest.mark.parametrize("code", [GRADIENTS, SHARD_MAP, FLOAT16, LAYERS], ids=["grad", "shard_map", "float16", "nnx"])
def test_on_eight_devices(code: str) -> None:
    result = python(SETUP + code + "print('done')", imported=JAX)
    assert result.stdout.strip() == "done", result.stderr
