"""How far a detector's findings move when the images reach it by another way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetMapper
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, inference_on_dataset
from detectron2.structures import Instances, pairwise_iou
from omegaconf import DictConfig
from torch import Tensor, nn

from ..errors import UserError
from .mappers import OpenCVDatasetMapper, OpenCVResize

__all__ = ["READERS", "Agreement", "compare", "evaluate_reader"]

READERS = {
    "Pillow": (DatasetMapper, ResizeShortestEdge),
    "OpenCV": (OpenCVDatasetMapper, OpenCVResize),
}
"""Ways to read and resize: the mapper and the augmentation of each."""

Findings = dict[Any, Instances]


@dataclass(frozen=True)
class Agreement:
    """What :func:`compare` found; M pairs.

    ``box_moves`` (M,): the largest shift of a box's four coordinates, in pixels of the file;
    ``score_moves`` (M,): the change of the score; ``unmatched``: how many had no partner, on either
    side.
    """

    box_moves: Tensor
    score_moves: Tensor
    unmatched: tuple[int, int]


def evaluate_reader(
    reader: str, config: DictConfig, model: nn.Module
) -> tuple[dict[str, Any], Findings]:
    """Evaluate a model on its config's test set, read in one of the two ways.

    Args:
        reader: a key of :data:`READERS`.
        config: ``dataloader.test`` and ``dataloader.evaluator`` are used; it is not changed. The
            mapper's resizing keeps its lengths.
        model: on its device.

    Returns:
        The evaluator's results, and what was found: image id to boxes, scores and classes.

    Raises:
        UserError: the test mapper augments by something that is not resizing.
    """
    dataloader = copy.deepcopy(config.dataloader)
    mapper, resize = READERS[reader]
    old = dataloader.test.mapper
    dataloader.test.mapper = LazyCall(mapper)(
        is_train=False,
        image_format=old.image_format,
        augmentations=[_resize(resize, augmentation) for augmentation in old.augmentations],
    )
    keeper = _Keeper()
    loader = instantiate(dataloader.test)  # first: a data set may come to be on first use
    evaluators = DatasetEvaluators([instantiate(dataloader.evaluator), keeper])
    results = inference_on_dataset(model, loader, evaluators)
    return results, keeper.findings


def compare(first: Findings, second: Findings, min_score: float, min_iou: float = 0.5) -> Agreement:
    """Pair detections of the same class that overlap, the best scores of the first side choosing.

    Args:
        first: image id to ``pred_boxes``, ``scores`` and ``pred_classes``.
        second: the same images, seen another way.
        min_score: detections of the first side below it are left out. A detection of the second
            side may be a partner whatever its score, but counts as unmatched only from it upwards.
        min_iou: how much a pair must overlap.
    """
    box_moves, score_moves, alone = [], [], [0, 0]
    for image_id, a in first.items():
        b = second[image_id]
        iou = pairwise_iou(a.pred_boxes, b.pred_boxes)
        iou[a.pred_classes[:, None] != b.pred_classes] = 0
        taken = torch.zeros(len(b), dtype=torch.bool)
        for i in a.scores.argsort(descending=True).tolist():
            if a.scores[i] < min_score:
                break
            free = iou[i].masked_fill(taken, 0)
            j = int(free.argmax()) if len(b) else -1
            if j < 0 or free[j] < min_iou:
                alone[0] += 1
                continue
            taken[j] = True
            box_moves.append((a.pred_boxes.tensor[i] - b.pred_boxes.tensor[j]).abs().max())
            score_moves.append((a.scores[i] - b.scores[j]).abs())
        alone[1] += int((~taken & (b.scores >= min_score)).sum())
    return Agreement(_stack(box_moves), _stack(score_moves), (alone[0], alone[1]))


def _resize(target: type, augmentation: Mapping[str, Any]) -> Any:
    try:
        lengths, max_size = augmentation["short_edge_length"], augmentation["max_size"]
    except KeyError as error:
        raise UserError(
            "dataloader.test.mapper.augmentations holds something other than a resize by "
            "short_edge_length and max_size; compare with a config that only resizes"
        ) from error
    return LazyCall(target)(short_edge_length=lengths, max_size=max_size)


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0)


class _Keeper(DatasetEvaluator):
    """Keeps what was found in each image, but for the masks."""

    def __init__(self) -> None:
        self.findings: Findings = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs):
            found = output["instances"]
            kept = Instances(found.image_size)
            for field in ("pred_boxes", "scores", "pred_classes"):
                kept.set(field, found.get(field).to("cpu"))
            self.findings[image["image_id"]] = kept
