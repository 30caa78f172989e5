"""Detectron2's evaluation on COCO, without a device that waits for masks to be encoded.

Shape legend: R detections of an image of H x W pixels.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator as _COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as rle
from torch import Tensor

__all__ = ["COCOEvaluator", "run_lengths"]

PIXELS = 1 << 28  # whose masks are looked at in one go
AHEAD = 8  # images whose masks may lie on the device


class COCOEvaluator(_COCOEvaluator):
    """Detectron2's, with the same arguments and results, in less time.

    Where the runs of a mask begin is found on the device, so that the masks need not leave it. All
    is done by a thread, on a stream of its own, while the model looks at the next images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: list[Future[dict]] = []
        self._stream: torch.cuda.Stream | None = None

    def reset(self) -> None:
        super().reset()
        self._pending = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """See :meth:`detectron2.evaluation.COCOEvaluator.process`."""
        for record, output in zip(inputs, outputs, strict=True):
            if "instances" not in output:
                super().process([record], [output])
                continue
            if len(self._pending) >= AHEAD:
                self._pending[-AHEAD].result()
            found = output["instances"]
            done = None
            if (device := found.pred_boxes.device).type == "cuda":
                done = torch.cuda.current_stream(device).record_event()
            work = self._thread.submit(self._finish, record["image_id"], found, done)
            self._pending.append(work)

    def _finish(
        self, image_id: int, found: Instances, done: torch.cuda.Event | None
    ) -> dict[str, Any]:
        """One image's entry in Detectron2's list of predictions, which are whole once ``done``."""
        with ExitStack() as stack:
            if done is not None:
                self._stream = self._stream or torch.cuda.Stream(found.pred_boxes.device)
                self._stream.wait_event(done)
                stack.enter_context(torch.cuda.stream(self._stream))
            fields = dict(found.get_fields())
            masks = fields.pop("pred_masks", None)
            runs = None if masks is None else run_lengths(masks)
            found = Instances(found.image_size, **fields).to("cpu")
        results = instances_to_coco_json(found, image_id)
        if runs:
            size = list(found.image_size)
            codes = rle.frPyObjects([{"counts": counts, "size": size} for counts in runs], *size)
            for result, code in zip(results, codes, strict=True):
                result["segmentation"] = {"size": size, "counts": code["counts"].decode()}
        return {"image_id": image_id, "instances": results}

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
