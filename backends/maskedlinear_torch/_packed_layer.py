"""``PackedLinear``: a sparse layer at rest, with its values in the order in which a few rows of x are multiplied fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.fx
from torch import Tensor, nn

from maskedlinear import kernels
from maskedlinear.constraints import Constraints
from maskedlinear.masks import Recipe
from maskedlinear.pattern import SparsityPattern
from maskedlinear_torch._compat import is_forward_mode
from maskedlinear_torch._constraints import save_constraints, set_constraints, taken_from
from maskedlinear_torch._masked_weight import KeepDormant
from maskedlinear_torch._products import DevicePattern, Matrix, are_ordinary_rows
from maskedlinear_torch._sparse import product
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_state import load_pattern, named_buffers, save_pattern

__all__ = ["PackedLinear"]

_MOST_ROWS = 4  # of x, from which on the products by rows are faster


def _by_rows(x: Tensor, values: Tensor, pattern: tuple[Tensor, ...], in_features: int, bias: Tensor | None) -> Tensor:
    return product(x, values, DevicePattern(*pattern), in_features, bias)


torch.fx.wrap("_by_rows")  # one node of a traced graph: the checks of its arguments cannot be traced


def _is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in its memory as they are."""
    is_float = tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
    return is_float and not tensor.is_neg() and tensor.data_ptr() != 0


class PackedLinear(nn.Module):
    """A :class:`SparseLinear` for inference, packed: ``y = x · Wᵀ + bias`` with buffers in place of parameters.

    Made by :func:`pack`, and turned back by :func:`unpack`. Up to four rows of x on the CPU go through the packed copy of
    the values, where :class:`maskedlinear.kernels.PackedMatrix` finds that it pays and llvmlite is there; more rows, other
    devices and dtypes, and compiled and exported programs through the products of :class:`SparseLinear`, and so does x that
    wants a gradient or is mapped over. Both copies are kept, and what is written to the values other
    than by ``tensor.data`` lets the packed one lie idle.

    ``state_dict`` has the keys of :class:`SparseLinear`, in the same order; either loads the state of the other, and a
    packed layer packs anew what it loads. Saved by pickle or copied, it packs anew too.

    Shapes:
        x ``(..., in_features)``; y ``(..., out_features)``.

    Attributes:
        weight_values: the values of the connections, shape ``(nnz,)``.
        bias: shape ``(out_features,)``, or ``None``.
    """

    weight_values: Tensor
    bias: Tensor | None
    recipe: Recipe | None = None
    constraints: Constraints | None = None
    keep_dormant: KeepDormant = True
    indptr: Tensor
    indices: Tensor
    starts: Tensor
    outputs: Tensor
    order: Tensor
    _cut: None = None
    _matrix: Matrix

    def __init__(self, layer: SparseLinear) -> None:
        """Take copies of a layer's values, with what it needs to become that layer again."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.init_fan_in, self.keep_dormant = layer.init_fan_in, layer.keep_dormant
        self._trained = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        self._pattern = layer.pattern
        with torch.inference_mode(False), torch.no_grad():  # what is written to must be seen
            self.register_buffer("weight_values", layer.weight_values.detach().clone())
            self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        if layer.recipe is not None:
            self.recipe = layer.recipe
        if layer.constraints is not None:
            self.constraints = layer.constraints
        self.eval()
        self._place()

    def forward(self, input: Tensor) -> Tensor:
        """Return y: shape ``(..., in)`` to ``(..., out)``.

        Raises:
            RuntimeError: if the layer is asked to train.
        """
        values, bias = self._buffers["weight_values"], self._buffers["bias"]
        assert values is not None
        grads = torch.is_grad_enabled()
        if grads and (self.training or values.requires_grad or (bias is not None and bias.requires_grad)):
            raise RuntimeError(
                "a packed layer is for inference, and its values have no gradients; got one "
                f"{'in training mode' if self.training else 'whose values require them'}: call model.eval(), or "
                "maskedlinear.torch.unpack(model) to train"
            )
        if are_ordinary_rows(input, self.in_features) and not (grads and input.requires_grad):
            y = self._few_rows(input, values, bias)
            if y is not None:
                return y
        pattern = (self.indptr, self.indices, self.starts, self.outputs, self.order)
        return _by_rows(input, values, pattern, self.in_features, bias)

    def _few_rows(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return y for few rows of x, ordinary ones; ``None`` where that is not the way."""
        batch, packed = x.numel() // self.in_features if self.in_features else 0, self._packed
        if packed is None or values is not self._source or values._version != self._version:  # or written to since
            return self._matrix.times(x, values, self.indptr, self.indices, bias) if batch == 1 else None
        if not 0 < batch <= _MOST_ROWS or not _is_plain(x) or is_forward_mode():
            return None
        if bias is not None and not (_is_plain(bias) and bias.shape == (self.out_features,)):  # its address is passed
            return None
        y = x.new_empty(batch, self.out_features)
        where = 0 if bias is None else bias.data_ptr()
        threads = torch.get_num_threads()
        packed.times(x.data_ptr(), y.data_ptr(), batch, bias=where, threads=threads)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    @property
    def pattern(self) -> SparsityPattern:
        """The connections."""
        return self._pattern

    @property
    def weight(self) -> Tensor:
        """W as a matrix, shape ``(out_features, in_features)``, made anew each time; what is written to it is lost."""
        return self.to_sparse().weight.detach()

    @property
    def sparsity(self) -> float:
        """The fraction of connections that are not there, in [0, 1]; 0 for a layer of no size."""
        return self._pattern.sparsity

    @property
    def is_packed(self) -> bool:
        """Whether few rows of x go through a packed copy; not where that would not pay, nor without the extra ``cpu``."""
        return self._packed is not None

    @torch.no_grad()
    def to_sparse(self) -> SparseLinear:
        """Return the layer that this was made of, with copies of its values."""
        layer = SparseLinear._made(self._pattern, self.weight_values, self.bias)
        layer.init_fan_in, layer.keep_dormant = self.init_fan_in, self.keep_dormant
        if self.recipe is not None:
            layer.recipe = self.recipe
        set_constraints(layer, self.constraints)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(self._trained[name])
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Say the sizes, the number of connections, the sparsity, and how it is packed."""
        packed = self._packed
        how = "by rows" if packed is None else f"{packed.way.instruction}, fill={packed.fill:.2g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, connections={self._pattern.nnz}, "
            f"sparsity={self.sparsity:.4g}, bias={self.bias is not None}, packed={how}"
        )

    @torch.inference_mode(False)
    def _place(self) -> None:
        """Put the indices of the pattern where the values are, and pack these."""
        values = self.weight_values
        self.__dict__.update(DevicePattern.of(self._pattern, values.device)._asdict(), _matrix=Matrix(), _packed=None)
        if values.is_inference():
            self.weight_values = values = values.clone()
        if values.is_cpu and values.dtype is torch.float32 and kernels.is_available():
            self._packed = kernels.PackedMatrix.of(self._pattern, values.detach().numpy())
        self._source, self._version = values, values._version

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place()
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = (*DevicePattern._fields, "_matrix", "_packed", "_source", "_version")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._place()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
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
        state_dict = dict(state_dict)
        constraints = taken_from(state_dict, prefix)
        if not load_pattern(self, state_dict, prefix, strict, missing_keys, error_msgs):
            return
        if constraints or self.constraints is not None:
            try:
                made = Constraints(**constraints) if constraints else self.constraints
                self.constraints = made.for_pattern(self._pattern)  # type: ignore[union-attr]
            except (ValueError, TypeError) as error:
                error_msgs.append(f"{prefix}constraints: {error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._place()
