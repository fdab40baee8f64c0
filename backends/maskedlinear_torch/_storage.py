"""Weights that are +0 under their mask: where the mask is written into them, and how a layer knows that it still
stands.

What the optimizer, a ``copy_`` or a merge leaves under a mask is *drift*: it is projected away, in place, before the
layer next acts. Autograd counts most edits of a tensor in its version; fused optimizers move none, so that steps are
counted too, of all optimizers of the process. An edit past both, through ``.data`` or NumPy, is seen and acts until the
next of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from maskedlinear_torch._compat import in_transform, is_forward_mode, is_grads_batched
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part

__all__ = [
    "DormantStore",
    "GradientMask",
    "KeepDormant",
    "OwnWeight",
    "Version",
    "bits_of",
    "check_keep_dormant",
    "count_step",
    "is_plain",
    "keep_bits",
    "layer_of",
    "new_memory",
    "project",
    "remember_layer",
    "steps",
    "version_of",
    "zero_masked",
]

KeepDormant = bool | Literal["host"]


def check_keep_dormant(keep_dormant: Any) -> None:
    """Raise a ``ValueError`` if ``keep_dormant`` is none of the choices."""
    if keep_dormant not in (True, False, "host"):
        raise ValueError(f"keep_dormant must be True, False or 'host'; got {keep_dormant!r}")


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_BLOCK = 1 << 18  # entries that are masked at once: of float32 1 MiB, which stays in a core's cache
_SMALL = 1 << 12  # entries for which one select takes less time than several calls
_HUGE_PAGE = 2 << 20
# Bytes from which on glibc's allocator keeps nothing that was freed (DEFAULT_MMAP_THRESHOLD_MAX).
_GIVEN_BACK = 32 << 20

Version = tuple[int, int]

_ZERO = torch.zeros((), device="cpu")  # of no dtype or device of its own in torch.where; a number takes longer
steps = [0]  # of all optimizers of this process


def count_step(*_: Any) -> None:
    """Count a step of an optimizer, after which no weight is known to be +0 under its mask."""
    steps[0] += 1


register_optimizer_step_post_hook(count_step)


class OwnWeight:
    """What a layer knows of the parameter that is its own: which it is, and when it was last +0 under the mask.

    It holds no reference to the parameter: a weak one would break ``torch.utils.swap_tensors``, another would keep a weight
    that was replaced. A copy knows nothing, as the copied layer has another parameter.

    Attributes:
        key: the parameter's identity, or ``None`` where the weight is not the layer's own.
        is_cut: whether the parameter is cut over processes.
        lender: what FSDP2 has gathered the tensor from that is in the weight's place now; or ``None``.
        copy: that tensor, by its identity, once it was seen to be one.
        lent: that tensor, by its identity, and its state when it was put there.
        stale: whether it may have been gathered before the parameter was made +0 under the mask.
        weight: the state of the weight, by :func:`version_of`, in which it was last +0 under the mask.
        mask: the mask which that was, and its state.
        steps: how many steps optimizers had made then.
        shared: whether processes share the weight's memory.
        copied: whether the layer is a copy of another to which no gradient has come yet, as an average is.
        hook: of the parameter, which masks the gradients that other readers of the weight send.
        made: a gradient that the layer's Function has just made, +0 under the mask, by weak reference, and its version; for
            the hook.
        watch: of a guarded parameter, the hook that looks at the gradient when it has been added up.
        gradient: the gradient that this has found to be +0 under the mask, its state then, and that mask and its state.
        record: what else is to see the gradient as it comes, before it is masked; for growth.
        adds_up: the mask under which the gradient that comes will be +0 when it has been added to what there was, and its
            state; or ``None``.
    """

    __slots__ = (
        "adds_up",
        "copied",
        "copy",
        "gradient",
        "hook",
        "is_cut",
        "key",
        "lender",
        "lent",
        "made",
        "mask",
        "record",
        "shared",
        "stale",
        "steps",
        "watch",
        "weight",
    )

    def __init__(self) -> None:
        self.key: int | None = None
        self.weight: Version | None = None
        self.mask: tuple[Tensor, Version | None] | None = None
        self.steps = -1
        self.made: tuple[Callable[[], Tensor | None], int] | None = None
        self.gradient: tuple[Tensor, Version | None, Tensor, Version | None] | None = None
        self.adds_up: tuple[Tensor, Version | None] | None = None
        self.hook: Any = None
        self.record: Callable[[Tensor], object] | None = None
        self.watch: Any = None
        self.lender: Tensor | None = None
        self.copy: int | None = None
        self.lent: tuple[int, Version | None] | None = None
        self.shared = self.copied = self.is_cut = self.stale = False

    def lends(self, weight: Tensor | None) -> bool:
        """Whether this is the copy that FSDP2 has gathered, as it has gathered it."""
        return self.lent is not None and weight is not None and self.lent == (id(weight), version_of(weight))

    def forget_copy(self) -> None:
        """Note that nothing is lent: the parameter is in its place."""
        self.lender = self.lent = None
        self.stale = False

    def may_lose_values(self, weight: Tensor) -> bool:
        """Whether something else than an optimizer or a counted edit may have left values under the mask: those of a merge
        past autograd, or, in a copy, of an average of masks that have moved.
        """
        if self.shared:
            return False
        if self.copied:
            return True
        counted = self.weight is None or self.weight != version_of(weight)
        return not counted and (self.steps == steps[0] or not weight.requires_grad)

    def has_not_stepped(self) -> bool:
        """Whether no optimizer has stepped since the weight was last +0 under the mask."""
        return self.weight is not None and self.steps == steps[0]

    def holds_clean(self, gradient: Tensor, mask: Tensor) -> bool:
        """Whether this is the gradient that was found to be +0 under this mask, both as they were."""
        if self.gradient is None:
            return False
        found, version, under, mask_version = self.gradient
        same = found is gradient and under is mask
        return same and version == version_of(gradient) and mask_version == version_of(mask) is not None

    def __reduce__(self) -> tuple[type[OwnWeight], tuple[()]]:
        return OwnWeight, ()


class DormantStore:
    """The dormant values of one weight, which layers that share the weight share too."""

    def __init__(self) -> None:
        self.values: Tensor | None = None  # of the weight's shape, 0 where it is live; None if all are 0


class GradientMask:
    """The hook of a layer's weight: whoever read the weight, its gradient is +0 under the mask.

    A gradient that the layer's own Function has made, and that nothing was added to, is so already.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)

    @torch.utils.hooks.unserializable_hook  # type: ignore[untyped-decorator]
    def __call__(self, g: Tensor) -> Tensor | None:
        layer: Any = self._layer()
        if layer is None or "mask" not in layer._buffers:
            return None
        own, mask = layer._own, layer._buffers["mask"]
        if own.record is not None:
            own.record(g)
        made, own.made, own.copied = own.made, None, False
        if own.watch is not None:
            old = layer._parameters["weight"].grad
            own.adds_up = (mask, version_of(mask)) if old is None or own.holds_clean(old, mask) else None
        if made is not None and made[0]() is g and made[1] == g._version and is_plain(g):
            return None
        if g.shape != mask.shape:
            return None  # of a parametrization, which has made something else of the parameter
        # On a GPU a 0 on the CPU would be copied there, which waits for the device, and which no CUDA graph can hold.
        zero = _ZERO if g.is_cpu else g.new_zeros(())
        return torch.where(mask if type(g) is Tensor else as_dtensor_like(mask, g), g, zero)

    @torch.no_grad()
    def mask_cut(self, weight: Tensor) -> None:
        """Mask the gradient that a parameter has got which is cut over processes: no other hook of it is called by FSDP2."""
        layer: Any = self._layer()
        gradient = weight.grad
        if layer is None or layer._own.key != id(weight) or gradient is None or gradient.requires_grad:
            return
        if layer._own.record is not None:
            layer._own.record(gradient)
        zero_masked(local_part(gradient), local_part(as_dtensor_like(layer._buffers["mask"], gradient)))

    def watch(self, weight: Tensor) -> None:
        """Note the gradient when it has been added to what there was: the other hook of a guarded weight."""
        layer: Any = self._layer()
        if layer is not None and layer._own.key == id(weight):
            own, gradient = layer._own, weight.grad
            own.gradient = None
            if gradient is not None and own.adds_up is not None and not gradient.requires_grad:
                own.gradient = gradient, version_of(gradient), *own.adds_up
            own.adds_up = None


# The layer that a parameter belongs to, by the parameter's identity: valid while that layer still holds it.
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def remember_layer(weight: Tensor, layer: nn.Module) -> None:
    """Note that ``weight`` is the own weight of ``layer``."""
    _layers.setdefault(id(weight), layer)
    if _layers[id(weight)]._parameters.get("weight") is not weight:
        _layers[id(weight)] = layer


def layer_of(weight: Tensor) -> nn.Module | None:
    """Return the layer that was first to have ``weight`` as its own, if it still has it."""
    layer = _layers.get(id(weight))
    return layer if layer is not None and layer._parameters.get("weight") is weight else None


def version_of(tensor: Tensor) -> Version | None:
    """Return what changes when a tensor's values do, as far as anything counts; ``None`` if nothing does."""
    if tensor.is_inference():
        return None
    if is_sharded(tensor):  # edits of it, and of this process' part, are counted apart
        part = local_part(tensor)
        return None if part.is_inference() else (part.data_ptr(), tensor._version + part._version)
    return tensor.data_ptr(), tensor._version


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary one, a DTensor being none, and nothing differentiates what is made of it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not torch.is_grad_enabled()
        and not is_forward_mode()
        and not in_transform()
        and not is_grads_batched(tensor)
    )


def project(weight: Tensor, mask: Tensor, shared: bool = False) -> None:
    """Set a weight to +0 where its mask is ``False``, in place, past autograd: no graph's check of versions breaks.

    Args:
        weight: an ordinary parameter, or the part that this process has of a sharded one.
        mask: of its shape, on its device.
        shared: whether processes share its memory: then masked places alone are written, since a pass over all of them
            would undo what others have written meanwhile.
    """
    if shared:
        weight.data.masked_fill_(~mask, 0)
    else:
        zero_masked(weight.data, mask)


def zero_masked(matrix: Tensor, mask: Tensor) -> Tensor:
    """Set ``matrix`` to +0 where ``mask`` is ``False``, NaN included; nothing differentiates it.

    On the CPU by a product of the bits, as whole numbers, with 0 or 1, which takes two thirds of the time of a select; some
    rows at a time, so that what torch makes of the mask for it stays in the cache. On a GPU by a fill, which takes two
    thirds of the time of a select too.
    """
    if not matrix.is_cpu:
        return matrix.masked_fill_(~mask, 0)
    if matrix.numel() <= _SMALL or matrix.itemsize not in _BITS or matrix.is_neg():
        return torch.where(mask, matrix, _ZERO, out=matrix)
    bits = bits_of(matrix)
    # From the end, which whoever wrote the matrix has left in the cache, to the beginning, which whoever reads it next is
    # to find there: 1 or 2 % of a whole step.
    for rows in reversed(_blocks(mask)):
        bits[rows].mul_(mask[rows])
    return matrix


def keep_bits(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return ``where(mask, tensor, 0)``, in new memory; nothing differentiates it."""
    if tensor.device.type != "cpu" or tensor.itemsize not in _BITS:
        return torch.where(mask, tensor, 0)
    masked = new_memory(tensor.shape, tensor.dtype)
    bits, own = bits_of(masked), bits_of(tensor.detach().resolve_neg())
    for rows in _blocks(mask):
        torch.mul(own[rows], mask[rows], out=bits[rows])
    return masked


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor that is not complex, as whole numbers: NaN is equal to itself there, and -0 is not +0."""
    return tensor.view(_BITS[tensor.itemsize])


def new_memory(shape: Sequence[int], dtype: torch.dtype, large: int = _GIVEN_BACK) -> Tensor:
    """Return a tensor on the CPU whose entries are not set.

    A large one, of more than ``large`` bytes, has NumPy's memory, which asks Linux for huge pages, from the start of one
    on: the allocator gets such memory anew for every gradient, and a page fault for each 4 KiB of it takes longer than the
    product that is written there.
    """
    size = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(False), torch.no_grad():  # it may outlive the call
        if size <= large:
            return torch.empty(shape, dtype=dtype, device="cpu")
        # Less would come from glibc's heap; there and in others', what is not written takes addresses only.
        spare = np.empty(max(size, _GIVEN_BACK) + _HUGE_PAGE, np.int8)
        start = -spare.ctypes.data % _HUGE_PAGE
        return torch.from_numpy(spare[start : start + size]).view(dtype).view(*shape)


def _blocks(mask: Tensor) -> list[slice]:
    """Return the rows of a mask in parts of about ``_BLOCK`` entries."""
    step = max(1, _BLOCK // max(1, mask[:1].numel()))
    return [slice(start, start + step) for start in range(0, len(mask) if mask.numel() else 0, step)]
