"""Detectron2's evaluation on COCO, without a device that waits for masks to be encoded.

Shape legend: R detections of an image of H x W pixels.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as rle
from torch import Tensor

__all__ = ["COCOEvaluator", "run_lengths"]

PIXELS = 1 << 28  # whose masks are looked at in one go


class COCOEvaluator(_COCOEvaluator):
    """Detectron2's, with the same arguments and results, in less time.

    Where the runs of a mask begin is found on the device, so that the masks need not leave it; the
    rest is done by a thread, while the model looks at the next images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: list[Future[dict]] = []

    def reset(self) -> None:
        super().reset()
        self._pending = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """See :meth:`detectron2.evaluation.COCOEvaluator.process`."""
        for record, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                super().process([record], [output])
                continue
            fields = output["instances"].get_fields()
            masks = fields.get("pred_masks")
            runs = None if masks is None else run_lengths(masks)
            rest = {name: value for name, value in fields.items() if name != "pred_masks"}
            found = Instances(output["instances"].image_size, **rest).to("cpu")
            self._pending.append(self._thread.submit(_finish, record["image_id"], found, runs))

    def evaluate(self, img_ids: list | None = None) -> dict[str, Any]:
        """See :meth:`detectron2.evaluation.COCOEvaluator.evaluate`."""
        self._predictions += [prediction.result() for prediction in self._pending]
        self._pending = []
        return super().evaluate(img_ids)


def run_lengths(masks: Tensor) -> list[np.ndarray]:
    """Lengths of the runs of zeros and ones that masks consist of, as in COCO's encoding.

    Args:
        masks: bool, (R, H, W).

    Returns:
        For each mask the lengths, column after column, in turn of zeros and of ones; the first
        may be 0.
    """
    pixels = masks.shape[1] * masks.shape[2]
    lengths = []
    for some in masks.split(max(1, PIXELS // pixels)):
        columns = some.transpose(1, 2).flatten(1)
        changes = columns.diff(dim=1, prepend=columns.new_zeros(len(columns), 1))
        of_mask, places = changes.nonzero().t().cpu().numpy()
        bounds = np.searchsorted(of_mask, np.arange(len(some) + 1))
        for first, last in pairwise(bounds):
            lengths.append(np.diff(places[first:last], prepend=0, append=pixels))
    return lengths


def _finish(image_id: int, found: Instances, runs: list[np.ndarray] | None) -> dict[str, Any]:
    """One image's entry in Detectron2's list of predictions."""
    results = instances_to_coco_json(found, image_id)
    if runs:
        size = list(found.image_size)
        codes = rle.frPyObjects([{"counts": counts, "size": size} for counts in runs], *size)
        for result, code in zip(results, codes, strict=True):
            result["segmentation"] = {"size": size, "counts": code["counts"].decode()}
    return {"image_id": image_id, "instances": results}
