"""The laws that distribution can break: several processes, or devices, that share a layer are one, and share the work.

What each rank holds comes as :class:`maskedlinear.backends.Shard`; a rank is a process or a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from maskedlinear import pruning
from maskedlinear.backends import Shard
from maskedlinear_conformance.backend_under_test import BackendUnderTest, equal_bits, positive_zero
from maskedlinear_conformance.bounds import Expected, expected
from maskedlinear_conformance.cases import Case, Data, others, with_nan
from maskedlinear_conformance.laws import law
from maskedlinear_conformance.laws.layers import with_odd_dormant_values
from maskedlinear_conformance.team import SharedLayer

__all__ = ["Distribution", "shared_cases"]

WIDE = ("float64", "float32")
Array = Any
Shards = Sequence[Shard]

CLOSE = {"float64": 1e-9, "float32": 1e-4}
"""How far weights of about 1 may be, after three steps, from those of one process: sums come in another order."""


def shared_cases(subject: BackendUnderTest) -> list[Case]:
    """Return a small case that any number of ranks divides; in larger profiles one of many weights, and an uneven one."""
    assert subject.team is not None
    count = subject.team.count
    cases = [Case((2 * count,), 3 * count, 2 * count, 0.5)]
    if subject.profile != "quick":
        cases.append(Case((4 * count,), 136 // count * count, 128 // count * count, 0.3, bias=False))
        if subject.team.kind == "processes":
            cases.append(Case((3 * count,), 17, 13, 0.5))
    return cases


class Distribution:
    """What several ranks compute, keep and write is what one does."""

    @law("distributed values", enough=WIDE)
    def test_ranks_have_the_outputs_of_one(self, subject: BackendUnderTest, placement: str) -> None:
        """Each part of y lies within the bounds of the spec's, and there is every part; NaN under the mask leaks nowhere."""
        for case in shared_cases(subject):
            data = case.data(subject.dtype)
            dirty = with_odd_dormant_values(data)
            with subject.shared(placement, dirty) as layer:
                _assert_matches(subject, "y", layer.shards("value", data.x), expected(data)["y"])

    @law("distributed gradients", enough=WIDE)
    def test_ranks_have_the_gradients_of_the_whole_batch(self, subject: BackendUnderTest, placement: str) -> None:
        """Each part lies within the bounds; it is +0 under the mask, on every rank, for NaN in x or g too."""
        for case in shared_cases(subject):
            data = case.data(subject.dtype)
            with subject.shared(placement, with_odd_dormant_values(data)) as layer:
                _assert_gradients(subject, layer, data)
                for name in ("x", "g"):
                    dirty = with_nan(data, name)
                    found = layer.several("gradients", dirty.x, dirty.g)[1] or []
                    _assert_positive_zero(found, ~data.mask, f"dW under the mask, {name} holding NaN,")

    @law("distributed masks", needs=["distributed masks"], enough=WIDE)
    def test_a_mask_that_is_set_before_or_after_acts_reads_and_exports(
        self, subject: BackendUnderTest, placement: str
    ) -> None:
        """It is the same on all ranks; what it hides is kept, reads +0 and is exported as +0, and comes back bit for bit."""
        for case in shared_cases(subject):
            data = case.data(subject.dtype)
            with subject.shared(placement, data) as layer:
                for number, mask in enumerate((data.mask, *others(data.mask)[1:3], ~data.mask, data.mask)):
                    if number:  # the first was set before the layer was shared
                        layer.ask("set_mask", mask)
                    now = data._replace(mask=mask)
                    _assert_gradients(subject, layer, now)
                    _assert_matches(subject, "y", layer.shards("value", data.x), expected(now)["y"])
                    _assert_state(subject, layer, data.weight, mask, data.bias)
                    _assert_exports(layer, data.weight, mask)

    @law("distributed masks", needs=["distributed masks"], enough=WIDE)
    def test_a_mask_lies_as_its_weight_does(self, subject: BackendUnderTest, placement: str) -> None:
        """No rank holds more of a mask than of the weight, whether it was set before, set after, or came of pruning."""
        data = shared_cases(subject)[0].data(subject.dtype)
        with subject.shared(placement, data) as layer:
            _assert_lie_alike(layer, "before it was shared")
            layer.ask("set_mask", others(data.mask)[1])
            _assert_lie_alike(layer, "afterwards")
            if subject.has("distributed pruning"):
                layer.ask("prune", 0.8)
                _assert_lie_alike(layer, "by pruning")

    @law("distributed masks", needs=["distributed pruning"], enough=WIDE)
    def test_ranks_prune_as_one(self, subject: BackendUnderTest, placement: str) -> None:
        """All have the same mask, which is that of one process, pruning again too, and it acts."""
        for case in shared_cases(subject):
            data, mask = case.data(subject.dtype), case.mask()
            with subject.shared(placement, data) as layer:
                for sparsity in (0.8, 0.9):
                    layer.ask("prune", sparsity)
                    score = abs(np.where(mask, data.weight, 0))
                    mask = pruning.prune(score, num_zeros=math.floor(sparsity * mask.size), masks=mask)
                    _assert_state(subject, layer, data.weight, mask, data.bias)
                    now = data._replace(mask=mask)
                    _assert_matches(subject, "y", layer.shards("value", data.x), expected(now)["y"])

    @law("distributed guards", needs=["distributed optimizers"], enough=WIDE)
    def test_steps_leave_what_is_masked_on_every_rank(self, subject: BackendUnderTest, placement: str) -> None:
        """Masked entries are +0 on every shard, dormant ones are kept, and live ones are where one process has them."""
        data = shared_cases(subject)[0].data(subject.dtype)
        assert subject.team is not None
        with subject.shared(placement, data) as layer, subject.shared(placement, data, subject.team.of(1)) as alone:
            for name in layer.ask("optimizers")[0]:
                before = _whole(layer.several("state")[0])
                for one in (layer, alone):
                    one.ask("train", name, data.x, data.g, 3)
                what = f"after steps of {name}"
                shown = layer.shards("visible_weight")
                _assert_positive_zero(shown, ~data.mask, f"the visible weight under the mask, {what},")
                weight, mask, _ = layer.several("state")
                _assert_equal(mask, data.mask, f"the mask, {what}")
                trained = _whole(weight)
                if subject.has("dormant weights"):
                    equal_bits([trained[~data.mask]], [before[~data.mask]], f"dormant weights, {what}")
                assert (trained != before)[data.mask].mean() > 0.9, f"live weights must train, {what}"
                far = abs(trained - _whole(alone.several("state")[0]))[data.mask].max()
                assert far <= CLOSE[subject.dtype], f"live weights are {far:.3g} away from one process', {what}"

    @law("distributed checkpoints", needs=["distributed checkpoints"], enough=WIDE)
    def test_a_checkpoint_goes_to_another_number_of_ranks(
        self, subject: BackendUnderTest, placement: str, tmp_path: Path
    ) -> None:
        """The function, the mask and the dormant values come back, from more ranks to fewer and from fewer to more."""
        data = with_odd_dormant_values(shared_cases(subject)[0].data(subject.dtype))
        other = data._replace(weight=-data.weight, mask=others(data.mask)[0])
        if not subject.has("dormant weights"):
            other = other._replace(mask=others(data.mask)[3])  # as many connections but one
        assert subject.team is not None
        with subject.shared(placement, data) as probe:
            ways = probe.ask("checkpoints")[0]
        assert ways, "the layer names no way to save a checkpoint"
        several = [(subject.team, team) for team in subject.team.others(subject.profile)]
        several += [pair[::-1] for pair in several]
        for number, (way, (source, target)) in enumerate(product(ways, several)):
            path = tmp_path / str(number)
            path.mkdir()
            with subject.shared(placement, data, source) as layer, subject.shared(placement, other, target) as fresh:
                layer.ask("save", way, path)
                fresh.ask("load", way, path)
                _assert_loaded(subject, fresh, data, f"{way}, from {source} to {target}")

    @law("distributed work", enough=WIDE)
    def test_no_part_is_computed_twice(self, subject: BackendUnderTest, placement: str) -> None:
        """Of what a placement divides, each rank computes its own part and no other's."""
        data = shared_cases(subject)[0].data(subject.dtype)
        division = placement.partition(":")[0]
        with subject.shared(placement, data) as layer:
            y = layer.shards("value", data.x)
            dx = (layer.several("gradients", data.x, data.g)[0]) or []
        divided = {"batch": (y, dx), "batch and weights": (y, dx), "outputs": (y,), "inputs": (dx,)}[division]
        for name, shards in zip(("y", "dx"), (y, dx), strict=True):
            times = np.sum([shard.held for shard in shards], axis=0)
            if any(shards is one for one in divided):
                assert (times == 1).all(), (
                    f"each entry of {name} must be computed on one rank alone; {(times > 1).sum()} of {times.size} are on "
                    f"up to {times.max()}"
                )

    @law("distributed work", needs=["compiled program"], enough=("float32",))
    def test_nothing_that_is_divided_is_gathered(self, subject: BackendUnderTest, placement: str) -> None:
        """The compiled program of value and gradients brings together no array as large as x, y or the weight."""
        for case in shared_cases(subject):
            data = case.data(subject.dtype)
            with subject.shared(placement, data) as layer:
                shapes = [shape for found in layer.ask("gathered", data.x, data.g) for shape in found]
            limit = min(data.x.size, data.g.size, int(data.mask.sum()) or data.mask.size)
            large = [shape for shape in shapes if math.prod(shape) >= limit]
            assert not large, f"the compiled program must gather nothing of {limit} entries or more; it gathers {large}"


def _assert_gradients(subject: BackendUnderTest, layer: SharedLayer, data: Data) -> None:
    want = expected(data)
    for name, shards in zip(("dx", "dW", "db"), layer.several("gradients", data.x, data.g), strict=True):
        assert (shards is None) == (name not in want), f"{name} must be there if there is a bias, and only then"
        if shards is not None:
            _assert_matches(subject, name, shards, want[name])
            if name == "dW":
                _assert_positive_zero(shards, ~data.mask, "dW under the mask")


def _assert_matches(subject: BackendUnderTest, name: str, shards: Shards, want: Expected) -> None:
    """Check that what ranks hold lies within the bound of the spec's, and that together they hold all."""
    _assert_complete(shards, want.exact.shape, name)
    for rank, shard in enumerate(shards):
        # What it does not hold is taken for right.
        got = np.where(shard.held, shard.values, want.exact)
        used = want.used(got, subject.dtype)
        subject.record.against_spec(subject.label, name, subject.dtype, used, False)
        assert used <= 1, f"{name} on rank {rank} is {used:.3g} times its bound away from the spec"


def _assert_complete(shards: Shards, shape: tuple[int, ...], name: str) -> None:
    for rank, shard in enumerate(shards):
        assert shard.values.shape == shard.held.shape == shape, (
            f"the shape of {name} on rank {rank}: {shard.values.shape}, not {shape}"
        )
    held = np.any([shard.held for shard in shards], axis=0)
    assert held.all(), f"{name}: {(~held).sum()} of {held.size} entries are on no rank"


def _assert_equal(shards: Shards | None, want: Array, what: str) -> None:
    """Check that what ranks hold is part of ``want``, bit for bit, and that together they hold all."""
    if shards is None or want is None:
        assert shards is want, what
        return
    _assert_complete(shards, want.shape, what)
    for rank, shard in enumerate(shards):
        equal_bits([shard.values[shard.held]], [want[shard.held]], f"{what}, on rank {rank}")


def _assert_positive_zero(shards: Shards, where: Array, what: str) -> None:
    assert shards, f"{what} must be there"
    for rank, shard in enumerate(shards):
        positive_zero(shard.values[shard.held & where], f"{what} on rank {rank}")


def _assert_state(
    subject: BackendUnderTest, layer: SharedLayer, weight: Array, mask: Array, bias: Array | None
) -> None:
    """Check weight, mask and bias on every rank, and the weight that other code reads."""
    if not subject.has("dormant weights"):
        weight = np.where(mask, weight, 0)
    found = layer.several("state")
    for name, shards, want in zip(("the weight", "the mask", "the bias"), found, (weight, mask, bias), strict=True):
        _assert_equal(shards, want, name)
    _assert_equal(layer.shards("visible_weight"), np.where(mask, weight, 0), "the visible weight")


def _assert_exports(layer: SharedLayer, weight: Array, mask: Array) -> None:
    exported = [found for found in layer.ask("export") if found is not None]
    assert exported, "one rank must export the whole weight"
    for shown, its_mask in exported:
        equal_bits([its_mask], [mask], "the mask that is exported")
        equal_bits([shown], [np.where(mask, weight, 0)], "the weight that is exported")


def _assert_loaded(subject: BackendUnderTest, layer: SharedLayer, data: Data, what: str) -> None:
    """Check a layer that has loaded what one with the values of ``data`` has saved."""
    weight = data.weight if subject.has("dormant weights") else np.where(data.mask, data.weight, 0)
    for name, shards, want in zip(
        ("weight", "mask", "bias"), layer.several("state"), (weight, data.mask, data.bias), strict=True
    ):
        _assert_equal(shards, want, f"the {name} that came back, {what}")
    clean = data._replace(weight=np.where(data.mask, data.weight, 0))
    _assert_matches(subject, "y", layer.shards("value", data.x), expected(clean)["y"])
    if subject.has("dormant weights") and subject.has("distributed masks"):
        for mask in (data.mask | True, data.mask):
            layer.ask("set_mask", mask)
            _assert_equal(layer.several("state")[0], weight, f"the weight under a new mask, {what}")
            _assert_equal(layer.shards("visible_weight"), np.where(mask, weight, 0), f"what it shows, {what}")


def _assert_lie_alike(layer: SharedLayer, when: str) -> None:
    weight, mask, _ = layer.several("state")
    for rank, (one, other) in enumerate(zip(mask or (), weight or (), strict=True)):
        extra, missing = (one.held & ~other.held).sum(), (other.held & ~one.held).sum()
        assert (extra, missing) == (0, 0), (
            f"rank {rank} must hold of the mask what it holds of the weight; of one that was set {when} it holds {extra} "
            f"entries besides, and {missing} are missing"
        )


def _whole(shards: Shards | None) -> Array:
    """Return the array that ranks hold together, each entry as the first that holds it has it; all must have the same."""
    assert shards, "there must be shards"
    whole = shards[0].values.copy()
    for shard in reversed(shards):
        whole[shard.held] = shard.values[shard.held]
    for rank, shard in enumerate(shards):
        equal_bits([shard.values[shard.held]], [whole[shard.held]], f"what rank {rank} holds, against rank 0")
    return whole
