"""Every private name of torch that this package reads, in one place.

Each fails closed: under a torch that has renamed it, the answer is the one that leads to the plain expression, which is
slower and right under every transform.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod

__all__ = [
    "CALL_HOOKS",
    "STATE_HOOKS",
    "active_ddp_module",
    "end_pruning",
    "exchange_fsdp_parameter",
    "fsdp_parameter",
    "gradient_hooks",
    "in_transform",
    "is_any_autocast_on",
    "is_dispatch_mode_on",
    "is_exporting",
    "is_forward_mode",
    "is_fsdp_hook",
    "is_grads_batched",
    "is_nested",
    "is_sending_state",
    "is_tracing",
    "is_zero_tensor",
    "nothing_looks_on",
    "pruning_hooks",
    "take_hooks_along",
    "takes_load_hooks",
    "without_torch_function",
]

# Where a module keeps its hooks: on its calls, and on its state. One that is not there any more is an error.
CALL_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

_functorch: Any = getattr(torch._C, "_functorch", None)
_peek: Callable[[], Any] | None = getattr(_functorch, "peek_interpreter_stack", None)
_is_batch: Callable[[Any], bool] | None = getattr(_functorch, "is_legacy_batchedtensor", None)

_tracing: Callable[[], Any] | None = getattr(torch._C, "_get_tracing_state", None)
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# Whether autocast is on for any kind of device, asked in one call.
is_any_autocast_on: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def nothing_looks_on() -> bool:
    """Whether nothing but autograd looks on: no transform, no forward mode, no tracing. Asked at every call of a layer."""
    return (
        _peek is not None
        and _tracing is not None
        and _peek() is None
        and _tracing() is None
        and getattr(forward_ad, "_current_level", 0) < 0
    )


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is on."""
    return _peek is None or _peek() is not None


def is_dispatch_mode_on() -> bool:
    """Whether a ``TorchDispatchMode`` looks at operators, as ``make_fx`` does; it is on for a torch that cannot say."""
    return _dispatch_modes() > 0


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is on."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def is_grads_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a batch of gradients that ``torch.autograd.grad`` was asked for with ``is_grads_batched``."""
    return _is_batch is None or bool(_is_batch(tensor))


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of zeros that has no memory: autograd and forward mode make such gradients."""
    asked = getattr(tensor, "_is_zerotensor", None)
    return asked is not None and bool(asked())


def is_nested(mode: Literal["Grad", "Jvp"]) -> bool:
    """Whether a transform of ``torch.func`` is on twice: of forward mode a Function's rule then loses the outer tangent.

    https://github.com/pytorch/pytorch/issues/197867
    """
    if _peek is None:
        return True
    if _peek() is None:  # the ordinary call: no transform is on
        return False
    try:
        kind = getattr(_functorch.TransformType, mode)
        return bool(sum(level.key() == kind for level in _functorch.get_interpreter_stack() or ()) > 1)
    except AttributeError:
        return True


def gradient_hooks(tensor: Tensor) -> list[Any]:
    """Return what looks on when a tensor gets its gradient; a torch that cannot say is taken to have something that does."""
    try:
        return [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]
    except AttributeError:
        return [None]


def take_hooks_along(tensor: Tensor) -> None:
    """Let a tensor's hooks fire: ``torch.utils.swap_tensors`` brings their dictionary, and does not tell autograd of it."""
    if getattr(tensor, "_backward_hooks", None) is not None:
        tensor._backward_hooks = tensor._backward_hooks


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records: it cannot save a Function."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_exporting() -> bool:
    """Whether ``torch.export`` traces; a torch that cannot say is taken not to."""
    ask = getattr(torch.compiler, "is_exporting", None)
    return bool(ask()) if ask is not None else False


def active_ddp_module() -> Any:
    """Return the ``DistributedDataParallel`` whose forward pass this is; ``None`` if there is none, or torch cannot say."""
    ask = getattr(DistributedDataParallel, "_get_active_ddp_module", None)
    return None if ask is None else ask()


def is_sending_state() -> bool:
    """Whether the caller's caller was called by what sends a state to other processes, as
    ``set_model_state_dict(..., broadcast_from_rank0=True)`` does; a torch that has it elsewhere is taken not to."""
    if torch.compiler.is_compiling():  # ``functional_call`` is, and frames are nothing that it traces
        return False
    frame = sys._getframe(3)
    return frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"


def fsdp_parameter(model: nn.Module, layer: nn.Module, name: str) -> tuple[Any, int] | None:
    """Return where FSDP2 keeps its part of a layer's parameter: a group of those gathered together, and the place in it.

    ``None`` if no module of ``model`` was given to ``fully_shard`` with it, or torch cannot say.
    """
    for module in model.modules():
        ask = getattr(module, "_get_fsdp_state", None)
        state = None if ask is None else ask()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for place, kept in enumerate(getattr(group, "fsdp_params", ())):
                info: Any = getattr(kept, "_module_info", None)
                alone = info is not None and not info.shared_modules and not getattr(kept, "is_dtensor", True)
                if (
                    alone
                    and info.module is layer
                    and info.param_name == name
                    and hasattr(kept, "_post_load_hook_handle")
                ):
                    return group, place
    return None


def exchange_fsdp_parameter(group: Any, place: int, layer: nn.Module, name: str) -> None:
    """Have FSDP2 cut a layer's parameter, which is whole, in the place of one that it had cut; see ``fsdp_parameter``."""
    old, parameter = group.fsdp_params[place], layer._parameters[name]
    places = (group.mesh_info, group.post_forward_mesh_info, group.device)
    new = type(old)(
        parameter, type(old._module_info)(layer, name), *places, None, group.mp_policy, group.offload_policy
    )
    old._post_load_hook_handle.remove()
    group.fsdp_params[place] = new
    if hasattr(group, "_orig_dtype"):  # after a first forward pass, before which all of them are told
        group._init_mp_dtypes()


def is_fsdp_hook(hook: Any) -> bool:
    """Whether a hook of a module's state is FSDP2's own."""
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def takes_load_hooks(optimizer: Any) -> bool:
    """Whether hooks can be registered on loading a state; not on accelerate's wrapper, which torch has never initialised."""
    return hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")


def pruning_hooks(module: nn.Module) -> dict[str, int]:
    """Return the keys of the hooks of ``torch.nn.utils.prune`` that a module has, by the parameter that each computes."""
    return {
        hook._tensor_name: key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)
    }


def end_pruning(module: nn.Module, name: str) -> None:
    """Take a parameter's pruning by ``torch.nn.utils.prune`` away, as its ``remove`` does, but leave all values."""
    del module._forward_pre_hooks[pruning_hooks(module)[name]]
    vars(module).pop(name, None)  # what the hook has computed
    del module._buffers[f"{name}_mask"]
    # The order stays: states of optimizers go by it.
    parameters = [(name if own == f"{name}_orig" else own, value) for own, value in module._parameters.items()]
    module._parameters.clear()
    module._parameters.update(parameters)
    setattr(module, name, module._parameters[name])  # a recurrent layer keeps a list of its own


def without_torch_function() -> AbstractContextManager[Any]:
    """Return a context in which subclasses of tensors are computed as plain ones; an error under a torch without it."""
    try:
        return torch._C.DisableTorchFunctionSubclass()
    except AttributeError as error:
        raise NotImplementedError(f"torch {torch.__version__} has no way past subclasses of tensors") from error
