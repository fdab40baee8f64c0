"""Trees and models of JAX on eight devices and in several processes: masks lie as their weights, and are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from forked import JAX
from helpers import in_jax_processes, python

SETUP = """
import jax; jax.config.update("jax_num_cpu_devices", 8)
import warnings; warnings.simplefilter("ignore")
import jax.numpy as jnp, numpy as np, optax, pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from maskedlinear.flax import (
    ScheduledPruning, ScheduledRegrowth, compress, dense_gradients, expand, get_masks, lottery_rounds, mask_model,
    param_masks, prune_model, regrow_model, rewind_model, set_masks, summary, unmask_model,
)
from maskedlinear.jax import (
    apply_masks, freeze_masked, prune_tree, regrow_tree, scheduled_pruning, scheduled_regrowth,
)
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule

AXES = {
    "experts": WeightAxes(batch_axis=0, in_axis=1, out_axis=2), "query.kernel": WeightAxes(in_axis=0, out_axis=(1, 2)),
}
SPECS = {"query": {"kernel": P("e", "d", None)}, "experts": P("d", None, "e")}
SHAPES = {"query": {"kernel": (16, 4, 8)}, "experts": (8, 8, 4)}

def tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: rng.standard_normal(shape, np.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple))

def mesh_of(kind):
    return jax.make_mesh((4, 2), ("d", "e"), axis_types=(kind,) * 2)

def put(tree, mesh, specs=SPECS):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)

def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)

def lie(tree, like):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim), (a.sharding, b.sharding)
"""

TREES = """
plain, slopes = tree(0), tree(1)
for kind in (AxisType.Auto, AxisType.Explicit):
    params, gradients = put(plain, mesh_of(kind)), put(slopes, mesh_of(kind))
    for how in ({"scope": "erdos_renyi"}, {"of": "model"}) if kind == AxisType.Auto else ({"on_empty": "keep"},):
        masks, want = (prune_tree(one, 0.6, axes=AXES, **how) for one in (params, plain))
        same(masks, want), lie(masks, params)
    how = {"score": "snip"}  # which needs the numbers
    further = prune_tree(params, 0.7, axes=AXES, masks=masks, gradients=gradients, **how)
    same(further, prune_tree(plain, 0.7, axes=AXES, masks=want, gradients=slopes, **how)), lie(further, params)
    for slope, other in ((gradients, slopes), (None, None)):
        moved = regrow_tree(params, masks, 0.3, gradients=slope, axes=AXES, seed=2**64 - 1)
        same(moved, regrow_tree(plain, want, 0.3, gradients=other, axes=AXES, seed=2**64 - 1))
        lie(moved, (params, params))
for call, message in (
    (lambda: prune_tree(params, 0.1, masks=masks, axes=AXES), "pruning only removes connections"),
    (lambda: prune_tree(params, 1.0, axes=AXES), "a layer must keep a connection"),
    (lambda: prune_tree(jax.tree.map(lambda a: a * jnp.nan, params), 0.5, axes=AXES), "must be numbers; got NaN"),
    (lambda: regrow_tree(params, masks, 0.3, gradients=jax.tree.map(lambda a: a * jnp.nan, params)), "got NaN"),
    (lambda: regrow_tree(params, masks, 2.0), "fraction"),
):
    with pytest.raises(ValueError, match=message):
        call()
text = jax.jit(lambda params, masks: regrow_tree(
    params, prune_tree(params, 0.9, masks=masks, axes=AXES, on_empty="keep"), 0.3, gradients=params, axes=AXES
)).lower(params, masks).compile().as_text()
assert "all-reduce" in text and "all-gather" not in text, "no device has more than its part"
"""

MODELS = """
class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

def laid(model, mesh):
    specs = {4: P(None, None, None, "d"), 2: P("d", "e"), 1: P()}
    state = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, specs[a.ndim])), nnx.state(model))
    nnx.update(model, state)
    return model

def masks_lie(model):
    for name, one in (("conv", model.conv), ("up", model.up), ("down", model.down)):
        kernel = one.kernel[...]
        names = ("mask", "dormant") if isinstance(one, nnx.Linear) else ("kernel_mask", "kernel_dormant")
        own = [getattr(one, at) for at in names]
        for variable in own:
            assert variable[...].sharding.is_equivalent_to(kernel.sharding, kernel.ndim), name

given = {"up": np.random.default_rng(1).random((8, 16)) > 0.3}

def life(model):
    \"\"\"All that moves masks; returns what was found on the way.\"\"\"
    found = []
    mask_model(model, given, include="*")
    masks_lie(model)
    tx = freeze_masked(optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = prune_model(model, 0.6)
    found += [get_masks(model), str(summary(model)), prune_model(model, 0.7, score="random", of="model", seed=3)]
    masks_lie(model)
    slopes = {name: jnp.cos(7 * getattr(model, name).kernel[...]) for name in ("conv", "up", "down")}
    found += [regrow_model(model, 0.3, gradients=slopes, optimizer=optimizer), get_masks(model)]
    set_masks(model, before)
    masks_lie(model)
    state = jax.tree.map(jnp.copy, nnx.state(model))
    for sparsity in lottery_rounds(model, 0.75, rounds=1):
        pass
    found += [get_masks(model), nnx.state(model)]
    masks_lie(model)
    average = nnx.clone(model)
    pruner = ScheduledPruning(model, CubicSchedule(0.9, begin=0, end=1), averages=[average])
    regrowth = ScheduledRegrowth(model, every=1, end=9, growth="random")
    for _ in range(2):
        pruner.step(), regrowth.step()
    found += [get_masks(model), get_masks(average)]
    masks_lie(model), masks_lie(average)
    rewind_model(model, state)
    masks_lie(model)
    found += [nnx.state(model), unmask_model(model)]
    return jax.tree.map(np.asarray, nnx.pure(found[:-1]) if hasattr(nnx, "pure") else found[:-1])

def near(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert str(a) == str(b) if np.asarray(a).dtype.kind == "U" else np.allclose(a, b, atol=1e-6), (a, b)

want = None
for kind in (AxisType.Auto, AxisType.Explicit):
    model = Net(nnx.Rngs(0))
    if want is None:
        masks_lie_of, masks_lie = masks_lie, lambda model: None
        want = life(Net(nnx.Rngs(0)))
        masks_lie = masks_lie_of
    near(life(laid(model, mesh_of(kind))), want)
"""


STATES = """
import tempfile
import orbax.checkpoint as ocp
from maskedlinear.flax import SparseLinear
from maskedlinear.masks import random

mesh = mesh_of(AxisType.Auto)
whole, parts = NamedSharding(mesh, P()), NamedSharding(mesh, P(("d", "e")))

def network():
    layers = [SparseLinear(16, 24, mask=random((16, 24), sparsity=0.75, seed=0), rngs=nnx.Rngs(0)), nnx.tanh,
              nnx.Linear(24, 8, rngs=nnx.Rngs(1))]
    return mask_model(nnx.Sequential(*layers))

def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(loss)(model, x))

def loss(model, x):
    return (model(x) ** 2).mean()

def train(model, x):
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    jitted = nnx.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        jitted(model, optimizer, x)
    regrow_model(model, 0.3, gradients=dense_gradients(loss, model, x), optimizer=optimizer)
    jitted(model, optimizer, x)

x = np.random.default_rng(0).standard_normal((16, 16), np.float32)
model, alone = network(), network()
sparse = model.layers[0]
nnx.update(model, jax.tree.map(lambda a: jax.device_put(a, parts if a.shape == (96,) else whole), nnx.state(model)))
shardings = jax.tree.map(lambda a: a.sharding, nnx.to_pure_dict(nnx.state(model)))
train(model, jax.device_put(x, NamedSharding(mesh, P("d")))), train(alone, x)
state, want = (nnx.to_pure_dict(nnx.state(one)) for one in (model, alone))
for a, b in zip(*map(jax.tree.leaves, (state, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
indices = state["layers"][0]["indices"]
assert indices.sharding == parts and sparse.indptr[...].sharding == whole and sparse.weight_values[...].sharding == parts
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:  # which saves on the side
    checkpointer.save(folder + "/state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(folder + "/state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
same(restored, state), lie(restored, state)
# In the other form: on all devices, as its weights were.
nnx.update(model, jax.tree.map(lambda a: jax.device_put(a, whole), nnx.state(model)))
prune_model(model, 0.9)
want = model(x)
for format in ("dense", "sparse"):
    compress(model, format)
    assert all(a.sharding.is_equivalent_to(whole, a.ndim) for a in jax.tree.leaves(nnx.state(model)))
    np.testing.assert_allclose(model(x), want, atol=1e-5)
"""

SHARED = """
jax.config.update("jax_enable_x64", True)
IMPORTS
from maskedlinear import checkpoint
from maskedlinear_jax._placement import to_host

STEPS, mesh = 50, jax.make_mesh((size, 1), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
begun, xs = rng.standard_normal((8, 16)), rng.standard_normal((STEPS, 8, 8))

def laid(array, spec):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

def on_host(tree):
    return jax.tree.map(lambda part: part if isinstance(part, str) else to_host(part), tree)

def alike(tree):
    # The same bits in all processes.
    parts = [part.encode() if isinstance(part, str) else np.asarray(part).tobytes() for part in jax.tree.leaves(tree)]
    digests = multihost_utils.process_allgather(np.array([zlib.crc32(b"".join(parts))]))
    assert len(set(digests.ravel().tolist())) == 1

"""

PROCESSES = """
def train(how, kernel, batches):
    params = {"kernel": kernel}
    masks = None if how == "prune" else prune_tree(params, 0.6)
    params = params if masks is None else apply_masks(params, masks)
    inner, every = optax.sgd(0.1, momentum=0.9), {"rigl": "gradient", "set": "random"}
    if how == "prune":
        tx = scheduled_pruning(inner, CubicSchedule(0.8, begin=5, end=30, every=12), scope="global")
    else:
        tx = scheduled_regrowth(inner, masks=masks, every=12, end=45, growth=every[how], seed=7)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda params: ((jnp.tanh(x @ params["kernel"]) - 1) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for x in batches:
        params, state = step(params, state, x)
    return params["kernel"], state.masks["kernel"]

trained = {}
for how in ("rigl", "set", "prune"):
    for spec in (P("d", "e"), P()) if how == "rigl" else (P("d", "e"),):
        kernel, mask = train(how, laid(begun, spec), [laid(x, P("d")) for x in xs])
        assert mask.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        alike([shard.data for shard in kernel.addressable_shards] if spec == P() else to_host(kernel))
        trained[how, spec] = to_host(kernel), to_host(mask)

class Net(nnx.Module):
    def __init__(self, spec):
        self.up = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.up.kernel.set_value(jnp.asarray(begun) if spec is None else laid(begun, spec))

    def __call__(self, x):
        return self.up(x)

def life(model, slope, spec):
    before, slopes = prune_model(model, 0.5), {"up": slope}
    found = [get_masks(model), str(summary(model))]
    found += [regrow_model(model, 0.3, gradients=slopes), get_masks(model)]
    if spec == P():
        return [*on_host(found), on_host(nnx.to_pure_dict(nnx.state(model)))]
    prune_model(model, 0.6, score="random", seed=3)
    found += [regrow_model(model, 0.3, seed=4), get_masks(model)]
    set_masks(model, {"up": to_host(before["up"])})
    pruner, regrowth = ScheduledPruning(model, CubicSchedule(0.9, begin=0, end=1)), ScheduledRegrowth(model, every=1, end=9)
    for _ in range(2):
        pruner.step(), regrowth.step(lambda: slopes)
    for _ in lottery_rounds(model, 0.95, 1):
        found.append(get_masks(model))
    return [*on_host(found), on_host(nnx.to_pure_dict(nnx.state(model)))]

lives, slope = {}, np.cos(7 * begun)
for spec in (P("d", "e"), P()):
    model = mask_model(Net(spec))
    lives[spec] = life(model, laid(slope, spec), spec)
    alike(lives[spec])
    assert model.up.mask[...].sharding == model.up.dormant[...].sharding == model.up.kernel[...].sharding
    checkpoint.save(model, folder / f"{spec}.safetensors")
    assert (folder / f"{spec}.safetensors").exists()
model, other = mask_model(Net(P("d", "e"))), mask_model(Net(P("d", "e")))
prune_model(model, 0.7)
checkpoint.save(model, folder / "pruned.safetensors")
checkpoint.load_into(other, folder / "pruned.safetensors")
for one in ("kernel", "mask"):
    new, old = (getattr(net.up, one)[...] for net in (other, model))
    assert (to_host(new) == to_host(old)).all() and new.sharding == old.sharding
if size > 1:
    with pytest.raises(ValueError, match="must be the same in all processes; got others in process 1 than in process 0"):
        set_masks(model, {"up": np.full((8, 16), bool(rank))})
with pytest.raises(OSError):
    checkpoint.save(model, folder / "no folder" / "a.safetensors")
variables = mask_model({"params": {"up": {"kernel": model.up.kernel[...]}}})
variables = regrow_model(prune_model(variables, 0.9, scope="layer"), 0.1, seed=1)
for name in ("masks", "dormant"):
    assert next(iter(variables[name]["up"].values())).sharding == variables["params"]["up"]["kernel"].sharding
assert summary(variables).sparsity == 115 / 128 and get_masks(variables)["up"].sharding == model.up.kernel[...].sharding
if rank == 0:  # as one process with the whole batch does
    for (how, spec), (kernel, mask) in trained.items():
        if spec != P():
            own, wanted = train(how, jnp.asarray(begun), xs)
            assert 0.15 < np.mean(wanted) < 0.5 and (mask == wanted).all(), how
            np.testing.assert_allclose(kernel, own, rtol=1e-9, atol=1e-9)
    assert (trained["rigl", P()][1] == trained["rigl", P("d", "e")][1]).all()
    for spec, found in lives.items():
        alone = mask_model(Net(None))
        for one, want in zip(*map(jax.tree.leaves, (found, life(alone, slope, spec))), strict=True):
            assert one == want if isinstance(one, str) else np.asarray(one).tobytes() == np.asarray(want).tobytes()
        checkpoint.save(alone, folder / "alone.safetensors")
        assert (folder / "alone.safetensors").read_bytes() == (folder / f"{spec}.safetensors").read_bytes()
end()
"""
FORMS = """
from maskedlinear.flax import SparseLinear, shrink
from maskedlinear.masks import random
from maskedlinear_jax.flax._checkpoint import arrays_of, save_together

# Both forms and an optimizer: a process that does not write holds nothing of them; what is read lies where it lay.
def both(spread):
    layers = [SparseLinear(8, 8, mask=random((8, 8), sparsity=0.5), rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))]
    model = mask_model(nnx.Sequential(*layers))
    if spread:
        nnx.update(model, jax.tree.map(lambda a: laid(np.asarray(a), P()), nnx.state(model)))
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

def loss(model, x):
    return (model(x) ** 2).mean()

def step(model, optimizer, x):
    optimizer.update(model, nnx.grad(loss)(model, x))

def moved(model, optimizer, x):
    nnx.jit(step, donate_argnums=(0, 1))(model, optimizer, x)
    prune_model(model, 0.5)
    regrow_model(model, 0.3, gradients=dense_gradients(loss, model, x), optimizer=optimizer)
    return model, optimizer

def states(parts):
    return on_host([nnx.to_pure_dict(nnx.state(part)) for part in parts])

x, (kept, after) = laid(xs[0], P("d")), (moved(*both(True), laid(xs[0], P("d"))), both(True))
parts = arrays_of(kept[0], dormant=True, optimizer=kept[1]).values()
assert all(bool(part.values.size) == (rank == 0) for part in parts if isinstance(part, checkpoint.MaskedArray))
checkpoint.save(kept[0], folder / "both.safetensors", dormant=True, optimizer=kept[1])
checkpoint.load_into(after[0], folder / "both.safetensors", optimizer=after[1])
for one in (kept, after):
    nnx.jit(step)(*one, x)
jax.tree.map(np.testing.assert_array_equal, states(after), states(kept))
y = to_host(kept[0](x))
for form in ("dense", "sparse"):
    np.testing.assert_allclose(to_host(compress(kept[0], form)(x)), y, atol=1e-6)
if size > 1:
    with pytest.raises(ValueError, match="no process has whole"):
        shrink(kept[0], x)
    class Full(OSError):
        pass
    def full(arrays):
        next(part for part in arrays.values() if isinstance(part, checkpoint.PlainArray)).data()
        raise Full
    with pytest.raises(Full if rank == 0 else OSError):
        save_together(kept[0], None, lambda: arrays_of(kept[0]), full)
if rank == 0:
    alone = moved(*both(False), xs[0])
    nnx.jit(step)(*alone, xs[0])
    jax.tree.map(lambda one, want: np.testing.assert_allclose(one, want, atol=1e-5), states(after), states(alone))
end()
"""

IMPORTS = "import zlib; from jax.experimental import multihost_utils\n" + SETUP[SETUP.index("import warnings") :]


@pytest.mark.parametrize(
    "code", [TREES, MODELS, pytest.param(STATES, marks=pytest.mark.slow)], ids=["trees", "models", "states"]
)
def test_on_eight_devices(code: str) -> None:
    result = python(SETUP + code + "print('done')", imported=JAX)
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("size", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_in_several_processes(size: int, tmp_path: Path) -> None:
    in_jax_processes((SHARED + PROCESSES).replace("IMPORTS", IMPORTS), tmp_path, size)


@pytest.mark.slow
def test_both_forms_in_two_processes(tmp_path: Path) -> None:
    in_jax_processes((SHARED + FORMS).replace("IMPORTS", IMPORTS), tmp_path)
