"""Scores of a model's weights by its derivatives: GraSP, Fisher and OBD diagonals, movement; and SynFlow, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maskedlinear import pruning
from maskedlinear._arrays import as_numpy
from maskedlinear.models import Prunable, first_names, prune_weights
from maskedlinear.pruning._layers import Include, matches
from maskedlinear_torch._dtensors import is_sharded
from maskedlinear_torch._regrow import DenseGradients
from maskedlinear_torch._weight_mask import WeightMask
from maskedlinear_torch._weights import masked_weights, model_weights, module_of
from maskedlinear_torch._whole import one_a_weight

__all__ = ["fisher_scores", "grasp_scores", "movement_scores", "obd_scores", "synflow_prune"]

Scores = dict[str, NDArray[np.float64]]
Batch = TypeVar("Batch")
Loss = Callable[[Batch], Tensor]


def grasp_scores(model: nn.Module, loss: Loss[Batch], batches: Iterable[Batch], *, include: Include = None) -> Scores:
    """Return :func:`maskedlinear.pruning.grasp` of each weight, by name, for ``score=`` of :func:`prune_model`::

        scores = grasp_scores(model, lambda batch: loss(model(batch[0]) / 200, batch[1]), batches)
        prune_model(model, 0.9, score=scores)

    Gradients and the Hessian's products with them are summed over batches, as in the authors' code, which keeps one entry
    more than asked for. Attention is computed by ``SDPBackend.MATH``, the one with second derivatives.

    Args:
        model: any module, before it is trained, whose weights are masked or not; in the state that it is in: dropout acts if
            it is in training.
        loss: of a batch, a scalar.
        batches: of whatever ``loss`` takes; held in memory, since each is used twice.
        include: which weights, as in :func:`mask_model`.

    Raises:
        ValueError: if there is no weight or no batch, or weights are frozen or cut over processes.
    """
    weights, kept = _weights_of(model, include), list(batches)
    gradients = [torch.zeros_like(weight) for weight in weights.values()]
    products = [torch.zeros_like(weight) for weight in weights.values()]
    with _second_derivatives():
        for batch in _some(kept):
            _add(gradients, _gradients(loss(batch), weights))
        for batch in kept:
            _add(products, _product_with_hessian(loss(batch), weights, gradients))
    return _scored(pruning.grasp, weights, products)


def obd_scores(
    model: nn.Module,
    loss: Loss[Batch],
    batches: Iterable[Batch],
    *,
    draws: int = 16,
    seed: int = 0,
    include: Include = None,
) -> Scores:
    """Return :func:`maskedlinear.pruning.obd` of each weight, by name, with the Hessian's diagonal estimated.

    The diagonal is the mean of ``z ⊙ H z`` over random signs z (C. Bekas et al., "An estimator for the diagonal of a
    matrix", 2007; the paper of OBD propagates an approximation backwards), of the mean of the batches' losses.

    Args:
        model: as :func:`grasp_scores` takes it, trained.
        loss: as above.
        batches: as above.
        draws: of z for each batch; the estimate's error falls with its root.
        seed: of z.
        include: as above.

    Raises:
        ValueError: as by :func:`grasp_scores`; or if there are no draws.
    """
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws must be a number of 1 or more; got {draws!r}")
    weights, kept = _weights_of(model, include), list(batches)
    diagonals = [torch.zeros_like(weight) for weight in weights.values()]
    random = torch.Generator().manual_seed(seed)
    with _second_derivatives():
        for batch in _some(kept):
            for _ in range(draws):
                signs = [
                    (2.0 * torch.randint(2, weight.shape, generator=random) - 1).to(weight.device, weight.dtype)
                    for weight in weights.values()
                ]
                products = _product_with_hessian(loss(batch), weights, signs)
                _add(diagonals, [sign * product for sign, product in zip(signs, products, strict=True)])
    return _scored(pruning.obd, weights, [diagonal / (draws * len(kept)) for diagonal in diagonals])


def fisher_scores(model: nn.Module, loss: Loss[Batch], examples: Iterable[Batch], *, include: Include = None) -> Scores:
    """Return :func:`maskedlinear.pruning.fisher` of each weight, by name: the squares are of each example's gradient.

    Args:
        model: as :func:`grasp_scores` takes it, trained.
        loss: as above.
        examples: batches of one example each: of more, the square of their mean's gradient would be taken.
        include: as above.

    Raises:
        ValueError: as by :func:`grasp_scores`.
    """
    weights, count = _weights_of(model, include), 0
    squares = [torch.zeros_like(weight) for weight in weights.values()]
    for example in examples:
        count += 1
        with torch.enable_grad():
            _add(squares, [gradient.square() for gradient in _gradients(loss(example), weights)])
    _some(range(count))
    return _scored(pruning.fisher, weights, [square / count for square in squares])


def movement_scores(model: nn.Module, gradients: DenseGradients, before: Mapping[str, Any] | None = None) -> Scores:
    """Return :func:`maskedlinear.pruning.movement` of each masked weight, by name, masked connections included::

        with dense_gradients(model) as gradients:
            loss(model(x)).backward()
        scores = movement_scores(model, gradients, before=scores)
        prune_model(model, 0.5, score=scores, keep_masked=False)

    Masked connections score by their dormant values and the gradient that they would have, so that they can come back, as in
    the paper; ``keep_masked=False`` lets them.

    Args:
        model: a module with masked weights.
        gradients: of :func:`dense_gradients`, of one backward pass.
        before: the scores of the step before; none at the first.

    Raises:
        ValueError: if there is no masked weight, one had no backward pass, or processes have cut one; or if ``before`` lacks
            one.
    """
    layers = one_a_weight(model)
    if not layers:
        raise ValueError("movement_scores scores masked weights, and there is none: make them with mask_model(model)")
    _refuse_cut({name: layer.weight for name, layer in layers.items()})
    lacking = [name for name in layers if before is not None and name not in before]
    if lacking:
        raise ValueError(f"the scores before must be of all masked weights; there are none of {first_names(lacking)}")
    return {
        name: pruning.movement(layer.full_weight, gradients.of(layer), None if before is None else before[name])
        for name, layer in layers.items()
    }


def synflow_prune(
    model: nn.Module,
    sparsity: float,
    inputs: Any,
    *,
    rounds: int = 100,
    scope: pruning.Scope = "global",
    include: Include = None,
    on_empty: pruning.OnEmpty = "raise",
    output: Callable[[Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Prune masked weights by :func:`maskedlinear.pruning.synflow`, in rounds, without any data::

        synflow_prune(mask_model(model), 0.9, torch.empty(1, 3, 32, 32))

    After round r of R ``(1 - sparsity)^(r/R)`` of the connections are left. As in the authors' code all parameters and
    buffers are absolute, the model is in ``eval`` (batch normalisation by its running numbers), and a floating input is all
    ones. Computed in float64, on copies of the parameters: of the model itself only the masks change, at the end.

    Args:
        model: a module with masked weights; :func:`mask_model` makes them.
        sparsity: the fraction of masked connections afterwards, in [0, 1].
        inputs: an example of what the model is called on, a tensor, a tuple, or a dictionary of keywords: its shape counts
            where it is floating; whole numbers, as of tokens, are used as they are.
        rounds: how many, 1 or more.
        scope: as in :func:`prune_model`.
        include: as above.
        on_empty: as above.
        output: takes what the model returns, and returns the tensor that is summed; ``None`` takes a tensor, ``logits``,
            ``last_hidden_state``, or the first of a tuple.

    Returns:
        The masks before.

    Raises:
        ValueError: as by :func:`prune_model`; or if no signal arrives: a last layer normalisation, say, makes the sum
            constant.
        TypeError: if the output is none of these.
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a number of 1 or more; got {rounds!r}")
    layers = {name: layer for name, layer in one_a_weight(model).items() if matches(name, module_of(layer), include)}
    if not layers:
        raise ValueError("synflow_prune prunes masked weights, and there is none: make them with mask_model(model)")
    _refuse_cut({name: layer.weight for name, layer in layers.items()})
    schedule = pruning.GeometricSchedule(sparsity, rounds)
    masks = {name: as_numpy(layer.mask) for name, layer in layers.items()}
    early: pruning.OnEmpty = (
        on_empty if all(mask.all() for mask in masks.values()) else "keep"
    )  # which takes more than asked
    with _evaluated(model), _second_derivatives():
        plain, names = _absolute(model)
        for step in range(1, rounds + 1):
            scores = _flow(
                model,
                plain,
                {name: (names[id(layer.weight)], masks[name]) for name, layer in layers.items()},
                inputs,
                output,
            )
            weights = {
                name: Prunable(layer.weight_axes, layer.weight.detach(), None, masks[name])
                for name, layer in layers.items()
            }
            masks = prune_weights(
                weights, schedule(step), score=scores, scope=scope, on_empty=on_empty if step == rounds else early
            )
    before = {name: layer.mask.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.set_mask(masks[name])
    return before


def _flow(
    model: nn.Module,
    plain: dict[str, Tensor],
    masked: Mapping[str, tuple[Sequence[str], NDArray[np.bool_]]],
    inputs: Any,
    output: Callable[[Any], Tensor] | None,
) -> Scores:
    """Return the scores of weights, by name, of a model with absolute parameters.

    Args:
        model: whose function it is.
        plain: the absolute parameters and buffers, by name.
        masked: by the weight's name, what it is called in the model, and its mask.
        inputs: as :func:`synflow_prune` takes them.
        output: as above.
    """
    weights = {
        name: (plain[called[0]] * torch.from_numpy(mask).to(plain[called[0]].device)).requires_grad_()
        for name, (called, mask) in masked.items()
    }
    replaced = {key: weights[name] for name, (called, _) in masked.items() for key in called}
    arguments, keywords = _ones(inputs)
    result = torch.func.functional_call(model, plain | replaced, arguments, keywords, tie_weights=False)
    outputs = _tensor_of(result if output is None else output(result))
    flow = outputs.sum()
    gradients = (
        torch.autograd.grad(flow, list(weights.values()), allow_unused=True, materialize_grads=True)
        if flow.requires_grad
        else [torch.zeros_like(weight) for weight in weights.values()]
    )
    pairs = zip(weights.items(), gradients, strict=True)
    scores = {name: pruning.synflow(weight, gradient) for (name, weight), gradient in pairs}
    if max(float(own.max(initial=0)) for own in scores.values()) <= 1e-12 * float(outputs.detach().abs().sum()):
        raise ValueError(
            "no signal arrives at the output's sum, which changes with no weight: a last layer normalisation makes it "
            "constant, or a module returns something else; pass output=..., or the part of the model before it"
        )
    return scores


def _absolute(model: nn.Module) -> tuple[dict[str, Tensor], dict[int, list[str]]]:
    """Return absolute copies of a model's parameters and buffers in float64, by name; and each parameter's names."""
    names: dict[int, list[str]] = {}
    plain: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = {} if isinstance(module, WeightMask) else module._parameters | module._buffers
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_floating_point():
                key = f"{path}.{name}" if path else name
                names.setdefault(id(tensor), []).append(key)
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.detach().abs().double()
                plain[key] = copies[id(tensor)]
    return plain, names


def _ones(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments to call a model on: ones where they are floating."""

    def ones(value: Any) -> Any:
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return torch.ones_like(value, dtype=torch.float64) if is_floating else value

    if isinstance(inputs, Mapping):
        return (), {name: ones(value) for name, value in inputs.items()}
    return tuple(map(ones, inputs if isinstance(inputs, tuple | list) else (inputs,))), {}


def _tensor_of(result: Any) -> Tensor:
    """Return the tensor of what a model returns."""
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    result = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(result, Tensor):
        raise TypeError(f"a model must return a tensor, or output=... take one from it; got {type(result).__name__}")
    return result


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Have a model in ``eval`` inside, and as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _second_derivatives() -> Iterator[None]:
    """Compute attention by the one way that has second derivatives, with gradients on."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _weights_of(model: nn.Module, include: Include) -> dict[str, Tensor]:
    """Return the weights of a model that have masks or could have, by name.

    Raises:
        ValueError: if there is none, or they are frozen or cut over processes.
    """
    masked_weights(model)  # which projects them
    weights = {
        weight.name: weight.value
        for weight in model_weights(model)
        if weight.sparse is None
        and (weight.mask is not None or not weight.why)
        and any(matches(user.name, user.module, include) for user in weight.users)
    }
    if not weights:
        raise ValueError(f"there is no weight to score: include={include!r} means none that is masked or could be")
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"scores need the gradient of each weight; frozen ones (requires_grad=False) get none: {first_names(frozen)}: "
            "let them have one, or leave them out with include=..."
        )
    _refuse_cut(weights)
    return weights


def _refuse_cut(weights: Mapping[str, Tensor]) -> None:
    cut = [name for name, weight in weights.items() if is_sharded(weight)]
    if cut:
        raise ValueError(
            f"these scores are of whole weights; processes have cut {first_names(cut)}: score the model before"
        )


def _some(batches: Any) -> Any:
    """Return batches, of which there must be one."""
    if not len(batches):
        raise ValueError("scores need data: there must be at least one batch; got none (an iterator that is used up?)")
    return batches


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"the loss of a batch must be one number; got {getattr(loss, 'shape', type(loss).__name__)}")
    return torch.autograd.grad(
        loss, list(weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _product_with_hessian(loss: Tensor, weights: Mapping[str, Tensor], vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the product of the loss's Hessian and vectors."""
    gradients = _gradients(loss, weights, create_graph=True)
    along = torch.stack([(one * other).sum() for one, other in zip(gradients, vectors, strict=True)]).sum()
    if not along.requires_grad:  # a linear loss
        return [torch.zeros_like(weight) for weight in weights.values()]
    return _gradients(along, weights)


def _add(sums: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for total, other in zip(sums, others, strict=True):
        total += other.detach()


def _scored(score: Callable[[Any, Any], Any], weights: Mapping[str, Tensor], factors: Sequence[Tensor]) -> Scores:
    return {name: score(weight, factor) for (name, weight), factor in zip(weights.items(), factors, strict=True)}
