"""``SparseLinear``: the masked layer with parameters for its live connections only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.fx
from numpy.typing import ArrayLike
from torch import Tensor, nn

from maskedlinear.constraints import Constraints
from maskedlinear.masks import Recipe
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._constraints import (
    check_keeps_fixed,
    keep,
    load_constraints,
    save_constraints,
    set_constraints,
    taken_from,
    watch_constrained,
)
from maskedlinear_torch._dtensors import full_tensor, is_sharded
from maskedlinear_torch._functional import FLOATING, checked_mask
from maskedlinear_torch._layer import MaskedLinear
from maskedlinear_torch._masked_weight import KeepDormant
from maskedlinear_torch._products import DevicePattern, Matrix, may_be_one_row
from maskedlinear_torch._sparse import product, real_tensor
from maskedlinear_torch._sparse_shards import (
    Cut,
    check_alike_where_shared,
    draw,
    live_weights,
    moved,
    part_of,
    refuse_cut_twice,
    resize_and_copy,
    settle,
    whole_values,
)
from maskedlinear_torch._sparse_state import load_pattern, named_buffers, save_pattern, shared_out_as

__all__ = ["SparseLinear"]


def _forward(x: Tensor, values: Tensor, pattern: tuple[Tensor, ...], in_features: int, bias: Tensor | None) -> Tensor:
    return product(x, values, DevicePattern(*pattern), in_features, bias)


torch.fx.wrap("_forward")  # one node of a traced graph: the checks of its arguments cannot be traced


class SparseLinear(nn.Module):
    """A linear layer with one trainable value a connection: ``y = x · Wᵀ + bias``, W being 0 where there is none.

    Parameters, gradients, optimizer state, files and time cost what the connections cost; no matrix of the layer's shape
    is ever made (but, on GPUs, of what fits a panel of 32 MiB). Which connections there are is fixed;
    :class:`MaskedLinear` is the form whose mask can change. Every optimizer leaves what is not there alone, so none needs
    a guard.

    ``state_dict`` has the keys ``weight_values``, ``bias``, ``indptr`` and ``indices``, in the order of
    :class:`maskedlinear.pattern.SparsityPattern`. Loading one brings its own connections along, whatever those of the
    layer were. A state that calls ``weight_values`` by its earlier name, ``values``, loads too.
    The connections are no buffers: averages of a model average values alone, and ``DistributedDataParallel`` sends none of
    them; give each process the same. FSDP2 cuts the values, and every process knows all connections; for tensor parallelism
    there are :class:`maskedlinear.torch.SparseColwiseParallel` and :class:`maskedlinear.torch.SparseRowwiseParallel`. A
    distributed checkpoint (DCP) with another number of connections says ``Size mismatch``: give the model its connections
    first, by :func:`maskedlinear.torch.load_patterns`.

    Args:
        in_features: the size of x's last dimension.
        out_features: the size of y's last dimension.
        bias: whether the layer has a bias, shape ``(out_features,)``.
        mask: which connections there are: an array of shape ``(out_features, in_features)``, booleans or 0s and 1s, a
            :class:`maskedlinear.masks.Recipe`, or a :class:`maskedlinear.pattern.SparsityPattern`. ``None`` has all of them,
            which is rarely worth it.
        pattern: the same as a :class:`maskedlinear.pattern.SparsityPattern` of shape ``(out_features, in_features)``,
            in place of ``mask``.
        init_fan_in: what :meth:`reset_parameters` scales the values to: each row's ``"live"`` inputs, or the ``"full"``
            number of inputs, as ``nn.Linear`` does.
        device: as in ``nn.Linear``.
        dtype: as in ``nn.Linear``; a real floating dtype.

    Shapes:
        x ``(..., in_features)``; y ``(..., out_features)``.

    Raises:
        ValueError: if both a mask and a pattern are given, one has another shape, or a mask holds anything but 0 and 1,
            is sparse or has no values (``"meta"``).
        TypeError: if ``dtype`` is none of float64, float32, bfloat16 and float16, or ``pattern`` is not a pattern.
    """

    weight_values: nn.Parameter
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor
    starts: Tensor
    outputs: Tensor
    order: Tensor
    recipe: Recipe | None = None  # what the connections were made of; whoever relies on it sees whether they still are
    constraints: Constraints | None = None  # of connections; set by constrain
    keep_dormant: KeepDormant = True  # of the dense form that this was, and may become again
    _matrix: Matrix
    _cut: Cut | None = None  # by tensor parallelism
    _look: Callable[..., None] | None = None  # of dense_gradients
    _output_layouts: tuple[
        Any, ...
    ] = ()  # of its outputs, where its inputs are shared out; all of them everywhere if none

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        mask: Any = None,
        *,
        pattern: SparsityPattern | None = None,
        init_fan_in: Literal["live", "full"] = "live",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOATING:
            raise TypeError(
                f"dtype must be a real floating-point dtype of torch (float64, float32, bfloat16 or float16); got {dtype!r}"
            )
        if init_fan_in not in ("live", "full"):
            raise ValueError(f"init_fan_in must be 'live' or 'full'; got {init_fan_in!r}")
        if hasattr(bias, "__len__"):
            raise TypeError(f"bias must be True or False; got {type(bias).__name__}: a mask is passed as mask=...")
        pattern = _pattern(mask, pattern, (out_features, in_features))
        super().__init__()
        self.in_features, self.out_features, self.init_fan_in = in_features, out_features, init_fan_in
        self.keep_dormant = True
        if isinstance(mask, Recipe):
            self.recipe = mask
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_values = nn.Parameter(torch.empty(pattern.nnz, **options))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, **options)) if bias else None)
        self._pattern = pattern
        self._place()
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """Return y: shape ``(..., in)`` to ``(..., out)``."""
        if self._cut is not None:
            return self._parallel(input, self._cut)
        if not torch.is_grad_enabled() and may_be_one_row(input, self.in_features):
            y = self._matrix.times(input, self.weight_values, self.indptr, self.indices, self.bias)
            if y is not None:
                return y
        values = self._parameters.get("weight_values")
        if values is not None and not torch.compiler.is_compiling() and self.indptr.device != values.device:
            self._place()  # FSDP2 moves parameters by itself
        pattern = (self.indptr, self.indices, self.starts, self.outputs, self.order)
        return _forward(input, self.weight_values, pattern, self.in_features, self.bias)

    def _parallel(self, input: Tensor, cut: Cut) -> Tensor:
        """Return y of this process' part of the layer, a DTensor."""
        x = cut.own_inputs(input)
        indices = (self.indptr, self.indices, self.starts, self.outputs, self.order)
        bias = None if self.bias is None or cut.dim else self.bias.to_local()  # type: ignore[attr-defined]
        y: Tensor = cut.outputs(
            _forward(x, cut.own(self.weight_values), indices, x.shape[-1], bias), self._output_layouts
        )
        y = y if self.bias is None or not cut.dim else y + self.bias
        if self._look is not None:
            self._look(self, (input,), {}, y)
        return y

    @property
    def pattern(self) -> SparsityPattern:
        """The connections; its ``rows`` and ``indices`` are the two ends of each of ``weight_values``."""
        return self._pattern

    @property
    def weight(self) -> Tensor:
        """W as a matrix, shape ``(out_features, in_features)``, for code that reads it past ``forward``.

        Made anew each time; differentiable in ``weight_values``. What is written to it is lost.
        """
        values = whole_values(self.weight_values, self._cut)
        rows, columns = DevicePattern.of(self._pattern, values.device).ends()
        places = rows.long() * self.in_features + columns
        flat = values.new_zeros(self.out_features * self.in_features)
        return flat.index_copy(0, places, values).view(self.out_features, self.in_features)

    @property
    def sparsity(self) -> float:
        """The fraction of connections that are not there, in [0, 1]; 0 for a layer of no size."""
        size = self.in_features * self.out_features
        return (size - self._pattern.nnz) / size if size else 0.0

    def reset_parameters(self) -> None:
        """Draw values and bias anew: from U(-1/√n, 1/√n), n a row's live inputs, or all with ``init_fan_in="full"``.

        The range is nn.Linear's, with :class:`MaskedLinear`'s correction for sparse rows; the draws are fewer, so a
        MaskedLinear made from the same seed holds other values. A row without connections draws its bias as nn.Linear does.
        """
        if self.weight_values.is_meta:
            return
        with torch.no_grad():
            settle(self)
            live = DevicePattern.of(self._pattern, self.weight_values.device).indptr.diff()
            counts = live if self.init_fan_in == "live" else torch.full_like(live, self.in_features)
            counts = torch.where(live > 0, counts, self.in_features).clamp(min=1)
            bound = counts.double().rsqrt().to(self.weight_values.dtype)
            draw(self.weight_values, bound.repeat_interleave(live), self._cut)
            if self.bias is not None:
                draw(self.bias, bound)

    @classmethod
    def from_masked(cls, layer: MaskedLinear) -> Self:
        """Return the sparse form of a ``MaskedLinear``: its live weights and its bias, copied; what is dormant is left out.

        A layer on the meta device gives one there, with the connections of the mask that it waits with. Of a layer that
        processes share, each gets a whole one; all call it, and gather live weights alone.

        Raises:
            TypeError: if ``layer`` is no ``MaskedLinear``.
        """
        if not isinstance(layer, MaskedLinear):
            raise TypeError(
                f"from_masked takes a MaskedLinear; got {type(layer).__name__}: make one with "
                "MaskedLinear.from_linear(layer, mask)"
            )
        with torch.no_grad():
            pattern, live = live_weights(layer)
            made = cls._made(pattern, live, None if layer.bias is None else full_tensor(layer.bias))
        made.init_fan_in, made.keep_dormant = layer.init_fan_in, layer.keep_dormant
        if layer.recipe is not None:
            made.recipe = layer.recipe
        set_constraints(made, layer.constraints)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(getattr(layer, "weight" if name == "weight_values" else name).requires_grad)
        return made.train(layer.training)

    @classmethod
    def from_edges(
        cls,
        outputs: ArrayLike,
        inputs: ArrayLike,
        shape: tuple[int, int],
        values: ArrayLike | Tensor | None = None,
        bias: ArrayLike | Tensor | bool = True,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return a layer with the edges of a list, in any order.

        Args:
            outputs: shape ``(edges,)``: the output of each edge.
            inputs: shape ``(edges,)``: its input.
            shape: ``(out, in)``.
            values: shape ``(edges,)``, edge by edge, copied; drawn if ``None``.
            bias: shape ``(out,)``, copied; or whether there is one, of zeros where ``values`` are given.
            device: as in ``nn.Linear``; where ``values`` are if ``None`` and they are a tensor.
            dtype: as in ``nn.Linear``; that of ``values`` if ``None`` and they are a tensor.

        Raises:
            ValueError: if an edge is there twice or leaves the shape, or ``values`` or ``bias`` has another length.
            TypeError: if indices are not whole numbers, or ``values`` or ``bias`` are complex.
        """
        pattern, order = SparsityPattern.from_edges(outputs, inputs, shape)
        if values is None and isinstance(bias, bool):
            return cls(pattern.shape[1], pattern.shape[0], bias, pattern=pattern, device=device, dtype=dtype)
        if values is None:
            raise ValueError(
                "a bias that is given needs values that are given; got values=None: pass both, or bias=True"
            )
        if not isinstance(values, Tensor):
            dtype = dtype or torch.get_default_dtype()
        values = real_tensor("values", values).to(device=device, dtype=dtype)
        if values.shape != order.shape:
            raise ValueError(
                f"values must have one entry for each of the {len(order)} edges; got {tuple(values.shape)}"
            )
        return cls._made(pattern, values[torch.from_numpy(order).to(values.device)], bias)

    @classmethod
    def from_scipy(cls, matrix: Any, bias: ArrayLike | bool = True, **options: Any) -> Self:
        """Return a layer whose W is a ``scipy.sparse`` matrix of shape ``(out, in)``; each stored entry is a connection.

        Args:
            matrix: a sparse matrix or array.
            bias: shape ``(out,)``; or whether there is one, of zeros.
            options: ``device`` and ``dtype``, as in ``nn.Linear``.

        Raises:
            ValueError: if an entry is stored twice, or ``bias`` has another length.
            TypeError: if ``matrix`` is not sparse, or it or ``bias`` is complex.
        """
        pattern, data = SparsityPattern.from_scipy(matrix, orientation="out_in")
        options = {"dtype": options.pop("dtype", None) or torch.get_default_dtype(), **options}
        values = torch.tensor(np.asarray(data), **options)
        return cls._made(pattern, values, bias)

    def to_scipy(self) -> Any:
        """Return W as a ``scipy.sparse.csr_array`` of shape ``(out, in)``, for :meth:`from_scipy`; a copy, on the CPU.

        Half types, which scipy has not, become float32. The bias is not in it.

        Raises:
            ModuleNotFoundError: if scipy is not installed.
        """
        # Memory that NumPy has seen cannot be freed by FSDP2.
        values = whole_values(self.weight_values.detach(), self._cut).to("cpu", copy=True)
        return self.pattern.to_scipy((values.float() if values.itemsize < 4 else values).numpy())

    def to_masked(self) -> MaskedLinear:
        """Return the dense form with the same outputs: a copy, whose dormant weights are 0; on the meta device one there.

        Of a layer that processes share, each gets a whole one, and all call it.
        """
        layer: MaskedLinear = nn.utils.skip_init(  # draws nothing from the random generator
            MaskedLinear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            init_fan_in=self.init_fan_in,
            keep_dormant=self.keep_dormant,
            device=self.weight_values.device,
            dtype=self.weight_values.dtype,
        )
        with torch.no_grad():
            layer.weight.zero_()  # before the mask makes something dormant
            layer.set_mask(self.pattern.to_mask())
            if self.recipe is not None:
                layer.recipe = self.recipe
            if not self.weight_values.is_meta:
                layer.weight[layer.mask] = whole_values(self.weight_values, self._cut)
            if self.bias is not None:
                layer.bias.copy_(full_tensor(self.bias))
        set_constraints(layer, self.constraints)
        for name, parameter in self.named_parameters():
            getattr(layer, "weight" if name == "weight_values" else name).requires_grad_(parameter.requires_grad)
        return layer.train(self.training)

    def rewire(self, pattern: SparsityPattern, source: ArrayLike) -> None:
        """Exchange connections for as many others, in place: the parameters stay the same objects.

        What an optimizer keeps of the values is not touched; :func:`maskedlinear.torch.regrow_model` moves it along. Where
        processes share the values, all of them call this, and each gathers this layer's values while they move.

        Args:
            pattern: the new connections, as many as before and of the same shape.
            source: shape ``(nnz,)``: where each of them is among the old ones, or -1 for a new one, whose value and
                gradient become 0; as :func:`maskedlinear.pruning.regrow_pattern` returns it.

        Raises:
            ValueError: if ``pattern`` has another shape or number of connections, or ``source`` does not fit; or if
                processes that share the values (FSDP2, tensor parallelism) are given different ones.
        """
        settle(self)
        places = torch.as_tensor(np.asarray(source), device=self.weight_values.device)
        old, new = self._pattern, pattern
        if new.shape != old.shape or places.shape != (old.nnz,):
            raise ValueError(
                f"a layer is rewired to as many connections, {old.nnz}, of shape (out, in) = {old.shape}; got {new} and a "
                f"source of shape {tuple(places.shape)}"
            )
        if new.nnz != old.nnz or bool((places >= old.nnz).any()):
            raise ValueError(f"source must say where each of the {old.nnz} connections was, or -1")
        refuse_cut_twice(self)
        check_keeps_fixed(self, np.asarray(source))
        check_alike_where_shared(self.weight_values, lambda: {"connections": new.places, "places": np.asarray(source)})
        with torch.no_grad():
            cut = None if self._cut is None else replace(self._cut, pattern=new)
            resize_and_copy(
                self.weight_values, lambda tensor: part_of(moved(tensor, places, 0.0, self._cut), tensor, cut)
            )
        self._pattern, self._cut = new, cut
        self._place()
        if self.constraints is not None:
            set_constraints(self, self.constraints.moved(new, np.asarray(source)))
            keep(self)

    def extra_repr(self) -> str:
        """Say the sizes, the number of connections and the sparsity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, connections={self._pattern.nnz}, "
            f"sparsity={self.sparsity:.4g}, bias={self.bias is not None}"
        )

    @classmethod
    def _made(cls, pattern: SparsityPattern, values: Tensor, bias: ArrayLike | Tensor | bool | None) -> Self:
        """Return a layer with copies of these; ``True`` is a bias of zeros."""
        out, in_ = pattern.shape
        if isinstance(bias, bool):
            bias = values.new_zeros(out) if bias else None
        bias = None if bias is None else real_tensor("bias", bias)
        if bias is not None and bias.shape != (out,):
            raise ValueError(f"bias must have shape ({out},), one entry an output; got {tuple(bias.shape)}")
        layer: Self = nn.utils.skip_init(
            cls, in_, out, bias is not None, pattern=pattern, device=values.device, dtype=values.dtype
        )
        with torch.no_grad():
            layer.weight_values.copy_(values)
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias)
        return layer

    def _place(self) -> None:
        """Put the indices of the pattern where the values are."""
        pattern = self._pattern if self._cut is None else self._cut.local
        indices = DevicePattern.of(pattern, self.weight_values.device)
        self.__dict__.update(indices._asdict(), _matrix=Matrix())  # the old one holds on to the values' old memory

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in (*DevicePattern._fields, "_matrix")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._place()
        watch_constrained(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._cut is not None:
            values = self.weight_values if keep_vars else self.weight_values.detach()
            destination[prefix + "weight_values"] = self._cut.evenly(values)
        save_pattern(self, destination, prefix)
        save_constraints(self, destination, prefix)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Go through the buffers, as in ``nn.Module``; for what torch sends to other processes, the connections too."""
        return named_buffers(self, super().named_buffers(prefix, recurse, remove_duplicate))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        settle(self)
        earlier, now = prefix + "values", prefix + "weight_values"
        if earlier in state_dict and now not in state_dict:
            state_dict = {now if key == earlier else key: kept for key, kept in state_dict.items()}
        state_dict = dict(state_dict)
        constraints = taken_from(state_dict, prefix)
        if not load_pattern(self, state_dict, prefix, strict, missing_keys, error_msgs):
            return
        for key, own in ((now, self.weight_values), (prefix + "bias", self.bias)):
            if isinstance(given := state_dict.get(key), Tensor) and own is not None and is_sharded(own):
                state_dict[key] = shared_out_as(given, own, self)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._place()
        load_constraints(self, constraints, prefix, error_msgs)


def _pattern(mask: Any, pattern: Any, shape: tuple[int, int]) -> SparsityPattern:
    if min(shape) < 0:
        raise ValueError(f"a layer's sizes must not be negative; got in={shape[1]}, out={shape[0]}")
    if mask is not None and pattern is not None:
        raise ValueError("a layer takes a mask or a pattern; got both: pass one of them")
    if pattern is not None and not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"pattern must be a maskedlinear.pattern.SparsityPattern; got {type(pattern).__name__}: an array is passed as "
            "mask=..."
        )
    given = mask if pattern is None else pattern
    if given is None:
        return SparsityPattern.full(shape)
    if not isinstance(given, SparsityPattern):
        return SparsityPattern.from_mask(checked_mask(given, shape).cpu().numpy())
    if given.shape != shape:
        fits = ", which is its transpose" if given.shape == shape[::-1] else ""
        raise ValueError(f"a pattern must have the layer's shape (out, in) = {shape}; got {given.shape}{fits}")
    return given
