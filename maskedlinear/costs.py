"""Which form of a layer is faster: expected times, from times measured on a machine, and the choice made of them.

The one place that decides between the dense and the sparse form; front ends ask it, and exchange the layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from maskedlinear import kernels
from maskedlinear._table import lines
from maskedlinear.models import first_names

__all__ = ["CLOSE", "LARGEST", "UNEVEN", "Choice", "Costs", "Format", "Layer", "choose", "choose_forms", "table"]

Format = Literal["auto", "dense", "sparse"]

_VERSION = 2
CLOSE = 2.0  # expected times up to this ratio of each other do not tell which form is faster
LARGEST = 1 << 26  # weights of a layer whose dense form is tried
UNEVEN = 4  # how many times as wide, and as narrow, the layers that are not square are that are measured too


@dataclass(frozen=True)
class Layer:
    """What the costs of a layer depend on.

    Attributes:
        name: what it is called in its model.
        out_features: the number of outputs.
        in_features: the number of inputs.
        connections: how many are live.
        itemsize: the bytes of one weight.
        form: the form that it has.
        fixed: why the layer must keep its form, or nothing.
        device: the kind of device that it is on: ``"cpu"``, ``"cuda"``, ...
        dtype: what its weights are, and what it computes in, in words.
        mask_bytes: the bytes that the dense form keeps for each weight, beside it: its mask, and what is derived of both.
        index_bytes: the bytes of indices that the sparse form keeps for each connection.
        copies: how many layers of this shape are stacked in it, whose connections are counted together.
    """

    name: str
    out_features: int
    in_features: int
    connections: int
    itemsize: int
    form: str
    fixed: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    mask_bytes: int = 1
    index_bytes: int = 12
    copies: int = 1

    @property
    def size(self) -> int:
        """The number of connections that there could be."""
        return self.copies * self.out_features * self.in_features


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer, and why.

    Attributes:
        layer: the layer.
        form: ``"dense"`` or ``"sparse"``.
        why: the reason, in words.
        seconds: the expected or measured time of a call in each form; empty where none was asked for.
    """

    layer: Layer
    form: str
    why: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Costs:
    """Times of both forms of square layers on one machine, from which those of other layers are read off.

    Between batches and between densities a time is taken to grow in a straight line, between widths as a power. Beyond the
    widest layer, the largest batch and the highest density the last line goes on; below the smallest width the time stays.

    A layer that is not square is read off at the width w = √(in · out), and takes longer by a time for each of the
    in + out − 2 w features by which x and y are larger than the square's. That time, by batch and for a surplus of inputs
    and of outputs apart, is what layers of 4 w → w / 4 and of w / 4 → 4 w took longer than the square one.

    ``maskedlinear bench --costs FILE`` measures them. The package brings those of two machines for PyTorch and JAX on the
    CPU: with the kernels of the extra ``cpu``, and without.

    Attributes:
        framework: ``"torch"`` or ``"jax"``.
        device: ``"cpu"``, ``"cuda"``, ...
        machine: what they were measured on, in words.
        widths: ascending.
        batches: ascending, from 1 on.
        densities: fractions of live connections, ascending.
        dense: seconds, shape (2, widths, batches): of a training step (forward, backward, Adam) and of an inference.
        sparse: the same for each density, shape (2, widths, batches, densities).
        uneven: seconds, shape (2, 2, 2, batches): as above; of the dense and the sparse form; of a layer 4 w → w / 4 and of
            one w / 4 → 4 w, for the width w in the middle of ``widths`` and the second of ``densities``.
    """

    framework: str
    device: str
    machine: str
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    densities: tuple[float, ...]
    dense: NDArray[np.float64]
    sparse: NDArray[np.float64]
    uneven: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check what a file may have brought.

        Raises:
            ValueError: if shapes do not belong together, or a time is not positive.
        """
        shape = (2, len(self.widths), len(self.batches))
        shapes = (self.dense.shape, self.sparse.shape, self.uneven.shape)
        expected = (shape, (*shape, len(self.densities)), (2, 2, 2, len(self.batches)))
        if shapes != expected or min(shape[1], len(self.densities)) < 2 or shape[2] < 3:
            raise ValueError(
                f"costs must have times for each of at least 2 widths, 3 batches and 2 densities; got shapes {shapes} for "
                f"{shape[1]} widths, {shape[2]} batches and {len(self.densities)} densities: measure them anew"
            )
        for axis in (self.widths, self.batches, self.densities):
            if any(one >= other for one, other in pairwise(axis)):
                raise ValueError(f"costs must have ascending widths, batches and densities; got {axis}")
        if self.batches[0] != 1 or not all((times > 0).all() for times in (self.dense, self.sparse, self.uneven)):
            raise ValueError("costs must have batch 1, and times above 0: measure them anew")

    def seconds(self, form: str, layer: Layer, batch: int, training: bool) -> float:
        """Return the expected seconds of a step (``training``) or an inference of ``layer`` on ``batch`` rows of x."""
        kind, sparse = 0 if training else 1, form == "sparse"
        density = layer.connections / layer.size if layer.size else 0.0
        times = self._at_density(kind, density) if sparse else self.dense[kind]
        width = max(math.sqrt(layer.size), self.widths[0])
        by_width = [self._at_batch(at_width, batch) for at_width in times]
        square = math.exp(_line(np.log(self.widths), np.log(by_width), math.log(width)))
        surplus = max(layer.in_features + layer.out_features - 2 * width, 0.0)
        a_feature = self._at_batch(self._a_feature(kind, sparse, layer.out_features > layer.in_features), batch, 0.0)
        return square + surplus * a_feature

    def _at_density(self, kind: int, density: float) -> NDArray[np.float64]:
        times = self.sparse[kind]
        return np.maximum(_line(self.densities, times, density), times.min())  # type: ignore[no-any-return]

    def _at_batch(self, times: NDArray[np.float64], batch: int, least: float | None = None) -> float:
        """Return the time at a batch, of times by batch; one row has kernels of its own."""
        at = times[0] if batch == 1 else _line(self.batches[1:], times[1:], batch)
        return max(float(at), float(times.min()) if least is None else least)

    def _a_feature(self, kind: int, sparse: bool, more_outputs: bool) -> NDArray[np.float64]:
        """Return by batch the seconds that each feature takes by which x and y are larger than a square layer's."""
        middle = len(self.widths) // 2
        square = self.sparse[kind, middle, :, 1] if sparse else self.dense[kind, middle]
        longer: NDArray[np.float64] = self.uneven[kind, int(sparse), int(more_outputs)] - square
        return longer / (self.widths[middle] * (UNEVEN + 1 / UNEVEN - 2))

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        fields = {
            "version": _VERSION,
            "framework": self.framework,
            "device": self.device,
            "machine": self.machine,
            "widths": self.widths,
            "batches": self.batches,
            "densities": self.densities,
            "microseconds": {
                name: np.vectorize(lambda second: float(f"{second * 1e6:.4g}"))(times).tolist()
                for name, times in (("dense", self.dense), ("sparse", self.sparse), ("uneven", self.uneven))
            },
        }
        Path(path).write_text(json.dumps(fields) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that :meth:`save` or ``maskedlinear bench --costs`` wrote.

        Raises:
            ValueError: if it holds anything else.
        """
        return cls._read(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    @cache
    def shipped(cls, framework: str, device: str) -> Self:
        """Return the costs that the package brings.

        Raises:
            ValueError: if it brings none for the device.
        """
        file = _file(framework, device)
        if not file.is_file():
            raise ValueError(
                f"there are no costs for {framework} on {device!r} in the package: measure them once, with maskedlinear "
                f"bench --framework {framework} --costs FILE, and pass costs=Costs.load(FILE); or time the layers on the "
                "spot, with measure=True; or say format='sparse'"
            )
        return cls._read(file.read_text(encoding="utf-8"), file.name)

    @staticmethod
    def are_shipped(framework: str, device: str) -> bool:
        """Whether the package brings costs for the device."""
        return _file(framework, device).is_file()

    @classmethod
    def _read(cls, text: str, name: str) -> Self:
        try:
            found = json.loads(text)
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']}")
            times = [
                np.asarray(found["microseconds"][name], np.float64) / 1e6 for name in ("dense", "sparse", "uneven")
            ]
            widths, batches, densities = (tuple(found[axis]) for axis in ("widths", "batches", "densities"))
            return cls(found["framework"], found["device"], found["machine"], widths, batches, densities, *times)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must be a file of costs, version {_VERSION}, as maskedlinear bench --costs writes it; "
                f"got one that cannot be read ({error})"
            ) from error


def choose_forms(
    layers: Sequence[Layer],
    format: Format,
    batch: int,
    training: bool,
    framework: str,
    costs: Costs | None,
    measured: Sequence[Callable[[], dict[str, float]] | None] | None,
    *,
    measure_close: bool = True,
    forms: Mapping[str, str] | None = None,
) -> list[Choice]:
    """Return the choice for each layer of a model; the one place that checks what ``compress`` was asked for.

    Args:
        layers: the layers.
        format: ``"auto"``, ``"dense"`` or ``"sparse"``.
        batch: the rows of x in a call.
        training: whether training steps count, or inferences.
        framework: ``"torch"`` or ``"jax"``.
        costs: those given, for the layers on their device. The others go by those of the package.
        measured: what returns the seconds of each layer in both forms; ``None`` to go by costs alone. Of layers that are
            alike, whatever their names and forms are, one is measured.
        measure_close: whether layers are measured whose expected times are too close to tell; those that have none are
            anyway. Without, the choice is the same in every run where there are costs.
        forms: a choice that was made before, by the layers' names: what it names takes that form, the others keep theirs.

    Raises:
        ValueError: if ``format`` is none of the three, or ``batch`` is not positive; if ``forms`` names a layer or a form
            that there is not, or comes with a ``format``; if a layer that must keep its form is
            asked to change it; if the costs given are of another framework or of no layer's device; or if a layer has none
            and nothing is measured.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(map(repr, get_args(Format)))}; got {format!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be the rows of x in a call, a whole number from 1 on; got {batch!r}")
    if forms is not None:
        return _as_before(layers, format, batch, training, forms)
    devices = {layer.device for layer in layers if format == "auto" and not layer.fixed}
    if costs is not None and devices and (costs.framework != framework or costs.device not in devices):
        where = " or ".join(map(repr, sorted(devices)))
        raise ValueError(
            f"costs must be of {framework} on {where}, where the layer is; got those of {costs.framework} on "
            f"{costs.device!r}: measure them with maskedlinear bench --framework {framework} --costs FILE"
        )
    taken: dict[Layer, dict[str, float]] = {}

    def seconds(layer: Layer, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        alike = replace(layer, name="", form="")
        if alike not in taken:
            taken[alike] = measure()
        return taken[alike]

    choices = []
    for place, layer in enumerate(layers):
        measure = None if measured is None else measured[place]
        known = _known(layer, format, framework, costs, measure is not None)
        ask = measure is not None and (measure_close or known is None)
        call = partial(seconds, layer, measure) if ask and measure is not None else None
        choices.append(choose(layer, format, batch, training, known, call))
    return choices


def _as_before(
    layers: Sequence[Layer], format: Format, batch: int, training: bool, forms: Mapping[str, str]
) -> list[Choice]:
    """Return a choice that was made before."""
    if format != "auto":
        raise ValueError(f"forms= says the form of each layer, and format= that of all; got both, format={format!r}")
    unknown = forms.keys() - {layer.name for layer in layers}
    if unknown:
        names = first_names([layer.name for layer in layers]) or "there are none"
        raise ValueError(f"forms= names masked layers: {names}; got {first_names(sorted(map(str, unknown)))} too")
    for name, form in forms.items():
        if form not in ("dense", "sparse"):
            raise ValueError(f"a form is 'dense' or 'sparse'; got {form!r} for {name!r}")
    return [
        choose(layer, forms[layer.name], batch, training, None)  # type: ignore[arg-type]
        if layer.name in forms
        else Choice(layer, layer.form, "not named in forms", {})
        for layer in layers
    ]


def choose(
    layer: Layer,
    format: Format,
    batch: int,
    training: bool,
    costs: Costs | None,
    measured: Callable[[], dict[str, float]] | None = None,
) -> Choice:
    """Return the form for ``layer``: the faster one for ``"auto"``, or the one asked for.

    ``"auto"`` goes by the expected times of ``costs``; and by the seconds that ``measured`` returns, if it is given, where
    those are within ``CLOSE`` of each other or there are no costs. A layer of more than ``LARGEST`` weights is not measured:
    without costs it keeps its form.

    Raises:
        ValueError: if a layer that must keep its form is asked to change it, or there is nothing to choose by.
    """
    if format != "auto":
        if layer.fixed and format != layer.form:
            raise ValueError(f"{layer.name or 'the layer'} cannot become {format}: {layer.fixed}")
        return Choice(layer, format, "asked for", {})
    if costs is None and measured is None and not layer.fixed:
        raise ValueError("format='auto' needs costs, or measurements")
    seconds = {f: costs.seconds(f, layer, batch, training) for f in ("dense", "sparse")} if costs is not None else {}
    if layer.fixed:
        return Choice(layer, layer.form, layer.fixed, seconds)
    takes = "would take"
    if measured is not None and (not seconds or max(seconds.values()) <= CLOSE * min(seconds.values())):
        if layer.size <= LARGEST:
            seconds, takes = measured(), "takes, as measured here,"
        elif not seconds:
            why = (
                f"there are no costs for its device, and its dense form is too large to be tried: {layer.size} weights"
            )
            return Choice(layer, layer.form, why, {})
    form = min(seconds, key=lambda form: seconds[form])
    slower = "sparse" if form == "dense" else "dense"
    return Choice(layer, form, f"{slower} {takes} {seconds[slower] / seconds[form]:.2g} times as long", seconds)


def table(choices: Sequence[Choice], batch: int, training: bool) -> str:
    """Return the choices as lines of text: connections, bytes and FLOPs in each form, expected or measured times, and why.

    Bytes are those of what training keeps (weights, gradients, two moments of Adam, masks and what is derived of them, and
    indices), or inference, which has no gradients and moments. FLOPs are 2 a connection and row of x for each product: 3 in
    training, 1 in inference.
    """
    what = "a training step" if training else "an inference"
    head = ("layer", "in -> out", "live", "form", "MiB", "MFLOP", "ms", "why")
    rows = [head]
    for choice in choices:
        layer = choice.layer
        products = 6 * batch if training else 2 * batch
        flops = (products * layer.size, products * layer.connections)
        seconds = [f"{choice.seconds[form] * 1e3:.3g}" if choice.seconds else "-" for form in ("dense", "sparse")]
        rows.append(
            (
                layer.name or "(the model)",
                f"{layer.in_features} -> {layer.out_features}",
                f"{layer.connections} ({100 * layer.connections / max(layer.size, 1):.3g} %)",
                choice.form,
                " / ".join(f"{size / 2**20:.3g}" for size in _bytes(layer, training)),
                " / ".join(f"{count / 1e6:.3g}" for count in flops),
                " / ".join(seconds),
                choice.why,
            )
        )
    none = [] if choices else ["no masked layers"]
    return "\n".join([f"{what[0].upper()}{what[1:]} on {batch} rows of x; dense / sparse", *lines(rows), *none])


def _file(framework: str, device: str) -> Traversable:
    """Return where the times are that the package brings: of its own kernels, if those multiply on the device."""
    kind = f"{device}_kernels" if device == "cpu" and kernels.is_available() else device
    return resources.files("maskedlinear") / "data" / f"costs_{framework}_{kind}.json"


def _known(layer: Layer, format: Format, framework: str, given: Costs | None, measure: bool) -> Costs | None:
    """Return the costs for a layer: those given, if they are of its device, or those of the package; if it needs some.

    Raises:
        ValueError: if the package has none and nothing will be measured.
    """
    if format != "auto":
        return None
    if given is not None and (given.framework, given.device) == (framework, layer.device):
        return given
    if layer.fixed or (measure and not Costs.are_shipped(framework, layer.device)):
        return None
    return Costs.shipped(framework, layer.device)


def _bytes(layer: Layer, training: bool) -> tuple[int, int]:
    weight = (4 if training else 1) * layer.itemsize
    ends = 4 * layer.copies * (layer.in_features + layer.out_features + 2)
    return layer.size * (weight + layer.mask_bytes), layer.connections * (weight + layer.index_bytes) + ends


def _line(axis: Any, values: NDArray[np.float64], at: float) -> Any:
    """Interpolate ``values`` along their last axis in straight lines, of which the first and the last one go on."""
    place = int(np.clip(np.searchsorted(axis, at) - 1, 0, len(axis) - 2))
    share = (at - axis[place]) / (axis[place + 1] - axis[place])
    return (1 - share) * values[..., place] + share * values[..., place + 1]
