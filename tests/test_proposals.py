"""Proposals of fixed shapes: by hand, against Detectron2's choice, and without a wait."""

import pytest
import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals

from mamba_vision.proposals import select_proposals, to_device

SIZES = [(60, 96), (64, 80)]  # of the images: height, width
OPTIONS = {"threshold": 0.7, "min_box_size": 0.0, "most": 40}


def _boxes(*level_sizes, dtype=torch.float32):
    """Overlapping boxes of two images, some beyond their edges; no two logits are equal."""
    corners = 90 * torch.rand(2, sum(level_sizes), 2) - 10
    boxes = torch.cat([corners, corners + 10 + 20 * torch.rand_like(corners)], dim=2)
    logits = torch.stack([torch.randperm(sum(level_sizes)) for _ in range(2)]).to(dtype) - 20
    logits = [x.sort(descending=True).values for x in logits.split(level_sizes, dim=1)]
    return boxes, torch.cat(logits, dim=1)


def test_by_hand():
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],
            [0, 0, 10, 9],  # suppressed by the one before
            [50, 50, 70, 90],  # clipped
            [0, 0, 10, 9],  # of another level
            [-30, 0, 2, 30],  # too narrow once it is clipped
            [0, 40, torch.inf, 60],
        ]
    )
    logits = torch.tensor([2.0, 1.5, 1.0, 3.0, 2.5, 2.0])
    boxes, logits, counts = select_proposals(
        boxes[None],
        logits[None],
        [3, 3],
        torch.tensor([[80, 60]]),
        **OPTIONS | {"min_box_size": 2.0},
    )
    expected = torch.zeros(1, 6, 4)
    expected[0, :3] = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 80]])
    assert torch.equal(boxes, expected)
    assert logits.tolist() == [[3.0, 2.0, 1.0] + 3 * [-torch.inf]]
    assert counts.tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [5, 40, 1000])
@pytest.mark.parametrize("level_sizes", [(60, 60, 20), (1, 200), (30,)])
def test_is_the_choice_of_detectron2(level_sizes, most, dtype):
    boxes, logits = _boxes(*level_sizes, dtype=dtype)
    logits[1, ::4] = -torch.inf
    boxes[0, ::5] = torch.nan
    expected = find_top_rpn_proposals(
        [x.clone() for x in boxes.split(level_sizes, dim=1)],
        list(logits.float().split(level_sizes, dim=1)),
        SIZES,
        nms_thresh=0.7,
        pre_nms_topk=10_000,
        post_nms_topk=most,
        min_box_size=6.0,
        training=False,
    )
    got = select_proposals(
        boxes,
        logits,
        level_sizes,
        to_device(SIZES, boxes.device),
        **OPTIONS | {"most": most, "min_box_size": 6.0},
    )
    for boxes_i, logits_i, count, of_image in zip(*got, expected, strict=True):
        assert 0 < count == len(of_image)
        assert torch.equal(boxes_i[:count], of_image.proposal_boxes.tensor)
        assert torch.equal(logits_i[:count].float(), of_image.objectness_logits)
        assert not boxes_i[count:].any()
        assert (logits_i[count:] == -torch.inf).all()
    assert got[0].shape == (2, min(most, len(level_sizes) * max(level_sizes)), 4)
    assert got[1].dtype == dtype


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("level_sizes", "dtype"),
    [((60, 60, 20), torch.float16), ((2000, 2000, 2000, 2000, 780), torch.float32)],
)
def test_a_cuda_graph_and_no_wait(level_sizes, dtype):
    (boxes, logits), others = (_boxes(*level_sizes, dtype=dtype) for _ in range(2))
    options = OPTIONS | {"most": 1000}
    expected = [
        select_proposals(*x, level_sizes, torch.tensor(SIZES), **options)
        for x in ((boxes, logits), others)
    ]
    boxes, logits = boxes.cuda(), logits.cuda()
    sizes = to_device(SIZES, boxes.device)
    select_proposals(boxes, logits, level_sizes, sizes, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sizes = to_device(SIZES, boxes.device)
        at_once = select_proposals(boxes, logits, level_sizes, sizes, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_proposals(boxes, logits, level_sizes, sizes, **options)
    boxes.copy_(others[0])
    logits.copy_(others[1])
    graph.replay()
    for got, wanted in zip((at_once, captured), expected, strict=True):
        assert wanted[2].min() > 0
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one.cpu(), other)
