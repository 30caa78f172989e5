"""Which images make up a training batch, in an order that can be taken up anywhere.

Detectron2's samplers make an endless stream of indices from a seed, at positions 0, 1, 2, ...; here
it is gathered into groups of images of like orientation. All processes walk along the same stream,
and each takes its share of the groups. What is used up can be said shortly: every position below
some number but for a few, which wait for their group to fill.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

__all__ = ["Cursor", "GroupSampler", "Sample"]


@dataclass(frozen=True)
class Sample:
    """An image of the data set, at a position in the stream."""

    position: int
    index: int


@dataclass(frozen=True)
class Cursor:
    """How far the stream is used up.

    Attributes:
        position: the first position that has not been drawn.
        waiting: positions that were drawn and wait for their group to fill, in order.
    """

    position: int = 0
    waiting: tuple[int, ...] = ()


class GroupSampler:
    """Groups of samples, without end.

    Detectron2's ``AspectRatioGroupedDataset`` does the same to images that are loaded already, and
    to every process's share of the stream by itself. Here the order of the images does not depend
    on the number of processes, as long as a group has the same size.

    Args:
        sampler: one of Detectron2's for training; it orders the indices.
        group_size: images in a group.
        kinds: of every image, 0 or 1; a group is of one kind. ``None`` takes all images for alike.
    """

    def __init__(
        self,
        sampler: TrainingSampler | RepeatFactorTrainingSampler,
        group_size: int,
        kinds: Sequence[int] | None = None,
    ) -> None:
        self.sampler = sampler
        self._group_size = group_size
        self.kinds = kinds

    @property
    def seed(self) -> int:
        """What the order of the images comes from; equal in all processes."""
        return self.sampler._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self.sampler._seed = value

    def after(self, cursor: Cursor) -> Iterator[tuple[list[Sample], Cursor]]:
        """This process's groups from there on, each with the place after it.

        The place is that after all processes have taken their groups, and so the same in all.
        """
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: tuple[list[Sample], ...] = ([], [])
        groups: list[list[Sample]] = []
        waiting = set(cursor.waiting)
        for position, index in zip(itertools.count(), self.sampler._infinite_indices()):
            if position < cursor.position and position not in waiting:
                continue
            bucket = buckets[self.kinds[index] if self.kinds is not None else 0]
            bucket.append(Sample(position, index))
            if len(bucket) < self._group_size:
                continue
            groups.append(bucket[:])
            bucket.clear()
            if len(groups) == world_size:
                left = {p for p in waiting if p > position}
                left |= {sample.position for bucket in buckets for sample in bucket}
                yield groups[rank], Cursor(max(cursor.position, position + 1), tuple(sorted(left)))
                groups = []
