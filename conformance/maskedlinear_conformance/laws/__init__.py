"""The laws, and what a test says of itself: which law it is of, and on which backends and dtypes it can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from maskedlinear_conformance.cases import Case

__all__ = ["LAWS", "OF_DISTRIBUTION", "OF_PAIRS", "Law", "law"]

LAWS = {
    "1": "value and derivatives equal the spec",
    "2": "the rule is the expression's own derivative",
    "3": "adjoint; linear",
    "4": "nothing under the mask leaks",
    "5": "idempotent; full and empty masks",
    "6": "batches",
    "7": "transforms equal the plain call",
    "8": "memory layouts",
    "9": "dtypes",
    "10": "inputs unchanged; same bits twice",
    "11": "a new mask holds at once; restoring",
    "12": "checkpoints",
    "12x": "weights and mask from one framework to another",
    "12f": "the project's own file format",
    "13": "freeze_masked",
    "14": "random masks",
    "15": "what shows is what acts",
    "16": "every edit shows; drift does not act",
    "golden": "golden vectors, bit for bit",
    "pairs": "backends equal each other",
    "distributed values": "ranks have the outputs of one",
    "distributed gradients": "ranks have the gradients of the whole batch",
    "distributed masks": "one mask on all ranks, which acts",
    "distributed guards": "nothing masked moves on any rank",
    "distributed checkpoints": "checkpoints go to another number of ranks",
    "distributed work": "no work is done twice",
}
"""The laws of the design by number, and those that are not numbered there."""

OF_PAIRS = ("12x", "pairs")
"""Those that two backends are needed for."""

OF_DISTRIBUTION = tuple(number for number in LAWS if number.startswith("distributed"))
"""Those that several processes or devices are needed for: ``--processes`` and ``--devices`` run them, and them alone."""

F = TypeVar("F", bound=Callable[..., None])
Need = str | tuple[str, ...]


@dataclass(frozen=True)
class Law:
    """What a test says of itself.

    Attributes:
        number: a key of ``LAWS``.
        needs: the capabilities that it needs; on a backend that declares one lacking it is reported as declared. Of
            several together one is enough.
        dtypes: the dtypes that it is about; all if ``None``. A backend without any has nothing to check.
        enough: the dtypes that suffice, where others would show nothing more; all if ``None``. A backend without any of
            them is checked in the first that it has.
        cases: which cases it runs on, if it takes one.
        dear: whether it takes so long that only the full profile runs it in every dtype.
        since: the smallest of ``PROFILES`` that runs it.
    """

    number: str
    needs: tuple[Need, ...] = ()
    dtypes: tuple[str, ...] | None = None
    enough: tuple[str, ...] | None = None
    cases: Callable[[Case], bool] = lambda _: True
    dear: bool = False
    since: str = "quick"

    def kinds(self, dtypes: Sequence[str], profile: str) -> list[str]:
        """Return which of a backend's dtypes the test runs in.

        The quick profile takes one, float32 if it can; the default one takes of dear tests float32 and a half type.
        """
        own = [dtype for dtype in dtypes if self.dtypes is None or dtype in self.dtypes]
        if self.enough is not None:
            own = [dtype for dtype in own if dtype in self.enough] or own[:1]
        half = sorted(dtype for dtype in own if dtype in ("bfloat16", "float16"))[:1]
        if profile == "quick":
            return ["float32"] if "float32" in own else half or own[:1]
        if profile == "default" and self.dear:
            return [dtype for dtype in own if dtype in ("float32", *half)] or own[:1]
        return own


def law(
    number: int | str,
    *,
    needs: Sequence[Need] = (),
    dtypes: Sequence[str] | None = None,
    enough: Sequence[str] | None = None,
    cases: Callable[[Case], bool] = lambda _: True,
    dear: bool = False,
    since: str = "quick",
) -> Callable[[F], F]:
    """Return a decorator that makes a method a test of a law; see :class:`Law`."""
    about, suffice = (None if kinds is None else tuple(kinds) for kinds in (dtypes, enough))
    says = Law(str(number), tuple(needs), about, suffice, cases, dear, since)
    if says.number not in LAWS:
        raise ValueError(f"a law is one of {', '.join(LAWS)}; got {number!r}")

    def decorate(test: F) -> F:
        test.conformance = says  # type: ignore[attr-defined]
        return test

    return decorate
