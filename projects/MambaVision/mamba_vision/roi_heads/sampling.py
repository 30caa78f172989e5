"""Which RoIs a stage is trained on: drawn at random, for all images at once.

Shapes:
    N images; C candidates of all images together; S to draw of an image at most; G ground-truth
    objects of an image, with padding; K foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..proposals import to_device

__all__ = ["Objects", "Sampler", "Samples", "draw_samples", "pad_candidates", "pad_objects"]

# For few different shapes: candidates of all images come in multiples of this many,
CANDIDATES = 512
OBJECTS = 8  # and ground-truth objects of an image in this many, or twice, four times as many, ...


@torch.no_grad()
def draw_samples(
    classes: Tensor,
    images: Tensor,
    num_images: int,
    *,
    background: int,
    batch_size_per_image: int,
    positive_fraction: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a random sample of each image's candidates, of which some are foreground.

    The distribution is that of Detectron2's ``subsample_labels``: any foreground of the allowed
    size is as likely as any other, and so is any background that fills the sample up. That waits
    for the GPU six times an image; nothing here waits, or depends on more than shapes.

    Args:
        classes: of the candidates, (C,); -1 for one not to be drawn.
        images: whose they are, (C,), from 0 to N - 1.
        num_images: N.
        background: the class that is no foreground.
        batch_size_per_image: S.
        positive_fraction: the largest share of them that may be foreground.

    Returns:
        The places of those drawn among the candidates, (N S,), image by image, foreground first;
        where these are fewer, they come first, and -1 after them. Then how many are foreground,
        and how many background, in each image, (N,) each.
    """
    # Sorted by image, then foreground, background and the rest; in random order within these.
    kinds = 3 * images.to(torch.float64) + (classes == background) + 2 * (classes == -1)
    kinds += torch.rand(len(classes), device=classes.device)
    kinds, order = kinds.sort(stable=True)
    numbers = torch.arange(3 * num_images, dtype=torch.float64, device=classes.device)
    starts, middles, ends = torch.searchsorted(kinds, numbers).view(num_images, 3).unbind(dim=1)

    foreground = (middles - starts).clamp(max=int(batch_size_per_image * positive_fraction))
    others = (ends - middles).minimum(batch_size_per_image - foreground)
    last = (foreground + others).cumsum(dim=0)
    slots = torch.arange(num_images * batch_size_per_image, device=classes.device)
    owners = torch.searchsorted(last, slots, right=True).clamp(max=num_images - 1)
    own = slots - (last - foreground - others)[owners]
    behind = own - foreground[owners]
    places = torch.where(behind < 0, starts[owners] + own, middles[owners] + behind)
    there = slots < last[-1]
    drawn = order[places.where(there, 0)] if len(order) else places
    return drawn.where(there, -1), foreground, others


class Objects(NamedTuple):
    """The ground truth of N images."""

    boxes: Tensor  # (N, G, 4), then zeros
    classes: Tensor  # (N, G)
    counts: Tensor  # how many an image has, (N,)


@dataclass
class Samples:
    """What a stage is trained on: image by image, foreground first, and padding after all."""

    floats: Tensor  # boxes and those of the objects, (N S, 8); 0 in the padding
    integers: Tensor  # (N S, 5); -1 in the padding, see COLUMNS
    foreground: list[int]  # of each image
    others: list[int]

    # The class, K for background; the object's place among the image's; the image; whether the box
    # is a ground-truth object's; and whose candidate it is in the next stage, -1 for no one's.
    COLUMNS = ("classes", "index", "images", "is_ground_truth", "candidates")

    def __len__(self) -> int:
        return sum(self.foreground) + sum(self.others)

    @property
    def candidates(self) -> Tensor:
        """A column, the padding's rows too."""
        return self.integers[:, self.COLUMNS.index("candidates")]

    def of_images(self, name: str) -> list[Tensor]:
        """A column, or ``boxes`` or ``objects``, image by image."""
        if name in self.COLUMNS:
            column = self.integers[:, self.COLUMNS.index(name)]
        else:
            column = self.floats[:, :4] if name == "boxes" else self.floats[:, 4:]
        sizes = [f + b for f, b in zip(self.foreground, self.others, strict=True)]
        return list(column[: len(self)].split(sizes))

    def instances(self, targets: list[Instances]) -> list[Instances]:
        """See :meth:`ClassSpecificCascadeROIHeads.label_and_sample_proposals`."""
        names = ("boxes", "objects", "classes", "index", "is_ground_truth")
        columns = [self.of_images(name) for name in names]
        instances = []
        for target, boxes, objects, classes, index, added in zip(targets, *columns, strict=True):
            sample = Instances(target.image_size, proposal_boxes=Boxes(boxes))
            sample.gt_classes, sample.is_ground_truth = classes, added == 1
            if len(target):
                sample.gt_boxes, sample.gt_index = Boxes(objects), index
            instances.append(sample)
        return instances

    def foreground_instances(self, targets: list[Instances]) -> list[Instances]:
        """The foreground of N images: ``proposal_boxes``, ``gt_classes`` and ``gt_index``."""
        columns = [self.of_images(name) for name in ("boxes", "classes", "index")]
        return [
            Instances(
                target.image_size,
                proposal_boxes=Boxes(boxes[:count]),
                gt_classes=classes[:count],
                gt_index=index[:count],
            )
            for target, count, boxes, classes, index in zip(
                targets, self.foreground, *columns, strict=True
            )
        ]


class Sampler(nn.Module):
    """Matches candidates with objects and samples them; waits for nothing.

    Args:
        matcher: of IoUs.
        num_classes: K.
        batch_size_per_image: S.
        positive_fraction: the largest share of foreground.
        append_objects: whether the objects are candidates, too.
    """

    def __init__(
        self,
        matcher: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        append_objects: bool,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.append_objects = append_objects

    def forward(
        self,
        boxes: Tensor,
        images: Tensor,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        gt_counts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``floats`` and ``integers`` of samples, and how many are foreground and others.

        Args:
            boxes: candidates, (C, 4).
            images: whose they are, (C,); -1 for those not to be sampled.
            gt_boxes, gt_classes, gt_counts: see :class:`Objects`.
        """
        count, most = gt_classes.shape
        given = len(boxes)
        if self.append_objects:
            there = torch.arange(most, device=boxes.device) < gt_counts[:, None]
            numbers = torch.arange(count, device=boxes.device)[:, None].expand(count, most)
            boxes = torch.cat([boxes, gt_boxes.flatten(0, 1)])
            images = torch.cat([images, numbers.where(there, -1).flatten()])
        owners = images.clamp(min=0)
        index, labels = self.matcher(_iou(gt_boxes[owners], boxes[:, None]).T)
        classes = gt_classes[owners, index].where(labels == 1, self.num_classes)
        classes = classes.masked_fill((labels == -1) | (images < 0), -1)
        places, foreground, others = draw_samples(
            classes,
            owners,
            count,
            background=self.num_classes,
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
        )
        added = torch.arange(len(boxes), device=boxes.device) >= given
        columns = [classes, index, images, added.to(torch.int64), images.masked_fill(added, -1)]
        padding = (places < 0)[:, None]
        places = places.clamp(min=0)
        floats = torch.cat([boxes, gt_boxes[owners, index]], dim=1)[places]
        integers = torch.stack(columns, dim=1)[places]
        return (
            floats.masked_fill(padding, 0),
            integers.masked_fill(padding, -1),
            torch.cat([foreground, others]),
        )


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoUs of boxes (..., 4) with others, as Detectron2's ``pairwise_iou`` computes them."""
    starts = torch.maximum(boxes[..., :2], others[..., :2])
    ends = torch.minimum(boxes[..., 2:], others[..., 2:])
    width, height = (ends - starts).clamp(min=0).unbind(dim=-1)
    common = width * height
    area, other = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (boxes, others))
    return torch.where(common > 0, common / (area + other - common), 0)


def pad_candidates(proposals: list[Instances]) -> tuple[Tensor, Tensor]:
    """Proposals of all images, (C, 4), and whose they are, (C,), -1 for padding."""
    boxes = [p.proposal_boxes.tensor if len(p) else _whole_frame(p) for p in proposals]
    ends = list(accumulate(len(b) for b in boxes))
    device = boxes[0].device
    count = -(-ends[-1] // CANDIDATES) * CANDIDATES
    numbers = torch.arange(count, dtype=torch.float32, device=device)
    images = torch.searchsorted(to_device(ends, device), numbers, right=True)
    images = images.masked_fill(images == len(boxes), -1)
    return F.pad(torch.cat(boxes), (0, 0, 0, count - ends[-1])), images


def pad_objects(targets: list[Instances]) -> Objects:
    """The ``gt_boxes`` and ``gt_classes`` of N images."""
    counts = [len(target) for target in targets]
    most = OBJECTS
    while most < max(counts):
        most *= 2
    boxes = targets[0].gt_boxes.tensor.new_zeros(len(targets), most, 4)
    classes = targets[0].gt_classes.new_zeros(len(targets), most)
    for target, count, boxes_i, classes_i in zip(targets, counts, boxes, classes, strict=True):
        boxes_i[:count], classes_i[:count] = target.gt_boxes.tensor, target.gt_classes
    return Objects(boxes, classes, to_device(counts, boxes.device))


def _whole_frame(proposals: Instances) -> Tensor:
    """The image's frame as its one proposal, (1, 4), with the device and dtype of ``proposals``."""
    height, width = proposals.image_size
    return proposals.proposal_boxes.tensor.new_tensor([[0, 0, width, height]])
