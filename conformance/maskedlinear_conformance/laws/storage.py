"""Laws 15 and 16: what a layer shows as its weight is what acts, and every edit of it shows at the next call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits, positive_zero
from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import PROBE, TILED, Case, Data, others, round_to
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.derivatives import FULL
from maskedlinear_conformance.laws.layers import built, called, stored, with_odd_dormant_values

__all__ = ["Storage"]


def _cases(subject: BackendUnderTest) -> Sequence[Case]:
    """Return a small case, a large one and, but in the quick profile, one without bias."""
    return (PROBE, TILED) if subject.profile == "quick" else (PROBE, TILED, replace(PROBE, bias=False))


def _trained(subject: BackendUnderTest) -> Sequence[tuple[Data, str]]:
    """Return each case with each optimizer; of the quick profile the small one with the first, the large with the last."""
    problems = [case.data(subject.dtype) for case in (PROBE, TILED)]
    names = built(subject, problems[0]).optimizers
    assert names, "the layer names no optimizer"
    if subject.profile == "quick":
        return list(zip(problems, (names[0], names[-1]), strict=True))
    return list(product(problems, names))


class Storage:
    """Laws 15 and 16."""

    @law(15, needs=["layer", "dense"], enough=["float64", "float32", "bfloat16"])
    def test_a_layer_shows_the_weight_that_acts(self, subject: BackendUnderTest) -> None:
        """A plain dense layer that is given the visible weight has the same outputs, under every mask that is set."""
        for case in _cases(subject):
            data = with_odd_dormant_values(case.data(subject.dtype))
            with subject.backend.strict_precision():
                layer = built(subject, data)
                _assert_shows(subject, layer, data, "a layer that was just made")
                for mask in _masks(subject, data):
                    layer.set_mask(mask)
                    # What the odd values are where they are live is no number that a bound is for.
                    _assert_stored(subject, layer, data._replace(mask=mask), "a new mask")
                    layer.set_mask(data.mask)
                    _assert_shows(subject, layer, data, "the first mask again")

    @law(15, needs=["dormant weights", "dense"], enough=["float64", "float32", "bfloat16"])
    def test_a_layer_shows_the_weight_that_acts_under_a_new_mask(self, subject: BackendUnderTest) -> None:
        """What was dormant acts and shows, and what is dormant now does neither."""
        for case in _cases(subject):
            data = case.data(subject.dtype)
            with subject.backend.strict_precision():
                layer = built(subject, data)
                for mask in (*_masks(subject, data), data.mask):
                    layer.set_mask(mask)
                    _assert_shows(subject, layer, data._replace(mask=mask), "a new mask")

    @law(15, needs=["plain load", "save", "dense"], enough=["float64", "float32", "bfloat16"])
    def test_a_plain_layer_that_loads_a_saved_state_acts_alike(self, subject: BackendUnderTest, tmp_path: Path) -> None:
        """It knows nothing of masks and finds the weight that acts; so does the layer itself, with all that is dormant."""
        for case in _cases(subject):
            data = with_odd_dormant_values(case.data(subject.dtype))
            path = tmp_path / str(case)
            path.mkdir()
            with subject.backend.strict_precision():
                other = data._replace(weight=-data.weight, mask=others(data.mask)[0])
                layer, fresh = built(subject, data), built(subject, other)
                if subject.has("dormant weights"):
                    layer.set_mask(other.mask)
                    layer.set_mask(data.mask)
                layer.save(path)
                y = subject.to_numpy(layer.load_plain(path)(subject.to_backend(data.x)))
                subject.assert_agree({"y": y}, _value(subject, layer, data), {"y": _as_dense(data)})
                fresh.load(path)
                _assert_shows(subject, fresh, data, "a layer that was loaded")

    @law(15, needs=["other states", "dormant weights", "dense"], enough=["float64", "float32", "bfloat16"])
    def test_what_a_loaded_state_has_under_the_mask_becomes_dormant(self, subject: BackendUnderTest) -> None:
        """The state of a plain layer, whose mask stays, and that of an earlier version, which brings its own."""
        for case in _cases(subject):
            first = case.data(subject.dtype)
            loaded = with_odd_dormant_values(first._replace(weight=first.dweight, bias=first.dbias))
            moved = with_odd_dormant_values(loaded._replace(weight=-first.dweight, mask=others(first.mask)[0]))
            with subject.backend.strict_precision():
                for data, mask in ((loaded, None), (moved, moved.mask)):
                    layer = built(subject, first)
                    called(subject, layer, first)
                    layer.load_other(*(subject.to_backend(array) for array in (data.weight, mask, data.bias)))
                    _assert_shows(subject, layer, data, f"a state {'without' if mask is None else 'with'} a mask")
                    layer.set_mask(~data.mask)
                    _assert_stored(subject, layer, data._replace(mask=~data.mask), "a new mask after that")

    @law(15, needs=["conversion", "layer", "dense"])
    def test_a_conversion_keeps_what_shows_and_what_is_dormant(self, subject: BackendUnderTest) -> None:
        """In another dtype, and back, the same weight acts and shows, and a mask brings back what was dormant."""
        dtypes = [dtype for dtype in subject.backend.dtypes(subject.device) if dtype != subject.dtype]
        quick = subject.profile == "quick"
        for case, dtype in product((PROBE,) if quick else (PROBE, TILED), dtypes[-1:] if quick else dtypes):
            there = replace(subject, dtype=dtype)
            data = _held_by_both(case.data(subject.dtype), subject.dtype, dtype)
            with subject.backend.strict_precision():
                layer = built(subject, data)
                _value(subject, layer, data)
                for now, after in ((there, f"a conversion to {dtype}"), (subject, "the conversion back")):
                    layer.convert(now.dtype)
                    _assert_shows(now, layer, data, after)
                    if subject.has("dormant weights"):
                        layer.set_mask(~data.mask)
                        _assert_stored(now, layer, data._replace(mask=~data.mask), f"a new mask after {after}")
                        layer.set_mask(data.mask)

    @law(15, needs=["freeze_masked", "dense"], enough=["float64", "float32", "bfloat16"])
    def test_a_guarded_step_leaves_a_weight_that_acts(self, subject: BackendUnderTest) -> None:
        """Straight after it the visible weight is +0 under the mask, a new one too; what is dormant is what it was."""
        with subject.backend.strict_precision():
            for data, name in _trained(subject):
                x, g = subject.to_backend(data.x), subject.to_backend(data.g)
                layer = built(subject, data)
                step = layer.frozen_step(name)
                for mask in (data.mask, others(data.mask)[0], ~data.mask):
                    layer.set_mask(mask)
                    for _ in range(2):
                        before = layer.state()
                        step(x, g)
                        shown = subject.to_numpy(layer.visible_weight())
                        positive_zero(shown[~mask], f"the visible weight under the mask, after a step of {name},")
                        weight, _, bias = layer.state()
                        equal_bits([weight[~mask]], [before[0][~mask]], f"dormant values, after a step of {name}")
                        _assert_shows(
                            subject, layer, data._replace(weight=weight, mask=mask, bias=bias), name, trained=True
                        )

    @law(16, needs=["layer"], enough=["float32", "bfloat16"])
    def test_every_edit_of_a_live_weight_shows_at_the_next_call(self, subject: BackendUnderTest) -> None:
        """By whatever road it comes, past what counts edits too: in inference and in training, whichever is first."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            with subject.backend.strict_precision():
                for edit in (None, *built(subject, data).weight_edits):
                    for training_first in (False, True):
                        layer = built(subject, data)
                        called(subject, layer, data)
                        for weight in (-data.weight, data.dweight):
                            edited = data._replace(weight=np.where(data.mask, weight, 0))
                            _edit(subject, layer, edit, edited)
                            found = _called(subject, layer, edited, training_first)
                            _assert_matches_spec(subject, found, edited, edit or "set_weight")
                            shown = subject.to_numpy(layer.visible_weight())
                            equal_bits([shown], [edited.weight], f"the visible weight, after {edit or 'set_weight'}")

    @law(16, needs=["dormant weights"], enough=["float32", "bfloat16"])
    def test_an_edit_of_masked_places_is_dropped(self, subject: BackendUnderTest) -> None:
        """What ``set_weight`` leaves under the mask acts nowhere, NaN too, and takes no dormant value's place."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            with subject.backend.strict_precision():
                for value, training_first in ((np.nan, False), (np.inf, True), (1.0, False)):
                    layer = built(subject, data)
                    called(subject, layer, data)
                    edited = data._replace(weight=np.where(data.mask, -data.weight, value))
                    layer.set_weight(subject.to_backend(edited.weight))
                    found = _called(subject, layer, edited, training_first)
                    subject.assert_matches_spec(found, expected(edited))
                    positive_zero(found["dW"][~data.mask], "dW under the mask")
                    full = data._replace(weight=np.where(data.mask, -data.weight, data.weight))
                    equal_bits(layer.state(), stored(subject, full), f"the state, {value} being left under the mask")
                    layer.set_mask(~data.mask)
                    _assert_stored(subject, layer, full._replace(mask=~data.mask), "a new mask after that")

    @law(16, needs=["mask edits"], enough=["float32", "bfloat16"])
    def test_an_edited_mask_acts_at_the_next_call(self, subject: BackendUnderTest) -> None:
        """What it switches off acts no more, and what it switches on starts from what stands in the weight, 0."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            with subject.backend.strict_precision():
                for mask in _masks(subject, data):
                    for training_first in (False, True):
                        layer = built(subject, data)
                        called(subject, layer, data)
                        layer.edit_mask(mask.copy())
                        edited = data._replace(mask=mask, weight=np.where(data.mask & mask, data.weight, 0))
                        found = _called(subject, layer, edited, training_first)
                        subject.assert_matches_spec(found, expected(edited))
                        positive_zero(found["dW"][~mask], "dW under the edited mask")
                        equal_bits(layer.state()[1:2], [mask], "the mask, after it was edited")

    @law(16, needs=["unguarded optimizers", "dormant weights"], enough=["float64", "float32", "bfloat16"])
    def test_what_an_optimizer_leaves_under_the_mask_does_not_act(self, subject: BackendUnderTest) -> None:
        """Momentum of another mask and decay move what is masked: no call sees it, and what is dormant is what it was."""
        with subject.backend.strict_precision():
            for data, name in _trained(subject):
                x, g = subject.to_backend(data.x), subject.to_backend(data.g)
                layer, step = _with_momentum(subject, data, name)
                masks = (data.mask, others(data.mask)[0], ~data.mask, data.mask)
                for mask, quantity in zip(masks, cycle(("y", "dx")), strict=False):
                    layer.set_mask(mask)
                    before = layer.state()[0]
                    step(x, g)
                    found = subject.to_numpy(layer(x) if quantity == "y" else layer.gradients(x, g)[0])
                    if subject.has("projection"):
                        shown = subject.to_numpy(layer.visible_weight())
                        positive_zero(shown[~mask], f"the visible weight, after {name} and a call,")
                    weight, _, bias = layer.state()
                    moved = data._replace(weight=weight, mask=mask, bias=bias)
                    _assert_matches_spec(subject, {quantity: found}, moved, f"a step of {name} without a guard")
                    kept = _told_apart(subject, before, weight)
                    equal_bits([weight[~mask]], [kept[~mask]], f"dormant values, after a step of {name}")
                    assert (weight[mask] != before[mask]).any(), f"live weights must train under {name}"

    @law(16, needs=["unguarded optimizers", "dormant weights"], enough=["float64", "float32", "bfloat16"])
    def test_what_an_optimizer_leaves_under_the_mask_is_not_revived(self, subject: BackendUnderTest) -> None:
        """A mask that follows a step at once brings back what was dormant, and makes what was trained dormant."""
        with subject.backend.strict_precision():
            for data, name, layer, before in _after_a_step(subject):
                trained = subject.to_numpy(layer.visible_weight())
                layer.set_mask(~data.mask)
                weight, _, bias = layer.state()
                kept = _told_apart(subject, before, weight)
                now = data._replace(weight=np.where(data.mask, trained, kept), mask=~data.mask, bias=bias)
                _assert_stored(subject, layer, now, f"a new mask after a step of {name} without a guard")

    @law(16, needs=["projection", "plain load", "save", "dense"], enough=["float32", "bfloat16"])
    def test_what_an_optimizer_leaves_under_the_mask_is_not_saved(
        self, subject: BackendUnderTest, tmp_path: Path
    ) -> None:
        """A state that is saved straight after a step without a guard is that of the weight which acts."""
        with subject.backend.strict_precision():
            for data, name, layer, _ in _after_a_step(subject):
                path = tmp_path / f"{len(data.mask)} {name}"
                path.mkdir()
                layer.save(path)
                y = subject.to_numpy(layer.load_plain(path)(subject.to_backend(data.x)))
                weight, _, bias = layer.state()
                now = data._replace(weight=weight, bias=bias)
                subject.assert_agree({"y": y}, _value(subject, layer, now), {"y": _as_dense(now)})

    @law(16, needs=["projection", "conversion", "dense"], enough=FULL)
    def test_what_an_optimizer_leaves_under_the_mask_is_not_converted(self, subject: BackendUnderTest) -> None:
        """In the new dtype the weight is +0 under the mask, straight after a step without a guard too."""
        other = next(
            (dtype for dtype in subject.backend.dtypes(subject.device) if dtype != subject.dtype), subject.dtype
        )
        with subject.backend.strict_precision():
            for data, name, layer, before in _after_a_step(subject):
                layer.convert(other)
                shown = subject.to_numpy(layer.visible_weight())
                positive_zero(shown[~data.mask], f"the visible weight under the mask, {name} and a conversion after,")
                dormant = round_to(before[~data.mask], other)
                equal_bits([layer.state()[0][~data.mask]], [dormant], f"dormant values, after {name} and a conversion")

    @law(16, needs=["other readers"], enough=["float32", "bfloat16"])
    def test_the_gradient_of_another_reader_is_positive_zero_under_the_mask(self, subject: BackendUnderTest) -> None:
        """Whoever reads the weight past the layer sends it no gradient where it is masked, NaN in x and g too."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            mask = others(data.mask)[0]
            with subject.backend.strict_precision():
                layer = built(subject, data)
                for now in (data.mask, mask) if subject.has("dormant weights") else (data.mask,):
                    if now is not data.mask:
                        layer.set_mask(now)
                    changed = data._replace(mask=now)
                    x, g = subject.to_backend(data.x), subject.to_backend(data.g)
                    found = subject.to_numpy(layer.reader_gradient(x, g))
                    positive_zero(found[~now], "dW under the mask, of another reader,")
                    subject.assert_matches_spec({"dW": found}, expected(changed))
                    nan = subject.to_backend(np.full_like(data.x, np.nan))
                    found = subject.to_numpy(layer.reader_gradient(nan, g))
                    positive_zero(found[~now], "dW under the mask, of another reader, x being NaN,")

    @law(16, needs=["shared weights"], enough=FULL)
    def test_layers_that_share_a_weight_share_its_mask(self, subject: BackendUnderTest) -> None:
        """A mask or a weight that one of them gets acts in both, and both have the same values dormant."""
        for case in (PROBE, TILED):
            data = case.data(subject.dtype)
            with subject.backend.strict_precision():
                layer = built(subject, data)
                pair = (layer, layer.sharer())
                for setter, mask in zip((*pair, layer), others(data.mask), strict=False):
                    setter.set_mask(mask)
                    for sharer in pair:
                        _assert_shows(subject, sharer, data._replace(mask=mask), "a mask that a sharer was given")
                data = data._replace(weight=np.where(mask, -data.weight, data.weight), mask=mask)
                pair[1].set_weight(subject.to_backend(np.where(mask, data.weight, 0)))
                for sharer in pair:
                    _assert_shows(subject, sharer, data, "a weight that a sharer was given")


def _masks(subject: BackendUnderTest, data: Data) -> Sequence[Any]:
    """Return masks to set in a layer of ``data``; none of one whose mask is fixed."""
    if not subject.has("dormant weights"):
        return ()
    return (others(data.mask)[0], ~data.mask, data.mask | True, data.mask & False)


def _with_momentum(subject: BackendUnderTest, data: Data, optimizer: str) -> tuple[Any, Any]:
    """Return a layer with the full mask, and an optimizer's step without a guard that has momentum for every weight."""
    layer = built(subject, data)
    layer.set_mask(np.ones_like(data.mask))
    step = layer.unguarded_step(optimizer)
    step(subject.to_backend(data.x), subject.to_backend(data.g))
    return layer, step


def _after_a_step(subject: BackendUnderTest) -> Iterator[tuple[Data, str, Any, Any]]:
    """Yield data, an optimizer, a layer that a step of it without a guard has left, and its state's weight before that."""
    for data, name in _trained(subject):
        layer, step = _with_momentum(subject, data, name)
        layer.set_mask(data.mask)
        before, _, _ = layer.state()
        step(subject.to_backend(data.x), subject.to_backend(data.g))
        yield data, name, layer, before


def _told_apart(subject: BackendUnderTest, before: Any, weight: Any) -> Any:
    """Return what was dormant ``before``. Where nobody counts edits, a dormant 0 is not told from nothing, and ``weight``,
    what an optimizer has left there, becomes dormant in its place; training in half precision makes such zeros."""
    return before if subject.has("projection") else np.where(before == 0, weight, before)


def _held_by_both(data: Data, dtype: str, other: str) -> Data:
    """Return ``data`` in numbers that both dtypes hold, and odd ones under the mask."""
    odd = np.resize([np.nan, np.inf, -0.0, -1.5], data.weight.shape)
    both = Data(*(a if a is None or a.dtype == bool else round_to(round_to(a, dtype), other) for a in data))
    return both._replace(weight=np.where(data.mask, both.weight, odd))


def _edit(subject: BackendUnderTest, layer: Any, edit: str | None, data: Data) -> None:
    weight = subject.to_backend(data.weight)
    if edit is None:
        layer.set_weight(weight)
    else:
        layer.edit_weight(edit, weight)


def _called(subject: BackendUnderTest, layer: Any, data: Data, training_first: bool) -> Any:
    """Return y, dx, dW and db of a layer, the gradients being asked for first or last."""
    if training_first:
        gradients = [subject.to_numpy(a) for a in layer.gradients(*(subject.to_backend(a) for a in (data.x, data.g)))]
        found = called(subject, layer, data)
        named = {"dx": gradients[0], "dW": gradients[1]} | ({} if data.bias is None else {"db": gradients[2]})
        equal_bits([found[name] for name in named], named.values(), "the gradients of a second call")
        return found
    return called(subject, layer, data)


def _value(subject: BackendUnderTest, layer: Any, data: Data) -> dict[str, Any]:
    return {"y": subject.to_numpy(layer(subject.to_backend(data.x)))}


def _as_dense(data: Data) -> Expected:
    """Return what y should be; a framework's own layer may round a half type before it adds the bias."""
    want = expected(data._replace(weight=np.where(data.mask, data.weight, 0)))["y"]
    if data.bias is None:
        return want
    return replace(want, rounded=want.rounded + abs(want.exact) + abs(data.bias))


def _assert_stored(subject: BackendUnderTest, layer: Any, data: Data, after: str) -> None:
    """Check that a layer shows the live values of ``data`` and +0, and has the others dormant, bit for bit."""
    weight, mask, bias = stored(subject, data)
    shown = subject.to_numpy(layer.visible_weight())
    assert shown.shape == mask.shape, f"the shape of the visible weight, after {after}"
    positive_zero(shown[~mask], f"the visible weight under the mask, after {after},")
    equal_bits([shown[mask]], [weight[mask]], f"the visible weight, after {after}")
    equal_bits(layer.state(), (weight, mask, bias), f"live and dormant values, after {after}")


def _assert_shows(subject: BackendUnderTest, layer: Any, data: Data, after: str, *, trained: bool = False) -> None:
    """Check that a layer has the values of ``data``, and acts as a plain one does with the weight that it shows.

    A ``trained`` weight has learned from x: errors need not cancel as with signed data, and the bound is the hard one.
    """
    _assert_stored(subject, layer, data, after)
    x, bias = subject.to_backend(data.x), subject.to_backend(data.bias)
    y = _value(subject, layer, data)
    plain = {"y": subject.to_numpy(subject.backend.dense(x, layer.visible_weight(), bias))}
    _assert_matches_spec(subject, y, data, after, hard=trained)
    subject.assert_agree(plain, y, {"y": _as_dense(data)})


def _assert_matches_spec(
    subject: BackendUnderTest, found: dict[str, Any], data: Data, after: str, *, hard: bool = False
) -> None:
    try:
        subject.assert_matches_spec(found, expected(data), hard=hard)
    except AssertionError as error:
        raise AssertionError(f"{error}, after {after}") from error
