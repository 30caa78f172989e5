"""Images, objects and numbers that go to a GPU and back without more waiting than they need."""

import copy

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from mamba_vision.transfer import begin_fetch, pin, send

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


def tensors(image):
    objects = image["instances"]
    masks = [objects.gt_masks.tensor] if isinstance(objects.gt_masks, BitMasks) else []
    return [image["image"], objects.gt_boxes.tensor, objects.gt_classes, *masks]


@pytest.mark.parametrize("masks", [bits, polygons])
def test_pins_what_goes_to_a_gpu_and_leaves_the_rest(pinning, masks):
    for image in images(masks):
        image["instances"]._note = "private"
        pinned = pin(image)
        assert list(pinned) == list(image)
        assert pinned["file_name"] is image["file_name"]
        before, after = image["instances"], pinned["instances"]
        assert type(after) is Instances
        assert (after.image_size, after._note) == (SIZE, "private")
        assert list(after.get_fields()) == list(before.get_fields())
        assert after.names is before.names
        assert masks is bits or after.gt_masks is before.gt_masks
        for old, new in zip(tensors(image), tensors(pinned), strict=True):
            assert torch.equal(old, new)
            assert old.dtype == new.dtype
            assert not old.is_pinned()
            assert new.is_pinned() or not new.numel()
        for once, twice in zip(tensors(pinned), tensors(pin(pinned)), strict=True):
            assert twice is once or not once.numel()


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("masks", [bits, polygons])
def test_a_gpu_is_given_the_same_and_not_waited_for(masks, pinned):
    device, given = torch.device("cuda"), images(masks)
    if pinned:
        given = [pin(image) for image in given]
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
        assert pin(ours["image"]) is ours["image"]
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


NUMBERS = torch.tensor([[3, 0], [2**40 + 1, -7]])


def test_numbers_of_a_cpu_are_there():
    assert begin_fetch(NUMBERS)() == [[3, 0], [2**40 + 1, -7]]


@pytest.mark.cuda
def test_numbers_are_fetched_before_what_a_gpu_is_given_after_them():
    numbers = NUMBERS.cuda()
    begin_fetch(numbers)()  # allocates
    numbers += 1
    fetch = begin_fetch(numbers)
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    numbers += 1
    assert fetch() == [[4, 1], [2**40 + 2, -6]]
    assert not torch.cuda.current_stream().query()  # it still sleeps
