"""Files loaded into nnx models: nothing changes where something refuses, and nothing is bound to a device that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maskedlinear import checkpoint
from maskedlinear.flax import mask_model, prune_model


def network() -> Any:
    return nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))


def masked_network() -> Any:
    return mask_model(network())


def numbers(*parts: Any) -> Any:
    return jax.tree.map(np.asarray, [nnx.to_pure_dict(nnx.state(part)) for part in parts])


def saved(path: Path) -> tuple[Any, Any]:
    model = masked_network()
    prune_model(model, 0.5)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    checkpoint.save(model, path, optimizer=optimizer)
    return model, optimizer


def refuse(variable: Any, value: Any) -> Any:
    raise RuntimeError("this Variable refuses")


@pytest.mark.filterwarnings("ignore:numbers under the masks")
@pytest.mark.parametrize("make", [network, masked_network])
def test_a_variable_that_refuses_leaves_model_and_optimizer_as_they_were(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    there = saved(path)
    model = make()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    last = model.layers[1]
    before, kind = numbers(model, optimizer), type(last)
    last.bias.set_metadata("on_set_value", (refuse,))
    with pytest.raises(RuntimeError, match="this Variable refuses"):
        checkpoint.load_into(model, path, optimizer=optimizer)
    jax.tree.map(np.testing.assert_array_equal, numbers(model, optimizer), before)
    assert type(last) is kind
    last.bias.del_metadata("on_set_value")
    checkpoint.load_into(model, path, optimizer=optimizer)
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(model(x), there[0](x))
    jax.tree.map(np.testing.assert_array_equal, numbers(optimizer), numbers(there[1]))


@pytest.mark.filterwarnings("ignore:numbers under the masks")
def test_what_was_put_nowhere_by_choice_stays_so(tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors")
    model = masked_network()
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    last = model.layers[1]
    last.bias.set_value(jax.device_put(last.bias[...], jax.devices()[0]))
    checkpoint.load_into(model, tmp_path / "model.safetensors", optimizer=optimizer)
    free = jax.tree.leaves((nnx.state(model.layers[0]), nnx.state(optimizer)))
    assert not any(array.committed for array in free)
    assert last.bias[...].committed
