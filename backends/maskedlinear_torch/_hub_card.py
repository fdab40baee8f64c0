"""The model card of a masked model: how sparse it is, by groups of weights, in Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from maskedlinear.models import WeightSummary
from maskedlinear_torch._whole import summary

__all__ = ["card_section", "model_card", "update_card", "write_card"]

_PLAIN = (
    "The weights load as those of any model. To load the masks too, `pip install maskedlinear`, and "
    "`import maskedlinear.transformers` before `from_pretrained`."
)
_TAGS = ("maskedlinear", "sparse")
_GENERATED = "This model card has been automatically generated"  # by transformers, where the Hub has none yet
_BEGIN, _END = "<!-- maskedlinear: begin -->", "<!-- maskedlinear: end -->"


def model_card(model: nn.Module) -> str:
    """Return a section of Markdown that says how sparse a masked model is: a line for each group of weights, and the whole.

    Weights whose names differ in numbers alone are a group::

        print(model_card(model))

    Args:
        model: any module with masked weights.
    """
    return card_section(model)


def card_section(model: nn.Module, note: str = "") -> str:
    """Return what :func:`model_card` does, with a note on how the model is loaded, between two comments."""
    found = summary(model)
    groups: dict[str, list[WeightSummary]] = {}
    for row in found.rows:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name) or "the weight"
        groups.setdefault(f"`{name}` | {' x '.join(map(str, row.shape))} | {row.form}", []).append(row)
    lines = ["| weights | shape | form | number | live | sparsity |", "|---|---|---|---|---|---|"]
    for told, rows in groups.items():
        size, live = sum(row.size for row in rows), sum(row.connections for row in rows)
        lines.append(f"| {told} | {len(rows)} | {live} | {(size - live) / size if size else 0:.2%} |")
    return "\n".join(
        [
            _BEGIN,
            "## Sparsity",
            "",
            f"{found.sparsity:.2%} of the masked weights are 0, {found.model_sparsity:.2%} of all parameters.",
            *([note] if note else []),
            "",
            *lines,
            _END,
        ]
    )


def write_card(model: nn.Module, path: Path) -> None:
    """Write a model card if there is none; of one that there is, replace the section that was written here, if any."""
    section = card_section(model, _PLAIN)
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if (changed := _replaced(text, section)) != text:
            path.write_text(changed, encoding="utf-8")
        return
    tags = "".join(f"- {tag}\n" for tag in _TAGS)
    path.write_text(f"---\nlibrary_name: transformers\ntags:\n{tags}---\n\n{section}\n", encoding="utf-8")


def update_card(model: nn.Module, card: Any) -> None:
    """Bring a card on its way to the Hub up to date, as :func:`write_card` does; one of transformers' own gets a section.

    Args:
        model: the model that is pushed.
        card: a ``huggingface_hub.ModelCard``, which changes.
    """
    section = card_section(model, _PLAIN)
    if _BEGIN not in card.text and _GENERATED in card.text:
        card.text = f"{section}\n\n{card.text.lstrip()}"
        card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *_TAGS)))
    else:
        card.text = _replaced(card.text, section)


def _replaced(text: str, section: str) -> str:
    """Return the text of a card with another section of ours, if it has one."""
    start, end = text.find(_BEGIN), text.find(_END)
    return text[:start] + section + text[end + len(_END) :] if 0 <= start < end else text
