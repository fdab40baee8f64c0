"""Masks on any weight of nnx models: modules of every kind, and stacks of them; nothing left out in silence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import maskedlinear.torch as in_torch
from maskedlinear import masks
from maskedlinear.flax import (
    Mask,
    MaskedLinear,
    ScheduledPruning,
    SparseLinear,
    check_masks,
    dense_gradients,
    get_masks,
    load_state,
    lottery_rounds,
    mask_model,
    param_masks,
    prune_model,
    register_axes,
    regrow_model,
    rewind_model,
    set_masks,
    set_param_masks,
    summary,
    unmask_model,
)
from maskedlinear.jax import freeze_masked, scheduled_pruning
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import CubicSchedule


class Attention(nnx.Module):
    """Embedding, attention, Einsum, norm and head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table, self.norm = nnx.Embed(7, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
        self.mix = nnx.Einsum("btd,dhf->bthf", (8, 2, 4), (2, 4), rngs=rngs)
        self.lora, self.head = nnx.LoRA(8, 2, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.norm(self.table(tokens))
        x = x + self.attention(x) + self.lora(x)
        return self.head(self.mix(x).reshape(*x.shape))


class Convolutions(nnx.Module):
    """Convolutions of each kind, one in groups, and a recurrent cell."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), rngs=rngs)
        self.turned = nnx.ConvTranspose(4, 8, (2, 2), transpose_kernel=True, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.cell = nnx.RNN(nnx.GRUCell(8, 6, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.turned(self.up(self.grouped(self.first(x)))))
        return self.cell(x.mean(axis=1))


class Stack(nnx.Module):
    """A scan over a stack of blocks, each of which has linear layers and a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> nnx.Module:
            layers = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs), nnx.relu
            return nnx.Sequential(
                *layers, nnx.LinearGeneral(8, (2, 4), rngs=rngs), nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
            )

        self.blocks = blocks(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, block: Any) -> jax.Array:
            return x + block(x)

        return forward(x, self.blocks)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 6, 3)), jnp.float32)
ROWS = jnp.asarray(np.random.default_rng(2).standard_normal((4, 8)), jnp.float32)
MODELS: dict[str, tuple[Any, Any]] = {
    "attention": (Attention, TOKENS),
    "convolutions": (Convolutions, IMAGES),
    "stack": (Stack, ROWS),
}


def named(state: Any) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat if leaf is not None}


def parameters(model: Any) -> dict[str, np.ndarray]:
    return named(nnx.state(model, nnx.Param))


def parameter_of(name: str, among: Any) -> str:
    """Return the full name of the parameter whose mask has this name."""
    return name if name in among else f"{name}.kernel" if name else "kernel"


def twin_of(make: Any, model: Any) -> Any:
    """Return a model without masks that has the weights of one with masks."""
    twin = make(nnx.Rngs(0))
    nnx.update(twin, nnx.state(model, nnx.Param))
    return twin


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_model_is_masked_pruned_trained_and_restored(kind: str) -> None:
    make, x = MODELS[kind]
    model = make(nnx.Rngs(0))
    before, y = parameters(model), model(x)
    assert mask_model(model) is model
    np.testing.assert_array_equal(model(x), y)
    weights = {parameter_of(name, before): mask for name, mask in get_masks(model).items()}
    kernels = {name for name in before if name.endswith("kernel")}
    assert set(weights) == kernels, "every kernel is masked, and nothing else"
    full = prune_model(model, 0.9, scope="layer")

    masks = {parameter_of(name, before): np.asarray(mask) for name, mask in get_masks(model).items()}
    zeros = sum(math.prod(mask.shape) - int(mask.sum()) for mask in masks.values())
    table = summary(model)
    assert table.sparsity == pytest.approx(zeros / sum(before[name].size for name in kernels))
    assert table.model_sparsity == pytest.approx(zeros / sum(part.size for part in before.values()))
    assert {part.why for part in table.unmasked} <= {"bias", "norm", "embedding", "adapter"}
    assert sum(part.size for part in (*table.rows, *table.unmasked)) == sum(part.size for part in before.values())

    optimizer = nnx.Optimizer(model, freeze_masked(optax.adamw(0.01), masks=param_masks(model)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: ((model(x) - 1) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    for name, weight in parameters(model).items():
        if name in masks:
            assert not weight[~masks[name]].any()
            assert not np.signbit(weight[~masks[name]]).any()
    np.testing.assert_array_equal(model(x), twin_of(make, model)(x))
    assert check_masks(model, x).ok
    set_masks(model, full)
    for name, weight in parameters(model).items():
        if name in masks:
            np.testing.assert_array_equal(weight[~masks[name]], before[name][~masks[name]])
    assert unmask_model(model) is model
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(make(nnx.Rngs(0))))


def test_the_same_weights_get_pytorchs_masks() -> None:
    rng, convolutions = np.random.default_rng(0), Convolutions(nnx.Rngs(0))
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.ConvTranspose2d(8, 4, 2)
    )
    ours = nnx.List([convolutions.first, convolutions.grouped, convolutions.up])
    for layer, other in zip(ours, theirs, strict=True):
        weight = rng.standard_normal(layer.kernel[...].shape).astype(np.float32)
        layer.kernel[...] = jnp.asarray(weight)
        turned = (2, 3, 0, 1) if isinstance(layer, nnx.ConvTranspose) else (3, 2, 0, 1)
        other.weight.data = torch.from_numpy(weight.transpose(turned).copy())  # type: ignore[union-attr, assignment]
    mask_model(ours)
    in_torch.mask_model(theirs)
    for options in (
        {"sparsity": 0.3},
        {"sparsity": 0.5, "scope": "erdos_renyi", "on_empty": "keep"},
        {"sparsity": 0.7, "scope": "layer", "score": "random", "seed": 3},
        {"sparsity": 0.8, "keep_at_least": {"row": 2}},
        {"sparsity": 0.5, "of": "model"},
    ):
        if options.get("of") == "model":
            mask_model(ours := nnx.clone(unmask_model(ours)))
            in_torch.mask_model(in_torch.unmask_model(theirs))
        prune_model(ours, **options)
        in_torch.prune_model(theirs, **options)  # type: ignore[arg-type]
        for layer, (name, mask) in zip(ours, in_torch.get_masks(theirs).items(), strict=True):
            turned = (2, 3, 0, 1) if isinstance(layer, nnx.ConvTranspose) else (3, 2, 0, 1)
            np.testing.assert_array_equal(np.asarray(layer.kernel_mask[...]).transpose(turned), mask.numpy(), name)
    assert summary(ours).model_sparsity == pytest.approx(0.5, abs=1e-3)
    assert in_torch.regrow_model(theirs, 0.3, seed=5) == regrow_model(ours, 0.3, seed=5) > 0
    for layer, mask in zip(ours, in_torch.get_masks(theirs).values(), strict=True):
        turned = (2, 3, 0, 1) if isinstance(layer, nnx.ConvTranspose) else (3, 2, 0, 1)
        np.testing.assert_array_equal(np.asarray(layer.kernel_mask[...]).transpose(turned), mask.numpy())


def test_axes_are_those_that_are_contracted() -> None:
    model = Attention(nnx.Rngs(0))
    mask_model(model)
    prune_model(model, 0.5, block=(4, 4), scope="layer")
    query, out = (np.asarray(part.kernel_mask[...]) for part in (model.attention.query, model.attention.out))
    blocks = query.reshape(2, 4, 2, 4)  # (in, out): 8 inputs, 2 heads of 4
    assert (blocks.all(axis=(1, 3)) | ~blocks.any(axis=(1, 3))).all()
    blocks = out.reshape(2, 4, 2, 4)  # (2 heads of 4, out)
    assert (blocks.all(axis=(1, 3)) | ~blocks.any(axis=(1, 3))).all()
    stack = Stack(nnx.Rngs(0))
    mask_model(stack)
    prune_model(stack, 0.75, scope="layer", keep_at_least={"layer": 8})
    linear = stack.blocks.layers[1].mask[...]
    assert linear.shape == (3, 8, 8)
    np.testing.assert_array_equal(linear.sum(axis=(1, 2)), [16, 16, 16])
    general = stack.blocks.layers[3].kernel_mask[...]
    np.testing.assert_array_equal(general.sum(axis=(1, 2, 3)), [16, 16, 16])
    assert [row.name for row in summary(stack).rows][:3] == [f"blocks.layers.1[{place}]" for place in range(3)]


class Experts(nnx.Module):
    """Parameters of a user's own, one in a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 16)))
        self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 3)))
        self.more = nnx.List([nnx.Param(jnp.ones((4, 4)))])
        self.step = nnx.Param(jnp.zeros((), int))


class MoreExperts(Experts):
    """A module type that is told its axes."""


def test_what_nobody_knows_is_named_and_can_be_told() -> None:
    with pytest.warns(UserWarning, match=r"left out more.0 \(in a container.*; up \(of unknown axes\)"):
        model = mask_model(Experts(nnx.Rngs(0)))
    assert set(get_masks(model)) == {"w"}
    assert {part.name: part.why for part in summary(model).unmasked}["step"] == "not of a floating dtype"
    axes = {"up": WeightAxes(batch_axis=0, in_axis=1, out_axis=2)}
    told = mask_model(Experts(nnx.Rngs(0)), include=["up", "w"])
    with pytest.raises(ValueError, match="nobody knows those of up"):
        prune_model(told, 0.5, block=(2, 2))
    prune_model(told, 0.5, block=(2, 2), scope="layer", include="up", axes=axes)
    np.testing.assert_array_equal(get_masks(told)["up"].sum(axis=(1, 2)), [64, 64, 64])
    register_axes(MoreExperts, axes)
    with pytest.warns(UserWarning, match="left out more.0"):
        assert set(get_masks(mask_model(MoreExperts(nnx.Rngs(0))))) == {"w", "up"}
    with pytest.raises(TypeError, match=r"takes a type of modules"):
        register_axes(int, axes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the axes of 'up' must be WeightAxes\(...\)"):
        register_axes(Experts, {"up": 0})  # type: ignore[dict-item]
    for call, message in (
        (lambda: mask_model(Experts(nnx.Rngs(0)), include=["more.0"]), "more.0 cannot be masked: it is in a container"),
        (lambda: mask_model(Experts(nnx.Rngs(0)), axes={"upp": WeightAxes()}), "axes must be of layers that there are"),
        (lambda: mask_model(nnx.LayerNorm(3, rngs=nnx.Rngs(0))), "LayerNorm: it has scale .norm"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_embeddings_and_adapters_are_masked_when_asked_for() -> None:
    model = mask_model(Attention(nnx.Rngs(0)), include=["table.embedding", "lora.lora_a"])
    assert set(get_masks(model)) == {"table.embedding", "lora.lora_a"}
    prune_model(model, 0.5)
    assert not np.asarray(model.table.embedding[...])[~np.asarray(model.table.embedding_mask[...])].any()

    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed, self.head = nnx.Embed(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.head.kernel = self.embed.embedding

    with pytest.raises(ValueError, match="there is no weight to mask in Tied"):
        mask_model(Tied())
    assert {part.name: part.why for part in summary(Tied()).unmasked}["embed.embedding"] == "shared with an embedding"


def test_drift_that_no_guard_prevents_is_reported() -> None:
    model = mask_model(Convolutions(nnx.Rngs(0)))
    full = prune_model(model, 0.5)
    kept, mask = np.array(full["first"]), np.asarray(model.first.kernel_mask[...])
    weight = np.array(model.first.kernel[...])
    model.first.kernel[...] = model.first.kernel[...] + 1
    assert list(check_masks(model, IMAGES).failures) == ["first"]
    with pytest.warns(UserWarning, match="first moved under the mask, .* wrap the optimizer in freeze_masked"):
        prune_model(model, 0.6)
    assert check_masks(model, IMAGES).ok
    set_masks(model, {"first": kept})
    np.testing.assert_array_equal(np.asarray(model.first.kernel[...])[mask], (weight + 1)[mask])
    assert not (np.asarray(model.first.kernel[...])[~mask] == 1).any()


def test_masks_over_time_of_every_weight() -> None:
    model = mask_model(Attention(nnx.Rngs(0)))
    average, saved = nnx.clone(model), jax.tree.map(jnp.copy, nnx.state(model))
    pruner = ScheduledPruning(model, CubicSchedule(0.8, begin=0, end=2), averages=[average])
    for _ in range(3):
        pruner.step()
    for name, mask in get_masks(model).items():
        np.testing.assert_array_equal(get_masks(average)[name], mask)
    assert summary(model).sparsity == pytest.approx(0.8, abs=0.01)  # each keeps its last connection
    grown = dense_gradients(lambda model, x: (model(x) ** 2).sum(), model, TOKENS)
    live = {name: int(mask.sum()) for name, mask in get_masks(model).items()}
    moved = regrow_model(model, 0.5, gradients=grown)
    assert moved == sum(round(number / 2) for number in live.values()) or moved > 0
    assert {name: int(mask.sum()) for name, mask in get_masks(model).items()} == live
    rewind_model(model, saved)
    assert {name: int(mask.sum()) for name, mask in get_masks(model).items()} == live
    masks = get_masks(model)
    load_state(model, nnx.state(Attention(nnx.Rngs(3)), nnx.Param))
    for name, mask in get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[name])
    assert check_masks(model, TOKENS).ok
    load_state(model, saved)
    assert summary(model).sparsity == 0
    sparsities = list(lottery_rounds(model, 0.75, 2, scope="layer"))
    assert sparsities[-1] == 0.75
    assert summary(model).sparsity == pytest.approx(0.75, abs=0.01)


def test_pruning_inside_the_step_reaches_attention_and_no_embedding() -> None:
    model = mask_model(Attention(nnx.Rngs(0)))
    tx = scheduled_pruning(optax.adam(1e-3), CubicSchedule(0.9, begin=0, end=2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = {name: np.array(part) for name, part in parameters(model).items()}
    for _ in range(3):
        grads = nnx.grad(lambda model: (model(TOKENS) ** 2).mean())(model)
        optimizer.update(model, grads)
    set_param_masks(model, optimizer.opt_state.masks, optimizer.opt_state.dormant)
    assert summary(model).sparsity == pytest.approx(0.9, abs=0.02)
    used = np.unique(np.asarray(TOKENS))
    assert (parameters(model)["table.embedding"] != before["table.embedding"])[used].mean() > 0.9
    assert check_masks(model, TOKENS).ok


def test_masks_are_arguments_of_jitted_functions_and_carries() -> None:
    model = mask_model(Attention(nnx.Rngs(0)))
    prune_model(model, 0.5)
    params, masks = nnx.state(model, nnx.Param), param_masks(model)
    tx = freeze_masked(optax.adamw(0.1))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(lambda p, s, m: tx.update(grads, s, p, masks=m))(params, tx.init(params), masks)
    moved = named(optax.apply_updates(params, updates))
    for name, mask in named(masks).items():
        assert not moved[name][~mask].any()
    (_, kept), _ = jax.lax.scan(lambda carry, _: (carry, None), (params, masks), length=2)
    assert jax.tree.structure(kept) == jax.tree.structure(masks)


def test_a_stack_masked_and_a_layer_in_the_sparse_form_do_not_stop_the_others() -> None:
    axes = nnx.StateAxes({Mask: None, ...: 0})
    shared = nnx.vmap(lambda key: MaskedLinear(8, 4, mask=np.eye(8, 4), rngs=nnx.Rngs(key)), out_axes=axes)(
        jax.random.split(jax.random.key(0), 3)
    )
    model = nnx.Dict(
        shared=shared, plain=mask_model(nnx.Linear(8, 8, rngs=nnx.Rngs(1))), own=mask_model(Stack(nnx.Rngs(2)))
    )
    with pytest.raises(ValueError, match="the layers of the stack shared share one mask: leave it out"):
        prune_model(model, 0.5)
    prune_model(model, 0.5, include=["plain", "own.*"])
    assert regrow_model(model, 0.5, include=["plain", "own.*"]) > 0
    half = nnx.List([mask_model(nnx.Linear(8, 8, rngs=nnx.Rngs(place))) for place in range(2)])
    prune_model(half, 0.6)
    half[0] = SparseLinear.from_masked(half[0])
    with pytest.warns(UserWarning, match="0 in the sparse form stay as they are"):
        prune_model(half, 0.9)


def test_connections_of_a_stack_in_the_sparse_form_move() -> None:
    def layer(place: int) -> SparseLinear:
        masked = MaskedLinear(8, 6, mask=masks.random((6, 8), sparsity=0.5, seed=place).T, rngs=nnx.Rngs(place))
        return SparseLinear.from_masked(masked)

    layers = [layer(place) for place in range(3)]
    states = jax.tree.map(lambda *parts: jnp.stack(parts), *(nnx.state(one) for one in layers))
    stack = nnx.merge(nnx.graphdef(layers[0]), states)
    values = jnp.copy(stack.weight_values[...])
    average, model = nnx.clone(stack), nnx.Dict(stack=stack)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    stack.weight_values[...] = values
    assert regrow_model(model, 0.5, optimizer=optimizer, seed=4, exclude_dropped=True) == 36
    first = optimizer.opt_state[0].mu["stack"]["weight_values"][...]
    for place, one in enumerate(layers):
        regrow_model(one, 0.5, seed=4 + place, exclude_dropped=True)
        assert stack.patterns[place] == one.pattern
        np.testing.assert_array_equal(stack.weight_values[...][place], one.weight_values[...])
        np.testing.assert_array_equal(np.asarray(first[place]) == 0, np.asarray(one.weight_values[...]) == 0)
    assert get_masks(model)["stack"] == [one.pattern for one in layers]
    ScheduledPruning(stack, CubicSchedule(0.5, begin=0, end=1), averages=[average])._update_averages()
    assert average.patterns == stack.patterns
    with pytest.raises(ValueError, match="growth by gradient needs that of each layer; stack has none"):
        regrow_model(model, 0.5, gradients=dense_gradients(lambda model: jnp.zeros(()), model))


def test_a_guard_whose_masks_were_given_once_follows_the_connections() -> None:
    model = nnx.Dict(conv=nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), head=nnx.Linear(8, 4, rngs=nnx.Rngs(1)))
    mask_model(model)
    prune_model(model, 0.5, scope="layer")
    before = get_masks(model)

    def loss(model: Any) -> jax.Array:
        return (model.head(model.conv(IMAGES).mean(axis=(1, 2))) ** 2).mean()

    guarded = freeze_masked(optax.adamw(0.1), masks=param_masks(model))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), guarded), wrt=nnx.Param)
    assert regrow_model(model, 0.5, gradients=dense_gradients(loss, model), optimizer=optimizer) > 0
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
    for name, mask in get_masks(model).items():
        kernel = np.asarray(model[name].kernel[...])
        assert (np.asarray(mask) != np.asarray(before[name])).any()
        assert not kernel[~np.asarray(mask)].any()
        assert (kernel[np.asarray(mask & ~before[name])] != 0).mean() > 0.7, "what has grown trains"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
        lambda tx: optax.partition(
            {"train": tx, "rest": optax.sgd(0.1)},
            lambda params: jax.tree.map(lambda leaf: "train" if leaf.ndim > 1 else "rest", params),
        ),
        lambda tx: optax.MultiSteps(tx, 2),
    ],
    ids=["masked", "partition", "accumulated"],
)
def test_masks_given_once_hold_in_wrappers_and_when_buffers_are_donated(wrap: Any) -> None:
    model = mask_model(Attention(nnx.Rngs(0)))
    prune_model(model, 0.5, scope="layer")
    masks, kept = param_masks(model), get_masks(model)
    optimizer = nnx.Optimizer(model, wrap(freeze_masked(optax.adamw(0.1), masks=masks)), wrt=nnx.Param)

    @partial(nnx.jit, donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, tokens: jax.Array) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(tokens) ** 2).mean())(model))

    for tokens in (TOKENS, TOKENS[:1], TOKENS):
        step(model, optimizer, tokens)
        for name, mask in named(masks).items():
            assert not parameters(model)[name][~mask].any()
    set_masks(model, kept)


class PreNormMixer(nnx.Module):
    """No normalisation, whatever its name."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.scale = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 16))), nnx.Param(jnp.ones(8))


class NormalizedLinear(nnx.Linear):
    """A linear layer of a user's own."""


def test_a_name_with_norm_in_it_makes_no_norm() -> None:
    model = nnx.Dict(mixer=PreNormMixer(nnx.Rngs(0)), linear=NormalizedLinear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="left out mixer.up .of unknown axes"):
        assert set(get_masks(mask_model(model))) == {"linear"}
    register_axes(PreNormMixer, {"up": WeightAxes(2, 1, 0)})
    assert set(get_masks(mask_model(model))) == {"linear", "mixer.up"}


def test_masks_set_by_hand_lose_no_weights_and_shared_ones_stay_shared() -> None:
    conv = nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0))
    kernel = np.array(conv.kernel[...])
    mask_model(conv)
    full = get_masks(conv)
    conv.kernel_mask.set_value(jnp.asarray(np.arange(48).reshape(2, 2, 3, 4) % 2 == 0))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(set_masks(conv, full).kernel[...], kernel)
    axes = nnx.StateAxes({Mask: None, ...: 0})
    stack = nnx.vmap(lambda key: MaskedLinear(8, 8, mask=np.eye(8), rngs=nnx.Rngs(key)), out_axes=axes)(
        jax.random.split(jax.random.key(0), 3)
    )
    with pytest.raises(ValueError, match=r"the layers of the stack .* share one mask"):
        regrow_model(nnx.Dict(stack=stack), 0.5)
    with pytest.raises(TypeError, match="prune_model reads numbers, which are not known inside a transform"):
        nnx.jit(lambda model: prune_model(model, 0.5))(conv)
