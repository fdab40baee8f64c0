"""What the guard keeps of live connections: fixed values, signs, ties and bounds of parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

from maskedlinear.constraints import Constraints
from maskedlinear.pruning._layers import check_known
from maskedlinear_jax._compat import is_traced
from maskedlinear_jax._tree import ConstrainedMask, is_unmasked, named_leaves

__all__ = ["HeldTree", "apply_constraints", "constraints_of_masks", "keep_constraints"]


def apply_constraints(params: Any, constraints: Any, masks: Any = None) -> Any:
    """Return parameters that keep constraints, for :func:`freeze_masked` to begin with.

    What is tied becomes the mean of its group, bit for bit its value if it is one; what is outside its sign or bounds the
    nearest value inside; what is fixed stays as it is.

    Args:
        params: a tree.
        constraints: as :func:`freeze_masked` takes them.
        masks: as :func:`freeze_masked` takes them: what is masked is +0, and constrains nothing.

    Raises:
        ValueError: as by :func:`freeze_masked`; or if what is fixed is masked, outside its bounds, or tied to another value.

    Example:
        >>> apply_constraints({"w": jnp.array([[1.0, 2.0]])}, {"w": dale([1, -1])})["w"].tolist()
        [[1.0, 0.0]]
    """
    held = HeldTree(constraints)
    return held.mapped(params, lambda own, leaf, mask: _kept(own, leaf, mask, None), masks, check=True)


@jax.jit
def keep_constraints(array: Array, given: ConstrainedMask, trusted: Any = None) -> Array:
    """Return an array that keeps constraints, where its mask has it live.

    Args:
        array: the values.
        given: the constraints, with the mask.
        trusted: where values are that those come to which are tied to them; others may be new.
    """
    return _kept(_Held.of_arrays(given, array.shape), array, given.mask, trusted)


class _Held(NamedTuple):
    """The constraints of a parameter: arrays that broadcast to its shape, and flat places.

    Attributes:
        ndim: of the parameter.
        fixed: which entries are fixed.
        ties: the places of tied entries, and the number of the group of each.
        groups: how many groups there are.
        lower: the least values.
        upper: the greatest.
        tied: which of the places are tied, where that is known in the running program alone; all if ``None``.
    """

    ndim: int
    fixed: Any
    ties: tuple[Any, Any] | None
    groups: int
    lower: Any
    upper: Any
    tied: Any = None

    @classmethod
    def of_arrays(cls, given: ConstrainedMask, shape: tuple[int, ...]) -> _Held:
        """Return the constraints that go with a mask, traced ones too: part of no compiled program."""
        ties = tied = None
        if given.ties is not None:
            whole = jnp.broadcast_to(given.ties, shape).reshape(-1)
            tied = whole >= 0
            ties = np.arange(whole.size), jnp.where(tied, whole, 0)
        groups = 0 if given.ties is None else given.ties.size
        return cls(len(shape), given.fixed, ties, groups, given.lower, given.upper, tied)


def constraints_of_masks(held: HeldTree | None, masks: Any) -> HeldTree | None:
    """Return what a step keeps: constraints that were given once, and those that go with its masks.

    Raises:
        ValueError: if a parameter has both.
    """
    named = named_leaves(masks, of_masks=True)
    of_masks = {name: mask for name, mask in named.items() if isinstance(mask, ConstrainedMask)}
    if not of_masks:
        return held
    both = HeldTree({} if held is None else held._named)
    if twice := sorted(both._named.keys() & of_masks.keys()):
        raise ValueError(
            f"{twice[0]} has constraints of its model, which go with its mask, and others: give one of them"
        )
    both._of_masks = of_masks
    return both


class HeldTree:
    """Constraints of parameters by their names, as the guard needs them.

    Args:
        constraints: a tree like the parameters' or a part of it, or a mapping of names (paths with dots between), whose
            leaves are :class:`maskedlinear.constraints.Constraints` or ``None``.

    Raises:
        TypeError: if a leaf is anything else.
    """

    def __init__(self, constraints: Any) -> None:
        self._named: dict[str, Constraints] = named_leaves(constraints)
        self._of_masks: dict[str, ConstrainedMask] = {}
        self._held: dict[tuple[str, tuple[int, ...]], _Held] = {}
        for name, given in self._named.items():
            if not isinstance(given, Constraints):
                raise TypeError(
                    f"constraints must be Constraints(...) or None for each parameter; got {type(given).__name__} for {name}"
                )

    def of(self, name: str, leaf: Any) -> _Held | None:
        """Return the constraints of a parameter; ``None`` if it has none.

        Raises:
            ValueError: if they do not fit it, or contradict each other.
        """
        given, shape = self._named.get(name), tuple(jnp.shape(leaf))
        if name in self._of_masks:
            return _Held.of_arrays(self._of_masks[name], shape)
        if given is None:
            return None
        if (name, shape) not in self._held:
            entries = _entries(name, given, shape)
            lower, upper = entries.bounds()
            ties = entries.groups()
            ties = None if ties is None or not len(ties[0]) else ties
            fixed = None if entries.fixed is None or not entries.fixed.any() else np.array(entries.fixed)
            groups = 0 if ties is None else int(ties[1].max()) + 1
            self._held[name, shape] = _Held(len(shape), fixed, ties, groups, lower, upper)
        return self._held[name, shape]

    def mapped(self, tree: Any, function: Any, *others: Any, like: Any = None, check: bool = False) -> Any:
        """Return a tree in which parameters with constraints are what a function makes of these and of their leaves in
        the tree and in others, which may have ``None`` there; parameters have the shapes that they have in ``like``.

        Raises:
            ValueError: if there is no parameter of a name; with ``check`` if what is fixed does not keep the rest.
        """
        leaves = named_leaves(tree)
        if not any(isinstance(node, optax.MaskedNode) for node in jax.tree.leaves(tree, is_leaf=_is_left_out)):
            check_known("constraints", self._named, list(leaves))
        shaped = leaves if like is None else named_leaves(like)
        named = [{} if other is None else named_leaves(other, of_masks=True) for other in others]
        made = []
        for name, leaf in leaves.items():
            own = self.of(name, shaped[name])
            if own is None:
                made.append(leaf)
                continue
            rest = [other.get(name) for other in named]
            if check and own.fixed is not None and name in self._named and not is_traced(leaf):
                live = rest[0] if rest and not is_unmasked(rest[0]) else None
                mask = None if live is None or is_traced(live) else np.asarray(live)
                _entries(name, self._named[name], tuple(jnp.shape(leaf)), np.asarray(leaf), mask)
            made.append(function(own, leaf, *rest))
        return jax.tree.unflatten(jax.tree.structure(tree), made)

    def fixed(self, params: Any) -> dict[str, NDArray[np.bool_]]:
        """Return which entries are fixed of parameters that have such, by name."""
        held = {name: self.of(name, leaf) for name, leaf in named_leaves(params).items()}
        return {name: own.fixed for name, own in held.items() if own is not None and own.fixed is not None}

    def refuse_others(self, params: Any, masks: Any) -> None:
        """Raise a ``ValueError`` if parameters whose values are known do not keep the constraints that an optimizer is to
        keep."""

        wrong: list[int] = []

        def note(own: _Held, leaf: Any, mask: Any) -> Any:
            if not (isinstance(leaf, jax.ShapeDtypeStruct) or is_traced(leaf) or is_traced(mask)):
                array = jnp.asarray(leaf)
                wrong.append(int(not jnp.array_equal(_kept(own, array, mask, None), array, equal_nan=True)))
            return leaf

        self.mapped(params, note, masks)
        if any(wrong):
            raise ValueError(
                "an optimizer keeps constraints that its parameters keep when it begins, and these do not: params = "
                "maskedlinear.jax.apply_constraints(params, constraints), before tx.init(params)"
            )

    def gradients(self, gradients: Any, params: Any, live: Any) -> Any:
        """Return gradients of which those of tied entries are the sum of those that are live, and those of fixed ones 0."""

        def constrained(own: _Held, gradient: Any, live: Any) -> Array:
            array: Array = jnp.asarray(gradient)
            if own.ties is not None:
                flat, values, counted = _gathered(own, array, live)
                total = _add_up(own, jnp.where(counted, values, jnp.zeros((), values.dtype)))[..., own.ties[1]]
                array = _scattered(own, array, flat, jnp.where(counted, total, values))
            return array if own.fixed is None else jnp.where(own.fixed, jnp.zeros((), array.dtype), array)

        return self.mapped(gradients, constrained, live, like=params)

    def updates(self, updates: Any, params: Any, live: Any, before: Any) -> Any:
        """Return updates after which parameters keep their constraints.

        Args:
            updates: as the wrapped transformation makes them.
            params: as they are, +0 under their masks.
            live: what is live, ``None`` of a parameter without a mask.
            before: what was live at the last step: those values hold for what is tied to them.
        """

        def constrained(own: _Held, update: Any, param: Any, live: Any, before: Any) -> Array:
            return _update(own, jnp.asarray(update), jnp.asarray(param), live, before)

        return self.mapped(updates, constrained, params, live, before, like=params)


def _is_left_out(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _entries(name: str, given: Constraints, shape: tuple[int, ...], values: Any = None, mask: Any = None) -> Any:
    pattern = given.pattern
    is_sparse = pattern is not None and shape == (pattern.nnz,)
    if not is_sparse and name.split(".")[-1] == "kernel" and any(a.ndim == 1 for a in given.arrays().values()):
        raise ValueError(
            f"the constraints of {name}: those of connections go by a pattern, (out, in), and a Flax kernel is (in, out): "
            "give their transpose, constraints.T"
        )
    try:
        return given.entries(pattern if is_sparse and pattern is not None else shape, values, mask)
    except ValueError as error:
        raise ValueError(f"the constraints of {name}: {error}") from error


def _gathered(own: _Held, array: Array, live: Any) -> tuple[Array, Array, Array]:
    """Return an array with its parameter's axes as one, its tied entries, and which of them are live."""
    assert own.ties is not None
    flat = array.reshape(*array.shape[: array.ndim - own.ndim], -1)  # a gradient for each example has an axis more
    counted = jnp.ones(len(own.ties[0]), bool) if live is None else jnp.asarray(live).reshape(-1)[own.ties[0]]
    counted = counted if own.tied is None else counted & own.tied
    return flat, flat[..., own.ties[0]], counted


def _scattered(own: _Held, array: Array, flat: Array, values: Array) -> Array:
    assert own.ties is not None
    return flat.at[..., own.ties[0]].set(values).reshape(array.shape)


def _add_up(own: _Held, values: Array) -> Array:
    assert own.ties is not None
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    sums = jnp.zeros((*wide.shape[:-1], own.groups), wide.dtype).at[..., own.ties[1]].add(wide)
    return sums.astype(values.dtype)


def _tied(own: _Held, array: Array, live: Any, trusted: Any) -> Array:
    """Return an array whose live tied entries are the mean of their group; bit for bit their value where they are equal.

    Those ``trusted`` alone make the mean, where a group has some.
    """
    if own.ties is None:
        return array
    places, numbers = own.ties
    flat, values, counted = _gathered(own, array, live)
    counts = counted
    if trusted is not None:
        sure = counted & jnp.asarray(trusted).reshape(-1)[places]
        has = jnp.zeros(own.groups, bool).at[numbers].max(sure)[numbers]
        counts = jnp.where(has, sure, counted)
    rank = jnp.where(counts, jnp.arange(len(places), 0, -1), 0)
    best = jnp.zeros(own.groups, rank.dtype).at[numbers].max(rank)
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    first = wide[len(places) - jnp.maximum(best, 1)][numbers]
    spread = jnp.where(counts, wide - first, jnp.zeros((), wide.dtype))
    zeros = jnp.zeros(own.groups, wide.dtype)
    number = jnp.maximum(zeros.at[numbers].add(counts.astype(wide.dtype)), 1)
    mean = zeros.at[numbers].add(spread) / number
    differ = zeros.at[numbers].max(jnp.abs(spread))[numbers] > 0
    new = jnp.where(differ, first + mean[numbers], first).astype(values.dtype)
    return _scattered(own, array, flat, jnp.where(counted, new, values))


def _bounds(own: _Held, dtype: Any) -> tuple[Array | None, Array | None]:
    lower, upper = (None if bound is None else jnp.asarray(bound, dtype) for bound in (own.lower, own.upper))
    return lower, upper


def _kept(own: _Held, leaf: Any, mask: Any, trusted: Any) -> Array:
    """Return a parameter that keeps its constraints."""
    array = jnp.asarray(leaf)
    live = None if is_unmasked(mask) else jnp.asarray(mask).astype(bool)
    new = _tied(own, array, live, trusted)
    lower, upper = _bounds(own, array.dtype)
    zero = jnp.zeros((), array.dtype)
    if lower is not None:
        new = jnp.where(new < lower, lower + zero, new)  # + 0, so that what ends at 0 is +0
    if upper is not None:
        new = jnp.where(new > upper, upper + zero, new)
    if own.fixed is not None:
        new = jnp.where(own.fixed, array, new)
    return new if live is None else jnp.where(live, new, array)


def _update(own: _Held, update: Array, param: Array, live: Any, before: Any) -> Array:
    """Return an update after which a parameter keeps its constraints."""
    if own.ties is not None:
        update, target = _tied(own, update, live, before), _tied(own, param, live, before)
        far = target != param  # of one that has come back
        update = jnp.where(far, _reach(param, target + update.astype(param.dtype), update.dtype), update)
    lower, upper = _bounds(own, param.dtype)
    for bound, is_outside, inwards in ((lower, jnp.less, jnp.inf), (upper, jnp.greater, -jnp.inf)):
        if bound is None:
            continue
        outside = is_outside(param + update.astype(param.dtype), bound)
        new = _reach(param, jnp.broadcast_to(bound, param.shape), update.dtype)
        for _ in range(2):  # p + (b - p) may miss b by a rounding
            missed = is_outside(param + new.astype(param.dtype), bound)
            new = jnp.where(missed, jnp.nextafter(new, jnp.asarray(inwards, new.dtype)), new)
        update = jnp.where(outside, new, update)
    if own.fixed is not None:
        update = jnp.where(own.fixed, jnp.asarray(-0.0, update.dtype), update)
    return update


def _reach(param: Array, target: Array, dtype: Any) -> Array:
    """Return the update that brings a parameter to a target, up to a rounding."""
    return (target - param).astype(dtype)
