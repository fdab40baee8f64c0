"""Parametrizations that make a sparse weight of a dense parameter, more of which trains than acts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._selection import Order, largest_entries, largest_in_groups

__all__ = [
    "DenseParameter",
    "LossScale",
    "StraightThroughParameter",
    "TopKASTParameter",
    "copy_without_graph",
    "refuse_cut",
]

LossScale = Callable[[], float] | None


class _SparseOfDense(torch.autograd.Function):
    """``where(mask, dense, 0)``, whose gradient arrives at more entries than are live, and decays some."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dense: Tensor, live: Tensor, trained: Tensor | None, decay_live: float, decay_rest: float) -> Tensor:
        return torch.where(live, dense, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dense, live, trained, *ctx.decays = inputs
        ctx.save_for_backward(dense, live, trained)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dense, live, trained = ctx.saved_tensors
        decay_live, decay_rest = ctx.decays
        if decay_live or decay_rest:
            gradient = gradient + torch.where(live, decay_live * dense, decay_rest * dense)
        if trained is not None:
            gradient = torch.where(trained, gradient, 0)
        return gradient, None, None, None, None


class DenseParameter(nn.Module):
    """A parametrization that makes a sparse weight of a dense parameter; its ``mask`` says which entries are live.

    Args:
        order: of the axes of the weight.
        loss_scale: as :class:`StraightThrough` takes it.
    """

    method = ""  # whose it is

    def __init__(self, order: Order, loss_scale: LossScale) -> None:
        super().__init__()
        self.order = order
        # A function, of which copies of the model share one: a bound method is copied with what it is bound to.
        self.loss_scale = None if loss_scale is None else lambda: float(loss_scale())

    def mask_of(self, dense: Tensor) -> Tensor:
        """Return which entries of the dense parameter are live."""
        raise NotImplementedError

    def _sparse(self, dense: Tensor, live: Tensor, trained: Tensor | None, decays: tuple[float, float]) -> Tensor:
        refuse_cut(dense)
        scale = 1.0 if self.loss_scale is None else self.loss_scale()
        made: Tensor = _SparseOfDense.apply(dense, live, trained, scale * decays[0], scale * decays[1])  # type: ignore[no-untyped-call]
        return made


class StraightThroughParameter(DenseParameter):
    """Keeps n of each m inputs, or clears a number of entries, by what the dense parameter is now."""

    method = "StraightThrough"

    def __init__(
        self, order: Order, loss_scale: LossScale, group: tuple[int, int] | None, zeros: int, decay: float
    ) -> None:
        super().__init__(order, loss_scale)
        self.group, self.zeros, self.decay = group, zeros, decay

    def mask_of(self, dense: Tensor) -> Tensor:
        """Return which entries are live, as the weight that is read now has them."""
        if self.group is not None:
            return largest_in_groups(dense, self.group[0], self.group[1], self.order)
        return largest_entries(dense, self.zeros, self.order)

    def forward(self, dense: Tensor) -> Tensor:
        """Return the sparse weight."""
        return self._sparse(dense, self.mask_of(dense), None, (0.0, self.decay))


class TopKASTParameter(DenseParameter):
    """Keeps what was largest when it was last chosen; more than that gets a gradient."""

    method = "TopKAST"
    forward_mask: Tensor
    backward_mask: Tensor

    def __init__(
        self, order: Order, loss_scale: LossScale, dense: Tensor, zeros: tuple[int, int], penalty: float
    ) -> None:
        super().__init__(order, loss_scale)
        self.zeros, self.penalty = zeros, penalty
        size = math.prod(dense.shape[axis] for axis in order.axes[order.stacked :])
        self.rest = penalty * size / (size - zeros[0])  # by 1 / D, the share of what is live
        for name, mask in zip(("forward_mask", "backward_mask"), self._chosen(dense), strict=True):
            self.register_buffer(name, mask)

    def _chosen(self, dense: Tensor) -> list[Tensor]:
        return [largest_entries(dense, zeros, self.order) for zeros in self.zeros]

    def refresh(self, dense: Tensor) -> None:
        """Choose anew."""
        for mask, chosen in zip((self.forward_mask, self.backward_mask), self._chosen(dense), strict=True):
            mask.copy_(chosen)

    def mask_of(self, dense: Tensor) -> Tensor:
        """Return which entries are live, as they were chosen."""
        return self.forward_mask.clone()

    def forward(self, dense: Tensor) -> Tensor:
        """Return the sparse weight."""
        return self._sparse(dense, self.forward_mask, self.backward_mask, (self.penalty, self.rest))


def refuse_cut(dense: Tensor, name: str = "") -> None:
    """Raise a ``ValueError`` if processes have cut a dense parameter."""
    if is_sharded(dense):
        raise ValueError(
            f"a dense parameter is chosen from as a whole; processes have cut {name or 'it'} (FSDP2, tensor parallelism): "
            "train with DistributedDataParallel"
        )


def copy_without_graph(module: nn.Module) -> None:
    """Let ``copy.deepcopy`` take a module that keeps weights of its last pass, as ``nn.LSTM`` does, once they are computed:
    torch copies leaves of the graph alone."""
    own: Any = type(module)
    if "__deepcopy__" not in vars(own):  # the class has one that it had before parametrize made it
        return
    plain = own.__deepcopy__

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
        for kept in vars(self).values():
            for tensor in kept if isinstance(kept, list) else ():
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    memo[id(tensor)] = tensor.detach().clone()
        return plain(self, memo)

    own.__deepcopy__ = deepcopy
