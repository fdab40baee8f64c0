"""Masks on any weight of linen models, which lie in their variables; and on bridged and partitioned ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.nnx import bridge

from maskedlinear.flax import (
    MaskedDense,
    ScheduledPruning,
    ScheduledRegrowth,
    check_masks,
    dense_gradients,
    get_masks,
    load_state,
    lottery_rounds,
    mask_model,
    param_masks,
    prune_model,
    regrow_model,
    rewind_model,
    set_masks,
    set_param_masks,
    summary,
    unmask_model,
)
from maskedlinear.jax import freeze_masked, prune_tree
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))
ROWS = jnp.asarray(np.random.default_rng(2).standard_normal((4, 8)), jnp.float32)


class Transformer(nn.Module):
    """Embedding, positions, attention, norm, a convolution, an expert stack, and a masked layer of ours."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(7, 8)(tokens) + self.param("pos_embedding", nn.initializers.normal(), (5, 8))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = nn.Conv(8, (3,))(x)
        up = self.param("up", nn.initializers.normal(), (3, 8, 4))
        x = jnp.einsum("btd,edf->btef", x, up).reshape(*x.shape[:2], 12)
        return MaskedDense(4, name="head")(nn.Dense(8)(x))


def full_name(name: str) -> str:
    return name if name == "up" else f"{name}.kernel"


AXES = {"up": WeightAxes(batch_axis=0, in_axis=1, out_axis=2)}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linen_model_is_masked_pruned_trained_and_restored(frozen: bool) -> None:
    model = Transformer()
    variables = model.init(jax.random.key(0), TOKENS)
    variables = FrozenDict(variables) if frozen else variables
    plain, y = variables["params"], model.apply(variables, TOKENS)
    with pytest.warns(UserWarning, match=r"left out up \(of unknown axes\)"):
        mask_model(variables)
    masked = mask_model(variables, axes=AXES)
    assert set(variables["masks"]) == {"head"}, "the given variables stay as they are"
    np.testing.assert_array_equal(model.apply(masked, TOKENS), y)
    full, pruned = get_masks(masked), prune_model(masked, 0.9, axes=AXES, scope="layer")
    table = summary(pruned)
    assert set(full) == {f"MultiHeadDotProductAttention_0.{part}" for part in ("query", "key", "value", "out")} | {
        "Conv_0",
        "Dense_0",
        "head",
        "up",
    }
    assert {part.why for part in table.unmasked} == {"bias", "scale or vector", "position or embedding"}
    count = sum(int((~np.asarray(mask)).sum()) for mask in get_masks(pruned).values())
    assert table.model_sparsity == pytest.approx(count / sum(part.size for part in jax.tree.leaves(plain)))

    tx = freeze_masked(optax.adamw(0.05), masks=param_masks(pruned))
    params, rest = pruned["params"], {name: part for name, part in pruned.items() if name != "params"}
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda params: (model.apply({"params": params, **rest}, TOKENS) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    trained = {**pruned, "params": params}
    for name, mask in get_masks(trained).items():
        *path, own = full_name(name).split(".")
        node = params
        for key in path:
            node = node[key]
        assert not np.asarray(node[own])[~np.asarray(mask)].any()
    restored = set_masks(trained, full)
    for name, mask in get_masks(pruned).items():
        *path, own = full_name(name).split(".")
        node, old = restored["params"], plain
        for key in path:
            node, old = node[key], old[key]
        np.testing.assert_array_equal(np.asarray(node[own])[~np.asarray(mask)], np.asarray(old[own])[~np.asarray(mask)])
    back = unmask_model(restored)
    assert set(get_masks(back)) == {"head"}, "MaskedDense asks for its mask"
    assert type(back["params"]) is type(plain)


def test_linen_connections_move_and_masks_are_set_from_optimizers() -> None:
    model = Transformer()
    variables = mask_model(model.init(jax.random.key(0), TOKENS), axes=AXES)
    variables = prune_model(variables, 0.5, axes=AXES, scope="layer")
    grown = dense_gradients(lambda v: (model.apply(v, TOKENS) ** 2).sum(), variables)
    np.testing.assert_array_equal(*map(set, (grown, get_masks(variables))))  # type: ignore[arg-type]
    moved = regrow_model(variables, 0.3, gradients=grown, axes=AXES)
    for name, mask in get_masks(variables).items():
        new = np.asarray(get_masks(moved)[name])
        assert new.sum() == mask.sum()
        assert (new != np.asarray(mask)).any()
    head, old = moved["params"]["head"]["kernel"], np.asarray(get_masks(variables)["head"])
    assert not np.asarray(head)[~old].any(), "what is new starts at 0"
    tree = prune_tree(moved["params"], 0.8, masks=param_masks(moved), axes=AXES, on_empty="keep")
    again = set_param_masks(moved, tree)
    np.testing.assert_array_equal(get_masks(again)["head"], tree["head"]["kernel"])
    with pytest.raises(ValueError, match=r"got none for head\.kernel"):
        set_param_masks(moved, {"Dense_0": tree["Dense_0"]})


def test_modules_of_linen_are_told_to_pass_variables() -> None:
    for function in (mask_model, unmask_model, summary, lambda m: prune_model(m, 0.5), lambda m: regrow_model(m, 0.5)):
        with pytest.raises(TypeError, match="takes an nnx module or the variables of a linen one"):
            function(Transformer())
    with pytest.raises(ValueError, match=r"got head.mask, and there is no head.kernel"):
        get_masks({"params": {}, "masks": {"head": {"mask": jnp.ones((2, 2), bool)}}})


def test_partitioned_parameters_and_bridges() -> None:
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Sequential([nn.Dense(6, kernel_init=kernel_init), nn.Dense(3)])
    variables = prune_model(mask_model(model.init(jax.random.key(0), ROWS)), 0.5)
    assert variables["masks"]["layers_0"]["kernel_mask"].names == ("in", "out")
    assert isinstance(param_masks(variables)["layers_0"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(model.apply(variables, ROWS), model.apply({"params": variables["params"]}, ROWS))
    bridged = bridge.ToNNX(MaskedDense(5, mask=np.eye(8, 5)), rngs=nnx.Rngs(0))
    bridge.lazy_init(bridged, ROWS)
    assert list(get_masks(bridged)) == [""]
    prune_model(bridged, 0.9)
    assert int(bridged.mask[...].sum()) == 4


def test_what_changes_modules_in_place_refuses_variables() -> None:
    variables = mask_model(nn.Dense(4).init(jax.random.key(0), ROWS))
    schedule = CubicSchedule(0.5, begin=0, end=2)
    for call in (
        lambda: lottery_rounds(variables, 0.5, 2),
        lambda: ScheduledPruning(variables, schedule),
        lambda: ScheduledRegrowth(variables, every=1, end=2),
        lambda: rewind_model(variables, None),
        lambda: load_state(variables, None),
        lambda: check_masks(variables, ROWS),
    ):
        with pytest.raises(TypeError, match="changes an nnx module in place; linen's variables stay as they are"):
            call()


def test_drift_of_unguarded_variables_is_reported() -> None:
    variables = prune_model(mask_model(nn.Dense(4).init(jax.random.key(0), ROWS)), 0.5)
    moved = {**variables, "params": jax.tree.map(lambda leaf: leaf + 1, variables["params"])}
    with pytest.warns(UserWarning, match=r"^\(the model\) moved under the mask"):
        prune_model(moved, 0.6)


def test_nodes_are_counted_where_axes_are_known() -> None:
    variables = mask_model({"params": {"up": jnp.ones((4, 8, 16))}}, axes=AXES)
    variables = prune_model(variables, 0.5, axes=AXES, scope="layer")
    (row,) = summary(variables).rows
    assert (row.dead_inputs, row.dead_outputs) == (0, 0), "nobody knows"
    (row,) = summary(variables, axes=AXES).rows
    assert (row.dead_inputs, row.dead_outputs) == (0, 32)
