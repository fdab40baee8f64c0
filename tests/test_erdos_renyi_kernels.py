"""Connections are shared out over layers as RigL's authors do: by the sums of matrices' and of kernels' sizes (ER, ERK)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import nnx

from maskedlinear import flax, masks
from maskedlinear import jax as ours
from maskedlinear import torch as in_torch
from maskedlinear.models import WeightAxes
from maskedlinear.pruning import LinearSchedule

SHAPES = [(8, 16, 3, 3), (8, 4, 5, 1), (16, 8, 3, 3), (10, 128)]  # (out, channels, window), of which one has two groups
ZEROS = masks.erdos_renyi_num_zeros(SHAPES, 0.7)
SPARSITY = 0.7


def weights() -> list[np.ndarray[Any, Any]]:
    """Return values in PyTorch's order of axes; the third kernel is a transposed one's."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def test_convolutions_get_their_share_by_all_of_their_sizes() -> None:
    # The sums of sizes over the sizes, scaled to the whole, as in get_sparsities_erdos_renyi of google-research/rigl.
    sizes, sums = np.array([np.prod(s) for s in SHAPES]), np.array([sum(s) for s in SHAPES])
    scale = (1 - SPARSITY) * sizes.sum() / sums.sum()
    assert (scale * sums < sizes).all()
    np.testing.assert_allclose(ZEROS, sizes - scale * sums, atol=1.5)
    nets = [torch.nn.Conv2d(16, 8, 3), torch.nn.Conv2d(8, 8, (5, 1), groups=2), torch.nn.ConvTranspose2d(8, 16, 3)]
    model = torch.nn.Sequential(*nets, torch.nn.Linear(128, 10))
    turned = [(0, 1, 2, 3), (0, 1, 2, 3), (1, 0, 2, 3), (0, 1)]
    for layer, weight, order in zip(model, weights(), turned, strict=True):
        layer.weight.data = torch.from_numpy(weight.transpose(order).copy())  # type: ignore[union-attr, assignment]
    in_torch.prune_model(in_torch.mask_model(model), SPARSITY, scope="erdos_renyi")
    in_pytorch = [
        mask.numpy().transpose(order) for mask, order in zip(in_torch.get_masks(model).values(), turned, strict=True)
    ]
    assert [int((~mask).sum()) for mask in in_pytorch] == ZEROS

    rngs = nnx.Rngs(0)
    convolutions: list[Any] = [
        nnx.Conv(16, 8, (3, 3), rngs=rngs),
        nnx.Conv(8, 8, (5, 1), feature_group_count=2, rngs=rngs),
        nnx.ConvTranspose(8, 16, (3, 3), rngs=rngs),
        nnx.Linear(128, 10, rngs=rngs),
    ]
    kernels = [weight.transpose((2, 3, 1, 0) if weight.ndim == 4 else (1, 0)) for weight in weights()]
    for layer, kernel in zip(convolutions, kernels, strict=True):
        layer.kernel[...] = kernel
    flax.prune_model(network := flax.mask_model(nnx.List(convolutions)), SPARSITY, scope="erdos_renyi")
    in_nnx = list(flax.get_masks(network).values())
    params = {
        name: {"kernel": kernel} for name, kernel in zip(("conv_0", "conv_1", "conv_2", "dense"), kernels, strict=True)
    }
    options: Any = {"scope": "erdos_renyi"}
    in_tree = ours.prune_tree(params, SPARSITY, **options)
    in_jit = jax.jit(lambda p: ours.prune_tree(p, SPARSITY, **options))(params)
    tx = ours.scheduled_pruning(optax.sgd(0.0), LinearSchedule(SPARSITY, 0, 1, 1), **options)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(jax.tree.map(np.zeros_like, params), state, params)
    trees = [[part["kernel"] for part in tree.values()] for tree in (in_tree, in_jit, state.masks)]
    for found in (in_nnx, *trees):
        for mask, want in zip(found, in_pytorch, strict=True):
            np.testing.assert_array_equal(np.asarray(mask), want.transpose((2, 3, 1, 0) if want.ndim == 4 else (1, 0)))


def test_a_stack_of_kernels_and_what_a_program_says() -> None:
    stack = WeightAxes(out_axis=-1, in_axis=(3, 1, 2), batch_axis=0, window_axis=(1, -3))
    assert stack.sum_of_sizes((2, 3, 5, 4, 7)) == 7 + 4 + 3 + 5
    assert WeightAxes((1, 2), 0).sum_of_sizes((4, 3, 5)) == 4 + 15
    kernel = np.ones((3, 3, 4, 8), np.float32)
    axes = ours.trace_axes(
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        {"k": kernel},
        np.ones((1, 6, 6, 4), np.float32),
    )
    assert axes["k"].sum_of_sizes(kernel.shape) == 3 + 3 + 4 + 8
