"""The Flax layers on a mesh of devices, as the conformance suite sees them: the arrays of JAX's, gone through a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from maskedlinear_jax._conformance_distributed import (
    DistributedArrays,
    PartitionSpec,
    ShapeDtypeStruct,
    Shards,
    laid_out,
    restored,
    saved,
)
from maskedlinear_jax.flax import prune_model

__all__ = ["DistributedLinen", "DistributedNnx", "DistributedSparseNnx"]


class _DistributedFlax(DistributedArrays):
    """A layer of the suite's whose arrays are on a mesh; what is asked of it is asked of that layer there."""

    transposed = True

    def __init__(self, asnumpy: Any, placement: str, layer: Any, shape: tuple[int, int]) -> None:
        super().__init__(asnumpy, placement, shape)
        self.layer = layer
        if self._says_where:
            layer.options = {"out_sharding": NamedSharding(self.mesh, PartitionSpec())}
        self.tree = self.placed(self.tree)

    @property
    def tree(self) -> Any:
        """All arrays of the layer."""
        raise NotImplementedError

    @tree.setter
    def tree(self, tree: Any) -> None:
        raise NotImplementedError

    def visible_weight(self) -> Shards:
        """Return the kernel as it stands."""
        return self.of_weight(self.tree["params"]["kernel"])

    def export(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return kernel and mask on the host."""
        return self.asnumpy(self.tree["params"]["kernel"]).T, self.asnumpy(self.mask).T

    @property
    def mask(self) -> Array:
        """The mask, as the kernel lies."""
        raise NotImplementedError

    @property
    def full_kernel(self) -> Array:
        """Live and dormant values together."""
        raise NotImplementedError

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return the arrays of the layer as they lie."""
        with jax.set_mesh(self.mesh):
            bias = self.tree["params"].get("bias")
            weight = self.of_weight(self.full_kernel)
            return weight, self.of_weight(self.mask), None if bias is None else self.shards(bias)

    def set_mask(self, mask: NDArray[Any]) -> None:
        """Give the layer another mask."""
        with jax.set_mesh(self.mesh):
            self.layer.set_mask(mask)

    def train(self, optimizer: str, x: Array, g: Array, steps: int) -> None:
        """Take steps of the layer's under ``freeze_masked``."""
        with jax.set_mesh(self.mesh):
            step = self.layer.frozen_step(optimizer)
            for _ in range(steps):
                step(self._put(x, self._of_x), self._put(g, self._of_y))

    def save(self, way: str, path: Path) -> None:
        """Save all arrays with orbax."""
        saved(path, self.tree)

    def load(self, way: str, path: Path) -> None:
        """Load them, each where its like lies."""
        self.tree = restored(path, self.tree)


class DistributedNnx(_DistributedFlax):
    """An nnx ``MaskedLinear`` on a mesh."""

    @property
    def module(self) -> Any:
        """The module itself."""
        return self.layer._module

    @property
    def tree(self) -> Any:
        """The module's state: what is trained, and the rest."""
        split: Any = nnx.split
        _, params, rest = split(self.module, nnx.Param, ...)
        return {"params": nnx.to_pure_dict(params), "rest": nnx.to_pure_dict(rest)}

    @tree.setter
    def tree(self, tree: Any) -> None:
        state = nnx.state(self.module)
        nnx.replace_by_pure_dict(state, {**tree["params"], **tree["rest"]})
        nnx.update(self.module, state)

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.tree["params"]

    @property
    def rest(self) -> Any:
        """Mask and dormant values."""
        return self.tree["rest"]

    def apply(self, params: Any, rest: Any, x: Array, **options: Any) -> Array:
        """Return ``y`` of the module with these arrays."""
        graph, state = nnx.split(self.module)
        state = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(state, {**params, **rest})
        y: Array = nnx.merge(graph, state)(x, **options)
        return y

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return the kernel's and the bias'."""
        return gradient["kernel"], gradient.get("bias")

    @property
    def mask(self) -> Array:
        """The Variable's value."""
        mask: Array = self.module.mask[...]
        return mask

    @property
    def full_kernel(self) -> Array:
        """Live and dormant values together."""
        full: Array = self.module.full_kernel
        return full

    def prune(self, sparsity: float) -> None:
        """Call ``prune_model``."""
        with jax.set_mesh(self.mesh):
            prune_model(self.module, sparsity)


class DistributedSparseNnx(DistributedNnx):
    """An nnx ``SparseLinear`` on a mesh, its values and connections on every device."""

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return the values' and the bias'."""
        return gradient["weight_values"], gradient.get("bias")

    def of_weight(self, weight: Any) -> Shards:
        """Return one value a connection as a matrix, +0 where there is none."""
        return laid_out(self.shards(weight), self.module.pattern)

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return the values as they lie, and the connections."""
        bias, mask = self.params.get("bias"), self.module.pattern.to_mask()
        connections = self.shards(jax.device_put(mask, NamedSharding(self.mesh, PartitionSpec())))
        return self.visible_weight(), connections, None if bias is None else self.shards(bias)

    def visible_weight(self) -> Shards:
        """Return the values as they lie, as a matrix."""
        return self.of_weight(self.params["weight_values"])

    def load(self, way: str, path: Path) -> None:
        """Load a layer that may have had other connections: its shapes are those of the file."""
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path / "state")
            kept = getattr(metadata, "item_metadata", metadata)
            replicated = NamedSharding(self.mesh, PartitionSpec())
            like = jax.tree.map(
                lambda a: ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), getattr(kept, "tree", kept)
            )
            self.tree = checkpointer.restore(path / "state", like)


class DistributedLinen(_DistributedFlax):
    """A linen ``MaskedDense`` and its variables on a mesh."""

    @property
    def tree(self) -> Any:
        """The variables."""
        return self.layer._variables

    @tree.setter
    def tree(self, tree: Any) -> None:
        self.layer._variables = tree

    @property
    def params(self) -> Any:
        """The parameters."""
        return self.tree["params"]

    @property
    def rest(self) -> Any:
        """The other collections."""
        return {name: collection for name, collection in self.tree.items() if name != "params"}

    def apply(self, params: Any, rest: Any, x: Array, **options: Any) -> Array:
        """Return ``y`` of the module with these variables."""
        y: Array = self.layer._model.apply({**rest, "params": params}, x, **options)
        return y

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return the kernel's and the bias'."""
        return gradient["kernel"], gradient.get("bias")

    @property
    def mask(self) -> Array:
        """The mask among the variables."""
        mask: Array = self.tree["masks"]["mask"]
        return mask

    @property
    def full_kernel(self) -> Array:
        """The kernel under a full mask."""
        from maskedlinear_jax.flax import set_masks

        whole = set_masks(self.tree, {"": np.ones(self.mask.shape, bool)})
        full: Array = whole["params"]["kernel"]
        return full

    def prune(self, sparsity: float) -> None:
        """Call ``prune_model``."""
        with jax.set_mesh(self.mesh):
            self.tree = prune_model(self.tree, sparsity)
