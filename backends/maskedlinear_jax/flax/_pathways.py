"""``PathwayNetwork`` for nnx: the whole network of a hierarchy, a sparse layer for each of its wirings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from maskedlinear.masks import LayeredWiring, Wiring
from maskedlinear.models import check_hierarchy
from maskedlinear_jax._placement import on_device
from maskedlinear_jax.flax._constrain import constrain
from maskedlinear_jax.flax._sparse_nnx import SparseLinear

__all__ = ["PathwayBlock", "PathwayNetwork"]


@dataclass(frozen=True, eq=False)
class _Known:
    """What is known of a block when it is made, and is no part of its state: equal only to itself, for the cache of jit.

    Attributes:
        new: the places of the nodes that are new on its level; ``None`` if all are.
    """

    new: NDArray[np.intp] | None


class PathwayBlock(nnx.Module):
    """One level of a :class:`PathwayNetwork`: its connections, and what follows them on the nodes that are new on it.

    Attributes:
        linear: the connections, a :class:`SparseLinear` without bias, for ``wiring.edges(block.linear)``.
        bias: of the new nodes, shape ``(new,)``; ``None`` with batch normalisation, which has its own.
        norm: their ``nnx.BatchNorm``, or ``None``.
        activation: a function.
        dropout: ``nnx.Dropout``.
    """

    def __init__(
        self,
        wiring: Wiring,
        activation: Callable[[Array], Array],
        batch_norm: bool,
        dropout: float,
        param_dtype: Any,
        rngs: nnx.Rngs,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 - as in SparseLinear
    ) -> None:
        self.linear = SparseLinear(
            len(wiring.inputs),
            len(wiring.outputs),
            pattern=wiring.pattern,
            use_bias=False,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.linear.weight_values.set_value(on_device(wiring.initial_values(self.linear.weight_values.get_value())))
        new = np.flatnonzero(~wiring.passed_on)
        self._known = _Known(None if len(new) == len(wiring.outputs) else new)
        if wiring.fixed is not None or wiring.signs is not None:
            constrain(self.linear, wiring)
        options: dict[str, Any] = {"momentum": 0.9, "param_dtype": param_dtype, "rngs": rngs}  # torch's momentum of 0.1
        self.norm = nnx.BatchNorm(len(new), **options) if batch_norm else None
        if (
            self.norm is not None and param_dtype == jnp.float64
        ):  # Flax makes these in float32, whatever the parameters'
            for statistic in (self.norm.mean, self.norm.var):
                statistic.set_value(statistic.get_value().astype(param_dtype))
        self.bias = None if batch_norm else nnx.Param(on_device(np.zeros(len(new)), param_dtype))
        self.activation, self.dropout = activation, nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Return the nodes of this level: shape ``(..., in)`` to ``(..., out)``; what is passed on is as it came."""
        nodes = self.linear(inputs)
        new = self._known.new
        own = nodes if new is None else nodes[..., new]
        if self.bias is not None:
            own = own + self.bias[...].astype(own.dtype)
        elif self.norm is not None:
            own = self.norm(own)
        own = self.dropout(self.activation(own))
        return own if new is None else nodes.astype(own.dtype).at[..., new].set(own, unique_indices=True)


class PathwayNetwork(nnx.Module):
    """A network whose units are the nodes of a hierarchy, as P-NET and BINN have them, with a value for each connection.

    Each wiring becomes a block: its connections (:class:`SparseLinear`), then batch normalisation or a bias, the activation
    and dropout. These act on the nodes that are new on a level; what is passed on from the level before reaches the next
    one unchanged, so a node means the same wherever it is read. A dense ``nnx.Linear`` reads the last level.

    Connections that pass nodes on are fixed at 1, and signs are kept (:func:`constrain`), by optimizers that are guarded::

        tx = freeze_masked(optax.adam(1e-3), masks=param_masks(network))
        optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    Every value has a name: ``layers[k].edges(network.blocks[k].linear)``.

    Args:
        layers: a :class:`maskedlinear.masks.LayeredWiring`, whose weights are the first values where it has some.
        n_outputs: how many outputs the head has.
        activation: a function, as ``nnx.relu``.
        batch_norm: whether blocks normalise over the batch, in place of a bias.
        dropout: the probability with which a new node is dropped, while training.
        every_level: give each level a head of its own (P-NET's deep supervision, BINN's ensemble): outputs are then of shape
            ``(..., levels, n_outputs)``, from the genes' side on; P-NET takes the mean of their sigmoids, BINN the sum.
        param_dtype: the dtype of the parameters.
        rngs: as in ``nnx.Linear``.

    Attributes:
        blocks: the :class:`PathwayBlock` of each wiring.
        heads: the head of the last level, or of every one.

    Shapes:
        inputs ``(..., genes)``; output ``(..., n_outputs)``.

    Raises:
        TypeError: if ``layers`` is no ``LayeredWiring``.
        ValueError: if ``n_outputs`` is below 1, or ``dropout`` outside [0, 1].

    Example:
        >>> from maskedlinear.masks import LayeredWiring
        >>> layers = LayeredWiring.from_edges([("tp53", "apoptosis"), ("apoptosis", "fate"), ("brca1", "fate")])
        >>> network = PathwayNetwork(layers, rngs=nnx.Rngs(0))
        >>> network(jnp.ones((5, 2))).shape
        (5, 1)
        >>> [round(weight) for node, to, weight in layers[0].edges(network.blocks[0].linear) if node == to]
        [1]
    """

    def __init__(
        self,
        layers: LayeredWiring,
        n_outputs: int = 1,
        *,
        activation: Callable[[Array], Array] = nnx.tanh,
        batch_norm: bool = False,
        dropout: float = 0.0,
        every_level: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_hierarchy(layers, n_outputs, dropout)
        self.every_level = every_level
        inits = _inits([wiring.pattern.nnz for wiring in layers], param_dtype, rngs)
        self.blocks = nnx.List(
            PathwayBlock(wiring, activation, batch_norm, dropout, param_dtype, rngs, init)
            for wiring, init in zip(layers, inits, strict=True)
        )
        sizes = layers.sizes[1:] if every_level else layers.sizes[-1:]
        self.heads = nnx.List(nnx.Linear(size, n_outputs, param_dtype=param_dtype, rngs=rngs) for size in sizes)

    def levels(self, inputs: Array) -> list[Array]:
        """Return the nodes of each level: the input, and what each block makes of the one before."""
        found = [inputs]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def __call__(self, inputs: Array) -> Array:
        """Return the outputs, without a sigmoid or softmax."""
        nodes = self.levels(inputs)
        if not self.every_level:
            last: Array = self.heads[-1](nodes[-1])
            return last
        return jnp.stack([head(level) for head, level in zip(self.heads, nodes[1:], strict=True)], axis=-2)


def _inits(sizes: list[int], param_dtype: Any, rngs: nnx.Rngs) -> Iterator[Callable[..., NDArray[Any]]]:
    """Yield an initializer of each level's values, parts of one draw: XLA compiles one program, and not one a level."""
    total, start = sum(sizes), 0
    drawn = np.asarray(nnx.initializers.lecun_normal()(rngs.params(), (max(total, 1), 1), param_dtype))
    for size in sizes:
        part = drawn[start : start + size]
        yield lambda *_, part=part: part * np.sqrt(total / len(part)).astype(part.dtype)
        start += size
