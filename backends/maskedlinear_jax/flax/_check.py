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
from maskedlinear_jax._tree import named_leaves
from maskedlinear_jax.flax._adapter import refuse_linen
from maskedlinear_jax.flax._kernel import masked_kernel
from maskedlinear_jax.flax._modules import as_double, doubled
from maskedlinear_jax.flax._weights import MaskedParameter, masked_weights

__all__ = ["check_masks"]

_SLACK = 1e-9  # relative to the largest output, in float64


def check_masks(model: Any, *inputs: Any, **named: Any) -> MaskCheck:
    """Show on an input that what is masked in a model acts masked; the model is left as it is.

    For each masked weight: that it is +0 under the mask; that NaN in place of what is dormant changes no output and no
    gradient; that the gradient which reaches it, from whoever reads it, is +0 under the mask, where a :class:`MaskedLinear`
    has it (of other modules :func:`maskedlinear.jax.freeze_masked` masks it); and that the model without masks, +0 in their
    place, has the same outputs, up to rounding in float64. Each call is of a copy, in evaluation.

    Args:
        model: any nnx module that can be called.
        inputs: what it is called with.
        named: what it is called with, by name.

    Returns:
        What is wrong, for each weight by name.
    """
    refuse_linen("check_masks", model)
    layers = masked_weights(model)
    failures: dict[str, list[str]] = {name: [] for name in layers}
    with enable_x64(True):
        reference, given = doubled(model), jax.tree.map(as_double, (inputs, named))
        expected = _outputs_and_gradients(reference, given)

        def differs(change: Callable[[Any], None], is_alike: Callable[[Any, Any], bool], names: Iterable[str]) -> bool:
            changed = nnx.clone(reference)
            for name, layer in masked_weights(changed).items():
                if name in names:
                    change(layer)
            return not is_alike(_outputs_and_gradients(changed, given), expected)

        gradients = named_leaves(expected[1])
        for name, layer in layers.items():
            masked, full_name = ~np.asarray(layer.live), layer.full_name
            if not _is_zero(layer.value, masked):
                failures[name].append("its kernel is not +0 under the mask")
            if layer.is_ours and full_name in gradients and not _is_zero(gradients[full_name], masked):
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


def _poison(layer: MaskedParameter) -> None:
    if layer.dormant is not None:
        layer.dormant.set_value(jnp.where(layer.live, layer.dormant.get_value(), jnp.nan))


def _make_plain(layer: MaskedParameter) -> None:
    layer.kernel.set_value(masked_kernel(layer.value, layer.live))
    layer.release()  # but for a subclass, whose call is its own


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
