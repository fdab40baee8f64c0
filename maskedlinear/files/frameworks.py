"""A file of one framework in the names and layouts of another's, so that both can be compared array by array."""

from __future__ import annotations

from collections.abc import Mapping

from maskedlinear.checkpoint import CheckpointFile
from maskedlinear.checkpoint._names import Expected, is_optional, translated
from maskedlinear.files.source import Source, infos_of

__all__ = ["as_the_other"]

_LEFT_OVER = "not in the model: "  # how what only the file has is told


def as_the_other(first: Source, second: Source) -> tuple[Source, Source, list[str]]:
    """Return two files that are compared by name, the first in the second's names if another framework wrote it.

    Masks and dormant values move with the layout. What a framework keeps for itself, as counters of batches, is left out.

    Returns:
        The two, and what could not be translated, a sentence each.
    """
    files = {id(held): held for source in (first, second) for held in source.held.values()}
    ours = [file for file in files.values() if isinstance(file, CheckpointFile)]
    frameworks = (first.framework, second.framework)
    if (
        len(ours) != 2
        or len(files) != 2
        or len(set(frameworks)) == 1
        or not set(frameworks) <= {"torch", "nnx", "linen"}
    ):
        return first, second, []
    arrays, told = translated(ours[0], _expected(ours[1]), second.framework)
    others = {sentence.removeprefix(_LEFT_OVER) for sentence in told if sentence.startswith(_LEFT_OVER)}
    held = {**arrays, **{name: ours[0].array(name) for name in others if name not in arrays}}
    roles = {name: ours[1].entry(name).role for name in second}
    kept = {name: info for name, info in second.infos.items() if name in arrays or not is_optional(name, roles[name])}
    first = Source(
        first.kind, first.nbytes, infos_of(held, {}), framework=second.framework, how=first.how, held=dict(held)
    )
    second = Source(second.kind, second.nbytes, kept, framework=second.framework, how=second.how, held=second.held)
    return first, second, [one for one in told if not one.startswith("not in the ")]


def _expected(file: CheckpointFile) -> Mapping[str, Expected]:
    own: dict[str, Expected] = {}
    for name in file:
        entry, stored_as = file.entry(name), file.told(name).stored_as
        own.setdefault(stored_as, Expected(entry.shape, entry.dtype, entry.axes, entry.role))
    return {name: own[file.told(name).stored_as] for name in file}
