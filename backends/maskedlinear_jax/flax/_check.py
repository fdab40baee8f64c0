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

_OTHER_INPUTS = 4  # that are tried before outputs count as constant
_SLACK = 1e-9  # relative to the largest output, in float64


def check_masks(model: Any, *inputs: Any, **named: Any) -> MaskCheck:
    """Show on an input that what is masked in a model acts masked; the model is left as it is.

    For each masked weight: that it is +0 under the mask; that NaN in place of what is dormant changes no output and no
    gradient; that the gradient which reaches it, from whoever reads it, is +0 under the mask, where a :class:`MaskedLinear`
    has it (of other modules :func:`maskedlinear.jax.freeze_masked` masks it); and that the model without masks, +0 in their
    place, has the same outputs, up to rounding in float64. And the outputs must depend on the inputs: where others change no
    bit of them, ``is_constant`` says so, as where no live connection lies on a path from an input to an output. Each call
    is of a copy, in evaluation.

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
        is_constant = _is_constant(reference, given, expected[0])
    return MaskCheck(list(failures), {name: wrong for name, wrong in failures.items() if wrong}, is_constant)


def _is_constant(model: Any, given: Any, expected: Any) -> bool:
    """Whether other inputs change no bit of what a model returns, as far as can be told.

    Inputs of floats get others; where there are none, the entries of the first array of whole numbers change places.
    """

    def floats(tree: Any) -> list[Any]:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
        return [leaf for leaf in leaves if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)]

    known, told = floats(expected), False
    if not known or not all(np.isfinite(leaf).all() for leaf in known):
        return False
    leaves, structure = jax.tree.flatten(given)
    arrays = [place for place, leaf in enumerate(leaves) if hasattr(leaf, "dtype") and leaf.size]
    noisy = [place for place in arrays if jnp.issubdtype(leaves[place].dtype, jnp.inexact)]
    for seed in range(_OTHER_INPUTS):
        generator, others = np.random.default_rng(seed), list(leaves)
        for place in noisy:
            x = np.asarray(leaves[place])
            others[place] = jnp.asarray(x + 3**seed * generator.standard_normal(x.shape) * (1 + np.abs(x)), x.dtype)
        for place in () if noisy else arrays[:1]:
            x = np.asarray(leaves[place])
            others[place] = jnp.asarray(generator.permutation(x.reshape(-1)).reshape(x.shape), x.dtype)
        if all(np.array_equal(others[place], leaves[place]) for place in arrays):
            continue
        inputs, named = jax.tree.unflatten(structure, others)
        try:
            found = floats(nnx.clone(model)(*inputs, **named))
        except Exception:  # other inputs than a user's may be none for the model: nothing is known then
            return False
        if len(found) != len(known) or not all(map(np.array_equal, found, known)):
            return False
        told = True
    return told


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
