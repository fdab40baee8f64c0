"""``SparseLinear`` for nnx: the masked layer with parameters for its live connections only."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from maskedlinear._gpu_rule import has_bits, words_of
from maskedlinear.masks import Recipe
from maskedlinear.pattern import SparsityPattern
from maskedlinear_jax._bits import PatternWithBits, form_bits, kept_bits
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._functional import as_array
from maskedlinear_jax._placement import laid, on_device, to_host, to_like
from maskedlinear_jax._products import DevicePattern
from maskedlinear_jax._sparse import product
from maskedlinear_jax.flax._constraint_variables import check_keeps_fixed, in_other_form, keep_own, move_constraints
from maskedlinear_jax.flax._kernel import recipe_of, remember_recipe
from maskedlinear_jax.flax._modules import device_of
from maskedlinear_jax.flax._nnx import MaskedLinear, check_options, check_sizes

__all__ = ["PatternIndex", "SparseLinear"]


class PatternIndex(nnx.Variable[Array]):
    """The indices of a sparse layer: in its state and its checkpoints, and no parameters."""


class SparseLinear(nnx.Module):
    """A linear layer with one trainable value a connection: ``y = x · W + bias``, W being 0 where there is none.

    Parameters, gradients, optimizer state and time cost what the connections cost; no matrix of the layer's shape is ever
    made (but, on GPUs, of what fits a panel of 32 MiB). How many connections there are is fixed, and
    :func:`maskedlinear.flax.regrow_model` moves them;
    :class:`MaskedLinear` is the form whose mask can change at will. Every optimizer leaves what is not there alone, so none
    needs a guard. Half types are computed in float32.

    The indices are in the layer's state, by rows (``indptr``, ``rows``, ``indices``) and by columns (``starts``,
    ``outputs``, ``order``). ``indptr`` and ``indices`` say all, and :func:`maskedlinear.flax.load_state` makes the others of
    them. A call checks that all say the same: where a state has brought others it is an error; and inside transforms,
    where numbers cannot be looked at, NaN whatever wrong indices are used for (those by columns for x's gradient only). A
    layer whose ``pattern`` keeps bits (:func:`maskedlinear.jax.with_bits`), or that :func:`maskedlinear.flax.keep_bits`
    gave some, has them in its state, too (``bits``, ``firsts``).

    Args:
        in_features: the size of the input's last dimension.
        out_features: the size of the output's last dimension.
        mask: which connections there are: an array of shape ``(in_features, out_features)``, as every mask of a Flax
            layer, booleans or 0s and 1s. Without mask and pattern the layer has all of them, which is rarely worth it.
        pattern: which connections there are, in place of ``mask``: a :class:`maskedlinear.pattern.SparsityPattern` of
            shape ``(out_features, in_features)``.
        use_bias: whether the layer has a bias, shape ``(out_features,)``.
        dtype: the dtype to compute in; that of the parameters and the input if ``None``.
        param_dtype: the dtype of the parameters.
        kernel_init: draws the values. It is asked for a kernel of one column, shape ``(nnz, 1)``, whose fan-in is
            put right afterwards: each output's values are scaled by √(nnz / live inputs), or with
            ``init_fan_in="full"`` by √(nnz / in_features).
        bias_init: draws the bias.
        init_fan_in: see ``kernel_init``.
        rngs: as in ``nnx.Linear``.

    Shapes:
        inputs ``(..., in_features)``; output ``(..., out_features)``.

    Raises:
        ValueError: if both a mask and a pattern are given, one has another shape, a mask holds anything but 0 and 1, or
            a size is negative. When called, if a state brought indices of other shapes, or none of a layer.
        TypeError: if ``mask`` is a pattern, or ``pattern`` is not; if ``param_dtype`` is not real floating-point, or a
            size no whole number.
    """

    indptr: PatternIndex
    rows: PatternIndex
    indices: PatternIndex
    starts: PatternIndex
    outputs: PatternIndex
    order: PatternIndex
    bits: PatternIndex | None = None
    firsts: PatternIndex | None = None
    keep_dormant: bool  # of the dense form that this was, and may become again

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mask: Any = None,
        pattern: SparsityPattern | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = nnx.initializers.lecun_normal(),  # noqa: B008 - as in nnx.Linear
        bias_init: Any = nnx.initializers.zeros_init(),  # noqa: B008
        init_fan_in: Literal["live", "full"] = "live",
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(in_features, out_features)
        check_options(init_fan_in, param_dtype)
        given = mask
        pattern = _pattern(mask, pattern, (out_features, in_features))
        self.in_features, self.out_features, self.init_fan_in = in_features, out_features, init_fan_in
        self.dtype, self.param_dtype, self.keep_dormant = dtype, param_dtype, True
        size, live = pattern.nnz, np.diff(pattern.indptr)
        values = on_device(np.zeros(0), param_dtype)
        if size:
            of_each = live[pattern.rows] if init_fan_in == "live" else in_features
            drawn, scale = kernel_init(rngs.params(), (size, 1), param_dtype), np.sqrt(size / of_each)
            if is_traced(drawn) or getattr(drawn, "committed", False):
                values = drawn[:, 0] * jnp.asarray(scale, param_dtype)
            else:
                values = on_device(to_host(drawn)[:, 0] * scale.astype(param_dtype), param_dtype)
        self.weight_values = nnx.Param(values)
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        self._set_pattern(pattern)
        remember_recipe(self.indices, given)

    def __call__(self, inputs: Array) -> Array:
        """Apply the layer: shape ``(..., in)`` to ``(..., out)``."""
        bias = None if self.bias is None else self.bias[...]
        inputs, values, bias = dtypes.promote_dtype(
            (as_array("inputs", inputs), self.weight_values[...], bias), dtype=self.dtype
        )
        pattern = self._device_pattern()
        traced = any(map(is_traced, pattern.arrays))
        if not traced and not _are_known(pattern):
            self.pattern  # noqa: B018 - raises if they contradict each other
            _remember(pattern)
        return product(inputs, values, pattern, self.in_features, bias, check=traced)

    @property
    def pattern(self) -> SparsityPattern:
        """The connections, (out, in); its ``rows`` and ``indices`` are the two ends of each of ``weight_values``.

        Raises:
            ValueError: if a state brought indices that are none of a layer of this shape, or do not belong together.
        """
        here = {name: to_host(array) for name, array in self._device_pattern().named.items()}
        pattern = SparsityPattern(here["indptr"], here["indices"], self.in_features)
        if self.bits is not None:
            pattern = PatternWithBits.of(pattern)
        found = {"rows": pattern.rows} | dict(zip(("starts", "outputs", "order"), pattern.csc, strict=True))
        found |= dict(zip(("bits", "firsts"), kept_bits(pattern), strict=False))
        for name, expected in found.items():
            if not np.array_equal(here[name], expected):
                raise ValueError(
                    f"{name} must belong to the same connections as indptr and indices; got others: restore the "
                    "layer's state, with maskedlinear.flax.load_state"
                )
        return pattern

    @property
    def patterns(self) -> list[SparsityPattern]:
        """The connections of each layer of a stack of layers, by ``nnx.vmap``; of a layer alone in a list of one."""
        starts, inputs = to_host(self.indptr.get_value()), to_host(self.indices.get_value())
        starts = starts.reshape(-1, starts.shape[-1])
        pairs = zip(starts, inputs.reshape(len(starts), -1), strict=True)
        return [SparsityPattern(*pair, self.in_features) for pair in pairs]

    @property
    def sparsity(self) -> float:
        """The fraction of connections that are not there, in [0, 1]; 0 for a layer of no size."""
        size = self.in_features * self.out_features
        return (size - self.weight_values[...].size) / size if size else 0.0

    @classmethod
    def from_masked(cls, layer: MaskedLinear) -> Self:
        """Return the sparse form of a ``MaskedLinear``: its live weights and its bias, copied; what is dormant is left out.

        Raises:
            TypeError: if ``layer`` is no ``MaskedLinear``.
        """
        if not isinstance(layer, MaskedLinear):
            raise TypeError(
                f"from_masked takes a MaskedLinear; got {type(layer).__name__}: make one with "
                "MaskedLinear.from_linear(layer, mask)"
            )
        pattern = SparsityPattern.from_mask(to_host(layer.mask[...]).T)
        kernel = layer.kernel[...]
        with jax.default_device(device_of(kernel)):
            values = kernel[pattern.indices, pattern.rows]
            made = cls._made(pattern, values, None if layer.bias is None else layer.bias[...])
        _lay_whole(made, kernel)
        made.dtype, made.init_fan_in = layer.dtype, layer.init_fan_in
        made.keep_dormant = layer.dormant is not None
        remember_recipe(made.indices, recipe_of(layer.mask))
        in_other_form(made, layer, pattern)
        return made

    @classmethod
    def from_edges(
        cls,
        outputs: ArrayLike,
        inputs: ArrayLike,
        shape: tuple[int, int],
        values: ArrayLike | None = None,
        bias: ArrayLike | bool = True,
        **options: Any,
    ) -> Self:
        """Return a layer with the edges of a list, in any order.

        Args:
            outputs: shape ``(edges,)``: the output of each edge.
            inputs: shape ``(edges,)``: its input.
            shape: ``(out, in)``, as that of a pattern.
            values: shape ``(edges,)``, edge by edge; drawn if ``None``.
            bias: shape ``(out,)``; or whether there is one, of zeros where ``values`` are given.
            options: those of the class; ``rngs`` where values are drawn, ``param_dtype`` and ``dtype``.

        Raises:
            ValueError: if an edge is there twice or leaves the shape, or ``values`` or ``bias`` has another length.
            TypeError: if indices are not whole numbers, or ``values`` or ``bias`` is not real.
        """
        pattern, order = SparsityPattern.from_edges(np.asarray(outputs), np.asarray(inputs), shape)
        if values is None:
            if not isinstance(bias, bool):
                raise ValueError(
                    "a bias that is given needs values that are given; got values=None: pass both, or bias=True"
                )
            return cls(pattern.shape[1], pattern.shape[0], pattern=pattern, use_bias=bias, **options)
        given = as_array("values", values)
        if given.shape != order.shape:
            raise ValueError(f"values must have one entry for each of the {len(order)} edges; got {given.shape}")
        return cls._made(pattern, given[order], bias, **options)

    @classmethod
    def from_scipy(cls, matrix: Any, bias: ArrayLike | bool = True, **options: Any) -> Self:
        """Return a layer whose W is the transpose of a ``scipy.sparse`` matrix of shape ``(out, in)``.

        Each stored entry is a connection.

        Args:
            matrix: a sparse matrix or array.
            bias: shape ``(out,)``; or whether there is one, of zeros.
            options: ``param_dtype`` and ``dtype``, as those of the class.

        Raises:
            ValueError: if an entry is stored twice, or ``bias`` has another length.
            TypeError: if ``matrix`` is not sparse, or it or ``bias`` is not real.
        """
        pattern, data = SparsityPattern.from_scipy(matrix, orientation="out_in")
        return cls._made(pattern, jnp.asarray(data, options.get("param_dtype", jnp.float32)), bias, **options)

    def to_scipy(self) -> Any:
        """Return the transpose of W as a ``scipy.sparse.csr_array`` of shape ``(out, in)``, which :meth:`from_scipy` takes.

        A copy. Half types, which scipy has not, become float32. The bias is not in it.

        Raises:
            ModuleNotFoundError: if scipy is not installed.
        """
        return self.pattern.to_scipy(to_host(self.weight_values[...]))

    def to_masked(self) -> MaskedLinear:
        """Return the dense form with the same outputs: a copy, whose dormant weights are 0."""
        pattern, bias = self.pattern, None if self.bias is None else self.bias[...]
        values = self.weight_values[...]
        with jax.default_device(device_of(values)):
            layer = MaskedLinear(
                self.in_features,
                self.out_features,
                mask=pattern.to_mask().T,
                init_fan_in=self.init_fan_in,
                keep_dormant=self.keep_dormant,
                use_bias=bias is not None,
                dtype=self.dtype,
                param_dtype=values.dtype,
                kernel_init=nnx.initializers.zeros,
                rngs=nnx.Rngs(0),
            )
            layer.kernel.set_value(layer.kernel[...].at[pattern.indices, pattern.rows].set(values))
        _lay_whole(layer, values)
        if layer.bias is not None and bias is not None:
            layer.bias.set_value(jnp.array(bias))
        remember_recipe(layer.mask, recipe_of(self.indices))
        in_other_form(layer, self, pattern)
        return layer

    def rewire(self, pattern: SparsityPattern | Sequence[SparsityPattern], source: ArrayLike) -> None:
        """Exchange connections for as many others, in place: the Variables stay the same, and nothing is compiled anew.

        What an optimizer keeps of the values is not touched; :func:`maskedlinear.flax.regrow_model` moves it along.

        Args:
            pattern: the new connections, as many as before and of the same shape; of each layer of a stack.
            source: shape ``(nnz,)``: where each of them is among the old ones, or -1 for a new one, whose value
                becomes 0; as :func:`maskedlinear.pruning.regrow_pattern` returns it. Of a stack, of the values' shape.

        Raises:
            ValueError: if ``pattern`` has another shape or number of connections, or ``source`` does not fit.
        """
        values, places = self.weight_values[...], np.asarray(source)
        patterns = [pattern] if isinstance(pattern, SparsityPattern) else list(pattern)
        nnz, shape = values.shape[-1], (self.out_features, self.in_features)
        if any(one.shape != shape for one in patterns) or places.shape != values.shape:
            raise ValueError(
                f"a layer is rewired to as many connections, {nnz}, of shape (out, in) = {shape}; got {pattern} and a "
                f"source of shape {places.shape}"
            )
        if any(one.nnz != nnz for one in patterns) or nnz * len(patterns) != values.size or (places >= nnz).any():
            raise ValueError(f"source must say where each of the {nnz} connections was, or -1")
        check_keeps_fixed(self, "weight_values", places)
        moved = jnp.take_along_axis(values, jnp.asarray(np.maximum(places, 0)), axis=-1)
        new = jnp.where(places >= 0, moved, jnp.zeros((), values.dtype))
        self.weight_values.set_value(to_like(new, values))
        self._set_arrays(patterns, values.shape[:-1])
        move_constraints(self, places)
        keep_own(self, "weight_values", None, jnp.asarray(places >= 0))

    def take_patterns(self, patterns: Sequence[SparsityPattern]) -> None:
        """Take as many other connections, of each layer of a stack: those that were there keep their values."""
        if list(patterns) != self.patterns:
            places = [new.places_in(old) for new, old in zip(patterns, self.patterns, strict=True)]
            self.rewire(patterns, np.stack(places).reshape(self.weight_values.get_value().shape))

    @classmethod
    def _made(cls, pattern: SparsityPattern, values: Array, bias: ArrayLike | bool | None, **options: Any) -> Self:
        """Return a layer with these values."""
        _check_real("values", values)
        out, in_ = pattern.shape
        dtype = options.pop("param_dtype", values.dtype)
        if isinstance(bias, bool):
            bias = jnp.zeros(out, dtype) if bias else None
        given = None if bias is None else as_array("bias", bias)
        _check_real("bias", given)
        if given is not None and given.shape != (out,):
            raise ValueError(f"bias must have shape ({out},), one entry an output; got {given.shape}")
        zeros = nnx.initializers.zeros
        layer = cls(
            in_,
            out,
            pattern=pattern,
            use_bias=given is not None,
            param_dtype=dtype,
            kernel_init=zeros,
            bias_init=zeros,
            **({"rngs": nnx.Rngs(0)} | options),
        )
        layer.weight_values[...] = jnp.array(values, dtype)
        if layer.bias is not None and given is not None:
            layer.bias[...] = jnp.array(given, dtype)
        return layer

    def _set_pattern(self, pattern: SparsityPattern) -> None:
        for name, array in zip(DevicePattern._fields, jax.tree.leaves(pattern), strict=False):  # bits may not be there
            setattr(self, name, PatternIndex(on_device(array)))

    def _complete_pattern(self) -> None:
        """Make of ``indptr`` and ``indices``, which a state has brought, the other indices."""
        self._set_arrays(self.patterns, self.indptr.get_value().shape[:-1])

    def _keep_bits(self) -> None:
        """Keep bits from now on, unless there are so few connections that no product goes by them."""
        indices = self.indices.get_value()
        if self.bits is not None or not has_bits(self.out_features, self.in_features, indices.shape[-1]):
            return
        form: Any = partial(form_bits, in_features=self.in_features)
        for _ in indices.shape[:-1]:
            form = jax.vmap(form)
        sharding, where = getattr(indices, "sharding", None), None
        if isinstance(sharding, NamedSharding) and not is_traced(indices):  # whole on each device, of each of a stack
            of_stack = PartitionSpec(*tuple(sharding.spec)[: indices.ndim - 1])  # type: ignore[no-untyped-call]
            where = NamedSharding(sharding.mesh, of_stack)
        abstract = isinstance(indices, jax.ShapeDtypeStruct)
        make: Any = partial(jax.eval_shape, form) if abstract else jax.jit(form, out_shardings=where)
        formed = make(self.indptr.get_value(), self.rows.get_value(), indices)
        self.bits, self.firsts = (PatternIndex(array) for array in formed)

    def _set_arrays(self, patterns: Sequence[SparsityPattern], stack: tuple[int, ...]) -> None:
        """Set the indices to those of patterns, stacked as the layers are."""
        if self.bits is not None:
            patterns = [PatternWithBits.of(pattern) for pattern in patterns]
        every = [DevicePattern(*jax.tree.leaves(pattern)).named for pattern in patterns]
        for name in every[0]:
            arrays = np.stack([one[name] for one in every])
            array = arrays.reshape(*stack, *arrays.shape[1:])
            variable = getattr(self, name)
            if variable is None:  # a state has brought bits alone
                self.firsts = variable = PatternIndex(jnp.asarray(array))
            variable.set_value(to_like(array, variable.get_value(), name))

    def _device_pattern(self) -> DevicePattern:
        """Return the indices, whose shapes are checked: a state may have brought any."""
        variables = [getattr(self, name) for name in DevicePattern._fields]
        if (self.bits is None) != (self.firsts is None):
            raise ValueError(
                "bits and firsts belong together; got a state with one of them alone: restore both, or neither, with "
                "maskedlinear.flax.load_state"
            )
        found = DevicePattern(*(one.get_value() for one in variables if one is not None))
        each = self.weight_values[...].shape
        if len(each) != 1:
            raise ValueError(
                f"a stack of layers has a pattern for each of them; got values of shape {each}: call them side by side "
                "with nnx.vmap, or one after the other with nnx.scan"
            )
        of_bits = self.out_features, words_of(self.in_features)
        expected = ((self.out_features + 1,), each, each, (self.in_features + 1,), each, each, of_bits, of_bits)
        for (name, array), shape in zip(found.named.items(), expected, strict=False):
            if array.shape != shape:
                raise ValueError(
                    f"{name} must have shape {shape} in a layer {self.in_features} -> {self.out_features} with "
                    f"{math.prod(each)} values; got {array.shape}: restore the state of a layer of this size, all of it"
                )
        return found


_known: dict[int, tuple[weakref.ref[Any], ...]] = {}  # indices that were checked, by the identity of the first


def _are_known(pattern: DevicePattern) -> bool:
    references = _known.get(id(pattern.indptr), ())
    arrays = pattern.arrays
    same_number = len(references) == len(arrays)
    return same_number and all(known() is array for known, array in zip(references, arrays, strict=True))


def _remember(pattern: DevicePattern) -> None:
    if all(isinstance(array, jax.Array) for array in pattern.arrays):  # nobody can write to it
        key = id(pattern.indptr)
        _known[key] = (
            weakref.ref(pattern.indptr, lambda _: _known.pop(key, None)),
            *map(weakref.ref, pattern.arrays[1:]),
        )


def _lay_whole(layer: Any, weights: Any) -> None:
    """Lay all that a layer has on the devices of the weights that it was made of, whole on each, if these are several."""
    if device_of(weights) is None and not is_traced(weights) and isinstance(weights.sharding, NamedSharding):
        sharding = NamedSharding(weights.sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        for name, part in vars(layer).items():
            if isinstance(part, nnx.Variable):
                part.set_value(laid(part.get_value(), sharding, name))


def _check_real(name: str, array: Any) -> None:
    if jnp.iscomplexobj(array):
        raise TypeError(f"{name} must be real; got {array.dtype}: take the real part, if the imaginary one may go")


def _pattern(mask: Any, pattern: Any, shape: tuple[int, int]) -> SparsityPattern:
    out, in_ = shape
    if mask is not None and pattern is not None:
        raise ValueError("a layer takes a mask or a pattern; got both: pass one of them")
    if isinstance(mask, SparsityPattern):
        raise TypeError(
            "mask must be an array of shape (in, out); got a SparsityPattern, (out, in): pass it as pattern=..."
        )
    if pattern is not None:
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(
                f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}: an array of shape "
                "(in, out) is passed as mask=..."
            )
        if pattern.shape != shape:
            fits = ", which is its transpose" if pattern.shape == shape[::-1] else ""
            raise ValueError(f"a pattern must have the layer's shape (out, in) = {shape}; got {pattern.shape}{fits}")
        return pattern
    if mask is None:
        return SparsityPattern.full(shape)
    mask = mask.make(shape).T if isinstance(mask, Recipe) else np.asarray(mask)
    if mask.shape != (in_, out):
        fits = ", which is its transpose: pass mask.T" if mask.shape == shape else ""
        raise ValueError(f"a mask must have the kernel's shape (in, out) = {(in_, out)}; got {mask.shape}{fits}")
    return SparsityPattern.from_mask(mask.T)
