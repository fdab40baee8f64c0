"""What a model's state is made of, for files: each array once by its name, with its mask, and never the mask by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._sparse_shards import Cut, whole_values
from maskedlinear_torch._weight_mask import WeightMask, child_name

__all__ = [
    "DTYPES",
    "StateArray",
    "cut_of",
    "dtype_name",
    "from_host",
    "on_host",
    "state_arrays",
    "why_not_saved",
]

#: torch's dtypes by the names that safetensors has for them.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}


@dataclass
class StateArray:
    """An array of a model's state.

    Attributes:
        key: what ``state_dict`` calls it.
        value: the parameter or the buffer; what ``state_dict`` has, if that is none of a module's.
        module: the module that has it, by this key; ``None`` if ``value`` is none of a module's.
        attribute: what the module calls it.
        parent: the module that the module is a child of, by this key; of what is no module's, the one whose state it is.
        mask: its mask, if it is a weight that has one.
        mask_of: the layer whose mask it is, if the weight of that is computed, so that the mask is an array of its own.
        users: the modules that hold it, this one included, each with its name there.
    """

    key: str
    value: Any
    module: nn.Module | None = None
    attribute: str = ""
    parent: nn.Module | None = None
    mask: MaskedWeight | None = None
    mask_of: MaskedWeight | None = None
    users: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def sparse(self) -> SparseLinear | PackedLinear | None:
        """The layer, if this is the weight of one in the sparse form, packed or not."""
        is_sparse = isinstance(self.module, SparseLinear | PackedLinear) and self.attribute == "weight_values"
        return self.module if is_sparse else None  # type: ignore[return-value]

    @property
    def holds_mask(self) -> bool:
        """Whether a mask goes with it already."""
        return self.mask is not None or self.mask_of is not None or self.sparse is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in a file: of a weight in the sparse form, that of its layer."""
        sparse = self.sparse
        return tuple(self.value.shape) if sparse is None else (sparse.out_features, sparse.in_features)


def cut_of(module: nn.Module | None) -> Cut | None:
    """Return how tensor parallelism has shared out a layer in the sparse form; ``None`` of all other modules."""
    return module._cut if isinstance(module, SparseLinear) else None


def state_arrays(model: nn.Module) -> dict[str, StateArray]:
    """Return what a model's state is made of, by the names that files have.

    These are those of ``state_dict``, without the prefixes of wrappers (``module.`` of ``DistributedDataParallel``,
    ``_orig_mod.`` of ``torch.compile``); the values of a layer in the sparse form are its ``weight``.

    Raises:
        ValueError: if hooks on the model's state rename masked weights.
    """
    arrays = {key: StateArray(key, value) for key, value in model.state_dict(keep_vars=True).items()}
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    wrapped: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        inner = _wrapped(module)
        if inner:
            wrapped.append(f"{_under(path, inner)}.")
        if isinstance(module, WeightMask):
            continue
        for attribute, value in (*module._parameters.items(), *module._buffers.items()):
            array = arrays.get(_under(path, attribute))
            if value is not None and (module, attribute) not in users.setdefault(id(value), []):
                users[id(value)].append((module, attribute))
            if array is not None and attribute == "weight_values" and cut_of(module) is not None:
                array.value = value  # the state has the values in another order, as no parameter
            if value is not None and array is not None and array.value is value:
                array.module, array.attribute = module, attribute
                array.parent = modules.get(path.rpartition(".")[0]) if path else None
    for array in list(arrays.values()):
        if array.module is None:
            array.parent = modules.get(array.key.rpartition(".")[0])
        array.users = users.get(id(array.value), [])
        if array.sparse is not None:
            for name in ("indptr", "indices"):
                arrays.pop(array.key.removesuffix("weight_values") + name)
    for path, name, mask in _masks(model):
        at, weight = _under(path, name), mask._parameters.get("weight")
        if weight is None and _under(path, "mask") in arrays:  # computed, and masked as it is computed
            arrays[_under(path, "mask")].mask_of = mask
            arrays.pop(_under(path, "dormant"), None)
            continue
        if at not in arrays:
            raise ValueError(
                f"the masked weight {at} is not in the model's state, which hooks or wrappers have renamed: save the model "
                "that is wrapped"
            )
        arrays[at].mask = mask
        inside = _under(path, child_name(name)) if isinstance(mask, WeightMask) else path
        for name in ("mask", "dormant"):
            arrays.pop(_under(inside, name), None)
    return {_file_name(array, wrapped): array for array in arrays.values()}


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrapped(module: nn.Module) -> str:
    """Return what a wrapper calls the module that it wraps; empty for other modules."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    return "_orig_mod" if "_orig_mod" in module._modules else ""  # compiled


def _masks(model: nn.Module) -> Iterator[tuple[str, str, MaskedWeight]]:
    """Yield the masked weights in the dense form: the path of each module that has one, its name there, the mask."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WeightMask):
            yield path.rpartition(".")[0], module.owner[1], module
        elif isinstance(module, MaskedWeight):
            yield path, "weight", module


def _file_name(array: StateArray, wrapped: list[str]) -> str:
    name = array.key if array.sparse is None else array.key.removesuffix("_values")
    for prefix in reversed(wrapped):  # the inner ones first
        if name.startswith(prefix):
            name = _under(prefix[:-1].rpartition(".")[0], name.removeprefix(prefix))
    return name


def why_not_saved(array: StateArray) -> str:
    """Return why a file cannot hold an array of a model, and what to do; empty if it can."""
    value = array.value
    if not isinstance(value, Tensor):
        return (
            f"no tensor but {type(value).__name__}: let get_extra_state return a tensor; of a quantised module, save what "
            "it was made of"
        )
    if isinstance(value, UninitializedParameter):
        return "without values yet: call the model once before"
    if value.is_quantized:
        return "quantised: save the model that it was made of"
    if value.layout is not torch.strided:
        return f"of the layout {value.layout}: make it dense, or a SparseLinear"
    if value.is_meta:
        return "on the meta device, without values: load or initialise the model before"
    if not is_sharded(value) and hasattr(type(value), "__tensor_flatten__"):
        return f"a {type(value).__name__}, of which only torch knows what it holds: save the model that it was made of"
    if value.dtype not in _NAMES:
        return f"of {value.dtype}, where files hold {', '.join(str(known)[6:] for known in _NAMES)}: convert it before"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype that files hold."""
    return _NAMES[dtype]


def on_host(tensor: Tensor, cut: Cut | None = None) -> NDArray[Any]:
    """Return a tensor as NumPy holds it in files: whole, bfloat16 and float8 as their bits; of what a layer in the sparse
    form has of each connection, in the order of the whole layer, however tensor parallelism has ``cut`` it.
    """
    held = whole_values(tensor.detach(), cut).resolve_conj().resolve_neg().cpu().contiguous()
    array: NDArray[Any] = held.view(_BITS.get(held.dtype, held.dtype)).numpy()
    return array


def from_host(held: NDArray[Any], name: str) -> Tensor:
    """Return what files hold as a tensor on the host, of the dtype that safetensors calls ``name``."""
    writable = held if held.flags.writeable else held.copy()
    dtype = DTYPES[name]
    return torch.from_numpy(np.ascontiguousarray(writable).reshape(held.shape)).view(dtype)
