"""What an array is to its module, and what its axes mean, so that another framework can take it."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from maskedlinear.models import WeightAxes
from maskedlinear_torch._checkpoint_state import StateArray
from maskedlinear_torch._packed_layer import PackedLinear
from maskedlinear_torch._sparse_layer import SparseLinear
from maskedlinear_torch._weights import module_axes

__all__ = ["axes_and_role"]

Roles = Mapping[str, str]

_LINEAR: Roles = {"weight": "linear.weight", "weight_values": "linear.weight", "bias": "linear.bias"}
_CONV: Roles = {"weight": "conv.weight", "bias": "conv.bias"}
_CONV_TRANSPOSE: Roles = {"weight": "conv_transpose.weight", "bias": "conv_transpose.bias"}
_EMBEDDING: Roles = {"weight": "embedding.weight"}
_RMS_NORM: Roles = {"weight": "rms_norm.weight"}
_BATCH_NORM: Roles = {
    "weight": "batch_norm.weight",
    "bias": "batch_norm.bias",
    "running_mean": "batch_norm.mean",
    "running_var": "batch_norm.var",
    "num_batches_tracked": "batch_norm.count",
}
_ATTENTION: Roles = {
    "in_proj_weight": "attention.in.weight",  # those of query, key and value, one below the other
    "in_proj_bias": "attention.in.bias",
    "q_proj_weight": "attention.query.weight",
    "k_proj_weight": "attention.key.weight",
    "v_proj_weight": "attention.value.weight",
}
_ATTENTION_OUT: Roles = {"weight": "attention.out.weight", "bias": "attention.out.bias"}


def _recurrent(kind: str) -> Roles:
    return {f"{name}_{part}*": f"{kind}.{name}_{part}" for name in ("weight", "bias") for part in ("ih", "hh", "hr")}


#: By the type's name, of the type itself or of one that it is derived from: no framework is imported for it.
_ROLES: dict[str, Roles] = {
    "Linear": _LINEAR,
    "SparseLinear": _LINEAR,
    "PackedLinear": _LINEAR,
    "Conv1D": _LINEAR,  # Hugging Face's, (in, out)
    "Bilinear": {"weight": "bilinear.weight", "bias": "bilinear.bias"},
    "Embedding": _EMBEDDING,
    "EmbeddingBag": _EMBEDDING,
    "LayerNorm": {"weight": "layer_norm.weight", "bias": "layer_norm.bias"},
    "GroupNorm": {"weight": "group_norm.weight", "bias": "group_norm.bias"},
    "RMSNorm": _RMS_NORM,
    "_BatchNorm": _BATCH_NORM,
    "MultiheadAttention": _ATTENTION,
    "RNN": _recurrent("rnn"),
    "LSTM": _recurrent("lstm"),
    "GRU": _recurrent("gru"),
    "RNNCell": _recurrent("rnn"),
    "LSTMCell": _recurrent("lstm"),
    "GRUCell": _recurrent("gru"),
    **{f"Conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _CONV_TRANSPOSE for n in (1, 2, 3)},
}


def axes_and_role(array: StateArray) -> tuple[WeightAxes | None, str]:
    """Return what an array's axes mean, ``None`` if nobody knows, and its role, empty if nobody knows that."""
    module, attribute = array.module, array.attribute
    if module is None:
        return None, ""
    if isinstance(module, SparseLinear | PackedLinear) and attribute == "weight_values":
        return WeightAxes(out_axis=0, in_axis=1), "linear.weight"
    axes = module_axes(module, attribute, array.value) if isinstance(array.value, nn.Parameter) else None
    if isinstance(array.parent, nn.MultiheadAttention) and attribute in _ATTENTION_OUT:
        return axes, _ATTENTION_OUT[attribute]
    for kind in type(module).__mro__:
        roles = _ROLES.get(kind.__name__) or (_RMS_NORM if kind.__name__.endswith("RMSNorm") else {})
        for pattern, role in roles.items():
            if fnmatchcase(attribute, pattern):
                return axes, role
    return axes, ""
