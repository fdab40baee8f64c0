"""Gene-set files (GMT), plain, compressed, and with a weight for each gene as Enrichr has them."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._wiring_tables import EdgeList, OnEmpty, RaiseOrDrop, check_choice, read_weights

__all__ = ["GeneSets", "lines_of", "read_gmt"]

_WEIGHTED = re.compile(r"(.+),\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass
class GeneSets:
    """The sets of a file: gene -> set edges, and each set's description."""

    edges: EdgeList
    descriptions: dict[str, str]
    dropped: DropReport


def lines_of(file: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not blank; of a file that gzip has packed, too."""
    path = Path(file)
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        for number, line in enumerate(text, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def read_gmt(
    file: str | PathLike[str],
    *,
    weighted: bool | None = None,
    on_repeated: RaiseOrDrop = "raise",
    on_empty: OnEmpty = "raise",
) -> GeneSets:
    """Return the sets of a GMT file; the rules are those of ``Wiring.from_gmt``."""
    check_choice("on_repeated", on_repeated, ("raise", "drop"))
    check_choice("on_empty", on_empty, ("raise", "keep", "drop"))
    check_choice("weighted", weighted, (None, True, False))
    sets: dict[str, list[str]] = {}
    descriptions, again = {}, []
    for number, line in lines_of(file):
        name, *rest = (part.strip() for part in line.split("\t"))
        genes = [gene for gene in rest[1:] if gene]
        if not genes and on_empty == "raise":
            raise ValueError(
                f"a line of a GMT file must have a name, a description and genes, with tabs between; line {number}, of "
                f"{name!r}, has no genes: remove it, or pass on_empty='drop' or 'keep'"
            )
        if name in sets:
            if on_repeated == "raise" or sets[name] != genes:
                raise ValueError(
                    f"each set must be there once; line {number} brings {name!r} again"
                    + (
                        ", with other genes: rename one"
                        if sets[name] != genes
                        else ": on_repeated='drop' leaves it out"
                    )
                )
            again.append(name)
            continue
        sets[name], descriptions[name] = genes, rest[0] if rest else ""
    if not sets:
        raise ValueError(f"a GMT file must have a line for each set; {file} has none")
    edges = EdgeList(
        [gene for genes in sets.values() for gene in genes], [name for name, genes in sets.items() for _ in genes]
    )
    if weighted is not False:
        _split_weights(edges, weighted)
    return GeneSets(edges, descriptions, DropReport().with_dropped("repeated sets", len(again), again))


def _split_weights(edges: EdgeList, weighted: bool | None) -> None:
    """Make genes and weights of ``GENE,1.0``, where all genes of the file are written so."""
    parts = [_WEIGHTED.fullmatch(gene) for gene in edges.sources]
    if not any(parts) and weighted is None:
        return
    if not all(parts):
        plain = edges.sources[parts.index(None)]
        with_number = next((gene for gene, part in zip(edges.sources, parts, strict=True) if part), None)
        raise ValueError(
            f"the genes of a weighted file must all be written as 'GENE,1.0'; got {plain!r}"
            + (f" beside {with_number!r}" if with_number else "")
            + ": pass weighted=False if a comma and a number belong to the names"
        )
    edges.sources = [part[1].strip() for part in parts if part]
    edges.weights = read_weights([float(part[2]) for part in parts if part])
