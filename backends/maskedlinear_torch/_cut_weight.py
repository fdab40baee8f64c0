"""``CutWeight``: a masked weight that is cut over processes, by FSDP2 or tensor parallelism, and its mask with it.

FSDP2 puts a parameter of its own in the weight's place, of which each process has a part, and for each call a copy that it
has gathered. Masks and dormant values are cut as the weight is *stored*; what is +0 under the mask there is so in the copy,
so that nothing of them is ever sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from maskedlinear_torch._dtensors import as_dtensor_like, full_tensor, is_cut_like, is_gathered, is_sharded, local_part
from maskedlinear_torch._storage import DormantStore, KeepDormant, OwnWeight, bits_of, version_of

__all__ = ["CutWeight", "like_own"]


class CutWeight(nn.Module):
    """What of a masked weight is about where its parts are: what :class:`MaskedWeight` is built on."""

    weight: Tensor
    mask: Tensor
    keep_dormant: KeepDormant
    _own: OwnWeight
    _dormant: DormantStore

    def project(self, *, quiet: bool = False) -> None:
        """Bring weight, mask and dormant values into line."""
        raise NotImplementedError

    def is_clean(self) -> bool:
        """Whether the own weight is known to be +0 under the mask as both stand."""
        raise NotImplementedError

    def _kept(self, values: Tensor) -> Tensor:
        """Return dormant values where they are to be kept."""
        return values.cpu() if self.keep_dormant == "host" else values

    @property
    def stored_weight(self) -> Tensor | None:
        """The parameter that optimizers hold, ``None`` if the weight is computed: where FSDP2 has put a copy that it has
        gathered, for a call, the one that it has gathered it from.
        """
        return self._parameters.get("weight") if self._own.lender is None else self._own.lender

    def _follow(self) -> None:
        """Take the parameter for the weight that is it now; of another module, which may have another one."""

    def _told_sparsity(self) -> str:
        """Return what a representation says of the sparsity: of a cut weight that of this process' part, since one process
        alone may print a model, and others would be waited for.
        """
        if self.mask.is_meta:
            return ""
        part = local_part(self.mask)
        sparsity = 1 - int(part.sum()) / part.numel() if part.numel() else 0.0
        return f", sparsity={sparsity:.4g}" + (" of this process' part" if is_sharded(self.mask) else "")

    def is_lent(self) -> bool:
        """Whether a copy that FSDP2 has gathered is in the weight's place."""
        return self._own.lender is not None

    def _in_place(self) -> Tensor | None:
        """Return what is in the weight's place now."""
        return self._parameters.get("weight")

    def see_to_copy(self) -> None:
        """See to it that the copy which FSDP2 has gathered is +0 under the mask, as it stands now."""
        if self._own.stale or not self.is_clean():
            self.project()
            self.renew_copy()

    @torch.no_grad()
    def renew_copy(self) -> None:
        """Gather anew what is stored, into the copy that FSDP2 has in its place."""
        stored, copy = self.stored_weight, self._in_place()
        assert stored is not None
        assert copy is not None
        local_part(copy).data.copy_(local_part(as_dtensor_like(full_tensor(stored.detach()), copy)))
        self._own.stale = False

    @torch.no_grad()
    def _place(self, weight: Tensor, *, send: bool = False) -> None:
        """Cut mask and dormant values over processes as the weight is; or put them together, if it is no more.

        Each process takes its part of what it has, as FSDP2 does; or of what the first has, which ``send`` it, as tensor
        parallelism does.
        """
        mask = self._buffers.get("mask")
        if mask is None or is_cut_like(mask, weight) or not (is_sharded(mask) or is_sharded(weight)):
            return
        if mask.is_meta or weight.is_meta:
            if mask.is_meta:
                self._buffers["mask"] = torch.empty_like(weight, dtype=torch.bool, device="meta", requires_grad=False)
            return
        known, dormant = self._own.mask is not None and self._own.mask == (mask, version_of(mask)), self._dormant.values
        cut: Callable[[Tensor], Tensor] = full_tensor
        if is_sharded(weight):
            cut = _sent(weight) if send and not is_sharded(mask) else partial(as_dtensor_like, like=weight)
        with torch.inference_mode(False):
            self._buffers["mask"] = mask = cut(mask)
            if (
                send
                and self.keep_dormant
                and bool(_sent(weight, everywhere=True)(mask.new_tensor([dormant is not None])))
            ):
                dormant = torch.zeros(weight.shape, dtype=weight.dtype) if dormant is None else dormant
            if dormant is not None:
                self._dormant.values = self._kept(cut(dormant.to(weight.device)))
        if known:
            self._own.mask = mask, version_of(mask)

    def _is_copy(self, weight: Tensor, stored: Tensor) -> bool:
        """Whether a tensor that is put in the weight's place is what FSDP2 has gathered of what is ``stored``, for a call:
        once, it is looked whether this process' part of it is what is stored.
        """
        own = self._own
        if weight is stored or weight.shape != stored.shape or stored.is_meta or weight.is_meta:
            return False
        if own.lender is not None and is_sharded(weight):  # cut otherwise between forward and backward pass
            return True
        if not is_gathered(weight, stored):
            return False
        if own.copy != id(weight) and not is_sharded(weight):
            with torch.no_grad():
                part = local_part(as_dtensor_like(weight.detach(), stored))
                if not torch.equal(bits_of(part), bits_of(local_part(stored.detach()).to(part.dtype))):
                    return False
        own.copy = id(weight)
        return True


def like_own(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask that was given, whole or cut, as a layer has its own."""
    return as_dtensor_like(mask, like) if is_sharded(like) else full_tensor(mask)


def _sent(like: Tensor, *, everywhere: bool = False) -> Callable[[Tensor], Tensor]:
    """Return what cuts a tensor of the first process as ``like`` is; or sends it ``everywhere``."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if everywhere:
        return lambda tensor: local_part(distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim))
    return lambda tensor: distribute_tensor(tensor, mesh, placements)
