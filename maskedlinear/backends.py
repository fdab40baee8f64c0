"""What a backend is, and how one is found.

A backend shows one framework's masked linear layer to the conformance suite. It is a class with the methods of
:class:`Backend` and no base class of ours, registered under the entry-point group ``maskedlinear.backends``, whether it
ships with this package or with a third party's. What it cannot do, it declares in ``unsupported``; the methods of
:class:`OptionalMethods` that it does not declare away, it must have.

Values cross the border as NumPy arrays: float64 for every floating dtype (it holds each of their values exactly), bool
for masks. So a backend needs no NumPy counterpart of its dtypes, bfloat16 for one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from maskedlinear._distributed import DISTRIBUTED, DIVISIONS, DistributedLayer, DistributedMethods, Shard

__all__ = [
    "CAPABILITIES",
    "DISTRIBUTED",
    "DIVISIONS",
    "GROUP",
    "LAYERS",
    "LAYOUTS",
    "Backend",
    "BackendNotAvailableError",
    "DistributedLayer",
    "DistributedMethods",
    "Layer",
    "OptionalMethods",
    "Shard",
    "available",
    "checked",
    "lacking",
    "load",
]

GROUP = "maskedlinear.backends"

LAYOUTS = ("transposed", "strided", "read-only", "broadcast")
"""How an array may lie in memory besides being contiguous."""

CAPABILITIES: Mapping[str, str | None] = {
    "jvp": "jvp",
    "reverse over reverse": "hvp",
    "forward over reverse": "hvp",
    "forward over forward": "jvp_of_jvp",
    "autodiff_vjp": "autodiff_vjp",
    "dense": "dense",
    "vmap": "vmap",
    "vmap over the mask": "vmap",
    "vmap of derivatives": "vmap_derivative",
    "compile": "transformed",
    "checkpoint": "transformed",
    "scan": "transformed",
    "compile of derivatives": "compile_derivative",
    "compile of the hessian": "compile_derivative",
    "autocast": "autocast",
    **dict.fromkeys(LAYOUTS),
    "layer": "layer",
    "dormant weights": "layer",
    "save": "layer",
    "plain load": "layer",
    "files": "layer",
    "other states": "layer",
    "conversion": "layer",
    "mask edits": "layer",
    "shared weights": "layer",
    "other readers": "layer",
    "freeze_masked": "layer",
    "unguarded optimizers": "layer",
    "projection": "layer",
    "masks": "random_mask",
    "bernoulli masks": "bernoulli_mask",
    **dict.fromkeys(DISTRIBUTED, "distributed_layer"),
}
"""What a backend may declare that it lacks, and the method that it must have otherwise (``None``: no method of its own)."""

LAYERS = tuple(name for name, method in CAPABILITIES.items() if method == "layer")
"""The capabilities that belong to layers: what a backend of functions alone lacks."""

Array = Any
Direction = Array | None
Gradients = tuple[Array, Array, Array | None]


class BackendNotAvailableError(LookupError):
    """A backend that was asked for by name is not registered, or its framework is not installed."""


@runtime_checkable
class Backend(Protocol):
    """What every backend has.

    The class is called with one of its ``formats``: how it stores the connections, ``"dense"`` or another. The instance
    keeps it as ``format``. Its label in the report is its name and its format, unlike any other's of the run. All formats
    are shown through the same dense arguments. ``Array`` stands for the framework's own arrays. Shapes are the spec's:
    ``x (..., in)``, ``weight (out, in)``, ``mask (out, in)`` boolean, ``bias (out,)`` or ``None``, ``y`` and ``g``
    ``(..., out)``.
    """

    name: str
    formats: Sequence[str]
    format: str

    def versions(self) -> Mapping[str, str]:
        """Return the version of every library that takes part, by name."""

    def devices(self) -> Sequence[str]:
        """Return the devices usable here, ``"cpu"``, ``"cuda"`` or others, and say nothing of those that are not."""

    def device_name(self, device: str) -> str:
        """Return what ``device`` is, for the report: ``"NVIDIA H200"``."""

    def dtypes(self, device: str) -> Sequence[str]:
        """Return the floating dtypes that the layer supports there, by name: ``"float32"``, ``"bfloat16"``, ..."""

    def unsupported(self) -> Mapping[str, str]:
        """Return what of ``CAPABILITIES`` this backend does not have, each with the reason why.

        It may take the device, ``def unsupported(self, device)``, where they differ in it.
        """

    def expected_failures(self, device: str) -> Mapping[str, str | tuple[str, type[Exception]]]:
        """Return the tests that fail on ``device`` for a known reason, best an upstream thread.

        A key is a pattern, as of ``fnmatch``, for a test's name with its parameters:
        ``"test_transforms_equal_the_plain_call[[]torch dense bfloat16*"``. One that passes all the same is a failure,
        and so is one that breaks by another exception than an assertion's, unless the value is the reason and that
        exception: ``("openxla/xla#22858", NotImplementedError)``.
        """

    def strict_precision(self) -> AbstractContextManager[Any]:
        """Return a context in which arithmetic is what the dtype says.

        Inside it 64-bit types exist, TF32 is off, and half types are not accumulated in half precision. The suite calls
        every other method inside it. It must not change which code runs: what users do not run would be proven, and what
        they do run would not.
        """

    def asarray(self, values: NDArray[Any], dtype: str, device: str, layout: str = "contiguous") -> Array:
        """Return ``values`` (float64 that ``dtype`` holds exactly, or bool) as the framework's array on ``device``.

        Args:
            values: the values.
            dtype: the floating dtype of the result; boolean values stay boolean.
            device: one of ``devices``.
            layout: ``"contiguous"``, or one of ``LAYOUTS``: a transposed view, every other entry of a larger array, an
                array that cannot be written to, or one whose rows share memory (its values' rows are then all alike).
        """

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """Return ``array`` as NumPy float64 (or bool), every value unchanged."""

    def masked_linear(self, x: Array, weight: Array, mask: Array, bias: Array | None) -> Array:
        """Return ``y``."""

    def vjp(
        self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array, wrt: Sequence[str]
    ) -> Sequence[Array]:
        """Return the gradients for the cotangent ``g``, of the inputs named in ``wrt`` and in its order.

        ``wrt`` holds one or more of ``"x"``, ``"weight"`` and ``"bias"``. The others ask for no gradient.
        """


class OptionalMethods(DistributedMethods, Protocol):
    """What a backend has besides, unless it declares in ``unsupported`` that it does not. Shapes as in :class:`Backend`.

    A result may be ``None`` only if it is the gradient of a bias that is not there.
    """

    def jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        dx: Direction,
        dweight: Direction,
        dbias: Direction,
    ) -> tuple[Array, Array]:
        """Return ``(y, ẏ)`` by forward mode; an input whose direction is ``None`` does not move."""

    def hvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        g: Array,
        dx: Array,
        dweight: Array,
        dbias: Array | None,
        dg: Array,
        mode: str,
    ) -> tuple[Array, Array, Array | None, Array]:
        """Return ``(Hx, HW, Hb, Hg)`` of :func:`maskedlinear.spec.hvp`, by the modes that ``mode`` names."""

    def jvp_of_jvp(
        self,
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        tangent1: Sequence[Direction],
        tangent2: Sequence[Direction],
    ) -> Array:
        """Return the derivative of y along two directions, by forward mode of forward mode.

        Each direction holds how x, weight and bias move; that of the bias is ``None`` if there is none.
        """

    def autodiff_vjp(self, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array) -> Gradients:
        """Return ``(dx, dW, db)`` as the framework's automatic differentiation makes them of the plain expression."""

    def dense(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """Return ``y`` of the framework's own dense layer."""

    def vmap(
        self,
        axes: Sequence[int | None],
        x: Array,
        weight: Array,
        mask: Array,
        bias: Array | None,
        g: Array,
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return ``(y, dx, dW, db)`` of a batch of problems, each stacked along axis 0.

        ``axes`` says for each of x, weight, mask, bias and g along which axis it is stacked, or ``None`` if it is shared.
        """

    def vmap_derivative(self, derivative: str, axes: Sequence[int | None], *arrays: Array) -> Sequence[Array]:
        """Return what ``jvp`` or ``hvp`` gives of a batch of problems, each result stacked along axis 0.

        Args:
            derivative: ``"jvp"``, or the mode of ``hvp``, unless lacking.
            axes: 0 for each of the arrays that is stacked along axis 0, ``None`` for each that is shared; the mask is.
            arrays: the arguments of ``jvp``, or those of ``hvp`` up to the mode.
        """

    def compile_derivative(self, derivative: str, *arrays: Array) -> Sequence[Array]:
        """Return what a derivative gives, compiled by the framework's default compiler.

        Args:
            derivative: as in ``vmap_derivative``; ``"vjp"``: y, dx, dW and db, from x, weight, mask, bias and g; or
                ``"hessian"``: of ⟨g, y⟩ by x twice, by x and weight, by weight and x, and by weight twice, from the same.
            arrays: the arguments of ``jvp``, those of ``hvp`` up to the mode, or the ones just named.
        """

    def transforms(self) -> Sequence[str]:
        """Return the names that ``transformed`` takes: ``compile``, ``checkpoint``, ``scan`` unless lacking, and others."""

    def transformed(
        self, transform: str, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return ``(y, dx, dW, db)`` by way of a transform, which may keep what it compiled from one call to the next.

        ``"scan"`` goes through the first batch dimension step by step.
        """

    def autocast(
        self, dtype: str, x: Array, weight: Array, mask: Array, bias: Array | None, g: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Return ``(y, dx, dW, db)`` of float32 inputs under automatic casts to ``dtype``; ``g`` is in ``dtype``."""

    def layer(self, weight: Array, mask: Array, bias: Array | None) -> Layer:
        """Return a layer of the framework's own kind with these values."""

    def random_mask(
        self, shape: tuple[int, int], num_zeros: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return the mask of :func:`maskedlinear.masks.random`, on ``device``."""

    def bernoulli_mask(
        self, shape: tuple[int, int], threshold: int, seed: int, shard: tuple[slice, slice] | None, device: str
    ) -> Array:
        """Return the mask of :func:`maskedlinear.masks.bernoulli`, on ``device``."""


class Layer(Protocol):
    """A layer as users have it: it keeps its weight and its mask, copies of what it was made with.

    What it shows as its weight is +0 under the mask; the values there are *dormant*: they lie apart, and a mask that brings
    them back brings back every bit. One that lacks ``"dormant weights"`` keeps the live weights only, and a mask that never
    changes: its state shows 0 under the mask, it has no ``set_mask``, and no optimizer to guard.

    Methods that belong to a capability that the backend lacks are never called. One that has ``"projection"`` sets what an
    optimizer without a guard has left under the mask back to +0 before it acts, is saved or is converted; one that lacks it
    only selects.

    Attributes:
        optimizers: the optimizers that ``frozen_step`` and ``unguarded_step`` take, by name.
        weight_edits: the roads besides ``set_weight`` on which users write to a weight, by name: past whatever counts
            edits, by another array in its place, ...
    """

    optimizers: Sequence[str]
    weight_edits: Sequence[str]

    def __call__(self, x: Array) -> Array:
        """Return ``y``, as in inference."""

    def gradients(self, x: Array, g: Array) -> Gradients:
        """Return ``(dx, dW, db)``, each in the spec's orientation, as in training."""

    def set_mask(self, mask: Any) -> None:
        """Give the layer a new mask, a NumPy array of shape ``(out, in)``, as users do: dormant values come back.

        Raises:
            ValueError: if it has another shape, or holds anything but booleans or 0s and 1s.
        """

    def set_weight(self, weight: Array) -> None:
        """Write ``weight (out, in)`` into the layer's own, as an optimizer does; what it holds under the mask is dropped."""

    def edit_weight(self, edit: str, weight: Array) -> None:
        """Write ``weight (out, in)``, which is +0 under the mask, by one of ``weight_edits``."""

    def visible_weight(self) -> Array:
        """Return a copy of the weight as it stands, ``(out, in)``: what other code reads of the layer, untouched."""

    def state(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Return weight, mask and bias as NumPy arrays (see ``asnumpy``), in the spec's orientation.

        The weight is the whole one: live values, and dormant ones under the mask.
        """

    def save(self, path: Path) -> None:
        """Write the framework's own checkpoint into the folder ``path``."""

    def load(self, path: Path) -> None:
        """Read it again."""

    def save_file(self, path: Path, *, dormant: bool = False) -> None:
        """Write the layer with :func:`maskedlinear.checkpoint.save`, for ``"files"``."""

    def load_file(self, path: Path) -> None:
        """Read such a file, whatever framework wrote it.

        Raises:
            CheckpointError: if it is of another layer's shape; this one is left as it was.
        """

    def load_plain(self, path: Path) -> Callable[[Array], Array]:
        """Return a plain dense layer of the framework that has loaded what ``save`` wrote, for ``"plain load"``.

        It knows nothing of masks: what of the state is not its own, it leaves.
        """

    def load_other(self, weight: Array, mask: Array | None, bias: Array | None) -> None:
        """Load a state that has all its values in ``weight``, those under the mask too, for ``"other states"``.

        Without a mask it is the state of a plain dense layer, and the layer's mask stays; with one, the state that an
        earlier version of this layer has written.
        """

    def convert(self, dtype: str) -> None:
        """Give the layer's parameters another dtype, as users do, for ``"conversion"``."""

    def edit_mask(self, mask: NDArray[Any]) -> None:
        """Write ``mask`` into the layer's own, past ``set_mask``, for ``"mask edits"``.

        It acts at the next call. What it switches on starts from what stands in the weight, +0.
        """

    def sharer(self) -> Layer:
        """Return another layer that has the same weight and bias, for ``"shared weights"``."""

    def reader_gradient(self, x: Array, g: Array) -> Array:
        """Return dW of other code that reads the layer's weight, ``y = x · weightᵀ``, for ``"other readers"``."""

    def frozen_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return a function of x and g that takes one step of an optimizer of weight and bias under ``freeze_masked``.

        The loss is ``⟨g, y⟩``. ``optimizer`` is one of ``optimizers``; its state lives as long as the function. The step
        must be large enough to move a weight of 1 in every dtype, as with a learning rate of 0.1.
        """

    def unguarded_step(self, optimizer: str) -> Callable[[Array, Array], None]:
        """Return the same without ``freeze_masked``, for ``"unguarded optimizers"``."""


def available() -> tuple[str, ...]:
    """Return the names of all registered backends, sorted; their frameworks need not be installed."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


def load(name: str) -> tuple[Backend, ...]:
    """Return the backend registered as ``name``: an instance for each of its formats.

    Raises:
        BackendNotAvailableError: if no backend has that name, or several have; if it cannot be imported or made, for want
            of its framework or whatever else.
        TypeError: if what is registered has another name, or does not have the methods of :class:`Backend`, or of
            :class:`OptionalMethods` where it does not declare them lacking.
    """
    found = tuple(entry_points(group=GROUP, name=name))
    if not found:
        raise BackendNotAvailableError(
            f"no backend named {name!r} is registered; registered: {', '.join(available()) or 'none'}. "
            f"A distribution registers one under the entry-point group {GROUP!r}"
        )
    if len({entry.value for entry in found}) > 1:
        raise BackendNotAvailableError(
            f"several distributions register a backend named {name!r}: {', '.join(sorted(_origin(e) for e in found))}; "
            "uninstall all but one"
        )
    try:
        kind = found[0].load()
    except Exception as error:  # third-party code may fail in any way while it is imported
        raise BackendNotAvailableError(f"backend {name!r} cannot be imported: {error}") from error
    formats = getattr(kind, "formats", ())
    if not formats or isinstance(formats, str):
        raise TypeError(
            f"backend {name!r} must name its formats in a tuple; got {formats!r}: write formats = ('dense',) in its class"
        )
    try:
        made = [kind(format) for format in formats]
    except Exception as error:
        raise BackendNotAvailableError(
            f"backend {name!r} cannot be made: {error}. Its class is called with each of its formats: {', '.join(formats)}"
        ) from error
    backends = tuple(checked(backend, f"backend {name!r}") for backend in made)
    for format, backend in zip(formats, backends, strict=True):
        if backend.name != name:
            raise TypeError(
                f"backend {name!r} must be called what it is registered as; it calls itself {backend.name!r}: write "
                f"name = {name!r} in its class"
            )
        if backend.format != format:
            raise TypeError(
                f"backend {name!r} must keep in its attribute 'format' what it is called with, {format!r}; "
                f"it has {backend.format!r}"
            )
    return backends


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name if entry.dist else 'unknown'} ({entry.value})"


def lacking(backend: Any, device: str) -> Mapping[str, str]:
    """Return what a backend lacks on ``device``, which its ``unsupported`` takes if it wants to."""
    unsupported: Mapping[str, str] = (
        backend.unsupported(device) if signature(backend.unsupported).parameters else backend.unsupported()
    )
    return unsupported


def checked(backend: Any, called: str, device: str = "cpu") -> Backend:
    """Return ``backend`` if it keeps the protocol on ``device``.

    Raises:
        TypeError: if it lacks a method that it neither needs nor declares, or declares what is no capability, or without a
            reason.
    """
    missing = sorted(method for method in _required() if not hasattr(backend, method))
    if missing:
        raise TypeError(f"{called} lacks {', '.join(missing)} of maskedlinear.backends.Backend")
    try:
        unsupported = dict(lacking(backend, device))
    except Exception as error:
        raise TypeError(
            f"{called} cannot say what it lacks, a dictionary of capabilities and reasons: {error}"
        ) from error
    unknown = sorted(set(unsupported) - set(CAPABILITIES))
    if unknown:
        raise TypeError(
            f"{called} declares that it lacks {', '.join(unknown)}; capabilities are: {', '.join(CAPABILITIES)}"
        )
    for capability, reason in unsupported.items():
        if not isinstance(reason, str) or not reason.strip():
            raise TypeError(f"{called} lacks {capability} for no reason; got {reason!r}: say why, in words")
    for capability, method in CAPABILITIES.items():
        if method and capability not in unsupported and not hasattr(backend, method):
            raise TypeError(
                f"{called} has no method {method!r} for the capability {capability!r}: write it, as "
                f"maskedlinear.backends.OptionalMethods says, or declare it in unsupported() with the reason"
            )
    checked_backend: Backend = backend
    return checked_backend


def _required() -> set[str]:
    return {"name", "formats", "format", *(name for name in vars(Backend) if not name.startswith("_"))}
