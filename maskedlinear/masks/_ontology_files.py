"""Reactome's and the Gene Ontology's own files: which genes are annotated with what, and what is part of what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from maskedlinear.masks._drop_report import DropReport
from maskedlinear.masks._gene_sets import lines_of
from maskedlinear.masks._wiring_tables import EdgeList, check_choice

__all__ = ["OntologyFiles", "read_go", "read_reactome"]

File = str | PathLike[str]
_NAMESPACES = ("biological_process", "molecular_function", "cellular_component")


@dataclass(frozen=True)
class OntologyFiles:
    """Edges from gene to term and from part to whole, what terms are called, and what was left out."""

    annotations: EdgeList
    relations: EdgeList
    labels: dict[str, str]
    dropped: DropReport


def read_reactome(relations: File, annotations: File, species: str) -> OntologyFiles:
    """Return what Reactome's files say of a species; the rules are those of ``LayeredWiring.from_reactome``."""
    prefix = species.rstrip("-") + "-"
    parts, wholes, others = [], [], 0
    for number, line in lines_of(relations):
        fields = line.split("\t")
        if len(fields) != 2 or not all(field.startswith("R-") for field in fields):
            raise ValueError(
                "a line of ReactomePathwaysRelation.txt must have two identifiers, as R-HSA-109581, with a tab between; got "
                f"{line[:80]!r} in line {number} of {relations}"
            )
        if fields[0].startswith(prefix) and fields[1].startswith(prefix):
            wholes.append(fields[0])
            parts.append(fields[1].strip())
        else:
            others += 1
    report = DropReport().with_dropped("relations of other species", others)
    pairs: dict[tuple[str, str], None] = {}
    labels, rows, foreign, malformed = {}, 0, 0, None
    for number, genes, term, label in _reactome_annotations(annotations):
        if not term.startswith("R-"):
            malformed = malformed or (number, term)
            continue
        if not term.startswith(prefix):
            foreign += 1
            continue
        labels[term] = label
        rows += len(genes)
        pairs.update(dict.fromkeys((gene, term) for gene in genes))
    if malformed is not None:
        raise ValueError(
            "the second column of Reactome's annotations must be an identifier, as R-HSA-109581; got "
            f"{malformed[1]!r} in line {malformed[0]} of {annotations}"
        )
    if not pairs or not parts:
        raise ValueError(
            f"the files must have lines of the species {species!r}; got {len(parts)} relations and {len(pairs)} "
            "annotations: identifiers of man begin with R-HSA, of the mouse with R-MMU"
        )
    report = report.with_dropped("annotations of other species", foreign)
    report = report.with_dropped("annotations repeated for other evidence", rows - len(pairs))
    genes_of, terms = zip(*pairs, strict=True)
    return OntologyFiles(EdgeList(list(genes_of), list(terms)), EdgeList(parts, wholes), labels, report)


def _reactome_annotations(file: File) -> Iterator[tuple[int, list[str], str, str]]:
    """Yield the line's number, the genes, the pathway's identifier, and its name."""
    gmt = ".gmt" in Path(file).suffixes
    for number, line in lines_of(file):
        fields = line.split("\t")
        if gmt and len(fields) > 2:
            genes = [gene.strip() for gene in fields[2:]]
            yield number, [gene for gene in genes if gene], fields[1].strip(), fields[0].strip()
        elif not gmt and len(fields) >= 4:
            at = (
                1 if fields[1].startswith("R-") or len(fields) < 8 else 3
            )  # the tables of physical entities have two more
            yield number, [fields[0].strip()], fields[at].strip(), fields[at + 2].strip()
        else:
            raise ValueError(
                "a line of Reactome's annotations must be gene, pathway, address, name, ... (UniProt2Reactome.txt) or, in a "
                f".gmt file, name, pathway, genes, with tabs between; got {line[:80]!r} in line {number} of {file}"
            )


def read_go(
    ontology: File,
    annotations: File,
    namespace: str | None,
    relations: Sequence[str],
    gene: Literal["symbol", "id"],
) -> OntologyFiles:
    """Return what an OBO and a GAF file say; the rules are those of ``LayeredWiring.from_go``."""
    check_choice("namespace", namespace, (None, *_NAMESPACES))
    check_choice("gene", gene, ("symbol", "id"))
    spaces, labels, now, found, report = _read_obo(ontology, relations)
    inside = {term for term, space in spaces.items() if namespace in (None, space)}
    if not inside:
        raise ValueError(f"{ontology} must have terms of the namespace {namespace!r}; got none")
    kept = dict.fromkeys(pair for pair in found if pair[0] in inside and pair[1] in inside)
    crossing = len(dict.fromkeys(found)) - len(kept)
    report = report.with_dropped("relations to or within other namespaces", crossing)
    pairs: dict[tuple[str, str], None] = {}
    rows, negated, outside, obsolete = 0, [], 0, []
    for number, line in lines_of(annotations):
        if line.startswith("!"):
            continue
        fields = line.split("\t")
        if len(fields) < 15 or not fields[4].startswith("GO:"):
            raise ValueError(
                "a line of a GAF file must have 15 columns or more, the fifth a term as GO:0008150; got "
                f"{line[:80]!r} in line {number} of {annotations}"
            )
        name, term = fields[2 if gene == "symbol" else 1], now.get(fields[4], fields[4])
        if "NOT" in fields[3].split("|"):
            negated.append((name, term))
        elif term not in spaces:
            obsolete.append((name, term))
        elif term not in inside:
            outside += 1
        else:
            rows += 1
            pairs[name, term] = None
    if not pairs:
        raise ValueError(f"{annotations} must have annotations with terms of {ontology}; got none. Dropped:\n{report}")
    report = report.with_dropped("annotations with NOT", len(negated), negated)
    report = report.with_dropped(
        "annotations with terms that the ontology has not, or no more", len(obsolete), obsolete
    )
    report = report.with_dropped("annotations of other namespaces", outside)
    report = report.with_dropped("annotations repeated for other evidence", rows - len(pairs))
    genes, terms = zip(*pairs, strict=True)
    edges = EdgeList([part for part, _ in kept], [whole for _, whole in kept])
    return OntologyFiles(EdgeList(list(genes), list(terms)), edges, labels, report)


def _read_obo(
    file: File, relations: Sequence[str]
) -> tuple[dict[str, str], dict[str, str], dict[str, str], list[tuple[str, str]], DropReport]:
    """Return each term's namespace and name, what older identifiers are now, and ``(part, whole)`` for each relation."""
    spaces: dict[str, str] = {}
    labels: dict[str, str] = {}
    now: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    gone = []
    for term in _stanzas(file):
        (name,) = term["id"]
        if "true" in term.get("is_obsolete", ()):
            gone.append(name)
            continue
        spaces[name], labels[name] = term.get("namespace", [""])[0], term.get("name", [name])[0]
        now.update(dict.fromkeys(term.get("alt_id", ()), name))
        wholes = term.get("is_a", []) if "is_a" in relations else []
        for relation in term.get("relationship", ()):
            kind, whole = relation.split()[:2]
            if kind in relations:
                wholes = [*wholes, whole]
        found += [(name, whole.split()[0]) for whole in wholes]
    if not spaces:
        raise ValueError(f"an OBO file must have [Term] stanzas; {file} has none")
    return spaces, labels, now, found, DropReport().with_dropped("obsolete terms", len(gone), gone)


def _stanzas(file: File) -> Iterator[dict[str, list[str]]]:
    term: dict[str, list[str]] | None = None
    for _, line in lines_of(file):
        if line.startswith("["):
            if term:
                yield term
            term = {} if line.strip() == "[Term]" else None
        elif term is not None and ": " in line:
            key, value = line.split(": ", 1)
            term.setdefault(key, []).append(value.split(" ! ")[0].strip())
    if term:
        yield term
