"""Images and objects that a GPU is given without being waited for."""

import copy

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from mamba_vision.engine.transfer import send

SIZE = (24, 32)


def images(masks):
    made = []
    for count in (3, 0):
        objects = Instances(SIZE, gt_boxes=Boxes(torch.rand(count, 4)))
        objects.gt_classes = torch.arange(count)
        objects.gt_masks = masks(count)
        objects.names = ["a"] * count
        pixels = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
        made.append({"image": pixels, "instances": objects, "file_name": "x.jpg", "height": 24})
    return made


def bits(count):
    return BitMasks(torch.rand(count, *SIZE) > 0.5)


def polygons(count):
    return PolygonMasks([[np.array([1.0, 1, 9, 1, 9, 9])]] * count)


def test_a_cpu_is_given_what_there_is():
    given = images(bits)
    assert send(given, torch.device("cpu")) is given


@pytest.mark.cuda
@pytest.mark.parametrize("masks", [bits, polygons])
def test_a_gpu_is_given_the_same_and_not_waited_for(masks):
    device, given = torch.device("cuda"), images(masks)
    before = copy.deepcopy(given)
    send(given, device)[0]["instances"].to(device)
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    sent = send(given, device)
    moved = [image["instances"].to(device) for image in sent]
    assert not torch.cuda.current_stream().query()  # it still sleeps
    for image, ours, objects, theirs in zip(before, sent, moved, given, strict=True):
        assert set(ours) == set(image)
        assert ours["file_name"] == "x.jpg"
        assert torch.equal(ours["image"].cpu(), image["image"])
        assert ours["image"].is_cuda
        expected = image["instances"]
        assert type(objects) is Instances
        assert objects.image_size == SIZE
        assert torch.equal(objects.gt_boxes.tensor.cpu(), expected.gt_boxes.tensor)
        assert torch.equal(objects.gt_classes.cpu(), expected.gt_classes)
        assert objects.gt_boxes.tensor.is_cuda
        assert objects.gt_classes.is_cuda
        assert objects.names == expected.names
        if masks is bits:
            assert objects.gt_masks.tensor.is_cuda
            assert torch.equal(objects.gt_masks.tensor.cpu(), expected.gt_masks.tensor)
        # what draws them finds them where they were
        assert ours["instances"].gt_boxes.device.type == "cpu"
        assert not theirs["image"].is_cuda
