"""The products of the sparse form off the CPU: gathered all at once, by kernels in Triton, or by panels multiplied dense.

XLA's compiler for GPUs makes one kernel, without temporaries, of a gather, a multiplication and a sum, unless a loop stands
around them: so nothing is cut into parts. Above a few per cent of live connections the dense product is faster: W, or the
product that is sampled, is there in panels of at most ``LARGEST_PANEL`` bytes, one after the other. Which way is gone is
said by ``maskedlinear._gpu_rule``. Panels are multiplied as ``jnp.dot`` multiplies, by the user's precision, as those of a
dense layer. Operands may be of half types, of which no copy in float32 is made: products are float32 then.
"""

# mypy: disable-error-code="no-untyped-call,no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from maskedlinear import _gpu_rule
from maskedlinear._gpu_rule import Multiply, Product, Way
from maskedlinear_jax import _triton_products
from maskedlinear_jax._partition import wide
from maskedlinear_jax._products import taken

__all__ = ["in_precision", "is_stack_one_by_one", "precision", "sddmm", "sddmm_in_panels", "spmm", "spmm_in_panels"]

# Precisions, and presets of algorithms, by which a GPU multiplies float32 with no more bits than TF32 has.
_AT_MOST_TF32 = {
    *("default", "fastest", "high", "bfloat16", "bfloat16_3x", "tensorfloat32"),
    *("TF32_TF32_F32", "BF16_BF16_F32", "BF16_BF16_BF16", "F16_F16_F32", "F16_F16_F16"),
}
_UNROLLED = 4  # panels that stand in the program one by one, each of which looks at all connections
_SPREAD = 1.5  # of how many connections a panel has on average, so many are unpacked in one step


def precision() -> Any:
    """Return the precision of dense products that is set now: a product keeps it, whenever it is lowered or transposed."""
    return getattr(jax.config, "jax_default_matmul_precision", None)


def in_precision(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule, or a body, whose products have the precision that the product had when it was traced."""

    def within(*arguments: Any, precision: Any, **options: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return rule(*arguments, **options)

    return within


def _product(rows: int, depth: int, pattern: Any, batch: int, dtype: Any, **of: bool) -> Product:
    """Return what the rule is asked: the two of a backward pass share the forming of bits, where the pattern keeps none."""
    nnz = pattern.indices.shape[-1]
    product = Product(rows, depth, nnz, batch, jnp.dtype(dtype).itemsize, _multiply(dtype), **of)
    if pattern.bits is not None:
        return _gpu_rule.panels_by_bits(product)
    return product._replace(forms_bits=0.5 if product.transposed or product.sampled else 1.0)


def _way(rows: int, depth: int, pattern: Any, batch: int, dtype: Any, **of: bool) -> Way:
    """Return how a product is formed."""
    product = _product(rows, depth, pattern, batch, dtype, **of)
    ways: list[Way] = ["panels"]
    if pattern.bits is not None and not (product.transposed or product.sampled):
        ways.append("reduced")
    if _triton_products.are_used(rows, depth, batch):  # in a fixed order, and faster than what is gathered
        ways += ["rows", "tiles"] if product.transposed or product.sampled else ["rows", "bits", "tiles"]
    else:
        ways.append("gathered")
    return _gpu_rule.choose(ways, product)


def is_stack_one_by_one(one: Array, other: Array, pattern: Any) -> bool:
    """Whether each product of a stack, of (stack, nnz) and (stack, in, batch), or of two sides, is one that unpacks W.

    All in one, they would be as if of one pattern with empty corners.
    """
    rows, depth = (index.shape[-1] - 1 for index in (pattern.indptr, pattern.starts))
    if not one.size or not other.size:
        return False
    return _way(rows, depth, pattern, other.shape[-1], other.dtype, sampled=one.ndim > 2) not in ("gathered", "rows")


def spmm(values: Array, right: Array, pattern: Any, *, transposed: bool) -> Array:
    """Return W · right, shape (out, batch) for right (in, batch); or, transposed, Wᵀ · right.

    Raises:
        ValueError: if the pattern keeps bits of another shape.
    """
    depth, batch = right.shape
    starts, across = (pattern.starts, pattern.outputs) if transposed else (pattern.indptr, pattern.indices)
    count, of = starts.shape[0] - 1, wide(right.dtype)
    if not values.size or not batch or not count:
        return jnp.zeros((count, batch), of)
    way = _way(count, depth, pattern, batch, right.dtype, transposed=transposed)
    if way == "panels":
        return spmm_in_panels(values, right, pattern, transposed=transposed)
    if way == "rows":
        return _triton_products.rows_spmm(values, right, starts, across, pattern.order if transposed else None)
    if way == "bits":
        return _triton_products.bits_spmm(values, right, pattern)
    if way == "tiles":
        return _triton_products.tiles_spmm(values, right, pattern, _multiply(right.dtype), transposed=transposed)
    if way == "reduced":
        return _reduced(values, right, pattern)
    rows = pattern.indices[pattern.order] if transposed else pattern.rows
    values = values[pattern.order] if transposed else values
    gathered = values[:, None].astype(of) * right[across].astype(of)
    return jnp.zeros((count, batch), of).at[rows].add(gathered, indices_are_sorted=True)


def _reduced(values: Array, right: Array, pattern: Any) -> Array:
    """Return W · right for a column or two, by bits: XLA unpacks W and adds up in one kernel, for both columns."""
    live, of = _by_bits(*_triton_products.bits_of(pattern))
    numbers, sums = taken(values, of), wide(right.dtype)
    sides = _to_whole_words(right).astype(sums).T.reshape(right.shape[1], *of.shape[1:])
    products = (jnp.where(live, numbers.astype(sums) * side, 0) for side in sides)
    return jnp.stack([product.sum((1, 2)) for product in products], 1)


def sddmm(left: Array, right: Array, pattern: Any) -> Array:
    """Return left · rightᵀ at the connections, shape (nnz,), for left (out, batch) and right (in, batch)."""
    size, batch, of = pattern.indices.size, right.shape[1], wide(right.dtype)
    if not size or not batch:
        return jnp.zeros(size, of)
    way = _way(left.shape[0], right.shape[0], pattern, batch, right.dtype, sampled=True)
    if way == "panels":
        return sddmm_in_panels(left, right, pattern)
    if way == "rows":
        return _triton_products.rows_sddmm(left, right, pattern)
    if way == "tiles":
        return _triton_products.tiles_sddmm(left, right, pattern, _multiply(right.dtype))
    return (left[pattern.rows].astype(of) * right[pattern.indices].astype(of)).sum(1)


def spmm_in_panels(values: Array, right: Array, pattern: Any, *, transposed: bool) -> Array:
    """Return W · right, panel by panel; or, transposed, Wᵀ · right, to which each panel of W adds.

    So values are read as they lie: to find those of a column takes several times as long.
    """
    count, depth = (index.shape[0] - 1 for index in (pattern.indptr, pattern.starts))
    batch, of = right.shape[1], wide(right.dtype)

    def step(product: Array, panel: _Panel) -> Array:
        def unpack(unpacked: Array, places: Array, places_in_panel: Array) -> Array:
            return unpacked.at[places_in_panel].set(_at(values, places), mode="drop", unique_indices=True)

        if asked.by_xla:
            unpacked = panel.unpacked(values)
        else:
            unpacked = jnp.full(panel.size, panel.zero.astype(right.dtype))
            unpacked = panel.visit(unpack, unpacked).reshape(panel.height, depth)
        if transposed:
            side = lax.dynamic_slice_in_dim(right, panel.first, panel.height)
            return product + jnp.matmul(unpacked.T, side, preferred_element_type=of)[:depth]
        found = jnp.matmul(unpacked, right, preferred_element_type=of)
        return lax.dynamic_update_slice_in_dim(product, found, panel.first, 0)

    sizes = (depth, count) if transposed else (count, depth)
    asked = _product(*sizes, pattern, batch, right.dtype, transposed=transposed)
    if asked.by_xla and not transposed:
        right = _to_whole_words(right)
    return _over_panels(step, jnp.zeros((sizes[0], batch), of), pattern, asked)


def sddmm_in_panels(left: Array, right: Array, pattern: Any) -> Array:
    """Return left · rightᵀ at the connections, of which a panel is there in full at a time."""
    (count, batch), depth, size, of = left.shape, right.shape[0], pattern.indices.size, wide(right.dtype)
    asked = _product(count, depth, pattern, batch, right.dtype, sampled=True)
    if asked.by_xla:
        right = _to_whole_words(right)

    def step(sampled: Array, panel: _Panel) -> Array:
        # From where the compiler does not know: of two panels it would make one product.
        side = lax.dynamic_slice_in_dim(left, panel.first + panel.zero.astype(jnp.int32), panel.height)
        dense = jnp.matmul(side, right.T, preferred_element_type=of).reshape(-1)
        if asked.by_xla:
            return panel.sample(sampled, dense)

        def sample(sampled: Array, places: Array, places_in_panel: Array) -> Array:
            numbers = dense.at[places_in_panel].get(mode="fill", fill_value=0)
            if panel.height == count:
                return numbers
            # Those of other panels are written nowhere.
            places = jnp.where(places_in_panel < panel.size, places, size)
            return sampled.at[places].set(numbers, mode="drop", unique_indices=True)

        return panel.visit(sample, sampled)

    return _over_panels(step, jnp.zeros(size, of), pattern, asked)


def _to_whole_words(side: Array) -> Array:
    """Return a side (depth, batch) with zeros behind it, as far as words of bits go: so wide is a panel by bits."""
    return jnp.pad(side, ((0, -side.shape[0] % 32), (0, 0)))


class _Panel(NamedTuple):
    """Rows of W, or of what is sampled, from ``first`` on, of which those before ``fresh`` are empty.

    ``zero`` is one that no other panel has, for all that the compiler knows: it would keep zeros for two of them.
    """

    pattern: Any
    first: Any
    fresh: Any
    height: int
    zero: Array

    @property
    def depth(self) -> int:
        return int(self.pattern.starts.shape[0]) - 1

    @property
    def size(self) -> int:
        return self.height * self.depth

    def visit(self, visit: Callable[[Array, Array, Array], Array], state: Array) -> Array:
        """Return ``state`` after ``visit`` of all connections of the panel: their places, and those in the panel.

        In steps, which may see others', that lie behind the panel's end, and some twice.
        """
        pattern, size = self.pattern, self.pattern.indices.size
        panels = -(-(pattern.indptr.shape[0] - 1) // self.height)
        most = min(size, int(_SPREAD * size / panels) + 1)
        if panels <= _UNROLLED or most == size:
            places = jnp.arange(size, dtype=jnp.int32)
            return visit(state, places, self._within(pattern.rows, pattern.indices))
        ends = (self.fresh, self.first + self.height)
        start, end = (jnp.clip(pattern.indptr[row], 0, size) for row in ends)  # a state may have brought any

        def step(i: Array, state: Array) -> Array:
            first = jnp.minimum(start + i * most, size - most)
            rows, columns = (lax.dynamic_slice_in_dim(of, first, most) for of in (pattern.rows, pattern.indices))
            return visit(state, first + jnp.arange(most, dtype=jnp.int32), self._within(rows, columns))

        return lax.fori_loop(0, -((start - end) // most), step, state)

    def unpacked(self, values: Array) -> Array:
        """Return the panel by bits, as wide as their words are: one kernel, which writes each place once."""
        live, of = self._by_bits()
        return jnp.where(live, taken(values, of), 0).reshape(self.height, -1)

    def sample(self, sampled: Array, dense: Array) -> Array:
        """Write the numbers of a panel, as wide as the words of bits are, that are live to their places in ``sampled``."""
        live, of = self._by_bits()
        of = jnp.where(live, of, sampled.size)  # those of other places are written nowhere
        return sampled.at[of].set(dense.reshape(of.shape), mode="drop", unique_indices=True)

    def _by_bits(self) -> tuple[Array, Array]:
        """Return which places are live, (height, words, 32), and which connection each of these is."""
        rows = self.first + self.zero.astype(jnp.int32) + jnp.arange(self.height, dtype=jnp.int32)
        kept = _triton_products.bits_of(self.pattern)
        live, of = _by_bits(*(lax.dynamic_slice_in_dim(each, rows[0], self.height) for each in kept))
        return live if self.fresh is self.first else live & (rows >= self.fresh)[:, None, None], of

    def _within(self, rows: Array, columns: Array) -> Array:
        """Return where connections lie in the panel, row by row; behind its end, those that are not in it.

        One number for both indices, since XLA writes pairs of them to memory before it reads them.
        """
        inside = (rows >= self.fresh) & (rows < self.first + self.height) & (columns >= 0) & (columns < self.depth)
        return jnp.where(inside, (rows - self.first) * self.depth + columns, self.size)


def _by_bits(bits: Array, firsts: Array) -> tuple[Array, Array]:
    """Return which places of rows are live, (rows, words, 32), and which connection each of these is: of wrong bits, any."""
    bits, place = bits[:, :, None], jnp.arange(32, dtype=jnp.int32)
    of = firsts[:, :, None] + lax.population_count(bits & ((1 << place) - 1))
    return bits >> place & 1 != 0, of.astype(jnp.uint32)  # of which none counts from the end


def _at(values: Array, places: Array) -> Array:
    """Return values at consecutive places; as they are, if these are all."""
    return values if places.size == values.size else lax.dynamic_slice_in_dim(values, places[0], places.size)


def _over_panels(step: Callable[[Array, _Panel], Array], state: Array, pattern: Any, product: Product) -> Array:
    """Go over all panels, one after the other: the last may begin with rows of the one before it, made once more.

    But not where panels add up.
    """
    count, panels = pattern.indptr.shape[0] - 1, _gpu_rule.panels(product)
    height = -(-count // panels)

    def at(i: Any, state: Array, first: Any, zero: Array) -> Array:
        return step(state, _Panel(pattern, first, i * height if product.transposed else first, height, zero))

    if panels > _UNROLLED:
        return lax.fori_loop(
            0, panels, lambda i, state: at(i, state, jnp.minimum(i * height, count - height), i < 0), state
        )
    zero = jnp.asarray(False)
    for i in range(panels):
        if i:  # not side by side, which would have several panels there at once
            state, zero = lax.optimization_barrier((state, zero))
        state = at(i, state, min(i * height, count - height), zero)
    return state


def _multiply(dtype: Any) -> Multiply:
    """How the dense product multiplies numbers of ``dtype`` on a GPU: float32 by TF32, unless a precision is set."""
    if jnp.dtype(dtype).itemsize < 4:
        return "half"
    if jnp.dtype(dtype) == jnp.float64:
        return "float64"
    asked = precision()
    return "tf32" if asked is None or str(asked).rpartition(".")[2] in _AT_MOST_TF32 else "float32"
