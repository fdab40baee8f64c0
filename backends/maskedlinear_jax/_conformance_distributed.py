"""The JAX functions on a mesh of devices, as the conformance suite sees them; Flax's layers build on the same.

See :class:`maskedlinear.backends.DistributedLayer`. What is placed is what users place: x over the batch, weights over an
axis, or neither; on meshes with automatic and with explicit axes, and in ``shard_map``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from maskedlinear.backends import Shard
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import apply_masks, freeze_masked, masked_linear, prune_tree, sparse_linear

__all__ = [
    "BATCH",
    "PLACEMENTS",
    "DistributedArrays",
    "DistributedFunction",
    "DistributedSparseFunction",
    "PartitionSpec",
    "ShapeDtypeStruct",
    "join",
    "laid_out",
    "restored",
    "saved",
    "why_not",
]

Shards = list[Shard]
PartitionSpec: Any = jax.sharding.PartitionSpec
ShapeDtypeStruct: Any = jax.ShapeDtypeStruct

BATCH = (
    "batch: automatic mesh",
    "batch: explicit mesh",
    "batch: gradient of shard_map",
    "batch: gradient in shard_map",
)
PLACEMENTS = (
    *BATCH,
    "outputs: automatic mesh",
    "outputs: explicit mesh",
    "outputs: gradient of shard_map",
    "inputs: automatic mesh",
    "inputs: explicit mesh",
)
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd with momentum": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
}
_GATHERS = re.compile(r"= (.*?) (?:ragged-)?(?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def why_not() -> str:
    """Return why this JAX cannot take part; nothing if it can."""
    return (
        "" if hasattr(jax, "set_mesh") and hasattr(jax, "shard_map") else "this jax has no set_mesh and shard_map yet"
    )


def join(devices: int) -> None:
    """Give this process so many devices, once: before JAX counts them."""
    config: Any = jax.config
    if config.jax_num_cpu_devices != devices:
        config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) != devices:
        raise RuntimeError(f"this process must have {devices} devices; it has {len(jax.devices())}")


class DistributedArrays:
    """Arrays of a layer on a mesh, and a function of them and x. A form of the layer says what they are.

    A form has ``params`` and ``rest``, trees of arrays, what is trained and what is not; ``apply``, a function of both and
    x; and ``transposed``, whether its weights are ``(in, out)``.
    """

    optimizers: Sequence[str] = tuple(OPTIMIZERS)
    checkpoints: Sequence[str] = ("orbax",)
    transposed = False
    weight_names = ("weight", "mask", "kernel", "dormant")

    def __init__(self, asnumpy: Callable[[Any], NDArray[Any]], placement: str, shape: tuple[int, int]) -> None:
        self.asnumpy, self.shape = asnumpy, shape
        self.division, _, self.way = placement.partition(": ")
        kind = jax.sharding.AxisType.Explicit if self.way == "explicit mesh" else jax.sharding.AxisType.Auto
        self.mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(kind,))

    # What a form says

    @property
    def params(self) -> Any:
        """The tree of what is trained."""
        raise NotImplementedError

    @property
    def rest(self) -> Any:
        """The tree of what is not."""
        raise NotImplementedError

    def apply(self, params: Any, rest: Any, x: Array, **options: Any) -> Array:
        """Return ``y``."""
        raise NotImplementedError

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return what of a tree like the parameters is the weight's, and the bias'."""
        raise NotImplementedError

    # Where things lie

    def spec(self, path: Any, leaf: Any) -> Any:
        """Return how a leaf lies: weights by the division, the bias with the outputs, all else on every device."""
        name = jax.tree_util.keystr(path)
        out, in_ = ("d" if self.division == of else None for of in ("outputs", "inputs"))
        if any(f"'{weight}'" in name or name.endswith(f".{weight}") for weight in self.weight_names):
            return PartitionSpec(in_, out) if self.transposed else PartitionSpec(out, in_)
        return PartitionSpec(out) if "'bias'" in name or name.endswith(".bias") else PartitionSpec()

    def specs(self, tree: Any) -> Any:
        """Return how the leaves of a tree lie."""
        return jax.tree_util.tree_map_with_path(self.spec, tree)

    def placed(self, tree: Any) -> Any:
        """Return a tree on the mesh."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.device_put(leaf, NamedSharding(self.mesh, self.spec(path, leaf))), tree
        )

    @property
    def _of_x(self) -> Any:
        return PartitionSpec("d" if self.division == "batch" else None, "d" if self.division == "inputs" else None)

    @property
    def _of_y(self) -> Any:
        return PartitionSpec("d" if self.division == "batch" else None, "d" if self.division == "outputs" else None)

    def _put(self, array: Array, spec: Any) -> Array:
        placed: Array = jax.device_put(array, NamedSharding(self.mesh, spec))
        return placed

    def shards(self, array: Array, transposed: bool = False) -> Shards:
        """Return what each device of the mesh holds of an array; one that has no part of it holds nothing."""
        whole = tuple(array.shape)
        found = {}
        for device in self.mesh.devices.flat:
            kind = bool if array.dtype == bool else np.float64
            found[device] = (np.zeros(whole, kind), np.zeros(whole, bool))
        for shard in array.addressable_shards:
            values, held = found[shard.device]
            values[shard.index], held[shard.index] = self.asnumpy(shard.data), True
        return [Shard(values.T, held.T) if transposed else Shard(values, held) for values, held in found.values()]

    # What runs

    def _value(self) -> Callable[..., Array]:
        if self.way in ("automatic mesh", "explicit mesh"):
            options = {"out_sharding": NamedSharding(self.mesh, PartitionSpec())} if self._says_where else {}
            return lambda params, rest, x: self.apply(params, rest, x, **options)

        def value(params: Any, rest: Any, x: Array) -> Array:
            specs = (self.specs(params), self.specs(rest), self._of_x)
            return jax.shard_map(self.apply, mesh=self.mesh, in_specs=specs, out_specs=self._of_y)(params, rest, x)

        return value

    @property
    def _says_where(self) -> bool:
        """Whether the caller must say where the product goes: with explicit axes, of inputs that lie apart."""
        return self.division == "inputs" and self.way == "explicit mesh"

    def _gradients(self) -> Callable[..., Any]:
        inside = self.way == "gradient in shard_map"
        value = self.apply if inside else self._value()

        def gradients(params: Any, rest: Any, x: Array, g: Array) -> Any:
            return jax.grad(lambda params, x: (g * value(params, rest, x)).sum(), (0, 1))(params, x)

        if not inside:
            return gradients

        def mapped(params: Any, rest: Any, x: Array, g: Array) -> Any:
            of_params = self.specs(params)
            in_specs, out_specs = (of_params, self.specs(rest), self._of_x, self._of_y), (of_params, self._of_x)
            return jax.shard_map(gradients, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)(params, rest, x, g)

        return mapped

    @cached_property
    def _compiled_value(self) -> Any:
        return jax.jit(self._value())

    @cached_property
    def _compiled_gradients(self) -> Any:
        return jax.jit(self._gradients())

    def value(self, x: Array) -> Shards:
        """Return ``y``, compiled once."""
        with jax.set_mesh(self.mesh):
            return self.shards(self._compiled_value(self.params, self.rest, self._put(x, self._of_x)))

    def gradients(self, x: Array, g: Array) -> tuple[Shards, Shards, Shards | None]:
        """Return what ``jax.grad`` gives, compiled once."""
        with jax.set_mesh(self.mesh):
            of_params, of_x = self._compiled_gradients(*self._arguments(x, g))
            weight, bias = self.of_gradient(of_params)
            return self.shards(of_x), self.of_weight(weight), None if bias is None else self.shards(bias)

    def of_weight(self, weight: Any) -> Shards:
        """Return what each device holds of an array like the weight parameter, ``(out, in)``."""
        return self.shards(weight, self.transposed)

    def _arguments(self, x: Array, g: Array) -> tuple[Any, ...]:
        return self.params, self.rest, self._put(x, self._of_x), self._put(g, self._of_y)

    def gathered(self, x: Array, g: Array) -> Sequence[tuple[int, ...]]:
        """Return what the compiled programs of value and gradients gather."""
        with jax.set_mesh(self.mesh):
            arguments = self._arguments(x, g)
            programs = (
                self._compiled_value.lower(*arguments[:3]).compile().as_text(),
                self._compiled_gradients.lower(*arguments).compile().as_text(),
            )
        return [
            tuple(int(length) for length in shape.split(",") if length)
            for program in programs
            for kind in _GATHERS.findall(program)
            for shape in _SHAPE.findall(kind)
        ]


class HeldArrays(DistributedArrays):
    """Arrays that functions take, and no layer holds: these are kept here."""

    _params: Any
    _rest: Any

    @property
    def params(self) -> Any:
        """Weight or values, and the bias."""
        return self._params

    @property
    def rest(self) -> Any:
        """The mask or the pattern."""
        return self._rest


class DistributedFunction(HeldArrays):
    """``masked_linear`` with its weight and mask, as users of functions alone have them: in a tree."""

    def __init__(
        self, asnumpy: Callable[[Any], NDArray[Any]], placement: str, weight: Array, mask: Array, bias: Array | None
    ) -> None:
        super().__init__(asnumpy, placement, weight.shape)  # type: ignore[arg-type]
        self._params = self.placed({"weight": weight} | ({} if bias is None else {"bias": bias}))
        self._rest = self.placed({"mask": mask})

    def apply(self, params: Any, rest: Any, x: Array, **options: Any) -> Array:
        """Return ``y``."""
        return masked_linear(x, params["weight"], rest["mask"], params.get("bias"), **options)

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return the two."""
        return gradient["weight"], gradient.get("bias")

    @property
    def _masks(self) -> dict[str, Any]:
        return dict.fromkeys(self._params) | {"weight": self._rest["mask"]}

    def state(self) -> tuple[Shards, Shards, Shards | None]:
        """Return what acts, and the mask: what is dormant is nobody's, with functions alone."""
        bias = self._params.get("bias")
        return self.visible_weight(), self.shards(self._rest["mask"]), None if bias is None else self.shards(bias)

    def visible_weight(self) -> Shards:
        """Return the parameters with the masks applied."""
        with jax.set_mesh(self.mesh):
            return self.shards(apply_masks(self._params, self._masks)["weight"])

    def export(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the parameters with the masks applied, on the host, and the mask."""
        with jax.set_mesh(self.mesh):
            shown = apply_masks(self._params, self._masks)["weight"]
        return self.asnumpy(shown), self.asnumpy(self._rest["mask"])

    def set_mask(self, mask: NDArray[Any]) -> None:
        """Put another mask where the first lies."""
        self._rest = {"mask": jax.device_put(mask, self._rest["mask"].sharding)}

    def prune(self, sparsity: float) -> None:
        """Call ``prune_tree``, and take its masks as they come."""
        with jax.set_mesh(self.mesh):
            self._rest = {"mask": prune_tree(self._params, sparsity, masks=self._masks)["weight"]}

    def train(self, optimizer: str, x: Array, g: Array, steps: int) -> None:
        """Take steps of the optax transformation under ``freeze_masked``."""
        tx = freeze_masked(OPTIMIZERS[optimizer]())

        @jax.jit
        def update(params: Any, rest: Any, state: Any, x: Array, g: Array) -> Any:
            gradients = self._compiled_gradients(params, rest, x, g)[0]
            masks = dict.fromkeys(params) | {"weight": rest["mask"]}
            updates, state = tx.update(gradients, state, params, masks=masks)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(self.mesh):
            state = tx.init(self._params)
            for _ in range(steps):
                params, rest, *batch = self._arguments(x, g)
                self._params, state = update(params, rest, state, *batch)

    def save(self, way: str, path: Path) -> None:
        """Save the tree with orbax."""
        saved(path, {"params": self._params, "rest": self._rest})

    def load(self, way: str, path: Path) -> None:
        """Load it, each array where its like lies."""
        tree = restored(path, {"params": self._params, "rest": self._rest})
        self._params, self._rest = tree["params"], tree["rest"]


class DistributedSparseFunction(HeldArrays):
    """``sparse_linear`` with its values and pattern, which lie on every device."""

    def __init__(
        self,
        asnumpy: Callable[[Any], NDArray[Any]],
        placement: str,
        weight: Array,
        pattern: SparsityPattern,
        bias: Array | None,
    ) -> None:
        super().__init__(asnumpy, placement, pattern.shape)
        values = weight[pattern.rows, pattern.indices]
        self.pattern = pattern
        self._params = self.placed({"values": values} | ({} if bias is None else {"bias": bias}))
        self._rest = self.placed(pattern)

    def apply(self, params: Any, rest: Any, x: Array, **options: Any) -> Array:
        """Return ``y``."""
        return sparse_linear(x, params["values"], rest, params.get("bias"), **options)

    def of_gradient(self, gradient: Any) -> tuple[Any, Any]:
        """Return the two."""
        return gradient["values"], gradient.get("bias")

    def of_weight(self, weight: Any) -> Shards:
        """Return one value a connection as a matrix, +0 where there is none."""
        return laid_out(self.shards(weight), self.pattern)


def laid_out(shards: Shards, pattern: SparsityPattern) -> Shards:
    """Return what devices hold of one value a connection as a matrix; where there is none, all hold +0."""
    live = pattern.to_mask()
    found = []
    for shard in shards:
        values, held = np.zeros(live.shape), ~live
        places = np.nonzero(live)
        values[places], held[places] = shard
        found.append(Shard(values, held))
    return found


def saved(path: Path, tree: Any) -> None:
    """Save a tree with orbax."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()


def restored(path: Path, like: Any) -> Any:
    """Load a tree with orbax, each array in the shape and where the one of ``like`` lies."""
    import orbax.checkpoint as ocp

    abstract = jax.tree.map(lambda a: ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "state", abstract)
