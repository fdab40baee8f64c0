"""``record_activations``: what goes into each weight over some data, of which Wanda, SparseGPT and OBS make their masks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.hooks import RemovableHandle

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear.models import ModelWeight, WeightAxes, first_names
from maskedlinear.pruning._layers import Include, check_known, matches
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._ranks import Group, group_of
from maskedlinear_torch._weights import model_weights

__all__ = ["Activations", "record_activations"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROJECTIONS = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}

Add = Callable[[Tensor], None]


class Activations:
    """Sums over all rows x that have gone into each weight: of squares, and of ``x xᵀ`` if asked for.

    A weight's outputs may be in groups with inputs of their own (grouped convolutions; query, key and value of
    ``in_proj_weight``): sums have the shape ``(groups, in)`` and ``(groups, in, in)``.

    Attributes:
        left_out: why weights are not recorded, by name.
    """

    def __init__(self, weights: Mapping[str, ModelWeight], hessian: bool, dtype: torch.dtype | None) -> None:
        self.left_out: dict[str, str] = {}
        self._weights = dict(weights)
        self._sums: dict[str, _Sums] = {}
        self._padding: Tensor | None = None
        for name, weight in weights.items():
            axes, why = weight.axes, _why_not(weight)
            if why or axes is None:
                self.left_out[name] = why or "its axes are not known: tell them by register_axes"
                del self._weights[name]
                continue
            module, parameter = weight.users[0].module, weight.users[0].parameter
            groups = 3 if parameter == "in_proj_weight" else getattr(module, "groups", 1)
            width = axes.matrix_shape(tuple(weight.value.shape))[2]
            kind = dtype or (torch.float64 if weight.value.dtype is torch.float64 else torch.float32)
            self._sums[name] = _Sums(groups, width, hessian, weight.value.device, kind)

    @property
    def names(self) -> list[str]:
        """The names of the weights whose inputs are recorded, those of :func:`get_masks`."""
        return list(self._weights)

    def count_only(self, mask: Tensor | None) -> None:
        """Count only some positions from the next call of the model on: those of tokens, not of padding.

        Args:
            mask: true where a position counts, of the shape of inputs without their last dimension, ``(batch, length)``;
                inputs of fewer dimensions (of a pooler) count in full. ``None`` counts all.
        """
        self._padding = None if mask is None else mask.detach().bool()

    def input_norms(self, name: str) -> NDArray[Any]:
        """Return ``‖x‖₂`` of each input of a weight, read as a matrix: shape ``(groups, in)``.

        Raises:
            ValueError: if there is no such weight, or nothing has gone into it.
        """
        return as_numpy(self._of(name).squares.sqrt())

    def hessian(self, name: str) -> NDArray[Any]:
        """Return ``2/n Σ x xᵀ`` over the n rows that have gone into a weight: shape ``(groups, in, in)``.

        Raises:
            ValueError: if there is no such weight, nothing has gone into it, or no Hessians were asked for.
        """
        sums = self._of(name)
        if sums.products is None:
            raise ValueError("Hessians are recorded only if asked for: record_activations(model, hessian=True)")
        return as_numpy(sums.products * (2 / sums.rows))

    def wanda(self, include: Include = None) -> dict[str, NDArray[np.float64]]:
        """Return :func:`maskedlinear.pruning.wanda` of each recorded weight, by name and of its own shape.

        Args:
            include: which weights, as in :func:`mask_model`.

        Raises:
            ValueError: if nothing has gone into one of them.
        """
        scores = {}
        for name, weight in self._weights.items():
            if matches(name, weight.users[0].module, include):
                value, axes = as_numpy(weight.value), weight.axes or WeightAxes()
                norms = self.input_norms(name)
                parts = axes.matrices(value)[0].reshape(len(norms), -1, norms.shape[1])
                rows = np.stack([pruning.wanda(part, own) for part, own in zip(parts, norms, strict=True)])
                scores[name] = np.ascontiguousarray(axes.from_matrices(rows, value.shape))
        return scores

    def _of(self, name: str) -> _Sums:
        if name in self.left_out:
            raise ValueError(
                f"what goes into {name} is not recorded: {self.left_out[name]}; leave it out with include=..."
            )
        check_known("names", [name], self.names)
        if not self._sums[name].rows:
            raise ValueError(
                f"nothing has gone into {name or 'the layer'}: call the model, not compiled, inside record_activations; or "
                "leave it out with include=..., if it is not used or its weight is read past its module's forward"
            )
        return self._sums[name]

    def _add(self, name: str, x: Tensor, group: int | None = None) -> None:
        """Take down one input, shape ``(..., in)``, of all groups of a weight or of one of them."""
        if x.is_nested:
            raise ValueError("nested tensors are not recorded: pass padded ones, and count_only(mask)")
        padding = self._padding
        if padding is not None and padding.numel() and x.dim() > 1:
            if tuple(x.shape[:-1]) == tuple(padding.shape):
                x = x[padding.to(x.device)]
            elif x.dim() == 2 and len(x) == padding.numel():
                x = x[padding.reshape(-1).to(x.device)]
            elif x.dim() > padding.dim():
                raise ValueError(
                    f"count_only takes a mask of the shape of inputs without their last dimension; got "
                    f"{tuple(padding.shape)} where {name or 'the layer'} has an input of {tuple(x.shape)}"
                )
        self._sums[name].add(x.reshape(1, -1, x.shape[-1]), group)

    def _add_windows(self, name: str, module: Any, x: Tensor) -> None:
        """Take down the input of a convolution: each window of each group of channels is a row."""
        windows = _windows(module, x)
        rows = windows.reshape(len(windows), module.groups, -1).transpose(0, 1)
        self._sums[name].add(rows, None)


class _Sums:
    """What is summed up for a weight."""

    def __init__(self, groups: int, width: int, hessian: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.squares = torch.zeros(groups, width, device=device, dtype=dtype)
        self.products = torch.zeros(groups, width, width, device=device, dtype=dtype) if hessian else None
        self.rows = 0

    def add(self, rows: Tensor, group: int | None) -> None:
        """Add rows of shape ``(1 or groups, n, in)``, of the same to all groups, or to one."""
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            rows = rows.detach().to(self.squares.device, self.squares.dtype)
            own = slice(None) if group is None else slice(group, group + 1)
            self.squares[own] += rows.square().sum(dim=1)
            if self.products is not None:
                self.products[own] += rows.mT @ rows
        self.rows += rows.shape[1] if not group else 0  # one of several groups counts


@contextmanager
def record_activations(
    model: nn.Module,
    *,
    hessian: bool = False,
    include: Include = None,
    dtype: torch.dtype | None = None,
    group: Group = "model",
) -> Iterator[Activations]:
    """Record what goes into each weight of a model in the calls inside::

        model.eval()
        with record_activations(model) as activations:
            for batch in batches:
                model(batch)
        prune_model(model, 0.5, score=activations.wanda(), scope="row")

    Recorded are linear layers, masked ones too, ``Conv1D`` of Hugging Face, convolutions (each window is a row) and
    ``nn.MultiheadAttention`` (whose attention is computed once more). Weights of other modules (experts, recurrent cells),
    and those that processes have cut, are left out: a warning names them. For each weight it keeps a number an input, 4
    bytes, and with ``hessian`` a square of them: 4 · in² bytes, 64 MiB where there are 4096 inputs. Gradients are not
    followed; modules are as they were afterwards, whatever is raised inside. Meanwhile torch's fused
    inference paths of attention are off, in the whole process (``torch.backends.mha``). Calls inside ``torch.compile`` are
    not seen.

    Args:
        model: any module, whose weights are masked or not.
        hessian: whether ``x xᵀ`` is summed too, for :func:`prune_with_updates`.
        include: which weights, as in :func:`mask_model`. One block after the other costs less memory, and lets each see the
            pruned ones before it, as the authors of SparseGPT do.
        dtype: that sums are in; by default float32, of float64 weights float64.
        group: the processes whose data is summed at the end, as in :func:`prune_model`; all of them call this.

    Raises:
        ValueError: if there is nothing to record.
    """
    weights = {
        weight.name: weight
        for weight in model_weights(model)
        if weight.sparse is None
        and (weight.mask is not None or not weight.why)
        and any(matches(user.name, user.module, include) for user in weight.users)
    }
    activations = Activations(weights, hessian, dtype)
    if activations.left_out:
        reasons = [f"{name} ({why})" for name, why in activations.left_out.items()]
        warnings.warn(
            f"what goes into {first_names(reasons)} is not recorded: prune it by another score, or leave it out with "
            "include=...",
            stacklevel=3,
        )
    if not activations.names:
        raise ValueError(
            f"there is no weight to record the inputs of: include={include!r} means none of a linear layer, a convolution "
            "or an nn.MultiheadAttention whose weight processes have not cut"
        )
    ranks = group_of(model, group)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as handles:
        torch.backends.mha.set_fastpath_enabled(False)
        handles.callback(torch.backends.mha.set_fastpath_enabled, fast)
        for handle in _hooks(model, activations):
            handles.callback(handle.remove)
        yield activations
    if ranks is not None:
        for sums in activations._sums.values():
            rows = torch.tensor([sums.rows], device=sums.squares.device)
            for tensor in (sums.squares, sums.products, rows):
                if tensor is not None:
                    tensor.copy_(ranks.sum_(tensor.clone()))
            sums.rows = int(rows)


def _why_not(weight: ModelWeight) -> str:
    """Return why the inputs of a weight are not recorded; empty if they are."""
    if is_sharded(weight.value):
        return "processes have cut it"
    for user in weight.users:
        module, name = user.module, user.parameter
        known = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or type(module).__name__ == "Conv1D"
        attention = isinstance(module, nn.MultiheadAttention)
        if not (known and name == "weight") and not (attention and (name == "in_proj_weight" or name in _PROJECTIONS)):
            return f"nobody knows what goes into a {type(module).__name__}"
    return ""


def _hooks(model: nn.Module, activations: Activations) -> Iterator[RemovableHandle]:
    """Register what takes down the inputs of the modules that have recorded weights."""
    attentions: dict[int, tuple[Any, dict[str, str]]] = {}
    by_output = {id(one.out_proj): one for one in model.modules() if isinstance(one, nn.MultiheadAttention)}
    for name, weight in activations._weights.items():
        for user in weight.users:
            attention = by_output.get(id(user.module)) or user.module
            if isinstance(attention, nn.MultiheadAttention):
                attentions.setdefault(id(attention), (attention, {}))[1][user.parameter] = name
            else:
                yield user.module.register_forward_pre_hook(_taker(activations, name), with_kwargs=True)
    for attention, names in attentions.values():
        yield attention.register_forward_pre_hook(_attention_taker(activations, names), with_kwargs=True)


def _taker(activations: Activations, name: str) -> Any:
    def take(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = arguments[0] if arguments else next(iter(named.values()))
        if torch.compiler.is_compiling():
            return
        if isinstance(module, _CONVOLUTIONS):
            activations._add_windows(name, module, x)
        else:
            activations._add(name, x)

    return take


def _attention_taker(activations: Activations, names: dict[str, str]) -> Any:
    """Return a hook that takes down query, key and value, and the attention that goes into ``out_proj``."""
    inside = False

    def take(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal inside
        if inside or torch.compiler.is_compiling():
            return
        order = ("query", "key", "value")
        inputs = [arguments[at] if at < len(arguments) else named[key] for at, key in enumerate(order)]
        for parameter, name in names.items():
            if parameter == "in_proj_weight":
                for at, x in enumerate(inputs):
                    activations._add(name, x, at)
            elif parameter in _PROJECTIONS:
                activations._add(name, inputs[_PROJECTIONS[parameter]])
        if "weight" in names:
            like = module.out_proj.weight
            plain = {"out_proj.weight": torch.eye(len(like), dtype=like.dtype, device=like.device)}
            if module.out_proj.bias is not None:
                plain["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
            inside = True
            try:
                with torch.no_grad():
                    attended, _ = torch.func.functional_call(module, plain, arguments, named)
            finally:
                inside = False
            activations._add(names["weight"], attended)

    return take


def _windows(module: Any, x: Tensor) -> Tensor:
    """Return the windows that a convolution looks at, shape ``(positions, channels, *window)``."""
    sizes, count = module.kernel_size, len(module.kernel_size)
    if x.dim() == count + 1:
        x = x[None]
    if isinstance(module.padding, str):
        total = [d * (k - 1) if module.padding == "same" else 0 for d, k in zip(module.dilation, sizes, strict=True)]
        pads = [(whole // 2, whole - whole // 2) for whole in total]
    else:
        pads = [(pad, pad) for pad in module.padding]
    flat = [pad for pair in reversed(pads) for pad in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, flat, mode=mode) if any(flat) else x
    for axis, (size, step, apart) in enumerate(zip(sizes, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + axis, apart * (size - 1) + 1, step)[..., ::apart]
    positions = x.movedim(1, 1 + count)  # (batch, *positions, channels, *window)
    return positions.reshape(-1, *positions.shape[1 + count :])
