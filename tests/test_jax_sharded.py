"""The sparse products on eight devices: each forms its part, x is not gathered, gradients are summed once, types hold.

What is counted is read off the compiled program. The count is tried on a product whose rule is missing, too.
"""

from __future__ import annotations

import pytest

from forked import JAX
from helpers import python

SETUP = """
import jax; jax.config.update("jax_num_cpu_devices", 8); jax.config.update("jax_enable_x64", True)
import re
import jax.numpy as jnp, numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from maskedlinear import masks
from maskedlinear.jax import masked_linear, sparse_linear, stack_patterns
from maskedlinear.pattern import SparsityPattern
from maskedlinear.models import WeightAxes
from maskedlinear_jax import _compat, _growth, _primitives, _select

OUT, IN, BATCH, NNZ = 32, 24, 64, 152
rng = np.random.default_rng(0)
mask = masks.random((OUT, IN), num_zeros=OUT * IN - NNZ, seed=0)
pattern = SparsityPattern.from_mask(mask)
x, values, bias = (rng.standard_normal(shape) for shape in ((BATCH, IN), (NNZ,), (OUT,)))

def mesh_of(kind, **axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))

def putter(mesh):
    def put(tree, *axes):
        return jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, P(*axes))), tree)
    return put

def gradients(x, values, bias, pattern, layer=sparse_linear):
    return jax.grad(lambda *given: (layer(given[0], given[1], pattern, given[2]) ** 2).sum(), (0, 1, 2))(x, values, bias)

def dense(x, values, pattern, bias):
    return x @ jnp.zeros((OUT, IN)).at[pattern.rows, pattern.indices].set(values).T + bias

want = gradients(x, values, bias, pattern, dense)

def check(got, want=want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)

def collectives(text):
    return [len(re.findall(rf"[^=]= [^=]*\\\\b{name}(?:-start)?\\\\(", text)) for name in ("all-gather", "all-reduce")]

def multiplications(text):
    "Of the three products, each a call of a kernel of ours; or two of JAX's, and of the third two steps of half of it all."
    ours = r"target=\\"maskedlinear_.*?layout_constraints=\\{(?:f64\\[\\d+\\]\\{0\\}, )?f64\\[(\\d+),"
    ours = re.findall(ours, text)
    kernel = r"custom-call\\\\(.*cpu_csr_sparse_dense_ffi.*?layout_constraints={f64\\\\[(\\\\d+)"
    kernels = re.findall(r"f64\\\\[\\\\d+,(\\\\d+)\\\\]\\\\S* " + kernel, text)
    sampled = re.findall(rf"f64\\\\[{NNZ // 2},(?:1,)?(\\\\d+)\\\\]\\\\S* multiply\\\\(", text)
    if ours:
        return sum(NNZ * int(batch) for batch in ours)
    return sum(int(batch) * int(size) for batch, size in kernels) + sum(2 * NNZ // 2 * int(batch) for batch in sampled)

def compiled(function, *given):
    return jax.jit(lambda *given: function(*given)).lower(*given).compile().as_text()
""".replace("\\\\", "\\")

BATCHES = """
whole = multiplications(compiled(gradients, x, values, bias, jax.device_put(pattern)))
assert whole == 3 * NNZ * BATCH, whole
for axes, batch in (({"d": 8}, ("d",)), ({"d": 4, "e": 2}, (("d", "e"),))):
    put = putter(mesh_of(AxisType.Auto, **axes))
    given = put(x, *batch), put(values), put(bias), put(pattern)
    for function in (gradients, jax.jit(gradients)):
        found = function(*given)
        check(found)
        assert found[0].sharding.spec == P(*batch)
    y = sparse_linear(given[0], given[1], given[3], given[2])
    assert y.sharding.spec == P(*batch)
    mapped = jax.vmap(sparse_linear, (0, None, None, None))(given[0], given[1], given[3], given[2])
    assert mapped.sharding.spec == P(*batch)
    text = compiled(gradients, *given)
    assert collectives(text) == [0, 1]
    assert abs(multiplications(text) / (whole / 8) - 1) < 0.1
# the count sees a product without the rule, as it was once lowered: a kernel that XLA knows nothing of
with_rule, _primitives.placement = _primitives.placement, lambda context: "here"
text = compiled(gradients, *given)
assert collectives(text)[0] > 0 and multiplications(text) > 4 * whole / 8
_primitives.placement = with_rule
# where the mesh is not known, or JAX has no such rule, XLA partitions sums of what is gathered
sharded = jax.jit(gradients, in_shardings=tuple(one.sharding for one in given[:3]) + (given[1].sharding,))
check(sharded(x, values, bias, pattern))
assert collectives(sharded.lower(x, values, bias, pattern).compile().as_text()) == [0, 1]
_compat.custom_partitioning = None
assert collectives(compiled(gradients, *given)) == [0, 1]
"""

SHAPES = """
# a batch of two axes, of which each is sharded; one that does not go evenly; one that nobody shards
put = putter(mesh_of(AxisType.Auto, d=4, e=2))
deep = x.reshape(8, 8, IN)
found = jax.jit(gradients)(put(deep, "d", "e"), put(values), put(bias), put(pattern))
check((found[0].reshape(x.shape), *found[1:]))
assert collectives(compiled(sparse_linear, put(deep, "d", "e"), put(values), put(pattern))) == [0, 0]
padded = jax.jit(lambda x: gradients(jnp.concatenate([x, x[:4]]), values, bias, pattern))(put(x, "d"))
check(padded, gradients(np.concatenate([x, x[:4]]), values, bias, pattern, dense))
check(jax.jit(gradients)(put(x), put(values, "e"), put(bias), put(pattern)))
check(jax.jit(gradients)(put(x, None, "d"), put(values), put(bias), put(pattern)))
# without devices, and for others
where = NamedSharding(AbstractMesh((8,), ("d",), axis_types=(AxisType.Auto,)), P("d"))
shaped = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
for platform in ("cpu", "cuda"):
    traced = jax.jit(lambda x: gradients(x, values, bias, pattern)).trace(shaped)
    assert "CustomSPMDPartitioning" in traced.lower(lowering_platforms=(platform,)).as_text(), platform
program = jax.export.export(jax.jit(gradients), platforms=["cpu", "cuda"])(put(x, "d"), values, bias, pattern)
assert "custom_call" not in program.mlir_module()
jax.config.update("jax_use_shardy_partitioner", False)
assert collectives(compiled(gradients, put(x, "d"), put(values), put(bias), put(pattern))) == [0, 1]
"""

EXPLICIT = """
for axes, x_axes in (({"d": 8}, ("d",)), ({"d": 4, "e": 2}, ("d", "e"))):
    mesh = mesh_of(AxisType.Explicit, **axes)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        given = put(x.reshape(*(8,) * len(x_axes), -1, IN), *x_axes), put(values), put(bias), put(pattern)
        for function in (gradients, jax.jit(gradients)) if len(axes) == 1 else (jax.jit(gradients),):
            found = function(*given)
            check((found[0].reshape(-1, IN, out_sharding=P()), *found[1:]), want)
            assert jax.typeof(found[0]).sharding == jax.typeof(given[0]).sharding
            assert [jax.typeof(one).sharding.spec for one in found[1:]] == [P(None), P(None)]
        assert collectives(compiled(sparse_linear, *given[:2], given[3], given[2])) == [0, 0]
        for wrong in ((put(x, None, "d"), values), (put(x, "d"), put(values, "d"))):
            try:
                sparse_linear(*wrong, pattern)
            except _compat.ShardingTypeError as error:
                assert "only the axes of a batch" in str(error) and "@d" in str(error), error
            else:
                raise AssertionError("features and connections that are sharded were taken")
"""

SHARD_MAP = """
data = (P("d"), P(), P(), P())
def summed(x, values, bias, pattern):
    dx, *sums = gradients(x, values, bias, pattern)
    return dx, *(jax.lax.psum(one, "d") for one in sums)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind, d=8)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        given = put(x, "d"), put(values), put(bias), put(pattern)
        for types in (True, False):  # without them, what is to be summed is for the user to say
            inside = jax.shard_map(
                gradients if types else summed, mesh=mesh, in_specs=data, out_specs=(P("d"), P(), P()), check_vma=types
            )
            check(jax.jit(inside)(*given))
            assert collectives(compiled(inside, *given)) == [0, 1]
            assert multiplications(compiled(inside, *given)) == 3 * NNZ * BATCH // 8
            around = jax.shard_map(sparse_linear, mesh=mesh, in_specs=data, out_specs=P("d"), check_vma=types)
            check(jax.jit(lambda *given: gradients(*given, layer=around))(*given))
    mesh = mesh_of(kind, d=4, e=2)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        partly = jax.shard_map(gradients, mesh=mesh, in_specs=data, out_specs=(P("d"), P(), P()), axis_names={"d"})
        check(jax.jit(partly)(put(x, "d"), put(values), put(bias), put(pattern)))
"""

ROWS = """
# a layer cut by its outputs: a device has some rows, and their connections
wide = SparsityPattern.from_mask(masks.constant_fan_in((OUT, IN), 4, seed=1))
parts = stack_patterns(wide.split_rows(8))
own = rng.standard_normal(wide.nnz)
def cut(x, values, pattern, bias):
    y = jax.vmap(sparse_linear, (None, 0, 0, 0), out_axes=-2)(x, values, pattern, bias)
    return y.reshape(*y.shape[:-2], OUT)
wanted = gradients(x, own, bias, wide, dense)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind, d=8)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        given = put(x), put(own.reshape(8, -1), "d"), put(bias.reshape(8, -1), "d"), put(parts, "d")
        function = lambda *given: gradients(*given, layer=cut)
        for run in (jax.jit(function),):
            found = run(*given)
            check([one.reshape(other.shape) for one, other in zip(found, wanted)], wanted)
            assert found[1].sharding.spec[0] == "d"
        assert collectives(compiled(function, *given)) == [0, 1]
        y = jax.jit(cut)(given[0], given[1], given[3], given[2])
        assert y.sharding.spec == P(None, "d")
mesh = mesh_of(AxisType.Auto, d=8)
def rows(x, values, bias, pattern):
    return gradients(x, values[0], bias[0], jax.tree.map(lambda index: index[0], pattern))
def body(*given):
    dx, *others = rows(*given)
    return dx, *(one[None] for one in others)
mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d")), out_specs=(P(), P("d"), P("d")))
found = jax.jit(mapped)(x, own.reshape(8, -1), bias.reshape(8, -1), parts)
check([one.reshape(other.shape) for one, other in zip(found, wanted)], wanted)
"""

OTHERS = """
# masked_linear with its inputs sharded, which leaves open where y goes
weight = rng.standard_normal((OUT, IN))
def layer(x, weight, bias, **options):
    return masked_linear(x, weight, mask, bias, **options)
wanted = jax.grad(lambda *given: (layer(*given) ** 2).sum(), (0, 1, 2))(x, weight, bias)
mesh = mesh_of(AxisType.Explicit, d=4, e=2)
put = putter(mesh)
with jax.set_mesh(mesh):
    given = put(x, "e", "d"), put(weight, None, "d"), put(bias)
    try:
        layer(*given)
    except _compat.ShardingTypeError as error:
        assert "out_sharding" in str(error)
    else:
        raise AssertionError("it is open where y goes")
    for forward_mode in (False, True):
        for where in (P("e", None), NamedSharding(mesh, P("e", "d"))):
            options = dict(out_sharding=where, forward_mode=forward_mode)
            assert jax.typeof(layer(*given, **options)).sharding.spec == P(*(getattr(where, "spec", where) or (None, None)))
            found = jax.jit(jax.grad(lambda *given: (layer(*given, **options) ** 2).sum(), (0, 1, 2)))(*given)
            check(found, wanted)
            assert [one.sharding.spec for one in found] == [P("e", "d"), P(None, "d"), P(None)]
# what prunes and regrows inside jit
live, slope = jnp.asarray(mask), rng.standard_normal((OUT, IN))
share, key = jnp.asarray(_growth.share_words(0.3)), jnp.asarray(_growth.key_words(5))
def moved(weight, live, slope):
    grown = [_growth.regrow_stack(WeightAxes(), weight, live, one, share, key, 0, False) for one in (slope, None)]
    cleared = _select.clear_smallest([weight], [live], jnp.int32(9))[0]
    return cleared, _select.largest(weight, live, WeightAxes()), *grown
wanted = moved(weight, live, slope)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of(kind, d=4, e=2)
    put = putter(mesh)
    with jax.set_mesh(mesh):
        for axes in (("d", "e"),):
            found = jax.jit(moved)(*(put(one, *axes) for one in (weight, live, slope)))
            check(found, wanted)
            assert all(one.sharding.spec == P(*axes) for one in found)
# layers of nnx
from flax import nnx
from maskedlinear.flax import MaskedDense, MaskedLinear, SparseLinear
with jax.set_mesh(mesh):
    masked = MaskedLinear(IN, OUT, mask=mask.T, rngs=nnx.Rngs(0))
    sparse = SparseLinear.from_masked(masked)
    x32 = put(x.astype(np.float32), "e")
    wanted = nnx.grad(lambda layer: (layer(x32, out_sharding=P("e", "d")) ** 2).sum())(masked)
    for run in (nnx.jit,):
        found = run(nnx.grad(lambda layer: (layer(x32) ** 2).sum()))(sparse)
        np.testing.assert_allclose(found["weight_values"][...], wanted["kernel"][...].T[mask], rtol=1e-4, atol=1e-4)
    # and of linen
    weights = {"params": {"kernel": put(masked.kernel[...], "d"), "bias": put(masked.bias[...])}}
    weights["masks"] = {"mask": put(mask.T, "d")}
    y = MaskedDense(OUT).apply(weights, put(x.astype(np.float32), "e", "d"), out_sharding=P("e", None))
    assert jax.typeof(y).sharding.spec == P("e", None)
    np.testing.assert_allclose(y, masked(x32), rtol=1e-4, atol=1e-4)
"""

PROGRAMS = {
    "batches": BATCHES,
    "shapes": SHAPES,
    "explicit": EXPLICIT,
    "shard_map": SHARD_MAP,
    "rows": ROWS,
    "others": OTHERS,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("rows", "shapes"))) for name in PROGRAMS]
)
def test_on_eight_devices(name: str) -> None:
    result = python(SETUP + PROGRAMS[name] + "print('done')", imported=JAX)
    assert result.stdout.strip() == "done", result.stderr
