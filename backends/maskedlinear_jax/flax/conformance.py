"""The Flax layers, as the conformance suite sees them: the JAX backend with its op gone through a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax import Array
from numpy.typing import NDArray

from maskedlinear import checkpoint
from maskedlinear.backends import LAYERS
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax import freeze_masked
from maskedlinear_jax._conformance_distributed import PLACEMENTS
from maskedlinear_jax._products import DevicePattern
from maskedlinear_jax.conformance import JaxBackend
from maskedlinear_jax.flax import (
    Mask,
    MaskedDense,
    MaskedLinear,
    SparseLinear,
    get_masks,
    keep_bits,
    load_state,
    mask_model,
    param_masks,
    set_masks,
)
from maskedlinear_jax.flax._conformance_distributed import DistributedLinen, DistributedNnx, DistributedSparseNnx

__all__ = ["LinenBackend", "NnxBackend"]

Bias = Array | None
OPTIMIZERS: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "sgd with momentum": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
}


class _FlaxBackend(JaxBackend):
    """What the two have in common. A layer's kernel and mask are ``(in, out)``; the suite's are ``(out, in)``."""

    def versions(self) -> Mapping[str, str]:
        """Return the versions of jax, jaxlib and flax."""
        return {**super().versions(), "flax": flax.__version__, "optax": version("optax")}

    def unsupported(self) -> Mapping[str, str]:
        """Return what Flax does not have: what JAX does not, but for layers."""
        unsupported = {name: why for name, why in super().unsupported().items() if name not in LAYERS}
        unsupported |= {
            "other readers": "a gradient goes to who asks for it: the guard masks that of a kernel",
            "projection": "nobody counts the edits of an array: the layer selects, and the guard keeps the kernel clean",
        }
        if self.format == "sparse":
            dense_only = [name for name in LAYERS if name not in ("layer", "save", "files", "conversion")]
            dense_only += ["distributed masks", "distributed pruning"]
            unsupported |= dict.fromkeys(dense_only, "the sparse form has live connections only")
            for name in ("distributed optimizers", "distributed checkpoints"):
                unsupported.pop(name, None)
        return unsupported


class NnxBackend(_FlaxBackend):
    """``maskedlinear.flax.MaskedLinear``."""

    name = "nnx"

    def op(self, x: Array, weight: Array, mask: Any, bias: Bias, forward_mode: bool = False) -> Array:
        """Return ``y`` of a layer with these values."""
        if self.format == "sparse":
            return _nnx_sparse(weight, mask, bias)(x)
        return _nnx_layer(weight, mask, bias, forward_mode)(x)

    def dense(self, x: Array, weight: Array, bias: Bias) -> Array:
        """Return ``y`` of ``nnx.Linear``."""
        y: Array = _nnx_fill(nnx.Linear, weight, bias)(x)
        return y

    def layer(self, weight: Array, mask: Array, bias: Bias) -> NnxLayer:
        """Return a ``MaskedLinear`` or a ``SparseLinear``."""
        if self.format == "sparse":
            return SparseNnxLayer(self, _nnx_sparse(weight, self._prepared(mask), bias))
        return NnxLayer(self, MaskedLinear.from_linear(_nnx_fill(nnx.Linear, weight, bias), mask.T))

    def distributed_layer(self, placement: str, weight: Array, mask: Array, bias: Bias) -> DistributedNnx:
        """Return a ``MaskedLinear`` or a ``SparseLinear`` on a mesh."""
        kind = DistributedSparseNnx if self.format == "sparse" else DistributedNnx
        return kind(self.asnumpy, placement, self.layer(weight, mask, bias), weight.shape)  # type: ignore[arg-type]


class NnxLayer:
    """A ``MaskedLinear`` as :class:`maskedlinear.backends.Layer`."""

    optimizers = tuple(OPTIMIZERS)
    weight_edits = ("set_value", "nnx.update", "another Param")

    def __init__(self, backend: NnxBackend, module: Any) -> None:
        self._backend, self._module = backend, module
        self.options: Mapping[str, Any] = {}  # of a call that trains

    def __call__(self, x: Array) -> Array:
        """Return ``y``, by a call that was compiled before the mask changed."""
        return _nnx_call(self._module, x)

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array, Array | None]:
        """Return what ``nnx.grad`` gives."""
        return _nnx_gradients(self._module, x, g)  # type: ignore[no-any-return]

    def set_mask(self, mask: Any) -> None:
        """Call ``set_mask``."""
        self._module.set_mask(mask.T)

    def set_weight(self, weight: Array) -> None:
        """Write into the parameter."""
        self._module.kernel[...] = weight.T

    def edit_weight(self, edit: str, weight: Array) -> None:
        """Set the Variable's value, in the module or by its state, or put another Variable in its place."""
        self._edit("kernel", edit, weight.T)

    def _edit(self, name: str, edit: str, value: Array) -> None:
        if edit == "set_value":
            getattr(self._module, name).set_value(value)
        elif edit == "nnx.update":
            nnx.update(self._module, nnx.State({name: nnx.Param(value)}))
        else:
            setattr(self._module, name, nnx.Param(value))

    def visible_weight(self) -> Array:
        """Return the kernel as it stands."""
        return self._module.kernel[...].T  # type: ignore[no-any-return]

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays."""
        layer, to_numpy = self._module, self._backend.asnumpy
        bias = None if layer.bias is None else to_numpy(layer.bias[...])
        return to_numpy(layer.full_kernel).T, to_numpy(layer.mask[...]).T, bias

    def save(self, path: Path) -> None:
        """Save the module's state with orbax."""
        _save(path, nnx.to_pure_dict(nnx.state(self._module)))

    def load(self, path: Path) -> None:
        """Load it."""
        state = nnx.state(self._module)
        nnx.replace_by_pure_dict(state, _load(path, nnx.to_pure_dict(state)))
        nnx.update(self._module, state)

    def save_file(self, path: Path, *, dormant: bool = False) -> None:
        """Save the module."""
        checkpoint.save(self._module, path, dormant=dormant)

    def load_file(self, path: Path) -> None:
        """Load it into the module."""
        checkpoint.load_into(self._module, path)

    def load_plain(self, path: Path) -> Callable[[Array], Array]:
        """Return an ``nnx.Linear`` that has loaded the parameters."""
        params = _load(path, nnx.to_pure_dict(nnx.state(self._module)))
        return _nnx_fill(nnx.Linear, jnp.asarray(params["kernel"]).T, params.get("bias"))  # type: ignore[no-any-return]

    def load_other(self, weight: Array, mask: Array | None, bias: Bias) -> None:
        """Call ``load_state`` with the state of an ``nnx.Linear``, or with one that has a mask besides."""
        state = nnx.state(_nnx_fill(nnx.Linear, weight, bias))
        if mask is not None:
            state["mask"] = Mask(mask.T)
        load_state(self._module, state)

    def convert(self, dtype: str) -> None:
        """Update the module with its state in another dtype."""
        nnx.update(self._module, _converted(nnx.state(self._module), dtype))

    def edit_mask(self, mask: NDArray[Any]) -> None:
        """Write into the Variable."""
        self._module.mask[...] = jnp.array(mask.T)

    def sharer(self) -> NnxLayer:
        """Return a layer that ``mask_model`` makes of an ``nnx.Linear`` with the same kernel."""
        linear = _nnx_fill(nnx.Linear, self._module.kernel[...].T, self._module.bias)
        linear.kernel, linear.bias = self._module.kernel, self._module.bias
        return NnxLayer(self._backend, mask_model(nnx.List([self._module, linear]))[1])

    def frozen_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a step of an ``nnx.Optimizer`` under ``freeze_masked``."""
        return self._step(freeze_masked(OPTIMIZERS[optimizer]()), lambda module: {"masks": param_masks(module)})

    def unguarded_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a step of an ``nnx.Optimizer``."""
        return self._step(OPTIMIZERS[optimizer](), lambda module: {})

    def _step(self, tx: Any, more: Callable[[MaskedLinear], Mapping[str, Any]]) -> Callable[[Array, Array], None]:
        made = nnx.Optimizer(self._module, tx, wrt=nnx.Param)

        @nnx.jit
        def update(module: MaskedLinear, made: nnx.Optimizer[MaskedLinear], x: Array, g: Array) -> None:
            gradients = nnx.grad(lambda module: (g * module(x, **self.options)).sum())(module)
            made.update(module, gradients, **more(module))

        return lambda x, g: update(self._module, made, x, g)


class SparseNnxLayer(NnxLayer):
    """A ``SparseLinear`` as :class:`maskedlinear.backends.Layer`."""

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array, Array | None]:
        """Return what ``nnx.grad`` gives, the values' laid out as a matrix."""
        of_x, of_values, of_bias = _nnx_gradients(self._module, x, g)
        return of_x, self._matrix(of_values), of_bias

    def set_weight(self, weight: Array) -> None:
        """Write the live ones into the parameter."""
        pattern = self._module.pattern
        self._module.weight_values[...] = weight[pattern.rows, pattern.indices]

    def edit_weight(self, edit: str, weight: Array) -> None:
        """Set the Variable's value to the live ones, or put another Variable in its place."""
        pattern = self._module.pattern
        self._edit("weight_values", edit, weight[pattern.rows, pattern.indices])

    def visible_weight(self) -> Array:
        """Return the values laid out as a matrix."""
        return self._matrix(self._module.weight_values[...])

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays, the values laid out as a matrix."""
        layer, to_numpy = self._module, self._backend.asnumpy
        bias = None if layer.bias is None else to_numpy(layer.bias[...])
        return to_numpy(self._matrix(layer.weight_values[...])), layer.pattern.to_mask(), bias

    def load(self, path: Path) -> None:
        """Load the state of a layer that may have had other connections: its shapes are those of the file."""
        state = nnx.state(self._module)
        nnx.replace_by_pure_dict(state, _load(path, None))
        nnx.update(self._module, state)

    def _matrix(self, values: Array) -> Array:
        pattern = self._module.pattern
        return jnp.zeros(pattern.shape, values.dtype).at[pattern.rows, pattern.indices].set(values)


class LinenBackend(_FlaxBackend):
    """``maskedlinear.flax.MaskedDense``."""

    name = "linen"
    formats = ("dense",)

    def unsupported(self) -> Mapping[str, str]:
        """Return what linen does not have besides."""
        return {
            **super().unsupported(),
            "shared weights": "variables are a tree: a module that is called twice has one",
        }

    def op(self, x: Array, weight: Array, mask: Array, bias: Bias, forward_mode: bool = False) -> Array:
        """Return ``y`` of a layer with these values."""
        model = MaskedDense(weight.shape[0], use_bias=bias is not None, forward_mode=forward_mode)
        return model.apply(_linen_variables(weight, mask, bias), x)  # type: ignore[return-value]

    def dense(self, x: Array, weight: Array, bias: Bias) -> Array:
        """Return ``y`` of ``nn.Dense``."""
        zeros = linen.initializers.zeros  # Flax's own fails for 0 inputs or outputs
        model = linen.Dense(weight.shape[0], use_bias=bias is not None, kernel_init=zeros)
        return model.apply({"params": _linen_variables(weight, weight, bias)["params"]}, x)  # type: ignore[return-value]

    def layer(self, weight: Array, mask: Array, bias: Bias) -> LinenLayer:
        """Return a ``MaskedDense`` with its variables."""
        dense = _linen_variables(weight, jnp.ones(weight.shape, bool), bias)
        dense["dormant"] = {"dormant": jnp.zeros_like(weight.T)}
        return LinenLayer(self, set_masks(dense, {"": mask.T}))

    def placements(self, kind: str) -> Sequence[str]:
        """Return those of arrays but for two: a linen module takes no ``out_sharding``, and knows its number of outputs."""
        others = ("inputs: explicit mesh", "outputs: gradient of shard_map")
        return [placement for placement in PLACEMENTS if placement not in others]

    def distributed_layer(self, placement: str, weight: Array, mask: Array, bias: Bias) -> DistributedLinen:
        """Return a ``MaskedDense`` with its variables on a mesh."""
        return DistributedLinen(self.asnumpy, placement, self.layer(weight, mask, bias), weight.shape)  # type: ignore[arg-type]


class LinenLayer:
    """A ``MaskedDense`` and its variables as :class:`maskedlinear.backends.Layer`."""

    optimizers = tuple(OPTIMIZERS)
    weight_edits = ("a NumPy array",)

    def __init__(self, backend: LinenBackend, variables: dict[str, Any]) -> None:
        self._backend, self._variables = backend, variables
        kernel = variables["params"]["kernel"]
        self._model = MaskedDense(kernel.shape[1], use_bias="bias" in variables["params"])

    def __call__(self, x: Array) -> Array:
        """Return ``y``, by a call that was compiled before the mask changed."""
        return _linen_call(self._model, self._variables, x)  # type: ignore[no-any-return]

    def gradients(self, x: Array, g: Array) -> tuple[Array, Array, Array | None]:
        """Return what ``jax.grad`` gives, of the parameters."""
        return _linen_gradients(self._model, self._variables, x, g)  # type: ignore[no-any-return]

    def set_mask(self, mask: Any) -> None:
        """Call ``set_masks``."""
        self._variables = set_masks(self._variables, {"": mask.T})

    def set_weight(self, weight: Array) -> None:
        """Put another kernel among the parameters."""
        self._variables = {**self._variables, "params": {**self._variables["params"], "kernel": weight.T}}

    def edit_weight(self, edit: str, weight: Array) -> None:
        """Put a kernel of NumPy's among the parameters."""
        self.set_weight(np.asarray(weight))  # type: ignore[arg-type]

    def visible_weight(self) -> Array:
        """Return the kernel as it stands."""
        return jnp.asarray(self._variables["params"]["kernel"]).T

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return the state as NumPy arrays."""
        params, to_numpy = self._variables["params"], self._backend.asnumpy
        bias = to_numpy(params["bias"]) if "bias" in params else None
        mask = self._variables["masks"]["mask"]
        whole = set_masks(self._variables, {"": np.ones(mask.shape, bool)})["params"]["kernel"]
        return to_numpy(whole).T, to_numpy(mask).T, bias

    def save(self, path: Path) -> None:
        """Save the variables with orbax."""
        _save(path, self._variables)

    def load(self, path: Path) -> None:
        """Load them."""
        self._variables = _load(path, self._variables)

    def save_file(self, path: Path, *, dormant: bool = False) -> None:
        """Save the variables."""
        checkpoint.save(self._variables, path, dormant=dormant)

    def load_file(self, path: Path) -> None:
        """Take the variables that the file makes of those of now."""
        self._variables = checkpoint.load_into(self._variables, path)

    def load_plain(self, path: Path) -> Callable[[Array], Array]:
        """Return an ``nn.Dense`` with the parameters that were saved."""
        params = _load(path, self._variables)["params"]
        model = linen.Dense(self._model.features, use_bias=self._model.use_bias)
        return lambda x: model.apply({"params": params}, x)  # type: ignore[return-value]

    def load_other(self, weight: Array, mask: Array | None, bias: Bias) -> None:
        """Take the parameters, and a mask if there is one, with nothing dormant, and call ``set_masks``."""
        masks = self._variables["masks"] if mask is None else {"mask": mask.T}
        loaded = {
            **_linen_variables(weight, mask if mask is not None else masks["mask"].T, bias),
            "dormant": {"dormant": jnp.zeros_like(weight.T)},
        }
        self._variables = set_masks(loaded, get_masks(loaded))

    def convert(self, dtype: str) -> None:
        """Convert every floating leaf of the variables."""
        self._variables = _converted(self._variables, dtype)

    def edit_mask(self, mask: NDArray[Any]) -> None:
        """Put another mask into the collection by hand."""
        self._variables = {**self._variables, "masks": {"mask": jnp.array(mask.T)}}

    def frozen_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a step of the optax transformation under ``freeze_masked``."""
        transformation = freeze_masked(OPTIMIZERS[optimizer]())
        return self._step(transformation, lambda variables: {"masks": param_masks(variables)})

    def unguarded_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a step of the optax transformation."""
        return self._step(OPTIMIZERS[optimizer](), lambda variables: {})

    def _step(self, transformation: Any, more: Callable[[Any], Mapping[str, Any]]) -> Callable[[Array, Array], None]:
        state = transformation.init(self._variables["params"])

        @jax.jit
        def update(variables: Any, state: Any, x: Array, g: Array) -> Any:
            def loss(params: Any) -> Any:
                y: Any = self._model.apply({**variables, "params": params}, x)
                return (g * y).sum()

            params = variables["params"]
            updates, state = transformation.update(jax.grad(loss)(params), state, params, **more(variables))
            return optax.apply_updates(params, updates), state

        def step(x: Array, g: Array) -> None:
            nonlocal state
            params, state = update(self._variables, state, x, g)
            self._variables = {**self._variables, "params": params}

        return step


def _nnx_layer(weight: Array, mask: Array, bias: Bias, forward_mode: bool = False) -> MaskedLinear:
    options = {"forward_mode": forward_mode, "keep_dormant": False}
    layer: MaskedLinear = _nnx_fill(MaskedLinear, weight, bias, {"mask": mask.T}, **options)
    return layer


def _nnx_sparse(weight: Array, pattern: SparsityPattern, bias: Bias) -> SparseLinear:
    """Return a layer with these values, the pattern being traced perhaps; on GPUs it keeps bits, which functions form."""
    graph, state = _nnx_sparse_made(pattern.shape, bias is not None, weight.dtype)
    state = jax.tree.map(lambda leaf: leaf, state)
    parts = {"weight_values": weight[pattern.rows, pattern.indices], **DevicePattern.of(pattern).named}
    nnx.replace_by_pure_dict(state, parts | ({} if bias is None else {"bias": bias}))
    layer: SparseLinear = nnx.merge(graph, state)
    return keep_bits(layer) if jax.default_backend() == "gpu" else layer


@cache
def _nnx_sparse_made(shape: tuple[int, int], bias: bool, dtype: Any) -> Any:
    out, in_ = shape
    with jax.ensure_compile_time_eval():
        empty = SparsityPattern(np.zeros(out + 1, np.int32), np.zeros(0, np.int32), in_)
        options = {"use_bias": bias, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
        return nnx.split(SparseLinear(in_, out, pattern=empty, **options))


def _nnx_fill(kind: Any, weight: Array, bias: Bias, more: Mapping[str, Array] | None = None, **options: Any) -> Any:
    graph, state = _nnx_made(kind, weight.shape, bias is not None, weight.dtype, **options)
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy, which belongs to this trace
    nnx.replace_by_pure_dict(state, {"kernel": weight.T, **({} if bias is None else {"bias": bias}), **(more or {})})
    return nnx.merge(graph, state)


@cache
def _nnx_made(kind: Any, shape: tuple[int, int], bias: bool, dtype: Any, **options: Any) -> Any:
    """Return a layer taken apart; to make one takes most of the time that tracing it does."""
    out, in_ = shape
    options |= {"use_bias": bias, "param_dtype": dtype}
    zeros = nnx.initializers.zeros  # Flax's own initialiser fails for 0 inputs or outputs
    return nnx.split(nnx.eval_shape(lambda: kind(in_, out, kernel_init=zeros, rngs=nnx.Rngs(0), **options)))


@nnx.jit
def _nnx_call(module: MaskedLinear, x: Array) -> Array:
    return module(x)


@nnx.jit
def _nnx_gradients(module: MaskedLinear | SparseLinear, x: Array, g: Array) -> Any:
    of_layer, of_x = nnx.grad(lambda module, x: jnp.vdot(g, module(x)), argnums=(0, 1))(module, x)
    of_weight = of_layer["weight_values"][...] if isinstance(module, SparseLinear) else of_layer["kernel"][...].T
    return of_x, of_weight, of_layer["bias"][...] if "bias" in of_layer else None


@partial(jax.jit, static_argnums=0)
def _linen_call(model: MaskedDense, variables: Any, x: Array) -> Any:
    return model.apply(variables, x)


@partial(jax.jit, static_argnums=0)
def _linen_gradients(model: MaskedDense, variables: Any, x: Array, g: Array) -> Any:
    def loss(params: Any, x: Array) -> Any:
        y: Any = model.apply({**variables, "params": params}, x)
        return jnp.vdot(g, y)

    of_params, of_x = jax.grad(loss, (0, 1))(variables["params"], x)
    return of_x, of_params["kernel"].T, of_params.get("bias")


def _linen_variables(weight: Array, mask: Array, bias: Bias) -> dict[str, Any]:
    params = {"kernel": weight.T} | ({} if bias is None else {"bias": bias})
    return {"params": params, "masks": {"mask": mask.T}}


def _converted(tree: Any, dtype: str) -> Any:
    """Return a tree whose floating leaves have another dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _save(path: Path, tree: Any) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()


def _load(path: Path, like: Any) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        target = None if like is None else jax.tree.map(np.zeros_like, like)
        return checkpointer.restore(path / "state", target)
