"""The evaluator's predictions and results are Detectron2's."""

import time

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.evaluation import COCOEvaluator as Theirs
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle

from mamba_vision.engine import coco_evaluator, load_config
from mamba_vision.engine.coco_evaluator import COCOEvaluator, run_lengths


def noise(count, height=24, width=40, device="cpu"):
    """Masks of noise, among them an empty one, a full one, and one that begins with a one."""
    masks = torch.rand(count, height, width) < 0.3
    for i, mask in enumerate(masks[:3]):
        mask[:] = i == 1
    if count > 2:
        masks[2, 0, 0] = True
    return masks.to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("pixels", [1 << 28, 2000, 1])
def test_runs_are_those_of_cocos_encoding(device, pixels, monkeypatch):
    monkeypatch.setattr(coco_evaluator, "PIXELS", pixels)
    for count in (0, 1, 7):
        masks = noise(count, device=device)
        found = run_lengths(masks)
        assert len(found) == count
        for mask, counts in zip(masks.cpu().numpy(), found):
            code = rle.frPyObjects({"counts": counts, "size": mask.shape}, *mask.shape)
            assert code["counts"] == rle.encode(np.asfortranarray(mask, np.uint8))["counts"]
    assert [counts.tolist() for counts in run_lengths(noise(3))] == [[960], [0, 960], [0, 1, 959]]


def detections(count, masks=True):
    corners = torch.rand(count, 2) * 16
    found = Instances((24, 40))
    found.pred_boxes = Boxes(torch.cat([corners, corners + 8], dim=1))
    found.scores = torch.rand(count)
    found.pred_classes = torch.randint(2, (count,))
    if masks:
        found.pred_masks = noise(count)
    return found


@pytest.mark.parametrize("masks", [True, False])
def test_predictions_are_detectron2s(toy, masks):
    name = load_config(toy).dataloader.test.dataset.names
    ours, theirs = COCOEvaluator(name), Theirs(name)
    images = [
        ({"image_id": i}, {"instances": detections(count, masks)})
        for i, count in enumerate((5, 0, 1))
    ]
    for evaluator in (ours, theirs):
        evaluator.reset()
        evaluator.process(*map(list, zip(*images[:2])))
        evaluator.process(*map(list, zip(*images[2:])))
        evaluator.evaluate()
    assert ours._predictions == theirs._predictions
    assert [len(p["instances"]) for p in ours._predictions] == [5, 0, 1]
    ours.reset()
    assert ours.evaluate() == {}


@pytest.mark.cuda
def test_masks_that_the_gpu_has_yet_to_draw(toy):
    name = load_config(toy).dataloader.test.dataset.names
    ours, theirs = COCOEvaluator(name), Theirs(name)
    ours.reset(), theirs.reset()
    for i in range(12):
        found = detections(5)
        late = found.to("cuda")
        masks, late.pred_masks = late.pred_masks, torch.zeros_like(late.pred_masks)
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)
        late.pred_masks.copy_(masks)
        ours.process([{"image_id": i % 3}], [{"instances": late}])
        theirs.process([{"image_id": i % 3}], [{"instances": found}])
    for evaluator in (ours, theirs):
        evaluator.evaluate()
    assert ours._predictions == theirs._predictions


def test_few_images_lie_on_the_device(toy, monkeypatch):
    """Or a thread that cannot keep up would fill its memory."""
    evaluator = COCOEvaluator(load_config(toy).dataloader.test.dataset.names)
    evaluator.reset()
    finish, waiting = evaluator._finish, []

    def counted(*args):
        waiting.append(sum(not work.done() for work in evaluator._pending))
        time.sleep(0.01)
        return finish(*args)

    monkeypatch.setattr(evaluator, "_finish", counted)
    monkeypatch.setattr(coco_evaluator, "AHEAD", 3)
    for i in range(20):
        evaluator.process([{"image_id": i % 3}], [{"instances": detections(2)}])
    evaluator.evaluate()
    assert len(evaluator._predictions) == 20
    assert 1 < max(waiting) <= 3


def test_what_goes_wrong_in_the_thread_is_raised(toy):
    evaluator = COCOEvaluator(load_config(toy).dataloader.test.dataset.names)
    evaluator.reset()
    broken = detections(2)
    broken.remove("scores")
    evaluator.process([{"image_id": 0}], [{"instances": broken}])
    with pytest.raises(AttributeError, match="scores"):
        evaluator.evaluate()


@pytest.mark.parametrize("name", ["tiny_3x_coco", "nano_shapes"])
def test_the_configs_take_it(name):
    evaluator = load_config(f"cascade_mask_rcnn_mamba_vision_{name}").dataloader.evaluator
    assert evaluator._target_ is COCOEvaluator or evaluator._target_.endswith(".COCOEvaluator")


def test_proposals_are_left_to_detectron2(toy):
    config = load_config(toy)
    config.dataloader.evaluator._target_ = COCOEvaluator
    evaluator = instantiate(config.dataloader.evaluator)
    evaluator.reset()
    evaluator.process([{"image_id": 0}], [{"proposals": detections(1, masks=False)}])
    assert [list(p) for p in evaluator._predictions] == [["image_id", "proposals"]]
