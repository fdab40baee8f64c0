"""The demo's network in Flax: what is particular to the framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from maskedlinear.demo.problem import Float32, Problem
from maskedlinear.demo.settings import BATCH_NORM_EPSILON, BATCH_NORM_KEEP, Settings
from maskedlinear.demo.training import Gradients, Run, train
from maskedlinear.flax import MaskedLinear, param_masks
from maskedlinear.jax import freeze_masked

__all__ = ["FlaxRunner", "run"]


class FlaxRunner:
    """The network and AdamW in Flax on the CPU, behind ``Runner``."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        optimizer = settings.optimizer
        rates = jnp.asarray(problem.rates)
        adamw = optax.adamw(
            lambda step: rates[step],
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self._network = _Network(problem, nnx.Rngs(settings.seed))  # nothing drawn lasts: the weights are the problem's
        self._optimizer = nnx.Optimizer(self._network, freeze_masked(adamw), wrt=nnx.Param)
        # Walks through the modules once, not at every step.
        self._cached_step = nnx.cached_partial(_step, self._network, self._optimizer)
        self._latest: Any = None

    def step(self, x: Float32, y: NDArray[np.int64]) -> float:
        """See ``Runner``."""
        loss, self._latest = self._cached_step(jnp.asarray(x), jnp.asarray(y, jnp.int32))
        return float(loss)

    def gradients(self) -> tuple[Gradients, ...]:
        """See ``Runner``."""
        layers = [self._latest["linears"][i] for i in range(len(self._network.linears))]
        return tuple(Gradients(np.asarray(g["kernel"][...]).T, np.asarray(g["bias"][...])) for g in layers)

    def evaluate(self, x: Float32) -> NDArray[np.int64]:
        """See ``Runner``."""
        return np.asarray(_digits(self._network, jnp.asarray(x)), np.int64)

    def weights(self) -> tuple[Float32, ...]:
        """See ``Runner``."""
        return tuple(np.array(layer.full_kernel).T for layer in self._network.linears)

    def sparsity(self) -> tuple[float, ...]:
        """See ``Runner``."""
        return tuple(layer.sparsity for layer in self._network.linears)


def run(problem: Problem, settings: Settings, on_epoch: Callable[[float, float], None]) -> Run:
    """Train the network in Flax; see :func:`maskedlinear.demo.training.train`."""
    with jax.default_device(jax.devices("cpu")[0]):
        return train(FlaxRunner(problem, settings), problem, on_epoch)


class _Network(nnx.Module):
    def __init__(self, problem: Problem, rngs: nnx.Rngs) -> None:
        constant = nnx.initializers.constant
        linears, norms = [], []
        for mask, weight, bias, shift in problem.layers:
            n_out, n_in = mask.shape
            linears.append(
                MaskedLinear(
                    n_in,
                    n_out,
                    mask=mask.T,  # Flax keeps a kernel, and so its mask, as (in, out)
                    kernel_init=constant(weight.T),
                    bias_init=constant(bias),
                    init_fan_in="full",  # the kernel as it is given
                    rngs=rngs,
                )
            )
            norms.append(
                nnx.BatchNorm(
                    n_out,
                    epsilon=BATCH_NORM_EPSILON,
                    momentum=BATCH_NORM_KEEP,
                    bias_init=constant(shift),
                    use_fast_variance=False,  # E[x²] - E[x]² cancels; PyTorch takes the mean of (x - E[x])²
                    rngs=rngs,
                )
            )
        self.linears, self.norms = nnx.List(linears), nnx.List(norms)

    def __call__(self, x: Array, *, train: bool) -> Array:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = nnx.relu(norm(linear(x), use_running_average=not train))
        return x


def _loss(network: _Network, x: Array, y: Array) -> Array:
    losses: Array = optax.softmax_cross_entropy_with_integer_labels(network(x, train=True), y)
    return losses.mean()


@nnx.jit
def _step(network: _Network, optimizer: nnx.Optimizer[_Network], x: Array, y: Array) -> tuple[Array, Any]:
    loss, gradients = nnx.value_and_grad(_loss)(network, x, y)
    optimizer.update(network, gradients, masks=param_masks(network))
    return loss, gradients


@nnx.jit
def _digits(network: _Network, x: Array) -> Array:
    return jnp.argmax(network(x, train=False), axis=1)
