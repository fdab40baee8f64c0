"""The names of JAX and Flax that are no public interface stand in one file, and what stands in for them is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import maskedlinear_jax
from maskedlinear.flax import MaskedLinear, compress, shrink
from maskedlinear.jax import masked_linear
from maskedlinear_jax import _compat
from maskedlinear_jax.flax import _shrink

PRIVATE = re.compile(r"jax\._src|jax\.core|jax\.extend|jax\.interpreters|flax\.\S*\._|_pytree__")


def test_private_names_stand_in_one_file() -> None:
    root = Path(maskedlinear_jax.__file__).parent
    files = {file.name for file in root.rglob("*.py") if PRIVATE.search(file.read_text(encoding="utf-8"))}
    assert files == {"_compat.py"}


def test_traced_arrays_are_told_without_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "_Tracer", None)
    seen: list[bool] = []

    def look(x: Any) -> Any:
        seen.append(_compat.is_traced(x))
        return x

    jax.jit(look)(jnp.ones(2))
    for value in (jnp.ones(2), np.ones(2), 1.0, "text"):
        look(value)
    assert seen == [True, False, False, False, False]
    with pytest.raises(ValueError, match="inside a transform a mask must be boolean"):
        jax.jit(masked_linear)(jnp.ones((2, 3)), jnp.ones((4, 3)), jnp.ones((4, 3)))


def test_attributes_are_kept_without_nnxs_books() -> None:
    layer: Any = MaskedLinear(4, 3, rngs=nnx.Rngs(0))
    layer.note, layer.scale = "mine", nnx.Variable(jnp.ones(1))
    assert {name: _compat.holds_data(layer, name) for name in ("note", "scale")} == {"note": False, "scale": True}
    nodes = vars(layer).pop("_pytree__nodes")
    assert {name: _compat.holds_data(layer, name) for name in ("note", "scale")} == {"note": False, "scale": True}
    object.__setattr__(layer, "_pytree__nodes", nodes)
    assert compress(layer, "sparse").note == "mine"  # type: ignore[attr-defined]


def test_shrink_refuses_where_it_cannot_read_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shrink, "_layer_p", None)
    with pytest.raises(RuntimeError, match="shrink reads JAX's traces"):
        shrink(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))
