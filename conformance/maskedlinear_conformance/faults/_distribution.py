"""Faults of layers that several processes or devices share: what one rank knows and another does not."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,no-any-return"

import numpy as np

from maskedlinear import pruning
from maskedlinear_conformance.faults._reference_backend import Mutant
from maskedlinear_conformance.faults._reference_distributed import ReferenceShared


class OneRankHasAMaskOfItsOwn(Mutant):
    """The second rank draws or decides its mask by itself."""

    name = "one rank has a mask of its own"
    laws = ("distributed masks",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _OneRankHasAMaskOfItsOwn(self, placement, weight, mask, bias)


class _OneRankHasAMaskOfItsOwn(ReferenceShared):
    def agreed(self, rank, mask):
        return mask[::-1] if rank == 1 else mask


class RanksPruneTheirOwnPart(Mutant):
    """Each rank prunes what it keeps to the sparsity that is asked of all."""

    name = "ranks prune their own part"
    laws = ("distributed masks",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _RanksPruneTheirOwnPart(self, placement, weight, mask, bias)


class _RanksPruneTheirOwnPart(ReferenceShared):
    def prune(self, sparsity):
        for rank in self.ranks.here:
            cells, mask = self.cells(rank), self.masks[rank]
            score, zeros = abs(self.full[rank])[cells][None], int(sparsity * cells.sum())
            mask[cells] = pruning.prune(np.where(mask[cells], score, 0), num_zeros=zeros, masks=mask[cells][None])[0]


class GradientsAreNotSummed(Mutant):
    """Each rank keeps the gradients of its own part of the batch."""

    name = "gradients are not summed"
    laws = ("distributed gradients", "distributed guards")

    def distributed_layer(self, placement, weight, mask, bias):
        return _GradientsAreNotSummed(self, placement, weight, mask, bias)


class _GradientsAreNotSummed(ReferenceShared):
    def averaged(self, parts):
        return parts


class GradientsAreSummedTwice(Mutant):
    """A sum over ranks is summed over ranks again."""

    name = "gradients are summed twice"
    laws = ("distributed gradients",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _GradientsAreSummedTwice(self, placement, weight, mask, bias)


class _GradientsAreSummedTwice(ReferenceShared):
    def averaged(self, parts):
        once = super().averaged(parts)
        return self.summed(once) if self.division.startswith("batch") else once


class MaskedGradientsOnOtherRanks(Mutant):
    """Only the first rank masks its gradients: a hook that sharding has lost."""

    name = "masked gradients on other ranks"
    laws = ("distributed gradients",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _MaskedGradientsOnOtherRanks(self, placement, weight, mask, bias)


class _MaskedGradientsOnOtherRanks(ReferenceShared):
    def gradients(self, x, g):
        found = super().gradients(x, g)
        for rank, shard in zip(self.ranks.here, found[1], strict=True):
            if rank:
                shard.values[~self.masks[rank] & shard.held] = 1
        return found


class TheMaskBeforeShardingActs(Mutant):
    """A mask that is set after sharding shows, and the one from before acts."""

    name = "the mask before sharding acts"
    laws = ("distributed masks",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _TheMaskBeforeShardingActs(self, placement, weight, mask, bias)


class _TheMaskBeforeShardingActs(ReferenceShared):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.first = dict(self.masks)

    def acting_masks(self):
        return self.first


class AMaskStaysWhereItIsLoaded(Mutant):
    """A layer that takes a checkpoint of another number of ranks keeps its old mask."""

    name = "a mask stays where it is loaded"
    laws = ("distributed checkpoints",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _AMaskStaysWhereItIsLoaded(self, placement, weight, mask, bias)


class _AMaskStaysWhereItIsLoaded(ReferenceShared):
    def reads(self, rank, weight, mask):
        return weight, self.masks[rank]


class DormantValuesOfTheFirstRankAlone(Mutant):
    """A checkpoint gives what is dormant to the first rank, and 0 to the others."""

    name = "dormant values of the first rank alone"
    laws = ("distributed checkpoints",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _DormantValuesOfTheFirstRankAlone(self, placement, weight, mask, bias)


class _DormantValuesOfTheFirstRankAlone(ReferenceShared):
    def reads(self, rank, weight, mask):
        return np.where(mask, weight, 0) if rank else weight, mask


class ANewMaskLosesDormantValuesOfOtherRanks(Mutant):
    """What a mask hides is kept on the first rank alone."""

    name = "a new mask loses dormant values of other ranks"
    laws = ("distributed masks",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _ANewMaskLosesDormantValuesOfOtherRanks(self, placement, weight, mask, bias)


class _ANewMaskLosesDormantValuesOfOtherRanks(ReferenceShared):
    def set_mask(self, mask):
        super().set_mask(mask)
        self.full = {rank: self.shown(rank) if rank else full for rank, full in self.full.items()}


class EveryRankKeepsTheWholeMask(Mutant):
    """The weight is cut, and its mask is not."""

    name = "every rank keeps the whole mask"
    laws = ("distributed masks",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _EveryRankKeepsTheWholeMask(self, placement, weight, mask, bias)


class _EveryRankKeepsTheWholeMask(ReferenceShared):
    def state(self):
        weight, _, bias = super().state()
        whole = dict.fromkeys(self.ranks.here, self.put_together(self.masks))
        return weight, self.shards(whole, lambda _: np.ones(self.shape, bool)), bias


class TheGuardIsOnTheFirstRank(Mutant):
    """Momentum and decay move what is masked on the other ranks."""

    name = "the guard is on the first rank"
    laws = ("distributed guards",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _TheGuardIsOnTheFirstRank(self, placement, weight, mask, bias)


class _TheGuardIsOnTheFirstRank(ReferenceShared):
    def guarded(self, rank, moved):
        return moved if rank else super().guarded(rank, moved)


class EveryRankAddsTheBias(Mutant):
    """Each rank adds the bias to its part of a sum over the inputs."""

    name = "every rank adds the bias"
    laws = ("distributed values",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _EveryRankAddsTheBias(self, placement, weight, mask, bias)


class _EveryRankAddsTheBias(ReferenceShared):
    def with_bias(self, y):
        times = self.ranks.count if self.division == "inputs" else 1
        return y if self.bias is None else (y + times * self.bias).astype(self.dtype)


class EveryRankComputesTheWholeBatch(Mutant):
    """The output is replicated: each rank gathers x and computes all of it."""

    name = "every rank computes the whole batch"
    laws = ("distributed work",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _EveryRankComputesTheWholeBatch(self, placement, weight, mask, bias)


class _EveryRankComputesTheWholeBatch(ReferenceShared):
    def value(self, x):
        whole = super().value(x)
        every = self.ranks.all_of(dict(zip(self.ranks.here, whole, strict=True)))
        y, held = whole[0].values.copy(), np.ones(whole[0].held.shape, bool)
        for shard in every.values():
            y[shard.held] = shard.values[shard.held]
        return [shard._replace(values=y, held=held) for shard in whole]


class TheProgramGathersX(Mutant):
    """Each rank has its part of the output, after it has gathered all of x."""

    name = "the program gathers x"
    laws = ("distributed work",)

    def distributed_layer(self, placement, weight, mask, bias):
        return _TheProgramGathersX(self, placement, weight, mask, bias)


class _TheProgramGathersX(ReferenceShared):
    def gathered(self, x, g):
        return [x.shape]
