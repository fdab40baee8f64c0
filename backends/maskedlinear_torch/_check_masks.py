"""``check_masks``: shows on an input that what is masked in a model acts masked."""

from __future__ import annotations

import copy
import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskedlinear.models import MaskCheck
from maskedlinear_torch._check_constant import is_constant
from maskedlinear_torch._check_masks_cut import Together, accumulated, as_plain
from maskedlinear_torch._dtensors import as_dtensor_like, is_sharded, local_part, on_parts
from maskedlinear_torch._fsdp import reshard
from maskedlinear_torch._masked_weight import MaskedWeight
from maskedlinear_torch._ranks import group_of
from maskedlinear_torch._storage import bits_of, version_of
from maskedlinear_torch._weights import masked_weights, release, walk_masked

__all__ = ["check_masks"]

Layers = Mapping[str, MaskedWeight]
Results = dict[tuple[Literal["output", "gradient of"], str], Tensor]

Likeness = Literal["bits", "rounding", "nan"]  # how much alike two results are to be: NaN in the same places, at least


def check_masks(model: nn.Module, *inputs: Any, **kwargs: Any) -> MaskCheck:
    """Show on an input that the masked weights of a model act masked, whoever reads them.

    The model is called as ``model(*inputs, **kwargs)``: in training mode with gradients, and in evaluation mode without.
    Of each masked weight this must hold:

    1. ``weight`` is +0 under the mask, as it stands before anything mends it: an optimizer without a guard, or a merge
       past autograd, may have left values there.
    2. NaN in place of the dormant values changes no bit of an output or a gradient.
    3. The gradient that reaches the weight is +0 under the mask.
    4. A copy of the model without masks (a ``MaskedLinear`` is a plain ``nn.Linear``), zeros standing for what is masked,
       has the same outputs and gradients, but for rounding. Subclasses, and layers whose weight is computed, stay what they
       are there.

    And the outputs must depend on the inputs: where others change no bit of them, in evaluation mode, ``is_constant`` says
    so, as where no live connection lies on a path from an input to an output.

    A model that FSDP2 or tensor parallelism has cut is checked where its parts are, by all processes, each with its own
    inputs, and all get the same answer. It is not copied: plain layers stand in for its own. Its gradients come by
    ``backward``, and those that were there are put back.

    What was found in a weight under its mask is set back to +0, as at the layer's next call. Everything else is left as
    it was: modes, gradients, buffers, dormant values, the state of random generators. Layers in the sparse form have
    nothing under a mask, so that there is nothing to check.

    Args:
        model: any module, in any mode; one in ``DistributedDataParallel`` is checked without it.
        inputs: what the model is called with, in both modes; tensors are copied. One that asks for a gradient has its
            gradient compared too.
        kwargs: what it is called with by name.

    Returns:
        What was checked, and what does not hold, by the layer's name; printed, a table.

    Raises:
        ValueError: if the model has no masked weight, or no values (``"meta"``); if there is no tensor in what it returns;
            or if a parameter of one that is cut has hooks, which would take the gradients for those of a training step.
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_masks takes a torch.nn.Module; got {type(model).__name__}")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    # As they stand: named_modules would set right what is to be reported.
    layers = {name: mask for name, mask in walk_masked(model) if isinstance(mask, MaskedWeight)}
    if not layers:
        raise ValueError("check_masks checks masked weights, and this model has none: make them with mask_model(model)")
    if any(tensor.is_meta for layer in layers.values() for tensor in (layer.weight, layer.mask)):
        raise ValueError(
            "check_masks needs the values of weights; got a model on the meta device: check it when it has values"
        )
    failures: dict[str, list[str]] = {name: [] for name in layers}
    stored = {
        name: layer.weight if layer.stored_weight is None else layer.stored_weight for name, layer in layers.items()
    }
    is_cut = any(is_sharded(weight) for weight in stored.values())
    hidden = {name: _under_mask(weight.detach(), layers[name].mask) for name, weight in stored.items()}  # first of all:
    together = Together(group_of(model, "model") if is_cut else None, is_cut)  # whatever comes next may project
    together.report("weight", hidden, failures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is set back to +0: it is in the report
        for layer in layers.values():
            layer.project()
    for training in (True, False):
        run = partial(_run, inputs=inputs, kwargs=kwargs, training=training, is_cut=is_cut)
        _check_mode(model, layers, run, training, failures, together)
    found = {name: what for name, what in failures.items() if what}
    run = partial(_run, model, training=False, is_cut=is_cut)
    return MaskCheck(list(layers), found, is_constant(run, inputs, kwargs, together))


def _check_mode(
    model: nn.Module,
    layers: Layers,
    run: Callable[[nn.Module], Results],
    training: bool,
    failures: dict[str, list[str]],
    together: Together,
) -> None:
    """Run the model in one mode, with and without changes that must not act; write down what does not hold."""
    mode = "in training mode" if training else "in evaluation mode"
    reshard(model) if together.is_cut else None
    weights = _weights(model, layers)
    try:
        expected = run(model)
    except Exception as error:
        error.add_note(f"This was {mode}: check_masks calls the model in both, with inputs that both take.")
        raise
    known = {name: layer for name, layer in layers.items() if weights.get(name) in expected}
    gradients = {name: _under_mask(expected[weights[name]], layer.mask) for name, layer in known.items()}
    together.report("gradient", gradients, failures)

    def with_nan(changed: Layers) -> Results:
        with _nan_dormant(changed):
            return run(model)

    def with_plain(changed: Layers) -> Results:
        if together.is_cut:
            with as_plain(changed):
                return run(model)
        results = run(_with_plain(model, changed))
        for name in changed:
            if weights.get(name) in results:  # a plain layer's is dense
                results[weights[name]] = torch.where(layers[name].mask, results[weights[name]], 0)
        return results

    # A plain copy is compared with a masked one, since copies lose what hangs on a parameter.
    trials: tuple[tuple[str, nn.Module, Callable[[Layers], Results], Likeness], ...] = (
        ("NaN in place of its dormant values acts", model, with_nan, "bits"),
        (
            "a plain module with its weights acts otherwise",
            model if together.is_cut else _copied(model),
            with_plain,
            "rounding",
        ),
    )
    for claim, masked, changed, likeness in trials:
        expected = run(masked)
        differs = _try(changed, layers, expected, likeness, together)
        if differs and together.say(_difference(run(masked), expected, likeness, together)):
            warnings.warn(
                f"two calls of the model {mode}, with one input and one state of the random generators, differ: whether "
                "NaN appears is all that they can tell",
                stacklevel=3,
            )
            likeness = "nan"
            differs = _try(changed, layers, expected, likeness, together)
        if differs:  # which layers are to blame? where none is alone, all are
            alone = {name: _try(changed, {name: one}, expected, likeness, together) for name, one in layers.items()}
            for name, difference in alone.items():
                if difference or not any(alone.values()):
                    failures[name].append(f"{claim} {mode}: {difference or differs}")


def _run(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], training: bool, is_cut: bool) -> Results:
    """Call a model; return its outputs and, in training mode, the gradients of a sum over them with fixed weights."""
    results: Results = {}
    with _unchanged(model), torch.inference_mode(False), torch.set_grad_enabled(training):
        if model.training != training:
            model.train(training)
        if is_cut:
            reshard(model)
        stored = dict(model.named_parameters())  # of which FSDP2 puts gathered copies in their places
        leaves = {key: _leaf(value, training) for key, value in (*enumerate(inputs), *kwargs.items())}
        given = {
            key: leaf.clone() if isinstance(leaf, Tensor) and leaf.requires_grad else leaf
            for key, leaf in leaves.items()
        }
        output = model(*(given[place] for place in range(len(inputs))), **{name: given[name] for name in kwargs})
        tensors = list(_tensors(output))
        if not tensors:
            raise ValueError(
                f"check_masks compares the tensors that a model returns; got none in a {type(output).__name__}: call a "
                "module that returns tensors, in tuples, dicts or dataclasses"
            )
        if training:
            held = stored if is_cut else dict(model.named_parameters())
            parameters: dict[str, Tensor] = {name: tensor for name, tensor in held.items() if tensor.requires_grad}
            for key, leaf in leaves.items():
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    parameters[f"input {key}"] = leaf
            results |= _gradients(tensors, parameters, is_cut)
        if is_cut:
            reshard(model)
    return results | {("output", str(place)): tensor.detach() for place, tensor in enumerate(tensors)}


def _gradients(outputs: list[Tensor], parameters: dict[str, Tensor], is_cut: bool) -> Results:
    outputs = [tensor for tensor in outputs if tensor.requires_grad]
    if not outputs or not parameters:
        return {}
    generator = torch.Generator().manual_seed(0)
    g = []
    for y in outputs:
        dtype = torch.complex64 if y.is_complex() else torch.float32
        drawn = torch.randn(y.shape, generator=generator, dtype=dtype).to(device=y.device, dtype=y.dtype)
        g.append(as_dtensor_like(drawn, y))
    leaves = list(parameters.values())
    gradients = (
        accumulated(outputs, parameters, g) if is_cut else torch.autograd.grad(outputs, leaves, g, allow_unused=True)
    )
    return {
        ("gradient of", name): gradient.to_dense() if gradient.layout is not torch.strided else gradient
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }


def _leaf(value: Any, training: bool) -> Any:
    """Return a copy of an input, if it is a tensor, which asks for a gradient as the input does."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(training and value.requires_grad)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # the outputs of Hugging Face's models among them
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Set modes, buffers, random generators and what layers know of their weights back to what they were."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else (version_of(buffer), buffer.clone()))
        for module in modules
        for name, buffer in module._buffers.items()
        if not (isinstance(module, MaskedWeight) and name == "mask")
    ]
    copied = [(layer._own, layer._own.copied) for layer in modules if isinstance(layer, MaskedWeight)]
    cuda = sorted({tensor.get_device() for tensor in model.parameters() if tensor.is_cuda})
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if buffer is not None and before is not None and version_of(buffer) != before[0]:
                    buffer.copy_(before[1])
        for own, was_copied in copied:
            own.copied = was_copied


@contextmanager
def _nan_dormant(layers: Layers) -> Iterator[None]:
    """Put NaN in place of dormant values."""
    stores = {id(layer._dormant): layer._dormant for layer in layers.values()}
    values = {key: store.values for key, store in stores.items()}
    try:
        for layer in layers.values():
            weight = layer.weight.detach()
            layer._dormant.values = on_parts(
                lambda weight, mask: torch.full_like(weight, torch.nan).masked_fill_(mask, 0),
                weight,
                as_dtensor_like(layer.mask, weight),
            )
        yield
    finally:
        for key, store in stores.items():
            store.values = values[key]


def _with_plain(model: nn.Module, layers: Layers) -> nn.Module:
    """Return a copy of a model in which these layers are plain ones."""
    plain = _copied(model)
    masks = masked_weights(plain)
    for name in layers:
        release(masks[name])
    return plain


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model; of weights that hooks compute before each call, which are no leaves, without their graph."""
    computed = {
        id(value): value.detach()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)


def _weights(model: nn.Module, layers: Layers) -> dict[str, tuple[Literal["gradient of"], str]]:
    """Return the key of the gradient of each layer's weight in the results of a run."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {name: id(layer._parameters.get("weight")) for name, layer in layers.items()}
    return {name: ("gradient of", names[weight]) for name, weight in held.items() if weight in names}


def _under_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return what stands under a mask that is not +0, in its place, and +0 elsewhere; cut as the tensor is."""
    return on_parts(
        lambda part, live: torch.where(live.to(part.device), 0, part), tensor, as_dtensor_like(mask, tensor)
    )


def _try(
    run: Callable[[Layers], Results], layers: Layers, expected: Results, likeness: Likeness, together: Together
) -> str:
    """Run with changes to these layers; say what differs, or what is raised, in whichever process."""
    try:
        results = run(layers)
    except Exception as error:  # whatever a model does there, it does not do it otherwise
        together.largest({})
        return together.say(f"it raises {type(error).__name__}: {error}")
    return together.say(_difference(results, expected, likeness, together))


def _difference(results: Results, expected: Results, likeness: Likeness, together: Together) -> str:
    """Say what differs first; nothing if all is alike."""
    own = {
        kind: max(_largest(local_part(y)) for (one, _), y in expected.items() if one == kind) for kind, _ in expected
    }
    largest = together.largest(own)
    if results.keys() != expected.keys():
        return "it has other outputs or gradients"
    for key, y in expected.items():
        if not _alike(local_part(results[key]), local_part(y), likeness, largest[key[0]]):
            return f"{' '.join(key)} differs"
    return ""


def _alike(one: Tensor, other: Tensor, likeness: Likeness, largest: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if likeness == "bits" or not (other.is_floating_point() or other.is_complex()):
        one, other = (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in (one, other))
        return likeness == "nan" or torch.equal(*(bits_of(y.contiguous()) for y in (one, other)))
    if likeness == "nan":
        return torch.equal(one.isnan(), other.isnan())
    # Rounding adds up through a deep model; what acts that should not is far larger. Next to what is largest, since a
    # gradient may be 0 but for rounding.
    near = largest * torch.finfo(other.dtype).eps ** 0.5
    return bool(torch.isclose(one, other, rtol=0, atol=near, equal_nan=True).all())


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value that is finite."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
