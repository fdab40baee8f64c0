"""``check_masks`` for nnx: shows on an input that what is masked acts masked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskedlinear.models import MaskCheck
from maskedlinear_jax._compat import enable_x64
from maskedlinear_jax.flax._modules import as_double, doubled, kernel_gradients, layers_of
from maskedlinear_jax.flax._nnx import MaskedLinear

__all__ = ["check_masks"]

_SLACK = 1e-9  # relative to the largest output, in float64


def check_masks(model: Any, *inputs: Any, **named: Any) -> MaskCheck:
    """Show on an input that what is masked in a model acts masked; the model is left as it is.

    For each :class:`MaskedLinear`: that its kernel is +0 under the mask; that NaN in place of what is dormant changes no
    output and no gradient; that the gradient which reaches the kernel, from whoever reads it, is +0 under the mask; and
    that the model has the same outputs with a plain ``nnx.Linear`` of the masked kernel in its place, up to rounding in
    float64. Each call is of a copy, in evaluation.

    Args:
        model: any nnx module that can be called.
        inputs: what it is called with.
        named: what it is called with, by name.

    Returns:
        What is wrong, for each layer by name.
    """
    layers = layers_of(model, MaskedLinear)
    failures: dict[str, list[str]] = {name: [] for name in layers}
    with enable_x64(True):
        reference, given = doubled(model), jax.tree.map(as_double, (inputs, named))
        expected = _outputs_and_gradients(reference, given)

        def differs(change: Callable[[Any], None], is_alike: Callable[[Any, Any], bool], names: Iterable[str]) -> bool:
            changed = nnx.clone(reference)
            for name, layer in layers_of(changed, MaskedLinear).items():
                if name in names:
                    change(layer)
            return not is_alike(_outputs_and_gradients(changed, given), expected)

        gradients = kernel_gradients(expected[1])
        for name, layer in layers.items():
            masked = ~np.broadcast_to(layer._checked_mask(), layer.kernel.shape)
            if not _is_zero(layer.kernel[...], masked):
                failures[name].append("its kernel is not +0 under the mask")
            if name in gradients and not _is_zero(gradients[name], masked):
                failures[name].append("the gradient of its kernel is not +0 under the mask")
        for change, is_alike, message in (
            (_poison, _are_equal, "what is dormant acts on an output or a gradient"),
            (_make_plain, _are_close, "a plain layer with the masked kernel has other outputs"),
        ):
            if differs(change, is_alike, layers):
                for name in [name for name in layers if differs(change, is_alike, [name])] or layers:
                    failures[name].append(message)
    return MaskCheck(list(failures), {name: wrong for name, wrong in failures.items() if wrong})


def _outputs_and_gradients(model: Any, given: Any) -> tuple[Any, Any]:
    """Return what a call gives, and the gradients of a sum of it, of a copy."""
    inputs, named = given

    def loss(copy: Any) -> Any:
        outputs = copy(*inputs, **named)
        real = [leaf for leaf in map(jnp.asarray, jax.tree.leaves(outputs)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum((jnp.vdot(jnp.cos(jnp.arange(leaf.size)), leaf) for leaf in real), jnp.zeros(())), outputs

    gradients, outputs = nnx.grad(loss, has_aux=True)(nnx.clone(model))
    return outputs, gradients


def _poison(layer: MaskedLinear) -> None:
    if layer.dormant is not None:
        layer.dormant.set_value(jnp.where(layer._checked_mask(), layer.dormant.get_value(), jnp.nan))


def _make_plain(layer: MaskedLinear) -> None:
    if type(layer) is MaskedLinear:
        layer.release()
    else:  # whose call is its own
        layer.kernel.set_value(layer.masked_kernel)


def _is_zero(array: Any, where: Any) -> bool:
    entries = np.asarray(array)[where]
    return not (np.any(entries) or np.signbit(entries).any())


def _are_equal(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(np.array_equal(one, other, equal_nan=True) for one, other in pairs)


def _are_close(found: Any, expected: Any) -> bool:
    """Whether the outputs are the same up to rounding; an argmax may turn on that."""
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(expected[0]), strict=True):
        if jnp.issubdtype(jnp.asarray(other).dtype, jnp.floating):
            slack = _SLACK * np.max(np.nan_to_num(np.abs(other), posinf=0.0), initial=0.0)
            if not np.allclose(one, other, rtol=0, atol=slack, equal_nan=True):
                return False
    return True
