"""The pooler against Detectron2's own."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler as Detectron2Pooler
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes

from mamba_vision.errors import UserError
from mamba_vision.roi_heads import ROIPooler

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SIZE = (320, 480)
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)


def draw_maps(device="cpu", scales=SCALES):
    sizes = [(round(SIZE[0] * scale), round(SIZE[1] * scale)) for scale in scales]
    return [torch.randn(2, 4, *size).to(device).requires_grad_() for size in sizes]


def draw_boxes(*counts, device="cpu"):
    """For each image as many boxes, with sides from 2 to 600 pixels: those of every level."""
    lists = []
    for count in counts:
        sides = 2 * 300 ** torch.rand(count, 2)
        centres = torch.rand(count, 2) * torch.tensor([SIZE[1], SIZE[0]])
        boxes = Boxes(torch.cat((centres - sides / 2, centres + sides / 2), dim=1).to(device))
        boxes.clip(SIZE)
        lists.append(boxes)
    return lists


def outcome(pooler, maps, boxes):
    pooled = pooler(maps, boxes)
    weights = torch.linspace(-1, 1, pooled.numel()).view(pooled.shape).to(pooled)
    return [pooled.detach(), *torch.autograd.grad((pooled * weights).sum(), maps)]


@pytest.mark.parametrize("counts", [(30, 50), (40, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("size", [7, 14])
@every_device
def test_is_detectron2s(device, size, counts):
    maps, boxes = draw_maps(device), draw_boxes(*counts, device=device)
    arguments = (size, SCALES, 0, "ROIAlignV2", 112)
    results, expected = (
        outcome(pooler(*arguments), maps, boxes) for pooler in (ROIPooler, Detectron2Pooler)
    )
    assert results[0].shape == (sum(counts), 4, size, size)
    for result, wanted in zip(results, expected):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


@every_device
def test_one_level(device):
    maps, boxes = draw_maps(device, SCALES[2:3]), draw_boxes(5, 6, device=device)
    arguments = (7, SCALES[2:3], 0, "ROIAlignV2")
    results, expected = (
        outcome(pooler(*arguments), maps, boxes) for pooler in (ROIPooler, Detectron2Pooler)
    )
    for result, wanted in zip(results, expected):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments", [(2, 5, 224, 4), (2, 5, 112, 4), (3, 7, 224, 4), (0, 9, 37, 5)], ids=str
)
@every_device
def test_levels_are_detectron2s(monkeypatch, device, arguments):
    """For random boxes, and for those about as large as where one level ends."""
    least, most, size, at = arguments
    corners, sides = 500 * torch.rand(20000, 2), 0.5 * 5000 ** torch.rand(20000, 2)
    edges = torch.tensor([size**2 * 4.0 ** (level - at) for level in range(least, most + 2)])
    ulps = torch.arange(-500, 501, dtype=torch.int32)
    areas = (edges.view(torch.int32)[:, None] + ulps).view(torch.float32).flatten()
    zeros, roots = torch.zeros_like(areas), areas.sqrt()
    boxes = torch.cat(
        (
            torch.cat((corners, corners + sides), dim=1),
            torch.stack((zeros, zeros, areas, zeros + 1), dim=1),
            torch.stack((zeros, zeros, roots, roots), dim=1),
            torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 5.0, 9.0, 5.0], [0.0, 0.0, 1e15, 1e15]]),
        )
    )
    boxes = [Boxes(x.to(device)) for x in (boxes[:10000], boxes[10000:])]
    seen = []

    def keep(maps, boxes, images, levels, *_, **__):
        seen.append((images, levels))

    monkeypatch.setattr("mamba_vision.roi_heads.pooler.multi_level_roi_align", keep)
    scales = [2.0**-level for level in range(least, most + 1)]
    ROIPooler(7, scales, 0, "ROIAlignV2", size, at)([torch.zeros(2, 1, 1, 1)], boxes)
    ((images, levels),) = seen
    assert torch.equal(levels.long(), assign_boxes_to_levels(boxes, *arguments))
    assert images.bincount().tolist() == [len(x) for x in boxes]
    assert torch.equal(images, images.sort().values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_device
def test_half_precision_is_rounded_once(device, dtype):
    """It is Detectron2's on the same maps in float32, rounded; under autocast too."""
    half = [x.detach().to(dtype) for x in draw_maps(device)]
    boxes = draw_boxes(20, 20, device=device)
    arguments = (7, SCALES, 0, "ROIAlignV2")
    wide = Detectron2Pooler(*arguments)([x.float() for x in half], boxes)
    pooler = ROIPooler(*arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        under_autocast = pooler(half, boxes)
    for pooled in (pooler(half, boxes), under_autocast):
        assert pooled.dtype == dtype
        error = (pooled.float() - wide).abs().max()
        assert error <= torch.finfo(dtype).eps * wide.abs().max()


def test_it_brings_no_state():
    assert not ROIPooler(7, SCALES, 0, "ROIAlignV2").state_dict()


def test_the_backend_is_the_operators():
    pooler = ROIPooler(7, SCALES, 0, "ROIAlignV2", backend="nonsense")
    with pytest.raises(UserError, match="no backend is called 'nonsense'"):
        pooler(draw_maps(), draw_boxes(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, SCALES, 0, "ROIAlign"), "pooler_type must be 'ROIAlignV2' .*, not 'ROIAlign'; "),
        ((7, SCALES, 2, "ROIAlignV2"), "sampling_ratio must be 0 .*, not 2; for others take det"),
        (((7, 5), SCALES, 0, "ROIAlignV2"), r"output_size must be \(7, 7\) .*, not \(7, 5\); "),
    ],
    ids=["type", "ratio", "form"],
)
def test_what_it_does_not_do(arguments, message):
    with pytest.raises(UserError, match=message):
        ROIPooler(*arguments)


def test_boxes_of_another_number_of_images():
    with pytest.raises(ValueError, match="each of 2 images, not 1"):
        ROIPooler(7, SCALES, 0, "ROIAlignV2")(draw_maps(), draw_boxes(3))


@pytest.mark.cuda
def test_it_never_waits_for_the_device():
    maps, boxes = draw_maps("cuda"), draw_boxes(30, 0, device="cuda")
    pooler = ROIPooler(7, SCALES, 0, "ROIAlignV2")
    expected = outcome(pooler, maps, boxes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pooled = pooler(maps, boxes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(pooled, expected[0])
