"""What a masked weight saves and loads: ``weight`` as it acts, ``mask`` and ``dormant``, cut over processes as the weight
is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maskedlinear.masks import as_mask
from maskedlinear_torch._compat import is_sending_state
from maskedlinear_torch._constraints import save_constraints
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part, on_parts
from maskedlinear_torch._functional import as_tensor
from maskedlinear_torch._storage import bits_of

if TYPE_CHECKING:
    from maskedlinear_torch._masked_weight import MaskedWeight

__all__ = ["as_boolean", "named_buffers", "overlay", "save", "settle"]


def save(layer: MaskedWeight, destination: Any, prefix: str, keep_vars: bool) -> None:
    """Add what is dormant to a state, and constraints.

    With 0s if nothing is: averagers go through two states side by side, and distributed checkpoints load what the state that
    they load into has. Files of ours, which ask with keep_vars, make no such zeros.
    """
    save_constraints(layer, destination, prefix)
    if layer.dormant is not None:
        destination[prefix + "dormant"] = layer.dormant
        return
    has_zeros = layer.keep_dormant and not keep_vars and "weight" in layer._parameters
    if has_zeros and not layer.mask.is_meta and not layer.weight.is_meta:
        zeros = torch.zeros_like(layer.weight.detach(), memory_format=torch.contiguous_format)
        destination[prefix + "dormant"] = layer._kept(zeros)


def named_buffers(layer: MaskedWeight, buffers: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Add what is dormant to a layer's buffers if torch asks what it shall send to the other processes.

    ``torch.distributed.checkpoint.state_dict`` broadcasts a state to parameters and buffers alone, and dormant values are
    neither, so that nothing averages or trains them.
    """
    weight = layer.stored_weight
    if not layer.keep_dormant or weight is None or not is_sending_state():
        return buffers
    dormant = layer.dormant
    if dormant is None:
        zeros = weight.detach()
        dormant = torch.zeros_like(zeros) if is_sharded(zeros) else zeros.new_zeros(()).expand(zeros.shape)
    return chain(buffers, [("dormant", dormant.to(weight.device))])


def as_boolean(mask: Any, shape: Any) -> Any:
    """Return a mask of a state as booleans, a DTensor as one.

    Raises:
        ValueError: if it has another shape, or holds anything but 0 and 1.
    """
    if isinstance(mask, Tensor) and is_sharded(mask) and mask.shape == tuple(shape):
        return on_parts(lambda part: as_tensor(as_mask(part, tuple(part.shape))), mask)
    return as_mask(mask, shape)


@torch.no_grad()
def settle(layer: MaskedWeight, dormant: Tensor | None, assigned: bool) -> None:
    """Divide a weight that was loaded: what it has under the mask becomes dormant, beside what came as such."""
    weight = layer.weight.detach()
    mask = as_dtensor_like(layer.mask, weight)
    full = weight
    if dormant is not None:
        full = overlay(as_dtensor_like(dormant.detach().to(device=weight.device, dtype=weight.dtype), weight), weight)
    live, hidden = torch.where(mask, weight, 0), torch.where(mask, 0, full)
    if assigned:
        # The tensor is the caller's: it is not written to, but exchanged if it does not hold what it should.
        if not torch.equal(bits_of(local_part(live)), bits_of(local_part(weight))):
            layer.weight = nn.Parameter(live, layer.weight.requires_grad)
    else:
        layer.weight.copy_(live)
    layer._set_dormant(hidden)
    layer.note_clean()


def overlay(below: Tensor, above: Tensor) -> Tensor:
    """Return the values of ``above``, and those of ``below`` where it is +0."""
    return on_parts(lambda one, other: torch.where(bits_of(one) != 0, one, other), above, below)
