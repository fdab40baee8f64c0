"""``StraightThrough`` (SR-STE) and ``TopKAST``: sparse weights that are computed of dense parameters, which train.

What is inactive is trained too, so it cannot be dormant: each weight is a parametrization (``torch.nn.utils.parametrize``)
of a dense parameter apart. Whoever reads ``layer.weight`` gets the sparse weight, which acts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from maskedlinear.masks._random import checked_zeros
from maskedlinear.masks._structured import check_groups
from maskedlinear.models import ModelWeight, WeightAxes, first_names, warn_of_left_out, weights_to_mask
from maskedlinear.pruning._layers import Include
from maskedlinear.pruning._over_time import Steps
from maskedlinear_torch._dense_parameter import (
    DenseParameter,
    LossScale,
    StraightThroughParameter,
    TopKASTParameter,
    copy_without_graph,
    refuse_cut,
)
from maskedlinear_torch._masked_weight import KeepDormant, check_keep_dormant
from maskedlinear_torch._selection import Order
from maskedlinear_torch._weights import computed_weights, model_weights
from maskedlinear_torch._whole import mask_model

__all__ = ["StraightThrough", "TopKAST"]

Weights = dict[str, tuple[DenseParameter, list[tuple[nn.Module, str]]]]  # who reads each: modules, and its name there

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _DenseTraining:
    """Weights of a model that are computed of dense parameters, from now until ``finish``.

    Attributes:
        model: which they are of.
    """

    def __init__(self, model: nn.Module, include: Include, made: Callable[[ModelWeight], DenseParameter]) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(self).__name__} takes a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self._weights: Weights = {}
        every = model_weights(model)
        weights = [weight for weight in every if weight.mask is None and weight.sparse is None]
        masked = [weight.name for weight in every if weight.mask is not None]
        if masked and include is None and all(weight.why for weight in weights):
            raise ValueError(
                f"{first_names(masked)} have masks already: call unmask_model(model) before {type(self).__name__}"
            )
        chosen = [weight for weight, _ in weights_to_mask(model, weights, {}, include, _no_mask, _no_mask, False)]
        for weight in chosen:
            refuse_cut(weight.value, weight.name)
        computed = {weight.name: made(weight) for weight in chosen}  # all, before the first changes the model
        for weight in chosen:
            users = [(user.module, user.parameter) for user in weight.users]
            for module, name in users:
                parametrize.register_parametrization(module, name, computed[weight.name])
            self._weights[weight.name] = computed[weight.name], users
        for module in dict.fromkeys(module for _, users in self._weights.values() for module, _ in users):
            copy_without_graph(module)
        if include is None:
            left_out = [(weight.name, weight.why) for weight in weights] + [(name, "masked already") for name in masked]
            warn_of_left_out(left_out, stacklevel=4, by=type(self).__name__)

    @property
    def masks(self) -> dict[str, Tensor]:
        """A copy of the mask of each of these weights as it is now, by name."""
        return _masks(self._weights)

    def finish(self, model: nn.Module | None = None, *, keep_dormant: KeepDormant = True) -> nn.Module:
        """Make ordinary masked weights of the computed ones, as by :func:`mask_model`, and return the model.

        The masks are those of now, and outputs stay what they are. Parameters are the same objects, in any optimizer that
        holds them; that one's state is of the dense parameters: make a new optimizer, guarded by :func:`freeze_masked`.

        Args:
            model: a copy or an average (``AveragedModel``) of the model in its place, which does not change.
            keep_dormant: as in :class:`MaskedLinear`: what is inactive becomes dormant.

        Raises:
            ValueError: if it was called before, or the model was cut over processes.
        """
        check_keep_dormant(keep_dormant)
        weights = self._weights if model is None else _computed_in(model, type(self).__name__)
        if not weights:
            raise ValueError(
                f"no weight is computed by {type(self).__name__} here: it is finished, and they are ordinary masked ones"
            )
        for name, (_, users) in weights.items():
            refuse_cut(_dense(users), name)
        masks = _masks(weights)
        for _, users in weights.values():
            for module, name in users:
                # The class is shared with copies of the module, and would be without the weight in all of them.
                own, shared = type(module), ("__dict__", "__weakref__")
                content = {key: value for key, value in vars(own).items() if key not in shared}
                module.__class__ = type(own.__name__, own.__bases__, content)
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        if model is None:
            self._weights = {}
        return mask_model(self.model if model is None else model, masks, keep_dormant=keep_dormant)


class StraightThrough(_DenseTraining):
    """Trains sparse weights by straight-through gradients to dense parameters, SR-STE::

        method = StraightThrough(model, n_of_m=(2, 4))
        ...  # train, with any optimizer
        method.finish()

    A weight is the dense parameter's largest entries, chosen anew whenever it is read, and 0 elsewhere. Its gradient arrives
    at all of the dense parameter, and decays what is inactive: ``g + decay * (1 - mask) * dense``.

    The dense parameter is ``layer.parametrizations.weight.original``, the same object that the weight was before, so that an
    optimizer holds it already; states have it under that name. Averages of the model average it.

    Source: A. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021, and
    ``sparse_ops.py`` of github.com/aojunzz/NM-sparsity.

    Args:
        model: any module; changed in place.
        n_of_m: keep n of each m successive inputs of an output; of a convolution of its channels, at each place of the
            window. Give this or ``sparsity``.
        sparsity: the fraction of each matrix that is 0, in [0, 1).
        decay: as above; 0.0002 in the paper.
        include: which weights, as in :func:`mask_model`; those that have a mask already, or are sparse, are none.
        loss_scale: returns what the loss is multiplied by, as ``scaler.get_scale`` of a ``torch.amp.GradScaler``, so that
            the decay is too. The decay is added once a backward pass for each time that a weight was read in the forward
            pass (at each step of a recurrent cell); within ``torch.nn.utils.parametrize.cached()`` that is once.

    Raises:
        ValueError: if not one of ``n_of_m`` and ``sparsity`` is given, or it is out of its range; if inputs do not divide
            into groups, or the axes of a weight are not known; if there is no such weight, or processes have cut it.
        TypeError: if ``model`` is no module.

    >>> import torch
    >>> from maskedlinear.torch import StraightThrough
    >>> layer = torch.nn.Linear(4, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -4, 3, 2]]))
    >>> method = StraightThrough(layer, n_of_m=(2, 4))
    >>> layer.weight.tolist()
    [[0.0, -4.0, 3.0, 0.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        n_of_m: tuple[int, int] | None = None,
        sparsity: float | None = None,
        decay: float = 2e-4,
        include: Include = None,
        loss_scale: LossScale = None,
    ) -> None:
        if (n_of_m is None) == (sparsity is None):
            raise ValueError(f"give exactly one of n_of_m and sparsity; got {n_of_m!r} and {sparsity!r}")
        _check_positive("decay", decay)

        def made(weight: ModelWeight) -> DenseParameter:
            axes = _axes(weight)
            if n_of_m is None:
                zeros = _zeros("sparsity", sparsity, weight, axes)
                return StraightThroughParameter(_order(weight, axes), loss_scale, None, zeros, decay)
            if weight.axes is None:
                raise ValueError(
                    f"n_of_m needs to know which axes are inputs; nobody knows those of {weight.name}: tell them by "
                    "register_axes, or leave it out with include=..."
                )
            try:
                check_groups((1, _successive_inputs(weight, axes)), *n_of_m)
            except ValueError as error:
                raise ValueError(f"{weight.name or 'the layer'}: {error}; leave it out with include=...") from error
            return StraightThroughParameter(_order(weight, _channels_last(weight, axes)), loss_scale, n_of_m, 0, decay)

        super().__init__(model, include, made)


class TopKAST(_DenseTraining, Steps):
    """Trains sparse weights, whose forward and backward passes are both sparse, Top-KAST::

        method = TopKAST(model, forward_sparsity=0.9, backward_sparsity=0.8)
        for x, y in batches:
            ...
            optimizer.step()
            method.step()
        method.finish()

    A weight is the dense parameter's largest entries (A), and 0 elsewhere. Its gradient arrives at more of the largest (B),
    so that others can take their places, and with it ``penalty`` times the entry in A, and ``penalty / D`` times the entry
    in the rest of B, D being the share of A: the L2 exploration loss. Both sets are of each matrix by itself, and are
    chosen anew every few steps, by :meth:`step`, which follows the optimizer's.

    Nothing else of the dense parameter gets a gradient; an optimizer with momentum or weight decay moves it nonetheless.
    Where the dense parameter is, and what is averaged and saved, is as in :class:`StraightThrough`; the masks are buffers.

    Source: S. Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020.

    Args:
        model: any module; changed in place.
        forward_sparsity: the fraction of each matrix that is 0, in [0, 1): 1 - D.
        backward_sparsity: the fraction that gets no gradient, in [0, ``forward_sparsity``]: 1 - (D + M).
        every: how many steps lie between two choices; 100 in the paper costs no accuracy.
        penalty: of the exploration loss, as above; 0 turns it off.
        include: as in :class:`StraightThrough`.
        loss_scale: as there, for the penalty.

    Attributes:
        steps: how many steps there were; ``state_dict`` and ``load_state_dict`` keep them.

    Raises:
        ValueError: if a value is out of its range; if there is no such weight, or processes have cut it.
        TypeError: if ``model`` is no module.

    >>> import torch
    >>> from maskedlinear.torch import TopKAST
    >>> layer = torch.nn.Linear(4, 1)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.tensor([[1.0, -4, 3, 2]]))
    >>> method = TopKAST(layer, forward_sparsity=0.75, backward_sparsity=0.5, penalty=0)
    >>> layer(torch.ones(4)).backward()
    >>> layer.weight.tolist(), layer.parametrizations.weight.original.grad.tolist()
    ([[0.0, -4.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        forward_sparsity: float,
        backward_sparsity: float,
        every: int = 100,
        penalty: float = 1e-4,
        include: Include = None,
        loss_scale: LossScale = None,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps, at least 1; got {every!r}")
        _check_positive("penalty", penalty)
        if backward_sparsity > forward_sparsity:
            raise ValueError(
                "what is live gets a gradient: backward_sparsity is at most forward_sparsity; got "
                f"{backward_sparsity!r} and {forward_sparsity!r}"
            )

        def made(weight: ModelWeight) -> DenseParameter:
            axes = _axes(weight)
            zeros = (
                _zeros("forward_sparsity", forward_sparsity, weight, axes),
                _zeros("backward_sparsity", backward_sparsity, weight, axes),
            )
            return TopKASTParameter(_order(weight, axes), loss_scale, weight.value.detach(), zeros, penalty)

        self.every = every
        super().__init__(model, include, made)

    def step(self) -> bool:
        """Choose the masks anew if it is time; return whether it was.

        Raises:
            ValueError: if the weights were cut over processes since.
        """
        self.steps += 1
        for name, (_, users) in self._weights.items():
            refuse_cut(_dense(users), name)
        if self.steps % self.every or not self._weights:
            return False
        for computed, users in self._weights.values():
            computed.refresh(_dense(users))  # type: ignore[operator]
        return True


def _masks(weights: Weights) -> dict[str, Tensor]:
    return {name: computed.mask_of(_dense(users)) for name, (computed, users) in weights.items()}


def _computed_in(model: nn.Module, method: str) -> Weights:
    """Return the weights of a model that are computed by a method, by name, each once."""
    found: dict[int, str] = {}
    weights: Weights = {}
    for one in computed_weights(model):
        if one.computed.method == method:
            first = found.setdefault(id(one.dense), one.name)
            weights.setdefault(first, (one.computed, []))[1].append((one.module, one.parameter))
    return weights


def _axes(weight: ModelWeight) -> WeightAxes:
    """Return a weight's axes; of one that nobody knows, that each entry stands for itself."""
    return weight.axes or WeightAxes.of_entries(weight.value.dim())


def _order(weight: ModelWeight, axes: WeightAxes) -> Order:
    return Order.of(axes, weight.value.dim())


def _is_convolution(weight: ModelWeight) -> bool:
    return isinstance(weight.users[0].module, _CONVOLUTIONS)


def _successive_inputs(weight: ModelWeight, axes: WeightAxes) -> int:
    """Return how many inputs follow each other: the channels of a convolution, else all."""
    if _is_convolution(weight):
        return int(weight.value.shape[axes.order(weight.value.dim())[2][0]])
    return axes.matrix_shape(tuple(weight.value.shape))[2]


def _channels_last(weight: ModelWeight, axes: WeightAxes) -> WeightAxes:
    """Return axes by which the channels of a convolution follow each other, as hardware has them, not its window."""
    if not _is_convolution(weight):
        return axes
    _, out, (channels, *window) = axes.order(weight.value.dim())
    return WeightAxes(out_axis=out, in_axis=(*window, channels))


def _zeros(what: str, sparsity: Any, weight: ModelWeight, axes: WeightAxes) -> int:
    _, out, in_ = axes.matrix_shape(tuple(weight.value.shape))
    zeros = checked_zeros(out * in_, sparsity, None)
    if zeros >= out * in_:
        raise ValueError(
            f"a layer must keep a connection; {what}={sparsity!r} leaves {weight.name or 'the layer'} none"
        )
    return zeros


def _check_positive(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number, at least 0; got {value!r}")


def _dense(users: list[tuple[nn.Module, str]]) -> Tensor:
    """Return the dense parameter as the model has it now."""
    module, name = users[0]
    if not parametrize.is_parametrized(module, name):
        raise ValueError(
            f"the weight of a {type(module).__name__} is no longer computed: its parametrization was removed"
        )
    original: Tensor = module.parametrizations[name].original  # type: ignore[index, union-attr]
    return original


def _no_mask(*_: Any) -> Any:
    raise AssertionError("no masks are given")
