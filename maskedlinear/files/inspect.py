"""``maskedlinear inspect``: a line for each masked weight of a file, what it takes there, and what it could take at best."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskedlinear._extras import missing_framework
from maskedlinear._table import lines
from maskedlinear.checkpoint import MaskedArray, PlainArray
from maskedlinear.checkpoint._arrays import OPTIMIZER_ROLE
from maskedlinear.checkpoint._dtypes import ITEMSIZE
from maskedlinear.files.nodes import Nodes, Panel, entropy_bits
from maskedlinear.files.output import check_free, written
from maskedlinear.files.source import Array, How, Info, Source, open_source
from maskedlinear.files.text import WIDTH, escaped, fraction, listed, printable, progress, say, shape_text, size_text

__all__ = ["Row", "inspect"]


@dataclass(frozen=True)
class Row:
    """An array of a file, as ``--json`` has it.

    Attributes:
        name: what it is called.
        shape: its shape.
        dtype: safetensors' name of its dtype.
        masked: whether it has a mask.
        same_as: the array that it is, under another name; ``None`` if it is one of its own. That one counts in sums.
        role: what it is to its module; empty if nobody says.
        form: "dense" or "sparse"; ``None`` without a mask.
        encoding: how its mask is written: "full", "recipe", "gaps", ...; of other formats what wrote it, as
            "torch.nn.utils.prune"; "zeros" of one that was inferred; ``None`` without a mask.
        codec: how its values are written: "raw", "pcodec" or, of a mask alone, "true".
        live: how many entries are live; all of them without a mask.
        sparsity: the fraction under the mask, in [0, 1].
        dead_outputs: outputs without a live input; ``None`` without a mask, or if nobody says which axes are outputs.
        dead_inputs: inputs that no output uses, likewise.
        dormant: how many dormant values the file has.
        dense_bytes: what it takes whole.
        file_bytes: what it takes in the file, mask and dormant values included; 0 if that is counted under ``same_as``,
            ``None`` if its format does not tell.
        bound_bytes: the values that the file has and the entropy of a random mask of this density.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    masked: bool
    same_as: str | None
    role: str
    form: str | None
    encoding: str | None
    codec: str
    live: int
    sparsity: float
    dead_outputs: int | None
    dead_inputs: int | None
    dormant: int
    dense_bytes: int
    file_bytes: int | None
    bound_bytes: float


def inspect(path: Path, how: How, show_all: bool, check: bool, as_json: bool, plot: Path | None, force: bool) -> int:
    """Print what a file holds; return the exit status.

    Args:
        path: the file.
        how: how it is read.
        show_all: whether arrays without masks have lines of their own.
        check: whether what has no mask is read too, and compared with its sums.
        as_json: whether JSON is printed.
        plot: where the masks are drawn to, if they are.
        force: whether ``plot`` may be there already.
    """
    if plot is not None:
        check_free(plot, force)
        try:
            from maskedlinear.files.plot import check_kind, draw
        except ModuleNotFoundError as error:
            raise missing_framework(error, "--plot", "plot", "matplotlib") from error
        check_kind(plot)
    with open_source(path, how) as source:
        add = progress(sum(info.dense_bytes for info in source.infos.values()), "reading")
        rows, panels = [], []
        for name, info in source.infos.items():
            array, nodes = source.array(name), None
            if check and isinstance(array, PlainArray):
                array.data()
            if isinstance(array, MaskedArray):
                nodes = Nodes.of(name, array)
                if plot is not None and not info.same_as and not info.is_optimizers:
                    panels.append(Panel.from_array(name, array, nodes))
            rows.append(_row(name, info, array, nodes))
            add(info.dense_bytes)
        if plot is not None:
            if not panels:
                raise ValueError(
                    f"{path} has no masks to draw; --masks zeros takes them from the zeros of a dense file"
                )
            with written(plot, force) as temporary:
                draw(panels, path.name, temporary, plot.suffix)
        say([_json(path, source, rows)] if as_json else _text(path, source, rows, show_all), sys.stdout)
    return 0


def _row(name: str, info: Info, array: Array, nodes: Nodes | None) -> Row:
    size = math.prod(info.shape)
    masked = isinstance(array, MaskedArray)
    live = array.nnz if isinstance(array, MaskedArray) else size
    dormant = size - live if info.dormant else 0
    values = 0 if info.codec == "true" else ITEMSIZE[info.dtype] * (live + dormant)
    return Row(
        name=name,
        shape=info.shape,
        dtype=info.dtype,
        masked=masked,
        same_as=info.same_as or None,
        role=array.role,
        form=array.form if isinstance(array, MaskedArray) else None,
        encoding=(info.mask or "zeros") if masked else None,
        codec=info.codec,
        live=live,
        sparsity=(size - live) / size if size else 0.0,
        dead_outputs=nodes.dead_outputs if nodes else None,
        dead_inputs=nodes.dead_inputs if nodes else None,
        dormant=dormant,
        dense_bytes=info.dense_bytes,
        file_bytes=info.nbytes,
        bound_bytes=values + entropy_bits(size, live) / 8,
    )


def _sums(rows: Sequence[Row]) -> dict[str, Any]:
    own = [row for row in rows if row.same_as is None]
    size = sum(math.prod(row.shape) for row in own)
    live = sum(row.live for row in own)
    sizes = [row.file_bytes for row in own]
    return {
        "arrays": len(rows),
        "size": size,
        "live": live,
        "sparsity": (size - live) / size if size else 0.0,
        "dense_bytes": sum(row.dense_bytes for row in own),
        "file_bytes": None if None in sizes else sum(sizes),
        "bound_bytes": sum(row.bound_bytes for row in own),
    }


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return what is of the model, and what is of an optimizer."""
    model = [row for row in rows if row.role != OPTIMIZER_ROLE]
    return model, [row for row in rows if row.role == OPTIMIZER_ROLE]


def _json(path: Path, source: Source, rows: Sequence[Row]) -> str:
    model, optimizer = _split(rows)
    told = {
        "file": str(path),
        "format": source.kind,
        "framework": source.framework,
        "metadata": source.metadata,
        "left_out": source.left_out,
        "file_bytes": source.nbytes,
        "masked": _sums([row for row in model if row.masked]),
        "all": _sums(model),
        "optimizer": _sums(optimizer),
        "arrays": [asdict(row) for row in rows],
    }
    return json.dumps(told, indent=1)


_HEAD = ("weight", "shape", "dtype", "sparsity", "live", "dead out", "dead in", "mask", "dense", "here", "of bound")
_RIGHT = (3, 4, 5, 6, 8, 9, 10)


def _text(path: Path, source: Source, rows: Sequence[Row], show_all: bool) -> list[str]:
    model, optimizer = _split(rows)
    masked = [row for row in model if row.masked]
    plain = [row for row in model if not row.masked]
    by = f" from {source.framework}" if source.framework else ""
    table = [_HEAD, *map(_cells, rows if show_all else masked)]
    if masked:
        table.append(_total(f"masked: {len(masked)}", masked))
    if plain:
        table.append(_total(f"not masked: {len(plain)}", plain))
    if masked and plain:
        table.append(_total(f"all: {len(model)}", model))
    if optimizer:
        sums = _sums(optimizer)
        sizes = (size_text(sums["dense_bytes"]), size_text(sums["file_bytes"]))
        table.append((f"optimizer: {len(optimizer)}", *[""] * 7, *sizes, ""))
    found = [printable(f"{path}: {source.kind}{by}, {size_text(source.nbytes)}"), ""]
    found += lines(table, right=_RIGHT, width=WIDTH)
    if not masked:
        found += ["", "no masks: --masks zeros takes them from the zeros of weights, --all shows the arrays"]
    if source.left_out:
        found += ["", f"no arrays, and left out: {listed(list(source.left_out))}"]
    if any(row.masked and row.dead_outputs is None for row in model):
        found += ["", "-: neither the file nor the name says which axes are outputs and which are inputs"]
    return found


def _cells(row: Row) -> tuple[str, ...]:
    head = (escaped(row.name) or '""', shape_text(row.shape), row.dtype)
    sizes = (size_text(row.dense_bytes), size_text(row.file_bytes))
    if not row.masked:
        return (*head, "", "", "", "", "tied" if row.same_as else "", *sizes, "")
    dead = ("-" if count is None else str(count) for count in (row.dead_outputs, row.dead_inputs))
    mask = "tied" if row.same_as else str(row.encoding)
    share = "" if row.same_as else _share(row.file_bytes, row.bound_bytes)
    return (*head, fraction(row.sparsity), str(row.live), *dead, mask, *sizes, share)


def _total(name: str, rows: Sequence[Row]) -> tuple[str, ...]:
    sums = _sums(rows)
    own = [row for row in rows if row.same_as is None]
    dead = (
        str(sum(counts)) if (counts := [count for count in found if count is not None]) else ""
        for found in ([row.dead_outputs for row in own], [row.dead_inputs for row in own])
    )
    sparsity = (fraction(sums["sparsity"]), str(sums["live"])) if any(row.masked for row in rows) else ("", "")
    sizes = (size_text(sums["dense_bytes"]), size_text(sums["file_bytes"]))
    return (name, "", "", *sparsity, *dead, "", *sizes, _share(sums["file_bytes"], sums["bound_bytes"]))


def _share(nbytes: int | None, bound: float) -> str:
    """Return how many times its bound something takes."""
    if nbytes is None or not bound:
        return ""
    return f"{nbytes / bound:.2f} x" if nbytes < 100 * bound else f"{nbytes / bound:.0f} x"
